//! An update of one unit: which elements, with which hyperparameters, and the kernel over one piece of it.
#![expect(unsafe_code, reason = "hands raw spans of homes and leased slots to the kernel")]

use crate::{
    device::StreamRef,
    dtype::StateKind,
    error::Result,
    memory::SlotLease,
    optim::{Hyper, Span},
    runtime::{
        UnitUpdate,
        disk::map::Chunk,
        paging::homes::Set,
        shared::{Shared, settle::Until},
    },
    units::UnitId,
};

/// Elements of one section that share hyperparameters and have gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobSpan {
    /// Section of the unit.
    pub section: usize,
    /// First element.
    pub start: u64,
    /// Elements.
    pub len: u64,
    /// Which of the job's hyperparameters.
    pub hyper: usize,
    /// The parameter was edited: its master starts anew from it.
    pub reset_master: bool,
}

/// The scalars of a step, and where the device put what clipping multiplies the gradient by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepHyper {
    /// The scalars; their `clip` is 1 where a slot tells it.
    pub hyper: Hyper,
    /// The slot, from [`crate::runtime::Runtime::factor`].
    pub clip: Option<u32>,
}

impl StepHyper {
    /// Slots have numbers below this.
    pub const SLOTS: u32 = crate::runtime::update::factors::SLOTS;
}

/// What the runner needs to know about a unit's update.
#[derive(Debug, Default)]
pub struct Job {
    /// The spans, in order.
    pub spans: Vec<JobSpan>,
    /// Hyperparameters the spans refer to.
    pub hypers: Vec<StepHyper>,
    /// Gradients and parameters are those from which an update ahead of the step was begun.
    pub guessed: bool,
}

/// Where the arrays of a span are.
#[derive(Debug)]
pub(crate) enum Source<'a> {
    /// In host memory, in one of the two places; `spare` tells that the parameters are in their spare place now.
    Places { set: Set, spare: bool },
    /// What lives on NVMe is in a slot, for one piece of the update.
    Slot(&'a SlotLease, Chunk),
}

/// How a piece of an update ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The home is current.
    Ran,
    /// All of the unit was updated into the other of its two places.
    Turned,
}

impl Shared {
    /// Submits the updates of a step, all or none of them.
    pub(crate) fn update(
        &self,
        updates: &[UnitUpdate],
        hypers: &[StepHyper],
        stream: u64,
        interrupted: &mut dyn FnMut() -> bool,
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
            job.guessed = update.guessed;
        }
        self.clipped.next_step();
        self.happened(&mut inner, |m, out| updates.iter().for_each(|u| m.submit(u.unit, out)))?;
        self.stats.stepped();
        self.trace.counter("updates queued", updates.len() as u64);
        Ok(())
    }

    /// Runs the kernel over one piece of a unit's update, whose gates have passed.
    pub(crate) fn run_chunk(&self, unit: UnitId, index: u32, lease: Option<&mut SlotLease>) -> Result<Outcome> {
        let spare = self.lock()?.machine.in_spare(unit);
        let mut job = self.jobs[unit.index()].lock();
        let job = &mut *job;
        if let Some(outcome) = self.change_places(unit, job, spare)? {
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
            let slot = streamed.as_ref().zip(chunk).map(|((_, lease), c)| Source::Slot(lease, c));
            let source = slot.unwrap_or(Source::Places { set: Set::Current, spare: false });
            let span_of = self.span_of(unit, span, start, len, &source);
            share.add(span_of, self.hyper_of(job.hypers[span.hyper]), None)?;
        }
        // SAFETY: all ranges lie in homes or in the leased slot, registered regions both, are disjoint, and belong to this update
        // until the machine hears of its end: the gates of the job have passed, so no stream touches them.
        unsafe { self.run_share(&mut share, unit, "adamw") }?;
        if let (Some((disk, lease)), Some(chunk)) = (streamed, chunk) {
            disk.map.check(&disk.store, &self.layout, unit, chunk, crate::io::Direction::Write, lease.bytes())?;
        }
        Ok(Outcome::Ran)
    }

    /// The scalars, with what the device has to say of them; the gates of the job have passed.
    pub(crate) fn hyper_of(&self, step: StepHyper) -> Hyper {
        step.clip.map_or(step.hyper, |slot| Hyper { clip: self.factors.value(slot), ..step.hyper })
    }

    /// The addresses of a piece of a span.
    pub(crate) fn span_of(&self, unit: UnitId, span: &JobSpan, start: u64, len: u64, source: &Source<'_>) -> Span {
        let section = &self.layout.unit(unit).sections[span.section];
        let home = self.homes.unit(unit);
        let size = |kind: StateKind| kind.element_size(section.dtype) as u64;
        let address = |kind: StateKind| -> u64 {
            if size(kind) == 0 {
                return 0;
            }
            if let Source::Slot(lease, chunk) = source
                && let Some(disk) = &self.disk
                && disk.map.segment(unit, span.section, kind).is_some()
            {
                return lease.as_ptr() as u64 + disk.map.slot_offset(kind) as u64 + (start - chunk.start) * size(kind);
            }
            let (set, spare) =
                if let Source::Places { set, spare } = source { (*set, *spare) } else { (Set::Current, false) };
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
}

/// The elements that a span and a chunk have in common.
fn intersect(span: &JobSpan, chunk: Chunk) -> Option<(u64, u64)> {
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
        let chunk = |section, start, len| Chunk { section, start, len };
        assert_eq!(intersect(&span, chunk(1, 0, 15)), Some((10, 5)));
        assert_eq!(intersect(&span, chunk(1, 15, 100)), Some((15, 15)));
        assert_eq!(intersect(&span, chunk(1, 30, 5)), None);
        assert_eq!(intersect(&span, chunk(0, 0, 100)), None);
    }
}
