//! Ranks with several models, which come to the calls of these in one order, or one of them in another: then, and only then, each of two waits for
//! the other in a call of another model.

use funicular::schedule::ranks::{
    board::{Board, Words},
    crossed::Call,
    posts::{Arrival, Line, Look, Posts},
};

use super::memory::{Memory, View};
use crate::{chance::Chance, variable};

/// The words of one model, in memory that has those of several.
struct Part<'a> {
    view: View<'a>,
    first: usize,
}

impl Words for Part<'_> {
    fn load(&self, at: usize) -> u64 {
        self.view.load(self.first + at)
    }

    fn store(&self, at: usize, value: u64) {
        self.view.store(self.first + at, value);
    }
}

/// The word of the head that tells boards apart.
const IDENTITY: usize = 3;

/// A rank: the calls that it has yet to come to, each of a model.
#[derive(Clone, Debug)]
struct Rank {
    calls: Vec<(usize, bool)>,
    at: usize,
    inside: bool,
}

struct Run {
    memory: Memory,
    board: Board,
    models: usize,
    /// They tell in which calls they wait.
    tell: bool,
}

impl Run {
    fn part(&self, rank: usize, model: usize) -> Part<'_> {
        Part { view: self.memory.view(rank), first: model * self.board.words() }
    }

    /// A turn of a rank: whether it has moved, and whether it is crossed.
    fn turn(&self, number: usize, rank: &mut Rank) -> (bool, bool) {
        let Some(&(model, step)) = rank.calls.get(rank.at) else { return (false, false) };
        let parts: Vec<Part<'_>> = (0..self.models).map(|model| self.part(number, model)).collect();
        let on = |model: usize| Posts { board: &self.board, words: &parts[model], rank: number };
        let (posts, call) = (on(model), if step { Call::Step } else { Call::Meeting });
        let first = !std::mem::replace(&mut rank.inside, true);
        if first && step {
            posts.arrive(0);
        } else if first {
            posts.post(Line::Meetings, &[1]);
        }
        let through = match step {
            true => posts.arrived(0) == Arrival::Step,
            false => posts.look(Line::Meetings, posts.count(Line::Meetings)) == Look::All,
        };
        if (first || through) && self.tell {
            for other in 0..self.models {
                let here = if other == model { call } else { Call::Elsewhere(posts.identity()) };
                on(other).wait_in((!through).then_some(here));
            }
        }
        if through {
            (rank.at, rank.inside) = (rank.at + 1, false);
            return (true, false);
        }
        let there = |(waiting, identity): (usize, u64)| {
            let its = (0..self.models).find(|&model| on(model).identity() == identity);
            its.is_some_and(|model| on(model).waits_for_this(waiting).is_some())
        };
        (first, posts.crossed(call).is_some() || posts.elsewhere(call).any(there))
    }
}

/// Runs one seed; whether two ranks were found crossed.
fn simulate(seed: u64, swap: bool, tell: bool) -> bool {
    let mut chance = Chance::new(seed ^ 0x656c_7365);
    let (size, models) = (2 + chance.index(5), 2 + chance.index(2));
    let board = Board::new(size, std::iter::empty());
    let memory = Memory::new(models * board.words(), false, chance.word());
    let run = Run { memory, board, models, tell };
    for model in 0..models {
        // Before any rank looks, as rank 0 does it.
        run.part(0, model).store(IDENTITY, 100 + model as u64);
    }
    for rank in 1..size {
        run.memory.learn(rank, &run.memory.act(0));
    }
    let mut calls: Vec<(usize, bool)> =
        (0..2 + chance.index(8)).map(|_| (chance.index(models), chance.percent(50))).collect();
    calls.extend([(0, true), (1, true)]);
    let mut ranks = vec![Rank { calls, at: 0, inside: false }; size];
    if swap {
        let (odd, calls) = (chance.index(size), ranks[0].calls.clone());
        let differ: Vec<usize> = (1..calls.len()).filter(|&at| calls[at].0 != calls[at - 1].0).collect();
        let at = differ[chance.index(differ.len())];
        ranks[odd].calls.swap(at - 1, at);
    }
    let mut idle = 0;
    loop {
        if ranks.iter().all(|rank| rank.at == rank.calls.len()) {
            assert!(!swap, "calls in another order were made");
            return false;
        }
        let number = chance.index(size);
        let (moved, crossed) = run.turn(number, &mut ranks[number]);
        if crossed {
            assert!(swap, "no rank waits for ever: {ranks:?}");
            return true;
        }
        idle = if moved { 0 } else { idle + 1 };
        if idle > 4000 {
            return false;
        }
    }
}

#[test]
fn ranks_that_come_to_two_models_in_another_order_are_found() {
    for seed in 0..variable("FUNICULAR_SIM_SEEDS").unwrap_or(400).min(10_000) {
        assert!(!simulate(seed, false, true));
        assert!(simulate(seed, true, true), "seed {seed}");
    }
    assert!(!simulate(0, true, false), "nothing is known where nothing is told");
}
