//! Messages to the reapers: copies under way, and steps.

use crate::{
    device::{Gate, Mark},
    memory::SlotLease,
    quantities::UnitId,
};

/// A copy whose end a reaper waits for.
#[derive(Debug)]
pub(crate) struct Landing {
    pub(crate) gate: Gate,
    pub(crate) unit: UnitId,
    pub(crate) lease: Option<SlotLease>,
    /// Before and after it, on its stream.
    pub(crate) marks: (Mark, Mark),
    pub(crate) bytes: u64,
}

/// What a reaper waits for next, in the order of its stream.
#[derive(Debug)]
pub(crate) enum Ended {
    /// A copy.
    Copy(Landing),
    /// A step on the compute stream, and when it ended if that is known.
    Step { gate: Gate, at: Option<u64> },
    /// The last copy into a unit's gradient slot.
    Grads { unit: UnitId, gate: Gate },
    /// The last copy of this rank's slices of a unit's gradients, of that post.
    Slices { unit: UnitId, post: u64, gate: Gate },
}
