//! In steady state the engines allocate nothing. Alone in its process: it counts every allocation.
#![expect(unsafe_code, reason = "an allocator that counts")]
#![expect(clippy::unwrap_used, clippy::print_stderr, reason = "tests")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use crossbeam::channel::bounded;
use funicular::{
    io::{Direction, EngineChoice, EngineOptions, FileId, IoFile, IoPart, IoRequest, open_engine},
    memory::SlotPool,
    quantities::ByteCount,
};

struct Counting;
static COUNT: AtomicUsize = AtomicUsize::new(0);

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn steady_state_allocates_nothing() {
    for choice in [EngineChoice::IoUring, EngineChoice::Threads] {
        let file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        file.set_len(1 << 20).unwrap();
        let pool = SlotPool::new(1, ByteCount(1 << 20), "a test").unwrap();
        let (sender, done) = bounded(8);
        let options = EngineOptions { choice, block: 64 << 10, ..EngineOptions::default() };
        let files = vec![IoFile::new(file, "file", false)];
        let sink = move |completion| drop(sender.send(completion));
        let opened = match open_engine(&options, files, &[Arc::clone(pool.region())], sink) {
            Ok(opened) => opened,
            Err(e) => {
                eprintln!("skipped: {e}");
                continue;
            }
        };
        let mut held = Some((pool.lease().unwrap(), Vec::with_capacity(4)));
        let mut round = |n: usize| {
            let (lease, mut parts) = held.take().unwrap();
            parts.clear();
            let direction = if n.is_multiple_of(2) { Direction::Write } else { Direction::Read };
            parts.push(IoPart { direction, file: FileId(0), offset: 0, start: 0, len: 1 << 20 });
            opened.engine.submit(IoRequest { ticket: 0, lease, parts }).unwrap();
            let done = done.recv().unwrap();
            done.result.unwrap();
            held = Some((done.lease, done.parts));
        };
        (0..20).for_each(&mut round);
        let mut allocations = || {
            let before = COUNT.load(Ordering::Relaxed);
            (0..200).for_each(&mut round);
            COUNT.load(Ordering::Relaxed) - before
        };
        // A thread that waits for the first time makes what it waits with, once. On a busy machine that may be late: threads that
        // found work at once did not wait before. What a request allocates it allocates in every one of these runs.
        let counts: Vec<usize> = (0..6).map(|_| allocations()).collect();
        let threads = usize::try_from(options.threads).unwrap() + 2;
        assert!(counts.contains(&0), "{choice:?}: something in each 200 requests: {counts:?}");
        assert!(counts.iter().sum::<usize>() <= 2 * threads, "{choice:?}: more than first waits: {counts:?}");
    }
}
