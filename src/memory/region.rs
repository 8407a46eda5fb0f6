//! A mapping of exact size, anonymous or of memory that ranks share, on huge pages where the system gives them.
#![expect(unsafe_code, reason = "maps memory and hands out raw pointers into it")]

use std::{
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering},
    },
};

use super::{SharedFile, fork::NotForked, page_size};
use crate::{
    error::{Code, Error, Result},
    quantities::{ByteCount, round_up},
};

/// Alignment of a region: a huge page.
const ALIGNMENT: u64 = 2 << 20;

/// Memory at one address for its whole life, zero-filled at first, page aligned at 2 MiB. Pages are taken at first touch. A forked child has
/// none of it.
pub struct HostRegion {
    mapping: NonNull<u8>,
    mapping_len: usize,
    not_forked: NotForked,
    moved: AtomicBool,
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the region is plain memory; who may touch which range is decided by leases and by the runtime.
unsafe impl Send for HostRegion {}
// SAFETY: as above; shared access is through raw pointers only.
unsafe impl Sync for HostRegion {}

impl HostRegion {
    /// Maps `len` bytes (rounded up to a page) for `purpose`, which errors name.
    ///
    /// # Errors
    /// `FN-E204` when the system refuses.
    pub fn new(len: ByteCount, purpose: &str) -> Result<Arc<Self>> {
        Self::map(len, ALIGNMENT, purpose)
    }

    /// Maps `len` bytes (rounded up to a page) of a shared file, from byte `offset` on, a multiple of a page: what one process writes there
    /// the others read.
    ///
    /// # Errors
    /// `FN-E204` when the file has not so many, or the system refuses.
    pub fn of_file(file: &SharedFile, offset: u64, len: ByteCount, purpose: &str) -> Result<Arc<Self>> {
        let region = Self::map(len, ALIGNMENT, purpose)?;
        let failed = |cause: std::io::Error| {
            Error::new(Code::HostAlloc, format!("{len} of shared memory cannot be mapped for {purpose}: {cause}."))
                .errno(cause.raw_os_error())
                .action("Raise the container's or user's limit on virtual memory (ulimit -v).")
        };
        let start = libc::off_t::try_from(offset).ok().filter(|_| offset + region.len as u64 <= file.size());
        let Some(start) = start else { return Err(failed(std::io::ErrorKind::UnexpectedEof.into())) };
        // SAFETY: exactly the usable part of the mapping just made, which nothing looks at yet; sealed, the file does not shrink under it.
        let raw = unsafe {
            libc::mmap(
                region.start.as_ptr().cast(),
                region.len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE,
                file.number(),
                start,
            )
        };
        if raw == libc::MAP_FAILED {
            return Err(failed(std::io::Error::last_os_error()));
        }
        // SAFETY: as above; refused, the region has small pages.
        unsafe { libc::madvise(raw, region.len, libc::MADV_HUGEPAGE) };
        NotForked::renew(region.start.as_ptr(), region.len);
        Ok(region)
    }

    /// As [`Self::new`], aligned to a page: memory that [`Self::move_to`] can move.
    ///
    /// # Errors
    /// `FN-E204` when the system refuses.
    pub(crate) fn movable(len: ByteCount, purpose: &str) -> Result<Arc<Self>> {
        Self::map(len, 0, purpose)
    }

    /// Maps `slack` bytes more than needed, so that the region can begin at a multiple of `slack`.
    fn map(len: ByteCount, slack: u64, purpose: &str) -> Result<Arc<Self>> {
        let refused = || {
            Error::new(Code::HostAlloc, format!("the system refused {len} of memory for {purpose}."))
                .errno(std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
                .action("Lower budget.host, or raise the container's or user's memory limit (ulimit -v).")
        };
        let len_rounded = round_up(len.0.max(1), page_size() as u64);
        let total = usize::try_from(len_rounded + slack).map_err(|_| refused())?;
        // SAFETY: a fresh anonymous mapping; no existing memory is touched.
        let raw = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                total,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if raw == libc::MAP_FAILED {
            return Err(refused());
        }
        let mapping = NonNull::new(raw.cast::<u8>()).ok_or_else(refused)?;
        let offset = if slack == 0 { 0 } else { mapping.align_offset(slack as usize) };
        // SAFETY: `offset` is 0 or less than `slack`, and the mapping has `slack` bytes more than `len_rounded`.
        let start = unsafe { mapping.add(offset) };
        let len = len_rounded as usize;
        // SAFETY: the range lies in the mapping made above; advice changes no contents.
        // Refused, the region has small pages.
        unsafe { libc::madvise(start.as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
        let not_forked = NotForked::new(raw.cast(), total);
        Ok(Arc::new(Self { mapping, mapping_len: total, not_forked, moved: AtomicBool::new(false), start, len }))
    }

    /// First byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Usable bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True for a region without bytes; never the case.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes the pages of `[offset, offset + len)` now, keeping their contents.
    ///
    /// # Panics
    /// If the range is outside the region.
    pub fn touch(&self, offset: usize, len: usize) {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "touch outside the region");
        for at in (offset..offset + len).step_by(page_size()) {
            // SAFETY: `at` is inside the region; the exchange writes what it found, and nothing where another thread writes.
            let first = unsafe { &*self.start.as_ptr().add(at).cast::<AtomicU8>() };
            let found = first.load(Ordering::Relaxed);
            // Not an addition of zero: compilers make a load of that, or nothing.
            let _ = first.compare_exchange(found, found, Ordering::Relaxed, Ordering::Relaxed);
        }
    }
}

impl HostRegion {
    /// Takes all pages now, on all processors, keeping their contents. A thread that the system refuses leaves its share to the others;
    /// the calling thread always works.
    pub fn touch_all(&self) {
        const PART: usize = 64 << 20;
        let parts = self.len.div_ceil(PART);
        let next = AtomicUsize::new(0);
        let work = || {
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed).saturating_mul(PART);
                if at >= self.len {
                    return;
                }
                self.touch(at, PART.min(self.len - at));
            }
        };
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        std::thread::scope(|scope| {
            for _ in 1..processors.min(parts) {
                if std::thread::Builder::new().name("funicular-touch".into()).spawn_scoped(scope, work).is_err() {
                    break;
                }
            }
            work();
        });
    }

    /// Has the system provide the pages of `[offset, offset + len)` now, where it can (Linux 5.14): the first write to a page costs
    /// more than all later ones, a virtual machine's most. Contents stay, also while other threads use them.
    ///
    /// # Panics
    /// If the range is outside the region.
    pub fn populate(&self, offset: usize, len: usize) {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "populating outside the region");
        let first = offset / page_size() * page_size();
        // SAFETY: whole pages of this region: it ends with one. The advice changes no contents; refused, pages come at first touch.
        unsafe {
            libc::madvise(self.start.as_ptr().add(first).cast(), offset + len - first, libc::MADV_POPULATE_WRITE);
        }
    }

    /// Moves the memory to addresses of the caller's, in place of what is mapped there. A thread that looks there sees none of the
    /// memory, or all. From now on there is nothing at the region's own addresses.
    ///
    /// # Panics
    /// If the region was not made by [`Self::movable`], or was moved.
    pub(super) fn move_to(&self, to: *mut u8) -> std::io::Result<()> {
        assert!(self.mapping_len == self.len && !self.moved.load(Ordering::Acquire), "a region that cannot move");
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: exactly this region's mapping, which is left alone from now on; the caller owns the target.
        let moved =
            unsafe { libc::mremap(self.mapping.as_ptr().cast(), self.len, self.len, flags, to.cast::<libc::c_void>()) };
        if moved == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        self.moved.store(true, Ordering::Release);
        Ok(())
    }

    /// Lets forks copy it from now on: its runtime has ended, but tensors look at it.
    pub fn let_fork(&self) {
        self.not_forked.let_fork();
    }

    /// Locks all pages in memory from their first use on, as long as the region lives. All of it counts as locked from now on; none of it is
    /// touched: the system takes seconds to fill a few GiB with zeros.
    ///
    /// # Errors
    /// `FN-E204` when the system refuses: `RLIMIT_MEMLOCK`.
    pub fn lock(&self) -> Result<()> {
        // SAFETY: exactly this region's range; locking changes no contents.
        if unsafe { libc::mlock2(self.start.as_ptr().cast(), self.len, libc::MLOCK_ONFAULT) } == 0 {
            return Ok(());
        }
        let e = std::io::Error::last_os_error();
        Err(Error::new(Code::HostAlloc, format!("{} of memory cannot be locked: {e}.", ByteCount(self.len as u64)))
            .errno(e.raw_os_error().unwrap_or(0))
            .action("Raise the limit: ulimit -l unlimited, docker run --ulimit memlock=-1, or LimitMEMLOCK=infinity."))
    }
}

impl std::fmt::Debug for HostRegion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostRegion({} bytes at {:p})", self.len, self.start)
    }
}

impl Drop for HostRegion {
    fn drop(&mut self) {
        if self.moved.load(Ordering::Acquire) || !self.not_forked.is_ours() {
            return; // another owner has it now, or the parent process: here the addresses stay reserved
        }
        // SAFETY: exactly the mapping made in `new`; every user holds the `Arc`, so none is left.
        unsafe { libc::munmap(self.mapping.as_ptr().cast(), self.mapping_len) };
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::unix::fs::FileExt};

    use super::*;

    #[test]
    fn is_zero_filled_aligned_and_writable() {
        let region = HostRegion::new(ByteCount(10_000), "a test").expect("maps");
        assert_eq!((region.as_ptr() as usize) % (2 << 20), 0);
        assert_eq!(region.len(), 10_000_usize.next_multiple_of(page_size()));
        region.touch(0, region.len());
        region.populate(5000, 3000);
        // SAFETY: inside the region, and only this test uses it.
        unsafe {
            assert_eq!(*region.as_ptr().add(12_287), 0);
            *region.as_ptr().add(12_287) = 7;
            region.touch(8192, 4096);
            assert_eq!(*region.as_ptr().add(12_287), 7);
        }
    }

    #[test]
    fn all_pages_are_taken_and_keep_their_contents() {
        let len = (192 << 20) + page_size();
        let region = HostRegion::new(ByteCount(len as u64), "a test").expect("maps");
        // SAFETY: inside the region, and only this test uses it.
        unsafe { *region.as_ptr().add(len - 1) = 7 };
        region.touch_all();
        // Eight bytes for each page; the two highest bits say that it is in memory or was swapped out.
        let mut pages = vec![0; len / page_size() * 8];
        let map = File::open("/proc/self/pagemap").expect("a process may see its own");
        map.read_exact_at(&mut pages, (region.as_ptr() as usize / page_size() * 8) as u64).expect("reads");
        assert_eq!(pages.chunks(8).position(|page| page[7] >> 6 == 0), None, "a page that was not taken");
        // SAFETY: as above.
        assert_eq!(unsafe { *region.as_ptr().add(len - 1) }, 7);
    }

    #[test]
    fn locking_takes_no_page() {
        let region = HostRegion::new(ByteCount::mib(2), "a test").expect("maps");
        region.lock().expect("every system lets a process lock a little");
        let mut pages = vec![0; region.len() / page_size() * 8];
        let map = File::open("/proc/self/pagemap").expect("a process may see its own");
        map.read_exact_at(&mut pages, (region.as_ptr() as usize / page_size() * 8) as u64).expect("reads");
        assert_eq!(pages.chunks(8).position(|page| page[7] >> 6 != 0), None, "a page that was taken");
        let status = std::fs::read_to_string("/proc/self/smaps").expect("reads");
        let flags = status.split(&format!("{:x}-", region.as_ptr() as usize)).nth(1).expect("a mapping begins there");
        let flags = flags.lines().find(|line| line.starts_with("VmFlags:")).expect("every mapping has flags");
        assert!(flags.contains(" lo"), "not locked: {flags}");
    }

    #[test]
    fn an_impossible_size_is_a_named_error() {
        let e = HostRegion::new(ByteCount(1 << 60), "a test").expect_err("too large");
        assert_eq!(e.code(), Code::HostAlloc);
    }
}
