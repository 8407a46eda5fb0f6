//! Memory whose pages are brought when a thread touches them: a handler of SIGSEGV asks a thread of the runtime, the
//! server.
//!
//! H1: the handler uses system calls and atomics only, no lock and no heap: it may run in any thread, with any lock held.
//! H2: a fault outside of this module's ranges goes to the handler that was there before, or ends the process as without
//! this module.
//! H3: a thread waits in the handler only while a server runs that will answer; the end of the server ends the wait.
#![expect(unsafe_code, reason = "handles a signal, and waits on a futex")]

use std::{
    ffi::{c_int, c_void},
    mem::MaybeUninit,
    ptr,
    sync::atomic::{AtomicPtr, AtomicUsize, Ordering},
};

use super::{
    fault_table::{EMPTY, FILLED, REFUSED, Table, WANTED, futex_wait},
    fork::{self, Node},
};
use crate::error::{Code, Error, Result};

/// How many threads are in the handler.
static INSIDE: AtomicUsize = AtomicUsize::new(0);
/// What handled the signal before; null before the first installation.
static BEFORE: AtomicPtr<libc::sigaction> = AtomicPtr::new(ptr::null_mut());
/// What handled it before the first installation: later ones may lead back here.
static FIRST: AtomicPtr<libc::sigaction> = AtomicPtr::new(ptr::null_mut());
/// The address that was last left to the handler before, and how often in a row.
static LEFT: [AtomicUsize; 2] = [AtomicUsize::new(0), AtomicUsize::new(0)];
/// A handler that returns this often without a change has changed nothing.
const RETURNS: usize = 1000;

/// Frees a table that nothing leads to any more, unless a handler may be looking at it.
pub(super) fn free(table: *mut Table) {
    if INSIDE.load(Ordering::SeqCst) == 0 && !table.is_null() {
        // SAFETY: made by `Box::into_raw`; the list does not have it any more, and no handler began before that was so.
        drop(unsafe { Box::from_raw(table) });
    }
}

/// Makes this module's handler the first one, also where another handler was installed since.
///
/// # Errors
/// `FN-E204` when the system refuses.
pub(crate) fn install() -> Result<()> {
    let refused = || {
        let cause = std::io::Error::last_os_error();
        Error::new(Code::HostAlloc, format!("the system refused a handler of SIGSEGV: {cause}."))
    };
    let mut now = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: asks only; there is room for the answer.
    if unsafe { libc::sigaction(libc::SIGSEGV, ptr::null(), now.as_mut_ptr()) } != 0 {
        return Err(refused());
    }
    // SAFETY: filled by the call, and zeroed before.
    let now = unsafe { now.assume_init() };
    if now.sa_sigaction == on_fault as *const () as usize {
        return Ok(());
    }
    // Leaked: `leave` may read it at any time, in any thread.
    let before = Box::into_raw(Box::new(now));
    BEFORE.store(before, Ordering::SeqCst);
    // Fails if an earlier installation has set it.
    let _ = FIRST.compare_exchange(ptr::null_mut(), before, Ordering::SeqCst, Ordering::SeqCst);
    // SAFETY: all its fields are integers or a set that is empty when zeroed.
    let mut ours: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    ours.sa_sigaction = on_fault as *const () as usize;
    ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    // SAFETY: the handler is a function of this library, which is never unloaded, and keeps to H1.
    if unsafe { libc::sigaction(libc::SIGSEGV, &raw const ours, ptr::null_mut()) } == 0 {
        Ok(())
    } else {
        Err(refused())
    }
}

extern "C" fn on_fault(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: errno is the thread's own.
    let errno = unsafe { *libc::__errno_location() };
    INSIDE.fetch_add(1, Ordering::SeqCst);
    // SAFETY: the system passes what it knows of the signal. Sent by a process it has no address.
    let address = unsafe { if (*info).si_code > 0 { (*info).si_addr() as usize } else { 0 } };
    let brought = address != 0 && fork::find(address).is_some_and(|(node, ours)| bring(node, ours, address));
    INSIDE.fetch_sub(1, Ordering::SeqCst);
    if !brought {
        // SAFETY: passes on what the system passed.
        unsafe { leave(signal, info, context, address) };
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Waits until what lies at an address is there; false if it will not be.
fn bring(node: &Node, ours: bool, address: usize) -> bool {
    // SAFETY: a table is freed only when no handler runs that may have found it.
    let table = unsafe { node.table.load(Ordering::SeqCst).as_ref() };
    let part = table.and_then(|table| Some((table, table.part_at(address)?)));
    let name = part.map_or("memory of an offloaded model", |(table, part)| &*table.parts[part].2);
    if !ours {
        say(&[
            "FN-E103 a forked child touched '",
            name,
            "' past torch's dispatcher. The model was offloaded by its parent, and a child \
             has no copy of it. Use the model there; give the child copies that were made before the fork.\n",
        ]);
        return false;
    }
    let Some((table, part)) = part else { return false };
    let state = &table.states[part];
    loop {
        match state.load(Ordering::Acquire) {
            FILLED => return true,
            REFUSED => return false,
            _ if !table.served() => {
                say(&[
                    "FN-E104 '",
                    name,
                    "' was touched past torch's dispatcher, and its model is no longer offloaded: its weights are \
                     gone. Keep the model, or funicular.unwrap(model) first.\n",
                ]);
                return false;
            }
            now => {
                if now == EMPTY && state.compare_exchange(EMPTY, WANTED, Ordering::SeqCst, Ordering::SeqCst).is_err() {
                    continue;
                }
                table.ring();
                futex_wait(state, WANTED);
            }
        }
    }
}

/// Does what the process would do without this module.
///
/// # Safety
/// As for a handler of the signal.
unsafe fn leave(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void, address: usize) {
    let last = LEFT[0].swap(address, Ordering::Relaxed);
    let again = match address {
        _ if last == address => LEFT[1].fetch_add(1, Ordering::Relaxed),
        0 => 1, // sent by the handler that has just looked at a fault
        _ => 0,
    };
    if again == 0 {
        LEFT[1].store(1, Ordering::Relaxed);
    }
    let whose = if again == 0 { &BEFORE } else { &FIRST };
    // SAFETY: leaked by `install`.
    let before = unsafe { whose.load(Ordering::SeqCst).as_ref() };
    match before {
        Some(before) if ![libc::SIG_DFL, libc::SIG_IGN].contains(&before.sa_sigaction) && again < RETURNS => {
            // SAFETY: a handler that was installed with these flags, called as the system would call it.
            unsafe {
                if before.sa_flags & libc::SA_SIGINFO != 0 {
                    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) =
                        std::mem::transmute(before.sa_sigaction);
                    handler(signal, info, context);
                } else {
                    let handler: extern "C" fn(c_int) = std::mem::transmute(before.sa_sigaction);
                    handler(signal);
                }
            }
        }
        _ => {
            // SAFETY: zeroed, it is the default action. The instruction runs again, and ends the process; a signal that was sent is
            // sent again, and taken when this handler returns.
            unsafe {
                let default: libc::sigaction = MaybeUninit::zeroed().assume_init();
                libc::sigaction(signal, &raw const default, ptr::null_mut());
                if (*info).si_code <= 0 {
                    libc::raise(signal);
                }
            }
        }
    }
}

/// Writes to standard error without buffer, lock or heap.
fn say(pieces: &[&str]) {
    for piece in pieces {
        // SAFETY: the bytes of a string; what is not written is lost.
        unsafe { libc::write(libc::STDERR_FILENO, piece.as_ptr().cast(), piece.len()) };
    }
}
