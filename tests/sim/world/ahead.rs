//! Updates ahead of their step of units that stream, as the runtime begins, makes, drops and takes them.

use funicular::quantities::UnitId;

use super::{Purpose, Slot, World, state};
use crate::{
    chance::mix,
    streams::{COMPUTE, DOWN, Gate},
};

/// What an update ahead was begun from, and what it makes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Begun {
    from: u64,
    to: u64,
    number: u64,
    grad: u64,
    after: [Gate; 2],
}

impl World {
    /// Begins a unit's update ahead, if it can have one and none is under way.
    pub(crate) fn begin_ahead_of(&mut self, unit: UnitId) {
        let u = unit.index();
        let may = self.model.plan.spare[u] && self.model.chunks[u] > 0 && self.begun[u].is_none();
        if !may || self.machine.update_queued(unit) {
            return;
        }
        let number = self.jobs[u].number + 1;
        let from = self.content[u];
        let after = [self.device.record(COMPUTE), self.device.record(DOWN)];
        self.begun[u] = Some(Begun { from, to: mix(from, number), number, grad: self.grads[u].0, after });
        self.ordinary[u] = false;
        if !self.step(|m, out| m.begin_ahead(unit, out)) {
            self.begun[u] = None;
        }
    }

    /// An input of a unit's update changes.
    pub(crate) fn drop_ahead(&mut self, unit: UnitId) {
        if self.model.chunks[unit.index()] > 0 && !self.machine.update_queued(unit) {
            self.step(|m, out| m.drop_ahead(unit, out));
            self.begun[unit.index()] = None;
        }
    }

    /// The step asks for what was begun, or, as where clipping bites, for something else.
    pub(super) fn decide(&mut self) {
        let unit = self.tasks.pop_front().expect("there is one").unit;
        let u = unit.index();
        let take = self.begun[u].is_some() && !mix(self.jobs[u].number, 5 + u as u64).is_multiple_of(3);
        if !take {
            self.begun[u] = None;
            self.ordinary[u] = true;
        }
        self.step(|m, out| m.decided(unit, take, out));
    }

    /// Pieces that were read and whose inputs are there.
    pub(super) fn ahead_ready(&self) -> Option<usize> {
        self.ahead.iter().position(|(unit, ..)| match self.begun[unit.index()] {
            None => true,
            Some(begun) => {
                let filled = self.device.passed(self.gates[unit.index()].fill);
                filled && begun.after.iter().all(|&gate| self.device.passed(gate))
            }
        })
    }

    pub(super) fn run_ahead(&mut self) {
        let at = self.ahead_ready().expect("asked only if there is one");
        let (unit, chunk, mut slot) = self.ahead.swap_remove(at);
        let (u, c) = (unit.index(), chunk as usize);
        let begun = self.begun[u];
        if let Some(begun) = begun {
            let on_disk = self.model.params_on_nvme(unit);
            let spare = self.machine.in_spare(unit);
            let here = if spare { self.device.spare[u][c] } else { self.device.params[u][c] };
            let param = if on_disk { slot.param } else { Some(here) };
            assert_eq!(param, Some(begun.from), "H1: the update of {unit} ahead finds other parameters");
            if self.model.states_on_nvme(unit) {
                assert_eq!(slot.state, Some(state(begun.number - 1)), "H1: it finds other states of {unit}");
                slot.state = Some(state(begun.number));
            }
            if self.model.grads_on_nvme(unit) {
                assert_eq!(slot.grad, Some(begun.grad), "G2: the update of {unit} ahead finds other gradients");
            }
            if on_disk {
                slot.param = Some(begun.to);
            } else if spare {
                self.device.params[u][c] = begun.to;
            } else {
                self.device.spare[u][c] = begun.to;
            }
            slot.update = begun.number;
        }
        self.parked.push((unit, chunk, slot));
        self.step(|m, out| m.ran_ahead(unit, chunk, begun.is_some(), out));
    }

    pub(super) fn write_ahead(&mut self, unit: UnitId, chunk: u32) {
        let slot = self.unpark(unit, chunk);
        let place = 1 - self.current[unit.index()];
        self.submit_to(unit, Purpose::WriteChunk(chunk), slot, place);
    }

    pub(super) fn swap_places(&mut self, unit: UnitId) {
        let u = unit.index();
        let begun = self.begun[u].take().expect("H1: nothing was made that could be current");
        let job = &mut self.jobs[u];
        assert_eq!(
            (begun.number, begun.to),
            (job.number, job.to),
            "H1: {unit} takes an update that its step did not ask for"
        );
        job.ran.fill(true);
        self.current[u] = 1 - self.current[u];
    }

    pub(super) fn unpark(&mut self, unit: UnitId, chunk: u32) -> Slot {
        let at = self.parked.iter().position(|(u, c, _)| (*u, *c) == (unit, chunk));
        self.parked.swap_remove(at.expect("R5: a chunk has its slot")).2
    }
}
