//! The engine `threads`: a pool of threads that block in `pread` and `pwrite`.
#![expect(unsafe_code, reason = "reads and writes memory that is owned by a lease, by address")]

use std::{sync::Arc, thread::JoinHandle};

use parking_lot::{Condvar, Mutex};

use super::{
    Direction, EngineKind, EngineOptions, Fault, Faults, IoEngine, IoFile, IoRequest, Rejected, Sink,
    requests::{Next, Requests, check, closed, deliver},
    transfer::{Block, Step, Transfer},
};
use crate::error::Result;

struct Shared {
    requests: Mutex<Requests>,
    work: Condvar,
    /// A request with more bytes than this is work for several threads.
    block: usize,
    files: Vec<IoFile>,
    faults: Arc<Faults>,
    sink: Sink,
}

/// The engine. Dropping it waits for the threads, which finish the blocks they have begun.
pub(super) struct Threads {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Threads {
    pub(super) fn start(options: &EngineOptions, files: Vec<IoFile>, sink: Sink) -> Result<Self> {
        let shared = Arc::new(Shared {
            requests: Mutex::new(Requests::new(options.block)),
            work: Condvar::new(),
            block: options.block,
            files,
            faults: Arc::clone(&options.faults),
            sink,
        });
        let mut engine = Self { shared, threads: Vec::new() };
        for n in 0..options.threads.min(options.queue_depth).max(1) {
            let shared = Arc::clone(&engine.shared);
            let thread = crate::os_error::start_thread(&format!("funicular-io-{n}"), move || work(&shared));
            let purpose = format!("the I/O engine ({n} of its threads are there)");
            let refused = |e| crate::os_error::no_thread(&purpose, &e, "lower nvme.queue_depth");
            engine.threads.push(thread.map_err(refused)?);
        }
        Ok(engine)
    }
}

impl IoEngine for Threads {
    fn submit(&self, request: IoRequest) -> std::result::Result<(), Rejected> {
        if let Err(error) = check(&request, &self.shared.files) {
            return Err(Rejected { request, error });
        }
        let several = request.parts.len() > 1 || request.parts.iter().any(|part| part.len > self.shared.block);
        if let Err((request, error)) = self.shared.requests.lock().admit(request) {
            return Err(Rejected { request, error });
        }
        if several {
            self.shared.work.notify_all();
        } else {
            self.shared.work.notify_one();
        }
        Ok(())
    }

    fn kind(&self) -> EngineKind {
        EngineKind::Threads
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.requests.lock().close(closed());
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has nothing in flight: its calls are synchronous.
            let _ = thread.join();
        }
    }
}

fn work(shared: &Shared) {
    let mut requests = shared.requests.lock();
    loop {
        match requests.next() {
            Next::Block(slot, block) => {
                drop(requests);
                let result = carry_out(shared, block);
                requests = shared.requests.lock();
                if let Some(completion) = requests.finish(slot, result) {
                    drop(requests);
                    deliver(&shared.requests, &shared.sink, completion);
                    requests = shared.requests.lock();
                }
            }
            Next::Complete(completion) => {
                drop(requests);
                deliver(&shared.requests, &shared.sink, completion);
                requests = shared.requests.lock();
            }
            Next::Nothing if requests.is_closed() => return,
            Next::Nothing => shared.work.wait(&mut requests),
        }
    }
}

fn carry_out(shared: &Shared, block: Block) -> Result<()> {
    let file = &shared.files[block.file.index()];
    let mut transfer = Transfer::new(block, file.is_direct());
    loop {
        let result = issue(file, &transfer.rest(), shared.faults.next(block.direction));
        match transfer.advance(result) {
            Step::Again => {}
            Step::Done => return Ok(()),
            Step::Failed(failure) => return Err(failure.error(&block, file)),
        }
    }
}

/// One system call; its result, or the negative error number.
fn issue(file: &IoFile, block: &Block, fault: Option<Fault>) -> i64 {
    let len = match fault {
        Some(Fault::Errno(errno)) => return -i64::from(errno),
        Some(Fault::Lost) => return block.len as i64,
        Some(Fault::Delay(time)) => {
            std::thread::sleep(time);
            block.len
        }
        Some(Fault::Short(keep)) => keep.min(block.len).next_multiple_of(super::ALIGNMENT).min(block.len),
        Some(Fault::FlipBit) | None => block.len,
    };
    let (fd, at, offset) = (file.number(), block.address as *mut u8, block.offset as libc::off_t);
    // SAFETY: `check` found the range inside the request's lease, which is kept until this block has ended, and blocks
    // of a request are disjoint ranges of it unless its owner asked otherwise; no references into it exist meanwhile.
    let result = unsafe {
        match block.direction {
            Direction::Read => libc::pread(fd, at.cast(), len, offset),
            Direction::Write => libc::pwrite(fd, at.cast(), len, offset),
        }
    } as i64;
    match fault {
        _ if result < 0 => -i64::from(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)),
        Some(Fault::Short(keep)) => result.min(keep as i64),
        Some(Fault::FlipBit) if block.direction == Direction::Read && result > 0 => {
            // SAFETY: as above; the first byte was just read.
            unsafe { *at ^= 1 };
            result
        }
        _ => result,
    }
}
