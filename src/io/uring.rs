//! The engine `io_uring`: one thread that owns the ring and sleeps in it.
//!
//! U1: at most `queue_depth` blocks and one read of the wake-up counter are in the ring, so that it never overflows.
//! U2: all memory that the kernel may write to (slots, the counter) outlives the ring, or is leaked if the ring fails.
#![expect(unsafe_code, reason = "hands addresses owned by leases to the kernel")]

use std::{
    fs::File,
    io::Write,
    os::fd::{AsRawFd, FromRawFd},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use io_uring::{IoUring, opcode, squeue, types};
use parking_lot::Mutex;

use super::{
    Direction, EngineKind, EngineOptions, Fault, Faults, IoEngine, IoFile, IoRequest, Rejected, Sink,
    requests::{Next, Requests, check, closed, deliver},
    transfer::{Block, Step, Transfer},
};
use crate::{
    error::{Code, Error},
    machine::lockable_bytes,
    memory::HostRegion,
    quantities::ByteCount,
};

/// The kernel's limit for one registered buffer.
const BUFFER_LIMIT: usize = 1 << 30;
/// The kernel's limit for their number.
const BUFFER_COUNT_LIMIT: usize = 16_384;
/// Marks the completion of the wake-up read.
const WAKE: u64 = u64::MAX;
/// How often entering the ring may fail in a row before the engine gives up.
const ENTER_RETRIES: u32 = 1000;

struct Shared {
    requests: Mutex<Requests>,
    files: Vec<IoFile>,
    faults: Arc<Faults>,
    sink: Sink,
    /// An eventfd; adding to it wakes the thread up.
    wake: File,
}

impl Shared {
    fn wake(&self) {
        // Fails only when the counter is about to overflow, and then a wake-up is pending anyway.
        let _ = (&self.wake).write_all(&1u64.to_ne_bytes());
    }
}

/// The engine. Dropping it waits for the thread, which waits for what is in the ring.
pub(super) struct Uring {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// Why the ring cannot be used: the system call and its error number.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) call: &'static str,
    pub(super) errno: i32,
}

impl Refused {
    fn new(call: &'static str, e: &std::io::Error) -> Self {
        Self { call, errno: e.raw_os_error().unwrap_or(libc::EIO) }
    }
}

impl Uring {
    /// Starts the thread, makes the ring on it and tries it. Returns the files if that fails.
    pub(super) fn start(
        options: &EngineOptions,
        files: Vec<IoFile>,
        regions: &[Arc<HostRegion>],
        sink: Sink,
    ) -> std::result::Result<(Self, Vec<String>), (Refused, Vec<IoFile>)> {
        // SAFETY: no pointers involved.
        let wake = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if wake < 0 {
            return Err((Refused::new("eventfd", &std::io::Error::last_os_error()), files));
        }
        // SAFETY: just made, and without another owner.
        let wake = unsafe { File::from_raw_fd(wake) };
        let faults = Arc::clone(&options.faults);
        let shared = Arc::new(Shared { requests: Mutex::new(Requests::new(options.block)), files, faults, sink, wake });
        let (depth, regions, theirs) = (options.queue_depth, regions.to_vec(), Arc::clone(&shared));
        let (ready, is_ready) = crossbeam::channel::bounded(1);
        // The ring is made on its thread: a ring with one issuer belongs to the thread that made it.
        let body = move || match Ring::new(depth, theirs, regions) {
            Ok((mut ring, notes)) => {
                let _ = ready.send(Ok(notes));
                drop(ready);
                ring.run();
            }
            Err(refused) => drop(ready.send(Err(refused))),
        };
        let started = crate::os_error::start_thread("funicular-io", body);
        let (refused, thread) = match started {
            Err(e) => (Refused::new("starting the thread", &e), None),
            Ok(thread) => match is_ready.recv() {
                Ok(Ok(notes)) => return Ok((Self { shared, thread: Some(thread) }, notes)),
                Ok(Err(refused)) => (refused, Some(thread)),
                Err(_) => (Refused { call: "starting the thread", errno: libc::ECHILD }, Some(thread)),
            },
        };
        if let Some(thread) = thread {
            let _ = thread.join();
        }
        // The thread has ended, so this is the last owner.
        let files = Arc::into_inner(shared).map(|shared| shared.files).unwrap_or_default();
        Err((refused, files))
    }
}

impl IoEngine for Uring {
    fn submit(&self, request: IoRequest) -> std::result::Result<(), Rejected> {
        if let Err(error) = check(&request, &self.shared.files) {
            return Err(Rejected { request, error });
        }
        let admitted = self.shared.requests.lock().admit(request);
        match admitted {
            // If other requests waited before it, a wake-up is pending or the queue is full.
            Ok(first) => {
                if first {
                    self.shared.wake();
                }
                Ok(())
            }
            Err((request, error)) => Err(Rejected { request, error }),
        }
    }

    fn kind(&self) -> EngineKind {
        EngineKind::IoUring
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        self.shared.requests.lock().close(closed());
        self.shared.wake();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been dealt with by `Ring`'s drop.
            let _ = thread.join();
        }
    }
}

/// A block in the ring.
struct Operation {
    request: u32,
    transfer: Transfer,
    fault: Option<Fault>,
    /// An injected delay that comes before the transfer.
    delay: Option<types::Timespec>,
}

/// Registered buffers of one region: the address range, and the index of its first buffer.
struct Registered {
    start: usize,
    len: usize,
    first: usize,
}

struct Ring {
    // Dropped before everything the kernel may still look at.
    ring: IoUring,
    operations: Vec<Option<Operation>>,
    free: Vec<usize>,
    registered: Vec<Registered>,
    counter: Box<u64>,
    wake_armed: bool,
    shared: Arc<Shared>,
    /// Keeps registered memory mapped.
    _regions: Vec<Arc<HostRegion>>,
}

impl Ring {
    fn new(
        depth: u32,
        shared: Arc<Shared>,
        regions: Vec<Arc<HostRegion>>,
    ) -> std::result::Result<(Self, Vec<String>), Refused> {
        let depth = depth.clamp(1, 4096);
        let mut ring = build(depth + 1).map_err(|e| Refused::new("io_uring_setup", &e))?;
        try_out(&mut ring)?;
        let fds: Vec<_> = shared.files.iter().map(IoFile::number).collect();
        if !fds.is_empty() {
            ring.submitter().register_files(&fds).map_err(|e| Refused::new("io_uring_register", &e))?;
        }
        let (registered, notes) = register_buffers(&ring, &regions);
        let this = Self {
            ring,
            operations: (0..depth).map(|_| None).collect(),
            free: (0..depth as usize).rev().collect(),
            registered,
            counter: Box::new(0),
            wake_armed: false,
            shared,
            _regions: regions,
        };
        Ok((this, notes))
    }

    /// Until the engine is closed. Dropping the ring finishes what is in flight then.
    fn run(&mut self) {
        let mut failures = 0;
        while !self.shared.requests.lock().is_closed() {
            self.arm_wake();
            self.begin_blocks();
            match self.enter() {
                Ok(()) => failures = 0,
                Err(e) => {
                    failures += 1;
                    if failures > ENTER_RETRIES {
                        let message = format!("io_uring_enter keeps failing: {e}.");
                        let error = Error::new(Code::IoFailed, message).errno(e.raw_os_error().unwrap_or(libc::EIO));
                        self.shared.requests.lock().close(error.action("Set nvme.engine = \"threads\"."));
                    }
                }
            }
        }
    }

    /// Submits what was pushed, waits for at least one completion and takes all there are.
    fn enter(&mut self) -> std::io::Result<()> {
        let entered = match self.ring.submit_and_wait(1) {
            Err(e) if e.raw_os_error() != Some(libc::EINTR) => {
                // The kernel is short of memory for the moment: take what has completed, then try again.
                std::thread::sleep(Duration::from_millis(1));
                Err(e)
            }
            _ => Ok(()),
        };
        while let Some(entry) = { self.ring.completion().next() } {
            if entry.user_data() == WAKE {
                self.wake_armed = false;
            } else {
                self.ended(entry.user_data() as usize, i64::from(entry.result()));
            }
        }
        entered
    }

    fn in_flight(&self) -> usize {
        self.operations.len() - self.free.len()
    }

    fn arm_wake(&mut self) {
        if self.wake_armed {
            return;
        }
        let fd = types::Fd(self.shared.wake.as_raw_fd());
        let read = opcode::Read::new(fd, (&raw mut *self.counter).cast(), 8).build().user_data(WAKE);
        self.wake_armed = self.push(&read);
    }

    /// True if there was room, as U1 promises.
    fn push(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: buffers are slots whose leases are held by `Shared::requests` until the operation has ended, a
        // counter and timespecs at fixed addresses of `self`, or registered buffers; all outlive the operation.
        unsafe { self.ring.submission().push(entry) }.is_ok()
    }

    fn begin_blocks(&mut self) {
        while let Some(index) = self.free.pop() {
            let next = self.shared.requests.lock().next();
            match next {
                Next::Block(request, block) => {
                    let transfer = Transfer::new(block, self.shared.files[block.file.index()].is_direct());
                    self.operations[index] = Some(Operation { request, transfer, fault: None, delay: None });
                    self.issue(index);
                }
                Next::Complete(completion) => {
                    self.free.push(index);
                    deliver(&self.shared.requests, &self.shared.sink, completion);
                }
                Next::Nothing => {
                    self.free.push(index);
                    return;
                }
            }
        }
    }

    /// Issues what is left of an operation.
    fn issue(&mut self, index: usize) {
        let Some(operation) = self.operations[index].as_mut() else { return };
        let rest = operation.transfer.rest();
        operation.fault = self.shared.faults.next(rest.direction);
        let entry = match operation.fault {
            Some(Fault::Errno(_) | Fault::Lost) => opcode::Nop::new().build(),
            Some(Fault::Short(keep)) => {
                let len = keep.min(rest.len).next_multiple_of(super::ALIGNMENT).min(rest.len);
                self.transfer_entry(&Block { len, ..rest })
            }
            Some(Fault::Delay(time)) => {
                let time = types::Timespec::new().sec(time.as_secs()).nsec(time.subsec_nanos());
                opcode::Timeout::new(operation.delay.insert(time)).build()
            }
            _ => self.transfer_entry(&rest),
        };
        let pushed = self.push(&entry.user_data(index as u64));
        debug_assert!(pushed, "the submission queue holds one entry per operation");
    }

    fn transfer_entry(&self, block: &Block) -> squeue::Entry {
        let Block { direction, file, offset, address, len } = *block;
        let (fd, at, len) = (types::Fixed(file.0), address as *mut u8, len as u32);
        match (direction, self.registered_buffer(block)) {
            (Direction::Read, Some(n)) => opcode::ReadFixed::new(fd, at, len, n).offset(offset).build(),
            (Direction::Read, None) => opcode::Read::new(fd, at, len).offset(offset).build(),
            (Direction::Write, Some(n)) => opcode::WriteFixed::new(fd, at, len, n).offset(offset).build(),
            (Direction::Write, None) => opcode::Write::new(fd, at, len).offset(offset).build(),
        }
    }

    /// The registered buffer that holds the whole block.
    fn registered_buffer(&self, block: &Block) -> Option<u16> {
        let in_region = |r: &&Registered| (r.start..r.start + r.len).contains(&block.address);
        let region = self.registered.iter().find(in_region)?;
        let (from, to) = (block.address - region.start, block.address - region.start + block.len - 1);
        let same = from / BUFFER_LIMIT == to / BUFFER_LIMIT && to < region.len;
        if same { u16::try_from(region.first + from / BUFFER_LIMIT).ok() } else { None }
    }

    /// An operation's entry has come back from the ring with this result.
    fn ended(&mut self, index: usize, result: i64) {
        let Some(operation) = self.operations.get_mut(index).and_then(Option::as_mut) else { return };
        let rest = operation.transfer.rest();
        let result = match operation.fault {
            Some(Fault::Errno(errno)) => -i64::from(errno),
            Some(Fault::Lost) => rest.len as i64,
            Some(Fault::Short(keep)) => result.min(keep as i64),
            Some(Fault::FlipBit) if rest.direction == Direction::Read && result > 0 => {
                // SAFETY: the operation has ended, its lease is still held, and the byte is inside the slot.
                unsafe { *(rest.address as *mut u8) ^= 1 };
                result
            }
            Some(Fault::Delay(_)) if operation.delay.take().is_some() => {
                let entry = self.transfer_entry(&rest).user_data(index as u64);
                let pushed = self.push(&entry);
                debug_assert!(pushed, "the submission queue holds one entry per operation");
                return;
            }
            _ => result,
        };
        let block = *operation.transfer.block();
        let outcome = match operation.transfer.advance(result) {
            Step::Again => return self.issue(index),
            Step::Done => Ok(()),
            Step::Failed(failure) => Err(failure.error(&block, &self.shared.files[block.file.index()])),
        };
        let request = operation.request;
        self.operations[index] = None;
        self.free.push(index);
        let completion = self.shared.requests.lock().finish(request, outcome);
        if let Some(completion) = completion {
            deliver(&self.shared.requests, &self.shared.sink, completion);
        }
    }
}

impl Drop for Ring {
    /// Waits until the kernel has nothing of ours any more. The read of the wake-up counter ends when the engine is
    /// dropped: closing is followed by a wake-up, and the read is not armed again.
    fn drop(&mut self) {
        // Closed already, unless this thread is unwinding.
        self.shared.requests.lock().close(Error::new(Code::Panicked, "the thread of the I/O engine panicked."));
        let mut failures = 0;
        // Begins nothing; hands back the requests of which nothing was begun.
        self.begin_blocks();
        while (self.in_flight() > 0 || self.wake_armed) && failures < ENTER_RETRIES {
            failures = if self.enter().is_ok() { 0 } else { failures + 1 };
            self.begin_blocks();
        }
        if self.in_flight() > 0 {
            // The kernel may still write to slots: their leases are never dropped.
            std::mem::forget(Arc::clone(&self.shared));
        }
        if self.wake_armed {
            std::mem::forget(std::mem::take(&mut self.counter));
        }
        // Here, because the kernel takes a ring apart some time after it was closed, and holds the pages until then.
        if !self.registered.is_empty() {
            let _ = self.ring.submitter().unregister_buffers();
        }
    }
}

fn build(entries: u32) -> std::io::Result<IoUring> {
    // Fewer interruptions where the kernel knows how (6.1); else a plain ring.
    let modern = IoUring::builder().dontfork().setup_single_issuer().setup_defer_taskrun().build(entries);
    match modern {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => IoUring::builder().dontfork().build(entries),
        other => other,
    }
}

/// Writes and reads a page of a file in memory through the ring, since set-up may work where operations do not.
fn try_out(ring: &mut IoUring) -> std::result::Result<(), Refused> {
    // SAFETY: a valid C string.
    let fd = unsafe { libc::memfd_create(c"funicular-probe".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(Refused::new("memfd_create", &std::io::Error::last_os_error()));
    }
    // SAFETY: just made, and without another owner.
    let file = unsafe { File::from_raw_fd(fd) };
    let (mut written, mut read) = ([0x5au8; 512], [0u8; 512]);
    let target = types::Fd(file.as_raw_fd());
    run_one(ring, &opcode::Write::new(target, written.as_mut_ptr(), 512).build(), "io_uring write")?;
    run_one(ring, &opcode::Read::new(target, read.as_mut_ptr(), 512).build(), "io_uring read")?;
    if read == written { Ok(()) } else { Err(Refused { call: "io_uring read", errno: libc::EIO }) }
}

/// Runs one operation of 512 bytes to its end.
fn run_one(ring: &mut IoUring, entry: &squeue::Entry, call: &'static str) -> std::result::Result<(), Refused> {
    // SAFETY: the caller's buffers and file outlive this function, which returns after the operation has ended, or
    // before it was submitted.
    unsafe { ring.submission().push(entry) }.map_err(|_| Refused { call, errno: libc::ENOSPC })?;
    loop {
        if let Err(e) = ring.submit_and_wait(1)
            && e.raw_os_error() != Some(libc::EINTR)
        {
            return Err(Refused::new("io_uring_enter", &e));
        }
        if let Some(done) = ring.completion().next() {
            return match done.result() {
                512 => Ok(()),
                errno if errno < 0 => Err(Refused { call, errno: -errno }),
                _ => Err(Refused { call, errno: libc::EIO }),
            };
        }
    }
}

/// Registers as many whole regions as the system lets us lock, in the order given.
fn register_buffers(ring: &IoUring, regions: &[Arc<HostRegion>]) -> (Vec<Registered>, Vec<String>) {
    let limit = lockable_bytes();
    let wanted: u64 = regions.iter().map(|region| region.len() as u64).sum();
    let (mut registered, mut buffers, mut bytes) = (Vec::new(), Vec::new(), 0u64);
    for region in regions {
        let count = region.len().div_ceil(BUFFER_LIMIT);
        if bytes + region.len() as u64 > limit || buffers.len() + count > BUFFER_COUNT_LIMIT {
            break;
        }
        bytes += region.len() as u64;
        let start = region.as_ptr() as usize;
        registered.push(Registered { start, len: region.len(), first: buffers.len() });
        for at in (0..region.len()).step_by(BUFFER_LIMIT) {
            let iov_len = BUFFER_LIMIT.min(region.len() - at);
            buffers.push(libc::iovec { iov_base: (start + at) as *mut libc::c_void, iov_len });
        }
    }
    let mut notes = Vec::new();
    if bytes < wanted {
        notes.push(memlock_note(limit, wanted, bytes));
    }
    if buffers.is_empty() {
        return (registered, notes);
    }
    // SAFETY: the ranges are whole regions, kept mapped by `Ring::_regions` until after the ring is gone.
    if let Err(e) = unsafe { ring.submitter().register_buffers(&buffers) } {
        notes.push(format!("FN-I602 registering I/O buffers was refused ({e}); going on without, a little slower."));
        registered.clear();
    }
    (registered, notes)
}

/// The note about buffers that were not registered.
fn memlock_note(limit: u64, wanted: u64, registered: u64) -> String {
    format!(
        "FN-I602 {} of memory may be locked, I/O buffers are {}: {} registered, the others used without (a little slower). \
         To enable: ulimit -l unlimited, docker run --ulimit memlock=-1, or LimitMEMLOCK=infinity.",
        ByteCount(limit),
        ByteCount(wanted),
        ByteCount(registered)
    )
}
