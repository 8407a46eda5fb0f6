//! Files to page to: what a directory's file system can do, found out by doing it, and files opened accordingly.
#![expect(unsafe_code, reason = "statfs, statx and fallocate have no safe wrapper in std")]

use std::{
    ffi::CString,
    fs::{File, OpenOptions},
    hash::{BuildHasher, Hasher},
    io::{Error as OsError, ErrorKind},
    mem::MaybeUninit,
    os::{
        fd::{AsRawFd, RawFd},
        unix::{
            ffi::OsStrExt,
            fs::{FileExt, MetadataExt, OpenOptionsExt},
        },
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use super::ALIGNMENT;
use crate::{
    error::{Code, Error, Result},
    memory::HostRegion,
    os_error,
    quantities::ByteCount,
};

/// How much is written and read back to see whether direct I/O works.
const PROBE_BYTES: usize = 1 << 20;
/// After so many bytes what it writes repeats.
const PATTERN_BYTES: usize = 4093;

/// Whether files are opened for direct I/O.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirectIo {
    /// Where it works; buffered elsewhere, with a note.
    #[default]
    Preferred,
    /// `FN-E602` where it does not work.
    Required,
    /// Always through the page cache.
    Off,
}

/// An open file as the engines see it.
#[derive(Debug)]
pub struct IoFile {
    file: File,
    label: Arc<str>,
    direct: bool,
}

impl IoFile {
    /// Wraps an open file; `label` is what errors call it, `direct` whether it was opened with `O_DIRECT`.
    pub fn new(file: File, label: impl Into<Arc<str>>, direct: bool) -> Self {
        Self { file, label: label.into(), direct }
    }

    /// What errors call it.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Whether offsets, lengths and addresses have to be multiples of 4096.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Its number in this process.
    pub fn number(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// The file system a directory lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    /// In memory: tmpfs, ramfs, hugetlbfs.
    Memory(&'static str),
    /// Slow, remote or layered: works, deserves a note.
    Unusual(&'static str),
    /// Anything else.
    Disk,
}

impl FileSystem {
    /// Asks the system.
    ///
    /// # Errors
    /// `FN-E604` if the path cannot be looked at.
    pub fn of(dir: &Path) -> Result<Self> {
        let path = c_path(dir)?;
        let mut stat = MaybeUninit::<libc::statfs>::zeroed();
        // SAFETY: a valid C string and room for the result.
        if unsafe { libc::statfs(path.as_ptr(), stat.as_mut_ptr()) } != 0 {
            return Err(unusable(dir, &OsError::last_os_error()));
        }
        // SAFETY: initialised by the call, and zeroed before it.
        let magic = unsafe { stat.assume_init() }.f_type as u64 & 0xffff_ffff;
        Ok(match magic {
            0x0102_1994 => Self::Memory("tmpfs"),
            0x8584_58f6 => Self::Memory("ramfs"),
            0x9584_58f6 => Self::Memory("hugetlbfs"),
            0x794c_7630 => Self::Unusual("overlayfs (a container's layer)"),
            0x6969 => Self::Unusual("NFS"),
            0x6573_5546 => Self::Unusual("FUSE"),
            0x517b | 0xff53_4d42 | 0xfe53_4d42 => Self::Unusual("SMB"),
            _ => Self::Disk,
        })
    }

    /// Whether locks and contents may be shared with another machine.
    pub fn is_remote(self) -> bool {
        matches!(self, Self::Unusual("NFS" | "FUSE" | "SMB"))
    }
}

/// What was found out about a directory.
#[derive(Clone, Debug)]
pub struct DirectoryProbe {
    /// Whether files in it shall be opened for direct I/O.
    pub direct: bool,
    /// Its file system.
    pub file_system: FileSystem,
    /// What the user should know, each a full line.
    pub notes: Vec<String>,
}

/// Writes to a file in `dir`, reads it back, compares and removes it, through direct I/O where wanted.
///
/// # Errors
/// `FN-E604` a path that is missing, no directory, or not writable; `FN-E605` a full disk; `FN-E603` a file system in memory; `FN-E602` direct
/// I/O required and not working; `FN-E302` bytes read back differ.
pub fn probe_directory(dir: &Path, wanted: DirectIo) -> Result<DirectoryProbe> {
    let metadata = std::fs::metadata(dir).map_err(|e| unusable(dir, &e))?;
    if !metadata.is_dir() {
        return Err(unusable(dir, &OsError::from_raw_os_error(libc::ENOTDIR)));
    }
    let file_system = FileSystem::of(dir)?;
    if let FileSystem::Memory(name) = file_system {
        return Err(not_a_disk(dir, name));
    }
    let mut notes = Vec::new();
    if let FileSystem::Unusual(name) = file_system {
        notes.push(format!("FN-W605 {} is {name}: expect less bandwidth than from a local drive.", dir.display()));
    }
    write_and_read_back(dir, false)?.map_err(|e| unusable(dir, &e))?;
    if wanted == DirectIo::Off {
        return Ok(DirectoryProbe { direct: false, file_system, notes });
    }
    let refusal = match write_and_read_back(dir, true)? {
        Ok(()) => return Ok(DirectoryProbe { direct: true, file_system, notes }),
        Err(e) => e,
    };
    if wanted == DirectIo::Required {
        return Err(Error::new(Code::NoDirectIo, format!("{}: direct I/O does not work: {refusal}.", dir.display()))
            .errno(refusal.raw_os_error().unwrap_or(0))
            .action("Use a directory on a local ext4 or XFS file system, or set nvme.direct = \"preferred\"."));
    }
    notes.push(format!(
        "FN-W604 {}: direct I/O refused ({refusal}); using buffered I/O, whose page cache counts against the container's \
         memory limit. Use a directory on a local file system (in a container: mount a volume).",
        dir.display()
    ));
    Ok(DirectoryProbe { direct: false, file_system, notes })
}

/// Whether files in `dir` can be written and read past the page cache, found out by doing it.
pub fn takes_direct(dir: &Path) -> bool {
    matches!(write_and_read_back(dir, true), Ok(Ok(())))
}

/// Whether a file can be read past the page cache, found out by doing it.
pub fn reads_direct(path: &Path) -> bool {
    let attempt = || -> std::result::Result<(), OsError> {
        let scratch = HostRegion::new(ByteCount(ALIGNMENT as u64), "the direct I/O probe").map_err(OsError::other)?;
        // SAFETY: the region is this function's own, and this is the only reference into it.
        let buffer = unsafe { std::slice::from_raw_parts_mut(scratch.as_ptr(), ALIGNMENT) };
        let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path)?;
        if alignment(&file).is_some_and(|needed| needed == 0 || !ALIGNMENT.is_multiple_of(needed)) {
            return Err(OsError::from_raw_os_error(libc::EINVAL));
        }
        file.read_at(buffer, 0).map(|_| ())
    };
    attempt().is_ok()
}

/// The outer error ends the probe, the inner one is the system's about this way of doing it.
fn write_and_read_back(dir: &Path, direct: bool) -> Result<std::result::Result<(), OsError>> {
    let scratch = HostRegion::new(ByteCount(PROBE_BYTES as u64), "the direct I/O probe")?;
    // SAFETY: the region is this function's own, and this is the only reference into it.
    let buffer = unsafe { std::slice::from_raw_parts_mut(scratch.as_ptr(), PROBE_BYTES) };
    // A length that divides no block: one that came from another place would differ.
    let pattern: Vec<u8> = (0..PATTERN_BYTES).map(|i| (i / 7) as u8 ^ 0x5a).collect();
    for part in buffer.chunks_mut(PATTERN_BYTES) {
        part.copy_from_slice(&pattern[..part.len()]);
    }
    let attempt = |buffer: &mut [u8]| -> std::result::Result<(), OsError> {
        let file = unlinked_file(dir, direct)?;
        match alignment(&file).filter(|_| direct) {
            // Opening works, and so do reads and writes: through the page cache (ext4 with data=journal, for one).
            Some(0) => return Err(OsError::other("the file system sends it through the page cache")),
            Some(needed) if !ALIGNMENT.is_multiple_of(needed) => {
                return Err(OsError::other(format!("it needs an alignment of {needed}, not 4096")));
            }
            _ => {}
        }
        file.write_all_at(buffer, 0)?;
        buffer.fill(0);
        file.read_exact_at(buffer, 0)
    };
    if let Err(e) = attempt(buffer) {
        return Ok(Err(e));
    }
    match buffer.chunks(PATTERN_BYTES).position(|part| part != &pattern[..part.len()]).map(|n| n * PATTERN_BYTES) {
        None => Ok(Ok(())),
        Some(at) => Err(Error::new(
            Code::Corrupted,
            format!(
                "{}: a file written there reads back differently near offset {at} (direct I/O: {direct}).",
                dir.display()
            ),
        )
        .action("Do not use this path; check the drive and the file system.")),
    }
}

/// The larger of the alignments that direct I/O needs there, in bytes; 0: it does not work; none: the system does not say.
fn alignment(file: &File) -> Option<usize> {
    let mut stat = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: an open file, an empty path as the flag asks for, and room for the result.
    let rc = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, stat.as_mut_ptr())
    };
    // SAFETY: zeroed, and all its fields are integers.
    let stat = unsafe { stat.assume_init() };
    (rc == 0 && stat.stx_mask & libc::STATX_DIOALIGN != 0)
        .then(|| stat.stx_dio_mem_align.max(stat.stx_dio_offset_align) as usize)
}

/// A file in `dir` that has no name, so that its space is free again as soon as no process has it open.
///
/// # Errors
/// `FN-E604` if it cannot be made.
pub fn scratch_file(dir: &Path, direct: bool) -> Result<File> {
    unlinked_file(dir, direct).map_err(|e| unusable(dir, &e))
}

/// Opens once more, for reading and writing, what `path` leads to: a file of [`scratch_file`], by its number in a process.
///
/// # Errors
/// What the system says.
pub fn reopened_file(path: &Path, direct: bool) -> std::result::Result<File, OsError> {
    let direct = if direct { libc::O_DIRECT } else { 0 };
    OpenOptions::new().read(true).write(true).custom_flags(direct).open(path)
}

fn unlinked_file(dir: &Path, direct: bool) -> std::result::Result<File, OsError> {
    let direct = if direct { libc::O_DIRECT } else { 0 };
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    match options.clone().custom_flags(libc::O_TMPFILE | direct).open(dir) {
        Ok(file) => return Ok(file),
        // What kernels and file systems without O_TMPFILE answer.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::ENOENT | libc::EINVAL)) => {}
        Err(e) => return Err(e),
    }
    let path = dir.join(format!("data-{:016x}", random()));
    let file = options.create_new(true).custom_flags(direct).open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

/// 64 bits that differ between calls, threads and processes.
pub(crate) fn random() -> u64 {
    std::hash::RandomState::new().build_hasher().finish()
}

/// Gives `file` its full size and its place on the disk.
///
/// # Errors
/// `FN-E605` when there is no room, `FN-E604` when the file system refuses otherwise. False if the file system cannot
/// reserve space; the file then only has its size.
pub fn allocate(file: &File, bytes: u64, dir: &Path) -> Result<bool> {
    let refused = |e: &OsError| match e.raw_os_error() {
        Some(errno) if os_error::is_full(errno) => full(dir, bytes, errno),
        _ => unusable(dir, e),
    };
    // The file system would fill the disk before it finds that there is no room, and take the space from other programs meanwhile.
    let (there, free) = (file.metadata().map_or(0, |m| m.blocks() * 512), free_bytes(dir)?);
    if bytes.saturating_sub(there) > free {
        return Err(disk_full(dir, bytes, free));
    }
    let Ok(len) = libc::off_t::try_from(bytes) else {
        return Err(refused(&OsError::from_raw_os_error(libc::EFBIG)));
    };
    if bytes == 0 {
        return Ok(true);
    }
    loop {
        // SAFETY: an open file and plain numbers.
        if unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, len) } == 0 {
            return Ok(true);
        }
        let e = OsError::last_os_error();
        match e.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::EOPNOTSUPP | libc::ENOSYS) => {
                file.set_len(bytes).map_err(|e| refused(&e))?;
                return Ok(false);
            }
            _ => return Err(refused(&e)),
        }
    }
}

/// Bytes that this user may still write to the file system of `dir`.
///
/// # Errors
/// `FN-E604` if the path cannot be looked at.
pub fn free_bytes(dir: &Path) -> Result<u64> {
    let path = c_path(dir)?;
    let mut stat = MaybeUninit::<libc::statvfs>::zeroed();
    // SAFETY: a valid C string and room for the result.
    if unsafe { libc::statvfs(path.as_ptr(), stat.as_mut_ptr()) } != 0 {
        return Err(unusable(dir, &OsError::last_os_error()));
    }
    // SAFETY: initialised by the call, and zeroed before it.
    let stat = unsafe { stat.assume_init() };
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// The number of the device a directory lies on: equal numbers, one file system.
///
/// # Errors
/// `FN-E604` if the path cannot be looked at.
pub fn device_number(dir: &Path) -> Result<u64> {
    std::fs::metadata(dir).map(|m| m.dev()).map_err(|e| unusable(dir, &e))
}

/// `FN-E605` with its numbers.
pub(crate) fn disk_full(dir: &Path, need: u64, free: u64) -> Error {
    let (need, free) = (ByteCount(need), ByteCount(free));
    Error::new(Code::DiskFull, format!("{}: need {need}, {free} free.", dir.display()))
        .errno(libc::ENOSPC)
        .action("Free some space, add another path to nvme.paths, or keep more in host memory.")
}

/// `FN-E605` after the system's refusal: for want of space, of inodes, or of quota.
fn full(dir: &Path, need: u64, errno: i32) -> Error {
    let free = free_bytes(dir).unwrap_or(0);
    if errno == libc::ENOSPC && !os_error::no_inodes(dir) {
        return disk_full(dir, need, free);
    }
    let (cause, need, free) = (OsError::from_raw_os_error(errno), ByteCount(need), ByteCount(free));
    Error::new(Code::DiskFull, format!("{}: a file of {need} was refused, {free} free: {cause}.", dir.display()))
        .errno(errno)
        .action(os_error::advice(errno, dir).unwrap_or_default())
}

/// `FN-E604` with its cause; `FN-E605` if that is a full disk.
pub(crate) fn unusable(dir: &Path, e: &OsError) -> Error {
    let errno = e.raw_os_error().unwrap_or(0);
    if os_error::is_full(errno) {
        return full(dir, PROBE_BYTES as u64, errno);
    }
    let action = match e.kind() {
        // Such as /proc: it is there, and takes no files.
        ErrorKind::NotFound if dir.is_dir() => {
            return Error::new(
                Code::PathUnusable,
                format!("{}: no file can be made in this directory: {e}.", dir.display()),
            )
            .errno(errno)
            .action("Use a directory on a local drive.");
        }
        ErrorKind::NotFound => "Create the directory, or correct nvme.paths.".to_owned(),
        ErrorKind::PermissionDenied => "Use a directory this user can write to.".to_owned(),
        _ => os_error::advice(errno, dir).unwrap_or_else(|| "Use a directory on a local drive.".to_owned()),
    };
    Error::new(Code::PathUnusable, format!("{}: {e}.", dir.display()))
        .errno(e.raw_os_error().unwrap_or(0))
        .action(action)
}

fn not_a_disk(dir: &Path, name: &str) -> Error {
    let action = match candidate() {
        Some((path, free)) => {
            format!("Use a directory on a local disk (candidate: {}, {} free).", path.display(), ByteCount(free))
        }
        None => "Use a directory on a local disk.".to_owned(),
    };
    Error::new(Code::NotADisk, format!("{} is {name}: data there stays in memory.", dir.display())).action(action)
}

/// The mounted local file system with the most free space that this user can write to.
fn candidate() -> Option<(PathBuf, u64)> {
    const LOCAL: [&str; 6] = ["ext4", "xfs", "btrfs", "f2fs", "zfs", "ext3"];
    let mounts = std::fs::read_to_string("/proc/self/mounts").ok()?;
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (path, kind) = (fields.next()?, fields.next()?);
            let path = PathBuf::from(path.replace("\\040", " "));
            (LOCAL.contains(&kind) && path.is_dir() && is_writable(&path)).then_some(())?;
            let free = free_bytes(&path).ok()?;
            Some((path, free))
        })
        .max_by_key(|&(_, free)| free)
}

fn is_writable(dir: &Path) -> bool {
    // SAFETY: a valid C string.
    c_path(dir).is_ok_and(|path| unsafe { libc::access(path.as_ptr(), libc::W_OK) } == 0)
}

fn c_path(dir: &Path) -> Result<CString> {
    CString::new(dir.as_os_str().as_bytes()).map_err(|_| unusable(dir, &OsError::from_raw_os_error(libc::EINVAL)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_not_a_disk() {
        let shm = Path::new("/dev/shm");
        if FileSystem::of(shm).is_ok_and(|fs| matches!(fs, FileSystem::Memory(_))) {
            let e = probe_directory(shm, DirectIo::Preferred).expect_err("in memory");
            assert_eq!(e.code(), Code::NotADisk);
            assert!(e.to_string().contains("/dev/shm is tmpfs"), "{e}");
        }
    }

    #[test]
    fn a_path_that_cannot_be_used_is_named() {
        let dir = tempfile::tempdir().expect("a directory");
        let e = probe_directory(&dir.path().join("missing"), DirectIo::Preferred).expect_err("missing");
        assert_eq!((e.code(), e.os_error()), (Code::PathUnusable, Some(libc::ENOENT)));
        let file = dir.path().join("file");
        std::fs::write(&file, b"x").expect("writes");
        let e = probe_directory(&file, DirectIo::Preferred).expect_err("no directory");
        assert_eq!((e.code(), e.os_error()), (Code::PathUnusable, Some(libc::ENOTDIR)));
        assert!(e.to_string().contains(&*file.to_string_lossy()), "{e}");
    }

    #[test]
    fn a_probe_leaves_nothing_behind() {
        let dir = tempfile::tempdir_in(".").expect("a directory");
        let probe = probe_directory(dir.path(), DirectIo::Preferred).expect("works");
        assert!(probe.direct || !probe.notes.is_empty());
        assert_eq!(std::fs::read_dir(dir.path()).expect("readable").count(), 0);
    }

    #[test]
    fn more_than_the_disk_holds_is_disk_full() {
        let dir = tempfile::tempdir_in(".").expect("a directory");
        let file = scratch_file(dir.path(), false).expect("a file");
        let free = free_bytes(dir.path()).expect("free");
        let e = allocate(&file, free + (64 << 30), dir.path()).expect_err("too much");
        assert_eq!(e.code(), Code::DiskFull, "{e}");
        assert!(e.to_string().contains("need"), "{e}");
        assert_eq!(file.metadata().expect("an open file").blocks(), 0, "the disk is as full as it was");
    }
}
