//! What the runs of one user on one machine tell each other: a folder of notes, each locked as long as its run lives.
//!
//! N1: the folder lies where everybody may write, so nothing in it is believed by its name. It is used only if it is this user's own and
//! writable for no other user, and held open: what its name leads to later does not matter.
//! N2: what is opened in it, read or removed is a regular file of this user with one name; nothing that can block is opened.
//! N3: a file is removed only when its lock was free and its contents are a note.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read, Write},
    path::Path,
};

use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{AtFlags, Dir, FileType, FlockOperation, Mode, OFlags},
    io::Errno,
};

use crate::{io::random, machine::resident};

/// No note is as long.
const LONGEST: u64 = 64;

/// The folder of this user's notes, open.
pub(super) struct Folder {
    fd: OwnedFd,
    user: u32,
}

/// This run's note.
#[derive(Debug)]
pub(super) struct Note {
    folder: OwnedFd,
    name: String,
    /// Its lock goes with it.
    _file: File,
}

/// Another run on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Other {
    pub(super) pid: u32,
    /// Host memory in its plan.
    pub(super) planned: u64,
    /// Of which it is yet to take so much.
    pub(super) coming: u64,
}

impl Folder {
    /// Opens `funicular-UID` in a folder, and makes it if it is not there. `None` where that is not possible, as in a container without
    /// such a folder.
    ///
    /// # Errors
    /// A sentence, if it is there and is not this user's own.
    pub(super) fn open(parent: &Path) -> Result<Option<Self>, String> {
        let user = rustix::process::geteuid().as_raw();
        let path = parent.join(format!("funicular-{user}"));
        // It may be there already.
        let _ = rustix::fs::mkdir(&path, Mode::RWXU);
        let foreign = |what: &str| {
            Err(format!(
                "{} is {what}: it is not used, so runs that share this machine's memory do not know of each other. Remove it, or have its \
                 owner remove it.",
                path.display()
            ))
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = match rustix::fs::open(&path, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::LOOP | Errno::NOTDIR) => return foreign("no folder"),
            Err(Errno::ACCESS) => return foreign("another user's"),
            Err(_) => return Ok(None),
        };
        let Ok(stat) = rustix::fs::fstat(&fd) else { return Ok(None) };
        if stat.st_uid != user {
            return foreign("another user's");
        }
        if stat.st_mode & 0o077 != 0 {
            return foreign("open to other users (its mode is not 0700)");
        }
        Ok(Some(Self { fd, user }))
    }

    /// Leaves this run's note: what it plans, and what this process has of it already. None where that is not possible.
    pub(super) fn leave(&self, planned: u64, freed: u64) -> Option<Note> {
        let before = resident(std::process::id()).saturating_sub(freed);
        let name = format!("{}-{:016x}", std::process::id(), random());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.fd, &name, flags, Mode::RUSR | Mode::WUSR).ok()?;
        let mut file = File::from(fd);
        let folder = self.fd.try_clone().ok()?;
        let locked = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
        let note = Note { folder, name, _file: file.try_clone().ok()? };
        (locked && writeln!(file, "{planned} {before}").is_ok()).then_some(note)
    }

    /// The runs that are alive, by process; those of this one are among them. Stale notes are removed.
    pub(super) fn others(&self) -> Vec<Other> {
        let Ok(entries) = Dir::read_from(&self.fd) else { return Vec::new() };
        // What a process planned in all, and what it had before the first of its plans.
        let mut runs: BTreeMap<u32, (u64, u64)> = BTreeMap::new();
        for entry in entries.flatten() {
            let Ok(name) = entry.file_name().to_str() else { continue };
            let Some((pid, planned, before)) = self.read(name) else { continue };
            let run = runs.entry(pid).or_insert((0, before));
            *run = (run.0.saturating_add(planned), run.1.min(before));
        }
        let other = |(pid, (planned, before)): (u32, (u64, u64))| {
            let taken = resident(pid).saturating_sub(before);
            Other { pid, planned, coming: planned.saturating_sub(taken) }
        };
        runs.into_iter().map(other).collect()
    }

    /// A living run's note: its process, what it planned, and what it had before.
    fn read(&self, name: &str) -> Option<(u32, u64, u64)> {
        let pid = name.split_once('-')?.0.parse().ok()?;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.fd, name, flags, Mode::empty()).ok()?;
        let stat = rustix::fs::fstat(&fd).ok()?;
        let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        if !regular
            || stat.st_uid != self.user
            || stat.st_nlink != 1
            || !u64::try_from(stat.st_size).is_ok_and(|n| n <= LONGEST)
        {
            return None;
        }
        let file = File::from(fd);
        let free = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
        let mut text = String::new();
        (&file).take(LONGEST).read_to_string(&mut text).ok()?;
        let (planned, before) = text.trim().split_once(' ')?;
        let (planned, before) = (planned.parse().ok()?, before.parse().ok()?);
        if free {
            // Its run is dead.
            let _ = rustix::fs::unlinkat(self.fd.as_fd(), name, AtFlags::empty());
            return None;
        }
        Some((pid, planned, before))
    }
}

impl Drop for Note {
    fn drop(&mut self) {
        // The lock goes with the file; a note that stays is known to be stale by it.
        let _ = rustix::fs::unlinkat(self.folder.as_fd(), &self.name, AtFlags::empty());
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{MetadataExt, PermissionsExt, symlink},
        path::PathBuf,
    };

    use super::*;

    fn place(dir: &Path) -> PathBuf {
        dir.join(format!("funicular-{}", rustix::process::geteuid().as_raw()))
    }

    fn open(dir: &Path) -> Folder {
        Folder::open(dir).expect("ours").expect("there")
    }

    #[test]
    fn runs_know_of_each_other_while_they_live() {
        let dir = tempfile::tempdir().expect("a folder");
        let folder = open(dir.path());
        assert_eq!(fs::metadata(place(dir.path())).expect("made").mode() & 0o777, 0o700);
        assert!(folder.others().is_empty());
        let first = folder.leave(1 << 40, 0).expect("a note");
        let mine = folder.others();
        assert!(mine.len() == 1 && mine[0].pid == std::process::id(), "a second model counts the first: {mine:?}");
        // The note of a process that is alive (the parent of this one) and one of a process that is dead.
        let theirs = place(dir.path()).join(format!("{}-00", std::os::unix::process::parent_id()));
        let locked = File::create(&theirs).expect("creates");
        locked.try_lock().expect("locks");
        fs::write(&theirs, "1099511627776 0\n").expect("writes");
        let dead = place(dir.path()).join("1-00");
        fs::write(&dead, "5 0\n").expect("writes");
        let others = folder.others();
        assert!(others.len() == 2 && others.iter().all(|o| o.coming > 1 << 39), "{others:?}");
        assert!(!dead.exists(), "the dead leave nothing behind");
        let path = place(dir.path()).join(&first.name);
        assert!(path.exists());
        drop(first);
        assert!(!path.exists());
    }

    #[test]
    fn a_folder_that_others_could_have_made_is_not_used() {
        let dir = tempfile::tempdir().expect("a folder");
        let (path, elsewhere) = (place(dir.path()), dir.path().join("elsewhere"));
        fs::create_dir(&elsewhere).expect("creates");
        fs::write(elsewhere.join("123-00"), "5 0\n").expect("writes");
        symlink(&elsewhere, &path).expect("links");
        assert!(Folder::open(dir.path()).err().expect("refused").contains("no folder"));
        assert!(elsewhere.join("123-00").exists());
        fs::remove_file(&path).expect("removes");
        fs::write(&path, "").expect("writes");
        assert!(Folder::open(dir.path()).is_err());
        fs::remove_file(&path).expect("removes");
        fs::create_dir(&path).expect("creates");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).expect("changes");
        assert!(Folder::open(dir.path()).err().expect("refused").contains("0700"));
        if rustix::process::geteuid().is_root() {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).expect("changes");
            std::os::unix::fs::chown(&path, Some(65_534), None).expect("changes");
            assert!(Folder::open(dir.path()).err().expect("refused").contains("another user's"));
        }
        assert!(Folder::open(&dir.path().join("missing")).expect("no reason to warn").is_none());
    }

    #[test]
    fn nothing_but_a_note_is_opened_for_long_believed_or_removed() {
        let dir = tempfile::tempdir().expect("a folder");
        let folder = open(dir.path());
        let path = place(dir.path());
        let victim = dir.path().join("victim");
        fs::write(&victim, "5 0\n").expect("writes");
        symlink(&victim, path.join("7-link")).expect("links");
        fs::hard_link(&victim, path.join("7-hard")).expect("links");
        rustix::fs::mkfifoat(rustix::fs::CWD, path.join("7-fifo"), Mode::RWXU).expect("makes");
        fs::write(path.join("7-mine"), "thesis\n").expect("writes");
        fs::write(path.join("7-large"), "5 0\n".repeat(1000)).expect("writes");
        fs::write(path.join("seven"), "5 0\n").expect("writes");
        fs::create_dir(path.join("7-folder")).expect("creates");
        let before = fs::read_dir(&path).expect("lists").count();
        assert!(folder.others().is_empty());
        assert_eq!(fs::read_dir(&path).expect("lists").count(), before);
        assert!(victim.exists());
        if rustix::process::geteuid().is_root() {
            let forged = path.join("8-00");
            let locked = File::create(&forged).expect("creates");
            locked.try_lock().expect("locks");
            fs::write(&forged, "1099511627776 0\n").expect("writes");
            std::os::unix::fs::chown(&forged, Some(65_534), None).expect("changes");
            assert!(folder.others().is_empty(), "another user's");
        }
    }
}
