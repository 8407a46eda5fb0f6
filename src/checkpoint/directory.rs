//! A checkpoint's directory, made under a private name beside its place and renamed when it is whole.
//!
//! D1: under its own name a checkpoint is whole or absent, whenever the process ends. D2: the private directory is locked
//! as long as its process lives; whoever can lock it knows that its owner is dead. D3: nothing but checkpoints and
//! private directories is ever replaced or removed.

use std::{
    fs::File,
    io::{Error as OsError, ErrorKind},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use crate::{
    checkpoint::manifest::{MANIFEST, Manifest},
    error::{Code, Error, Result},
    io::{FileSystem, random},
};

const PREFIX: &str = ".funicular-save-";

/// A directory in the making; removed when it is dropped unpublished.
#[derive(Debug)]
pub struct Workspace {
    path: PathBuf,
    target: PathBuf,
    overwrite: bool,
    /// Locked; see D2.
    _lock: File,
}

impl Workspace {
    /// Makes the private directory for a checkpoint at `target`.
    ///
    /// # Errors
    /// `FN-E402` if something is there that is not to be replaced; `FN-E403` if the place cannot be written to.
    pub fn create(target: &Path, overwrite: bool) -> Result<Self> {
        let target = std::path::absolute(target).map_err(|e| unwritable(target, &e))?;
        let (Some(parent), Some(_)) = (target.parent(), target.file_name()) else {
            return Err(unwritable(&target, &OsError::from(ErrorKind::InvalidInput)));
        };
        check_target(&target, overwrite)?;
        std::fs::create_dir_all(parent).map_err(|e| unwritable(parent, &e))?;
        let path = private_name(parent);
        std::fs::create_dir(&path).map_err(|e| unwritable(parent, &e))?;
        match lock(&path) {
            Ok(lock) => Ok(Self { path, target, overwrite, _lock: lock }),
            Err(e) => {
                let _ = std::fs::remove_dir(&path);
                Err(unwritable(parent, &e))
            }
        }
    }

    /// Where files are written now.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where they will be.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Gives the directory its name, durably. What is in it must be durable already.
    ///
    /// # Errors
    /// `FN-E402` if the place was taken meanwhile; `FN-E403` when the system refuses.
    pub fn publish(self) -> Result<()> {
        let failed = |e: &OsError| unwritable(&self.target, e);
        sync_dir(&self.path).map_err(|e| failed(&e))?;
        check_target(&self.target, self.overwrite)?;
        let replaces = self.target.join(MANIFEST).exists();
        let flags = if replaces { RenameFlags::EXCHANGE } else { RenameFlags::empty() };
        if let Err(e) = renameat_with(CWD, &self.path, CWD, &self.target, flags) {
            return Err(match OsError::from(e) {
                e if matches!(e.raw_os_error(), Some(libc::ENOTEMPTY | libc::EEXIST | libc::ENOTDIR)) => {
                    taken(&self.target)
                }
                e if replaces && matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS)) => Error::new(
                    Code::CheckpointExists,
                    format!("{}: this file system cannot exchange two directories.", self.target.display()),
                )
                .action("Save under a new name, and remove the old checkpoint afterwards."),
                e => failed(&e),
            });
        }
        if let Some(parent) = self.target.parent() {
            sync_dir(parent).map_err(|e| failed(&e))?;
        }
        Ok(())
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        // After an exchange this is the checkpoint that was replaced; after a rename there is nothing. A failure leaves
        // a directory that the next save sweeps.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// Removes what dead processes left beside `target`; each note is a full line.
pub(super) fn sweep(target: &Path) -> Vec<String> {
    let mut notes = Vec::new();
    for path in leftovers(target.parent().unwrap_or(target)) {
        if std::fs::remove_dir_all(&path).is_ok() {
            notes.push(format!("FN-I401 removed {}, left behind by a save that did not end.", path.display()));
        }
    }
    notes
}

/// The private directories in `parent` whose processes are dead.
pub fn leftovers(parent: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(parent) else { return Vec::new() };
    let remote = FileSystem::of(parent).is_ok_and(FileSystem::is_remote);
    let ours = format!("{PREFIX}{}-", host_name());
    let mut found: Vec<PathBuf> = entries
        .flatten()
        // Locks do not always reach across machines.
        .filter(|e| e.file_name().to_string_lossy().starts_with(if remote { &ours } else { PREFIX }))
        .map(|e| e.path())
        .filter(|path| path.symlink_metadata().is_ok_and(|m| m.is_dir()) && lock(path).is_ok())
        .collect();
    found.sort();
    found
}

/// Removes all but the newest `keep` checkpoints among `target` and those beside it whose names differ from its own only in
/// digits; each note is a full line.
pub(super) fn prune(target: &Path, keep: usize) -> Vec<String> {
    let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else { return Vec::new() };
    let pattern = without_digits(&name.to_string_lossy());
    let Ok(entries) = std::fs::read_dir(parent) else { return Vec::new() };
    let mut found: Vec<(u64, PathBuf)> = entries
        .flatten()
        .filter(|e| without_digits(&e.file_name().to_string_lossy()) == pattern)
        .filter_map(|e| Some((read_manifest(&e.path()).ok()?.created, e.path())))
        .collect();
    found.sort();
    found.reverse();
    let mut notes = Vec::new();
    for (_, path) in found.into_iter().skip(keep.max(1)).filter(|(_, path)| path != target) {
        // Out of its name first: a checkpoint that is half removed must not look like one.
        let away = private_name(parent);
        let removed = std::fs::rename(&path, &away).and_then(|()| std::fs::remove_dir_all(&away));
        notes.push(match removed {
            Ok(()) => format!("FN-I402 removed {}: {keep} checkpoints are kept.", path.display()),
            Err(e) => format!("FN-W402 {} could not be removed: {e}.", path.display()),
        });
    }
    notes
}

/// Reads and checks the manifest of the checkpoint at `path`.
///
/// # Errors
/// `FN-E404` if there is none, `FN-E405`, `FN-E406`.
pub fn read_manifest(path: &Path) -> Result<Manifest> {
    let file = path.join(MANIFEST);
    match std::fs::read(&file) {
        Ok(bytes) => Manifest::decode(&bytes, &file),
        Err(e) => {
            let why = if path.is_dir() { format!("no readable {MANIFEST} in it: {e}") } else { e.to_string() };
            Err(Error::new(Code::CheckpointMissing, format!("{}: {why}.", path.display()))
                .errno(e.raw_os_error().unwrap_or(0))
                .action("`funicular checkpoint ls` lists the checkpoints in a directory."))
        }
    }
}

/// Writes a small file and makes it durable.
pub(super) fn write_file(dir: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let path = dir.join(name);
    File::create(&path)
        .and_then(|mut file| std::io::Write::write_all(&mut file, bytes).and_then(|()| file.sync_all()))
        .map_err(|e| unwritable(&path, &e))
}

/// `FN-E403` with its cause; `FN-E401` where the disk is full.
pub(super) fn unwritable(path: &Path, e: &OsError) -> Error {
    let (code, action) = match e.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => (Code::CheckpointSpace, "Free space on that disk, or save to another."),
        Some(libc::EROFS | libc::EACCES | libc::EPERM) => (Code::CheckpointWrite, "Save where this user can write."),
        _ => (Code::CheckpointWrite, "Save to another path; see dmesg for what the kernel says about that disk."),
    };
    Error::new(code, format!("{}: {e}.", path.display())).errno(e.raw_os_error().unwrap_or(0)).action(action)
}

fn taken(target: &Path) -> Error {
    Error::new(Code::CheckpointExists, format!("{} exists.", target.display()))
        .errno(libc::EEXIST)
        .action("Name another path; overwrite=True replaces a checkpoint, and nothing else.")
}

/// An empty directory may be replaced, a checkpoint if asked for.
fn check_target(target: &Path, overwrite: bool) -> Result<()> {
    match target.symlink_metadata() {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(unwritable(target, &e)),
        Ok(m) if m.is_dir() => {
            let empty = std::fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_none());
            if empty || (overwrite && target.join(MANIFEST).exists()) { Ok(()) } else { Err(taken(target)) }
        }
        Ok(_) => Err(taken(target)),
    }
}

fn private_name(parent: &Path) -> PathBuf {
    parent.join(format!("{PREFIX}{}-{}-{:016x}", host_name(), std::process::id(), random()))
}

fn lock(path: &Path) -> std::result::Result<File, OsError> {
    let file = File::open(path)?;
    match file.try_lock() {
        Ok(()) if file.metadata()?.ino() == path.metadata()?.ino() => Ok(file),
        Ok(()) => Err(OsError::from_raw_os_error(libc::ENOENT)),
        Err(std::fs::TryLockError::WouldBlock) => Err(OsError::from_raw_os_error(libc::EWOULDBLOCK)),
        // Some remote file systems lock files only; the directory is then known by its name.
        Err(std::fs::TryLockError::Error(e)) if FileSystem::of(path).is_ok_and(FileSystem::is_remote) => {
            let alive = pid_of(path).is_some_and(|pid| Path::new(&format!("/proc/{pid}")).exists());
            if alive && pid_of(path) != Some(std::process::id()) { Err(e) } else { Ok(file) }
        }
        Err(std::fs::TryLockError::Error(e)) => Err(e),
    }
}

fn pid_of(path: &Path) -> Option<u32> {
    path.file_name()?.to_str()?.rsplit('-').nth(1)?.parse().ok()
}

fn sync_dir(path: &Path) -> std::result::Result<(), OsError> {
    File::open(path)?.sync_all()
}

fn without_digits(name: &str) -> String {
    let mut out = String::new();
    for c in name.chars() {
        match (c.is_ascii_digit(), out.ends_with('#')) {
            (true, true) => {}
            (true, false) => out.push('#'),
            (false, _) => out.push(c),
        }
    }
    out
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '_' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint(dir: &Path, name: &str) -> PathBuf {
        let space = Workspace::create(&dir.join(name), true).expect("makes");
        write_file(space.path(), MANIFEST, &Manifest::new(serde_json::json!({})).encode()).expect("writes");
        space.publish().expect("publishes");
        dir.join(name)
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(dir).expect("lists").flatten();
        let mut names: Vec<String> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    #[test]
    fn appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().expect("a directory");
        let target = dir.path().join("a/step-1");
        let space = Workspace::create(&target, false).expect("makes");
        assert!(!target.exists());
        write_file(space.path(), "x", b"1").expect("writes");
        drop(space);
        assert_eq!(names(&dir.path().join("a")), Vec::<String>::new(), "given up: nothing stays");
        let made = checkpoint(&dir.path().join("a"), "step-1");
        assert_eq!(names(&made), [MANIFEST]);
    }

    #[test]
    fn only_checkpoints_are_replaced_and_only_if_asked() {
        let dir = tempfile::tempdir().expect("a directory");
        let made = checkpoint(dir.path(), "c");
        let refused = |path: &Path, overwrite| Workspace::create(path, overwrite).expect_err("refused").code();
        assert_eq!(refused(&made, false), Code::CheckpointExists);
        checkpoint(dir.path(), "c");
        assert_eq!(names(dir.path()), ["c"], "what was replaced is gone");
        std::fs::create_dir(dir.path().join("thesis")).expect("makes");
        std::fs::write(dir.path().join("thesis/text"), "years").expect("writes");
        assert_eq!(refused(&dir.path().join("thesis"), true), Code::CheckpointExists);
        assert_eq!(refused(&dir.path().join("thesis/text"), true), Code::CheckpointExists);
        std::fs::create_dir(dir.path().join("empty")).expect("makes");
        checkpoint(dir.path(), "empty");
    }

    #[test]
    fn the_dead_are_swept_and_the_living_and_strangers_are_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let living = Workspace::create(&dir.path().join("c"), false).expect("makes");
        let dead = dir.path().join(format!("{PREFIX}x-1-0123"));
        std::fs::create_dir(&dead).expect("makes");
        std::fs::write(dead.join("model.safetensors"), "half").expect("writes");
        std::fs::create_dir(dir.path().join("other")).expect("makes");
        assert_eq!(leftovers(dir.path()), [dead.as_path()]);
        assert_eq!(sweep(&dir.path().join("c")).len(), 1);
        assert!(!dead.exists() && living.path().exists() && dir.path().join("other").exists());
    }

    #[test]
    fn keeps_the_newest_of_one_series() {
        let dir = tempfile::tempdir().expect("a directory");
        for name in ["step-1", "step-2", "best", "step-30"] {
            checkpoint(dir.path(), name);
        }
        std::fs::create_dir(dir.path().join("step-4")).expect("makes");
        let notes = prune(&dir.path().join("step-30"), 2);
        assert_eq!(notes.len(), 1, "{notes:?}");
        assert_eq!(names(dir.path()), ["best", "step-2", "step-30", "step-4"]);
    }

    #[test]
    fn nothing_there_is_said() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(read_manifest(dir.path()).expect_err("empty").code(), Code::CheckpointMissing);
        assert_eq!(read_manifest(&dir.path().join("no")).expect_err("none").code(), Code::CheckpointMissing);
    }
}
