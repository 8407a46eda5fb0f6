//! What an optimizer's step asks of a runtime: updates of paged units, at the step or speculatively before it, and of parameters that are not
//! paged.

use crate::{
    device::StreamRef,
    error::Result,
    optim::{Update, adamw_parallel},
    quantities::{Tier, UnitId},
    runtime::{
        handle::Runtime,
        shared::{settle::Until, waits::Interrupted},
        update::{
            job::{StepHyper, UnitUpdate},
            speculation::covers,
            update_on::{UpdateOn, shares_processor},
        },
    },
};

/// A number that tells the updates of parameters that are not paged: other ranks make the same.
fn told(residents: &[Update]) -> u64 {
    let one = |update: &Update| (update.span.len, update.span.dtype, update.span.reset_master, update.hyper);
    let all: Vec<_> = residents.iter().map(one).collect();
    twox_hash::XxHash3_64::oneshot(format!("{all:?}").as_bytes())
}

impl Runtime {
    /// Starts an optimizer step on the given units, after the work on `stream`, and takes it on parameters that are not paged
    /// (`residents`), whose arrays all lie on the compute device. Returns at once; with `wait` only when all updates have run.
    ///
    /// # Errors
    /// The runtime's first failure, or an interruption. Either all units are submitted or none:
    /// [`crate::runtime::measure::stats::Stats::steps`] says which.
    ///
    /// # Safety
    /// For the arrays of `residents`: as for [`crate::optim::adamw_parallel`], until the stream is past this.
    #[expect(unsafe_code, reason = "the caller vouches for raw addresses")]
    pub unsafe fn update(
        &self,
        updates: &[UnitUpdate],
        hypers: &[StepHyper],
        residents: &[Update],
        stream: u64,
        wait: bool,
        interrupted: Interrupted<'_>,
    ) -> Result<()> {
        self.shared()?.grow(interrupted)?;
        let unpaged = if self.shared()?.ranks.is_some() { told(residents) } else { 0 };
        self.shared()?.update(updates, hypers, unpaged, stream, interrupted)?;
        // SAFETY: passed on.
        unsafe { self.update_residents(residents, stream)? };
        for tier in [Tier::Hbm, Tier::Host, Tier::Nvme] {
            self.shared()?.trace.counter(tier.name(), self.used(tier)?.0);
        }
        let until = if self.shared()?.sync { Until::Made } else { Until::Weights };
        let waited = if wait { self.shared()?.settle_all(Some(stream), until, interrupted) } else { Ok(()) };
        self.shared()?.end_step(stream)?;
        waited
    }

    /// Begins a unit's update before its step, from gradients that are enqueued on `stream` or on their way down, where the
    /// unit has a spare copy and all that is trained of it is in the spans; true if it was begun. The step that asks for the same
    /// (see [`UnitUpdate::speculated`]) finds it made; any other step ignores it.
    ///
    /// # Errors
    /// The runtime's first failure.
    pub fn update_speculatively(&self, update: &UnitUpdate, hypers: &[StepHyper], stream: u64) -> Result<bool> {
        let shared = self.shared()?;
        let whole = covers(shared.layout.unit(update.unit), &update.spans);
        if whole { shared.begin_speculation(update, hypers, stream) } else { Ok(false) }
    }

    /// Drops what [`Runtime::update_speculatively`] began: an input changes.
    ///
    /// # Errors
    /// When closed.
    pub fn drop_speculation(&self, unit: UnitId) -> Result<()> {
        self.shared()?.drop_speculation(unit);
        Ok(())
    }

    /// Who updates from now on, where the policy made lanes of the device; false where it made none. The bits do not depend on it.
    ///
    /// # Errors
    /// When closed.
    pub fn set_update_on(&self, update_on: UpdateOn) -> Result<bool> {
        Ok(self.shared()?.share.lock().set_update_on(update_on))
    }

    /// Brings a factor of gradients down, an fp32 value on the device, after the work on `stream`; returns the slot that
    /// [`StepHyper::clip`] names.
    ///
    /// # Errors
    /// A failure of the device.
    ///
    /// # Safety
    /// `src` must be the address of that value, and it must stay as it is until the stream is past this.
    #[expect(unsafe_code, reason = "the caller vouches for a raw address")]
    pub unsafe fn factor(&self, src: u64, stream: u64) -> Result<u32> {
        let shared = self.shared()?;
        // SAFETY: passed on.
        unsafe { shared.factors.bring(&*shared.device, src, stream) }
    }

    /// Updates parameters that are not paged: at once where the compute device is the processor, else in the order of `stream`.
    ///
    /// # Safety
    /// As for [`Runtime::update`].
    #[expect(unsafe_code, reason = "the caller vouches for raw addresses")]
    unsafe fn update_residents(&self, updates: &[Update], stream: u64) -> Result<()> {
        let shared = self.shared()?;
        if shares_processor(shared.device.kind()) {
            // SAFETY: passed on.
            return unsafe { adamw_parallel(&shared.pool, updates) };
        }
        for update in updates {
            // SAFETY: passed on.
            unsafe { shared.device.adamw(StreamRef::Compute(stream), &update.span, &update.hyper)? };
        }
        Ok(())
    }
}
