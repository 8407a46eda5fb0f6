//! What a runtime has that is one of several ranks.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use crate::{
    device::Gate,
    memory::{SharedFile, SharedWords},
    quantities::UnitId,
    runtime::{
        ranks::spec::RankSpec,
        shared::lock_order::{Line, Ordered},
    },
    schedule::ranks::{
        board::{AT_EXCHANGE, Board, Words},
        crossed::Call,
        posts::{Posts, State},
    },
};

impl Words for SharedWords {
    fn load(&self, at: usize) -> u64 {
        Self::load(self, at)
    }

    fn store(&self, at: usize, value: u64) {
        Self::store(self, at, value);
    }
}

/// A step that was posted, until this rank is quiet.
#[derive(Debug)]
pub(crate) struct Posted {
    pub(crate) step: u64,
    /// What this rank had enqueued before it.
    pub(crate) gates: [Gate; 3],
    /// Slots of the factors that it multiplies gradients by.
    pub(crate) factors: Vec<u32>,
}

/// One of several ranks.
#[derive(Debug)]
pub(crate) struct Ranks {
    pub(crate) spec: RankSpec,
    pub(crate) board: Board,
    pub(crate) words: SharedWords,
    pub(crate) file: Arc<SharedFile>,
    /// The policy with concrete budgets, as JSON, and digests of what must be alike.
    pub(crate) policy: String,
    pub(crate) alike: [u64; ALIKE.len()],
    /// Steps until this rank is quiet, in order.
    pub(crate) posted: Ordered<VecDeque<Posted>>,
    /// Per unit the last post of gradients of which this rank's slices were sent.
    pub(crate) sent: Vec<AtomicU64>,
    /// Units whose own part of a step's weights is made, until the states of all ranks are.
    pub(crate) made: Ordered<Vec<Made>>,
    /// Held while this rank's text is written, and the words that say where it waits and which states it wants.
    pub(super) text: Ordered<()>,
    /// Exchanges to which this rank's device was sent.
    pub(super) meetings: Ordered<Meetings>,
    /// Threads that wait for other ranks.
    waiting: AtomicU32,
}

/// How often this rank's device was to tell that it has come to an exchange, and the addresses of the words for that: its own, and all others. The
/// thread that sends the device there may wait for the driver with this lock, so that the watcher does without it.
#[derive(Debug)]
pub(super) struct Meetings {
    pub(super) count: u64,
    pub(super) mine: u64,
    pub(super) others: Vec<u64>,
    /// Passed once the device is past the last one.
    pub(super) last: Gate,
}

/// A unit of which this rank has made its part of a step's weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Made {
    pub(crate) unit: UnitId,
    pub(crate) step: u64,
    /// The machine knows that all ranks have made their weights.
    pub(crate) told: bool,
}

/// What all ranks must have alike.
pub(crate) const ALIKE: [&str; 4] = ["version of funicular", "model", "policy", "plan"];

impl Ranks {
    /// A rank that is there, with its process.
    pub(crate) fn new(
        spec: RankSpec,
        board: Board,
        words: SharedWords,
        file: Arc<SharedFile>,
        (policy, alike): (String, [u64; ALIKE.len()]),
    ) -> Self {
        let at_exchange = |rank| words.address(Board::of_rank(rank, AT_EXCHANGE));
        let others = (0..spec.size).filter(|&rank| rank != spec.rank).map(at_exchange).collect();
        let meetings = Meetings { count: 0, mine: at_exchange(spec.rank), others, last: Gate::OPEN };
        Self {
            spec,
            sent: (0..board.units()).map(|_| AtomicU64::new(0)).collect(),
            board,
            words,
            file,
            policy,
            alike,
            posted: Ordered::new(Line::Moment, VecDeque::new()),
            made: Ordered::new(Line::Moment, Vec::new()),
            text: Ordered::new(Line::Moment, ()),
            meetings: Ordered::new(Line::Moment, meetings),
            waiting: AtomicU32::new(0),
        }
    }

    /// This rank's view of the board.
    pub(crate) fn posts(&self) -> Posts<'_, SharedWords> {
        Posts { board: &self.board, words: &self.words, rank: self.spec.rank }
    }

    /// Shows the others where this rank is. Nothing to do once it has failed: then they are told why.
    pub(crate) fn say(&self, text: &str) {
        let _text = self.text.lock();
        if self.posts().state(self.spec.rank) == State::Running {
            self.posts().say(text);
        }
    }

    /// Tells the others that this rank's model has ended, by a failure or otherwise.
    pub(crate) fn ended(&self, state: State, why: Option<&str>) {
        {
            let _text = self.text.lock();
            if self.posts().state(self.spec.rank) != State::Running {
                return;
            }
            if let Some(why) = why {
                self.posts().say(why);
            }
            self.posts().set_state(state);
        }
        self.words.ring();
    }

    /// Tells the other ranks in which call this one waits.
    pub(crate) fn wait_in(&self, call: Option<Call>) {
        let _text = self.text.lock();
        self.posts().wait_in(call);
    }

    /// True while a thread waits for other ranks.
    pub(crate) fn waits(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// Counts a thread that waits for other ranks, until what this returns is dropped.
    pub(crate) fn waiting(&self) -> Waiting<'_> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        Waiting(self)
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        self.ended(State::Closed, None);
    }
}

/// A thread that waits for other ranks.
pub(crate) struct Waiting<'a>(&'a Ranks);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}
