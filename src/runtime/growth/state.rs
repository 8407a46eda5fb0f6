//! What is known of the compute device's memory, and which units' states are in it.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    device::Frames,
    quantities::UnitId,
    runtime::{
        growth::record::Record,
        shared::lock_order::{Line, Ordered},
    },
    schedule::growth::{Candidate, Growth},
};

/// Between two looks at the memory of a real device within a step.
const LOOK: Duration = Duration::from_millis(2);

/// A device's memory that a test makes up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MadeUp {
    /// All of it.
    pub(crate) capacity: u64,
    /// What the program and others have of it.
    pub(crate) others: u64,
}

/// What the lock guards.
pub(crate) struct State {
    pub(crate) decide: Growth,
    /// To move up, in order.
    pub(crate) rising: VecDeque<UnitId>,
    /// Per unit, the memory of its states in the compute tier.
    pub(crate) taken: Vec<Option<Arc<dyn Frames>>>,
    /// Memory of states that the watcher of other ranks brought home: threads that may wait for the device give it back.
    pub(crate) spent: Vec<Arc<dyn Frames>>,
    pub(crate) made_up: Option<MadeUp>,
    pub(crate) record: Record,
    looked: Option<Instant>,
}

/// States in the compute tier, and what decides about them.
pub(crate) struct Growing {
    pub(crate) state: Ordered<State>,
    candidates: Vec<Candidate>,
    /// Whether anything may move up.
    on: AtomicBool,
    /// Units that are up.
    up: AtomicU32,
    /// Lanes alone update what is up.
    pub(super) above: bool,
    /// Per unit and set: the home is older than what is in the compute tier.
    newer: Vec<[AtomicBool; 2]>,
    /// The runtime ends: what is under way is given up.
    pub(crate) stopped: AtomicBool,
}

impl Growing {
    /// For a model of so many units, on a device of `capacity` bytes. It is off at first.
    pub(crate) fn new(units: usize, candidates: Vec<Candidate>, capacity: u64, above: bool) -> Self {
        let state = State {
            decide: Growth::new(candidates.clone(), capacity),
            rising: VecDeque::with_capacity(units),
            taken: (0..units).map(|_| None).collect(),
            spent: Vec::with_capacity(units),
            made_up: None,
            record: Record::default(),
            looked: None,
        };
        Self {
            state: Ordered::new(Line::Moment, state),
            candidates,
            above,
            on: AtomicBool::new(false),
            up: AtomicU32::new(0),
            newer: (0..units).map(|_| [AtomicBool::new(false), AtomicBool::new(false)]).collect(),
            stopped: AtomicBool::new(false),
        }
    }

    /// Whether there is anything that may move up, now or later.
    pub(crate) fn possible(&self) -> bool {
        !self.candidates.is_empty()
    }

    /// Whether anything may move up now.
    pub(crate) fn on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Has units move up from now on, or no longer.
    pub(crate) fn turn(&self, on: bool) {
        self.on.store(on && self.possible(), Ordering::Relaxed);
    }

    /// Whether any unit's states are up.
    pub(crate) fn any_up(&self) -> bool {
        self.up.load(Ordering::Acquire) > 0
    }

    /// Notes that one more unit is up, or one less.
    pub(crate) fn count(&self, up: bool) {
        if up {
            self.up.fetch_add(1, Ordering::Release);
        } else {
            self.up.fetch_sub(1, Ordering::Release);
        }
    }

    /// What the states of a unit take in the compute tier.
    pub(crate) fn bytes_of(&self, unit: UnitId) -> u64 {
        self.candidates.iter().find(|c| c.unit == unit).map_or(0, |c| c.bytes)
    }

    /// Bytes that are up now, and at most so far.
    pub(crate) fn bytes(&self) -> (u64, u64) {
        let state = self.state.lock();
        (state.record.taken, state.record.peak)
    }

    /// Notes that an update may have written a set of a unit in the compute tier.
    pub(crate) fn updated(&self, unit: UnitId, set: usize) {
        self.newer[unit.index()][set].store(true, Ordering::Relaxed);
    }

    /// Whether units are to move up as soon as that is possible.
    pub(crate) fn waits_to_rise(&self) -> bool {
        self.on() && !self.state.lock().rising.is_empty()
    }

    /// Whether the home of a set is older than what is in the compute tier.
    pub(crate) fn newer(&self, unit: UnitId, set: usize) -> bool {
        self.newer[unit.index()][set].load(Ordering::Relaxed)
    }

    /// Notes that the home of a set is current.
    pub(crate) fn current(&self, unit: UnitId, set: usize) {
        self.newer[unit.index()][set].store(false, Ordering::Relaxed);
    }

    /// Has the memory of the device be what a test says.
    pub(crate) fn make_up(&self, made_up: MadeUp) {
        let mut state = self.state.lock();
        if state.made_up.is_none_or(|before| before.capacity != made_up.capacity) && state.decide.taken() == 0 {
            state.decide = Growth::new(self.candidates.clone(), made_up.capacity);
        }
        state.made_up = Some(made_up);
        drop(state);
        self.turn(true);
    }
}

impl State {
    /// Whether a look at the memory is due; a real device is not asked more often than [`LOOK`] says.
    pub(crate) fn due(&mut self) -> bool {
        let now = Instant::now();
        let due = self.made_up.is_some() || self.looked.is_none_or(|last| now.duration_since(last) >= LOOK);
        if due {
            self.looked = Some(now);
        }
        due
    }

    /// Units that were to move up stay at home.
    pub(crate) fn forget_rising(&mut self) {
        while let Some(unit) = self.rising.pop_front() {
            self.decide.at_home(unit);
        }
    }
}
