//! The parts of a range whose pages come when they are touched, and the state of each: read by the handler of `fault` and by the thread that
//! brings the bytes.
#![expect(unsafe_code, reason = "makes a descriptor, and waits on a futex")]

use std::{
    ffi::c_int,
    fs::File,
    io::Read,
    os::fd::{AsRawFd, FromRawFd},
    ptr,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
};

use crate::error::{Code, Error, Result};

/// There is no memory behind a part.
pub(super) const EMPTY: u32 = 0;
/// A thread has touched the part, and waits.
pub(super) const WANTED: u32 = 1;
/// The part's bytes are there.
pub(super) const FILLED: u32 = 2;
/// The part's bytes cannot be brought.
pub(super) const REFUSED: u32 = 3;

/// The parts of one range, as the handler sees them.
pub(super) struct Table {
    /// Per part: first address, bytes, name.
    pub(super) parts: Box<[(usize, usize, Box<str>)]>,
    pub(super) states: Box<[AtomicU32]>,
    /// The server sleeps on it; a thread that waits writes to it.
    wake: File,
    served: AtomicBool,
}

impl Table {
    /// A table of parts in the order of their addresses, all empty.
    pub(super) fn new(parts: Vec<(usize, usize, Box<str>)>) -> Result<Self> {
        // SAFETY: takes two numbers and returns a descriptor.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if fd < 0 {
            let cause = std::io::Error::last_os_error();
            return Err(Error::new(Code::HostAlloc, format!("the system refused an eventfd: {cause}."))
                .errno(cause.raw_os_error().unwrap_or(0))
                .action("Raise the limit on open files (ulimit -n)."));
        }
        // SAFETY: just made, and without another owner.
        let wake = unsafe { File::from_raw_fd(fd) };
        let states = parts.iter().map(|_| AtomicU32::new(EMPTY)).collect();
        Ok(Self { parts: parts.into_boxed_slice(), states, wake, served: AtomicBool::new(false) })
    }

    pub(super) fn state(&self, part: usize) -> u32 {
        self.states[part].load(Ordering::Acquire)
    }

    /// Changes a part's state, and wakes the threads that wait for the part.
    pub(super) fn set(&self, part: usize, state: u32) {
        self.states[part].store(state, Ordering::Release);
        futex_wake(&self.states[part]);
    }

    /// Lets threads wait: a server answers from now on.
    pub(super) fn serve(&self) {
        self.served.store(true, Ordering::SeqCst);
    }

    /// Wakes the server, which then ends; from now on no thread begins to wait.
    pub(super) fn stop(&self) {
        self.served.store(false, Ordering::SeqCst);
        self.ring();
    }

    pub(super) fn served(&self) -> bool {
        self.served.load(Ordering::SeqCst)
    }

    /// Waits until a thread wants a part, or [`Self::stop`] was called.
    pub(super) fn wait(&self) {
        let mut count = [0; 8];
        // If a signal interrupts this, the caller looks for a wanted part and calls again.
        let _ = (&self.wake).read(&mut count);
    }

    pub(super) fn ring(&self) {
        let one = 1u64;
        // SAFETY: eight bytes of a local; the descriptor lives as long as the table.
        unsafe { libc::write(self.wake.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    /// A part that a thread waits for.
    pub(super) fn wanted(&self) -> Option<usize> {
        self.states.iter().position(|state| state.load(Ordering::Acquire) == WANTED)
    }

    pub(super) fn part_at(&self, address: usize) -> Option<usize> {
        let after = self.parts.partition_point(|(start, ..)| *start <= address);
        let part = after.checked_sub(1)?;
        (address < self.parts[part].0 + self.parts[part].1).then_some(part)
    }
}

/// Waits a second at most, so that an end of the server is seen.
pub(super) fn futex_wait(word: &AtomicU32, value: u32) {
    let second = libc::timespec { tv_sec: 1, tv_nsec: 0 };
    // SAFETY: the word and the time live through the call.
    unsafe {
        let op = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
        libc::syscall(libc::SYS_futex, word.as_ptr(), op, value, &raw const second, ptr::null::<u32>(), 0);
    }
}

fn futex_wake(word: &AtomicU32) {
    // SAFETY: the word lives through the call.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, c_int::MAX) };
}
