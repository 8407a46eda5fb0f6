//! A save that reads units while its rank and the others go on: each as it was at the call (A8).

use super::{
    Fault,
    memory::Memory,
    rank::{Model, Rank, posts},
};
use crate::chance::Chance;

/// A unit that a save has yet to read.
#[derive(Debug)]
pub(super) struct Saved {
    unit: usize,
    /// The step of its last update at the call, and what that gives.
    version: u64,
    result: u64,
}

impl Rank {
    /// Begins a save of all units; false while the one before is under way.
    pub(super) fn save(&mut self, memory: &Memory, model: &Model) -> bool {
        if !self.saving.is_empty() {
            return false;
        }
        let view = memory.view(self.rank);
        for unit in 0..self.versions.len() {
            if self.fault != Fault::Tardy {
                posts(&model.board, &view, self.rank).begin_read(unit);
            }
            let (version, result) = (self.versions[unit], self.ahead.results[unit]);
            self.saving.push(Saved { unit, version, result });
        }
        true
    }

    /// Whether this rank's own save has yet to read a unit before this step.
    pub(super) fn reads_before(&self, unit: usize, step: u64) -> bool {
        self.saving.iter().any(|saved| saved.unit == unit && saved.version < step)
    }

    /// The thread that saves: reads a unit; false if there is none, or it has to wait.
    pub(super) fn read_saved(&mut self, memory: &Memory, model: &mut Model, chance: &mut Chance) -> bool {
        if self.saving.is_empty() {
            return false;
        }
        let at = chance.index(self.saving.len());
        let Saved { unit, version, result } = self.saving[at];
        let view = memory.view(self.rank);
        if self.fault == Fault::Tardy {
            posts(&model.board, &view, self.rank).begin_read(unit);
        }
        if self.fault == Fault::Rash {
            posts(&model.board, &view, self.rank).end_read(unit);
        }
        // A step is posted when the one before is made: places are those of the call.
        if self.versions[unit] == version && !self.settled(memory, model, unit) {
            return false;
        }
        if !self.at_home(memory, model, unit, false) {
            return false;
        }
        model.weights[unit].iter_mut().for_each(|part| part.read(memory, self.rank, result, "weights saved"));
        self.read_states(memory, model, unit, result);
        posts(&model.board, &view, self.rank).end_read(unit);
        self.saving.swap_remove(at);
        true
    }
}
