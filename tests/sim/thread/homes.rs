//! Reads and edits of homes, and of frames that are brought home at once: as the runtime, outside of steps, and the wrapper do them.

use funicular::quantities::UnitId;

use super::{Act, Thread};
use crate::{
    chance::mix,
    streams::{COMPUTE, DOWN, Op},
    world::World,
};

impl Thread {
    fn edit(&mut self, unit: UnitId, world: &mut World) -> u64 {
        self.edits += 1;
        let content = mix(world.content[unit.index()], 1000 + self.edits);
        world.content[unit.index()] = content;
        content
    }

    /// What reads or edits homes.
    pub(super) fn perform_home(&mut self, act: Act, world: &mut World) -> bool {
        match act {
            Act::UseHome(unit) | Act::ReadHome(unit) => {
                if world.model.params_on_nvme(unit) {
                    return self.then(&[Act::Settle(unit), Act::SettleDisk(unit), Act::AwaitOffStep(unit, None)]);
                }
                if world.machine.update_pending(unit) {
                    return self.then(&[Act::Settle(unit), act]);
                }
                self.kernel(world, Op::Wait(world.gates[unit.index()].home));
                self.kernel(world, Op::ReadHome(unit, world.content[unit.index()]));
                self.settled_kernel()
            }
            Act::EditHome(unit) => {
                if world.machine.update_pending(unit) {
                    return self.then(&[Act::Settle(unit), act]);
                }
                if world.model.params_on_nvme(unit) {
                    return self.then(&[Act::SettleDisk(unit), Act::BeginWrite(unit, None)]);
                }
                world.drop_ahead(unit);
                let content = self.edit(unit, world);
                self.kernel(world, Op::Wait(world.gates[unit.index()].home));
                self.kernel(world, Op::EditHome(unit, content));
                world.gates[unit.index()].home = world.device.record(COMPUTE);
                world.step(|m, _| m.invalidate(unit));
                self.settled_kernel()
            }
            Act::EditFrames(unit) => {
                let queued = world.machine.update_queued(unit);
                if !world.held[unit.index()] || queued || world.model.places(unit).is_empty() {
                    return self.then(&[]);
                }
                if world.machine.in_spare(unit) {
                    return self.then(&[Act::Settle(unit), act]);
                }
                world.drop_ahead(unit);
                let content = self.edit(unit, world);
                self.window[unit.index()] = content;
                self.kernel(world, Op::EditFrames(unit, content));
                world.device.enqueue(DOWN, Op::Wait(world.device.record(COMPUTE)));
                if !world.model.params_on_nvme(unit) {
                    world.device.enqueue(DOWN, Op::CopyDown(unit));
                }
                let down = world.device.record(DOWN);
                world.gates[unit.index()].home = down;
                self.kernel(world, Op::Wait(down));
                if world.model.params_on_nvme(unit) || self.style.host {
                    self.then(&[Act::Store(unit, down, content)])
                } else {
                    self.then(&[])
                }
            }
            Act::Store(unit, down, content) => {
                if !world.device.passed(down) {
                    return false;
                }
                if world.model.params_on_nvme(unit) {
                    self.then(&[Act::SettleDisk(unit), Act::BeginWrite(unit, Some(content))])
                } else {
                    self.then(&[])
                }
            }
            Act::BeginWrite(unit, content) => {
                world.drop_ahead(unit);
                if world.machine.unsettled(unit) {
                    return self.then(&[Act::SettleDisk(unit), act]);
                }
                world.step(|m, _| m.begin_write(unit));
                let content = content.unwrap_or_else(|| self.edit(unit, world));
                self.then(&[Act::AwaitRead(unit, content), Act::EndWrite(unit)])
            }
            Act::AwaitRead(unit, content) => {
                if world.machine.reading(unit) {
                    return false;
                }
                world.begin_off_step(unit, Some(content));
                self.then(&[Act::AwaitOffStep(unit, Some(content))])
            }
            Act::EndWrite(unit) => {
                world.step(|m, out| m.end_write(unit, out));
                world.step(|m, _| m.invalidate(unit));
                self.then(&[])
            }
            Act::AwaitOffStep(unit, written) => self.await_off_step(unit, written, world),
            _ => unreachable!("done above"),
        }
    }

    fn await_off_step(&mut self, unit: UnitId, written: Option<u64>, world: &mut World) -> bool {
        if written.is_none() && !self.waited && !world.serving() && world.off_step_done.is_none() {
            world.begin_off_step(unit, None);
            return false;
        }
        let Some(seen) = world.off_step_done.take() else { return false };
        let expected = world.content[unit.index()];
        assert!(seen.iter().all(|&p| p == expected), "S2: a read of {unit}'s home saw {seen:x?}, not {expected:x}");
        self.then(&[])
    }
}
