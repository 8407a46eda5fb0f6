//! I/O that is not part of a step: first homes, reads and edits of what lives on NVMe between steps, reading and writing states.
//!
//! S1: one request at a time, through the one update slot that the machine never uses. S2: a unit's segments
//! are touched only when nothing of it is on its way. S3: `interrupted` may run a signal handler, which may use the model: it is asked
//! only where this thread has neither the slot nor a write under way, so that the handler finds the slot free and no unit half
//! written.
#![expect(unsafe_code, reason = "copies between slots, shadows, homes and buffers of the caller")]

use std::{ops::Range, time::Instant};

use crate::{
    dtype::StateKind,
    error::{Code, Error, Result},
    io::Direction,
    memory::SlotLease,
    quantities::UnitId,
    runtime::{
        disk::{files::Disk, map::Map, ticket::Ticket},
        paging::homes::Set,
        shared::{
            Shared,
            lock_order::OrderedGuard,
            locked::OffStep,
            settle::Until,
            waits::{Interrupted, SLICE},
        },
    },
};

impl Shared {
    /// Moves all parameters, or all gradients, of a unit between NVMe and `each`, piece by piece, at offsets in the segment of that kind.
    pub(crate) fn unit_io(
        &self,
        unit: UnitId,
        kind: StateKind,
        direction: Direction,
        interrupted: Interrupted<'_>,
        each: &mut dyn FnMut(&mut [u8], usize),
    ) -> Result<()> {
        let disk = self.disk()?;
        for (index, section) in self.layout.unit(unit).sections.iter().enumerate() {
            if let Some(segment) = disk.map.segment(unit, index, kind) {
                let all = 0..section.bytes(kind);
                self.segment_io(disk, segment, all, direction, interrupted, &mut |slot, at| {
                    each(slot, section.offset as usize + at);
                })?;
            }
        }
        Ok(())
    }

    /// Moves whole store chunks covering `bytes` of a segment; `each` sees every piece with its offset in the segment,
    /// after it was read, or before it is written.
    pub(crate) fn segment_io(
        &self,
        disk: &Disk,
        segment: usize,
        bytes: Range<u64>,
        direction: Direction,
        interrupted: Interrupted<'_>,
        each: &mut dyn FnMut(&mut [u8], usize),
    ) -> Result<()> {
        let size = disk.store.chunk_bytes() as usize;
        let chunks = Map::store_chunks(&disk.store, bytes);
        let mut first = chunks.start;
        while first < chunks.end {
            // Taken anew from time to time, so that a signal handler, or another thread, can have it in between (S3).
            if first > chunks.start && interrupted() {
                return Err(Error::new(Code::Interrupted, "interrupted while waiting for the disk."));
            }
            let (_one, mut lease) = self.off_step_slot(disk, interrupted)?;
            let at_once = (lease.len() / size).max(1) as u32;
            let since = Instant::now();
            while first < chunks.end && (direction == Direction::Write || since.elapsed() < SLICE) {
                let group = first..(first + at_once).min(chunks.end);
                first = group.end;
                for (i, c) in group.clone().enumerate() {
                    let len = disk.store.chunk_len(segment, c) as usize;
                    let piece = &mut lease.bytes()[i * size..i * size + len];
                    if direction == Direction::Write {
                        each(piece, c as usize * size);
                        disk.store.seal(segment, c, piece);
                    } else if !disk.store.written(segment, c) {
                        piece.fill(0);
                    }
                }
                lease = self.transfer(disk, segment, group.clone(), direction, lease)?;
                if direction == Direction::Read {
                    for (i, c) in group.enumerate() {
                        let len = disk.store.chunk_len(segment, c) as usize;
                        let piece = &mut lease.bytes()[i * size..i * size + len];
                        if disk.store.written(segment, c) {
                            disk.store.verify(segment, c, piece)?;
                        }
                        each(piece, c as usize * size);
                    }
                }
            }
        }
        Ok(())
    }

    /// Takes the lock and the slot for requests outside of steps (S1).
    fn off_step_slot(&self, disk: &Disk, interrupted: Interrupted<'_>) -> Result<(OrderedGuard<'_, ()>, SlotLease)> {
        let one = loop {
            if let Some(one) = self.off_step_io.try_lock_for(SLICE) {
                break one;
            }
            drop(self.lock()?);
            if interrupted() {
                return Err(Error::new(Code::Interrupted, "interrupted while waiting for the disk."));
            }
        };
        if self.lock()?.off_step.out {
            // The slot is still the disk's; taking another would take one of the machine's.
            return Err(Error::new(Code::Stuck, "the disk has not answered an earlier request that was given up.")
                .action("The kernel log may show a failing drive; start again from the last checkpoint."));
        }
        let taken = || Error::new(Code::Stale, "the slot for requests outside of steps is taken.");
        Ok((one, disk.update_pool.lease().ok_or_else(taken)?))
    }

    fn transfer(
        &self,
        disk: &Disk,
        segment: usize,
        group: Range<u32>,
        direction: Direction,
        lease: SlotLease,
    ) -> Result<SlotLease> {
        let mut parts = Vec::with_capacity(group.len());
        for (i, c) in group.enumerate() {
            if direction == Direction::Write || disk.store.written(segment, c) {
                disk.store.parts(segment, c..c + 1, direction, i * disk.store.chunk_bytes() as usize, &mut parts);
            }
        }
        if parts.is_empty() {
            return Ok(lease);
        }
        let number = {
            let mut inner = self.inner.lock();
            inner.off_step = OffStep { last: inner.off_step.last.wrapping_add(1), out: true, done: None };
            inner.off_step.last
        };
        self.submit_io(Ticket::OffStep(number), lease, parts)?;
        // The slot is the disk's until it comes back, so this wait ends only with it or with the runtime.
        let done = self.wait(self.inner.lock(), &|| "the disk".into(), &mut || false, |i| Ok(i.off_step.done.take()));
        if done.is_err() {
            // If it still comes, it must not be taken for the next request's answer.
            self.inner.lock().off_step.last = number.wrapping_add(1);
        }
        let done = done?;
        done.result?;
        Ok(done.lease)
    }

    /// Copies elements of a state to or from the caller's memory of `len` elements at `buffer`.
    ///
    /// # Safety
    /// `buffer` must be valid for the bytes of `len` elements, for writing if `direction` is `Read`.
    pub(crate) unsafe fn state_io(
        &self,
        unit: UnitId,
        section: usize,
        kind: StateKind,
        elems: Range<u64>,
        buffer: *mut u8,
        direction: Direction,
        interrupted: Interrupted<'_>,
    ) -> Result<()> {
        // A parameter without elements has no states, in no tier.
        if elems.is_empty() {
            return Ok(());
        }
        // Before a write a save has to have seen what is there, for which it waits until that is home.
        let until = if direction == Direction::Write { Until::Whole } else { Until::Made };
        self.await_update(unit, None, until, interrupted)?;
        if direction == Direction::Write {
            self.await_read(unit, interrupted)?;
            self.drop_speculation(unit);
            self.states_home(unit, interrupted)?;
        } else {
            self.states_current(unit, interrupted)?;
        }
        let size = kind.element_size(self.layout.unit(unit).sections[section].dtype) as u64;
        let range = (elems.start * size) as usize..(elems.end * size) as usize;
        let slot = StateKind::OPTIMIZER.iter().position(|&k| k == kind);
        let home = slot.map_or(0, |i| self.homes.unit(unit).states_at_home(section, Set::Current)[i]);
        if home > 0 {
            let there = (home as usize + range.start) as *mut u8;
            let (src, dst) = if direction == Direction::Read { (there, buffer) } else { (buffer, there) };
            // SAFETY: the range lies in the state's home, which is settled; the buffer is the caller's promise.
            unsafe { std::ptr::copy_nonoverlapping(src, dst, range.len()) };
            return Ok(());
        }
        let disk = self.disk()?;
        let none = || Error::new(Code::Stale, format!("'{}' has no {}.", self.layout.unit(unit).name, kind.name()));
        let segment = disk.map.segment(unit, section, kind).ok_or_else(none)?;
        self.settle_disk(unit, interrupted)?;
        if direction == Direction::Write {
            // The last look at signals was the one above: a handler's save must not find a state half written.
            self.await_read(unit, interrupted)?;
            // SAFETY: the caller's promise is passed on.
            return unsafe { self.bytes_io(disk, segment, range, buffer, direction, &mut || false) };
        }
        // SAFETY: the caller's promise is passed on.
        unsafe { self.bytes_io(disk, segment, range, buffer, direction, interrupted) }
    }

    /// Copies bytes of a segment on NVMe, of which nothing is on its way, to or from the caller's memory.
    ///
    /// # Safety
    /// `buffer` must be valid for the bytes of `range`, for writing if `direction` is `Read`.
    pub(crate) unsafe fn bytes_io(
        &self,
        disk: &Disk,
        segment: usize,
        range: Range<usize>,
        buffer: *mut u8,
        direction: Direction,
        interrupted: Interrupted<'_>,
    ) -> Result<()> {
        let exchange = |slot: &mut [u8], at: usize, to_slot: bool| {
            let (from, to) = (range.start.max(at), range.end.min(at + slot.len()));
            if from < to {
                let here = &mut slot[from - at..to - at];
                // SAFETY: `from..to` is inside `range`, so the buffer covers it.
                let there = unsafe { buffer.add(from - range.start) };
                // SAFETY: both are valid for `to - from` bytes and cannot overlap.
                unsafe {
                    if to_slot {
                        std::ptr::copy_nonoverlapping(there, here.as_mut_ptr(), here.len());
                    } else {
                        std::ptr::copy_nonoverlapping(here.as_ptr(), there, here.len());
                    }
                }
            }
        };
        let bytes = range.start as u64..range.end as u64;
        if direction == Direction::Read {
            return self.segment_io(disk, segment, bytes, direction, interrupted, &mut |s, at| exchange(s, at, false));
        }
        // Chunks are written whole: what is around the range is read first.
        let chunks = Map::store_chunks(&disk.store, bytes);
        for c in chunks {
            let one = u64::from(c) * disk.store.chunk_bytes();
            let span = one..one + disk.store.chunk_len(segment, c);
            let mut kept = Vec::new();
            self.segment_io(disk, segment, span.clone(), Direction::Read, interrupted, &mut |s, _| {
                kept.extend_from_slice(s)
            })?;
            exchange(&mut kept, one as usize, true);
            self.segment_io(disk, segment, span, Direction::Write, interrupted, &mut |s, _| s.copy_from_slice(&kept))?;
        }
        Ok(())
    }
}
