//! Each step's time, cut into compute and stalls by cause, as the compute stream saw it: what is known of it. `intervals` makes the marks.
//!
//! T1: the stream's time is one sequence of intervals; an interval lasts from its mark to the next one's and counts for one thing. T2: marks
//! are read by the thread that learns of a step's end, and by callers that ask for the figures; the thread that trains never waits for
//! them. T3: the wall's time comes from the host's clock alone: read where the step ends, on a GPU where the host sees that it has ended.

use std::collections::VecDeque;

use parking_lot::Condvar;

use crate::{
    device::{Gate, MARKS, Mark},
    runtime::{
        measure::stats::{Cause, Link},
        shared::lock_order::{Line, Ordered},
    },
};

/// Steps that may be over before all of their figures are known.
const STEPS: usize = 64;

/// What the time of a step, or of several, went to, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepTime {
    /// From the end of the step before to its own end, by the host's clock.
    pub wall: u64,
    /// What the compute stream did not wait, by the device's clock.
    pub compute: u64,
    /// What it waited, by cause, by the device's clock.
    pub stalls: [u64; Cause::ALL.len()],
    /// What each link was busy meanwhile.
    pub busy: [u64; Link::ALL.len()],
}

impl StepTime {
    fn add(&mut self, other: &Self) {
        let sum = |a: &mut [u64], b: &[u64]| a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        self.wall += other.wall;
        self.compute += other.compute;
        sum(&mut self.stalls, &other.stalls);
        sum(&mut self.busy, &other.busy);
    }
}

/// The steps measured so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Times {
    /// The last one.
    pub last: StepTime,
    /// All together, without the first, which learns the order, unless it is the only one.
    pub total: StepTime,
    /// How many are in `total`.
    pub steps: u64,
    /// Times that are missing: marks too old when they were read, or never made.
    pub lost: u64,
}

/// What the compute stream does from a mark on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Interval {
    pub(super) mark: Mark,
    /// `None`: it computes.
    pub(super) cause: Option<Cause>,
    pub(super) window: LastWindow,
    pub(super) ends_step: bool,
}

/// The window opened last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LastWindow {
    pub(super) unit: u64,
    pub(super) phase: &'static str,
}

#[derive(Debug)]
pub(super) struct State {
    /// Intervals whose end was not read yet, the oldest first.
    pub(super) intervals: VecDeque<Interval>,
    pub(super) window: LastWindow,
    /// The step under way, as far as read.
    step: StepTime,
    /// Steps whose intervals were read, and what the wall's clock and the links said at the ends of steps.
    read: VecDeque<StepTime>,
    pub(super) ends: VecDeque<(u64, [u64; Link::ALL.len()])>,
    pub(super) before: (u64, [u64; Link::ALL.len()]),
    /// The first step is the only one in `times`.
    first: bool,
    pub(super) times: Times,
    /// Steps whose ends were enqueued, were seen, and were read.
    pub(super) enqueued: u64,
    pub(super) seen: u64,
    pub(super) over: u64,
    pub(super) gate: Gate,
}

/// The time of the compute stream, step by step.
#[derive(Debug)]
pub(crate) struct StepTimes {
    pub(super) state: Ordered<State>,
    /// Notified when the end of a step was seen.
    pub(super) changed: Condvar,
}

impl Default for StepTimes {
    fn default() -> Self {
        let state = State {
            intervals: VecDeque::with_capacity(MARKS as usize + 1),
            window: LastWindow { unit: u64::MAX, phase: "compute" },
            step: StepTime::default(),
            read: VecDeque::with_capacity(STEPS),
            ends: VecDeque::with_capacity(STEPS),
            before: Default::default(),
            first: true,
            times: Times::default(),
            enqueued: 0,
            seen: 0,
            over: 0,
            gate: Gate::OPEN,
        };
        Self { state: Ordered::new(Line::Moment, state), changed: Condvar::new() }
    }
}

impl State {
    /// Closes the oldest interval with its duration; `None` if its marks were overwritten.
    pub(super) fn advance(&mut self, nanos: Option<u64>) {
        let Some(interval) = self.intervals.pop_front() else { return };
        match (nanos, interval.cause) {
            (None, _) => self.times.lost += 1,
            (Some(nanos), None) => self.step.compute += nanos,
            (Some(nanos), Some(cause)) => self.step.stalls[cause as usize] += nanos,
        }
        if self.intervals.front().is_some_and(|next| next.ends_step) {
            self.read.push_back(std::mem::take(&mut self.step));
            self.over += 1;
            self.complete();
        }
    }

    /// Puts together what is known of ended steps from both sides.
    pub(super) fn complete(&mut self) {
        while !self.read.is_empty() && !self.ends.is_empty() {
            let (Some(mut step), Some((wall, busy))) = (self.read.pop_front(), self.ends.pop_front()) else { return };
            step.wall = wall.saturating_sub(self.before.0);
            for (link, now) in busy.iter().enumerate() {
                step.busy[link] = now.saturating_sub(self.before.1[link]);
            }
            self.before = (wall, busy);
            if self.times.steps == 1 && self.first {
                (self.times.total, self.times.steps, self.first) = (StepTime::default(), 0, false);
            }
            self.times.last = step;
            self.times.total.add(&step);
            self.times.steps += 1;
        }
    }
}
