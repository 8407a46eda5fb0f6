//! Updates in two passes: the weights, which the next forward needs, as soon as the step is there; the states beside forward and backward.
//!
//! W1: nothing writes gradients, states or the old weights until the second pass has run; callers wait for it ([`Until::Made`]). W2: both
//! passes have the same inputs, factors of clipping included, and store different arrays. W3: where all that is trained of a unit has a
//! spare copy, the weights go to the other of their two places and the old ones stay until the second pass has read them; else weights and
//! masters are made in place, and the second pass needs neither. W4: among several ranks weights are made at home, and where a unit's states
//! change places with its update, both passes make what they make of the states in the other place.
//!
//! [`Until::Made`]: crate::runtime::shared::settle::Until::Made
#![expect(unsafe_code, reason = "hands raw spans of homes and spare copies to the kernel")]

use crate::{
    error::{Code, Error, Result},
    optim::{Portion, Target},
    quantities::{Tier, UnitId},
    runtime::{
        paging::homes::Set,
        shared::Shared,
        update::{
            job::{Job, Outcome, Rest, StepHyper},
            update_on::shares_processor,
        },
    },
};

impl Shared {
    /// Whether a unit's weights are to be made first, and its states later.
    pub(crate) fn weights_first(&self, unit: UnitId) -> bool {
        // The second pass reads gradients where the first found them: those on NVMe are gone with its slots. States that have moved up cost
        // host memory nothing.
        let on_host = self.placement.homes[unit.index()].all_in(Tier::Host);
        if !on_host || self.homes.unit(unit).lifted().is_some() {
            return false;
        }
        // Where forward runs on the same cores, the states would only take longer.
        let forced = self.slow.states.is_some();
        forced || (!shares_processor(self.device.kind()) && self.rhythm.lock().weights_first())
    }

    /// Makes the weights of a unit; the gates of the job have passed.
    pub(crate) fn make_weights(&self, unit: UnitId, job: &mut Job, spare: bool) -> Result<Outcome> {
        for hyper in &mut job.hypers {
            // Its slot may have another factor by the time of the second pass.
            *hyper = StepHyper { hyper: self.hyper_of(*hyper), clip: None };
        }
        let packed = self.layout.unit(unit);
        let turned = self.ranks.is_none()
            && self.placement.spare[unit.index()]
            && job.covers
            && packed.sections.iter().all(|s| s.trainable || s.elems == 0);
        let apart = self.ranks.is_some() && self.turns(unit, job);
        if spare && !turned {
            self.copy_home(unit)?;
        }
        let (first, second) =
            if turned { (Portion::Param, Portion::States) } else { (Portion::Weights, Portion::Moments) };
        let spare = spare && turned;
        let mut share = self.share.lock();
        share.clear();
        for span in &job.spans {
            let from = self.whole_at(unit, span, Set::Current, spare);
            // Apart, both sets have the parameters at home.
            let to = (turned || apart).then(|| self.whole_at(unit, span, Set::Spare, spare || apart));
            share.add(from, job.hypers[span.hyper].hyper, to.as_ref().map(Target::in_place), first)?;
        }
        // SAFETY: as for `run_chunk`, in place; in the other place as for `speculate_piece`, but that no copy up reads it any more because
        // the gates of the job have passed.
        unsafe { self.run_share(&mut share, unit, "adamw weights") }?;
        job.rest = Some(Rest { portion: second, spare, apart });
        self.stats.weights_first();
        Ok(Outcome::Weights { turned })
    }

    /// Makes the states of a unit whose weights were made.
    pub(super) fn make_states(&self, unit: UnitId) -> Result<()> {
        let mut job = self.jobs[unit.index()].lock();
        let job = &mut *job;
        let none = || Error::new(Code::Stale, format!("no states of {unit} are left to be made."));
        let Rest { portion, spare, apart } = job.rest.take().ok_or_else(none)?;
        let mut share = self.share.lock();
        share.clear();
        for span in &job.spans {
            let from = self.whole_at(unit, span, Set::Current, spare);
            let to = apart.then(|| self.whole_at(unit, span, Set::Spare, true));
            share.add(from, job.hypers[span.hyper].hyper, to.as_ref().map(Target::in_place), portion)?;
        }
        // SAFETY: gradients, states and the old weights are the runner's alone until the machine hears of the end (W1, R7).
        unsafe { self.run_share(&mut share, unit, "adamw states") }
    }
}
