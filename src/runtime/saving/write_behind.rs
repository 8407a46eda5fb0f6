//! Writes segments on NVMe behind a load, so that the disk writes while the load reads on.
//!
//! B1: no more memory than the chunks given to [`WriteBehind::new`]. B2: when it is gone nothing is on its way any more: what a later
//! load writes to the same place comes after it.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use crossbeam::channel::Receiver;

use crate::{
    checkpoint::Control,
    error::{Code, Error, Result},
    io::{Direction, IoCompletion},
    memory::{SlotLease, SlotPool},
    quantities::ByteCount,
    runtime::{
        disk::{files::Disk, ticket::Ticket},
        shared::Shared,
    },
};

/// A disk that takes longer for what was begun has failed.
const LONGEST: Duration = Duration::from_secs(60);

/// The writer of one load.
pub(super) struct WriteBehind<'a> {
    shared: &'a Shared,
    disk: &'a Disk,
    control: &'a Control,
    done: Receiver<IoCompletion>,
    pool: SlotPool,
    /// Numbers of the writes under way.
    out: HashSet<u32>,
}

impl<'a> WriteBehind<'a> {
    /// With so many chunks of memory.
    ///
    /// # Errors
    /// `FN-E204` without memory.
    pub(super) fn new(shared: &'a Shared, disk: &'a Disk, chunks: u64, control: &'a Control) -> Result<Self> {
        let pool = SlotPool::new(chunks as u32, ByteCount(disk.store.chunk_bytes()), "a load's writes")?;
        let done = shared.saves.writes.open();
        Ok(Self { shared, disk, control, done, pool, out: HashSet::with_capacity(chunks as usize) })
    }

    /// Memory for a chunk.
    ///
    /// # Errors
    /// Those of writes begun earlier; `FN-E412` once an end was asked for.
    pub(super) fn chunk(&mut self) -> Result<SlotLease> {
        loop {
            self.control.check()?;
            if let Some(lease) = self.pool.lease() {
                return Ok(lease);
            }
            self.wait_one()?;
        }
    }

    /// Begins to write a chunk of a segment.
    ///
    /// # Errors
    /// From the I/O engine.
    pub(super) fn write(&mut self, segment: usize, chunk: u32, mut lease: SlotLease) -> Result<()> {
        let store = &self.disk.store;
        store.seal(segment, chunk, &lease.bytes()[..store.chunk_len(segment, chunk) as usize]);
        let mut parts = Vec::with_capacity(1);
        store.parts(segment, chunk..chunk + 1, Direction::Write, 0, &mut parts);
        let number = self.shared.saves.writes.number();
        self.shared.submit_io(Ticket::Load(number), lease, parts)?;
        self.out.insert(number);
        Ok(())
    }

    /// Waits until nothing is on its way any more, also when an end was asked for; the first failure of what was.
    ///
    /// # Errors
    /// From the disk; `FN-E102` when it does not answer.
    pub(super) fn finish(&mut self) -> Result<()> {
        let end = Instant::now() + LONGEST;
        let mut first = Ok(());
        while !self.out.is_empty() {
            let Ok(done) = self.done.recv_deadline(end) else {
                let text = format!("{} writes of a load did not end for {LONGEST:?}.", self.out.len());
                return Err(Error::new(Code::Stuck, text)
                    .action("The kernel log may show a failing drive; start again from the last checkpoint."));
            };
            self.out.remove(&(done.ticket as u32));
            first = first.and(done.result);
        }
        first
    }

    fn wait_one(&mut self) -> Result<()> {
        let done = self.shared.next_end(&self.done, self.control)?;
        self.out.remove(&(done.ticket as u32));
        done.result
    }
}

impl Drop for WriteBehind<'_> {
    /// After a failure too (B2), which the load reports. If writes are still in flight then, this fails the runtime: later writes to the same
    /// place must not race them.
    fn drop(&mut self) {
        if let Err(error) = self.finish()
            && !self.out.is_empty()
        {
            self.shared.fail(error);
        }
    }
}
