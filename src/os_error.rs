//! What to do about an error of the operating system, in one place: the same number gets the same advice everywhere.

use std::{io::Error as OsError, path::Path, sync::Arc, thread::JoinHandle, time::Duration};

use parking_lot::Mutex;

use crate::error::{Code, Error};

/// How often a thread is asked for that the system refuses "for now", and the first of the pauses in between, each longer by as much.
const TRIES: u32 = 10;
const PAUSE: Duration = Duration::from_millis(2);

/// Starts a thread. A system that is short of memory or process numbers refuses one now and gives it a moment later: it is asked again, for a
/// tenth of a second in all.
///
/// # Errors
/// Those of the system; [`no_thread`] says what to do.
pub fn start_thread(name: &str, body: impl FnOnce() + Send + 'static) -> std::io::Result<JoinHandle<()>> {
    // What a refused thread was to do is needed again.
    let body = Arc::new(Mutex::new(Some(body)));
    let ask = || {
        let body = Arc::clone(&body);
        std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let body = body.lock().take();
            if let Some(body) = body {
                body();
            }
        })
    };
    again(ask, std::thread::sleep)
}

/// Asks until the answer is another than "not now", [`TRIES`] times at most.
fn again<T>(mut ask: impl FnMut() -> std::io::Result<T>, pause: impl Fn(Duration)) -> std::io::Result<T> {
    for tried in 1..TRIES {
        match ask() {
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => pause(PAUSE * tried),
            other => return other,
        }
    }
    ask()
}

/// `FN-E107` for a refused thread: the reason is a limit, for every error number of the system. `instead` is another remedy, as
/// the end of a sentence; empty if there is none.
#[must_use]
pub fn no_thread(purpose: &str, e: &OsError, instead: &str) -> Error {
    let or = if instead.is_empty() { "" } else { ", or " };
    Error::new(Code::NoThread, format!("the system refused a thread for {purpose}: {e}."))
        .errno(e.raw_os_error().unwrap_or(0))
        .action(format!(
            "Raise the limit on processes and threads (ulimit -u; pids.max of the container){or}{instead}."
        ))
}

/// True for the two errors of a file system that holds no more: no space (or inodes) left, quota used up.
#[must_use]
pub fn is_full(errno: i32) -> bool {
    matches!(errno, libc::ENOSPC | libc::EDQUOT)
}

/// What to do about `errno` of a call on the file or directory `path`, as full sentences. `None`: nothing is known that
/// fits every call; say what fits this one.
#[must_use]
pub fn advice(errno: i32, path: &Path) -> Option<String> {
    let fixed = match errno {
        libc::ENOSPC if no_inodes(path) => {
            "That file system has no inodes left (df -i): remove files there, however small, or use another file system."
        }
        libc::ENOSPC => "Free space on that file system (df -h), or use another one.",
        libc::EDQUOT => "Your quota on that file system is used up: remove files of yours there, or have it raised.",
        libc::EFBIG => return Some(too_large()),
        libc::EMFILE => return Some(too_many_open()),
        libc::ENFILE => "The whole system has too many open files: end other programs, or raise sysctl fs.file-max.",
        libc::ENOMEM => {
            "The system refused memory: end other programs, or raise the container's or user's memory limit."
        }
        libc::EROFS => "That file system is mounted read-only (some are after errors: see dmesg). Use another path.",
        libc::EACCES | libc::EPERM => "Use a path that this user may write to.",
        libc::EIO => "The drive or its link is failing: see dmesg and `smartctl -a`; use another path.",
        libc::ENAMETOOLONG => "Use a shorter path.",
        libc::ELOOP => "The path goes through too many symbolic links: name the real directory.",
        libc::ESTALE => "The server of that network file system no longer knows the path: mount it again.",
        _ => return None,
    };
    Some(fixed.to_owned())
}

/// Advice for EMFILE, which does not depend on a path.
#[must_use]
pub fn too_many_open() -> String {
    let now = soft_limit("Max open files").map_or_else(String::new, |limit| format!(", now {limit}"));
    format!("This process has too many open files: raise the limit (ulimit -n{now}).")
}

/// The limit on the size of a file (ulimit -f) in bytes, if there is one.
fn file_size_limit() -> Option<u64> {
    soft_limit("Max file size")
}

fn too_large() -> String {
    match file_size_limit() {
        Some(bytes) => format!("Raise the limit on the size of a file (ulimit -f, now {bytes} bytes)."),
        None => "That file system takes no file of this size: use one that does (ext4, XFS).".to_owned(),
    }
}

/// Whether the file system of `path`, or of its nearest ancestor that exists, counts inodes and has none left.
pub(crate) fn no_inodes(path: &Path) -> bool {
    let found = path.ancestors().find_map(|path| rustix::fs::statvfs(path).ok());
    found.is_some_and(|stat| stat.f_files > 0 && stat.f_favail == 0)
}

/// A soft limit by its name in `/proc/self/limits`; `None` where there is none or it cannot be read.
fn soft_limit(name: &str) -> Option<u64> {
    let limits = std::fs::read_to_string("/proc/self/limits").ok()?;
    limits.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_is_refused_for_now_is_asked_for_again() {
        let asked = std::cell::Cell::new(0);
        let ask = |refusals: u32, errno: i32| {
            asked.set(0);
            let answer = || {
                asked.set(asked.get() + 1);
                if asked.get() > refusals { Ok(()) } else { Err(OsError::from_raw_os_error(errno)) }
            };
            again(answer, |_| {}).is_ok()
        };
        assert!(ask(3, libc::EAGAIN) && asked.get() == 4);
        assert!(!ask(u32::MAX, libc::EAGAIN) && asked.get() == TRIES);
        assert!(!ask(1, libc::ENOMEM) && asked.get() == 1, "any other error is final");
        let (done, is_done) = std::sync::mpsc::channel();
        start_thread("a test", move || done.send(std::thread::current().name() == Some("a test")).expect("listens"))
            .expect("starts")
            .join()
            .expect("ends");
        assert!(is_done.recv().expect("ran"));
    }

    #[test]
    fn each_number_has_its_own_advice() {
        let here = Path::new("/");
        let says = |errno, part: &str| {
            let advice = advice(errno, here).unwrap_or_default();
            assert!(advice.contains(part), "{errno}: {advice}");
        };
        says(libc::ENOSPC, "Free space");
        says(libc::EDQUOT, "quota");
        says(libc::EMFILE, "ulimit -n");
        says(libc::ENFILE, "fs.file-max");
        says(libc::ENOMEM, "memory");
        says(libc::EROFS, "read-only");
        says(libc::EIO, "dmesg");
        says(libc::EACCES, "may write");
        let large = advice(libc::EFBIG, here).unwrap_or_default();
        assert!(!large.contains("Free") && (large.contains("ulimit -f") || large.contains("file system")), "{large}");
        assert_eq!(advice(libc::EINVAL, here), None);
        let refused = no_thread("a test", &OsError::from_raw_os_error(libc::EAGAIN), "lower budget.threads");
        assert!(refused.to_string().ends_with("of the container), or lower budget.threads."), "{refused}");
        assert_eq!((refused.code(), refused.os_error()), (Code::NoThread, Some(libc::EAGAIN)));
    }

    #[test]
    fn limits_are_read_by_name() {
        assert!(soft_limit("Max open files").is_some_and(|limit| limit > 0));
        assert_eq!(soft_limit("Max unheard of"), None);
    }
}
