//! Address space for bytes that live on NVMe: memory only while somebody reads them outside their window.
#![expect(unsafe_code, reason = "maps memory and changes its protection")]

use std::{
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use parking_lot::Mutex;

use crate::{
    error::{Code, Error, Result},
    units::{ByteCount, round_up},
};

/// What has to be undone before a range may be unmapped: a device's registration of it.
type Undo = Box<dyn FnOnce() + Send>;

/// A range that is inaccessible until it is filled: touching it unfilled ends the process loudly instead of giving zeros.
pub struct Shadow {
    start: NonNull<u8>,
    len: usize,
    filled: AtomicBool,
    undo: Mutex<Option<Undo>>,
}

// SAFETY: plain memory; who may touch it when is decided by the runtime, which owns `fill` and `discard`.
unsafe impl Send for Shadow {}
// SAFETY: as above.
unsafe impl Sync for Shadow {}

impl Shadow {
    /// Reserves `len` bytes of addresses, without memory behind them.
    ///
    /// # Errors
    /// `FN-E204` when the system refuses.
    pub fn new(len: u64) -> Result<Arc<Self>> {
        let len = round_up(len.max(1), 4096);
        let refused = || {
            Error::new(Code::HostAlloc, format!("the system refused {} of address space.", ByteCount(len)))
                .errno(std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
                .action("Check the limit on virtual memory (ulimit -v).")
        };
        let len = usize::try_from(len).map_err(|_| refused())?;
        // SAFETY: a fresh anonymous mapping without access; no existing memory is touched.
        let raw = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if raw == libc::MAP_FAILED {
            return Err(refused());
        }
        let start = NonNull::new(raw.cast()).ok_or_else(refused)?;
        Ok(Arc::new(Self { start, len, filled: AtomicBool::new(false), undo: Mutex::new(None) }))
    }

    /// First byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True for a range without bytes; never the case.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether there is memory behind it now.
    pub fn filled(&self) -> bool {
        self.filled.load(Ordering::Acquire)
    }

    /// Has `undo` run before the memory is given back.
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
        self.protect(libc::PROT_READ | libc::PROT_WRITE)?;
        self.filled.store(true, Ordering::Release);
        Ok(())
    }

    /// Gives the memory back and makes the range inaccessible. Nothing may be looking at it.
    ///
    /// # Errors
    /// `FN-E204` when the system refuses.
    pub fn discard(&self) -> Result<()> {
        self.run_undo();
        self.filled.store(false, Ordering::Release);
        // SAFETY: exactly the range of this mapping.
        unsafe { libc::madvise(self.start.as_ptr().cast(), self.len, libc::MADV_DONTNEED) };
        self.protect(libc::PROT_NONE)
    }

    fn protect(&self, access: libc::c_int) -> Result<()> {
        // SAFETY: exactly the range of this mapping.
        if unsafe { libc::mprotect(self.start.as_ptr().cast(), self.len, access) } == 0 {
            return Ok(());
        }
        Err(Error::new(
            Code::HostAlloc,
            format!("the system refused access to {} of memory.", ByteCount(self.len as u64)),
        )
        .errno(std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
        .action("Check vm.max_map_count and the memory limits."))
    }
}

impl std::fmt::Debug for Shadow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shadow({} bytes, filled: {})", self.len, self.filled())
    }
}

impl Drop for Shadow {
    fn drop(&mut self) {
        self.run_undo();
        // SAFETY: exactly the mapping made in `new`; every user holds the `Arc`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comes_back_empty_after_a_discard() {
        let shadow = Shadow::new(10_000).expect("maps");
        assert!(!shadow.filled());
        shadow.fill().expect("fills");
        // SAFETY: filled, in range, and only this test uses it.
        unsafe { *shadow.as_ptr().add(9_999) = 3 };
        shadow.discard().expect("discards");
        assert!(!shadow.filled());
        shadow.fill().expect("fills again");
        // SAFETY: as above.
        assert_eq!(unsafe { *shadow.as_ptr().add(9_999) }, 0);
    }
}
