//! Reads segments on NVMe ahead of a save, so that the disk reads while the save sums and writes.
//!
//! A1: bytes come in the order in which they were asked for. A2: no more memory than the chunks given to [`ReadAhead::new`].

use std::{collections::VecDeque, ops::Range, sync::Arc};

use crossbeam::channel::Receiver;

use crate::{
    checkpoint::Control,
    error::{Code, Error, Result},
    io::{Direction, IoCompletion},
    memory::{SlotLease, SlotPool},
    quantities::ByteCount,
    runtime::{
        disk::{map::Map, ticket::Ticket},
        shared::Shared,
    },
};

/// A chunk of a segment that was asked for.
struct Asked {
    segment: usize,
    index: u32,
    number: u32,
    /// None while the disk has it.
    lease: Option<SlotLease>,
}

/// The reader of one save.
pub(super) struct ReadAhead {
    shared: Arc<Shared>,
    control: Arc<Control>,
    done: Receiver<IoCompletion>,
    pool: SlotPool,
    /// Chunks of segments that no read was begun of.
    runs: VecDeque<(usize, Range<u32>)>,
    /// The next bytes may begin in the first: it stays until others are wanted.
    ahead: VecDeque<Asked>,
    last: Option<(usize, u32)>,
}

impl ReadAhead {
    /// With so many chunks of memory.
    ///
    /// # Errors
    /// `FN-E204` without memory.
    pub(super) fn new(shared: &Arc<Shared>, chunks: u64, control: &Arc<Control>) -> Result<Self> {
        let size = ByteCount(shared.disk()?.store.chunk_bytes());
        let pool = SlotPool::new(chunks as u32, size, "a save's reads")?;
        let done = shared.saves.reads.open();
        let (shared, control) = (Arc::clone(shared), Arc::clone(control));
        let (runs, ahead) = (VecDeque::new(), VecDeque::new());
        Ok(Self { shared, control, done, pool, runs, ahead, last: None })
    }

    /// These bytes will be read next, after those asked for before.
    ///
    /// # Errors
    /// From the I/O engine.
    pub(super) fn ask(&mut self, segment: usize, bytes: Range<u64>) -> Result<()> {
        if bytes.start == bytes.end {
            return Ok(());
        }
        let mut chunks = Map::store_chunks(&self.shared.disk()?.store, bytes);
        // A chunk in which one tensor ends and the next begins is read once.
        if self.last == Some((segment, chunks.start)) {
            chunks.start += 1;
        }
        if !chunks.is_empty() {
            self.last = Some((segment, chunks.end - 1));
            self.runs.push_back((segment, chunks));
        }
        self.begin()
    }

    /// The next bytes of those that were asked for.
    ///
    /// # Errors
    /// From the disk, for a checksum that differs too; `FN-E412` once an end was asked for.
    pub(super) fn read(&mut self, segment: usize, first: u64, out: &mut [u8]) -> Result<()> {
        let size = self.shared.disk()?.store.chunk_bytes();
        let mut done = 0;
        while done < out.len() {
            let at = first + done as u64;
            let wanted = (segment, (at / size) as u32);
            if self.ahead.front().is_some_and(|c| (c.segment, c.index) != wanted) {
                self.ahead.pop_front();
                self.begin()?;
            }
            let chunk = self.first()?;
            if (chunk.segment, chunk.index) != wanted {
                return Err(Error::new(Code::Stale, "a save reads in another order than it said."));
            }
            let from = (at % size) as usize;
            let n = (size as usize - from).min(out.len() - done);
            let lost = || Error::new(Code::Stale, "a save's chunk is lost.");
            let bytes = chunk.lease.as_mut().ok_or_else(lost)?.bytes();
            out[done..done + n].copy_from_slice(&bytes[from..from + n]);
            done += n;
        }
        Ok(())
    }

    /// Begins as many reads as there is memory for.
    fn begin(&mut self) -> Result<()> {
        let store = &self.shared.disk()?.store;
        while let Some((segment, chunks)) = self.runs.front_mut() {
            let Some(mut lease) = self.pool.lease() else { return Ok(()) };
            let (segment, index) = (*segment, chunks.start);
            chunks.start += 1;
            if chunks.start == chunks.end {
                self.runs.pop_front();
            }
            let number = self.shared.saves.reads.number();
            let mut chunk = Asked { segment, index, number, lease: None };
            if store.written(segment, index) {
                let mut parts = Vec::with_capacity(1);
                store.parts(segment, index..index + 1, Direction::Read, 0, &mut parts);
                self.shared.submit_io(Ticket::Save(number), lease, parts)?;
            } else {
                lease.bytes().fill(0);
                chunk.lease = Some(lease);
            }
            self.ahead.push_back(chunk);
        }
        Ok(())
    }

    /// The first chunk, once it is there.
    fn first(&mut self) -> Result<&mut Asked> {
        while self.ahead.front().is_some_and(|chunk| chunk.lease.is_none()) {
            self.wait_one()?;
        }
        let nothing = || Error::new(Code::Stale, "a save reads what it did not ask for.");
        self.ahead.front_mut().ok_or_else(nothing)
    }

    /// Waits for the end of one read, and sees whether its bytes are those that were written.
    fn wait_one(&mut self) -> Result<()> {
        let done = self.shared.next_end(&self.done, &self.control)?;
        // What an earlier save had not waited for finds no chunk.
        if let Some(chunk) = self.ahead.iter_mut().find(|chunk| u64::from(chunk.number) == done.ticket) {
            done.result?;
            let mut lease = done.lease;
            let store = &self.shared.disk()?.store;
            let len = store.chunk_len(chunk.segment, chunk.index) as usize;
            store.verify(chunk.segment, chunk.index, &lease.bytes()[..len])?;
            chunk.lease = Some(lease);
        }
        Ok(())
    }
}
