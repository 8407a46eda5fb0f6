//! Requests to the disk: the machine's commands as reads and writes, and where their memory waits meanwhile.

use crossbeam::channel::{Receiver, RecvTimeoutError};

use crate::{
    checkpoint::Control,
    dtype::StateKind,
    error::{Code, Error, Result},
    io::{Direction, IoCompletion, IoPart, IoRequest},
    memory::{SlotLease, SlotPool},
    quantities::UnitId,
    runtime::{
        disk::{files::Disk, ticket::Ticket},
        paging::homes::Set,
        shared::{Shared, locked::Inner, waits::SLICE},
    },
};

impl Shared {
    pub(crate) fn disk(&self) -> Result<&Disk> {
        self.disk
            .as_ref()
            .ok_or_else(|| Error::new(Code::Stale, "something is said to live on NVMe, but there is no store."))
    }

    pub(crate) fn take_parts(inner: &mut Inner) -> Vec<IoPart> {
        inner.spare_parts.pop().unwrap_or_default()
    }

    /// Keeps a completion's vector for the next request.
    pub(crate) fn return_parts(inner: &mut Inner, mut parts: Vec<IoPart>) {
        parts.clear();
        inner.spare_parts.push(parts);
    }

    pub(crate) fn submit_io(&self, ticket: Ticket, lease: SlotLease, parts: Vec<IoPart>) -> Result<()> {
        let request = IoRequest { ticket: ticket.encode(), lease, parts };
        self.disk()?.store.engine().submit(request).map_err(|rejected| rejected.error)
    }

    pub(crate) fn read_params(&self, inner: &mut Inner, unit: UnitId) -> Result<()> {
        let disk = self.disk()?;
        let exhausted = || Error::new(Code::Stale, "a page slot was promised but none is free.");
        let lease = disk.page_pool.as_ref().and_then(SlotPool::lease).ok_or_else(exhausted)?;
        let mut parts = Self::take_parts(inner);
        for (index, section) in self.layout.unit(unit).sections.iter().enumerate() {
            if let Some(segment) = disk.map.segment(unit, index, StateKind::Param) {
                let n = disk.store.segment_chunks(segment);
                disk.store.parts(segment, 0..n, Direction::Read, section.offset as usize, &mut parts);
            }
        }
        self.submit_io(Ticket::Params(unit), lease, parts)
    }

    /// True if nothing had to be read.
    pub(crate) fn read_chunk(&self, inner: &mut Inner, unit: UnitId, index: u32) -> Result<bool> {
        let disk = self.disk()?;
        let exhausted = || Error::new(Code::Stale, "an update slot was promised but none is free.");
        let mut lease = disk.update_pool.lease().ok_or_else(exhausted)?;
        let mut parts = Self::take_parts(inner);
        let chunk = disk.map.chunk(unit, index);
        let grads = !self.homes.unit(unit).grads_in_memory();
        if disk.map.update_parts(
            &disk.store,
            &self.layout,
            unit,
            chunk,
            (Direction::Read, Set::Current, grads),
            &mut parts,
        ) {
            // What was never written is zero.
            lease.bytes().fill(0);
        }
        if parts.is_empty() {
            inner.chunks.push((unit, index, lease));
            Self::return_parts(inner, parts);
            return Ok(true);
        }
        self.submit_io(Ticket::ReadChunk(unit, index), lease, parts)?;
        Ok(false)
    }

    /// Writes a chunk to the unit's current places or the others; true if nothing had to be written.
    pub(crate) fn write_chunk(&self, inner: &mut Inner, unit: UnitId, index: u32, set: Set) -> Result<bool> {
        let disk = self.disk()?;
        let lease = Self::unpark_chunk(inner, unit, index)?;
        let mut parts = Self::take_parts(inner);
        let chunk = disk.map.chunk(unit, index);
        disk.map.update_parts(&disk.store, &self.layout, unit, chunk, (Direction::Write, set, false), &mut parts);
        if parts.is_empty() {
            // Only the gradients live on NVMe, which an update leaves as they are.
            Self::return_parts(inner, parts);
            return Ok(true);
        }
        self.submit_io(Ticket::WriteChunk(unit, index), lease, parts)?;
        Ok(false)
    }

    /// The slot if nothing had to be read.
    pub(crate) fn read_grads(&self, inner: &mut Inner, unit: UnitId) -> Result<Option<SlotLease>> {
        let disk = self.disk()?;
        let exhausted = || Error::new(Code::Stale, "a gradient slot was promised but none is free.");
        let mut lease = disk.grad_pool.as_ref().and_then(SlotPool::lease).ok_or_else(exhausted)?;
        let mut parts = Self::take_parts(inner);
        let mut skipped = false;
        for (index, section) in self.layout.unit(unit).sections.iter().enumerate() {
            let Some(segment) = disk.map.segment(unit, index, StateKind::Grad) else { continue };
            for c in 0..disk.store.segment_chunks(segment) {
                let at = section.offset as usize + c as usize * disk.store.chunk_bytes() as usize;
                if disk.store.written(segment, c) {
                    disk.store.parts(segment, c..c + 1, Direction::Read, at, &mut parts);
                } else {
                    skipped = true;
                }
            }
        }
        if skipped {
            lease.bytes().fill(0);
        }
        if parts.is_empty() {
            Self::return_parts(inner, parts);
            return Ok(Some(lease));
        }
        self.submit_io(Ticket::ReadGrads(unit), lease, parts)?;
        Ok(None)
    }

    pub(crate) fn write_grads(&self, inner: &mut Inner, unit: UnitId) -> Result<()> {
        let disk = self.disk()?;
        let lost = || Error::new(Code::Stale, "gathered gradients have no slot.");
        let lease = inner.grad_slots[unit.index()].take().ok_or_else(lost)?.lease;
        let mut parts = Self::take_parts(inner);
        for (index, section) in self.layout.unit(unit).sections.iter().enumerate() {
            if let Some(segment) = disk.map.segment(unit, index, StateKind::Grad) {
                let n = disk.store.segment_chunks(segment);
                disk.store.parts(segment, 0..n, Direction::Write, section.offset as usize, &mut parts);
            }
        }
        self.submit_io(Ticket::Grads(unit), lease, parts)
    }

    /// The slot of a chunk that was kept.
    pub(crate) fn unpark_chunk(inner: &mut Inner, unit: UnitId, chunk: u32) -> Result<SlotLease> {
        let lost = || Error::new(Code::Stale, "a chunk that was read, or updated, has no slot.");
        let at = inner.chunks.iter().position(|(u, c, _)| (*u, *c) == (unit, chunk)).ok_or_else(lost)?;
        Ok(inner.chunks.swap_remove(at).2)
    }

    /// Keeps a slot until the machine's next command for it.
    pub(crate) fn park_chunk(inner: &mut Inner, unit: UnitId, chunk: u32, lease: SlotLease) {
        inner.chunks.push((unit, chunk, lease));
    }

    /// Keeps a page slot until it is copied up.
    pub(crate) fn park_page(inner: &mut Inner, unit: UnitId, lease: SlotLease) {
        inner.pages[unit.index()] = Some(lease);
    }

    /// The next end of a request from [`crate::runtime::disk::ends::Ends`], as long as no end was asked for and the runtime has not failed.
    pub(crate) fn next_end(&self, ends: &Receiver<IoCompletion>, control: &Control) -> Result<IoCompletion> {
        loop {
            match ends.recv_timeout(SLICE) {
                Ok(done) => return Ok(done),
                Err(RecvTimeoutError::Timeout) => {
                    control.check()?;
                    drop(self.lock()?);
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::new(Code::Stale, "another save or load has taken this one's requests."));
                }
            }
        }
    }
}
