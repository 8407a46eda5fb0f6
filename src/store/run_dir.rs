//! The private directory of a run on one path. It says who is at work there; the data itself has no name.
//!
//! R1: the owner file is locked as long as the process lives; whoever can lock it knows that its owner is dead.
//! R2: only directories with our prefix, of our user, with an owner file that can be locked are removed.

use std::{
    fs::{DirBuilder, File, OpenOptions, TryLockError},
    io::{Error as OsError, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use crate::{
    error::Result,
    io::{FileSystem, random, unusable},
};

const PREFIX: &str = "funicular-";
const OWNER: &str = "owner";
/// How often a name may be lost to a process that takes it for a left-over while it is being made.
const ATTEMPTS: u32 = 16;

/// `PATH/funicular-HOST-PID-RANDOM`, removed on drop.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    /// Locked; see R1.
    _owner: File,
}

impl RunDir {
    /// Makes one in `dir`, and removes those of dead processes there. The notes tell of them.
    ///
    /// # Errors
    /// `FN-E604` if that is not possible.
    pub fn create(dir: &Path, file_system: FileSystem) -> Result<(Self, Vec<String>)> {
        let host = host_name();
        let mut last = OsError::from_raw_os_error(libc::EEXIST);
        for _ in 0..ATTEMPTS {
            let path = dir.join(format!("{PREFIX}{host}-{}-{:016x}", std::process::id(), random()));
            match take(&path, &host) {
                Ok(owner) => {
                    let this = Self { path, _owner: owner };
                    let notes = this.sweep(dir, &host, file_system);
                    return Ok((this, notes));
                }
                Err(e) => {
                    let lost = matches!(e.raw_os_error(), Some(libc::EEXIST | libc::ENOENT | libc::EWOULDBLOCK));
                    if !lost || !dir.is_dir() {
                        return Err(unusable(dir, &e));
                    }
                    last = e;
                }
            }
        }
        Err(unusable(dir, &last))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes what dead runs left in `dir`. Trouble with a left-over is no reason to fail: it stays.
    fn sweep(&self, dir: &Path, host: &str, file_system: FileSystem) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
        let Ok(mine) = std::fs::metadata(&self.path) else { return Vec::new() };
        let mut notes = Vec::new();
        for entry in entries.flatten() {
            let (name, path) = (entry.file_name(), entry.path());
            let ours = name.to_string_lossy().starts_with(PREFIX) && path != self.path;
            let Ok(metadata) = path.symlink_metadata() else { continue };
            if ours && metadata.is_dir() && metadata.uid() == mine.uid() && remove_if_dead(&path, host, file_system) {
                notes.push(format!("FN-I605 removed {}, left behind by a run that is dead.", path.display()));
            }
        }
        notes
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        // Nothing can be done about a failure here; the next run sweeps it.
        let _ = std::fs::remove_file(self.path.join(OWNER));
        let _ = std::fs::remove_dir(&self.path);
    }
}

/// Makes the directory and takes it, or leaves nothing behind.
fn take(path: &Path, host: &str) -> std::result::Result<File, OsError> {
    DirBuilder::new().mode(0o700).create(path)?;
    own(path, host).inspect_err(|_| {
        let _ = std::fs::remove_file(path.join(OWNER));
        let _ = std::fs::remove_dir(path);
    })
}

/// Makes the owner file, locks it and fills it in.
fn own(path: &Path, host: &str) -> std::result::Result<File, OsError> {
    let owner = path.join(OWNER);
    let mut file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&owner)?;
    file.try_lock().map_err(lock_error)?;
    // A sweep may have come between making and locking it: then the lock is on a file that has no name any more.
    if owner.metadata()?.ino() != file.metadata()?.ino() {
        return Err(OsError::from_raw_os_error(libc::ENOENT));
    }
    writeln!(file, "pid {}\nstart {}\nhost {host}", std::process::id(), start_time())?;
    Ok(file)
}

fn remove_if_dead(path: &Path, host: &str, file_system: FileSystem) -> bool {
    let owner = path.join(OWNER);
    let Ok(file) = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(&owner) else {
        // Its process died before it could make the owner file; or is about to, and will then make another directory.
        return std::fs::remove_dir(path).is_ok();
    };
    // Locks do not always reach across machines.
    let text = std::fs::read_to_string(&owner).unwrap_or_default();
    let same_host = text.lines().any(|line| line.strip_prefix("host ") == Some(host));
    if (file_system.is_remote() && !same_host) || file.try_lock().is_err() {
        return false;
    }
    let Ok(entries) = std::fs::read_dir(path) else { return false };
    // Everything else first: while the owner file is there and locked by us, nobody takes this directory.
    for entry in entries.flatten() {
        let name = entry.file_name();
        if name.to_string_lossy().starts_with("data-") {
            let _ = std::fs::remove_file(entry.path());
        }
    }
    std::fs::remove_file(&owner).is_ok() && std::fs::remove_dir(path).is_ok()
}

fn lock_error(e: TryLockError) -> OsError {
    match e {
        TryLockError::Error(e) => e,
        TryLockError::WouldBlock => OsError::from_raw_os_error(libc::EWOULDBLOCK),
    }
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let clean: String =
        name.trim().chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '_' }).collect();
    if clean.is_empty() { "host".to_owned() } else { clean }
}

/// When this process was started, in clock ticks since boot.
fn start_time() -> String {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The name, in parentheses, may hold anything; what follows it are numbers from the third field on.
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    after_name.split_whitespace().nth(19).unwrap_or("0").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn create(dir: &Path) -> (RunDir, Vec<String>) {
        RunDir::create(dir, FileSystem::Disk).expect("a run directory")
    }

    #[test]
    fn lives_as_long_as_its_owner() {
        let dir = tempfile::tempdir().expect("a directory");
        let (run, notes) = create(dir.path());
        assert!(notes.is_empty());
        let owner = std::fs::read_to_string(run.path().join(OWNER)).expect("an owner file");
        assert!(owner.contains(&format!("pid {}", std::process::id())), "{owner}");
        assert!(start_time().parse::<u64>().expect("a number") > 0);
        drop(run);
        assert_eq!(std::fs::read_dir(dir.path()).expect("readable").count(), 0);
    }

    #[test]
    fn the_dead_are_swept_and_the_living_and_strangers_are_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let (living, _) = create(dir.path());
        let dead = dir.path().join("funicular-x-1-0123");
        std::fs::create_dir(&dead).expect("makes");
        std::fs::write(dead.join(OWNER), "pid 1\nhost x\n").expect("writes");
        std::fs::write(dead.join("data-00"), "left over").expect("writes");
        let half_made = dir.path().join("funicular-x-2-4567");
        std::fs::create_dir(&half_made).expect("makes");
        let stranger = dir.path().join("funicular-notes");
        std::fs::create_dir(&stranger).expect("makes");
        std::fs::write(stranger.join("thesis.txt"), "three years").expect("writes");
        std::fs::write(dir.path().join("other"), "").expect("writes");

        let (_run, notes) = create(dir.path());
        assert!(!dead.exists() && !half_made.exists());
        assert!(living.path().join(OWNER).exists());
        assert!(stranger.join("thesis.txt").exists() && dir.path().join("other").exists());
        assert_eq!(notes.len(), 2, "{notes:?}");
    }

    #[test]
    fn another_machines_directory_on_a_shared_file_system_stays() {
        let dir = tempfile::tempdir().expect("a directory");
        let dead = dir.path().join("funicular-elsewhere-1-0123");
        std::fs::create_dir(&dead).expect("makes");
        std::fs::write(dead.join(OWNER), "pid 1\nhost elsewhere\n").expect("writes");
        let _run = RunDir::create(dir.path(), FileSystem::Unusual("NFS")).expect("a run directory");
        assert!(dead.exists());
    }
}
