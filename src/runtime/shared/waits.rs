//! Waiting: for a change of the machine's state, for a gate, for a stream.

use std::time::Duration;

use crate::{
    device::{DeviceKind, Gate, StreamRef},
    error::{Code, Error, Result},
    runtime::{
        measure::stats::Cause,
        shared::{Shared, closed::closed, lock_order::OrderedGuard, locked::Inner},
    },
};

/// Asked about twenty times a second during a wait; true ends the wait with `FN-E106`.
pub type Interrupted<'a> = &'a mut dyn FnMut() -> bool;

/// How long a thread waits before it looks again whether it was interrupted.
pub(crate) const SLICE: Duration = Duration::from_millis(50);

/// Without any event for this long a wait gives up.
const STUCK_AFTER_SLICES: u32 = if cfg!(test) { 20 } else { 120 * 20 };

impl Shared {
    /// Waits for changes of state until `ready` gives a value; `interrupted` is asked about twenty times a second.
    pub(crate) fn wait<T>(
        &self,
        mut inner: OrderedGuard<'_, Inner>,
        what: &dyn Fn() -> String,
        interrupted: Interrupted<'_>,
        mut ready: impl FnMut(&mut Inner) -> Result<Option<T>>,
    ) -> Result<T> {
        let (mut seen, mut quiet) = (inner.events, 0);
        loop {
            if let Some(value) = ready(&mut inner)? {
                return Ok(value);
            }
            inner.usable()?;
            let timed_out = inner.wait_for(&self.changed, SLICE).timed_out();
            if timed_out {
                quiet = if inner.events == seen { quiet + 1 } else { 0 };
                seen = inner.events;
                if inner.unlocked(&mut *interrupted) {
                    return Err(Error::new(Code::Interrupted, format!("interrupted while waiting for {}.", what())));
                }
                if quiet >= STUCK_AFTER_SLICES && !self.awaits_ranks(&inner) {
                    return Err(Error::new(
                        Code::Stuck,
                        format!(
                            "nothing moved for {:?} while waiting for {}: {}.",
                            SLICE * STUCK_AFTER_SLICES,
                            what(),
                            inner.machine.describe()
                        ),
                    )
                    .action("The kernel log may show a failing drive; start again from the last checkpoint."));
                }
            }
        }
    }

    /// Whether an update cannot go on before another rank does something, for which there is no limit.
    fn awaits_ranks(&self, inner: &Inner) -> bool {
        let made = |unit| inner.machine.awaits_peers(unit);
        self.ranks.as_ref().is_some_and(|ranks| ranks.waits() || self.layout.ids().any(made))
    }

    /// Makes the user's stream wait for a gate; on the host the caller itself waits.
    pub(crate) fn wait_gate(&self, stream: u64, gate: Gate, cause: Cause, interrupted: Interrupted<'_>) -> Result<()> {
        if self.device.kind() == DeviceKind::Host {
            return self.block_gate(Some(stream), gate, cause, interrupted);
        }
        if self.device.passed(gate)? { Ok(()) } else { self.wait_in_order(stream, gate, cause) }
    }

    /// Blocks the caller until the work enqueued on a stream of the user is done: the processor is about to touch what it touches.
    pub(crate) fn block_stream(&self, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        let gate = self.device.record(StreamRef::Compute(stream))?;
        self.block_gate(Some(stream), gate, Cause::Copy, interrupted)
    }

    /// Blocks the caller until a gate has passed.
    pub(crate) fn block_gate(
        &self,
        stream: Option<u64>,
        gate: Gate,
        cause: Cause,
        interrupted: Interrupted<'_>,
    ) -> Result<()> {
        if self.device.passed(gate)? {
            return Ok(());
        }
        let _pause = self.pause(stream, cause);
        let mut slices = 0;
        while !self.device.block(gate, SLICE)? {
            if self.inner.lock().closing {
                return Err(closed());
            }
            if interrupted() {
                return Err(Error::new(Code::Interrupted, format!("interrupted while waiting for {}.", cause.name())));
            }
            slices += 1;
            if slices >= STUCK_AFTER_SLICES {
                let after = SLICE * STUCK_AFTER_SLICES;
                return Err(Error::new(Code::Stuck, format!("a copy did not end for {after:?} ({}).", cause.name()))
                    .action("Check the device with its own tools; start again from the last checkpoint."));
            }
        }
        Ok(())
    }
}
