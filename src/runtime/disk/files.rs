//! The disk side of a runtime: the store, what lies where in it, and the slots that bytes pass through.

use crate::{memory::SlotPool, runtime::disk::map::Map, store::Store};

/// The disk side of a runtime.
pub(crate) struct Disk {
    pub(crate) store: Store,
    pub(crate) map: Map,
    pub(crate) page_pool: Option<SlotPool>,
    pub(crate) update_pool: SlotPool,
    /// Where gradients are gathered on their way to NVMe.
    pub(crate) grad_pool: Option<SlotPool>,
}

impl Disk {
    pub(crate) fn staging_bytes(&self) -> u64 {
        let pools = [self.page_pool.as_ref(), self.grad_pool.as_ref(), Some(&self.update_pool)];
        pools.into_iter().flatten().map(|pool| pool.region().len() as u64).sum()
    }
}
