//! Host memory that is taken while a model runs, out of what `budget.host` leaves.

use std::sync::Arc;

use crate::{
    error::{Code, Error, Result},
    memory::HostRegion,
    quantities::ByteCount,
    runtime::shared::Shared,
};

impl Shared {
    /// Counts memory for what is read outside of steps against what `budget.host` leaves.
    pub(crate) fn lend(&self, bytes: u64, what: &str) -> Result<()> {
        if self.stats.lent(bytes, self.placement.shadow_bytes) {
            return Ok(());
        }
        Err(Error::new(
            Code::ReadBudget,
            format!(
                "reading {what} outside of a step needs {} of host memory; the budget leaves {}, of which {} are taken by other such reads.",
                ByteCount(bytes),
                ByteCount(self.placement.shadow_bytes),
                ByteCount(self.stats.shadows().0)
            ),
        )
        .action("Raise budget.host, drop tensors read earlier, or keep what is read in host memory (params.tier)."))
    }

    /// Host memory for activations, out of what `budget.host` leaves; never given back.
    pub(crate) fn activation_region(&self, least: u64, wanted: u64) -> Result<Arc<HostRegion>> {
        // One unit that lives on NVMe can always be read.
        let reads = self.placement.widest_on_nvme(&self.layout);
        // Each of several ranks has inputs of its own.
        let ranks = self.ranks.as_ref().map_or(1, |ranks| ranks.spec.size as u64);
        let limit = self.placement.shadow_bytes.saturating_sub(reads) / ranks;
        let (taken, _) = self.stats.shadows();
        let bytes = wanted.min(limit.saturating_sub(taken)).max(least);
        if !self.stats.lent(bytes, limit) {
            return Err(Error::new(
                Code::HostBudget,
                format!(
                    "a block's input of {} is to wait in host memory; budget.host leaves {}{}, and {} of it are taken \
                     by such inputs and by reads outside of steps.",
                    ByteCount(least),
                    ByteCount(limit),
                    if ranks > 1 { " to each rank" } else { "" },
                    ByteCount(taken)
                ),
            )
            .action(
                "Raise budget.host, put more on disk (optimizer.tier = \"nvme\"), or set activations.tier = \"hbm\".",
            ));
        }
        let made = HostRegion::new(ByteCount(bytes), "activations");
        let made = made.and_then(|region| self.device.register(&region).map(|()| region));
        if made.is_err() {
            self.stats.returned(bytes);
        }
        made
    }
}
