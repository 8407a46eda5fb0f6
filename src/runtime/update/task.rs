//! What the machine asks of the runner.

use crate::{memory::SlotLease, quantities::UnitId};

/// What the machine asks of the runner.
#[derive(Debug)]
pub(crate) enum Task {
    /// A piece of an update.
    Update { unit: UnitId, chunk: u32, lease: Option<SlotLease> },
    /// To update the states of a unit whose weights are updated.
    States(UnitId),
    /// To find out whether a step asks for what was begun ahead.
    Decide(UnitId),
    /// To bring this rank's parameters, updated ahead, home, once all ranks have taken the step.
    Own(UnitId),
    /// To copy parameters from the spare copy to their home.
    Home(UnitId),
}
