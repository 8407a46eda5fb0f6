//! What the system refused while a checkpoint was written, and what to do about it.

use std::{
    io::{Error as OsError, ErrorKind},
    path::Path,
};

use crate::{
    error::{Code, Error},
    os_error,
};

/// `FN-E403` with its cause; `FN-E401` where the disk is full.
pub(super) fn unwritable(path: &Path, e: &OsError) -> Error {
    // What the standard library refuses by itself has no number: a byte of zero in a name, a path without a name.
    let errno = e.raw_os_error().or((e.kind() == ErrorKind::InvalidInput).then_some(libc::EINVAL));
    refused(path, &format!("{}: {e}.", path.display()), errno)
}

/// An error of the I/O layer about a file at `path` as one of a checkpoint.
pub(super) fn as_write_error(path: &Path, e: &Error) -> Error {
    let errno = if e.code() == Code::DiskFull { Some(e.os_error().unwrap_or(libc::ENOSPC)) } else { e.os_error() };
    match e.code() {
        Code::IoFailed | Code::PathUnusable | Code::DiskFull => refused(path, e.message(), errno),
        other => Error::new(other, e.message()).errno(errno.unwrap_or(0)).action(e.next_action().unwrap_or_default()),
    }
}

/// What to do about a file that could not be read: `otherwise`, unless the cause is a limit of the process or a missing
/// permission.
pub(super) fn reading(e: &OsError, otherwise: &str) -> String {
    match e.raw_os_error() {
        Some(errno @ (libc::EMFILE | libc::ENFILE)) => os_error::advice(errno, Path::new("/")).unwrap_or_default(),
        Some(libc::EACCES | libc::EPERM) => "Check the permissions of the file and its directory.".to_owned(),
        _ => otherwise.to_owned(),
    }
}

fn refused(path: &Path, text: &str, errno: Option<i32>) -> Error {
    let errno = errno.unwrap_or(0);
    let code = if os_error::is_full(errno) { Code::CheckpointSpace } else { Code::CheckpointWrite };
    let advice = || os_error::advice(errno, path);
    let more = |what: &str| advice().map(|first| format!("{first} {what}"));
    let action = match errno {
        libc::ENOSPC if no_more_files(path) => {
            Some("That file system takes no more files (df -i): remove files there, or save to another.".to_owned())
        }
        libc::EFBIG => more("Or lower shard_bytes, so that files are smaller."),
        libc::EMFILE => more("Or raise shard_bytes, so that there are fewer files."),
        // ENOENT of a directory that was to be made: in /proc. EEXIST: a link there that leads nowhere.
        libc::EINVAL | libc::ENOTDIR | libc::ENOENT | libc::EEXIST => Some("Save to another path.".to_owned()),
        _ => advice(),
    };
    let otherwise = "Save to another disk; see dmesg for what the kernel says about this one.";
    Error::new(code, text).errno(errno).action(action.unwrap_or_else(|| otherwise.to_owned()))
}

/// What a save that failed has removed again may have made room for this many names.
const FEW_FILES: u64 = 16;

/// Whether it is not space that is missing but room for names.
fn no_more_files(path: &Path) -> bool {
    let stat = path.ancestors().find_map(|path| rustix::fs::statvfs(path).ok());
    stat.is_some_and(|stat| stat.f_files > 0 && stat.f_favail < FEW_FILES)
}
