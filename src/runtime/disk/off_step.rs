//! What is not part of a step: first homes, stray reads and edits of what lives on NVMe, reading and writing states.
//!
//! S1: one request at a time, through the one update slot that the machine never uses. S2: a unit's segments
//! are touched only when nothing of it is on its way. S3: `interrupted` may run a signal handler, which may use the model: it is asked
//! only where this thread has neither the slot nor a write under way, so that the handler finds the slot free and no unit half
//! written.
#![expect(unsafe_code, reason = "copies between slots, shadows, homes and buffers of the caller")]

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::MutexGuard;

use crate::{
    device::StreamRef,
    dtype::StateKind,
    error::{Code, Error, Result},
    io::Direction,
    memory::{HostRegion, Shadow, SlotLease},
    runtime::{
        disk::ticket::Ticket,
        measure::stats::Cause,
        paging::homes::Set,
        saving::copy_on_update::group_of,
        shared::{Disk, SLICE, Shared, locked::Service, settle::Until},
    },
    units::{ByteCount, Tier, UnitId},
};

type Interrupted<'a> = &'a mut dyn FnMut() -> bool;

/// One more of something, until it is dropped.
struct Counted<'a>(&'a AtomicU32);

impl<'a> Counted<'a> {
    fn new(count: &'a AtomicU32) -> Self {
        count.fetch_add(1, Ordering::AcqRel);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Shared {
    /// Counts memory for what is read outside of steps against what `budget.host` leaves.
    pub(crate) fn lend(&self, bytes: u64, what: &str) -> Result<()> {
        if self.stats.lent(bytes, self.placement.shadow_bytes) {
            return Ok(());
        }
        Err(Error::new(
            Code::ReadBudget,
            format!(
                "reading {what} outside of a step needs {} of host memory; the budget leaves {}, of which {} are taken by other such reads.",
                ByteCount(bytes),
                ByteCount(self.placement.shadow_bytes),
                ByteCount(self.stats.shadows().0)
            ),
        )
        .action("Raise budget.host, drop tensors read earlier, or keep what is read in host memory (params.tier)."))
    }

    /// Fills the shadow of a unit whose parameters live on NVMe. Nothing to do for others, or if it is filled.
    pub(crate) fn fault_in(&self, unit: UnitId, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        let Some(shadow) = &self.homes.unit(unit).shadow else { return Ok(()) };
        if !shadow.filled() {
            return self.fill_whole(unit, shadow, stream, interrupted);
        }
        if self.is_read(unit) { self.refresh_shadow(unit, stream, interrupted) } else { Ok(()) }
    }

    /// True while a read into the unit's shadow is under way: the shadow has memory, but not all of its bytes.
    fn is_read(&self, unit: UnitId) -> bool {
        self.reads[unit.index()].load(Ordering::Acquire) > 0
    }

    /// Reads the parameters of a unit into its filled shadow.
    pub(crate) fn refresh_shadow(&self, unit: UnitId, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        let Some(shadow) = self.homes.unit(unit).shadow.as_ref().filter(|s| s.filled()) else { return Ok(()) };
        let _read = Counted::new(&self.reads[unit.index()]);
        self.read_params_into(unit, shadow.as_ptr(), stream, interrupted)
    }

    /// Reads the parameters of a unit into memory of the size of its shadow: a filled shadow, or what will be moved there.
    pub(crate) fn read_params_into(
        &self,
        unit: UnitId,
        base: *mut u8,
        stream: u64,
        interrupted: Interrupted<'_>,
    ) -> Result<()> {
        let mut pause = self.pause(Some(stream), Cause::NvmeWrite);
        self.settle_disk(unit, interrupted)?;
        pause.turn(Cause::NvmeRead);
        self.params_io(unit, Direction::Read, interrupted, &mut |slot, at| {
            // SAFETY: `at` and the length lie in the unit's parameter segment, which the memory covers; whoever looks at it
            // expects the bytes to become the current ones.
            unsafe { std::ptr::copy_nonoverlapping(slot.as_ptr(), base.add(at), slot.len()) };
        })
    }

    /// Gives a shadow's memory back, unless a read into it is under way. Nothing may hold a view of it, and its edits must have been
    /// stored.
    pub(crate) fn discard_shadow(&self, unit: UnitId) -> Result<()> {
        if self.is_read(unit) {
            return Ok(());
        }
        if let Some(shadow) = self.homes.unit(unit).shadow.as_ref().filter(|s| s.filled()) {
            self.faults.take(unit);
            shadow.discard()?;
            self.stats.returned(shadow.len() as u64);
        }
        Ok(())
    }

    fn fill_shadow(&self, shadow: &Shadow, unit: UnitId) -> Result<()> {
        let bytes = shadow.len() as u64;
        self.lend(bytes, &format!("'{}'", self.layout.unit(unit).name))?;
        if let Err(error) = shadow.fill().and_then(|()| self.expose(shadow)) {
            self.stats.returned(bytes);
            shadow.discard()?;
            return Err(error);
        }
        Ok(())
    }

    /// Host memory for activations, out of what `budget.host` leaves; never given back.
    pub(crate) fn activation_region(&self, least: u64, wanted: u64) -> Result<Arc<HostRegion>> {
        // One unit that lives on NVMe can always be read.
        let on_nvme = |u: &UnitId| self.placement.homes[u.index()].params == Tier::Nvme;
        let reads = self.layout.ids().filter(on_nvme).map(|u| self.layout.unit(u).param_bytes()).max().unwrap_or(0);
        let limit = self.placement.shadow_bytes.saturating_sub(reads);
        let (taken, _) = self.stats.shadows();
        let bytes = wanted.min(limit.saturating_sub(taken)).max(least);
        if !self.stats.lent(bytes, limit) {
            return Err(Error::new(
                Code::HostBudget,
                format!(
                    "a block's input of {} is to wait in host memory; budget.host leaves {}, and {} of it are taken \
                     by such inputs and by reads outside of steps.",
                    ByteCount(least),
                    ByteCount(limit),
                    ByteCount(taken)
                ),
            )
            .action(
                "Raise budget.host, put more on disk (optimizer.tier = \"nvme\"), or set activations.tier = \"hbm\".",
            ));
        }
        let made = HostRegion::new(ByteCount(bytes), "activations");
        let made = made.and_then(|region| self.device.register(&region).map(|()| region));
        if made.is_err() {
            self.stats.returned(bytes);
        }
        made
    }

    /// Writes a filled shadow to NVMe: at the start, and after edits.
    pub(crate) fn store_shadow(&self, unit: UnitId, interrupted: Interrupted<'_>) -> Result<()> {
        let Some(shadow) = self.homes.unit(unit).shadow.as_ref().filter(|s| s.filled()) else { return Ok(()) };
        self.begin_write(unit, interrupted)?;
        let base = shadow.as_ptr();
        let written = self.params_io(unit, Direction::Write, &mut || false, &mut |slot, at| {
            // SAFETY: as in `refresh_shadow`; the caller owns the shadow's contents.
            unsafe { std::ptr::copy_nonoverlapping(base.add(at), slot.as_mut_ptr(), slot.len()) };
        });
        self.event(|m, out| m.end_write(unit, out))?;
        written
    }

    /// Begins to overwrite a unit's parameters on NVMe, once neither the machine nor a save reads them. It does not ask again for
    /// interruptions after the last look (S3).
    fn begin_write(&self, unit: UnitId, interrupted: Interrupted<'_>) -> Result<()> {
        let what = || format!("a read of '{}'", self.layout.unit(unit).name);
        loop {
            self.settle_disk(unit, interrupted)?;
            self.saves.preserve(group_of(unit), interrupted)?;
            self.wait(self.lock()?, &what, interrupted, |i| Ok((!i.machine.reading(unit)).then_some(())))?;
            let mut inner = self.lock()?;
            let busy = inner.machine.reading(unit) || inner.machine.unsettled(unit);
            if !busy && !self.saves.needs(group_of(unit)) {
                return self.happened(&mut inner, |m, _| m.begin_write(unit));
            }
            // Another thread was faster, or a result is on its way home for a save.
            self.changed.wait_for(&mut inner, Duration::from_millis(1));
        }
    }

    /// Makes a shadow writable without reading it, for its first contents.
    pub(crate) fn blank_shadow(&self, unit: UnitId) -> Result<()> {
        if let Some(shadow) = self.homes.unit(unit).shadow.as_ref().filter(|s| !s.filled()) {
            self.fill_shadow(shadow, unit)?;
        }
        Ok(())
    }

    /// The parameters were edited inside their window: brings the frames' bytes home.
    pub(crate) fn write_back(&self, unit: UnitId, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        self.settle(unit, Some(stream), interrupted)?;
        self.saves.preserve(group_of(unit), interrupted)?;
        self.drop_ahead(unit);
        let bytes = self.layout.unit(unit).param_bytes() as usize;
        let frame = self.frames.address(unit.index());
        let home = self.homes.unit(unit);
        let looked_at = home.shadow.as_ref().is_some_and(|s| s.filled());
        if home.shadow.is_some() {
            // All that may take long, before there is a shadow that nobody has asked for: as long as it is there nothing looks at
            // signals, whose handlers might take it for theirs.
            self.settle_disk(unit, interrupted)?;
            self.block_stream(stream, interrupted)?;
            self.blank_shadow(unit)?;
        }
        let down = {
            let mut inner = self.lock()?;
            let gate = self.device.record(StreamRef::Compute(stream))?;
            self.device.wait(StreamRef::Down, gate)?;
            // SAFETY: the unit is held, so its frames are its own; its home is settled and has the same length.
            unsafe { self.device.copy(StreamRef::Down, home.params, frame, bytes)? };
            let down = self.device.record(StreamRef::Down)?;
            inner.gates[unit.index()].home = down;
            down
        };
        // The window's release is recorded on the compute stream: it must come after this copy out of the frames.
        if home.shadow.is_none() {
            self.wait_gate(stream, down, Cause::Copy, interrupted)?;
        } else {
            self.wait_gate(stream, down, Cause::Copy, &mut || false)?;
            self.block_gate(Some(stream), down, Cause::Copy, &mut || false)?;
            self.store_shadow(unit, &mut || false)?;
            if !looked_at {
                self.discard_shadow(unit)?;
            }
        }
        Ok(())
    }

    /// Moves all parameters of a unit between NVMe and `each`, piece by piece, at offsets in the parameter segment.
    fn params_io(
        &self,
        unit: UnitId,
        direction: Direction,
        interrupted: Interrupted<'_>,
        each: &mut dyn FnMut(&mut [u8], usize),
    ) -> Result<()> {
        let disk = self.disk()?;
        for (index, section) in self.layout.unit(unit).sections.iter().enumerate() {
            if let Some(segment) = disk.map.segment(unit, index, StateKind::Param) {
                let all = 0..section.bytes(StateKind::Param);
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
        let chunks = crate::runtime::disk::map::Map::store_chunks(&disk.store, bytes);
        let mut first = chunks.start;
        while first < chunks.end {
            // Taken anew from time to time, so that a signal handler, or another thread, gets its turn (S3).
            if first > chunks.start && interrupted() {
                return Err(Error::new(Code::Interrupted, "interrupted while waiting for the disk."));
            }
            let (_one, mut lease) = self.service(disk, interrupted)?;
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

    /// Takes the slot for requests outside of steps (S1).
    fn service(&self, disk: &Disk, interrupted: Interrupted<'_>) -> Result<(MutexGuard<'_, ()>, SlotLease)> {
        let one = loop {
            if let Some(one) = self.service.try_lock_for(SLICE) {
                break one;
            }
            drop(self.lock()?);
            if interrupted() {
                return Err(Error::new(Code::Interrupted, "interrupted while waiting for the disk."));
            }
        };
        if self.lock()?.service.out {
            // The slot is still the disk's; taking another would take one of the machine's.
            return Err(Error::new(Code::Stuck, "the disk has not answered an earlier request that was given up.")
                .action("The kernel log may show a failing drive; start again from the last checkpoint."));
        }
        let taken = || Error::new(Code::Stale, "the service slot is taken.");
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
            inner.service = Service { last: inner.service.last.wrapping_add(1), out: true, done: None };
            inner.service.last
        };
        self.submit_io(Ticket::Service(number), lease, parts)?;
        // The slot is the disk's until it comes back, so this wait ends only with it or with the runtime.
        let done = self.wait(self.inner.lock(), &|| "the disk".into(), &mut || false, |i| Ok(i.service.done.take()));
        if done.is_err() {
            // Should it still come, nobody takes it for the next one.
            self.inner.lock().service.last = number.wrapping_add(1);
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
        let until = if direction == Direction::Write { Until::Home } else { Until::Made };
        self.await_update(unit, None, until, interrupted)?;
        if direction == Direction::Write {
            self.saves.preserve(group_of(unit), interrupted)?;
            self.drop_ahead(unit);
        }
        let size = kind.element_size(self.layout.unit(unit).sections[section].dtype) as u64;
        let range = (elems.start * size) as usize..(elems.end * size) as usize;
        let slot = StateKind::OPTIMIZER.iter().position(|&k| k == kind);
        let home = slot.map_or(0, |i| self.homes.unit(unit).states(section, Set::Current)[i]);
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
            self.saves.preserve(group_of(unit), interrupted)?;
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
        let chunks = crate::runtime::disk::map::Map::store_chunks(&disk.store, bytes);
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
