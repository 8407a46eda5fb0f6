//! What the ranks of a run do: the same steps, after backwards of their own.

use crate::chance::Chance;

/// Where one rank meets no other.
const ODD: u64 = 1000;
/// Where they meet before a load, and after it.
const LOADS: u64 = 500;

/// What the training thread of a rank does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    /// The device reads a unit's weights.
    Read(usize),
    /// Posts a unit's gradients.
    Post { unit: usize, backward: u64, notes: Vec<u8> },
    /// Exchanges the units that all have posted, and waits for all at the end.
    End { backward: u64 },
    /// All gradients are looked at.
    Look { backward: u64 },
    /// Is at its step.
    AtStep { backward: u64 },
    /// Takes it.
    Step { number: u64 },
    /// Meets all others at a place.
    Meet { place: u64 },
    /// Lets what is under way end, before a load.
    Quiesce,
    /// A load into what all share, which one rank makes.
    Load { mine: bool },
    /// Begins a save of what the steps so far give, which is read later.
    Save,
}

/// How a step updates its units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Way {
    /// All of them, so that states change places.
    pub(crate) whole: bool,
    /// By the numbers that the last one told.
    pub(crate) foreseen: bool,
}

/// A run.
#[derive(Debug)]
pub(crate) struct Program {
    pub(crate) size: usize,
    /// Parameters of each unit.
    pub(crate) units: Vec<usize>,
    /// Per step, the units that it updates.
    pub(crate) steps: Vec<Vec<usize>>,
    /// Per step, how.
    pub(crate) ways: Vec<Way>,
    pub(crate) ops: Vec<Vec<Op>>,
    /// Per rank, whether it does fewer backwards somewhere.
    pub(crate) fewer: Vec<bool>,
    /// One rank comes to a meeting alone, before a step that the others are about to take.
    pub(crate) crossed: bool,
}

impl Program {
    pub(crate) fn random(chance: &mut Chance) -> Self {
        let size = 2 + chance.index(7);
        let units: Vec<usize> = (0..1 + chance.index(4)).map(|_| chance.index(12)).collect();
        let partial = chance.percent(30);
        let count = 1 + chance.index(4);
        let steps: Vec<Vec<usize>> = (0..count)
            .map(|_| {
                let mut some: Vec<usize> = (0..units.len()).filter(|_| !partial || chance.percent(60)).collect();
                if some.is_empty() {
                    some.push(chance.index(units.len()));
                }
                some
            })
            .collect();
        let mut ops = vec![Vec::new(); size];
        let mut fewer = vec![false; size];
        let crossed = chance.percent(25);
        let odd = (chance.index(size), chance.index(count), chance.percent(50));
        let saves = (chance.index(size), chance.pick(&[0, 0, 40]));
        let mut before = 0;
        for number in 0..count {
            let most = chance.pick(&[0, 1, 1, 1, 2, 3]);
            let skips = chance.percent(25);
            let whole = chance.index(size);
            // Not after fewer backwards than others have begun: those wait for this rank at its step.
            let (before_all, before_step) = (chance.percent(20), chance.percent(20) && !skips);
            let loads = chance.percent(15) && !skips && !crossed;
            for rank in 0..size {
                let alone = |early| crossed && odd == (rank, number, early);
                if before_all {
                    ops[rank].push(Op::Meet { place: 2 * number as u64 + 1 });
                }
                if alone(true) {
                    ops[rank].push(Op::Meet { place: ODD });
                }
                // One rank does all of them.
                let mine = if skips && rank != whole { chance.below(most + 1) } else { most };
                fewer[rank] |= mine < most;
                let ops = &mut ops[rank];
                for backward in before + 1..=before + mine {
                    // What is not read in forward may have a gradient all the same.
                    (0..units.len()).filter(|_| chance.percent(70)).for_each(|unit| ops.push(Op::Read(unit)));
                    let has = chance.pick(&[0, 30, 50]);
                    ops.extend((0..units.len()).rev().map(|unit| {
                        let notes = (0..units[unit]).map(|_| u8::from(chance.percent(has))).collect();
                        Op::Post { unit, backward, notes }
                    }));
                    ops.push(Op::End { backward });
                    if chance.percent(50) {
                        ops.push(Op::Look { backward });
                    }
                }
                // It may evaluate between backward and step.
                (0..chance.below(3)).for_each(|_| ops.push(Op::Read(chance.index(units.len()))));
                if before_step {
                    ops.push(Op::Meet { place: 2 * number as u64 + 2 });
                }
                if alone(false) {
                    ops.push(Op::Meet { place: ODD });
                }
                if loads {
                    let place = LOADS + 2 * number as u64;
                    ops.extend([
                        Op::Quiesce,
                        Op::Meet { place },
                        Op::Load { mine: rank == 0 },
                        Op::Meet { place: place + 1 },
                    ]);
                }
                ops.push(Op::AtStep { backward: before + mine });
                if rank == saves.0 && chance.percent(saves.1) {
                    ops.push(Op::Save);
                }
                ops.push(Op::Step { number: number as u64 + 1 });
                if rank == saves.0 && chance.percent(saves.1) {
                    ops.push(Op::Save);
                }
            }
            before += most;
        }
        for ops in &mut ops {
            (0..units.len()).for_each(|unit| ops.push(Op::Read(unit)));
        }
        let ways = steps.iter().map(|_| Way { whole: chance.percent(80), foreseen: chance.percent(70) }).collect();
        Self { size, units, steps, ways, ops, fewer, crossed }
    }
}
