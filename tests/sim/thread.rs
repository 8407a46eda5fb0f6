//! The training thread: a random program of steps, and the waits of each operation as the runtime and the wrapper do them.

mod grads;
mod homes;

use std::collections::VecDeque;

use funicular::{
    quantities::UnitId,
    schedule::{Opening, Phase, Want},
};

use crate::{
    chance::{Chance, mix},
    streams::{COMPUTE, Gate, Op},
    world::World,
};

/// One operation of the thread; those that wait are tried again until they are over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Open(UnitId, Phase),
    /// Kernels in the window.
    Use(UnitId),
    /// A kernel that edits the frames, brought home at once.
    EditFrames(UnitId),
    /// The copy home is over; what lives on NVMe is stored.
    Store(UnitId, Gate, u64),
    /// The module is done: its window may close, now or when its frames are needed.
    Leave(UnitId),
    /// Use the home instead of the frames.
    UseHome(UnitId),
    ReadHome(UnitId),
    EditHome(UnitId),
    /// Until the home is current.
    Settle(UnitId),
    /// Until the update is made as a whole.
    SettleUpdate(UnitId),
    /// Gradients arrive, once the update has read the ones before.
    Gradients(UnitId),
    /// Read the states.
    ReadStates(UnitId),
    SettleDisk(UnitId),
    /// Have the home made current, and do not wait for it: as a save that is given up.
    AskHome(UnitId),
    SettleAll,
    HomeAll,
    /// Overwrite the parameters on NVMe: begin, wait for a read under way, write, end.
    BeginWrite(UnitId, Option<u64>),
    AwaitRead(UnitId, u64),
    EndWrite(UnitId),
    AwaitOffStep(UnitId, Option<u64>),
    /// An optimizer step begins: what its updates have to wait for.
    BeginStep,
    Submit(UnitId),
    CloseAll,
    /// The unit's gradients are there: its update may begin.
    BeginAhead(UnitId),
    /// A gradient of the unit goes down.
    Gather(UnitId, bool),
    /// Gradients will be added to soon.
    Expect(UnitId),
    /// The unit's gradients are complete.
    FlushGrads(UnitId),
    /// The backward is over.
    FlushAllGrads,
    /// Wait for the device, as `.item()` does.
    Synchronize,
}

/// The thread.
#[derive(Debug)]
pub(crate) struct Thread {
    todo: VecDeque<Act>,
    steps_left: u32,
    order: Vec<UnitId>,
    /// Views of held units: until when, in operations.
    views: Vec<(UnitId, u64)>,
    /// What the frames of a held unit hold.
    window: Vec<u64>,
    after: [Gate; 3],
    waited: bool,
    acts: u64,
    edits: u64,
    style: Style,
    pub(crate) openings: u64,
    pub(crate) conflicts: u64,
    pub(crate) forgotten: u64,
}

/// How this program behaves.
#[derive(Debug)]
struct Style {
    /// On the host nothing is enqueued ahead.
    host: bool,
    /// Windows close only when their frames are needed.
    lazy: bool,
    poison: bool,
    views: u64,
    skips: u64,
    edits: u64,
    interrupts: u64,
    nested: u64,
    states: u64,
}

impl Thread {
    pub(crate) fn new(world: &World, chance: &mut Chance) -> Self {
        let units = world.model.units();
        let mut order: Vec<UnitId> = world.model.layout.ids().collect();
        for _ in 0..chance.below(4) {
            // Tied or shared units are used twice.
            let again = UnitId(chance.below(units as u64) as u32);
            order.insert(chance.index(order.len() + 1), again);
        }
        let style = Style {
            host: chance.percent(30),
            lazy: chance.percent(60),
            poison: chance.percent(15),
            views: chance.pick(&[0, 0, 10, 30]),
            skips: chance.pick(&[0, 0, 5, 30]),
            edits: chance.pick(&[0, 5, 15]),
            interrupts: chance.pick(&[0, 0, 2]),
            nested: chance.pick(&[0, 0, 10]),
            states: chance.pick(&[0, 0, 20]),
        };
        Self {
            todo: VecDeque::new(),
            steps_left: 2 + chance.below(5) as u32,
            order,
            views: Vec::new(),
            window: vec![0; units],
            after: [Gate::default(); 3],
            waited: false,
            acts: 0,
            edits: 0,
            style,
            openings: 0,
            conflicts: 0,
            forgotten: 0,
        }
    }

    pub(crate) fn done(&self) -> bool {
        self.todo.is_empty() && self.steps_left == 0
    }

    /// True if the operation under way was tried and must wait.
    pub(crate) fn waiting(&self) -> bool {
        self.waited
    }

    pub(crate) fn describe(&self) -> String {
        format!("{:?} after {} operations", self.todo.front(), self.acts)
    }

    /// Tries the next operation.
    pub(crate) fn act(&mut self, world: &mut World, chance: &mut Chance) {
        if world.failed {
            // Every wait ends with the error.
            self.todo.clear();
            self.steps_left = 0;
            return;
        }
        let Some(&act) = self.todo.front() else {
            self.steps_left -= 1;
            if self.steps_left == 0 {
                self.finish(world)
            } else {
                self.plan_step(world, chance)
            }
            return;
        };
        let first = !self.waited;
        if first {
            self.acts += 1;
            world.tell(&act);
        }
        self.waited = false;
        self.expire(world, false);
        if !self.perform(act, first, world, chance) {
            self.waited = true;
            return;
        }
        world.trace = mix(world.trace, self.acts);
    }

    /// Everything once more, in order, with nothing held.
    fn finish(&mut self, world: &mut World) {
        self.expire(world, true);
        self.todo.push_back(Act::CloseAll);
        for unit in world.model.layout.ids() {
            self.todo.extend([Act::Open(unit, Phase::Eval), Act::Use(unit), Act::Leave(unit)]);
        }
        self.todo.extend([Act::FlushAllGrads, Act::CloseAll, Act::HomeAll, Act::Synchronize]);
    }

    fn plan_step(&mut self, world: &World, chance: &mut Chance) {
        let order: Vec<UnitId> = self.order.clone().into_iter().filter(|_| !chance.percent(self.style.skips)).collect();
        let eval = chance.percent(20);
        self.pass(order.iter().copied(), if eval { Phase::Eval } else { Phase::Forward }, world, chance);
        if eval {
            return;
        }
        self.pass(order.iter().rev().copied(), Phase::Backward, world, chance);
        if chance.percent(90) {
            self.todo.push_back(Act::FlushAllGrads);
        }
        if chance.percent(20) {
            return;
        }
        if chance.percent(70) {
            self.todo.push_back(Act::CloseAll);
        }
        let asked = world.model.layout.ids().filter(|_| chance.percent(15));
        self.todo.extend(asked.map(Act::AskHome));
        self.todo.push_back(Act::BeginStep);
        for unit in world.model.layout.ids() {
            if world.model.layout.unit(unit).trainable() && order.contains(&unit) && chance.percent(90) {
                self.todo.extend([Act::SettleUpdate(unit), Act::Submit(unit)]);
            }
        }
        if chance.percent(15) {
            self.todo.push_back(Act::SettleAll);
        }
        for unit in world.model.layout.ids() {
            if chance.percent(self.style.states) {
                self.todo.push_back(Act::ReadStates(unit));
            }
        }
    }

    fn pass(&mut self, order: impl Iterator<Item = UnitId>, phase: Phase, world: &World, chance: &mut Chance) {
        let mut outer: Option<UnitId> = None;
        for unit in order {
            self.todo.extend([Act::Open(unit, phase), Act::Use(unit)]);
            if chance.percent(self.style.edits) {
                self.todo.push_back(Act::EditFrames(unit));
            }
            if chance.percent(self.style.nested) && outer.is_none() {
                // Its window stays open around the next one's.
                outer = Some(unit);
                continue;
            }
            if phase == Phase::Backward && !world.model.grads_on_nvme(unit) {
                self.todo.push_back(Act::Gradients(unit));
            }
            self.todo.push_back(Act::Leave(unit));
            if phase == Phase::Backward && world.model.grads_on_nvme(unit) {
                self.plan_grads(unit, chance);
            }
            if phase == Phase::Backward && chance.percent(80) {
                self.todo.push_back(Act::BeginAhead(unit));
            }
            if let Some(unit) = outer.take() {
                self.todo.extend([Act::Use(unit), Act::Leave(unit)]);
            }
            if chance.percent(self.style.edits) {
                // Most often of what comes next: it may be on its way just now.
                let at = self.order.iter().position(|&v| v == unit).unwrap_or(0);
                let next = if chance.percent(60) { at + 1 + chance.index(2) } else { chance.index(self.order.len()) };
                let stray = self.order[next % self.order.len()];
                self.todo.push_back(if chance.percent(50) { Act::ReadHome(stray) } else { Act::EditHome(stray) });
            }
            if chance.percent(3) {
                self.todo.push_back(Act::Synchronize);
            }
        }
        self.todo.extend(outer.map(Act::Leave));
    }

    /// Replaces the operation under way by others.
    fn then(&mut self, acts: &[Act]) -> bool {
        self.todo.pop_front();
        for &act in acts.iter().rev() {
            self.todo.push_front(act);
        }
        true
    }

    /// Goes on if `ready`.
    fn when(&mut self, ready: bool) -> bool {
        ready && self.then(&[])
    }

    fn kernel(&mut self, world: &mut World, op: Op) {
        world.device.enqueue(COMPUTE, op);
    }

    /// After a kernel on the host the thread waits for it.
    fn settled_kernel(&mut self) -> bool {
        if self.style.host { self.then(&[Act::Synchronize]) } else { self.then(&[]) }
    }

    fn view_of(&self, unit: UnitId) -> bool {
        self.views.iter().any(|v| v.0 == unit)
    }

    /// Views die; the windows they held close.
    fn expire(&mut self, world: &mut World, all: bool) {
        while let Some(at) = self.views.iter().position(|v| all || v.1 < self.acts) {
            let (unit, _) = self.views.swap_remove(at);
            if !self.view_of(unit)
                && world.held[unit.index()]
                && !self.todo.iter().any(|a| matches!(a, Act::Use(u) | Act::Leave(u) if *u == unit))
            {
                world.release(unit, self.style.poison);
            }
        }
    }

    fn close_neighbours(&mut self, unit: UnitId, world: &mut World) {
        for v in world.model.layout.ids() {
            let in_the_way = v != unit && world.held[v.index()] && world.model.plan.share_frames(unit, v);
            let inside = self.todo.iter().take(12).any(|a| *a == Act::Leave(v)) || self.view_of(v);
            if in_the_way && !inside {
                world.release(v, self.style.poison);
            }
        }
    }

    fn perform(&mut self, act: Act, first: bool, world: &mut World, chance: &mut Chance) -> bool {
        match act {
            Act::Open(unit, phase) => self.open(unit, phase, first, world, chance),
            Act::Use(unit) => {
                if !world.held[unit.index()] {
                    return self.then(&[]);
                }
                // Some kernel may also look at what an older view still holds.
                let looked = if chance.percent(30) { self.views.first().map(|v| v.0) } else { None };
                for u in [Some(unit), looked].into_iter().flatten() {
                    self.kernel(world, Op::Read(u, self.window[u.index()]));
                }
                self.settled_kernel()
            }
            Act::Leave(unit) => {
                if world.held[unit.index()] {
                    if chance.percent(self.style.views) {
                        self.views.push((unit, self.acts + 1 + chance.below(60)));
                    } else if !self.view_of(unit) && !self.style.lazy {
                        world.release(unit, self.style.poison);
                    }
                }
                self.then(&[])
            }
            Act::CloseAll => {
                for v in world.model.layout.ids() {
                    if world.held[v.index()] && !self.view_of(v) {
                        world.release(v, self.style.poison);
                    }
                }
                self.then(&[])
            }
            Act::Synchronize => self.when(world.device.idle(COMPUTE)),
            Act::BeginStep => {
                self.after = [world.device.record(0), world.device.record(1), world.device.record(2)];
                self.then(&[])
            }
            Act::Submit(unit) => {
                world.update(unit, self.after);
                self.then(&[])
            }
            Act::Settle(unit) => {
                if first && world.machine.update_pending(unit) {
                    world.step(|m, out| m.promote(unit, Want::Home, out));
                }
                self.when(!world.machine.update_pending(unit))
            }
            Act::SettleUpdate(unit) => {
                if first && world.machine.update_unmade(unit) {
                    world.step(|m, out| m.promote(unit, Want::States, out));
                }
                self.when(!world.machine.update_unmade(unit))
            }
            Act::Gradients(unit) => {
                if world.machine.update_unmade(unit) {
                    return self.then(&[Act::SettleUpdate(unit), act]);
                }
                world.grads[unit.index()].0 += 1;
                self.then(&[])
            }
            Act::ReadStates(unit) => {
                if world.machine.update_unmade(unit) {
                    return self.then(&[Act::SettleUpdate(unit), act]);
                }
                let on_disk = world.model.states_on_nvme(unit);
                assert!(
                    on_disk || world.has_last_states(unit),
                    "R7: the states of {unit} are not those of its last update"
                );
                self.then(&[])
            }
            Act::SettleDisk(unit) => self.when(!world.machine.unsettled(unit)),
            Act::AskHome(unit) => {
                world.step(|m, out| m.promote(unit, Want::Home, out));
                self.then(&[])
            }
            Act::SettleAll => self.when(!world.machine.updating()),
            Act::HomeAll => {
                let pending = |w: &World| w.model.layout.ids().filter(|&u| w.machine.update_pending(u)).collect();
                let units: Vec<UnitId> = if first { pending(world) } else { Vec::new() };
                units.into_iter().for_each(|u| world.step(|m, out| m.promote(u, Want::Home, out)));
                self.when(pending(world).is_empty())
            }
            Act::BeginAhead(_) | Act::Gather(..) | Act::Expect(_) | Act::FlushGrads(_) | Act::FlushAllGrads => {
                self.perform_grads(act, first, world)
            }
            _ => self.perform_home(act, world),
        }
    }

    fn open(&mut self, unit: UnitId, phase: Phase, first: bool, world: &mut World, chance: &mut Chance) -> bool {
        if first {
            self.openings += 1;
            self.close_neighbours(unit, world);
        } else if chance.percent(self.style.interrupts) {
            world.forget(unit);
            self.forgotten += 1;
            // An interrupted program gives up what it held of it.
            self.views.retain(|v| v.0 != unit);
            if world.held[unit.index()] {
                world.release(unit, self.style.poison);
            }
            return self.then(&[]);
        }
        match world.open(unit, phase, first) {
            Opening::Pending(_) => false,
            Opening::Conflict => {
                self.conflicts += 1;
                self.then(&[Act::UseHome(unit)])
            }
            Opening::Ready => {
                self.window[unit.index()] = world.content[unit.index()];
                self.then(&[])
            }
        }
    }
}
