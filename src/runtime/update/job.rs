//! An update of one unit: which elements, with which hyperparameters, where their arrays are, and how a piece of it ended.

use crate::{
    memory::SlotLease,
    optim::{Hyper, Portion},
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
    /// All that is trained of the unit is updated, by this rank or by others.
    pub(crate) covers: bool,
    /// What is left to be done once the weights are made.
    pub(crate) rest: Option<Rest>,
    /// The number of the step, among those of all ranks; 0 without other ranks.
    pub(crate) step: u64,
}

/// The second pass of an update that made its weights first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rest {
    pub(crate) portion: Portion,
    /// Where the old parameters are, which it may read: in the spare copy, or at home.
    pub(crate) spare: bool,
    /// What it makes goes to the other place of the unit's states.
    pub(crate) apart: bool,
}

/// Where the arrays of a span are.
#[derive(Debug)]
pub(crate) enum Arrays<'a> {
    /// In host memory, in one of the two places; `spare`: the parameters are in their spare copy now.
    Places { set: Set, spare: bool },
    /// What lives on NVMe is in a slot, for one piece of the update; parameters in host memory are in their spare place if the flag is set.
    Slot(&'a SlotLease, UpdateChunk, bool),
}

/// How a piece of an update ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The home is current.
    Ran,
    /// All of the unit was updated into the other of its two places, which is the current one now.
    Swapped,
    /// The weights are made, the states are not: in place, or all of the unit's in the other of its two places.
    Weights { turned: bool },
}
