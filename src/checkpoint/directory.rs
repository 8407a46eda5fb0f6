//! A checkpoint's directory, made under a private name beside its place and renamed when it is whole.
//!
//! D1: under its own name a checkpoint is whole or absent, whenever the process ends. D2: the private directory is locked
//! as long as its process lives; a process that can lock it knows that its owner is dead. D3: only files that a manifest
//! names, or that this process wrote, are ever replaced or removed; what else lies in a checkpoint stays at its place.

use std::{
    fs::File,
    io::{Error as OsError, ErrorKind},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::fs::{RenameFlags, renameat_with};

use crate::{
    checkpoint::{
        folder::{Folder, rename},
        leftovers::{Leftover, OWNER, PREFIX, SWAP, Unproved, lock},
        refused::unwritable,
    },
    error::{Code, Error, Result},
    io::random,
    store::{Owner, PrivateName},
};

/// How often a private directory may be lost to a process that takes it for a left-over before it is locked.
const ATTEMPTS: u32 = 64;
/// How long other processes that save to the same place are waited for, and how long until the next look.
const PATIENCE: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(2);

/// A directory in the making; removed when it is dropped unpublished.
#[derive(Debug)]
pub struct Workspace {
    target: PathBuf,
    overwrite: bool,
    /// The private directory, locked; see D2.
    folder: Folder,
    published: bool,
}

/// What stands where a checkpoint shall be.
enum Place {
    /// Nothing, or an empty directory.
    Free,
    /// A checkpoint that may be replaced, locked.
    Checkpoint(Leftover),
    /// Another process is about to change it.
    Busy,
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
        look(&target, overwrite)?;
        std::fs::create_dir_all(parent).map_err(|e| unwritable(parent, &e))?;
        let mut last = OsError::from_raw_os_error(libc::EEXIST);
        for _ in 0..ATTEMPTS {
            match private_folder(parent) {
                Ok(folder) => return Ok(Self { target, overwrite, folder, published: false }),
                // Before the directory was locked, another process took it for a left-over and removed it.
                Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::EWOULDBLOCK)) && parent.is_dir() => {
                    last = e;
                }
                Err(e) => return Err(unwritable(parent, &e)),
            }
        }
        Err(unwritable(parent, &last))
    }

    /// Where files are written now.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Where they will be.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Gives the directory its name, durably. What is in it must be durable already. Returns notes for the user.
    ///
    /// # Errors
    /// `FN-E402` if the place was taken meanwhile; `FN-E403` when the system refuses.
    pub fn publish(mut self) -> Result<Vec<String>> {
        let failed = |e: &OsError| unwritable(&self.target, e);
        self.folder.remove(&[OWNER.into()]).and_then(|()| self.folder.file().sync_all()).map_err(|e| failed(&e))?;
        let old = self.take_place(RenameFlags::EXCHANGE)?;
        self.published = true;
        // A child of a fork may have the lock too, and would keep it from the next save.
        let _ = self.folder.file().unlock();
        let mut notes = Vec::new();
        if let Some(old) = old {
            move_strangers(&old, &self.folder);
            notes.extend(old.remove());
        }
        if let Some(parent) = self.target.parent() {
            sync_dir(parent).map_err(|e| unwritable(&self.target, &e))?;
        }
        Ok(notes)
    }

    /// Renames it; returns what it replaced, now under a private name. `exchange` is how two directories are exchanged.
    fn take_place(&self, exchange: RenameFlags) -> Result<Option<Leftover>> {
        let end = Instant::now() + PATIENCE;
        loop {
            let renamed = match look(&self.target, self.overwrite)? {
                Place::Busy => Err(OsError::from_raw_os_error(libc::EWOULDBLOCK)),
                Place::Free => rename(self.path(), &self.target, RenameFlags::empty()).map(|()| None),
                Place::Checkpoint(old) => self.replace(old, exchange).map(Some),
            };
            let e = match renamed {
                Ok(replaced) => return Ok(replaced),
                Err(e) => e,
            };
            match e.raw_os_error() {
                // Another process saves there, or removed what was there: look again.
                Some(libc::ENOTEMPTY | libc::EEXIST | libc::ENOENT | libc::EWOULDBLOCK) if Instant::now() < end => {
                    std::thread::sleep(PAUSE);
                }
                Some(libc::ENOTDIR) => return Err(taken(&self.target, "exists")),
                Some(libc::EWOULDBLOCK) => {
                    return Err(taken(&self.target, "is being saved to by another process"));
                }
                _ => return Err(unwritable(&self.target, &e)),
            }
        }
    }

    /// Exchanges it with a checkpoint that is locked, so that neither a sweep nor another save takes that meanwhile.
    fn replace(&self, old: Leftover, exchange: RenameFlags) -> std::result::Result<Leftover, OsError> {
        match rename(self.path(), &self.target, exchange) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS)) => return self.in_two_steps(old),
            other => other?,
        }
        if old.folder().is_at(self.path()) {
            return Ok(old.moved(self.path()));
        }
        // A process that takes no locks has put another directory there: put that one back.
        rename(self.path(), &self.target, exchange)?;
        Err(OsError::from_raw_os_error(libc::EWOULDBLOCK))
    }

    /// For file systems that cannot exchange two directories. A note tells a sweep how to end it if this process dies
    /// in between.
    fn in_two_steps(&self, old: Leftover) -> std::result::Result<Leftover, OsError> {
        let name = self.target.file_name().unwrap_or_default();
        let away = private_path(self.target.parent().unwrap_or(&self.target));
        std::fs::write(self.path().join(SWAP), name.as_encoded_bytes())?;
        self.folder.file().sync_all()?;
        let swapped = rename(&self.target, &away, RenameFlags::empty()).and_then(|()| {
            rename(self.path(), &self.target, RenameFlags::empty()).inspect_err(|_| {
                let _ = rename(&away, &self.target, RenameFlags::empty());
            })
        });
        let _ = self.folder.remove(&[SWAP.into()]);
        swapped.map(|()| old.moved(&away))
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        if !self.published {
            // A failure leaves a directory that the next save sweeps. This needs no further file descriptor.
            let _ = self.folder.names().and_then(|names| self.folder.remove(&names));
            let _ = std::fs::remove_dir(self.folder.path());
        }
    }
}

/// What the user put into the checkpoint that was replaced goes into the one that replaces it.
fn move_strangers(old: &Leftover, new: &Folder) {
    for name in old.strangers() {
        // A file whose name exists in the new directory stays behind; the removal of the old one reports it.
        let _ = renameat_with(old.folder().file(), &name, new.file(), &name, RenameFlags::NOREPLACE);
    }
}

/// Makes and locks a private directory in `parent`, or leaves nothing behind.
fn private_folder(parent: &Path) -> std::result::Result<Folder, OsError> {
    let path = private_path(parent);
    std::fs::create_dir(&path)?;
    let taken = Folder::open_itself(&path).and_then(|folder| {
        lock(&folder)?;
        std::fs::write(path.join(OWNER), Owner::this_process().encode())?;
        Ok(folder)
    });
    taken.inspect_err(|_| {
        let _ = std::fs::remove_file(path.join(OWNER));
        let _ = std::fs::remove_dir(&path);
    })
}

/// A private path in `parent` that nothing has.
pub(super) fn private_path(parent: &Path) -> PathBuf {
    parent.join(PrivateName::make(PREFIX, random()))
}

/// Writes a small file and makes it durable.
pub(super) fn write_file(dir: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let path = dir.join(name);
    File::create(&path)
        .and_then(|mut file| std::io::Write::write_all(&mut file, bytes).and_then(|()| file.sync_all()))
        .map_err(|e| unwritable(&path, &e))
}

fn taken(target: &Path, why: &str) -> Error {
    Error::new(Code::CheckpointExists, format!("{} {why}.", target.display()))
        .errno(libc::EEXIST)
        .action("Name another path; overwrite=True replaces a checkpoint, and nothing else.")
}

/// An empty directory may be replaced; a checkpoint, if asked for and if its manifest proves that it is one.
fn look(target: &Path, overwrite: bool) -> Result<Place> {
    match target.symlink_metadata() {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Place::Free),
        Err(e) => return Err(unwritable(target, &e)),
        Ok(m) if !m.is_dir() => return Err(taken(target, "exists")),
        Ok(_) => {}
    }
    match Folder::open_itself(target) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(Place::Free),
        Err(e) => Err(unwritable(target, &e)),
        Ok(folder) => look_into(folder, target, overwrite),
    }
}

/// What the directory is that was found at `target`.
fn look_into(folder: Folder, target: &Path, overwrite: bool) -> Result<Place> {
    let entries = match folder.names() {
        // Since it was opened another process has replaced and removed it; a removed directory cannot be listed.
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Place::Busy),
        other => other.map_err(|e| unwritable(target, &e))?,
    };
    if entries.is_empty() {
        return Ok(Place::Free);
    }
    if !overwrite {
        return Err(taken(target, "exists"));
    }
    match Leftover::checkpoint(folder) {
        Ok(old) => Ok(Place::Checkpoint(old)),
        Err(Unproved::Locked) => Ok(Place::Busy),
        Err(Unproved::NoCheckpoint(e)) => {
            Err(taken(target, &format!("exists, and is no checkpoint ({})", e.message().trim_end_matches('.'))))
        }
    }
}

fn sync_dir(path: &Path) -> std::result::Result<(), OsError> {
    File::open(path)?.sync_all()
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::value::RawValue;

    use super::*;
    use crate::checkpoint::{
        folder::Links,
        leftovers::{leftovers, sweep},
        manifest::{FileFacts, MANIFEST, Manifest},
        manifest_file::{manifest_of, read_manifest},
    };

    /// A checkpoint with a file; its manifest names it.
    fn begin(target: &Path, content: &str) -> Workspace {
        let space = Workspace::create(target, true).expect("makes");
        write_file(space.path(), "config.json", content.as_bytes()).expect("writes");
        let mut manifest = Manifest::new(RawValue::from_string("{}".into()).expect("JSON"));
        manifest.files.push(FileFacts { name: "config.json".into(), bytes: 2, checksum: String::new() });
        write_file(space.path(), MANIFEST, &manifest.encode()).expect("writes");
        space
    }

    fn checkpoint(dir: &Path, name: &str) -> PathBuf {
        begin(&dir.join(name), "{}").publish().expect("publishes");
        dir.join(name)
    }

    /// What lies in a directory, in order.
    pub(in crate::checkpoint) fn names(dir: &Path) -> Vec<String> {
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
        assert_eq!(names(&made), ["config.json", MANIFEST]);
    }

    #[test]
    fn only_checkpoints_are_replaced_and_only_if_asked() {
        let dir = tempfile::tempdir().expect("a directory");
        let made = checkpoint(dir.path(), "c");
        let refused = |path: &Path, overwrite| Workspace::create(path, overwrite).expect_err("refused").code();
        assert_eq!(refused(&made, false), Code::CheckpointExists);
        checkpoint(dir.path(), "c");
        assert_eq!(names(dir.path()), ["c"], "what was replaced is gone");
        let thesis = dir.path().join("thesis");
        std::fs::create_dir(&thesis).expect("makes");
        std::fs::write(thesis.join("text"), "years").expect("writes");
        assert_eq!(refused(&thesis, true), Code::CheckpointExists);
        assert_eq!(refused(&thesis.join("text"), true), Code::CheckpointExists);
        for manifest in ["", "{\"version\": 1}", "{\"format\": \"funicular-checkpoint\", \"version\": 1}"] {
            std::fs::write(thesis.join(MANIFEST), manifest).expect("writes");
            assert_eq!(refused(&thesis, true), Code::CheckpointExists, "{manifest}");
        }
        std::fs::remove_file(thesis.join(MANIFEST)).expect("removes");
        std::os::unix::fs::symlink(made.join(MANIFEST), thesis.join(MANIFEST)).expect("links");
        assert_eq!(refused(&thesis, true), Code::CheckpointExists, "the manifest of another");
        assert!(thesis.join("text").exists());
        std::fs::create_dir(dir.path().join("empty")).expect("makes");
        checkpoint(dir.path(), "empty");
    }

    #[test]
    fn what_the_user_put_into_a_checkpoint_stays_at_its_place() {
        let dir = tempfile::tempdir().expect("a directory");
        let made = checkpoint(dir.path(), "c");
        std::fs::create_dir(made.join("runs")).expect("makes");
        std::fs::write(made.join("runs/a"), "a").expect("writes");
        std::fs::write(made.join("notes.txt"), "years").expect("writes");
        checkpoint(dir.path(), "c");
        assert_eq!(names(&made), ["config.json", MANIFEST, "notes.txt", "runs"]);
        assert_eq!(std::fs::read_to_string(made.join("runs/a")).expect("reads"), "a");
        assert_eq!(names(dir.path()), ["c"]);
    }

    #[test]
    fn without_exchange_it_is_replaced_in_two_steps() {
        let dir = tempfile::tempdir().expect("a directory");
        let made = checkpoint(dir.path(), "c");
        let space = begin(&made, "[]");
        let Place::Checkpoint(old) = look(&made, true).expect("a checkpoint") else { panic!("a checkpoint") };
        assert!(matches!(look(&made, true), Ok(Place::Busy)), "it is locked");
        let old = space.in_two_steps(old).expect("swaps");
        assert_eq!(std::fs::read_to_string(made.join("config.json")).expect("reads"), "[]");
        assert!(!made.join(SWAP).exists());
        assert_eq!(std::fs::read_to_string(old.folder().path().join("config.json")).expect("reads"), "{}");
    }

    #[test]
    fn a_swap_in_two_steps_that_was_cut_off_is_ended_by_a_sweep() {
        let dir = tempfile::tempdir().expect("a directory");
        let made = checkpoint(dir.path(), "c");
        let space = begin(&made, "[]");
        write_file(space.path(), SWAP, b"c").expect("writes");
        space.folder.remove(&[OWNER.into()]).expect("removes");
        std::fs::rename(&made, private_path(dir.path())).expect("renames");
        let living = leftovers(dir.path()).len();
        assert_eq!(living, 1, "the old checkpoint; the new one's process is alive");
        // A process that is killed drops nothing but its lock.
        space.folder.file().unlock().expect("unlocks");
        let notes = sweep(&made);
        assert_eq!(names(dir.path()), ["c"], "{notes:?}");
        assert_eq!(std::fs::read_to_string(made.join("config.json")).expect("reads"), "[]");
        assert_eq!(names(&made), ["config.json", MANIFEST]);
    }

    #[test]
    fn what_another_process_put_there_meanwhile_is_not_taken() {
        let dir = tempfile::tempdir().expect("a directory");
        let made = checkpoint(dir.path(), "c");
        let space = begin(&made, "[]");
        let Place::Checkpoint(old) = look(&made, true).expect("a checkpoint") else { panic!("a checkpoint") };
        std::fs::rename(&made, dir.path().join("moved")).expect("moves");
        std::fs::create_dir(&made).expect("makes");
        std::fs::write(made.join("thesis"), "years").expect("writes");
        let error = space.replace(old, RenameFlags::EXCHANGE).expect_err("refused");
        assert_eq!(error.raw_os_error(), Some(libc::EWOULDBLOCK));
        assert_eq!(space.publish().expect_err("refused").code(), Code::CheckpointExists);
        assert_eq!(names(&made), ["thesis"]);
        assert_eq!(names(dir.path()), ["c", "moved"]);
    }

    #[test]
    fn what_was_removed_since_it_was_opened_is_looked_at_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let made = checkpoint(dir.path(), "c");
        let folder = Folder::open_itself(&made).expect("opens");
        checkpoint(dir.path(), "c");
        assert!(folder.names().is_err(), "a removed directory cannot be listed");
        assert!(matches!(look_into(folder, &made, true), Ok(Place::Busy)));
    }

    #[test]
    fn two_savers_and_a_sweep_lose_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let target = dir.path().join("c");
        std::thread::scope(|scope| {
            for saver in 0..4 {
                let target = &target;
                scope.spawn(move || {
                    for round in 0..40 {
                        sweep(target);
                        let content = format!("{saver} {round}");
                        begin(target, &content).publish().expect("publishes");
                        let folder = Folder::open(target).expect("is there");
                        manifest_of(&folder, Links::No)
                            .map(|_| ())
                            .or_else(|e| if folder.is_current() { Err(e) } else { Ok(()) })
                            .expect("whole");
                    }
                });
            }
        });
        sweep(&target);
        assert_eq!(names(dir.path()), ["c"]);
        assert_eq!(names(&target), ["config.json", MANIFEST]);
    }

    #[test]
    fn nothing_there_is_said() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(read_manifest(dir.path()).expect_err("empty").code(), Code::CheckpointMissing);
        assert_eq!(read_manifest(&dir.path().join("no")).expect_err("none").code(), Code::CheckpointMissing);
    }
}
