//! Gradients that live on NVMe: their way there, and back into memory for who looks at them.
//!
//! A unit's gradients are in one place: in a slot, on NVMe, or in memory (see [`crate::runtime::paging::homes::GradShadow`]). Copies down fill the
//! slot, which is written once it is complete, or at the end of the backward. Readers have them brought to memory, and there they stay, with
//! all edits, until the update has read them, or until they are stored because the memory is needed.
#![expect(unsafe_code, reason = "copies between slots and shadows")]

use std::ops::Range;

use crate::{
    device::StreamRef,
    dtype::StateKind,
    error::{Code, Error, Result},
    io::Direction,
    memory::SlotLease,
    quantities::UnitId,
    runtime::{
        handle::Runtime,
        measure::stats::Cause,
        paging::homes::GradShadow,
        shared::{
            Shared,
            lock_order::OrderedGuard,
            locked::{Gathered, Inner},
            waits::Interrupted,
        },
    },
};

impl Runtime {
    /// Has all gathered gradients written to NVMe, without waiting for it.
    ///
    /// # Errors
    /// The runtime's first failure.
    pub fn flush_gradients(&self) -> Result<()> {
        self.shared()?.event(|m, out| m.flush_all_grads(out))
    }

    /// Copies a gradient that lives on NVMe to the device, in the order of `stream`, to be added to there: it comes down again as
    /// [`Runtime::gradient`]. False if the unit's gradients are in memory.
    ///
    /// # Errors
    /// The runtime's first failure, or an interruption.
    ///
    /// # Safety
    /// `dst` must be a valid address of `len` bytes on the device, which the stream may write to.
    pub unsafe fn lift_gradient(
        &self,
        unit: UnitId,
        offset: u64,
        (dst, len): (u64, u64),
        stream: u64,
        interrupted: Interrupted<'_>,
    ) -> Result<bool> {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.shared()?.lift_gradient(unit, offset, dst, len, stream, interrupted) }
    }

    /// Has gradients that live on NVMe read, if there is room, because they will soon be added to.
    ///
    /// # Errors
    /// The runtime's first failure.
    pub fn expect_gradients(&self, unit: UnitId) -> Result<()> {
        self.shared()?.expect_gradients(unit)
    }

    /// Makes sure that a unit's gradients are in memory; nothing to do where they do not live on NVMe.
    ///
    /// # Errors
    /// `FN-E205` when the host budget has no room, `FN-E301` and `FN-E302` from the disk.
    pub fn bring_gradients(&self, unit: UnitId, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        self.shared()?.bring_gradients(unit, stream, interrupted)
    }

    /// Gives the memory of a unit's gradients back: stored on NVMe before, if they are still `wanted`. Nothing may hold a raw address of them.
    ///
    /// # Errors
    /// From the disk; the gradients are in memory then.
    pub fn give_gradients(&self, unit: UnitId, wanted: bool, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        self.shared()?.give_gradients(unit, wanted, stream, interrupted)
    }

    /// Units whose gradients live on NVMe and are in memory now.
    ///
    /// # Errors
    /// When closed.
    pub fn gradients_in_memory(&self) -> Result<Vec<UnitId>> {
        let shared = self.shared()?;
        let there = |unit: &UnitId| shared.homes.unit(*unit).grad_shadow.as_ref().is_some_and(GradShadow::in_memory);
        Ok(shared.layout.ids().filter(there).collect())
    }
}

impl Shared {
    /// Bytes of all gradients that a unit can have.
    pub(crate) fn trained_bytes(&self, unit: UnitId) -> u64 {
        let packed = self.layout.unit(unit);
        let trained = packed.params.iter().map(|p| (p.numel, &packed.sections[p.section])).filter(|(_, s)| s.trainable);
        trained.map(|(numel, s)| numel * s.dtype.size() as u64).sum()
    }

    /// Where a unit's gradients, of which `len` bytes are to come, are to be copied now, and the lock under which that stays so. Without
    /// `keep` those that are there already are worth nothing.
    pub(crate) fn gradient_place(
        &self,
        unit: UnitId,
        len: u64,
        keep: bool,
        stream: u64,
        interrupted: Interrupted<'_>,
    ) -> Result<(OrderedGuard<'_, Inner>, u64)> {
        let home = self.homes.unit(unit);
        let Some(of_grads) = &home.grad_shadow else { return Ok((self.lock()?, home.grads)) };
        if of_grads.in_memory() && !keep {
            self.give_gradients(unit, false, stream, interrupted)?;
        }
        loop {
            let mut inner = self.lock()?;
            if of_grads.in_memory() {
                return Ok((inner, home.grads));
            }
            if self.gather(&mut inner, unit, keep)? {
                let slot = inner.grad_slots[unit.index()].as_mut().ok_or_else(no_slot)?;
                slot.bytes += len;
                let at = slot.lease.as_ptr() as u64;
                return Ok((inner, at));
            }
            let _pause = self.pause(Some(stream), if keep { Cause::NvmeRead } else { Cause::NvmeWrite });
            let what = || format!("room for the gradients of '{}'", self.layout.unit(unit).name);
            self.wait(inner, &what, interrupted, |i| Ok(self.gather(i, unit, keep)?.then_some(())))?;
        }
    }

    /// True if the unit has a slot for its gradients now, with those that lie on NVMe if they are to be kept.
    fn gather(&self, inner: &mut Inner, unit: UnitId, keep: bool) -> Result<bool> {
        let there = self.step(inner, |m, out| m.gather_grads(unit, keep, out))?;
        if there && inner.grad_slots[unit.index()].is_none() {
            let mut lease = self.disk()?.grad_pool.as_ref().and_then(|pool| pool.lease()).ok_or_else(no_slot)?;
            if self.poison {
                lease.bytes().fill(0xff);
            }
            inner.grad_slots[unit.index()] = Some(Gathered { lease, bytes: 0 });
        }
        Ok(there)
    }

    /// Copies a gradient from the unit's slot, which has it read first, to the device in the order of `stream`; false if the gradients are
    /// in memory.
    ///
    /// # Safety
    /// `dst` must be a valid address of `len` bytes on the device, which the stream may write to.
    pub(crate) unsafe fn lift_gradient(
        &self,
        unit: UnitId,
        offset: u64,
        dst: u64,
        len: u64,
        stream: u64,
        interrupted: Interrupted<'_>,
    ) -> Result<bool> {
        if offset.checked_add(len).is_none_or(|end| end > self.layout.unit(unit).grad_bytes()) {
            return Err(Error::argument(format!("'{}' has no such gradient.", self.layout.unit(unit).name)));
        }
        self.settle_made(unit, stream, interrupted)?;
        self.drop_speculation(unit);
        // Of what is to be added to nothing has come yet.
        let (inner, at) = self.gradient_place(unit, 0, true, stream, interrupted)?;
        if self.homes.unit(unit).grads_in_memory() {
            return Ok(false);
        }
        // What came before may still be on its way down.
        self.device.wait(StreamRef::Compute(stream), inner.last_down)?;
        // SAFETY: the slot is the unit's until the down stream has passed what follows; the target is the caller's promise.
        unsafe { self.device.copy(StreamRef::Compute(stream), dst, at + offset, len as usize)? };
        // The slot is given away when the down stream has passed its last copy: also if no sum comes down, because the backward failed.
        let lifted = self.device.record(StreamRef::Compute(stream))?;
        self.device.wait(StreamRef::Down, lifted)?;
        Ok(true)
    }

    /// Has gradients read that will soon be added to, if there is room.
    pub(crate) fn expect_gradients(&self, unit: UnitId) -> Result<()> {
        if self.homes.unit(unit).grads_in_memory() {
            return Ok(());
        }
        self.event(|m, out| m.expect_grads(unit, out))
    }

    /// Gradients were read into a slot.
    pub(crate) fn grads_read(&self, unit: UnitId, mut lease: SlotLease) -> Result<()> {
        let disk = self.disk()?;
        self.each_chunk(unit, |segment, chunk, bytes| {
            let piece = &lease.bytes()[bytes];
            if disk.store.written(segment, chunk) { disk.store.verify(segment, chunk, piece) } else { Ok(()) }
        })?;
        let mut inner = self.lock()?;
        inner.grad_slots[unit.index()] = Some(Gathered { lease, bytes: 0 });
        self.apply_event(&mut inner, |m, out| m.grads_read(unit, out))
    }

    /// Calls `each` for each chunk of a unit's gradients on NVMe, with its bytes in a slot.
    fn each_chunk(&self, unit: UnitId, mut each: impl FnMut(usize, u32, Range<usize>) -> Result<()>) -> Result<()> {
        let disk = self.disk()?;
        for (index, section) in self.layout.unit(unit).sections.iter().enumerate() {
            let Some(segment) = disk.map.segment(unit, index, StateKind::Grad) else { continue };
            let mut at = section.offset as usize;
            for chunk in 0..disk.store.segment_chunks(segment) {
                each(segment, chunk, at..at + disk.store.chunk_len(segment, chunk) as usize)?;
                at += disk.store.chunk_bytes() as usize;
            }
        }
        Ok(())
    }

    /// The last copy into a unit's slot is over.
    pub(crate) fn grads_landed(&self, unit: UnitId) -> Result<()> {
        let mut slot = self.lock()?.grad_slots[unit.index()].take().ok_or_else(no_slot)?;
        let disk = self.disk()?;
        self.each_chunk(unit, |segment, chunk, bytes| {
            disk.store.seal(segment, chunk, &slot.lease.bytes()[bytes]);
            Ok(())
        })?;
        let mut inner = self.lock()?;
        inner.grad_slots[unit.index()] = Some(slot);
        self.apply_event(&mut inner, |m, out| m.grads_landed(unit, out))
    }

    /// Brings a unit's gradients to memory.
    fn bring_gradients(&self, unit: UnitId, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        let Some(of_grads) = &self.homes.unit(unit).grad_shadow else { return Ok(()) };
        let shadow = &of_grads.shadow;
        while !of_grads.in_memory() {
            self.settle_gradients(unit, stream, interrupted)?;
            let _pause = self.pause(Some(stream), Cause::NvmeRead);
            // A signal handler, which `interrupted` may run, may bring them too, and edit or store them: then this read is over.
            let outermost = !shadow.filled();
            if outermost {
                self.fill_shadow(shadow, &format!("the gradients of '{}'", self.layout.unit(unit).name))?;
            }
            let read = self.unit_io(unit, StateKind::Grad, Direction::Read, interrupted, &mut |slot, at| {
                if shadow.filled() && !of_grads.in_memory() {
                    // SAFETY: `at` and the length lie in the unit's gradient segment, which the shadow covers; it has memory.
                    unsafe { std::ptr::copy_nonoverlapping(slot.as_ptr(), shadow.as_ptr().add(at), slot.len()) };
                }
            });
            if read.is_err() && outermost && shadow.filled() && !of_grads.in_memory() {
                shadow.discard()?;
                self.stats.returned(shadow.len() as u64);
            }
            read?;
            if shadow.filled() {
                of_grads.set_in_memory(true);
            }
        }
        Ok(())
    }

    /// Waits until a unit's gradients are in no slot.
    fn settle_gradients(&self, unit: UnitId, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        let inner = self.lock()?;
        if inner.machine.grads_settled(unit) {
            return Ok(());
        }
        let _pause = self.pause(Some(stream), Cause::NvmeWrite);
        let what = || format!("the gradients of '{}'", self.layout.unit(unit).name);
        self.wait(inner, &what, interrupted, |i| {
            // Also what has just been read into a slot.
            self.step(i, |m, out| m.flush_grads(unit, out))?;
            Ok(i.machine.grads_settled(unit).then_some(()))
        })
    }

    fn give_gradients(&self, unit: UnitId, wanted: bool, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        let Some(of_grads) = self.homes.unit(unit).grad_shadow.as_ref().filter(|g| g.in_memory()) else {
            return Ok(());
        };
        self.settle_made(unit, stream, interrupted)?;
        // Pieces of an update ahead read them here, and would not know that they are on NVMe again.
        self.drop_speculation(unit);
        // What is enqueued may still read or write this memory.
        self.block_stream(stream, interrupted)?;
        let down = self.device.record(StreamRef::Down)?;
        self.block_gate(Some(stream), down, Cause::Grads, interrupted)?;
        let shadow = &of_grads.shadow;
        self.settle_disk(unit, interrupted)?;
        if wanted && of_grads.in_memory() {
            // From here on no signal handler runs.
            self.unit_io(unit, StateKind::Grad, Direction::Write, &mut || false, &mut |slot, at| {
                // SAFETY: as in `bring_gradients`.
                unsafe { std::ptr::copy_nonoverlapping(shadow.as_ptr().add(at), slot.as_mut_ptr(), slot.len()) };
            })?;
        }
        if of_grads.in_memory() {
            of_grads.set_in_memory(false);
            shadow.discard()?;
            self.stats.returned(shadow.len() as u64);
        }
        Ok(())
    }
}

fn no_slot() -> Error {
    Error::new(Code::Stale, "gradients were promised a slot, but there is none.")
}
