//! Gradients that live on NVMe, as the runtime gathers and writes them.

use funicular::quantities::UnitId;

use super::{Io, Purpose, Slot, World};
use crate::{
    chance::mix,
    streams::{COMPUTE, DOWN, Op, TORN},
};

impl World {
    /// Copies new gradients of a unit down, if it has a slot for them; with `keep` beside those that are there already.
    pub(crate) fn gather(&mut self, unit: UnitId, content: u64, keep: bool) -> bool {
        let u = unit.index();
        assert!(!self.machine.update_unmade(unit), "the update of {unit} still reads its gradients");
        let had = self.device.gathered[u].is_some();
        let ready = self.step(|m, out| m.gather_grads(unit, keep, out));
        if !ready {
            return false;
        }
        if !had {
            assert!(!keep, "G1: what lies on NVMe is not in the slot");
            assert!(self.grad_free > 0, "G1: no gradient slot is free");
            self.grad_free -= 1;
            self.device.gathered[u] = Some(TORN);
        }
        let sealed = self.sealing.iter().any(|s| s.1 == unit) || self.moves_grads(unit);
        assert!(!sealed, "G1: {unit} gathers in a slot that is on its way out");
        self.device.enqueue(DOWN, Op::Wait(self.device.record(COMPUTE)));
        self.device.enqueue(DOWN, Op::CopyGrad(unit, content));
        self.grads[u].0 = content;
        true
    }

    /// Gradients of a unit will be added to soon.
    pub(crate) fn expect(&mut self, unit: UnitId) {
        self.step(|m, out| m.expect_grads(unit, out));
    }

    pub(super) fn read_grads(&mut self, unit: UnitId) {
        self.note(mix(11, u64::from(unit.0)));
        assert!(self.grad_free > 0, "G1: no gradient slot is free");
        self.grad_free -= 1;
        let busy = self.device.gathered[unit.index()].is_some() || self.moves_grads(unit);
        assert!(!busy, "G1: {unit} has a slot already");
        self.submit(unit, Purpose::ReadGrads, Slot::default());
    }

    pub(super) fn grads_read(&mut self, unit: UnitId, slot: Slot) {
        let expected = self.grads[unit.index()].0;
        assert_eq!(slot.grad, Some(expected), "G1: {unit} adds to other gradients than its own");
        self.device.gathered[unit.index()] = slot.grad;
        self.step(|m, out| m.grads_read(unit, out));
    }

    pub(super) fn seal_grads(&mut self, unit: UnitId) {
        self.note(mix(9, u64::from(unit.0)));
        assert!(self.device.gathered[unit.index()].is_some(), "G1: {unit} has no slot to seal");
        assert!(!self.sealing.iter().any(|s| s.1 == unit), "G3: a slot is sealed twice");
        self.sealing.push_back((self.device.record(DOWN), unit));
    }

    pub(super) fn grads_landed(&mut self) {
        let (_, unit) = self.sealing.pop_front().expect("asked only if there is one");
        self.step(|m, out| m.grads_landed(unit, out));
    }

    pub(super) fn write_grads(&mut self, unit: UnitId) {
        self.note(mix(10, u64::from(unit.0)));
        assert!(!self.moves_grads(unit), "G1: two writes of the gradients of {unit}");
        let read = |io: &Io| io.unit == unit && matches!(io.purpose, Purpose::ReadChunk(_));
        assert!(
            !self.disk.iter().any(read),
            "G4: {unit} is read while its gradients are written, and would fail its checksum"
        );
        let grad = self.device.gathered[unit.index()];
        assert_eq!(grad, Some(self.grads[unit.index()].0), "G2: {unit} writes gradients that have not landed");
        self.submit(unit, Purpose::WriteGrads, Slot { grad, ..Slot::default() });
    }

    pub(super) fn grads_written(&mut self, unit: UnitId) {
        assert!(self.device.gathered[unit.index()].take().is_some(), "G3: {unit} has no slot to give back");
        self.grad_free += 1;
        assert!(self.grad_free <= self.model.plan.grad_slots.0, "G3: more gradient slots than there are");
        self.step(|m, out| m.grads_written(unit, out));
    }

    /// Before an update reads gradients.
    pub(super) fn check_grads(&self, unit: UnitId) {
        let busy = self.device.gathered[unit.index()].is_some() || self.moves_grads(unit);
        assert!(!busy, "G2: {unit} is updated before its gradients are written");
    }

    fn moves_grads(&self, unit: UnitId) -> bool {
        let grads = |io: &Io| matches!(io.purpose, Purpose::WriteGrads | Purpose::ReadGrads);
        self.disk.iter().any(|io| io.unit == unit && grads(io))
    }
}
