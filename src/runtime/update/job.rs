//! An update of one unit: which elements, with which hyperparameters, where their arrays are, and how a piece of it ended.

use crate::{
    memory::SlotLease,
    optim::Hyper,
    quantities::UnitId,
    runtime::{disk::map::UpdateChunk, paging::homes::Set, update::factors},
};

/// A unit's part of an optimizer step.
#[derive(Clone, Debug)]
pub struct UnitUpdate {
    /// The unit.
    pub unit: UnitId,
    /// Its spans.
    pub spans: Vec<JobSpan>,
    /// Nothing has touched the gradients and parameters from which [`crate::runtime::Runtime::update_speculatively`] began.
    pub speculated: bool,
}

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
    /// The scalars; their `clip` is 1 where a slot has it.
    pub hyper: Hyper,
    /// The slot, from [`crate::runtime::Runtime::factor`].
    pub clip: Option<u32>,
}

impl StepHyper {
    /// Slots have numbers below this.
    pub const SLOTS: u32 = factors::SLOTS;
}

/// What the runner needs to know about a unit's update.
#[derive(Debug, Default)]
pub(crate) struct Job {
    /// The spans, in order.
    pub(crate) spans: Vec<JobSpan>,
    /// Hyperparameters the spans refer to.
    pub(crate) hypers: Vec<StepHyper>,
    /// Gradients and parameters are those from which a speculative update was begun.
    pub(crate) speculated: bool,
}

/// Where the arrays of a span are.
#[derive(Debug)]
pub(crate) enum Arrays<'a> {
    /// In host memory, in one of the two places; `spare`: the parameters are in their spare copy now.
    Places { set: Set, spare: bool },
    /// What lives on NVMe is in a slot, for one piece of the update.
    Slot(&'a SlotLease, UpdateChunk),
}

/// How a piece of an update ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The home is current.
    Ran,
    /// All of the unit was updated into the other of its two places, which is the current one now.
    Swapped,
}
