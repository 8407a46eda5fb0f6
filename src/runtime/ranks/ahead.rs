//! Updates that several ranks begin before their step, each of the elements that it owns, into second places that all have in one region.
//!
//! S1: what is made ahead is the owner's alone until the step: other ranks, and readers on this one, look at homes and at current states. S2: at
//! the step, which begins only when all have posted it, the owner brings its parameters home. They stay there: a reader on any rank needs
//! no other one, and the next update ahead writes nothing that it looks at. S3: states stay where they were made. Whether a unit's change
//! places with a step follows from what the ranks have posted alike: it has second places, and all that is trained of it is stepped. Then
//! each rank makes its part in the other place, also one that has begun nothing ahead. S4: they have changed places for a rank when it knows that all
//! have made their parts. S5: a rank may make its weights first, at home, with what their masters hold beyond them in the other place, and its
//! moments there later: its part of the states is published on its own then.
#![expect(unsafe_code, reason = "hands raw spans of homes and spare copies to the kernel")]

use crate::{
    error::Result,
    optim::Portion,
    quantities::{Tier, UnitId},
    runtime::{
        paging::homes::Set,
        shared::Shared,
        update::job::{Job, Outcome},
    },
};

impl Shared {
    /// Whether the states of a unit change places with its update, on all ranks (S3).
    pub(crate) fn turns(&self, unit: UnitId, job: &Job) -> bool {
        self.ranks.is_some() && self.placement.spare[unit.index()] && job.covers
    }

    /// At the step, which all ranks have posted: brings this rank's part of a unit's parameters home.
    pub(crate) fn bring_own(&self, unit: UnitId) -> Result<()> {
        let job = self.jobs[unit.index()].lock();
        self.copy_parts_home(unit, job.spans.iter().map(|span| (span.section, span.start..span.start + span.len)))
    }

    /// At the step, which all ranks have posted: completes what was begun ahead of this rank's part of a unit, if it is what the step asks for;
    /// else makes the part where the step has it. None if that is in place. The gates of the job have passed.
    pub(crate) fn finish_own(&self, unit: UnitId, job: &mut Job) -> Result<Option<Outcome>> {
        if self.complete_speculation(unit, job, false)? {
            self.copy_parts_home(unit, job.spans.iter().map(|s| (s.section, s.start..s.start + s.len)))?;
            return Ok(Some(Outcome::Ran));
        }
        if self.weights_first(unit) {
            return self.make_weights(unit, job, false).map(Some);
        }
        if !self.turns(unit, job) {
            return Ok(None);
        }
        let mut share = self.share.lock();
        share.clear();
        for span in &job.spans {
            // Both have the parameters at home.
            let (from, to) =
                (self.whole_at(unit, span, Set::Current, false), self.whole_at(unit, span, Set::Spare, true));
            let (from, to) = self.with_held(unit, span, span.start, from, Some(to));
            share.add(from, self.hyper_of(job.hypers[span.hyper]), to, Portion::Whole)?;
        }
        // SAFETY: as for `run_chunk`; the states' other place is this rank's alone until all have made their parts.
        unsafe { self.run_share(&mut share, unit, "adamw") }?;
        Ok(Some(Outcome::Ran))
    }

    /// All ranks have made their parts of a unit's update: its states are where that has put them (S4).
    pub(super) fn turn_places(&self, unit: UnitId) {
        if !self.turns(unit, &self.jobs[unit.index()].lock()) {
            return;
        }
        match (self.placement.homes[unit.index()].optimizer, &self.disk) {
            (Tier::Nvme, Some(disk)) => disk.map.swap(unit),
            _ => self.homes.unit(unit).swap(),
        }
    }
}
