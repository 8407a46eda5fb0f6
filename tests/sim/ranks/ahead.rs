//! Updates that a rank makes ahead of their step: the second places of parameters and states, and what a rank knows of them.

use super::{
    Fault,
    memory::Memory,
    program::Way,
    rank::{Bytes, Model, Rank, posts},
};
use crate::chance::{Chance, mix};

/// What changes places, per unit and owner.
#[derive(Debug)]
pub(super) struct Places {
    /// Parameters that were made ahead.
    weights: Vec<Vec<Bytes>>,
    pub(super) states: [Vec<Vec<Bytes>>; 2],
    /// What the owner has of both sets on its device.
    pub(super) above: [Vec<Vec<Bytes>>; 2],
}

impl Places {
    pub(super) fn new(parts: &[Vec<Bytes>]) -> Self {
        let two = || [parts.to_vec(), parts.to_vec()];
        Self { weights: parts.to_vec(), states: two(), above: two() }
    }
}

/// Per unit, what a rank knows.
#[derive(Debug)]
pub(super) struct Ahead {
    /// What its last update gives: a number that tells from what it is made.
    pub(super) results: Vec<u64>,
    /// In which place its states are; and the update under way changes that.
    place: Vec<usize>,
    turns: Vec<bool>,
    /// What the update under way is made from, and whether it is the one that was foreseen.
    foreseen: Vec<bool>,
    /// It may be made ahead, once its gradients are there; and what that gave, and from which backward.
    may: Vec<bool>,
    landed: Vec<u64>,
    made: Vec<Option<u64>>,
}

/// States of a rank that follow their weights: of which unit and step, from where they are made, and into which place.
#[derive(Debug)]
pub(super) struct Trailing {
    pub(super) unit: usize,
    step: u64,
    backward: u64,
    before: u64,
    result: u64,
    from: usize,
    to: usize,
}

/// What an update gives.
fn result(before: u64, backward: u64, way: Way) -> u64 {
    mix(mix(before, backward), u64::from(way.foreseen))
}

const FORESEEN: Way = Way { whole: true, foreseen: true };

impl Ahead {
    pub(super) fn new(units: usize) -> Self {
        Self {
            results: vec![0; units],
            place: vec![0; units],
            turns: vec![false; units],
            foreseen: vec![false; units],
            may: vec![false; units],
            landed: vec![0; units],
            made: vec![None; units],
        }
    }

    /// A unit's gradients are exchanged: what was made from those before is dropped, unless `keep`.
    pub(super) fn foresee(&mut self, unit: usize, keep: bool) {
        self.may[unit] = true;
        self.made[unit].take_if(|_| !keep);
    }

    /// In which place a unit's states are.
    pub(super) fn place(&self, unit: usize) -> usize {
        self.place[unit]
    }

    /// Nothing is made ahead before gradients come.
    pub(super) fn drop_all(&mut self) {
        self.may.fill(false);
        self.made.fill(None);
    }

    /// This rank's slices of a unit's gradients are there.
    pub(super) fn landed(&mut self, unit: usize, backward: u64) {
        self.landed[unit] = backward;
    }

    /// A step is posted that updates a unit.
    pub(super) fn step(&mut self, unit: usize, backward: u64, way: Way) {
        self.results[unit] = result(self.results[unit], backward, way);
        (self.turns[unit], self.foreseen[unit], self.may[unit]) = (way.whole, way == FORESEEN, false);
    }
}

impl Rank {
    /// Whether the weights of a unit's last update are known to be made by all.
    pub(super) fn published(&self, memory: &Memory, model: &Model, unit: usize) -> bool {
        let view = memory.view(self.rank);
        posts(&model.board, &view, self.rank).unpublished(unit, self.versions[unit]).is_none()
    }

    /// The same of its states; then they have changed places.
    pub(super) fn settled(&mut self, memory: &Memory, model: &Model, unit: usize) -> bool {
        let view = memory.view(self.rank);
        let posts = posts(&model.board, &view, self.rank);
        let made = self.fault == Fault::Half || posts.unmade(unit, self.versions[unit]).is_none();
        if !made || !self.published(memory, model, unit) {
            return false;
        }
        if std::mem::take(&mut self.ahead.turns[unit]) {
            self.ahead.place[unit] ^= 1;
        }
        true
    }

    /// Makes an update ahead, of a unit whose gradients are there; false if there is none.
    pub(super) fn make_ahead(&mut self, memory: &Memory, model: &mut Model) -> bool {
        let rank = self.rank;
        let ready = |unit: &usize| {
            let queued = self.queue.iter().any(|(queued, _)| queued == unit);
            self.ahead.may[*unit] && !queued && self.ahead.landed[*unit] == self.exchanged[*unit]
        };
        let Some(unit) = (0..self.exchanged.len()).rev().find(ready) else { return false };
        if !self.settled(memory, model, unit) {
            return false;
        }
        let (before, backward, place) = (self.ahead.results[unit], self.exchanged[unit], self.ahead.place[unit]);
        let made = result(before, backward, FORESEEN);
        model.grads[unit][rank].read(memory, rank, backward, "gradients of an update ahead");
        model.weights[unit][rank].read(memory, rank, before, "weights of an update ahead");
        self.read_own(memory, model, (unit, place), before);
        model.places.weights[unit][rank].write(memory, rank, made, "weights made ahead");
        self.write_own(memory, model, (unit, 1 - place), made);
        if self.fault == Fault::Forward {
            model.weights[unit][rank].write(memory, rank, made, "weights");
        }
        (self.ahead.may[unit], self.ahead.made[unit]) = (false, Some(made));
        true
    }

    /// Makes this rank's part of a step's update, which all have posted, or completes what was made ahead; true if it makes the weights alone,
    /// as it may where `first`.
    pub(super) fn make_own(
        &mut self,
        memory: &Memory,
        model: &mut Model,
        (unit, step): (usize, u64),
        first: bool,
    ) -> bool {
        let (rank, ahead) = (self.rank, &mut self.ahead);
        let (place, turns, result) = (ahead.place[unit], ahead.turns[unit], ahead.results[unit]);
        let made = ahead.made[unit].take();
        model.grads[unit][rank].read(memory, rank, self.exchanged[unit], "gradients of an update");
        if let Some(made) = made.filter(|_| turns && (ahead.foreseen[unit] || self.fault == Fault::Stubborn)) {
            model.places.weights[unit][rank].read(memory, rank, made, "weights made ahead");
            model.weights[unit][rank].write(memory, rank, made, "weights");
            return false;
        }
        let to = if turns && self.fault != Fault::Aside { 1 - place } else { place };
        if first {
            let before = self.own_version(model, unit, place);
            self.read_own(memory, model, (unit, place), before);
            let backward = self.exchanged[unit];
            self.trail.push(Trailing { unit, step, backward, before, result, from: place, to });
        } else {
            self.write_own(memory, model, (unit, to), result);
        }
        model.weights[unit][rank].write(memory, rank, result, "weights");
        first
    }

    /// Makes states that follow their weights, and publishes them; false if there are none.
    pub(super) fn make_states(&mut self, memory: &Memory, model: &mut Model, chance: &mut Chance) -> bool {
        if self.trail.is_empty() {
            return false;
        }
        let Trailing { unit, step, backward, before, result, from, to } =
            self.trail.swap_remove(chance.index(self.trail.len()));
        let (rank, view) = (self.rank, memory.view(self.rank));
        model.grads[unit][rank].read(memory, rank, backward, "gradients of states");
        self.read_own(memory, model, (unit, from), before);
        self.write_own(memory, model, (unit, to), result);
        posts(&model.board, &view, rank).publish_states(unit, step);
        true
    }

    /// Reads all of a unit's states, which are those of this result.
    pub(super) fn read_states(&self, memory: &Memory, model: &mut Model, unit: usize, result: u64) {
        let place = self.ahead.place[unit];
        for part in &mut model.places.states[place][unit] {
            part.read(memory, self.rank, result, "states");
        }
    }
}
