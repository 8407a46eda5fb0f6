//! Gradients that live on NVMe: gathered in a slot as backward makes them, then written.
//!
//! G1: a unit has at most one gradient slot, and a slot one unit. G2: a unit's update begins only when its gradients are written. G3: every
//! slot taken is given back exactly once. G4: gradients are written only when no piece of an update reads them, not even in vain. G5: who waits
//! for a slot gets one: if nothing is on its way out, the unit that has gathered longest is written as it is.

use super::{Command, Machine, Update, progress::Grads};
use crate::quantities::UnitId;

impl Machine {
    /// The caller wants to copy gradients of the unit down: true if it has a slot now, which stays its own until [`Machine::flush_grads`].
    /// Otherwise ask again after the next event. With `keep` the slot begins with what lies on NVMe.
    pub fn gather_grads(&mut self, unit: UnitId, keep: bool, out: &mut Vec<Command>) -> bool {
        match self.units[unit.index()].grads {
            Grads::Gathered => return true,
            // What was begun ahead and dropped may be reading them.
            _ if self.is_dropping(unit) => return false,
            Grads::Settled if keep && self.grad_free > 0 => {
                self.expect_grads(unit, out);
                return self.gathers_grads(unit);
            }
            Grads::Settled if self.grad_free > 0 => {
                self.grad_free -= 1;
                self.units[unit.index()].grads = Grads::Gathered;
                self.gathering.push(unit);
                return true;
            }
            Grads::Settled | Grads::Reading | Grads::Landing | Grads::Writing => {}
        }
        let leaves = |s: &super::UnitState| matches!(s.grads, Grads::Landing | Grads::Writing);
        if !self.units.iter().any(leaves)
            && let Some(&oldest) = self.gathering.first()
        {
            self.flush_grads(oldest, out);
        }
        false
    }

    /// The caller will soon add to gradients of the unit: they are read into a slot, if one is free and no update reads them.
    pub fn expect_grads(&mut self, unit: UnitId, out: &mut Vec<Command>) {
        let s = &self.units[unit.index()];
        let read = s.update != Update::None || s.ahead.is_some();
        if self.grads_settled(unit) && self.grad_free > 0 && !read {
            self.grad_free -= 1;
            self.units[unit.index()].grads = Grads::Reading;
            out.push(Command::ReadGrads(unit));
        }
    }

    /// The end of [`Command::ReadGrads`].
    pub fn grads_read(&mut self, unit: UnitId, out: &mut Vec<Command>) {
        self.units[unit.index()].grads = Grads::Gathered;
        self.gathering.push(unit);
        self.pump(out);
    }

    /// Nothing more is copied into the unit's slot: what is there is to be written. Nothing to do for a unit without one.
    pub fn flush_grads(&mut self, unit: UnitId, out: &mut Vec<Command>) {
        let s = &mut self.units[unit.index()];
        if s.grads == Grads::Gathered {
            s.grads = Grads::Landing;
            self.gathering.retain(|&u| u != unit);
            out.push(Command::SealGrads(unit));
        }
    }

    /// Has all units' gradients written.
    pub fn flush_all_grads(&mut self, out: &mut Vec<Command>) {
        while let Some(&unit) = self.gathering.first() {
            self.flush_grads(unit, out);
        }
    }

    /// The end of [`Command::SealGrads`].
    pub fn grads_landed(&mut self, unit: UnitId, out: &mut Vec<Command>) {
        self.units[unit.index()].grads = Grads::Writing;
        out.push(Command::WriteGrads(unit));
    }

    /// The end of [`Command::WriteGrads`].
    pub fn grads_written(&mut self, unit: UnitId, out: &mut Vec<Command>) {
        self.units[unit.index()].grads = Grads::Settled;
        self.grad_free += 1;
        self.pump(out);
    }

    /// True while the unit's gradients are in a slot that copies may be added to.
    pub fn gathers_grads(&self, unit: UnitId) -> bool {
        self.units[unit.index()].grads == Grads::Gathered
    }

    /// True unless the unit's gradients are in a slot.
    pub fn grads_settled(&self, unit: UnitId) -> bool {
        self.units[unit.index()].grads == Grads::Settled
    }
}
