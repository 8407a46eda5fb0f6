//! A file without a name, in memory, that the processes of one host map: what several ranks share.
//!
//! S1: its size is set once, by who makes it, and sealed: no byte that is mapped can go away under a reader. S2: who adopts it looks at size
//! and seals before it maps anything.
#![expect(unsafe_code, reason = "takes over a number of an open file")]

use std::{
    os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
    sync::Arc,
};

use rustix::fs::{MemfdFlags, SealFlags};

use crate::{
    error::{Code, Error, Result},
    quantities::ByteCount,
};

const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

/// The open file.
#[derive(Debug)]
pub struct SharedFile {
    fd: OwnedFd,
    len: u64,
}

impl SharedFile {
    /// Makes a file of `len` bytes, all zero; memory is taken at first touch. Where the system counts memory when it is taken and may refuse
    /// it then (`vm.overcommit_memory = 2`), all of it is taken now: a refusal is an error here, and would be a signal later.
    ///
    /// # Errors
    /// `FN-E204` when the system refuses.
    pub fn create(len: u64) -> Result<Arc<Self>> {
        let refused = |e: rustix::io::Errno| {
            Error::new(
                Code::HostAlloc,
                format!("the system refused {} of memory for ranks to share: {e}.", ByteCount(len)),
            )
            .errno(e.raw_os_error())
            .action("Lower budget.host, or raise the limits on open files and file sizes (ulimit -n, ulimit -f).")
        };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("funicular", flags).map_err(refused)?;
        rustix::fs::ftruncate(&fd, len).map_err(refused)?;
        if std::fs::read("/proc/sys/vm/overcommit_memory").is_ok_and(|mode| mode.starts_with(b"2")) {
            rustix::fs::fallocate(&fd, rustix::fs::FallocateFlags::empty(), 0, len).map_err(refused)?;
        }
        rustix::fs::fcntl_add_seals(&fd, SEALS | SealFlags::SEAL).map_err(refused)?;
        Ok(Arc::new(Self { fd, len }))
    }

    /// Takes a copy of the number of a file that another process made and passed on; the caller keeps its own.
    ///
    /// # Errors
    /// `FN-E108` if it is none such.
    pub fn adopt(fd: RawFd) -> Result<Arc<Self>> {
        let not_ours = |why: &str| Error::argument(format!("file {fd} is not what rank 0 shares: {why}."));
        if fd < 0 {
            return Err(not_ours("no number of an open file"));
        }
        // SAFETY: only used for this call; a number that is not open is refused by the system.
        let fd = rustix::io::fcntl_dupfd_cloexec(unsafe { BorrowedFd::borrow_raw(fd) }, 3)
            .map_err(|_| not_ours("it is not open"))?;
        let seals = rustix::fs::fcntl_get_seals(&fd).map_err(|_| not_ours("it cannot be sealed"))?;
        if !seals.contains(SEALS) {
            return Err(not_ours("its size may change"));
        }
        let stat = rustix::fs::fstat(&fd).map_err(|_| not_ours("it has no size"))?;
        let len = u64::try_from(stat.st_size).map_err(|_| not_ours("it has no size"))?;
        Ok(Arc::new(Self { fd, len }))
    }

    /// Its bytes.
    pub fn size(&self) -> u64 {
        self.len
    }

    /// Its number in this process.
    pub fn number(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsFd};

    use super::*;
    use crate::memory::{HostRegion, page_size};

    #[test]
    fn what_one_mapping_writes_the_other_reads() {
        let page = page_size() as u64;
        let file = SharedFile::create(4 * page).expect("makes");
        let other = SharedFile::adopt(file.number()).expect("adopts");
        assert!(other.size() == 4 * page && other.number() != file.number());
        let mine = HostRegion::of_file(&file, page, ByteCount(2 * page), "a test").expect("maps");
        let theirs = HostRegion::of_file(&other, 0, ByteCount(4 * page), "a test").expect("maps");
        assert!(mine.len() as u64 == 2 * page && (mine.as_ptr() as usize).is_multiple_of(2 << 20));
        mine.touch_all();
        mine.populate(0, mine.len());
        // SAFETY: inside the regions, and only this test uses them.
        unsafe {
            mine.as_ptr().write_volatile(7);
            assert_eq!(theirs.as_ptr().add(page as usize).read_volatile(), 7);
            assert_eq!(theirs.as_ptr().read_volatile(), 0);
        }
        assert_eq!([&mine, &theirs].map(|region| copied_by_forks(region.as_ptr() as u64)), [false; 2]);
        drop(file);
        drop(mine);
        // SAFETY: as above.
        assert_eq!(unsafe { theirs.as_ptr().add(page as usize).read_volatile() }, 7);
    }

    /// Whether a fork copies the mapping at an address, as the kernel says.
    fn copied_by_forks(address: u64) -> bool {
        let maps = std::fs::read_to_string("/proc/self/smaps").expect("a process may see its own");
        let mut inside = false;
        for line in maps.lines() {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            if let Some((from, to)) = range
                .and_then(|(from, to)| Some((u64::from_str_radix(from, 16).ok()?, u64::from_str_radix(to, 16).ok()?)))
            {
                inside = (from..to).contains(&address);
            } else if inside && let Some(flags) = line.strip_prefix("VmFlags:") {
                return !flags.split_whitespace().any(|flag| flag == "dc");
            }
        }
        panic!("nothing is mapped at {address:#x}")
    }

    #[test]
    fn a_file_whose_size_may_change_is_refused() {
        let plain = tempfile::tempfile().expect("a file");
        for number in [-1, 1 << 20, plain.as_raw_fd()] {
            assert_eq!(SharedFile::adopt(number).expect_err("refused").code(), Code::Argument);
        }
        let fd = rustix::fs::memfd_create("a test", MemfdFlags::ALLOW_SEALING).expect("makes");
        assert_eq!(SharedFile::adopt(fd.as_raw_fd()).expect_err("not sealed").code(), Code::Argument);
        let file = SharedFile::create(10).expect("makes");
        let again = File::from(file.fd.as_fd().try_clone_to_owned().expect("copies"));
        assert!(again.set_len(5).is_err() && again.set_len(50).is_err(), "sealed");
        assert!(HostRegion::of_file(&file, 0, ByteCount(1 << 20), "a test").is_err(), "no more than there is");
    }
}
