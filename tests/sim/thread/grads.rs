//! Gradients that live on NVMe, as the wrapper brings them down.

use funicular::quantities::UnitId;

use super::{Act, Thread};
use crate::{
    chance::{Chance, mix},
    world::World,
};

impl Thread {
    /// A unit's backward: its gradients, in one part or several; most often they are complete then.
    pub(super) fn plan_grads(&mut self, unit: UnitId, chance: &mut Chance) {
        for _ in 0..1 + chance.below(3) {
            if chance.percent(20) {
                let other = self.order[chance.index(self.order.len())];
                self.todo.push_back(Act::Expect(other));
            }
            self.todo.push_back(Act::Gather(unit, chance.percent(40)));
        }
        if chance.percent(70) {
            self.todo.push_back(Act::FlushGrads(unit));
        }
    }

    pub(super) fn perform_grads(&mut self, act: Act, first: bool, world: &mut World) -> bool {
        match act {
            Act::BeginAhead(unit) => {
                if world.model.layout.unit(unit).trainable() {
                    world.begin_ahead_of(unit);
                }
                self.then(&[])
            }
            Act::Expect(unit) => {
                if world.model.grads_on_nvme(unit) {
                    world.expect(unit);
                }
                self.then(&[])
            }
            Act::Gather(unit, keep) => {
                if world.machine.update_unmade(unit) {
                    return self.then(&[Act::SettleUpdate(unit), act]);
                }
                world.drop_ahead(unit);
                if first {
                    self.edits += 1;
                }
                let ready = world.gather(unit, mix(5000 + self.edits, u64::from(unit.0)), keep);
                self.when(ready)
            }
            Act::FlushGrads(unit) => {
                world.step(|m, out| m.flush_grads(unit, out));
                self.then(&[])
            }
            _ => {
                world.step(|m, out| m.flush_all_grads(out));
                self.then(&[])
            }
        }
    }
}
