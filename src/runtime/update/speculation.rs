//! A speculative update: one that is made during backward, before its step asks for it.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::{
    device::Gate,
    dtype::StateKind,
    model::Unit,
    runtime::update::job::{Job, JobSpan, StepHyper},
};

/// After this many steps in a row whose gradients were clipped, the next one's are expected to be. A speculative update made in vain costs
/// little, because the processor has nothing else to do meanwhile; one that is not made costs the step its time.
const PATIENCE: u32 = 3;

/// In how many steps up to now the gradients were clipped, without one between in which they were not.
#[derive(Debug, Default)]
pub(crate) struct Clipped {
    /// Up to the step before the last.
    row: AtomicU32,
    last: AtomicBool,
}

impl Clipped {
    /// A step is submitted: what is noted from now on belongs to it.
    pub(crate) fn next_step(&self) {
        let row = if self.last.swap(false, Ordering::Relaxed) {
            self.row.load(Ordering::Relaxed).saturating_add(1)
        } else {
            0
        };
        self.row.store(row, Ordering::Relaxed);
    }

    /// The gradients of the last step were clipped.
    pub(super) fn note(&self) {
        self.last.store(true, Ordering::Relaxed);
    }

    /// Whether the next step's are expected to be.
    pub(super) fn expected(&self) -> bool {
        self.last.load(Ordering::Relaxed) && self.row.load(Ordering::Relaxed) + 1 >= PATIENCE
    }
}

/// One unit's speculative update, and how far it is.
#[derive(Debug)]
pub(crate) struct Speculation {
    pub(super) spans: Vec<JobSpan>,
    pub(super) hypers: Vec<StepHyper>,
    /// What must have passed first: the user's stream and gradients down.
    pub(super) after: [Gate; 2],
    /// The span at work, and how many of its elements are done.
    pub(super) at: (usize, u64),
}

impl Speculation {
    /// Not begun yet.
    pub(super) fn new(spans: Vec<JobSpan>, hypers: Vec<StepHyper>, after: [Gate; 2]) -> Self {
        Self { spans, hypers, after, at: (0, 0) }
    }

    pub(super) fn begun(&self) -> bool {
        self.at != (0, 0)
    }

    pub(super) fn done(&self) -> bool {
        self.at.0 == self.spans.len()
    }

    pub(super) fn same_as(&self, job: &Job) -> bool {
        let elements = |s: &JobSpan| (s.section, s.start, s.len, s.reset_master);
        let same = |(a, b): (&JobSpan, &JobSpan)| {
            elements(a) == elements(b) && self.hypers[a.hyper].hyper == job.hypers[b.hyper].hyper
        };
        self.spans.len() == job.spans.len() && self.spans.iter().zip(&job.spans).all(same)
    }
}

/// True if the spans are all that is trained of a unit (A3).
pub(crate) fn covers(unit: &Unit, spans: &[JobSpan]) -> bool {
    let trained = unit.params.iter().filter(|p| unit.sections[p.section].trainable && p.numel > 0);
    trained.into_iter().all(|p| {
        let inside = |s: &JobSpan| s.section == p.section && s.start <= p.start && p.start + p.numel <= s.start + s.len;
        spans.iter().any(inside)
    }) && unit.sections.iter().any(|s| s.bytes(StateKind::ExpAvg) > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_expected_to_be_clipped_after_three_that_were() {
        let clipped = Clipped::default();
        let mut step = |bites: bool| {
            clipped.next_step();
            // Once for each unit.
            (0..2).filter(|_| bites).for_each(|_| clipped.note());
            clipped.expected()
        };
        assert_eq!([true, true, true, true].map(&mut step), [false, false, true, true]);
        assert_eq!(
            [false, true, true, false, true, true, true].map(&mut step),
            [false, false, false, false, false, false, true]
        );
    }
}
