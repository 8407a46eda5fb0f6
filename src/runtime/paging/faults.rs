//! What was brought to shadows because a thread touched them.

use crate::{
    quantities::UnitId,
    runtime::{
        disk::ends::Ends,
        shared::lock_order::{Line, Ordered},
    },
};

/// What was brought because it was touched.
#[derive(Debug)]
pub(crate) struct Faults {
    /// Where reads end.
    pub(crate) reads: Ends,
    /// Digests of the parameters of units that were brought, in the order of the parameters.
    pub(crate) brought: Ordered<Vec<(UnitId, Vec<u64>)>>,
    /// The unit that was taken back last, and how often in a row what was taken back was wanted next.
    pub(crate) returned: Ordered<(Option<UnitId>, u32)>,
}

impl Default for Faults {
    fn default() -> Self {
        let (brought, returned) = (Ordered::new(Line::Moment, Vec::new()), Ordered::new(Line::Moment, (None, 0)));
        Self { reads: Ends::default(), brought, returned }
    }
}

impl Faults {
    /// Removes and returns what is known of a unit that was brought.
    pub(crate) fn take(&self, unit: UnitId) -> Option<Vec<u64>> {
        let mut brought = self.brought.lock();
        let at = brought.iter().position(|(known, _)| *known == unit)?;
        Some(brought.swap_remove(at).1)
    }

    /// How often in a row a unit was wanted that had just been taken back, this time included.
    pub(crate) fn times_in_a_row(&self, unit: UnitId) -> u32 {
        let mut returned = self.returned.lock();
        returned.1 = if returned.0 == Some(unit) { returned.1 + 1 } else { 0 };
        returned.1
    }
}
