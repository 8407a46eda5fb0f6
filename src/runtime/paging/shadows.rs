//! Shadows: host memory in which parameters that live on NVMe are read and edited outside of windows.
#![expect(unsafe_code, reason = "copies between slots, shadows and frames")]

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use crate::{
    device::StreamRef,
    dtype::StateKind,
    error::Result,
    io::Direction,
    memory::Shadow,
    quantities::UnitId,
    runtime::{
        measure::stats::Cause,
        saving::copy_on_update::group_of,
        shared::{Shared, waits::Interrupted},
    },
};

/// A counter that is one higher until this is dropped.
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
        pause.change_cause(Cause::NvmeRead);
        self.unit_io(unit, StateKind::Param, Direction::Read, interrupted, &mut |slot, at| {
            // SAFETY: `at` and the length lie in the unit's parameter segment, which the memory covers; a reader
            // of that memory expects the bytes to become the current ones.
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

    /// Gives a shadow memory, for what messages call so.
    pub(super) fn fill_shadow(&self, shadow: &Shadow, what: &str) -> Result<()> {
        let bytes = shadow.len() as u64;
        self.lend(bytes, what)?;
        if let Err(error) = shadow.fill().and_then(|()| self.expose(shadow)) {
            self.stats.returned(bytes);
            shadow.discard()?;
            return Err(error);
        }
        Ok(())
    }

    /// Writes a filled shadow to NVMe: at the start, and after edits.
    pub(crate) fn store_shadow(&self, unit: UnitId, interrupted: Interrupted<'_>) -> Result<()> {
        let Some(shadow) = self.homes.unit(unit).shadow.as_ref().filter(|s| s.filled()) else { return Ok(()) };
        self.begin_write(unit, interrupted)?;
        let base = shadow.as_ptr();
        let written = self.unit_io(unit, StateKind::Param, Direction::Write, &mut || false, &mut |slot, at| {
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
        self.drop_speculation(unit);
        loop {
            self.settle_disk(unit, interrupted)?;
            self.await_read(unit, interrupted)?;
            self.wait(self.lock()?, &what, interrupted, |i| Ok((!i.machine.reading(unit)).then_some(())))?;
            let mut inner = self.lock()?;
            let busy = inner.machine.reading(unit) || inner.machine.unsettled(unit);
            if !busy && !self.saves.needs(group_of(unit)) {
                return self.apply_event(&mut inner, |m, _| m.begin_write(unit));
            }
            // Another thread was faster, or a result is on its way home for a save.
            inner.wait_for(&self.changed, Duration::from_millis(1));
        }
    }

    /// Makes a shadow writable without reading it, for its first contents.
    pub(crate) fn blank_shadow(&self, unit: UnitId) -> Result<()> {
        if let Some(shadow) = self.homes.unit(unit).shadow.as_ref().filter(|s| !s.filled()) {
            self.fill_shadow(shadow, &format!("'{}'", self.layout.unit(unit).name))?;
        }
        Ok(())
    }

    /// The parameters were edited inside their window: brings the frames' bytes home.
    pub(crate) fn write_back(&self, unit: UnitId, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        self.settle(unit, Some(stream), interrupted)?;
        self.await_read(unit, interrupted)?;
        self.drop_speculation(unit);
        let bytes = self.layout.unit(unit).param_bytes() as usize;
        let frame = self.frames.address(unit.index());
        let home = self.homes.unit(unit);
        let looked_at = home.shadow.as_ref().is_some_and(|s| s.filled());
        if home.shadow.is_some() {
            // Everything that may take long comes before the shadow is made: while there is a shadow that no caller has asked for, nothing
            // looks at signals, because a handler might take the shadow for its own.
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
}
