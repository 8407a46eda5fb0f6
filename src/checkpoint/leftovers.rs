//! Private directories that are no longer wanted: what dead processes left, and checkpoints that were replaced or are too
//! many. Only our own files are removed.
//!
//! L1: a directory is locked before it is looked at and until it is gone: no two processes remove the same one, and none
//! removes what another one writes. L2: the manifest goes last, so that what is half removed still proves what it was.

use std::{
    ffi::{OsStr, OsString},
    io::{Error as OsError, ErrorKind},
    path::Path,
};

use rustix::fs::RenameFlags;

use crate::{
    checkpoint::{
        folder::{Folder, Links, rename},
        manifest::{LONGEST, MANIFEST, Manifest},
        manifest_file::manifest_of,
    },
    error::Error,
    io::FileSystem,
    store::{Owner, PrivateName},
};

/// How private directories are called.
pub(super) const PREFIX: &str = ".funicular-save-";
/// The record of the process that writes a private directory.
pub(super) const OWNER: &str = ".owner";
/// In a checkpoint that is whole and about to replace another in two steps: the name that it shall have.
pub(super) const SWAP: &str = ".swap";

/// A directory that may be removed, locked.
#[derive(Debug)]
pub struct Leftover {
    folder: Folder,
    proof: Proof,
}

/// Why a directory is ours.
#[derive(Debug)]
enum Proof {
    /// A checkpoint: the files that its manifest names are ours.
    Manifest(Vec<OsString>),
    /// The record of the process that wrote it: all files in it are.
    Owner,
    /// Made by a version that wrote no record: files are ours by their names.
    Names,
}

/// Why a directory is not to be removed.
#[derive(Debug)]
pub(super) enum Unproved {
    /// Another process has it, or gave it another name.
    Locked,
    /// It has no valid manifest.
    NoCheckpoint(Error),
}

impl Leftover {
    /// A checkpoint, by its manifest. It is locked.
    pub(super) fn checkpoint(folder: Folder) -> Result<Self, Unproved> {
        lock(&folder).map_err(|_| Unproved::Locked)?;
        let manifest = manifest_of(&folder, Links::No).map_err(Unproved::NoCheckpoint)?;
        Ok(Self { proof: Proof::Manifest(named(&manifest)), folder })
    }

    /// This left-over under its new path, after a rename.
    pub(super) fn moved(self, to: &Path) -> Self {
        Self { folder: self.folder.moved(to), ..self }
    }

    /// The private directory of a dead process; none if it is not one, or not proved to be ours.
    fn dead(path: &Path, remote: bool) -> Option<Self> {
        let name = PrivateName::parse(PREFIX, &path.file_name()?.to_string_lossy())?;
        // Locks do not always reach across machines.
        if remote && name.host != Owner::this_process().host {
            return None;
        }
        let folder = Folder::open_itself(path).ok()?;
        lock(&folder).ok()?;
        let record = folder.open_file(OWNER, Links::No).ok().map(|opened| Owner::read(&opened.file));
        if let Some(Some(owner)) = &record
            && (!name.fits(owner) || owner.is_alive())
        {
            return None;
        }
        // Without a record and without locks, only the process number in the name tells.
        if remote && record.is_none() && Path::new("/proc").join(name.pid.to_string()).exists() {
            return None;
        }
        let proof = match (manifest_of(&folder, Links::No), record) {
            (Ok(manifest), _) => Proof::Manifest(named(&manifest)),
            (Err(_), Some(Some(_))) => Proof::Owner,
            // The process was killed before it filled its record in, or its version wrote none.
            (Err(_), _) => Proof::Names,
        };
        Some(Self { folder, proof })
    }

    /// The open directory.
    pub(super) fn folder(&self) -> &Folder {
        &self.folder
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    fn is_ours(&self, name: &OsStr) -> bool {
        let known = name == MANIFEST || name == OWNER || name == SWAP;
        let ours = match &self.proof {
            Proof::Manifest(names) => known || names.iter().any(|n| n == name),
            Proof::Owner => true,
            Proof::Names => known || is_of_a_save(&name.to_string_lossy()),
        };
        ours && self.folder.has_file(name)
    }

    /// The names in it that are not ours.
    pub(super) fn strangers(&self) -> Vec<OsString> {
        let names = self.folder.names().unwrap_or_default();
        names.into_iter().filter(|name| !self.is_ours(name)).collect()
    }

    /// Removes it, except what is not ours; returns a note about that and about what the system refused.
    pub(super) fn remove(self) -> Option<String> {
        let strangers = self.strangers();
        if !strangers.is_empty() && matches!(self.proof, Proof::Names) {
            return Some(self.kept(&strangers));
        }
        let mut names = self.folder.names().unwrap_or_default();
        names.retain(|name| self.is_ours(name));
        names.sort_by_key(|name| name == MANIFEST);
        let removed = self.folder.remove(&names).and_then(|()| match std::fs::remove_dir(self.path()) {
            Err(e) if e.kind() != ErrorKind::NotFound && strangers.is_empty() => Err(e),
            _ => Ok(()),
        });
        match removed {
            Err(e) => Some(format!("FN-W402 {} could not be removed: {e}.", self.path().display())),
            Ok(()) if !strangers.is_empty() => Some(self.kept(&strangers)),
            Ok(()) => None,
        }
    }

    fn kept(&self, strangers: &[OsString]) -> String {
        let (path, names) = (self.path().display(), listed(strangers));
        format!("FN-W403 {path} stays: it holds {names}, which no save wrote. Move that, and remove the directory.")
    }

    /// Finishes a replacement in two steps during which its process was killed.
    fn end_swap(&self, parent: &Path) -> Option<String> {
        let Proof::Manifest(_) = self.proof else { return None };
        let name = self.folder.open_file(SWAP, Links::No).and_then(|f| f.read_all(LONGEST)).ok()?;
        let name = String::from_utf8(name).ok().filter(|name| super::folder::is_plain(name))?;
        let target = parent.join(&name);
        rename(self.path(), &target, RenameFlags::NOREPLACE).ok()?;
        let _ = self.folder.remove(&[SWAP.into(), OWNER.into()]);
        Some(format!("FN-I401 gave {} its name, which a save that did not end had not.", target.display()))
    }
}

/// The first few names.
pub(super) fn listed(names: &[OsString]) -> String {
    let first: Vec<String> = names.iter().take(5).map(|name| format!("'{}'", name.to_string_lossy())).collect();
    let more = if names.len() > 5 { format!(" and {} more", names.len() - 5) } else { String::new() };
    format!("{}{more}", first.join(", "))
}

fn named(manifest: &Manifest) -> Vec<OsString> {
    manifest.names().map(OsString::from).collect()
}

/// Whether a save gives its files such a name.
fn is_of_a_save(name: &str) -> bool {
    let json = matches!(name, "config.json" | "generation_config.json");
    let stem = name.strip_suffix(".index.json").unwrap_or(name).strip_suffix(".safetensors").unwrap_or_default();
    let (set, rest) = stem.split_at(stem.find('-').unwrap_or(stem.len()));
    let numbers = rest.bytes().all(|b| b.is_ascii_digit() || b == b'-') || rest.contains("-of-");
    json || (matches!(set, "model" | "optimizer") && numbers)
}

/// Removes what dead processes left beside `target`; each note is a full line.
pub(super) fn sweep(target: &Path) -> Vec<String> {
    let parent = target.parent().unwrap_or(target);
    let mut notes = Vec::new();
    let mut left = leftovers(parent);
    left.retain(|one| one.end_swap(parent).map(|note| notes.push(note)).is_none());
    for one in left {
        let removed = format!("FN-I401 removed {}, left behind by a save that did not end.", one.path().display());
        notes.push(one.remove().unwrap_or(removed));
    }
    notes
}

/// The private directories in `parent` whose processes are dead. Each is locked until it is dropped.
pub fn leftovers(parent: &Path) -> Vec<Leftover> {
    let Ok(entries) = std::fs::read_dir(parent) else { return Vec::new() };
    let remote = FileSystem::of(parent).is_ok_and(FileSystem::is_remote);
    let mut found: Vec<Leftover> = entries.flatten().filter_map(|e| Leftover::dead(&e.path(), remote)).collect();
    found.sort_by(|a, b| a.path().cmp(b.path()));
    found
}

/// Locks a directory that is still at its path, without waiting.
pub(super) fn lock(folder: &Folder) -> Result<(), OsError> {
    match folder.file().try_lock() {
        Ok(()) => {}
        Err(std::fs::TryLockError::WouldBlock) => return Err(OsError::from_raw_os_error(libc::EWOULDBLOCK)),
        // Some remote file systems lock files only; then the record and the name tell whether the process is alive.
        Err(std::fs::TryLockError::Error(_)) if FileSystem::of(folder.path()).is_ok_and(FileSystem::is_remote) => {}
        Err(std::fs::TryLockError::Error(e)) => return Err(e),
    }
    if folder.is_current() { Ok(()) } else { Err(OsError::from_raw_os_error(libc::ENOENT)) }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::checkpoint::directory::Workspace;

    fn left(dir: &Path, random: &str) -> PathBuf {
        let path = dir.join(format!("{PREFIX}x-1-{random}"));
        std::fs::create_dir(&path).expect("makes");
        path
    }

    #[test]
    fn the_dead_are_swept_and_the_living_and_strangers_are_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let living = Workspace::create(&dir.path().join("c"), false).expect("makes");
        let record = Owner { pid: 1, start: 1, boot: "b".into(), host: "x".into() }.encode();
        let dead = left(dir.path(), "0123456789abcdef");
        std::fs::write(dead.join("tokenizer.bin"), "half").expect("writes");
        std::fs::write(dead.join(OWNER), &record).expect("writes");
        let older = left(dir.path(), "1123456789abcdef");
        std::fs::write(older.join("model-00001-of-00002.safetensors"), "half").expect("writes");
        let noted = left(dir.path(), "2123456789abcdef");
        for name in ["model.safetensors", "notes.txt"] {
            std::fs::write(noted.join(name), "half").expect("writes");
        }
        let other = left(dir.path(), "3123456789abcdef");
        std::fs::write(other.join(OWNER), record.replace("pid 1", "pid 2")).expect("writes");
        std::fs::create_dir(dir.path().join(format!("{PREFIX}notes"))).expect("makes");
        assert_eq!(leftovers(dir.path()).len(), 3);
        let notes = sweep(&dir.path().join("c"));
        assert_eq!(notes.len(), 3, "{notes:?}");
        assert!(notes.iter().any(|n| n.starts_with("FN-W403") && n.contains("notes.txt")), "{notes:?}");
        assert!(!dead.exists() && !older.exists() && living.path().exists() && other.exists());
        assert!(noted.join("model.safetensors").exists() && noted.join("notes.txt").exists());
        assert!(dir.path().join(format!("{PREFIX}notes")).exists());
    }

    #[test]
    fn a_directory_in_use_is_locked_until_it_is_gone() {
        let dir = tempfile::tempdir().expect("a directory");
        left(dir.path(), "0123456789abcdef");
        let first = leftovers(dir.path());
        assert_eq!((first.len(), leftovers(dir.path()).len()), (1, 0));
        drop(first);
        assert_eq!(leftovers(dir.path()).len(), 1);
    }

    #[test]
    fn names_of_a_save_are_known() {
        for name in
            ["model.safetensors", "optimizer-00002-of-00003.safetensors", "model.safetensors.index.json", "config.json"]
        {
            assert!(is_of_a_save(name), "{name}");
        }
        for name in ["notes.txt", "model-thesis.safetensors", "x.safetensors", "model", ".index.json"] {
            assert!(!is_of_a_save(name), "{name}");
        }
    }
}
