//! Updates that a rank makes ahead of their step: the second places of parameters and states, and what a rank knows of them.

use super::{
    Fault,
    memory::Memory,
    program::Way,
    rank::{Bytes, Model, Rank, posts},
};
use crate::chance::mix;

/// What changes places, per unit and owner.
#[derive(Debug)]
pub(super) struct Places {
    /// Parameters that were made ahead.
    weights: Vec<Vec<Bytes>>,
    states: [Vec<Vec<Bytes>>; 2],
}

impl Places {
    pub(super) fn new(parts: &[Vec<Bytes>]) -> Self {
        Self { weights: parts.to_vec(), states: [parts.to_vec(), parts.to_vec()] }
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
    /// Whether a unit's last update is known to be made by all; then its states have changed places.
    pub(super) fn settled(&mut self, memory: &Memory, model: &Model, unit: usize) -> bool {
        let view = memory.view(self.rank);
        if posts(&model.board, &view, self.rank).unpublished(unit, self.versions[unit]).is_some() {
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
        model.places.states[place][unit][rank].read(memory, rank, before, "states of an update ahead");
        model.places.weights[unit][rank].write(memory, rank, made, "weights made ahead");
        model.places.states[1 - place][unit][rank].write(memory, rank, made, "states made ahead");
        if self.fault == Fault::Forward {
            model.weights[unit][rank].write(memory, rank, made, "weights");
        }
        (self.ahead.may[unit], self.ahead.made[unit]) = (false, Some(made));
        true
    }

    /// Makes this rank's part of a step's update, which all have posted, or completes what was made ahead.
    pub(super) fn make_own(&mut self, memory: &Memory, model: &mut Model, unit: usize) {
        let (rank, ahead) = (self.rank, &mut self.ahead);
        let (place, turns, result) = (ahead.place[unit], ahead.turns[unit], ahead.results[unit]);
        let made = ahead.made[unit].take();
        model.grads[unit][rank].read(memory, rank, self.exchanged[unit], "gradients of an update");
        if let Some(made) = made.filter(|_| turns && (ahead.foreseen[unit] || self.fault == Fault::Stubborn)) {
            model.places.weights[unit][rank].read(memory, rank, made, "weights made ahead");
            model.weights[unit][rank].write(memory, rank, made, "weights");
            return;
        }
        let to = if turns && self.fault != Fault::Aside { 1 - place } else { place };
        model.weights[unit][rank].write(memory, rank, result, "weights");
        model.places.states[to][unit][rank].write(memory, rank, result, "states");
    }

    /// Reads all of a unit's states, as a save does.
    pub(super) fn read_states(&self, memory: &Memory, model: &mut Model, unit: usize) {
        let (place, result) = (self.ahead.place[unit], self.ahead.results[unit]);
        for part in &mut model.places.states[place][unit] {
            part.read(memory, self.rank, result, "states");
        }
    }
}
