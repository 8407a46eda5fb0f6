//! Sums of gradients on their way up: where a backward adds to gradients that lie in host memory, they are brought to the device beside its
//! computations. The sum takes the way of any new gradient.
#![expect(unsafe_code, reason = "enqueues copies from raw addresses that the caller vouches for")]

use crate::{
    device::{Gate, Role, StreamRef},
    error::{Error, Result},
    quantities::UnitId,
    runtime::{
        measure::stats::Cause,
        paging::landing::{Ended, Landing},
        shared::{Shared, waits::Interrupted},
    },
};

impl Shared {
    /// Copies `len` bytes at byte `offset` of the unit's gradient segment to `dst` on the device, after the work on `stream` and the
    /// gradients that are on their way down; returns the number of the copy.
    ///
    /// # Safety
    /// `dst` must be valid for `len` bytes on the device, and no other code touches them until the copy is over.
    pub(crate) unsafe fn gradient_up(&self, unit: UnitId, offset: u64, dst: u64, len: u64, stream: u64) -> Result<u64> {
        let home = self.homes.unit(unit).grads;
        if home == 0 || offset.checked_add(len).is_none_or(|end| end > self.layout.unit(unit).grad_bytes()) {
            return Err(Error::argument(format!("'{}' has no such gradient.", self.layout.unit(unit).name)));
        }
        let inner = self.lock()?;
        let free = self.device.record(StreamRef::Compute(stream))?;
        self.device.wait(StreamRef::Up, free)?;
        self.device.wait(StreamRef::Up, inner.last_down)?;
        let before = self.mark(StreamRef::Up);
        // SAFETY: the destination is the caller's promise; the source is inside the gradient segment: what was written there before is
        // waited for, and what comes next waits for the compute stream, which waits for this copy before it has a new gradient.
        unsafe { self.device.copy(StreamRef::Up, dst, home + offset, len as usize)? };
        let marks = (before, self.mark(StreamRef::Up));
        let gate = self.device.record(StreamRef::Up)?;
        self.send(&self.to_up, Ended::Copy(Landing { gate, unit, lease: None, marks, bytes: len }))?;
        Ok(gate.seq)
    }

    /// Makes `stream` (on the host: the caller) wait for the copy up of that number, or for all that there are.
    pub(crate) fn wait_up(&self, seq: Option<u64>, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        let gate = match seq {
            Some(seq) => Gate { role: Role::Up, seq },
            None => self.device.record(StreamRef::Up)?,
        };
        self.wait_gate(stream, gate, Cause::Copy, interrupted)
    }
}
