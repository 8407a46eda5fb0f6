//! What the heap has left when the system gives no more address space (`ulimit -v`): enough for calls under way to end in order.
//!
//! Rust ends the process where an allocation fails. Large ones are asked of the system and fail by name; for all others some address space
//! is set aside, given up when the heap needs it, and set aside again before the next call may begin.
#![expect(unsafe_code, reason = "is the heap of this library, and maps memory without access")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    ptr,
    sync::atomic::{AtomicPtr, Ordering},
    time::Duration,
};

use crate::error::{Code, Error, Result};

const BYTES: usize = 32 << 20;

static BALLAST: AtomicPtr<libc::c_void> = AtomicPtr::new(ptr::null_mut());

/// The system's heap, which gives up what was set aside before it refuses: the extension module's own, which fails by name near `ulimit -v`.
#[derive(Debug)]
pub struct Heap;

/// How often a refused allocation is repeated, and the pause before each.
const AGAIN: (u32, Duration) = (100, Duration::from_millis(1));

/// Repeats a refused allocation after giving the reserve up. Several times: another thread may be giving it up, and the C library takes twice the
/// address space of a thread's heap (64 MiB) for a moment.
fn retried(first: *mut u8, mut again: impl FnMut() -> *mut u8) -> *mut u8 {
    let mut place = first;
    for _ in 0..AGAIN.0 {
        if !place.is_null() {
            break;
        }
        if !give_up() {
            std::thread::sleep(AGAIN.1);
        }
        place = again();
    }
    place
}

// SAFETY: every call is the system's heap's, with the same arguments; a call that failed has changed nothing and may be made again.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's contract.
        retried(unsafe { System.alloc(layout) }, || unsafe { System.alloc(layout) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's contract.
        retried(unsafe { System.alloc_zeroed(layout) }, || unsafe { System.alloc_zeroed(layout) })
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(place, layout) };
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's contract.
        retried(unsafe { System.realloc(place, layout, size) }, || unsafe { System.realloc(place, layout, size) })
    }
}

fn give_up() -> bool {
    let ballast = BALLAST.swap(ptr::null_mut(), Ordering::AcqRel);
    // SAFETY: what `set_aside` mapped, whole; after the swap no other thread has it.
    !ballast.is_null() && unsafe { libc::munmap(ballast, BYTES) } == 0
}

/// Sets address space aside, if none is: called before anything that allocates.
///
/// # Errors
/// `FN-E204` when the system has none left.
pub fn set_aside() -> Result<()> {
    if !BALLAST.load(Ordering::Relaxed).is_null() {
        return Ok(());
    }
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a fresh mapping without access; no existing memory is touched.
    let raw = unsafe { libc::mmap(ptr::null_mut(), BYTES, libc::PROT_NONE, flags, -1, 0) };
    if raw == libc::MAP_FAILED {
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::ENOMEM);
        return Err(Error::new(Code::HostAlloc, "the system has hardly any address space left for this process.")
            .errno(errno)
            .action("Raise the limit on virtual memory (ulimit -v)."));
    }
    if BALLAST.compare_exchange(ptr::null_mut(), raw, Ordering::AcqRel, Ordering::Relaxed).is_err() {
        // SAFETY: mapped above, and not known to other code.
        unsafe { libc::munmap(raw, BYTES) };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_refused_is_asked_for_again_and_the_reserve_set_aside_again() {
        let mut left = 3;
        let mut word = 0u8;
        let place = retried(ptr::null_mut(), || {
            left -= 1;
            if left > 0 { ptr::null_mut() } else { &raw mut word }
        });
        assert_eq!((left, place), (0, &raw mut word));
        let mut asked = 0;
        let none = retried(ptr::null_mut(), || {
            asked += 1;
            ptr::null_mut()
        });
        assert!(none.is_null() && asked == AGAIN.0);

        // In one test, as there is one reserve.
        set_aside().expect("there is room");
        assert!(give_up() && !give_up());
        set_aside().expect("there is room");
        assert!(!BALLAST.load(Ordering::Relaxed).is_null());
    }
}
