//! The runtime: one model's memory, threads and state, and the operations that the Python wrapper calls. Here stands each call; what it does
//! stands in the folders.
//!
//! | folder | what it holds |
//! |---|---|
//! | `setup` | the configuration of a run, whether it may begin, how it starts |
//! | `shared` | what the threads share, its locks and their order, waiting, waiting for updates |
//! | `paging` | where parameters live, windows, gradients, shadows, what happens when parameters are touched where they are not |
//! | `update` | AdamW: a step, speculative updates, which part the processor and the lanes do |
//! | `growth` | states in free memory of the compute device |
//! | `ranks` | other ranks of the host: memory that is shared with them, what is posted, waiting for them |
//! | `disk` | the map of the files, requests on their way, the thread that takes completions, I/O that is not part of a step |
//! | `saving` | checkpoints: saving beside training, loading |
//! | `measure` | counters, the time of a step, the trace, slow requests |
//!
//! `handle` has the type [`Runtime`] and its end. A file defines types that `Shared` is made of, or it operates on `Shared`; none does
//! both, so that files import each other in one direction.

pub mod disk;
mod growth;
mod handle;
pub mod measure;
pub mod paging;
mod ranks;
mod saving;
mod setup;
mod shared;
#[cfg(test)]
mod tests;
mod update;

use std::sync::Arc;

pub use growth::{
    asked::give_all,
    record::{Moved, Record, Why},
};
pub use handle::Runtime;
pub(crate) use ranks::shelf::check as check_ranks;
pub use ranks::spec::RankSpec;
pub use saving::{
    restore::{Buffer, Item, aside, read_buffers},
    save::{Place, Source, Unchanged, save_plain},
};
pub use setup::config::Config;
pub use shared::{
    closed::{check_process, closed},
    waits::Interrupted,
};
pub use update::{
    factors::FACTORS_PER_STEP,
    job::{JobSpan, StepHyper, UnitUpdate},
    update_on::{UpdateOn, shares_processor},
};

use crate::{
    device::{Device, Frames},
    dtype::StateKind,
    error::{Error, Result},
    io::Direction,
    memory::HostRegion,
    model::Layout,
    policy::Policy,
    quantities::{ByteCount, Tier, UnitId},
    runtime::{
        disk::files::Disk, measure::stats::Stats, paging::homes::Homes, setup::start::Started, shared::settle::Until,
    },
    schedule::{Phase, Placement, machine::Prefetches},
};

impl Runtime {
    /// Plans, takes memory and disk space, and starts the threads. `freed` bytes of host memory are given back as the model
    /// moves in: its own weights, where they lie there. `ranks`: which of several ranks it is that train the model.
    ///
    /// # Errors
    /// Budgets (`FN-E20x`), device (`FN-E00x`), disk (`FN-E60x`), a trace that cannot be written (`FN-E606`), ranks (`FN-E70x`); nothing is left
    /// behind.
    pub fn open(layout: Layout, policy: &Policy, freed: ByteCount, ranks: Option<RankSpec>) -> Result<Self> {
        if !policy.log.trace_steps.is_empty() {
            let path = std::path::Path::new(&policy.log.trace);
            let of_rank = ranks.map(|ranks| measure::trace_merge::path_of_rank(path, ranks.rank));
            if ranks.is_none_or(|ranks| ranks.rank == 0) {
                measure::trace::check(path)?;
            }
            of_rank.map_or(Ok(()), |path| measure::trace::check(&path))?;
        }
        let Started { shared, threads, budgets, notes, running } = setup::start::start(layout, policy, freed, ranks)?;
        Ok(Self { shared: Some(shared), threads, pid: std::process::id(), budgets, notes, running: Some(running) })
    }

    /// Things worth knowing about how it was set up.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The device at work.
    pub fn device(&self) -> Result<&Arc<dyn Device>> {
        Ok(&self.shared()?.device)
    }

    /// The frames of all units.
    pub fn frames(&self) -> Result<&Arc<dyn Frames>> {
        Ok(&self.shared()?.frames)
    }

    /// How the model is packed.
    pub fn layout(&self) -> Result<&Layout> {
        Ok(&self.shared()?.layout)
    }

    /// Where everything lives.
    pub fn placement(&self) -> Result<&Placement> {
        Ok(&self.shared()?.placement)
    }

    /// Host memory of the model.
    pub fn homes(&self) -> Result<&Homes> {
        Ok(&self.shared()?.homes)
    }

    /// Counters.
    pub fn stats(&self) -> Result<&Stats> {
        Ok(&self.shared()?.stats)
    }

    /// How openings went.
    pub fn prefetches(&self) -> Result<Prefetches> {
        Ok(self.shared()?.inner.lock().machine.prefetches())
    }

    /// Name of the I/O engine at work, if there is a disk.
    pub fn engine_name(&self) -> Result<Option<&'static str>> {
        Ok(self.shared()?.disk.as_ref().map(|d| d.store.engine().kind().name()))
    }

    /// Which of several ranks this is.
    pub fn rank(&self) -> Result<Option<RankSpec>> {
        Ok(self.shared()?.ranks.as_ref().map(|ranks| ranks.spec))
    }

    /// Threads of the update pool.
    pub fn pool_threads(&self) -> Result<usize> {
        Ok(self.shared()?.pool.threads())
    }

    /// Opens a window on `stream`: true if the frames may be used, false if the home must be.
    ///
    /// # Errors
    /// The runtime's first failure, or an interruption; the window is not open then.
    pub fn open_window(
        &self,
        unit: UnitId,
        phase: impl Into<Option<Phase>>,
        stream: u64,
        interrupted: Interrupted<'_>,
    ) -> Result<bool> {
        self.shared()?.open_window(unit, phase.into(), stream, interrupted)
    }

    /// Ends a window. Under `debug.sync` waits for its kernels; interrupted there, it has ended all the same.
    ///
    /// # Errors
    /// The runtime's first failure, or an interruption.
    pub fn release(&self, unit: UnitId, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        self.shared()?.end_window(unit, stream, interrupted)
    }

    /// The home was edited by work enqueued on `stream`: the frames are out of date.
    ///
    /// # Errors
    /// The runtime's first failure.
    pub fn invalidate(&self, unit: UnitId, stream: u64) -> Result<()> {
        self.shared()?.invalidate(unit, stream)
    }

    /// Brings edits made inside a window home.
    ///
    /// # Errors
    /// The runtime's first failure, or an interruption.
    pub fn write_back(&self, unit: UnitId, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        self.shared()?.write_back(unit, stream, interrupted)
    }

    /// Copies a gradient down to byte `offset` of the unit's gradient segment, after the work on `stream`. The source must
    /// stay untouched until [`Runtime::landed`] says so of the number returned. Without `keep` nothing else of the segment is worth keeping.
    ///
    /// # Errors
    /// The runtime's first failure, or an interruption.
    ///
    /// # Safety
    /// `src` must be a valid address of `len` bytes on the device.
    #[expect(unsafe_code, reason = "the caller vouches for a raw address")]
    pub unsafe fn gradient(
        &self,
        unit: UnitId,
        (offset, keep): (u64, bool),
        src: u64,
        len: u64,
        stream: u64,
        interrupted: Interrupted<'_>,
    ) -> Result<u64> {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.shared()?.gradient(unit, (offset, keep), src, len, stream, interrupted) }
    }

    /// True if the gradient copy of that number is over.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn landed(&self, seq: u64) -> Result<bool> {
        self.shared()?.landed(seq)
    }

    /// Makes `stream` (on the host: the caller) wait for the gradient copy of that number.
    ///
    /// # Errors
    /// A failure of the device, or an interruption.
    pub fn wait_landed(&self, seq: u64, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        self.shared()?.wait_landed(seq, stream, interrupted)
    }

    /// Makes `stream` (on the host: the caller) wait for all gradient copies so far.
    ///
    /// # Errors
    /// A failure of the device, or an interruption.
    pub fn wait_gradients(&self, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        self.shared()?.wait_gradients(stream, interrupted)
    }

    /// Copies a gradient that lies in the unit's segment up to `dst`, beside the work on `stream` and in its order; returns the number of
    /// the copy.
    ///
    /// # Errors
    /// The runtime's first failure.
    ///
    /// # Safety
    /// `dst` must be valid for `len` bytes on the device, and no other code touches them until [`Runtime::wait_up`] has returned and
    /// `stream` has come to it.
    #[expect(unsafe_code, reason = "the caller vouches for a raw address")]
    pub unsafe fn gradient_up(&self, unit: UnitId, offset: u64, dst: u64, len: u64, stream: u64) -> Result<u64> {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.shared()?.gradient_up(unit, offset, dst, len, stream) }
    }

    /// Makes `stream` (on the host: the caller) wait for the copy up of that number, or for all that there are.
    ///
    /// # Errors
    /// A failure of the device, or an interruption.
    pub fn wait_up(&self, seq: Option<u64>, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        self.shared()?.wait_up(seq, stream, interrupted)
    }

    /// Whether gradients that a backward adds to are to be brought up for it: where it would reach their places over a link.
    ///
    /// # Errors
    /// When closed.
    pub fn brings_sums_up(&self) -> Result<bool> {
        let shared = self.shared()?;
        Ok(shared.slow.sums_up || !shares_processor(shared.device.kind()))
    }

    /// True until the unit's last update is made as a whole: it has read its gradients.
    ///
    /// # Errors
    /// In a forked child, or when closed.
    pub fn update_unmade(&self, unit: UnitId) -> Result<bool> {
        Ok(self.shared()?.inner.lock().machine.update_unmade(unit))
    }

    /// Waits until the unit's home is current, also for `stream`. Once the caller has seen the runtime's failure, until nothing
    /// writes to it any more: homes in host memory stay readable, each element as before or as after the last step.
    ///
    /// # Errors
    /// The runtime's first failure, or an interruption.
    pub fn settle(&self, unit: UnitId, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        self.shared()?.settle_for(unit, stream, interrupted)
    }

    /// Waits until no update is under way and all homes are current.
    ///
    /// # Errors
    /// The runtime's first failure, or an interruption.
    pub fn settle_all(&self, interrupted: Interrupted<'_>) -> Result<()> {
        self.shared()?.settle_all(None, Until::Whole, interrupted)
    }

    /// Waits until the unit's last update is made as a whole: its inputs may change, its states be read. The home may be older. Once the
    /// caller has seen the runtime's failure, until nothing is made of it any more.
    ///
    /// # Errors
    /// The runtime's first failure, or an interruption.
    pub fn settle_update(&self, unit: UnitId, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        self.shared()?.settle_made(unit, stream, interrupted)
    }

    /// Reads parameters that live on NVMe into their shadow, for `stream`; nothing to do for others.
    ///
    /// # Errors
    /// `FN-E205` when the host budget has no room, `FN-E301` and `FN-E302` from the disk.
    pub fn fault_in(&self, unit: UnitId, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        self.shared()?.fault_in(unit, stream, interrupted)
    }

    /// Makes the shadow writable for its first contents.
    ///
    /// # Errors
    /// `FN-E204` when the system refuses memory.
    pub fn blank_shadow(&self, unit: UnitId) -> Result<()> {
        self.shared()?.blank_shadow(unit)
    }

    /// Stores a shadow's contents, as they are after the work on `stream`.
    ///
    /// # Errors
    /// From the disk.
    pub fn store_shadow(&self, unit: UnitId, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        let shared = self.shared()?;
        shared.block_stream(stream, interrupted)?;
        shared.store_shadow(unit, interrupted)
    }

    /// Reads a filled shadow anew, in place, once the work on `stream` no longer looks at it.
    ///
    /// # Errors
    /// From the disk.
    pub fn refresh_shadow(&self, unit: UnitId, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        let shared = self.shared()?;
        shared.block_stream(stream, interrupted)?;
        shared.refresh_shadow(unit, stream, interrupted)
    }

    /// Counts memory of the caller that holds what was read, with that of the shadows.
    ///
    /// # Errors
    /// `FN-E205` when the host budget has no room.
    pub fn lend(&self, bytes: u64) -> Result<()> {
        self.shared()?.lend(bytes, "optimizer states")
    }

    /// The caller has dropped that memory.
    ///
    /// # Errors
    /// When closed.
    pub fn returned(&self, bytes: u64) -> Result<()> {
        let stats = &self.shared()?.stats;
        if bytes > stats.shadows().0 {
            return Err(Error::argument(format!("{bytes} bytes were given back, and fewer are lent.")));
        }
        stats.returned(bytes);
        Ok(())
    }

    /// Gives a shadow's memory back.
    ///
    /// # Errors
    /// `FN-E204` when the system refuses.
    pub fn discard_shadow(&self, unit: UnitId) -> Result<()> {
        self.shared()?.discard_shadow(unit)
    }

    /// Copies optimizer state to or from the caller's memory.
    ///
    /// # Errors
    /// The runtime's first failure, or from the disk.
    ///
    /// # Safety
    /// `buffer` must be valid for the bytes of `elems` of that kind.
    #[expect(unsafe_code, reason = "the caller vouches for a raw address")]
    pub unsafe fn state_io(
        &self,
        place: (UnitId, usize, StateKind),
        elems: std::ops::Range<u64>,
        buffer: *mut u8,
        direction: Direction,
        interrupted: Interrupted<'_>,
    ) -> Result<()> {
        let (unit, section, kind) = place;
        // SAFETY: the caller's promise is passed on.
        unsafe { self.shared()?.state_io(unit, section, kind, elems, buffer, direction, interrupted) }
    }

    /// What the policy allows in a tier; none where it sets no bound.
    ///
    /// # Errors
    /// When closed.
    pub fn limit(&self, tier: Tier) -> Result<Option<u64>> {
        let shared = self.shared()?;
        Ok(match tier {
            Tier::Hbm => self.budgets.hbm.map(|b| b.0 + shared.growing.bytes().1),
            Tier::Host => Some(self.budgets.host.0),
            Tier::Nvme => Some(self.budgets.nvme.0).filter(|&b| b != u64::MAX),
        })
    }

    /// Bytes in use by tier: frames, host memory with filled shadows, files.
    ///
    /// # Errors
    /// When closed.
    pub fn used(&self, tier: Tier) -> Result<(u64, u64)> {
        let shared = self.shared()?;
        let plan = &shared.placement;
        Ok(match tier {
            Tier::Hbm => {
                let (taken, peak) = shared.growing.bytes();
                (plan.hbm_bytes + taken, plan.hbm_bytes + peak)
            }
            Tier::Host => {
                let staging = shared.disk.as_ref().map_or(0, Disk::staging_bytes);
                let (now, peak) = shared.stats.shadows();
                // Without a bound of its own the compute tier is the host's memory.
                let compute = if self.budgets.hbm.is_none() { plan.hbm_bytes } else { 0 };
                let fixed = shared.homes.bytes() + staging + compute;
                (fixed + now, fixed + peak)
            }
            Tier::Nvme => {
                let bytes = shared.disk.as_ref().map_or(0, |d| d.store.reserved().0);
                (bytes, bytes)
            }
        })
    }

    /// Page-locks host memory for activations: `wanted` bytes, or `least` where the budget has no room for more. It stays
    /// until the runtime is closed.
    ///
    /// # Errors
    /// `FN-E202` when `budget.host` has no room, `FN-E204` when the system refuses.
    pub fn activation_region(&self, least: u64, wanted: u64) -> Result<Arc<HostRegion>> {
        self.shared()?.activation_region(least, wanted)
    }
}
