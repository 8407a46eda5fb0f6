//! Address ranges that a forked child gets no copy of.
//!
//! Page-locked memory is copied at once by a fork, all of it; other memory is copied page by page as the parent writes, as long
//! as the child lives. So the runtime's ranges are taken out of forks. In the child the same addresses are reserved without
//! access, before anything else runs there: nothing else can be mapped at an address that a tensor of the child still has.
//!
//! K1: the list is read in a forked child and in a signal handler, so it has no lock, and its nodes are never freed.
#![expect(unsafe_code, reason = "maps memory in a forked child, and advises the kernel about mappings")]

use std::{
    ptr,
    sync::{
        Once,
        atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering},
    },
};

use super::{fault_table::Table, page_size};

/// One place of the list.
pub(super) struct Node {
    taken: AtomicBool,
    /// 0 while there is no range.
    start: AtomicUsize,
    len: AtomicUsize,
    /// The process that mapped it.
    pid: AtomicU32,
    /// The parts of the range, if its pages are brought when they are touched.
    pub(super) table: AtomicPtr<Table>,
    next: AtomicPtr<Self>,
}

static FIRST: AtomicPtr<Node> = AtomicPtr::new(ptr::null_mut());
/// Ranges that the child of the fork under way does get a copy of, sorted.
static KEPT: AtomicPtr<Vec<(usize, usize)>> = AtomicPtr::new(ptr::null_mut());
/// Forks under way.
static FORKS: AtomicUsize = AtomicUsize::new(0);

/// A range in the list, as long as this lives.
pub(crate) struct NotForked(&'static Node);

impl NotForked {
    /// Takes `len` bytes from `start` on, whole pages mapped by this process, out of its forks.
    pub(crate) fn new(start: *mut u8, len: usize) -> Self {
        Self::with(start, len, ptr::null_mut())
    }

    pub(super) fn with(start: *mut u8, len: usize, table: *mut Table) -> Self {
        watch_forks();
        let node = free_node();
        node.len.store(len, Ordering::Relaxed);
        node.pid.store(std::process::id(), Ordering::Relaxed);
        node.table.store(table, Ordering::SeqCst);
        node.start.store(start as usize, Ordering::Release);
        advise(start as usize, len, libc::MADV_DONTFORK);
        Self(node)
    }

    /// True in the process that mapped the range: elsewhere it must not be touched, nor unmapped.
    pub(crate) fn is_ours(&self) -> bool {
        self.0.pid.load(Ordering::Relaxed) == std::process::id()
    }

    /// Lets forks copy it from now on. A child still leaves it to the process that mapped it.
    pub(super) fn let_fork(&self) {
        advise(self.0.start.load(Ordering::Relaxed), self.0.len.load(Ordering::Relaxed), libc::MADV_DOFORK);
    }

    /// Says again that the range is not copied, where some of it was mapped anew.
    pub(super) fn renew(start: *mut u8, len: usize) {
        advise(start as usize, len, libc::MADV_DONTFORK);
    }

    pub(super) fn table(&self) -> &AtomicPtr<Table> {
        &self.0.table
    }
}

impl Drop for NotForked {
    fn drop(&mut self) {
        if self.is_ours() {
            self.0.start.store(0, Ordering::SeqCst);
            self.0.table.store(ptr::null_mut(), Ordering::SeqCst);
            self.0.taken.store(false, Ordering::Release);
        }
    }
}

fn advise(start: usize, len: usize, advice: libc::c_int) {
    // SAFETY: the advice changes no contents and no access; refused, a fork copies the range as it copies others.
    unsafe { libc::madvise(start as *mut libc::c_void, len, advice) };
}

fn nodes() -> impl Iterator<Item = &'static Node> {
    // SAFETY: nodes are leaked, so a pointer in the list is valid for ever.
    let at = |p: *mut Node| unsafe { p.as_ref() };
    std::iter::successors(at(FIRST.load(Ordering::Acquire)), move |node| at(node.next.load(Ordering::Relaxed)))
}

fn free_node() -> &'static Node {
    let take = |node: &&Node| !node.taken.swap(true, Ordering::Acquire);
    if let Some(node) = nodes().find(take) {
        return node;
    }
    let node: &'static Node = Box::leak(Box::new(Node {
        taken: AtomicBool::new(true),
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        pid: AtomicU32::new(0),
        table: AtomicPtr::new(ptr::null_mut()),
        next: AtomicPtr::new(ptr::null_mut()),
    }));
    let mut first = FIRST.load(Ordering::Acquire);
    loop {
        node.next.store(first, Ordering::Relaxed);
        let new = ptr::from_ref(node).cast_mut();
        match FIRST.compare_exchange(first, new, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return node,
            Err(now) => first = now,
        }
    }
}

/// The range around an address, and whether this process mapped it. Async-signal-safe.
pub(super) fn find(address: usize) -> Option<(&'static Node, bool)> {
    let inside = |node: &&Node| {
        let start = node.start.load(Ordering::Acquire);
        start != 0 && (start..start + node.len.load(Ordering::Relaxed)).contains(&address)
    };
    nodes().find(inside).map(|node| (node, node.pid.load(Ordering::Relaxed) == std::process::id()))
}

/// Makes forks that begin from now on copy these ranges (address, bytes) too: tensors look at them that a child may go on using.
/// [`forked`] ends it. The caller keeps two threads from calling these two at once.
pub fn keep(ranges: &[(usize, usize)]) {
    let page = page_size();
    FORKS.fetch_add(1, Ordering::Relaxed);
    let before = KEPT.load(Ordering::Acquire);
    // SAFETY: made below and freed by `forked` only, which the caller keeps from running now.
    let mut all: Vec<(usize, usize)> = unsafe { before.as_ref() }.cloned().unwrap_or_default();
    let whole = |&(at, len): &(usize, usize)| (at / page * page, (at + len).next_multiple_of(page));
    all.extend(ranges.iter().filter(|(_, len)| *len > 0).map(whole));
    all.sort_unstable();
    for &(from, to) in &all {
        advise(from, to - from, libc::MADV_DOFORK);
    }
    KEPT.store(Box::into_raw(Box::new(all)), Ordering::Release);
    free(before);
}

/// The fork is over, in the parent.
pub fn forked() {
    if FORKS.load(Ordering::Relaxed) == 0 || FORKS.fetch_sub(1, Ordering::Relaxed) > 1 {
        return;
    }
    let kept = KEPT.swap(ptr::null_mut(), Ordering::AcqRel);
    // SAFETY: as in `keep`.
    for &(from, to) in unsafe { kept.as_ref() }.into_iter().flatten() {
        advise(from, to - from, libc::MADV_DONTFORK);
    }
    free(kept);
}

fn free(kept: *mut Vec<(usize, usize)>) {
    if !kept.is_null() {
        // SAFETY: made by `Box::into_raw` in `keep`, and no longer in `KEPT`.
        drop(unsafe { Box::from_raw(kept) });
    }
}

fn watch_forks() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the handler is a function of this library, which is never unloaded; it makes system calls only.
        unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
    });
}

/// Runs in a forked child before anything else: system calls and atomics only.
extern "C" fn in_child() {
    let kept = KEPT.swap(ptr::null_mut(), Ordering::AcqRel);
    FORKS.store(0, Ordering::Relaxed);
    // SAFETY: the parent's list, copied by the fork as it was; in the child it is never freed.
    let kept: &[(usize, usize)] = unsafe { kept.as_ref() }.map_or(&[], Vec::as_slice);
    for node in nodes() {
        let start = node.start.load(Ordering::Acquire);
        if start == 0 {
            continue;
        }
        let end = start + node.len.load(Ordering::Relaxed);
        let mut at = start;
        for &(from, to) in kept.iter().filter(|&&(from, to)| from < end && to > start) {
            reserve(at, from);
            at = at.max(to);
        }
        reserve(at, end);
    }
}

/// Reserves addresses where nothing is mapped.
fn reserve(from: usize, to: usize) {
    if from >= to {
        return;
    }
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: refused where anything is mapped; no memory is replaced.
    unsafe { libc::mmap(from as *mut libc::c_void, to - from, libc::PROT_NONE, flags, -1, 0) };
}
