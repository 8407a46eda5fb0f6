//! Gradients on their way down.
#![expect(unsafe_code, reason = "enqueues copies from raw addresses that the caller vouches for")]

use crate::{
    device::{Gate, Role, StreamRef},
    error::{Code, Error, Result},
    quantities::UnitId,
    runtime::{
        measure::stats::Cause,
        paging::landing::{Ended, Landing},
        shared::{Shared, settle::Until, waits::Interrupted},
    },
};

impl Shared {
    /// Copies a gradient down to byte `offset` of the unit's gradient segment, after the work on `stream`; returns the number of the copy.
    /// Without `keep` the rest of the segment is worth nothing.
    ///
    /// # Safety
    /// `src` must be a valid address of `len` bytes on the device, and the bytes must stay as they are until the copy is over.
    pub(crate) unsafe fn gradient(
        &self,
        unit: UnitId,
        (offset, keep): (u64, bool),
        src: u64,
        len: u64,
        stream: u64,
        interrupted: Interrupted<'_>,
    ) -> Result<u64> {
        self.wait_for_update(unit, Some(stream), Until::Read, interrupted)?;
        self.drop_speculation(unit);
        if self.homes.unit(unit).grads == 0
            || offset.checked_add(len).is_none_or(|end| end > self.layout.unit(unit).grad_bytes())
        {
            return Err(Error::argument(format!("'{}' has no such gradient.", self.layout.unit(unit).name)));
        }
        let (mut inner, home) = self.gradient_place(unit, len, keep, stream, interrupted)?;
        let gate = self.device.record(StreamRef::Compute(stream))?;
        self.device.wait(StreamRef::Down, gate)?;
        let before = self.mark(StreamRef::Down);
        for _ in 0..self.slow.down {
            // SAFETY: the source is the caller's promise; the destination is inside the gradient segment, whose update is
            // over, or inside the unit's slot, which is its own until it is flushed.
            unsafe { self.device.copy(StreamRef::Down, home + offset, src, len as usize)? };
        }
        let marks = (before, self.mark(StreamRef::Down));
        let gate = self.device.record(StreamRef::Down)?;
        inner.last_down = gate;
        self.send(&self.to_down, Ended::Copy(Landing { gate, unit, lease: None, marks, bytes: len }))?;
        if inner.grad_slots[unit.index()].as_ref().is_some_and(|slot| slot.bytes >= self.trained_bytes(unit)) {
            self.apply_event(&mut inner, |m, out| m.flush_grads(unit, out))?;
        }
        drop(inner);
        if self.sync {
            self.block_gate(Some(stream), gate, Cause::Grads, interrupted)?;
        }
        Ok(gate.seq)
    }

    /// True if the gradient copy of that number is over.
    pub(crate) fn landed(&self, seq: u64) -> Result<bool> {
        self.device.passed(Gate { role: Role::Down, seq }).map_err(|e| unknown_copy(e, seq))
    }

    /// Makes `stream` (on the host: the caller) wait for the gradient copy of that number.
    pub(crate) fn wait_landed(&self, seq: u64, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        self.landed(seq)?;
        self.wait_gate(stream, Gate { role: Role::Down, seq }, Cause::Grads, interrupted)
    }

    /// Makes `stream` (on the host: the caller) wait for all gradient copies so far.
    pub(crate) fn wait_gradients(&self, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        let gate = self.inner.lock().last_down;
        self.wait_gate(stream, gate, Cause::Grads, interrupted)
    }
}

/// What a device says of a gate that it never recorded, for a number that the caller has made up.
fn unknown_copy(error: Error, seq: u64) -> Error {
    if error.code() == Code::Stuck { Error::argument(format!("there is no copy of number {seq}.")) } else { error }
}
