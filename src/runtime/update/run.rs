//! Submitting the updates of a step, and the kernel over one piece of a unit's update.
#![expect(unsafe_code, reason = "hands raw spans of homes and leased slots to the kernel")]

use crate::{
    device::{Elapsed, StreamRef},
    dtype::StateKind,
    error::Result,
    memory::SlotLease,
    optim::{Hyper, Portion, Span, Target},
    quantities::UnitId,
    runtime::{
        disk::map::UpdateChunk,
        measure::stats::Link,
        paging::homes::Set,
        shared::{Shared, settle::Until, waits::Interrupted},
        update::{
            job::{Arrays, JobSpan, Outcome, StepHyper, UnitUpdate},
            share::Share,
            speculation::covers,
        },
    },
};

impl Shared {
    /// Submits the updates of a step, all or none of them; `unpaged` tells what it steps besides, for other ranks to compare.
    pub(crate) fn update(
        &self,
        updates: &[UnitUpdate],
        hypers: &[StepHyper],
        unpaged: u64,
        stream: u64,
        interrupted: Interrupted<'_>,
    ) -> Result<()> {
        // A save that waits for an update to be home has to see that one.
        let until = || if self.saves.active() { Until::Whole } else { Until::Made };
        let mut inner = loop {
            let wanted = until();
            for update in updates {
                self.await_update(update.unit, Some(stream), wanted, interrupted)?;
            }
            self.await_agreement(stream, interrupted)?;
            let inner = self.lock()?;
            // Another thread may have submitted in between, or begun a save, which it does under this lock.
            let until = until();
            if updates.iter().all(|u| !until.pending(&inner.machine, u.unit)) && self.agreed() {
                break inner;
            }
        };
        // Under one lock: a copy up that is enqueued from here on finds the unit's update pending, and waits.
        let after = [
            self.device.record(StreamRef::Compute(stream))?,
            self.device.record(StreamRef::Down)?,
            self.device.record(StreamRef::Up)?,
        ];
        let step = self.ranks.as_ref().map_or(0, |ranks| ranks.post_step(updates, hypers, unpaged, after));
        for update in updates {
            inner.gates[update.unit.index()].update = after;
            inner.foreseen.retain(|&u| u != update.unit);
            // Free: the runner holds it only while the unit's update is pending.
            let mut job = self.jobs[update.unit.index()].lock();
            job.spans.clear();
            match &self.ranks {
                None => job.spans.extend_from_slice(&update.spans),
                Some(ranks) => {
                    let block = self.placement.owned_block(update.unit);
                    job.spans.extend(ranks.own(self.layout.unit(update.unit), block, &update.spans));
                }
            }
            job.hypers.clear();
            job.hypers.extend_from_slice(hypers);
            job.speculated = update.speculated;
            job.covers = covers(self.layout.unit(update.unit), &update.spans);
            job.rest = None;
            job.step = step;
        }
        self.rhythm.lock().submitted();
        self.apply_event(&mut inner, |m, out| updates.iter().for_each(|u| m.submit(u.unit, out)))?;
        self.stats.stepped();
        self.trace.counter("updates queued", updates.len() as u64);
        Ok(())
    }

    /// Runs the kernel over one piece of a unit's update, whose gates have passed.
    pub(crate) fn run_chunk(&self, unit: UnitId, index: u32, lease: Option<&mut SlotLease>) -> Result<Outcome> {
        let (spare, first) = {
            let inner = self.lock()?;
            (inner.machine.in_spare(unit), inner.machine.at_first_piece(unit))
        };
        let mut job = self.jobs[unit.index()].lock();
        let job = &mut *job;
        if let Some((disk, lease)) = self.disk.as_ref().filter(|d| d.map.chunk_count(unit) > 0).zip(lease) {
            return self.run_streamed(unit, index, lease, disk, (job, spare, first)).map(|()| Outcome::Ran);
        }
        let finished = match self.ranks {
            None => self.finish_speculation(unit, job, spare)?,
            Some(_) => self.finish_own(unit, job)?,
        };
        if let Some(outcome) = finished {
            return Ok(outcome);
        }
        // From here on the parameters are at home.
        let mut share = self.share.lock();
        share.clear();
        for span in &job.spans {
            let at = self.whole_at(unit, span, Set::Current, false);
            let (at, to) = self.with_held(unit, span, span.start, at, None);
            share.add(at, self.hyper_of(job.hypers[span.hyper]), to, Portion::Whole)?;
        }
        // SAFETY: all ranges lie in homes, registered regions, or, of states that are up and what is kept beside them, in memory taken for the
        // unit. They are disjoint, but for what is updated in place, and belong to this update until the machine hears of its end: the gates of
        // the job have passed, so no stream touches them; states move under the lock of updates, which is held.
        unsafe { self.run_share(&mut share, unit, "adamw") }?;
        Ok(Outcome::Ran)
    }

    /// The scalars, with what the device has to say of them; the gates of the job have passed.
    pub(crate) fn hyper_of(&self, step: StepHyper) -> Hyper {
        step.clip.map_or(step.hyper, |slot| Hyper { clip: self.factors.value(slot), ..step.hyper })
    }

    /// The addresses of a whole span in host memory, in one of its two places; `spare`: the parameters are in their spare copy now.
    pub(crate) fn whole_at(&self, unit: UnitId, span: &JobSpan, set: Set, spare: bool) -> Span {
        self.span_of(unit, span, span.start, span.len, &Arrays::Places { set, spare })
    }

    /// A piece of a span that begins at `start`, and where its new values go, `to` or in place. Where this rank keeps parameters beside states that
    /// are up, they are read there, unless they were edited at home, and go there too.
    pub(crate) fn with_held(
        &self,
        unit: UnitId,
        span: &JobSpan,
        start: u64,
        from: Span,
        to: Option<Span>,
    ) -> (Span, Option<Target>) {
        let home = self.homes.unit(unit);
        let target = to.as_ref().map(Target::in_place);
        let sets = [Set::Current, if to.is_some() { Set::Spare } else { Set::Current }];
        let [Some(old), Some(new)] = sets.map(|set| home.held_params(span.section, set)) else { return (from, target) };
        let at = |base: u64| base.wrapping_add(start * from.dtype.size() as u64) as *mut u8;
        let target = target.unwrap_or_else(|| Target::in_place(&from));
        let param = if span.reset_master { from.param } else { at(old) };
        (Span { param, ..from }, Some(Target { second: at(new), ..target }))
    }

    /// The addresses of a piece of a span.
    pub(crate) fn span_of(&self, unit: UnitId, span: &JobSpan, start: u64, len: u64, source: &Arrays<'_>) -> Span {
        let section = &self.layout.unit(unit).sections[span.section];
        let home = self.homes.unit(unit);
        let size = |kind: StateKind| kind.element_size(section.dtype) as u64;
        let address = |kind: StateKind| -> u64 {
            if size(kind) == 0 {
                return 0;
            }
            if let Arrays::Slot(lease, chunk, _) = source
                && let Some(disk) = &self.disk
                && disk.map.segment(unit, span.section, kind).is_some()
                && !(kind == StateKind::Grad && home.grads_in_memory())
            {
                return lease.as_ptr() as u64 + disk.map.slot_offset(kind) as u64 + (start - chunk.start) * size(kind);
            }
            let (set, spare) = match source {
                Arrays::Places { set, spare } => (*set, *spare),
                Arrays::Slot(_, _, spare) => (Set::Current, *spare),
            };
            let [master, exp_avg, exp_avg_sq] = home.states(span.section, set);
            let base = match kind {
                StateKind::Param if spare == (set == Set::Current) => home.spare_params + section.offset,
                StateKind::Param => home.params + section.offset,
                StateKind::Grad => home.grads + section.offset,
                StateKind::Master => master,
                StateKind::ExpAvg => exp_avg,
                StateKind::ExpAvgSq => exp_avg_sq,
            };
            base.wrapping_add(start * size(kind))
        };
        Span {
            param: address(StateKind::Param) as *mut u8,
            grad: address(StateKind::Grad) as *const u8,
            master: address(StateKind::Master) as *mut u8,
            exp_avg: address(StateKind::ExpAvg) as *mut f32,
            exp_avg_sq: address(StateKind::ExpAvgSq) as *mut f32,
            len: len as usize,
            dtype: section.dtype,
            reset_master: span.reset_master,
        }
    }

    /// Whether a unit is on its way up: the copy that the reaper waits for has begun.
    fn paging(&self) -> Result<bool> {
        let Some(began) = *self.paging.lock() else { return Ok(false) };
        Ok(matches!(self.device.elapsed(began, began)?, Elapsed::Nanos(_)))
    }

    /// Updates a set of parts of one unit, and notes what the processor and the lanes did.
    ///
    /// # Safety
    /// As for [`Share::run`].
    pub(crate) unsafe fn run_share(&self, share: &mut Share, unit: UnitId, name: &'static str) -> Result<()> {
        share.lanes_alone(self.updates_above(unit, if share.apart() { Set::Spare } else { Set::Current }));
        // SAFETY: passed on.
        let done = unsafe { share.run(&self.pool, &|| self.trace.now(), &|| self.paging()) }?;
        if share.portion().completes() {
            self.stats.updated(done.map(|work| work.elems));
        }
        // Its rates are those of states at home.
        if self.homes.unit(unit).lifted().is_none() {
            self.rhythm.lock().ran(share.portion(), done);
        }
        let sides = [(Link::Update, "cpu update"), (Link::GpuUpdate, "gpu update")];
        for ((link, track), work) in sides.into_iter().zip(done).filter(|(_, work)| work.elems > 0) {
            self.stats.moved(link, work.bytes, work.time.1.saturating_sub(work.time.0));
            self.trace.span_until(track, name, u64::from(unit.0), work.time, work.bytes);
        }
        Ok(())
    }
}

/// The elements that a span and a chunk have in common.
pub(super) fn intersect(span: &JobSpan, chunk: UpdateChunk) -> Option<(u64, u64)> {
    if span.section != chunk.section {
        return None;
    }
    let start = span.start.max(chunk.start);
    let end = (span.start + span.len).min(chunk.start + chunk.len);
    (start < end).then(|| (start, end - start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_and_chunks_intersect_within_a_section() {
        let span = JobSpan { section: 1, start: 10, len: 20, hyper: 0, reset_master: false };
        let chunk = |section, start, len| UpdateChunk { section, start, len };
        assert_eq!(intersect(&span, chunk(1, 0, 15)), Some((10, 5)));
        assert_eq!(intersect(&span, chunk(1, 15, 100)), Some((15, 15)));
        assert_eq!(intersect(&span, chunk(1, 30, 5)), None);
        assert_eq!(intersect(&span, chunk(0, 0, 100)), None);
    }
}
