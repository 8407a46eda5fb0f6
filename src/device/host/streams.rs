//! The copy streams of the host device: one worker thread each, fed by a bounded queue.
//!
//! S1: the operations of a stream run in the order in which they were enqueued.
//! S2: a worker waits only for gates recorded before the wait was enqueued, so a full queue always moves again.
//! S3: a panic in a worker fails both streams for good: queues are emptied, every waiter wakes, every later call says so.
#![expect(unsafe_code, reason = "copies between addresses that the caller vouched for")]

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

use crate::{
    device::{Gate, Mark, Role, host::marks::Marks, unrecorded},
    error::{Code, Error, Result},
    memory::copy_past_caches,
    optim::{Hyper, Span, adamw},
};

/// Operations one stream holds before the caller has to wait for room.
const CAPACITY: usize = 4096;
/// Bytes copied between two looks at a cap.
const SLICE: usize = 16 << 20;
/// The same for a stream with a cap, so that it flows evenly.
const CAPPED_SLICE: usize = 256 << 10;

/// What a worker does.
#[derive(Clone, Copy, Debug)]
pub(super) enum Op {
    /// Copies `len` bytes.
    Copy { dst: u64, src: u64, len: usize },
    /// Sets `len` bytes.
    Fill { dst: u64, byte: u8, len: usize },
    /// Updates a span.
    AdamW(Span, Hyper),
    /// Opens the gate of this number.
    Record(u64),
    /// Notes the time.
    Mark(Mark),
    /// Holds the stream until the gate is open.
    Wait(Gate),
    /// Fails as a bug would.
    #[cfg(test)]
    Panic,
}

struct Queue {
    ops: VecDeque<Op>,
    /// An operation has been taken and is not finished.
    running: bool,
    closing: bool,
}

/// One stream: what is enqueued, and how far it is.
struct CopyStream {
    name: &'static str,
    bytes_per_second: Option<f64>,
    queue: Mutex<Queue>,
    /// Notified when there is an operation to run, or when the streams close.
    work: Condvar,
    /// Notified when an operation has finished.
    room: Condvar,
    /// Number of the last gate enqueued; written under `queue`.
    recorded: AtomicU64,
    /// Number of the last gate that opened.
    done: AtomicU64,
}

impl CopyStream {
    fn new(name: &'static str, bytes_per_second: Option<f64>) -> Self {
        let queue = Queue { ops: VecDeque::with_capacity(CAPACITY), running: false, closing: false };
        Self {
            name,
            bytes_per_second,
            queue: Mutex::new(queue),
            work: Condvar::new(),
            room: Condvar::new(),
            recorded: AtomicU64::new(0),
            done: AtomicU64::new(0),
        }
    }
}

// SAFETY: the caller that enqueues an operation vouches for its addresses, on any thread.
unsafe impl Send for Op {}

/// Both copy streams and the threads' meeting point.
pub(super) struct Streams {
    up: CopyStream,
    down: CopyStream,
    pub(super) marks: Marks,
    failure: OnceLock<Error>,
    /// A worker that opens a gate locks this for a moment before it notifies, so that no waiter misses the gate.
    progress: Mutex<()>,
    opened: Condvar,
}

impl Streams {
    pub(super) fn new(up_cap: Option<f64>, down_cap: Option<f64>) -> Arc<Self> {
        Arc::new(Self {
            up: CopyStream::new("funicular-up", up_cap),
            down: CopyStream::new("funicular-down", down_cap),
            marks: Marks::new(),
            failure: OnceLock::new(),
            progress: Mutex::new(()),
            opened: Condvar::new(),
        })
    }

    /// Starts the worker of `role`; it ends when the streams are closed and empty, or failed.
    pub(super) fn start(self: &Arc<Self>, role: Role) -> Result<Option<thread::JoinHandle<()>>> {
        let Some(copy_stream) = self.copy_stream(role) else { return Ok(None) };
        let name = copy_stream.name;
        let streams = Arc::clone(self);
        let worker = move || {
            if catch_unwind(AssertUnwindSafe(|| streams.work(role))).is_err() {
                streams.fail(name);
            }
        };
        let started = crate::os_error::start_thread(name, worker);
        started.map(Some).map_err(|e| crate::os_error::no_thread(name, &e, ""))
    }

    fn copy_stream(&self, role: Role) -> Option<&CopyStream> {
        match role {
            Role::Up => Some(&self.up),
            Role::Down => Some(&self.down),
            Role::Compute => None,
        }
    }

    /// The failure of a worker, if there was one.
    pub(super) fn check(&self) -> Result<()> {
        self.failure.get().map_or(Ok(()), |e| Err(e.clone()))
    }

    /// Enqueues. Waits only when the queue is full, which S2 ends.
    pub(super) fn push(&self, role: Role, op: Op) -> Result<()> {
        self.copy_stream(role).map_or(Ok(()), |copy_stream| self.push_with(copy_stream, |_| op))
    }

    /// Enqueues the next gate of a stream. Compute is the calling thread: what it did before is done.
    pub(super) fn record(&self, role: Role) -> Result<Gate> {
        let Some(copy_stream) = self.copy_stream(role) else {
            return self.check().map(|()| Gate::OPEN);
        };
        let mut seq = 0;
        self.push_with(copy_stream, |copy_stream| {
            seq = copy_stream.recorded.load(Ordering::Relaxed) + 1;
            copy_stream.recorded.store(seq, Ordering::Release);
            Op::Record(seq)
        })?;
        Ok(Gate { role, seq })
    }

    /// Makes a mark on a stream. A mark on Compute, or on an idle stream, is passed at once; the worker of a busy stream passes
    /// it in turn, without being woken.
    pub(super) fn mark(&self, role: Role) -> Result<Mark> {
        self.check()?;
        let mark = self.marks.make();
        if let Some(copy_stream) = self.copy_stream(role) {
            let mut queue = copy_stream.queue.lock();
            while queue.ops.len() >= CAPACITY {
                copy_stream.room.wait(&mut queue);
                self.check()?;
            }
            if queue.running || !queue.ops.is_empty() {
                queue.ops.push_back(Op::Mark(mark));
                return Ok(mark);
            }
        }
        self.marks.pass(mark);
        Ok(mark)
    }

    /// Makes `op` under the lock of the queue, so that numbers and places agree.
    fn push_with(&self, copy_stream: &CopyStream, op: impl FnOnce(&CopyStream) -> Op) -> Result<()> {
        let mut queue = copy_stream.queue.lock();
        loop {
            self.check()?;
            if queue.closing {
                return Err(Error::new(
                    Code::Closed,
                    format!("{} was used after its device was closed.", copy_stream.name),
                ));
            }
            if queue.ops.len() < CAPACITY {
                break;
            }
            copy_stream.room.wait(&mut queue);
        }
        queue.ops.push_back(op(copy_stream));
        drop(queue);
        copy_stream.work.notify_one();
        Ok(())
    }

    /// True if the gate has passed.
    pub(super) fn passed(&self, gate: Gate) -> Result<bool> {
        self.check()?;
        let Some(copy_stream) = self.copy_stream(gate.role) else { return Ok(true) };
        if copy_stream.done.load(Ordering::Acquire) >= gate.seq {
            return Ok(true);
        }
        let recorded = copy_stream.recorded.load(Ordering::Acquire);
        if gate.seq > recorded { Err(unrecorded(gate, recorded)) } else { Ok(false) }
    }

    /// Blocks until the gate has passed; false when `deadline` came first.
    pub(super) fn block(&self, gate: Gate, deadline: Option<Instant>) -> Result<bool> {
        if self.passed(gate)? {
            return Ok(true);
        }
        let mut progress = self.progress.lock();
        loop {
            if self.passed(gate)? {
                return Ok(true);
            }
            match deadline {
                None => self.opened.wait(&mut progress),
                Some(at) if Instant::now() >= at => return Ok(false),
                Some(at) => drop(self.opened.wait_until(&mut progress, at)),
            }
        }
    }

    /// Waits until both streams are empty and at rest.
    pub(super) fn drain(&self) {
        for copy_stream in [&self.up, &self.down] {
            let mut queue = copy_stream.queue.lock();
            while queue.running || !queue.ops.is_empty() {
                copy_stream.room.wait(&mut queue);
            }
        }
    }

    /// Lets the workers end once their queues are empty.
    pub(super) fn close(&self) {
        for copy_stream in [&self.up, &self.down] {
            copy_stream.queue.lock().closing = true;
            copy_stream.work.notify_all();
            copy_stream.room.notify_all();
        }
    }

    /// S3. Called by a worker as it ends.
    fn fail(&self, name: &str) {
        let error = Error::new(Code::Panicked, format!("the thread {name} panicked; its message is above."))
            .action("Please report it with that message; training has to be restarted from its last checkpoint.");
        // Only the first failure is kept.
        let _ = self.failure.set(error);
        for copy_stream in [&self.up, &self.down] {
            let mut queue = copy_stream.queue.lock();
            queue.ops.clear();
            queue.running &= copy_stream.name != name;
            drop(queue);
            copy_stream.work.notify_all();
            copy_stream.room.notify_all();
        }
        drop(self.progress.lock());
        self.opened.notify_all();
    }

    fn work(&self, role: Role) {
        let Some(copy_stream) = self.copy_stream(role) else { return };
        let mut pace = Pace { bytes_per_second: copy_stream.bytes_per_second, due: Instant::now() };
        while let Some(op) = self.next(copy_stream) {
            match op {
                // SAFETY: the caller that enqueued it vouched for both ranges until a later gate has passed.
                Op::Copy { dst, src, len } => unsafe { copy(dst, src, len, &mut pace) },
                // SAFETY: as above.
                Op::Fill { dst, byte, len } => unsafe { fill(dst, byte, len) },
                // SAFETY: as above. A type without a kernel was refused before it was enqueued.
                Op::AdamW(span, hyper) => drop(unsafe { adamw(&span, &hyper) }),
                Op::Record(seq) => {
                    copy_stream.done.store(seq, Ordering::Release);
                    drop(self.progress.lock());
                    self.opened.notify_all();
                }
                Op::Mark(mark) => self.marks.pass(mark),
                // An error here is the failure of the other worker: `next` ends this one.
                Op::Wait(gate) => drop(self.block(gate, None)),
                #[cfg(test)]
                Op::Panic => panic!("asked to"),
            }
        }
    }

    /// Ends the operation taken last and takes the next one; none at the end.
    fn next(&self, copy_stream: &CopyStream) -> Option<Op> {
        let mut queue = copy_stream.queue.lock();
        queue.running = false;
        copy_stream.room.notify_all();
        loop {
            if self.failure.get().is_some() {
                return None;
            }
            if let Some(op) = queue.ops.pop_front() {
                queue.running = true;
                return Some(op);
            }
            if queue.closing {
                return None;
            }
            copy_stream.work.wait(&mut queue);
        }
    }
}

/// Slows a stream down to its cap.
struct Pace {
    bytes_per_second: Option<f64>,
    due: Instant,
}

impl Pace {
    fn slice(&self) -> usize {
        if self.bytes_per_second.is_some() { CAPPED_SLICE } else { SLICE }
    }

    fn spend(&mut self, bytes: usize) {
        let Some(rate) = self.bytes_per_second else { return };
        #[expect(clippy::cast_precision_loss, reason = "a slice is far below 2^53")]
        let seconds = bytes as f64 / rate;
        self.due = self.due.max(Instant::now()) + Duration::from_secs_f64(seconds);
        thread::sleep(self.due.saturating_duration_since(Instant::now()));
    }
}

/// Copies slice by slice at the given pace.
///
/// # Safety
/// Both ranges are valid, do not overlap, and are free of conflicting access meanwhile.
unsafe fn copy(dst: u64, src: u64, len: usize, pace: &mut Pace) {
    let dst = std::ptr::with_exposed_provenance_mut::<u8>(dst as usize);
    let src = std::ptr::with_exposed_provenance::<u8>(src as usize);
    for at in (0..len).step_by(pace.slice()) {
        let bytes = pace.slice().min(len - at);
        // SAFETY: `at + bytes` <= `len`, and the caller vouches for both ranges.
        unsafe { copy_past_caches(dst.add(at), src.add(at), bytes) };
        pace.spend(bytes);
    }
}

/// Copies now, on the calling thread.
///
/// # Safety
/// As for [`copy`].
pub(super) unsafe fn copy_here(dst: u64, src: u64, len: usize) {
    let mut pace = Pace { bytes_per_second: None, due: Instant::now() };
    // SAFETY: the caller's promise is the same.
    unsafe { copy(dst, src, len, &mut pace) };
}

/// Sets every byte of a range, on the calling thread.
///
/// # Safety
/// The range is valid and free of other access meanwhile.
pub(super) unsafe fn fill(dst: u64, byte: u8, len: usize) {
    // SAFETY: the caller vouches for the range.
    unsafe { std::ptr::with_exposed_provenance_mut::<u8>(dst as usize).write_bytes(byte, len) };
}
