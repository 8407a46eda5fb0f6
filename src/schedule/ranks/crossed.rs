//! Ranks that wait for each other in different calls, which would last for ever.
//!
//! A6: a rank that waits says in which call. Two ranks are *crossed* when each waits in a call that the other has not come to: each would have
//! to come to the other's call first, and cannot while it waits. That is so as soon as it can be seen, and never of a rank that is slow, because
//! such a rank does not wait. What a rank has not done itself it knows for certain; so a word of another rank that says that it waits for that
//! cannot be out of date.

use crate::schedule::ranks::{
    board::{ARRIVED, BACKWARD, IDENTITY, MEETINGS, PASSED, POSTS, WAITS, WAITS_AT, Words},
    posts::Posts,
};

/// A call in which a rank waits for others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// For gradients of a unit, after its own last post of them.
    Gradients(usize),
    /// At its step.
    Step,
    /// At a meeting, its last one.
    Meeting,
    /// In a call of another model, whose board has this identity: it comes to none of this model meanwhile.
    Elsewhere(u64),
}

impl Call {
    const GRADIENTS: u64 = 1;
    const STEP: u64 = 2;
    const MEETING: u64 = 3;
    const ELSEWHERE: u64 = 4;
}

impl<W: Words> Posts<'_, W> {
    /// What tells this board from those of other models.
    pub fn identity(&self) -> u64 {
        self.words.load(IDENTITY)
    }

    /// Says in which call this rank waits; none when it goes on.
    pub fn wait_in(&self, call: Option<Call>) {
        let serial = (self.load(self.rank, WAITS) >> 32) + 1;
        let what = match call {
            None => 0,
            Some(Call::Gradients(unit)) => (unit as u64) << 8 | Call::GRADIENTS,
            Some(Call::Step) => Call::STEP,
            Some(Call::Meeting) => Call::MEETING,
            Some(Call::Elsewhere(identity)) => {
                self.store(WAITS_AT, identity);
                Call::ELSEWHERE
            }
        };
        self.store(WAITS, serial << 32 | what);
    }

    /// The call in which a rank waits, with the word that says so.
    fn waits(&self, rank: usize) -> Option<(u64, Call)> {
        let word = self.load(rank, WAITS);
        let call = match word & 0xff {
            Call::GRADIENTS => Call::Gradients(((word & 0xffff_ffff) >> 8) as usize),
            Call::STEP => Call::Step,
            Call::MEETING => Call::Meeting,
            Call::ELSEWHERE => Call::Elsewhere(self.load(rank, WAITS_AT)),
            _ => return None,
        };
        Some((word, call))
    }

    /// Whether a rank that waits in a call waits for this other one, which has not come to it.
    fn waits_for(&self, call: Call, of: usize, rank: usize) -> bool {
        match call {
            Call::Gradients(unit) => {
                let posts = |rank| self.words.load(self.board.of_unit(rank, unit, POSTS));
                unit < self.board.units() && posts(rank) < posts(of)
            }
            Call::Meeting => self.load(rank, MEETINGS) < self.load(of, MEETINGS),
            Call::Step => {
                let at = self.load(of, ARRIVED);
                let (turn, backward) = (at >> 32, at & 0xffff_ffff);
                let ranks = || 0..self.board.ranks();
                // It passes on, or joins a backward of another rank.
                let goes_on = |r| self.load(r, PASSED) >= turn || self.load(r, BACKWARD) > backward;
                self.load(rank, ARRIVED) != at && !ranks().any(goes_on)
            }
            Call::Elsewhere(_) => false,
        }
    }

    /// The call of this model in which a rank waits for this one; none if it does not. To be asked by the only thread that comes to calls.
    pub fn waits_for_this(&self, rank: usize) -> Option<Call> {
        let (word, call) = self.waits(rank)?;
        (self.waits_for(call, rank, self.rank) && self.load(rank, WAITS) == word).then_some(call)
    }

    /// A rank that waits for this one, which waits for it in this call; and the call in which that rank waits.
    pub fn crossed(&self, call: Call) -> Option<(usize, Call)> {
        self.others().find_map(|rank| {
            let theirs = self.waits_for_this(rank)?;
            self.waits_for(call, self.rank, rank).then_some((rank, theirs))
        })
    }

    /// Ranks for which this one waits in this call, and which wait in a call of another model: each with the identity of that one's board.
    pub fn elsewhere(&self, call: Call) -> impl Iterator<Item = (usize, u64)> {
        self.others().filter_map(move |rank| match self.waits(rank)? {
            (word, Call::Elsewhere(identity)) if self.load(rank, WAITS) == word => {
                self.waits_for(call, self.rank, rank).then_some((rank, identity))
            }
            _ => None,
        })
    }

    /// The number of backwards after which a rank is at its step, for messages.
    pub fn step_after(&self, rank: usize) -> u64 {
        self.load(rank, ARRIVED) & 0xffff_ffff
    }
}
