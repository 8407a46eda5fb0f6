//! A step of several ranks: each submits it as one rank would, for the elements that it owns; a piece begins when all have posted the same step and
//! are quiet, and a unit's update is over when all have made their parts.

use std::time::Duration;

use twox_hash::XxHash3_64;

use crate::{
    device::Gate,
    error::Result,
    model::Unit,
    quantities::UnitId,
    runtime::{
        measure::stats::Cause,
        ranks::{
            spec::RankSpec,
            together::{Made, Posted, Ranks},
            waits::Seen,
        },
        shared::{
            Shared,
            locked::Inner,
            waits::{Interrupted, SLICE},
        },
        update::job::{JobSpan, StepHyper, UnitUpdate},
    },
    schedule::ranks::{
        owned::owned,
        posts::{Line, Look, STEP_PARTS},
    },
};

/// What a step consists of, as it is compared.
const PARTS: [&str; STEP_PARTS] = [
    "the units that they step",
    "the parameters that have gradients, or were edited",
    "the hyperparameters",
    "which gradients are clipped",
    "the parameters that are not paged",
];

/// Numbers that tell a step from any other.
fn parts(updates: &[UnitUpdate], hypers: &[StepHyper], unpaged: u64) -> [u64; STEP_PARTS] {
    let digest = |words: Vec<u64>| {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        XxHash3_64::oneshot(&bytes)
    };
    let span = |s: &JobSpan| [s.section as u64, s.start, s.len, s.hyper as u64, u64::from(s.reset_master)];
    [
        digest(updates.iter().map(|u| u64::from(u.unit.0)).collect()),
        digest(updates.iter().flat_map(|u| u.spans.iter().flat_map(span)).collect()),
        XxHash3_64::oneshot(format!("{:?}", hypers.iter().map(|h| h.hyper).collect::<Vec<_>>()).as_bytes()),
        digest(hypers.iter().map(|h| u64::from(h.clip.is_some())).collect()),
        unpaged,
    ]
}

impl Ranks {
    /// The parts of spans that this rank owns, of a unit whose blocks of so many elements have one owner each.
    pub(crate) fn own<'a>(
        &self,
        unit: &'a Unit,
        block: u64,
        spans: &'a [JobSpan],
    ) -> impl Iterator<Item = JobSpan> + 'a {
        let RankSpec { rank, size, .. } = self.spec;
        spans.iter().filter_map(move |span| {
            let part = owned(unit.sections[span.section].elems, block, rank, size);
            let (start, end) = (span.start.max(part.start), (span.start + span.len).min(part.end));
            (start < end).then(|| JobSpan { start, len: end - start, ..*span })
        })
    }

    /// Posts a step, whose gates are these; returns its number.
    pub(crate) fn post_step(
        &self,
        updates: &[UnitUpdate],
        hypers: &[StepHyper],
        unpaged: u64,
        gates: [Gate; 3],
    ) -> u64 {
        let posts = self.posts();
        let step = posts.count(Line::Steps) + 1;
        let factors = hypers.iter().filter_map(|hyper| hyper.clip).collect();
        self.posted.lock().push_back(Posted { step, gates, factors });
        posts.post(Line::Steps, &parts(updates, hypers, unpaged));
        self.words.ring();
        step
    }

    /// Whether all ranks have posted the last step that this one has, which is when it may post the next.
    pub(crate) fn agreed(&self) -> Result<Seen<()>> {
        let posts = self.posts();
        match posts.count(Line::Steps) {
            0 => Ok(Seen::Done(())),
            step => self.seen(posts.look(Line::Steps, step), step),
        }
    }

    fn seen(&self, look: Look, step: u64) -> Result<Seen<()>> {
        match look {
            Look::All => Ok(Seen::Done(())),
            Look::Waits(rank) => Ok(Seen::Waits(rank)),
            Look::Differs(rank, part) => Err(self.differs(rank, &format!("in step {step}, {}", PARTS[part]))),
        }
    }

    /// Whether a piece of a unit's update may begin, of a step.
    fn may_update(&self, unit: UnitId, step: u64) -> Result<Seen<()>> {
        let posts = self.posts();
        match self.seen(posts.look(Line::Steps, step), step)? {
            Seen::Done(()) => match posts.look(Line::Quiet, step) {
                Look::Differs(rank, _) => Err(self.differs(rank, &format!("in step {step}, the factor of clipping"))),
                Look::All => Ok(posts.read_by(unit.index(), step).map_or(Seen::Done(()), Seen::Waits)),
                look => self.seen(look, step),
            },
            waits => Ok(waits),
        }
    }
}

impl Shared {
    /// Waits until the last step of this rank has been posted by all.
    pub(crate) fn await_agreement(&self, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        let Some(ranks) = &self.ranks else { return Ok(()) };
        let _pause = self.pause(Some(stream), Cause::PeersStep);
        self.await_ranks(ranks, ("its last step", None), interrupted, || ranks.agreed())
    }

    /// Whether another step may be posted.
    pub(crate) fn agreed(&self) -> bool {
        self.ranks.as_ref().is_none_or(|ranks| matches!(ranks.agreed(), Ok(Seen::Done(()))))
    }

    /// Waits until all ranks have posted the step that a unit's update belongs to, and are quiet, and no save of theirs has yet to read the unit;
    /// returns the step's number.
    pub(crate) fn await_quiet(&self, unit: UnitId) -> Result<u64> {
        let Some(ranks) = &self.ranks else { return Ok(0) };
        let step = self.jobs[unit.index()].lock().step;
        self.be_quiet(ranks, step)?;
        let what = format!("step {step}");
        self.await_ranks(ranks, (&what, None), &mut || false, || {
            let seen = ranks.may_update(unit, step)?;
            // Who waits for the update waits for other ranks from now on, or no more.
            self.changed.notify_all();
            Ok(seen)
        })?;
        Ok(step)
    }

    /// Whether a unit's update, whose gates have passed, need not wait for other ranks; true where there is an error, which who waits finds.
    pub(crate) fn is_quiet(&self, unit: UnitId) -> Result<bool> {
        let Some(ranks) = &self.ranks else { return Ok(true) };
        let step = self.jobs[unit.index()].lock().step;
        self.be_quiet(ranks, step)?;
        Ok(!matches!(ranks.may_update(unit, step), Ok(Seen::Waits(_))))
    }

    /// Tells the others that this rank is quiet, for all steps up to this one.
    fn be_quiet(&self, ranks: &Ranks, step: u64) -> Result<()> {
        loop {
            // Only this thread takes any out.
            let Some(gates) = ranks.posted.lock().front().filter(|p| p.step <= step).map(|p| p.gates) else {
                return Ok(());
            };
            for gate in gates {
                while !self.device.block(gate, Duration::from_millis(100))? {
                    drop(self.lock()?);
                }
            }
            let Some(posted) = ranks.posted.lock().pop_front() else { return Ok(()) };
            let bytes: Vec<u8> =
                posted.factors.iter().flat_map(|&slot| self.factors.value(slot).to_le_bytes()).collect();
            ranks.posts().post(Line::Quiet, &[XxHash3_64::oneshot(&bytes)]);
            ranks.words.ring();
        }
    }

    /// This rank's slices of a unit's gradients are in the segment.
    pub(crate) fn slices_landed(&self, unit: UnitId, post: u64) {
        let Some(ranks) = &self.ranks else { return };
        ranks.posts().land(unit.index(), post);
        ranks.words.ring();
    }

    /// Publishes that this rank's part of a unit's weights is made, if it is, and of its states too, unless they trail or are on their way to
    /// NVMe: under the lock under which the machine was told, so that a runtime that ends has done both or neither.
    pub(crate) fn publish(&self, inner: &Inner, unit: UnitId, step: u64) {
        let Some(ranks) = self.ranks.as_ref().filter(|_| inner.machine.own_weights_made(unit)) else { return };
        // First, so that the watcher finds it once all have published.
        ranks.made.lock().push(Made { unit, step, told: false });
        if inner.machine.own_part_stored(unit) {
            ranks.posts().publish_states(unit.index(), step);
        }
        ranks.posts().publish(unit.index(), step);
        ranks.words.ring();
    }

    /// Publishes that this rank's part of a unit's states is on NVMe, if it is, under the same lock.
    pub(crate) fn publish_stored(&self, inner: &Inner, unit: UnitId) {
        let Some(ranks) = self.ranks.as_ref().filter(|_| inner.machine.own_part_stored(unit)) else { return };
        let step = ranks.made.lock().iter().find(|made| made.unit == unit).map(|made| made.step);
        if let Some(step) = step {
            ranks.posts().publish_states(unit.index(), step);
            ranks.words.ring();
        }
    }

    /// Publishes that this rank's part of a unit's states is made, under the same lock.
    pub(crate) fn publish_states(&self, unit: UnitId, step: u64) {
        let Some(ranks) = &self.ranks else { return };
        ranks.posts().publish_states(unit.index(), step);
        ranks.words.ring();
    }

    /// Makes what is left of this rank's parts, if no other rank is in the way: they need them. For the end of a runtime.
    pub(crate) fn finish_parts(&self) {
        let Some(ranks) = &self.ranks else { return };
        let mut inner = self.inner.lock();
        loop {
            let posts = ranks.posts();
            let waits = posts.may_begin(posts.count(Line::Steps)) != Look::All;
            let machine = &inner.machine;
            let makes = |unit| machine.reads_gradients(unit) && !machine.awaits_peers(unit);
            let stores = |unit| machine.awaits_peers(unit) && !machine.own_part_stored(unit);
            let left = |unit| makes(unit) || stores(unit);
            if inner.failed.is_some()
                || inner.closing
                || !self.layout.ids().any(|unit| if waits { stores(unit) } else { left(unit) })
            {
                return;
            }
            inner.wait_for(&self.changed, SLICE);
        }
    }

    /// Tells the machine of weights and of states that all ranks have made their parts of.
    pub(crate) fn end_updates(&self, ranks: &Ranks) -> Result<()> {
        let units: Vec<Made> = ranks.made.lock().clone();
        for made @ Made { unit, step, told } in units {
            let posts = ranks.posts();
            let all_have = |lacking: &dyn Fn() -> Option<usize>| match lacking() {
                None => Ok(true),
                Some(rank) => {
                    let what = format!("the update of '{}'", self.layout.unit(unit).name);
                    match ranks.closed(rank, &what) {
                        Some(error) if lacking().is_some() => Err(error),
                        _ => Ok(false),
                    }
                }
            };
            if !told {
                if !all_have(&|| posts.unpublished(unit.index(), step))? {
                    continue;
                }
                ranks.made.lock().iter_mut().filter(|m| **m == made).for_each(|m| m.told = true);
                self.event(|m, out| m.peers_done(unit, out))?;
            }
            if !all_have(&|| posts.unmade(unit.index(), step))? {
                continue;
            }
            ranks.made.lock().retain(|m| (m.unit, m.step) != (unit, step));
            let mut inner = self.lock()?;
            self.turn_places(unit);
            self.apply_event(&mut inner, |m, out| m.peers_made(unit, out))?;
            self.updated(&inner, unit);
        }
        Ok(())
    }
}
