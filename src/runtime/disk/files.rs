//! The disk side of a runtime: the store, what lies where in it, and the slots that bytes pass through.

use crate::{memory::SlotPool, runtime::disk::map::Map, store::Store};

/// The disk side of a runtime.
pub(crate) struct Disk {
    pub(crate) store: Store,
    pub(crate) map: Map,
    pub(crate) page_pool: Option<SlotPool>,
    pub(crate) update_pool: SlotPool,
}

impl Disk {
    pub(crate) fn staging_bytes(&self) -> u64 {
        let page = self.page_pool.as_ref().map_or(0, |p| p.region().len());
        (page + self.update_pool.region().len()) as u64
    }
}
