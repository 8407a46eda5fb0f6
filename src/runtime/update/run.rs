//! Submitting the updates of a step, and the kernel over one piece of a unit's update.
#![expect(unsafe_code, reason = "hands raw spans of homes and leased slots to the kernel")]

use crate::{
    device::{Elapsed, StreamRef},
    dtype::StateKind,
    error::Result,
    io::Direction,
    memory::SlotLease,
    optim::{Hyper, Span},
    quantities::UnitId,
    runtime::{
        disk::map::UpdateChunk,
        measure::stats::Link,
        paging::homes::Set,
        shared::{Shared, settle::Until, waits::Interrupted},
        update::{
            job::{Arrays, JobSpan, Outcome, StepHyper, UnitUpdate},
            share::Share,
        },
    },
};

impl Shared {
    /// Submits the updates of a step, all or none of them.
    pub(crate) fn update(
        &self,
        updates: &[UnitUpdate],
        hypers: &[StepHyper],
        stream: u64,
        interrupted: Interrupted<'_>,
    ) -> Result<()> {
        // A save that waits for an update to be home has to see that one.
        let until = || if self.saves.active() { Until::Home } else { Until::Made };
        let mut inner = loop {
            let wanted = until();
            for update in updates {
                self.await_update(update.unit, Some(stream), wanted, interrupted)?;
            }
            let inner = self.lock()?;
            // Another thread may have submitted in between, or begun a save, which it does under this lock.
            let until = until();
            if updates.iter().all(|u| !until.pending(&inner.machine, u.unit)) {
                break inner;
            }
        };
        // Under one lock: a copy up that is enqueued from here on finds the unit's update pending, and waits.
        let after = [
            self.device.record(StreamRef::Compute(stream))?,
            self.device.record(StreamRef::Down)?,
            self.device.record(StreamRef::Up)?,
        ];
        for update in updates {
            inner.gates[update.unit.index()].update = after;
            // Free: the runner holds it only while the unit's update is pending.
            let mut job = self.jobs[update.unit.index()].lock();
            job.spans.clear();
            job.spans.extend_from_slice(&update.spans);
            job.hypers.clear();
            job.hypers.extend_from_slice(hypers);
            job.speculated = update.speculated;
        }
        self.clipped.next_step();
        self.apply_event(&mut inner, |m, out| updates.iter().for_each(|u| m.submit(u.unit, out)))?;
        self.stats.stepped();
        self.trace.counter("updates queued", updates.len() as u64);
        Ok(())
    }

    /// Runs the kernel over one piece of a unit's update, whose gates have passed.
    pub(crate) fn run_chunk(&self, unit: UnitId, index: u32, lease: Option<&mut SlotLease>) -> Result<Outcome> {
        let spare = self.lock()?.machine.in_spare(unit);
        let mut job = self.jobs[unit.index()].lock();
        let job = &mut *job;
        if let Some(outcome) = self.finish_speculation(unit, job, spare)? {
            return Ok(outcome);
        }
        let streamed = self.disk.as_ref().filter(|d| d.map.chunk_count(unit) > 0).zip(lease);
        let chunk = streamed.as_ref().map(|(disk, _)| disk.map.chunk(unit, index));
        let mut share = self.share.lock();
        share.clear();
        for span in &job.spans {
            let Some((start, len)) = chunk.map_or(Some((span.start, span.len)), |c| intersect(span, c)) else {
                continue;
            };
            let slot = streamed.as_ref().zip(chunk).map(|((_, lease), c)| Arrays::Slot(lease, c));
            let source = slot.unwrap_or(Arrays::Places { set: Set::Current, spare: false });
            let span_of = self.span_of(unit, span, start, len, &source);
            share.add(span_of, self.hyper_of(job.hypers[span.hyper]), None)?;
        }
        // SAFETY: all ranges lie in homes or in the leased slot, registered regions both, are disjoint, and belong to this update
        // until the machine hears of its end: the gates of the job have passed, so no stream touches them.
        unsafe { self.run_share(&mut share, unit, "adamw") }?;
        if let (Some((disk, lease)), Some(chunk)) = (streamed, chunk) {
            disk.map.check(&disk.store, &self.layout, unit, chunk, Direction::Write, lease.bytes())?;
        }
        Ok(Outcome::Ran)
    }

    /// The scalars, with what the device has to say of them; the gates of the job have passed.
    pub(crate) fn hyper_of(&self, step: StepHyper) -> Hyper {
        step.clip.map_or(step.hyper, |slot| Hyper { clip: self.factors.value(slot), ..step.hyper })
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
            if let Arrays::Slot(lease, chunk) = source
                && let Some(disk) = &self.disk
                && disk.map.segment(unit, span.section, kind).is_some()
            {
                return lease.as_ptr() as u64 + disk.map.slot_offset(kind) as u64 + (start - chunk.start) * size(kind);
            }
            let (set, spare) =
                if let Arrays::Places { set, spare } = source { (*set, *spare) } else { (Set::Current, false) };
            let [master, exp_avg, exp_avg_sq] = home.states(span.section, set);
            let base = match kind {
                StateKind::Param if spare == (set == Set::Current) => home.spare_params + section.offset,
                StateKind::Param => home.params + section.offset,
                StateKind::Grad => home.grads + section.offset,
                StateKind::Master => master,
                StateKind::ExpAvg => exp_avg,
                StateKind::ExpAvgSq => exp_avg_sq,
            };
            base + start * size(kind)
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
        // SAFETY: passed on.
        let done = unsafe { share.run(&self.pool, &|| self.trace.now(), &|| self.paging()) }?;
        self.stats.updated(done.map(|work| work.elems));
        let sides = [(Link::Update, "cpu update"), (Link::GpuUpdate, "gpu update")];
        for ((link, track), work) in sides.into_iter().zip(done).filter(|(_, work)| work.elems > 0) {
            self.stats.moved(link, work.bytes, work.time.1.saturating_sub(work.time.0));
            self.trace.span_until(track, name, u64::from(unit.0), work.time, work.bytes);
        }
        Ok(())
    }
}

/// The elements that a span and a chunk have in common.
fn intersect(span: &JobSpan, chunk: UpdateChunk) -> Option<(u64, u64)> {
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
