//! The private directory of a run on one path. It says who is at work there; the data itself has no name.
//!
//! R1: the owner file is locked as long as the process lives; a process that can lock it knows that its owner is dead.
//! R2: a directory is removed only if its name is one that `create` makes, its owner file is a record of the process in
//! the name, that process is dead, and nothing else is in it than what a run leaves there.

use std::{
    fs::{DirBuilder, File, OpenOptions, TryLockError},
    io::{Error as OsError, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use crate::{
    error::Result,
    io::{FileSystem, random, unusable},
    store::owner::{Owner, PrivateName},
};

const PREFIX: &str = "funicular-";
const OWNER: &str = "owner";
/// How the names of data files begin, where the file system has no files without a name.
const DATA: &str = "data-";
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
        let mut last = OsError::from_raw_os_error(libc::EEXIST);
        for _ in 0..ATTEMPTS {
            let path = dir.join(PrivateName::make(PREFIX, random()));
            match take(&path) {
                Ok(owner) => {
                    let this = Self { path, _owner: owner };
                    let notes = this.sweep(dir, file_system);
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
    fn sweep(&self, dir: &Path, file_system: FileSystem) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
        let Ok(mine) = std::fs::metadata(&self.path) else { return Vec::new() };
        let mut notes = Vec::new();
        for entry in entries.flatten() {
            let path = entry.path();
            let Some(name) = PrivateName::parse(PREFIX, &entry.file_name().to_string_lossy()) else { continue };
            let Ok(metadata) = path.symlink_metadata() else { continue };
            let ours = path != self.path && metadata.is_dir() && metadata.uid() == mine.uid();
            if ours && remove_if_dead(&path, &name, file_system) {
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
fn take(path: &Path) -> std::result::Result<File, OsError> {
    DirBuilder::new().mode(0o700).create(path)?;
    own(path).inspect_err(|_| {
        let _ = std::fs::remove_file(path.join(OWNER));
        let _ = std::fs::remove_dir(path);
    })
}

/// Makes the owner file, locks it and fills it in.
fn own(path: &Path) -> std::result::Result<File, OsError> {
    let owner = path.join(OWNER);
    let mut file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&owner)?;
    file.try_lock().map_err(lock_error)?;
    // A sweep may have come between making and locking it: then the lock is on a file that has no name any more.
    if owner.metadata()?.ino() != file.metadata()?.ino() {
        return Err(OsError::from_raw_os_error(libc::ENOENT));
    }
    file.write_all(Owner::this_process().encode().as_bytes())?;
    Ok(file)
}

fn remove_if_dead(path: &Path, name: &PrivateName, file_system: FileSystem) -> bool {
    let this_host = name.host == Owner::this_process().host;
    // Locks do not always reach across machines.
    if file_system.is_remote() && !this_host {
        return false;
    }
    let owner = path.join(OWNER);
    // Neither a link nor a pipe is an owner file: the one is not followed, the other not waited for.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = match OpenOptions::new().read(true).write(true).custom_flags(flags).open(&owner) {
        Ok(file) => file,
        // Its process died before it made the owner file; or it is about to, and will then make another directory.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return std::fs::remove_dir(path).is_ok(),
        Err(_) => return false,
    };
    if !file.metadata().is_ok_and(|m| m.is_file()) || file.try_lock().is_err() {
        return false;
    }
    // An owner file without a byte: its process died before it filled the file in.
    let unfilled = file.metadata().is_ok_and(|m| m.len() == 0);
    let record = Owner::read(&file);
    if !unfilled && !record.is_some_and(|record| name.fits(&record) && !record.is_alive()) {
        return false;
    }
    let Ok(entries) = std::fs::read_dir(path) else { return false };
    let Ok(names) = entries.map(|e| e.map(|e| e.file_name())).collect::<std::result::Result<Vec<_>, _>>() else {
        return false;
    };
    let data: Vec<PathBuf> = names.iter().filter(|n| *n != OWNER).map(|n| path.join(n)).collect();
    if !data.iter().all(|file| is_data(file)) {
        return false;
    }
    // Everything else first: while the owner file is there and locked by us, no other process takes this directory.
    data.iter().all(|file| std::fs::remove_file(file).is_ok())
        && std::fs::remove_file(&owner).is_ok()
        && std::fs::remove_dir(path).is_ok()
}

/// Whether a run names its data so.
fn is_data(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let digits = name.strip_prefix(DATA).filter(|rest| rest.bytes().all(|b| b.is_ascii_hexdigit()));
    digits.is_some() && path.symlink_metadata().is_ok_and(|m| m.is_file())
}

fn lock_error(e: TryLockError) -> OsError {
    match e {
        TryLockError::Error(e) => e,
        TryLockError::WouldBlock => OsError::from_raw_os_error(libc::EWOULDBLOCK),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn create(dir: &Path) -> (RunDir, Vec<String>) {
        RunDir::create(dir, FileSystem::Disk).expect("a run directory")
    }

    /// A directory as a run leaves it that was killed.
    fn left(dir: &Path, name: &str, owner: &str) -> PathBuf {
        let path = dir.join(name);
        std::fs::create_dir(&path).expect("makes");
        std::fs::write(path.join(OWNER), owner).expect("writes");
        path
    }

    #[test]
    fn lives_as_long_as_its_owner() {
        let dir = tempfile::tempdir().expect("a directory");
        let (run, notes) = create(dir.path());
        assert!(notes.is_empty());
        let owner = std::fs::read_to_string(run.path().join(OWNER)).expect("an owner file");
        assert_eq!(Owner::decode(&owner), Some(Owner::this_process()));
        drop(run);
        assert_eq!(std::fs::read_dir(dir.path()).expect("readable").count(), 0);
    }

    #[test]
    fn the_dead_are_swept_and_the_living_and_strangers_are_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let (living, _) = create(dir.path());
        let dead = left(dir.path(), "funicular-x-1-0123456789abcdef", "pid 1\nstart 5\nhost x\nboot b\n");
        std::fs::write(dead.join("data-00"), "left over").expect("writes");
        let older = left(dir.path(), "funicular-x-3-0123456789abcdef", "pid 3\nstart 5\nhost x\n");
        let unfilled = left(dir.path(), "funicular-x-4-0123456789abcdef", "");
        let half_made = dir.path().join("funicular-x-2-4567456745674567");
        std::fs::create_dir(&half_made).expect("makes");
        std::fs::write(dir.path().join("other"), "").expect("writes");

        let (_run, notes) = create(dir.path());
        assert!(!dead.exists() && !older.exists() && !unfilled.exists() && !half_made.exists());
        assert!(living.path().join(OWNER).exists() && dir.path().join("other").exists());
        assert_eq!(notes.len(), 4, "{notes:?}");
    }

    #[test]
    fn directories_of_the_user_stay() {
        let dir = tempfile::tempdir().expect("a directory");
        let record = "pid 1\nstart 5\nhost x\nboot b\n";
        std::fs::create_dir(dir.path().join("funicular-checkpoints")).expect("makes");
        let mut kept = vec![
            left(dir.path(), "funicular-corpus", "me"),
            left(dir.path(), "funicular-notes", record),
            left(dir.path(), "funicular-x-1-0123456789abcdef", "me"),
            left(dir.path(), "funicular-y-1-0123456789abcdef", record),
            left(dir.path(), "funicular-x-2-0123456789abcdef", record),
        ];
        let mine = left(dir.path(), "funicular-x-1-1123456789abcdef", record);
        std::fs::write(mine.join("data-thesis"), "three years").expect("writes");
        std::os::unix::fs::symlink(&mine, dir.path().join("funicular-x-1-2123456789abcdef")).expect("links");
        let linked = dir.path().join("funicular-x-1-3123456789abcdef");
        std::fs::create_dir(&linked).expect("makes");
        std::os::unix::fs::symlink(kept[1].join(OWNER), linked.join(OWNER)).expect("links");
        let living = Owner { host: "x".into(), ..Owner::this_process() };
        kept.extend([mine.clone(), linked, left(dir.path(), "funicular-x-1-4123456789abcdef", &living.encode())]);

        let (_run, notes) = create(dir.path());
        assert!(notes.is_empty(), "{notes:?}");
        assert!(kept.iter().all(|path| path.join(OWNER).exists()));
        assert!(mine.join("data-thesis").exists() && dir.path().join("funicular-checkpoints").exists());
    }

    #[test]
    fn another_machines_directory_on_a_shared_file_system_stays() {
        let dir = tempfile::tempdir().expect("a directory");
        let dead = left(dir.path(), "funicular-elsewhere-1-0123456789abcdef", "pid 1\nstart 1\nhost elsewhere\n");
        let _run = RunDir::create(dir.path(), FileSystem::Unusual("NFS")).expect("a run directory");
        assert!(dead.exists());
    }
}
