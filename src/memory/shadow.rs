//! Address space for bytes that live on NVMe: backed by memory only while code reads them outside their window.
//!
//! A part is inaccessible until it is filled. A thread that touches an unfilled part, past all guards, waits until a thread of the
//! runtime has brought the bytes (`fault`); if they cannot be brought, the process ends with a message.
#![expect(unsafe_code, reason = "maps memory and changes its protection")]

use std::{
    ptr::{self, NonNull},
    sync::{Arc, atomic::Ordering},
};

use parking_lot::Mutex;

use super::{
    fault,
    fault_table::{EMPTY, FILLED, REFUSED, Table},
    fork::NotForked,
    page_size,
    region::HostRegion,
};
use crate::{
    error::{Code, Error, Result},
    quantities::{ByteCount, round_up},
};

/// What has to be undone before a range may be unmapped: a device's registration of it.
type Undo = Box<dyn FnOnce() + Send>;

/// The shadows of one model: one reservation of addresses.
pub struct ShadowSpace {
    start: NonNull<u8>,
    len: usize,
    registered: NotForked,
    table: *mut Table,
}

// SAFETY: the table is only read and its fields are atomics, a file and plain data; the pointer is this value's own.
unsafe impl Send for ShadowSpace {}
// SAFETY: as above.
unsafe impl Sync for ShadowSpace {}

impl ShadowSpace {
    /// Reserves addresses for parts of so many bytes, each with a name that messages call it; behind each lies a page that is never
    /// accessible. No memory is taken.
    ///
    /// # Errors
    /// `FN-E204` when the system refuses.
    pub fn reserve<'a>(parts: impl IntoIterator<Item = (u64, &'a str)>) -> Result<(Arc<Self>, Vec<Arc<Shadow>>)> {
        let page = page_size();
        let mut total = 0;
        let mut places = Vec::new();
        for (bytes, name) in parts {
            let len = round_up(bytes.max(1), page as u64) as usize;
            places.push((total, len, Box::from(name)));
            total += len + page;
        }
        let total = total.max(page);
        // SAFETY: a fresh anonymous mapping without access; no existing memory is touched.
        let raw = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            libc::mmap(ptr::null_mut(), total, libc::PROT_NONE, flags, -1, 0)
        };
        let start = NonNull::new(raw.cast::<u8>()).filter(|_| raw != libc::MAP_FAILED).ok_or_else(|| {
            Error::new(Code::HostAlloc, format!("the system refused {} of address space.", ByteCount(total as u64)))
                .errno(std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
                .action("Check the limit on virtual memory (ulimit -v).")
        })?;
        for (at, ..) in &mut places {
            *at += start.as_ptr() as usize;
        }
        let ranges: Vec<(usize, usize)> = places.iter().map(|&(at, len, _)| (at, len)).collect();
        let table = Table::new(places).and_then(|table| fault::install().map(|()| table)).inspect_err(|_| {
            // SAFETY: mapped above, and not known to other code.
            unsafe { libc::munmap(start.as_ptr().cast(), total) };
        })?;
        let table = Box::into_raw(Box::new(table));
        let registered = NotForked::with(start.as_ptr(), total, table);
        let space = Arc::new(Self { start, len: total, registered, table });
        let shadow = |(part, (at, len)): (usize, (usize, usize))| {
            let (space, undo) = (Arc::clone(&space), Mutex::new(None));
            Arc::new(Shadow { space, part, start: at as *mut u8, len, change: Mutex::new(()), undo })
        };
        let shadows = ranges.into_iter().enumerate().map(shadow).collect();
        Ok((space, shadows))
    }

    fn table(&self) -> &Table {
        // SAFETY: made in `reserve` and freed by `drop` only.
        unsafe { &*self.table }
    }

    /// Lets forks copy these ranges from now on.
    pub fn let_fork(&self) {
        self.registered.let_fork();
    }

    /// From now on a thread that touches an unfilled part waits for a server to answer.
    pub fn serve(&self) {
        self.table().serve();
    }

    /// Makes [`Self::wanted`] return none.
    pub fn stop(&self) {
        self.table().stop();
    }

    /// Waits until a thread touches an unfilled part; none once [`Self::stop`] was called.
    pub fn wanted(&self) -> Option<usize> {
        while self.table().served() {
            if let Some(part) = self.table().wanted() {
                return Some(part);
            }
            self.table().wait();
        }
        None
    }

    /// Refuses every part that a thread waits for.
    pub fn refuse_all(&self) {
        while let Some(part) = self.table().wanted() {
            self.table().set(part, REFUSED);
        }
    }
}

impl Drop for ShadowSpace {
    fn drop(&mut self) {
        if !self.registered.is_ours() {
            return; // mapped by the parent: in this process the addresses stay reserved
        }
        self.registered.table().store(ptr::null_mut(), Ordering::SeqCst);
        fault::free(self.table);
        // SAFETY: exactly the mapping made in `reserve`; every user holds a shadow, which holds this.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

impl std::fmt::Debug for ShadowSpace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ShadowSpace({} bytes)", self.len)
    }
}

/// One part: a unit's parameters.
pub struct Shadow {
    space: Arc<ShadowSpace>,
    part: usize,
    start: *mut u8,
    len: usize,
    /// Held while memory comes or goes; no holder waits for another thread.
    change: Mutex<()>,
    undo: Mutex<Option<Undo>>,
}

// SAFETY: plain memory; who may touch it when is decided by the runtime, which owns `fill`, `place` and `discard`.
unsafe impl Send for Shadow {}
// SAFETY: as above.
unsafe impl Sync for Shadow {}

impl Shadow {
    /// First byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start
    }

    /// Bytes, whole pages.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True for a range without bytes; never the case.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether there is memory behind it now.
    pub fn filled(&self) -> bool {
        self.space.table().state(self.part) == FILLED
    }

    /// Runs `undo` before the memory is given back.
    pub fn before_release(&self, undo: Box<dyn FnOnce() + Send>) {
        *self.undo.lock() = Some(undo);
    }

    fn run_undo(&self) {
        let undo = self.undo.lock().take();
        if let Some(undo) = undo {
            undo();
        }
    }

    /// Makes the range accessible, zero-filled.
    ///
    /// # Errors
    /// `FN-E204` when the system refuses.
    pub fn fill(&self) -> Result<()> {
        let _change = self.change.lock();
        if !self.filled() {
            self.protect(libc::PROT_READ | libc::PROT_WRITE)?;
            self.space.table().set(self.part, FILLED);
        }
        Ok(())
    }

    /// Moves a region there, at once for all threads; does nothing and returns false if there is memory already.
    ///
    /// # Errors
    /// `FN-E204` when the system refuses.
    ///
    /// # Panics
    /// If the region has another length, or cannot move.
    pub(crate) fn place(&self, region: &HostRegion) -> Result<bool> {
        assert_eq!(region.len(), self.len, "a region of another length");
        let _change = self.change.lock();
        if self.filled() {
            return Ok(false);
        }
        region.move_to(self.start).map_err(|cause| self.refused(&cause))?;
        NotForked::renew(self.start, self.len);
        self.space.table().set(self.part, FILLED);
        Ok(true)
    }

    /// Gives the memory back if `unchanged` says so of its bytes; returns whether it did. A thread that writes meanwhile waits,
    /// then goes on: in the kept memory, or after the bytes were brought again. A thread that reads goes on at once, or has the
    /// bytes brought again.
    ///
    /// # Errors
    /// `FN-E204` when the system refuses.
    pub fn discard_if(&self, unchanged: impl FnOnce(&[u8]) -> bool) -> Result<bool> {
        let _change = self.change.lock();
        if !self.filled() {
            return Ok(false);
        }
        // Before the protection: a writer that faults then waits in the handler; if the part were filled, it would
        // fault again and again.
        self.space.table().set(self.part, EMPTY);
        self.protect(libc::PROT_READ)?;
        // SAFETY: this part of the mapping, readable, and no thread can write to it now.
        let unchanged = unchanged(unsafe { std::slice::from_raw_parts(self.start, self.len) });
        if unchanged {
            self.protect(libc::PROT_NONE)?;
            self.forget();
        } else {
            self.protect(libc::PROT_READ | libc::PROT_WRITE)?;
        }
        self.space.table().set(self.part, if unchanged { EMPTY } else { FILLED });
        Ok(unchanged)
    }

    /// Ends the wait of threads that have touched the part: its bytes cannot be brought.
    pub fn refuse(&self) {
        let _change = self.change.lock();
        if !self.filled() {
            self.space.table().set(self.part, REFUSED);
        }
    }

    /// Gives the memory back and makes the range inaccessible. No tensor may be looking at it.
    ///
    /// # Errors
    /// `FN-E204` when the system refuses.
    pub fn discard(&self) -> Result<()> {
        self.run_undo();
        let _change = self.change.lock();
        self.space.table().set(self.part, EMPTY);
        self.forget();
        self.protect(libc::PROT_NONE)
    }

    fn forget(&self) {
        // SAFETY: exactly this part of the mapping.
        unsafe { libc::madvise(self.start.cast(), self.len, libc::MADV_DONTNEED) };
    }

    fn protect(&self, access: libc::c_int) -> Result<()> {
        // SAFETY: exactly this part of the mapping.
        if unsafe { libc::mprotect(self.start.cast(), self.len, access) } == 0 {
            return Ok(());
        }
        Err(self.refused(&std::io::Error::last_os_error()))
    }

    fn refused(&self, cause: &std::io::Error) -> Error {
        let bytes = ByteCount(self.len as u64);
        Error::new(Code::HostAlloc, format!("the system refused access to {bytes} of memory: {cause}."))
            .errno(cause.raw_os_error().unwrap_or(0))
            .action("Check vm.max_map_count and the memory limits.")
    }
}

impl std::fmt::Debug for Shadow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shadow({} bytes, filled: {})", self.len, self.filled())
    }
}

impl Drop for Shadow {
    fn drop(&mut self) {
        if self.space.registered.is_ours() && self.filled() {
            // Other parts may be in use for longer. A failure leaves the memory until the last of them goes.
            let _ = self.discard();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shadows(sizes: &[u64]) -> (Arc<ShadowSpace>, Vec<Arc<Shadow>>) {
        ShadowSpace::reserve(sizes.iter().map(|&bytes| (bytes, "a part"))).expect("maps")
    }

    fn byte(shadow: &Shadow, at: usize) -> *mut u8 {
        assert!(at < shadow.len());
        // SAFETY: in range.
        unsafe { shadow.as_ptr().add(at) }
    }

    fn region_of(bytes: u8, len: usize) -> Arc<HostRegion> {
        let region = HostRegion::movable(ByteCount(len as u64), "a test").expect("maps");
        // SAFETY: the region is this test's own.
        unsafe { region.as_ptr().write_bytes(bytes, len) };
        region
    }

    #[test]
    fn comes_back_empty_after_a_discard() {
        let (_, all) = shadows(&[10_000]);
        let shadow = &all[0];
        assert!(!shadow.filled());
        shadow.fill().expect("fills");
        // SAFETY: filled, in range, and only this test uses it.
        unsafe { *byte(shadow, 9_999) = 3 };
        shadow.discard().expect("discards");
        assert!(!shadow.filled());
        shadow.fill().expect("fills again");
        // SAFETY: as above.
        assert_eq!(unsafe { *byte(shadow, 9_999) }, 0);
    }

    #[test]
    fn what_is_placed_is_there_whole_and_only_once() {
        let (_, all) = shadows(&[100_000, 5_000]);
        let (first, second) = (region_of(7, all[0].len()), region_of(9, all[0].len()));
        assert!(all[0].place(&first).expect("moves"));
        assert!(!all[0].place(&second).expect("nothing to do"));
        assert!(!all[1].filled());
        // SAFETY: filled, and only this test uses it.
        assert!((0..all[0].len()).all(|at| unsafe { *byte(&all[0], at) } == 7));
        drop(first);
        all[0].discard().expect("discards");
        assert!(all[0].place(&second).expect("moves"));
        // SAFETY: as above.
        assert_eq!(unsafe { *byte(&all[0], 99_999) }, 9);
    }

    #[test]
    fn what_was_changed_stays() {
        let (_, all) = shadows(&[100_000]);
        assert!(!all[0].discard_if(|_| true).expect("nothing is there"));
        assert!(all[0].place(&region_of(7, all[0].len())).expect("moves"));
        // SAFETY: filled, and only this test uses it.
        unsafe { *byte(&all[0], 99_999) = 8 };
        assert!(!all[0].discard_if(|bytes| bytes[99_999] == 7).expect("looks"));
        // SAFETY: as above.
        assert!(all[0].filled() && unsafe { *byte(&all[0], 99_999) } == 8);
        // SAFETY: as above.
        unsafe { *byte(&all[0], 99_999) = 9 };
        assert!(all[0].discard_if(|bytes| bytes[99_999] == 9).expect("looks"));
        assert!(!all[0].filled());
    }

    #[test]
    fn threads_that_touch_it_wait_until_the_bytes_are_there() {
        let (space, all) = shadows(&[100_000, 100_000]);
        space.serve();
        let server = {
            let (space, all) = (Arc::clone(&space), all.clone());
            std::thread::spawn(move || {
                let mut served = 0;
                while let Some(part) = space.wanted() {
                    std::thread::sleep(std::time::Duration::from_millis(20));
                    assert!(all[part].place(&region_of(part as u8 + 1, all[part].len())).expect("moves"));
                    served += 1;
                }
                space.refuse_all();
                served
            })
        };
        std::thread::scope(|scope| {
            for reader in 0..8 {
                let shadow = &all[reader % 2];
                scope.spawn(move || {
                    for at in (0..shadow.len()).step_by(97) {
                        // SAFETY: in range; touching it brings the bytes.
                        assert_eq!(unsafe { byte(shadow, at).read_volatile() }, (reader % 2) as u8 + 1);
                    }
                });
            }
        });
        space.stop();
        assert_eq!(server.join().expect("no panic"), 2);
    }
}
