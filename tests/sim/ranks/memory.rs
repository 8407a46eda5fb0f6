//! Memory that ranks share: words with all their values, and what each rank knows of them.

use std::cell::RefCell;

use funicular::schedule::ranks::board::Words;

use crate::chance::Chance;

/// Per rank, how many of its actions are known to have happened.
pub(crate) type Clock = [u64; MOST];

/// Ranks of a run at most.
pub(crate) const MOST: usize = 8;

fn join(into: &mut Clock, other: &Clock) {
    into.iter_mut().zip(other).for_each(|(a, b)| *a = (*a).max(*b));
}

#[derive(Debug)]
struct Stored {
    value: u64,
    writer: usize,
    /// What its writer knew; its own action is among that.
    clock: Clock,
}

#[derive(Debug)]
struct Inside {
    words: Vec<Vec<Stored>>,
    /// Per word and rank, the newest value that it has seen, by number.
    seen: Vec<[usize; MOST]>,
    clocks: [Clock; MOST],
    chance: Chance,
}

/// All words.
#[derive(Debug)]
pub(crate) struct Memory {
    inside: RefCell<Inside>,
    weak: bool,
}

/// The memory as one rank sees it.
#[derive(Debug)]
pub(crate) struct View<'a> {
    memory: &'a Memory,
    rank: usize,
}

impl Memory {
    pub(crate) fn new(words: usize, weak: bool, seed: u64) -> Self {
        let inside = Inside {
            words: (0..words).map(|_| Vec::new()).collect(),
            seen: vec![[0; MOST]; words],
            clocks: [[0; MOST]; MOST],
            chance: Chance::new(seed),
        };
        Self { inside: RefCell::new(inside), weak }
    }

    pub(crate) fn view(&self, rank: usize) -> View<'_> {
        View { memory: self, rank }
    }

    /// A rank does something that others may come to know of; the clock after it.
    pub(crate) fn act(&self, rank: usize) -> Clock {
        let mut inside = self.inside.borrow_mut();
        inside.clocks[rank][rank] += 1;
        inside.clocks[rank]
    }

    /// A rank comes to know what another one knew, by way of a message.
    pub(crate) fn learn(&self, rank: usize, clock: &Clock) {
        join(&mut self.inside.borrow_mut().clocks[rank], clock);
    }

    /// Whether a rank knows of an action of another one.
    pub(crate) fn knows(&self, rank: usize, of: usize, action: u64) -> bool {
        self.inside.borrow().clocks[rank][of] >= action
    }
}

impl Words for View<'_> {
    fn load(&self, at: usize) -> u64 {
        let inside = &mut *self.memory.inside.borrow_mut();
        let (values, clock) = (&inside.words[at], &inside.clocks[self.rank]);
        // Number 0 is the word as it was at first.
        let known = |stored: &Stored| !self.memory.weak && stored.clock[stored.writer] <= clock[stored.writer];
        let own = values.last().is_some_and(|stored| stored.writer == self.rank);
        let least = values.iter().rposition(known).map_or(0, |index| index + 1);
        let least = least.max(inside.seen[at][self.rank]);
        let older = !own && inside.chance.percent(40);
        let picked = if older { least + inside.chance.index(values.len() - least + 1) } else { values.len() };
        inside.seen[at][self.rank] = picked;
        if picked == 0 {
            return 0;
        }
        let stored = &values[picked - 1];
        let (value, clock) = (stored.value, stored.clock);
        if !self.memory.weak {
            join(&mut inside.clocks[self.rank], &clock);
        }
        value
    }

    fn store(&self, at: usize, value: u64) {
        let clock = self.memory.act(self.rank);
        let mut inside = self.memory.inside.borrow_mut();
        let values = &mut inside.words[at];
        assert!(values.last().is_none_or(|stored| stored.writer == self.rank), "W1: word {at} has two writers");
        values.push(Stored { value, writer: self.rank, clock });
    }
}
