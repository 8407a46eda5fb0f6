//! The memory that a save or a load may take.

use crate::{
    checkpoint::FrameBudget,
    error::{Code, Error, Result},
    io::EngineOptions,
    quantities::ByteCount,
    runtime::shared::Shared,
    schedule::placement::{SAVE_FRAME, SAVE_FRAMES, SMALLEST_SAVE_FRAME},
};

/// How a save or a load works within `slack` bytes of memory: half of it at most, so that reads outside of steps find some too.
pub(super) fn frame_budget(slack: u64, io: &(EngineOptions, bool)) -> Result<FrameBudget> {
    let frame = (slack / 2 / u64::from(SAVE_FRAMES)).min(SAVE_FRAME) / 4096 * 4096;
    if frame < SMALLEST_SAVE_FRAME {
        let need = ByteCount(2 * u64::from(SAVE_FRAMES) * SMALLEST_SAVE_FRAME);
        let text = format!("a save or load needs {need} of host memory, {} are left of budget.host.", ByteCount(slack));
        return Err(Error::new(Code::CheckpointMemory, text).action("Raise budget.host by that much."));
    }
    Ok(FrameBudget { engine: io.0.clone(), direct: io.1, frames: SAVE_FRAMES, frame })
}

impl Shared {
    /// What is left of the host budget now, of which each of several ranks has its share: all of them load.
    fn host_left(&self) -> u64 {
        let ranks = self.ranks.as_ref().map_or(1, |ranks| ranks.spec.size as u64);
        (self.placement.shadow_bytes / ranks).saturating_sub(self.stats.shadows().0)
    }

    /// How many chunks a save reads ahead, or a load writes behind, and their bytes.
    pub(crate) fn chunks_kept(&self) -> (u64, u64) {
        let Some(disk) = &self.disk else { return (0, 0) };
        let chunks = self.placement.chunks_ahead(self.host_left());
        (chunks, chunks * disk.store.chunk_bytes())
    }

    /// How a save or a load works within what is left of the host budget, its frames and `more` bytes counted there; to be given back
    /// with [`crate::runtime::measure::stats::Stats::returned`].
    pub(crate) fn frame_budget(&self, more: u64) -> Result<FrameBudget> {
        let found = frame_budget(self.host_left().saturating_sub(more), &self.checkpoint_io)?;
        if self.stats.lent(found.bytes() + more, self.placement.shadow_bytes) {
            Ok(found)
        } else {
            frame_budget(0, &self.checkpoint_io)
        }
    }
}
