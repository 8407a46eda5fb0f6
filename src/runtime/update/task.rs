//! What the machine asks of the runner.

use crate::{memory::SlotLease, quantities::UnitId};

/// What the machine asks of the runner.
#[derive(Debug)]
pub(crate) enum Task {
    /// A piece of an update.
    Update { unit: UnitId, chunk: u32, lease: Option<SlotLease> },
    /// To copy parameters from the spare copy to their home.
    Home(UnitId),
}
