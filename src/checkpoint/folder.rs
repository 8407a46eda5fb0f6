//! A directory that is opened once. All its files are opened relative to it, so that a reader sees one generation of a
//! checkpoint even if another process exchanges the directory meanwhile.
//!
//! F1: a name is checked before anything is opened: it names an entry of this directory. F2: only regular files are
//! opened; a link is followed only where [`Links`] allows it, and no open waits for the other end of a pipe.

use std::{
    ffi::{OsStr, OsString},
    fs::{File, OpenOptions},
    io::{Error as OsError, ErrorKind, Read},
    mem::MaybeUninit,
    os::{
        fd::AsRawFd,
        unix::{
            ffi::{OsStrExt, OsStringExt},
            fs::{MetadataExt, OpenOptionsExt},
        },
    },
    path::{Path, PathBuf},
};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RawDir, RenameFlags, SeekFrom, fcntl_setfl, openat, readlinkat,
    renameat_with, seek, statat, unlinkat,
};

type Result<T> = std::result::Result<T, OsError>;

/// Which symbolic links are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Links {
    /// None: what is to be removed is our own file.
    No,
    /// Those that Hugging Face's cache makes, to `../../blobs/NAME`: the files of a checkpoint.
    Cache,
    /// All: weights that another program wrote, in a directory that the user arranged.
    Any,
}

/// A file opened for reading, and its path for messages.
#[derive(Debug)]
pub struct Opened {
    /// The file.
    pub file: File,
    /// What messages call it.
    pub path: PathBuf,
}

impl Opened {
    /// Opens one file by its path: the user named it, so links are followed.
    pub(super) fn by_path(path: &Path) -> Result<Self> {
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
        Ok(Self { file: regular(file)?, path: path.to_owned() })
    }

    /// A path that opens the same file again, even after it was renamed or replaced.
    pub(super) fn again(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }

    /// Bytes of the file.
    pub(super) fn bytes(&self) -> Result<u64> {
        self.file.metadata().map(|m| m.len())
    }

    /// Reads all of a file of `most` bytes at most.
    pub(super) fn read_all(&self, most: u64) -> Result<Vec<u8>> {
        let bytes = self.bytes()?;
        if bytes > most {
            return Err(OsError::other(format!("{bytes} bytes are too many, {most} are allowed")));
        }
        let mut out = Vec::with_capacity(bytes as usize);
        (&self.file).take(bytes).read_to_end(&mut out)?;
        Ok(out)
    }
}

/// An open directory.
#[derive(Debug)]
pub(super) struct Folder {
    file: File,
    path: PathBuf,
    id: Id,
}

/// The identity of a directory, which does not depend on its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Id(u64, u64);

impl Id {
    /// Whether `path` leads to that directory.
    pub(super) fn is_at(self, path: &Path) -> bool {
        std::fs::metadata(path).is_ok_and(|m| Self(m.dev(), m.ino()) == self)
    }
}

impl Folder {
    /// Opens a directory; `path` may lead through links.
    pub(super) fn open(path: &Path) -> Result<Self> {
        Self::with_flags(path, 0)
    }

    /// Opens a directory that is no link.
    pub(super) fn open_itself(path: &Path) -> Result<Self> {
        Self::with_flags(path, libc::O_NOFOLLOW)
    }

    fn with_flags(path: &Path, flags: i32) -> Result<Self> {
        let flags = flags | libc::O_DIRECTORY | libc::O_NONBLOCK;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
        let id = file.metadata().map(|m| Id(m.dev(), m.ino()))?;
        Ok(Self { file, path: path.to_owned(), id })
    }

    /// This directory under its new path, after a rename.
    pub(super) fn moved(self, to: &Path) -> Self {
        Self { path: to.to_owned(), ..self }
    }

    /// What messages call it.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The open directory.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Whether its path still leads to it.
    pub(super) fn is_current(&self) -> bool {
        self.is_at(&self.path)
    }

    /// Whether `path` leads to it.
    pub(super) fn is_at(&self, path: &Path) -> bool {
        self.id.is_at(path)
    }

    /// Which directory it is.
    pub(super) fn id(&self) -> Id {
        self.id
    }

    /// Whether there is an entry of that name, of any kind.
    pub(super) fn has(&self, name: &str) -> bool {
        self.kind(OsStr::new(name)).is_some()
    }

    /// Whether there is a regular file of that name, which is no link.
    pub(super) fn has_file(&self, name: &OsStr) -> bool {
        self.kind(name) == Some(FileType::RegularFile)
    }

    fn kind(&self, name: &OsStr) -> Option<FileType> {
        let stat = statat(&self.file, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
        Some(FileType::from_raw_mode(stat.st_mode))
    }

    /// Opens a regular file in it.
    pub(super) fn open_file(&self, name: &str, links: Links) -> Result<Opened> {
        if !is_plain(name) {
            return Err(OsError::other("not the name of a file in this directory"));
        }
        let path = self.path.join(name);
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let open = |at: &Path, more| openat(&self.file, at, flags | more, Mode::empty());
        let opened = match open(Path::new(name), OFlags::NOFOLLOW) {
            Err(rustix::io::Errno::LOOP) if links != Links::No => {
                let target = PathBuf::from(OsString::from_vec(readlinkat(&self.file, name, Vec::new())?.into_bytes()));
                match links {
                    Links::Any => open(Path::new(name), OFlags::empty()),
                    _ if is_blob(&target) => open(&target, OFlags::NOFOLLOW),
                    _ => return Err(OsError::other("a link to another place; a checkpoint consists of files")),
                }
            }
            Err(rustix::io::Errno::LOOP) => return Err(OsError::other("a link")),
            other => other,
        };
        Ok(Opened { file: regular(File::from(opened?))?, path })
    }

    /// The names in it. Needs no further file descriptor.
    pub(super) fn names(&self) -> Result<Vec<OsString>> {
        seek(&self.file, SeekFrom::Start(0))?;
        let mut buffer = [MaybeUninit::uninit(); 8192];
        let mut entries = RawDir::new(&self.file, &mut buffer);
        let mut names = Vec::new();
        while let Some(entry) = entries.next() {
            let name = entry?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                names.push(OsString::from_vec(name));
            }
        }
        names.sort();
        Ok(names)
    }

    /// Removes files of these names, in this order. What is no regular file stays.
    pub(super) fn remove(&self, names: &[OsString]) -> Result<()> {
        for name in names.iter().filter(|name| self.has_file(name)) {
            match unlinkat(&self.file, name.as_os_str(), AtFlags::empty()) {
                Ok(()) | Err(rustix::io::Errno::NOENT) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }
}

/// Whether a name can only be that of an entry of the directory that it is looked up in.
pub(super) fn is_plain(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && name.len() <= 255 && !name.contains(['/', '\0'])
}

/// Whether a link leads where Hugging Face's cache keeps the files of a snapshot.
fn is_blob(target: &Path) -> bool {
    let name = target.as_os_str().as_bytes().strip_prefix(b"../../blobs/".as_slice());
    name.and_then(|name| std::str::from_utf8(name).ok()).is_some_and(is_plain)
}

/// The file, if it is a regular one; reads of it then wait for the disk as usual.
fn regular(file: File) -> Result<File> {
    let kind = file.metadata()?.file_type();
    if kind.is_dir() {
        return Err(OsError::from(ErrorKind::IsADirectory));
    }
    if !kind.is_file() {
        return Err(OsError::other("not a regular file"));
    }
    fcntl_setfl(&file, OFlags::empty())?;
    Ok(file)
}

/// Renames a path as the flags say.
pub(super) fn rename(from: &Path, to: &Path, flags: RenameFlags) -> Result<()> {
    Ok(renameat_with(CWD, from, CWD, to, flags)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn names_lead_nowhere_else() {
        for name in ["", ".", "..", "../x", "/abs", "a/b", "a\0b", &"x".repeat(256)] {
            assert!(!is_plain(name), "{name}");
        }
        assert!(is_plain("model-00001-of-00002.safetensors") && is_plain("..."));
        assert!(is_blob(Path::new("../../blobs/0a1b")));
        assert!(!is_blob(Path::new("../../blobs/../x")) && !is_blob(Path::new("../blobs/x")));
    }

    #[test]
    fn only_regular_files_are_opened() {
        let dir = tempfile::tempdir().expect("a directory");
        let snapshot = dir.path().join("snapshots/1");
        std::fs::create_dir_all(&snapshot).expect("makes");
        std::fs::create_dir(dir.path().join("blobs")).expect("makes");
        std::fs::write(dir.path().join("blobs/b"), "blob").expect("writes");
        std::fs::write(dir.path().join("secret"), "secret").expect("writes");
        std::fs::write(snapshot.join("plain"), "plain").expect("writes");
        symlink("../../blobs/b", snapshot.join("cached")).expect("links");
        symlink("../../secret", snapshot.join("out")).expect("links");
        symlink("/dev/zero", snapshot.join("zero")).expect("links");
        std::fs::create_dir(snapshot.join("inner")).expect("makes");
        rustix::fs::mknodat(rustix::fs::CWD, snapshot.join("pipe"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
            .expect("makes");
        let folder = Folder::open(&snapshot).expect("opens");
        let read = |name: &str, links| folder.open_file(name, links).and_then(|f| f.read_all(100)).ok();
        for links in [Links::No, Links::Cache, Links::Any] {
            assert_eq!(read("plain", links).as_deref(), Some(b"plain".as_slice()));
            for name in ["pipe", "inner", "zero", "../../secret", "/etc/hostname", "no"] {
                assert_eq!(read(name, links), None, "{name}");
            }
            assert_eq!(read("cached", links).is_some(), links != Links::No);
            assert_eq!(read("out", links).is_some(), links == Links::Any);
        }
        assert!(folder.open_file("plain", Links::No).and_then(|f| f.read_all(4)).is_err(), "bounded");
        assert_eq!(folder.names().expect("lists").len(), 6);
        assert_eq!(folder.names().expect("lists again").len(), 6);
    }

    #[test]
    fn a_file_is_opened_again_after_it_lost_its_name() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("a"), "a").expect("writes");
        let folder = Folder::open(dir.path()).expect("opens");
        let opened = folder.open_file("a", Links::No).expect("opens");
        folder.remove(&["a".into(), "b".into()]).expect("removes");
        assert!(!folder.has("a") && folder.is_current());
        assert_eq!(std::fs::read_to_string(opened.again()).expect("reads"), "a");
    }
}
