//! A speculative update: one that is made during backward, before its step asks for it.

use crate::{
    device::Gate,
    dtype::StateKind,
    model::Unit,
    runtime::update::job::{Job, JobSpan, StepHyper},
};

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

    pub(crate) fn done(&self) -> bool {
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
