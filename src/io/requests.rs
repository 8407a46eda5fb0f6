//! The requests an engine has accepted: cut into blocks in order of arrival, complete when the last block is.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    time::Instant,
};

use parking_lot::Mutex;

use super::{ALIGNMENT, IoCompletion, IoFile, IoPart, IoRequest, Sink, transfer::Block};
use crate::error::{Code, Error};

/// Requests that fit without growing the tables.
const PREALLOCATED: usize = 1024;

#[derive(Debug)]
struct Active {
    request: IoRequest,
    /// When its first block was handed out; until then, when it was accepted.
    begun: Instant,
    /// The next byte to hand out: part, and offset in it.
    part: usize,
    at: usize,
    in_flight: u32,
    error: Option<Error>,
}

/// What an engine does next.
#[derive(Debug)]
pub(super) enum Next {
    /// Begin this block of this request.
    Block(u32, Block),
    /// Deliver this request: it had nothing to transfer.
    Complete(IoCompletion),
    /// Wait.
    Nothing,
}

/// All accepted requests. A request is in `waiting` while it has blocks that were not handed out.
#[derive(Debug)]
pub(super) struct Requests {
    block_len: usize,
    slots: Vec<Option<Active>>,
    free: Vec<u32>,
    waiting: VecDeque<u32>,
    /// Why no more requests are taken.
    closed: Option<Error>,
}

impl Requests {
    pub(super) fn new(block_len: usize) -> Self {
        let block_len = block_len.clamp(ALIGNMENT, 1 << 30).next_multiple_of(ALIGNMENT);
        Self {
            block_len,
            slots: Vec::with_capacity(PREALLOCATED),
            free: Vec::with_capacity(PREALLOCATED),
            waiting: VecDeque::with_capacity(PREALLOCATED),
            closed: None,
        }
    }

    /// Takes a request; true if nothing was waiting before, so that a sleeping engine has to be woken.
    pub(super) fn admit(&mut self, request: IoRequest) -> Result<bool, (IoRequest, Error)> {
        if let Some(error) = &self.closed {
            return Err((request, error.clone()));
        }
        let active = Active { request, begun: Instant::now(), part: 0, at: 0, in_flight: 0, error: None };
        let slot = match self.free.pop() {
            Some(slot) => {
                self.slots[slot as usize] = Some(active);
                slot
            }
            None => {
                self.slots.push(Some(active));
                (self.slots.len() - 1) as u32
            }
        };
        self.waiting.push_back(slot);
        Ok(self.waiting.len() == 1)
    }

    /// The next block, of the oldest request that has one.
    pub(super) fn next(&mut self) -> Next {
        while let Some(&slot) = self.waiting.front() {
            if let Some(active) = self.slots[slot as usize].as_mut()
                && let Some(block) = active.cut(self.block_len)
            {
                active.in_flight += 1;
                if active.is_cut() {
                    self.waiting.pop_front();
                }
                return Next::Block(slot, block);
            }
            self.waiting.pop_front();
            if let Some(completion) = self.take(slot) {
                return Next::Complete(completion);
            }
        }
        Next::Nothing
    }

    /// Notes that a block ended. The completion, if it was the last one in flight and no more will be begun.
    pub(super) fn finish(&mut self, slot: u32, result: Result<(), Error>) -> Option<IoCompletion> {
        let active = self.slots[slot as usize].as_mut()?;
        active.in_flight -= 1;
        if let Err(error) = result
            && active.error.is_none()
        {
            active.error = Some(error);
            if !active.is_cut() {
                active.part = active.request.parts.len();
                self.waiting.retain(|&waiting| waiting != slot);
            }
        }
        if active.in_flight == 0 && active.is_cut() { self.take(slot) } else { None }
    }

    /// Refuses requests from now on, with this error, and begins no further block.
    pub(super) fn close(&mut self, error: Error) {
        for slot in &self.waiting {
            if let Some(active) = self.slots[*slot as usize].as_mut() {
                active.part = active.request.parts.len();
                active.error.get_or_insert_with(|| error.clone());
            }
        }
        // What has nothing in flight is still in `waiting`: `next` delivers it. The rest is delivered by `finish`.
        let slots = &self.slots;
        self.waiting.retain(|&slot| slots[slot as usize].as_ref().is_some_and(|active| active.in_flight == 0));
        self.closed.get_or_insert(error);
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.is_some()
    }

    fn take(&mut self, slot: u32) -> Option<IoCompletion> {
        let active = self.slots[slot as usize].take()?;
        self.free.push(slot);
        Some(IoCompletion {
            ticket: active.request.ticket,
            lease: active.request.lease,
            parts: active.request.parts,
            result: active.error.map_or(Ok(()), Err),
            nanos: u64::try_from(active.begun.elapsed().as_nanos()).unwrap_or(u64::MAX),
        })
    }
}

impl Active {
    fn cut(&mut self, block_len: usize) -> Option<Block> {
        self.skip_finished_parts();
        let part = self.request.parts.get(self.part)?;
        if (self.part, self.at) == (0, 0) {
            self.begun = Instant::now();
        }
        let len = block_len.min(part.len - self.at);
        let block = Block {
            direction: part.direction,
            file: part.file,
            offset: part.offset + self.at as u64,
            address: self.request.lease.as_ptr() as usize + part.start + self.at,
            len,
        };
        self.at += len;
        self.skip_finished_parts();
        Some(block)
    }

    fn skip_finished_parts(&mut self) {
        while self.request.parts.get(self.part).is_some_and(|part| self.at >= part.len) {
            (self.part, self.at) = (self.part + 1, 0);
        }
    }

    fn is_cut(&self) -> bool {
        self.part >= self.request.parts.len()
    }
}

/// Whether the parts of a request fit its lease and the files.
pub(super) fn check(request: &IoRequest, files: &[IoFile]) -> Result<(), Error> {
    let lease_len = request.lease.len();
    for part in &request.parts {
        let wrong = |what: &str| {
            let IoPart { direction, file, offset, start, len } = part;
            let file = files.get(file.index()).map_or_else(|| format!("file {}", file.0), |f| f.label().to_owned());
            let message = format!(
                "{direction:?} of {len} bytes at offset {offset} of {file}, slot offset {start}, slot of {lease_len} bytes: {what}."
            );
            Err(Error::new(Code::IoFailed, message).errno(libc::EINVAL).action("This is a bug of funicular."))
        };
        let Some(file) = files.get(part.file.index()) else { return wrong("there is no such file") };
        if part.start.checked_add(part.len).is_none_or(|end| end > lease_len) {
            return wrong("outside the slot");
        }
        if part.offset.checked_add(part.len as u64).is_none_or(|end| i64::try_from(end).is_err()) {
            return wrong("beyond what a file can hold");
        }
        let address = request.lease.as_ptr() as usize + part.start;
        let aligned = [address, part.len].iter().all(|n| n.is_multiple_of(ALIGNMENT))
            && part.offset.is_multiple_of(ALIGNMENT as u64);
        if file.is_direct() && !aligned {
            return wrong("not aligned to 4096 as direct I/O needs");
        }
    }
    Ok(())
}

/// Gives a completion to the caller's sink. If that panics, against its contract, the engine takes nothing more.
pub(super) fn deliver(requests: &Mutex<Requests>, sink: &Sink, completion: IoCompletion) {
    if catch_unwind(AssertUnwindSafe(|| sink(completion))).is_err() {
        requests.lock().close(Error::new(Code::Panicked, "what takes the completions of the I/O engine panicked."));
    }
}

/// The error of requests that come too late.
pub(super) fn closed() -> Error {
    Error::new(Code::Closed, "the I/O engine has been closed.")
}
