//! Who acts beside the training thread: streams, disk, runner and reaper, one step at a time.

use funicular::quantities::UnitId;

use super::{Actor, Io, Purpose, Task, Work, World, state};
use crate::{
    chance::{Chance, mix},
    streams::{COMPUTE, DOWN, TORN, UP},
};

impl World {
    /// The actors that can act now, with a weight each.
    pub(crate) fn enabled(&self, weights: &[u64; 7], out: &mut Vec<(Actor, u64)>) {
        for stream in [COMPUTE, UP, DOWN] {
            if self.device.can_advance(stream) {
                out.push((Actor::Stream(stream), weights[stream]));
            }
        }
        if !self.disk.is_empty() {
            out.push((Actor::Disk, weights[3]));
        }
        if !self.failed {
            if let Some(task) = self.tasks.front()
                && self.jobs[task.unit.index()].after.iter().all(|&g| self.device.passed(g))
            {
                out.push((Actor::Runner, weights[4]));
            }
            if self.ahead_ready().is_some() {
                out.push((Actor::AheadPiece, weights[6]));
            }
            if self.model.layout.ids().any(|unit| self.may_begin(unit)) {
                out.push((Actor::Ahead, weights[6]));
            }
            if self.sealing.front().is_some_and(|(gate, _)| self.device.passed(*gate)) {
                out.push((Actor::Sealer, weights[5]));
            }
            if self.landings.front().is_some_and(|(gate, _)| self.device.passed(*gate)) {
                out.push((Actor::Reaper, weights[5]));
            }
        }
    }

    pub(crate) fn act(&mut self, actor: Actor, chance: &mut Chance) {
        match actor {
            Actor::Stream(stream) => {
                self.note(mix(20, stream as u64));
                self.device.advance(stream);
                self.events += 1;
            }
            Actor::Disk => {
                let at = chance.index(self.disk.len());
                self.note(mix(21, at as u64));
                if self.advance_disk(at) {
                    let io = self.disk.swap_remove(at);
                    self.failed |= self.faulty && chance.percent(2);
                    self.events += 1;
                    self.tell(&(io.unit, io.purpose));
                    if !self.failed {
                        self.completed(io);
                    }
                }
            }
            Actor::Runner => self.run(),
            Actor::Ahead => {
                let units: Vec<UnitId> = self.model.layout.ids().filter(|&unit| self.may_begin(unit)).collect();
                self.begin_ahead(units[chance.index(units.len())]);
            }
            Actor::AheadPiece => self.run_ahead(),
            Actor::Sealer => self.grads_landed(),
            Actor::Reaper => {
                let (_, unit) = self.landings.pop_front().expect("asked only if there is one");
                self.page_free += 1;
                assert!(self.page_free <= self.model.plan.page_slots.0, "R5: more page slots than there are");
                self.step(|m, out| m.copied(unit, out));
            }
        }
    }

    /// One step of a request; true if it is over.
    fn advance_disk(&mut self, at: usize) -> bool {
        let Io { unit, purpose, step, slot, place, .. } = self.disk[at];
        let u = unit.index();
        self.disk[at].step += 1;
        match purpose {
            Purpose::Params | Purpose::Service { write: None } => {
                let pieces = self.params_in(unit, place);
                let (piece, all) = (pieces[step], pieces.len());
                self.disk[at].seen.push(piece);
                self.disk[at].seen.len() == all
            }
            Purpose::ReadChunk(chunk) => {
                let c = chunk as usize;
                let mut slot = slot;
                if step == 0 {
                    slot.grad = self.model.grads_on_nvme(unit).then_some(self.grads[u].1);
                    slot.param = self.model.params_on_nvme(unit).then_some(self.params_in(unit, place)[c]);
                } else {
                    slot.state = self.model.states_on_nvme(unit).then_some(self.states[place][u][c]);
                }
                self.disk[at].slot = slot;
                step >= 1
            }
            Purpose::WriteChunk(chunk) => {
                let c = chunk as usize;
                if let Some(param) = slot.param {
                    self.params_in(unit, place)[c] = if step == 0 { TORN } else { param };
                }
                if let Some(state) = slot.state {
                    self.states[place][u][c] = if step == 0 { TORN } else { state };
                }
                step >= 1
            }
            Purpose::ReadGrads => {
                self.disk[at].slot.grad = if step == 0 { Some(self.grads[u].1) } else { slot.grad };
                step >= 1
            }
            Purpose::WriteGrads => {
                self.grads[u].1 = if step == 0 { TORN } else { slot.grad.expect("written from a slot") };
                step >= 1
            }
            Purpose::Service { write: Some(content) } => {
                self.params_in(unit, place).fill(if step == 0 { TORN } else { content });
                step >= 1
            }
        }
    }

    fn completed(&mut self, io: Io) {
        let Io { unit, purpose, seen, slot, .. } = io;
        match purpose {
            Purpose::Params => {
                if self.machine.wants_params(unit) {
                    let expected = self.content[unit.index()];
                    let good = seen.iter().all(|&p| p == expected);
                    assert!(good, "R4: {unit} was paged in as {seen:x?}, not {expected:x}");
                }
                self.pages[unit.index()] = Some(seen);
                self.step(|m, out| m.params_read(unit, out));
            }
            Purpose::ReadChunk(chunk) => {
                self.parked.push((unit, chunk, slot));
                self.step(|m, out| m.chunk_read(unit, chunk, out));
            }
            Purpose::WriteChunk(chunk) => {
                self.update_free += 1;
                assert!(self.update_free < self.model.plan.update_slots.0, "R5: more update slots than there are");
                self.step(|m, out| m.chunk_written(unit, chunk, out));
            }
            Purpose::WriteGrads => self.grads_written(unit),
            Purpose::ReadGrads => self.grads_read(unit, slot),
            Purpose::Service { .. } => self.off_step_done = Some(seen),
        }
    }

    /// Hands a piece of a step's update to the runner.
    pub(super) fn run_chunk(&mut self, unit: UnitId, chunk: u32) {
        self.note(mix(6, u64::from(unit.0)));
        let at = self.parked.iter().position(|(u, c, _)| (*u, *c) == (unit, chunk));
        let slot = at.map(|i| self.parked.swap_remove(i).2);
        assert_eq!(slot.is_some(), self.model.chunks[unit.index()] > 0, "R5: {unit}'s update and its slot");
        // Some units with a spare copy swap places, some have their weights made first; which of their steps is decided by
        // chance.
        let in_memory = self.model.chunks[unit.index()] == 0;
        let spare = self.model.plan.spare[unit.index()] && in_memory;
        let number = self.jobs[unit.index()].number;
        let work = match mix(number, u64::from(unit.0)) % 8 {
            0..3 if in_memory => Work::Weights { turned: spare && !number.is_multiple_of(4) },
            0..6 if spare => Work::Turn,
            _ => Work::Update,
        };
        self.tasks.push_back(Task { unit, chunk, slot, started: false, work });
    }

    /// The runner begins its first task, or ends it.
    fn run(&mut self) {
        self.events += 1;
        let work = self.tasks.front().expect("asked only if there is one").work;
        match work {
            Work::Update => self.run_update(),
            Work::Decide => self.decide(),
            Work::Turn => self.turn(),
            Work::Weights { turned } => self.make_weights(turned),
            Work::States => self.make_states(),
            Work::CopyHome => self.copy_home(),
        }
    }

    /// True if the runner may write a unit's other place: it has one, nothing there is copied up any more, and it is not begun.
    fn may_begin(&self, unit: UnitId) -> bool {
        let u = unit.index();
        let other = if self.machine.in_spare(unit) { self.device.params[u][0] } else { self.device.spare[u][0] };
        self.model.plan.spare[u]
            && self.model.chunks[u] == 0
            && other != TORN
            && self.jobs[u].trailing.is_none()
            && !self.tasks.iter().any(|task| task.unit == unit && task.started)
            && self.device.passed(self.gates[u].fill)
    }

    /// Begins a unit's update into its other place, speculatively.
    fn begin_ahead(&mut self, unit: UnitId) {
        self.note(mix(22, u64::from(unit.0)));
        self.tell(&("ahead", unit));
        let u = unit.index();
        if self.machine.in_spare(unit) {
            self.device.params[u].fill(TORN);
        } else {
            self.device.spare[u].fill(TORN);
        }
    }

    /// Makes the update, or finds it made, in the other place; the states are the next ones.
    fn turn(&mut self) {
        let unit = self.tasks.pop_front().expect("there is one").unit;
        let u = unit.index();
        let job = &mut self.jobs[u];
        if self.machine.in_spare(unit) {
            assert!(self.device.spare[u].iter().all(|&p| p == job.from), "R6: {unit}'s spare copy was not what it was");
            self.device.params[u].fill(job.to);
        } else {
            assert!(self.device.params[u].iter().all(|&p| p == job.from), "R6: {unit}'s home was not what it was");
            self.device.spare[u].fill(job.to);
        }
        assert_eq!(self.grads[u].0, job.grad, "the gradients of {unit} changed before its update");
        assert_eq!(self.states[0][u][0], state(job.number - 1), "{unit}'s states were not what they were");
        job.ran[0] = true;
        self.states[0][u][0] = state(job.number);
        self.step(|m, out| m.swapped(unit, out));
    }

    /// Makes the weights of an update in two steps, in place or in the other place; the states are as they were.
    fn make_weights(&mut self, turned: bool) {
        let task = self.tasks.front_mut().expect("asked only if there is one");
        let (unit, u) = (task.unit, task.unit.index());
        let spare = self.machine.in_spare(unit);
        let job = &mut self.jobs[u];
        assert_eq!(self.grads[u].0, job.grad, "the gradients of {unit} changed before its update");
        let to_spare = turned && !spare;
        let first = !std::mem::replace(&mut task.started, true);
        if first && spare {
            assert!(self.device.spare[u].iter().all(|&p| p == job.from), "R6: {unit}'s spare copy was not what it was");
        } else if first {
            assert!(self.device.params[u].iter().all(|&p| p == job.from), "R6: {unit}'s home was not what it was");
        }
        let content = if first { TORN } else { job.to };
        if to_spare {
            self.device.spare[u].fill(content);
        } else {
            self.device.params[u].fill(content);
        }
        if first {
            return;
        }
        job.ran[0] = true;
        job.trailing = Some(turned.then_some(spare));
        self.tasks.pop_front();
        self.step(|m, out| m.weights_ran(unit, turned, out));
    }

    /// Makes the states that belong to weights, in two steps.
    fn make_states(&mut self) {
        let task = self.tasks.front_mut().expect("asked only if there is one");
        let (unit, u) = (task.unit, task.unit.index());
        let job = &mut self.jobs[u];
        let kept = job.trailing.expect("commanded only then");
        assert_eq!(self.grads[u].0, job.grad, "R7: the gradients of {unit} changed before its states were made");
        match kept {
            Some(true) => {
                assert!(self.device.spare[u].iter().all(|&p| p == job.from), "R7: the old weights of {unit} are gone");
            }
            Some(false) => {
                assert!(self.device.params[u].iter().all(|&p| p == job.from), "R7: the old weights of {unit} are gone");
            }
            None => {}
        }
        if !std::mem::replace(&mut task.started, true) {
            assert_eq!(self.states[0][u][0], state(job.number - 1), "R7: {unit}'s states were not what they were");
            self.states[0][u][0] = TORN;
            return;
        }
        self.states[0][u][0] = state(job.number);
        job.trailing = None;
        self.tasks.pop_front();
        self.step(|m, out| m.states_ran(unit, out));
    }

    fn copy_home(&mut self) {
        let task = self.tasks.front_mut().expect("asked only if there is one");
        let (unit, u) = (task.unit, task.unit.index());
        if !std::mem::replace(&mut task.started, true) {
            self.device.params[u].fill(TORN);
            return;
        }
        self.tasks.pop_front();
        self.device.params[u].clone_from(&self.device.spare[u]);
        self.step(|m, out| m.homed(unit, out));
    }

    fn run_update(&mut self) {
        let task = self.tasks.front_mut().expect("asked only if there is one");
        let (u, c) = (task.unit.index(), task.chunk as usize);
        let place = self.current[u];
        let job = &mut self.jobs[u];
        let (on_disk, states_on_disk) = (self.model.params_on_nvme(task.unit), self.model.states_on_nvme(task.unit));
        let on_disk = on_disk && task.slot.is_some();
        if self.model.grads_on_nvme(task.unit) {
            let seen = task.slot.and_then(|s| s.grad);
            assert_eq!(seen, Some(job.grad), "G2: the update of {} finds other gradients", task.unit);
        }
        let param = if on_disk { task.slot.and_then(|s| s.param) } else { Some(self.device.params[u][c]) };
        let moments = if states_on_disk { task.slot.and_then(|s| s.state) } else { Some(self.states[place][u][c]) };
        if !task.started && self.machine.in_spare(task.unit) {
            // Not all that is trained of it: the rest has to be there too.
            self.device.params[u][c] = self.device.spare[u][c];
            assert_eq!(self.device.spare[u][c], job.from, "R6: the update of {} finds another spare copy", task.unit);
        } else if !task.started {
            assert_eq!(param, Some(job.from), "R4: the update of {} finds other parameters", task.unit);
            assert_eq!(moments, Some(state(job.number - 1)), "R4: the update of {} finds other states", task.unit);
        }
        if !task.started {
            assert!(!job.ran[c], "a piece of {} is updated twice", task.unit);
            task.started = true;
            if !on_disk {
                self.device.params[u][c] = TORN;
            }
            return;
        }
        job.ran[c] = true;
        let (to, after) = (job.to, state(job.number));
        let mut task = self.tasks.pop_front().expect("there is one");
        if on_disk {
            task.slot.as_mut().expect("streamed").param = Some(to);
        } else {
            self.device.params[u][c] = to;
        }
        if states_on_disk {
            task.slot.as_mut().expect("streamed").state = Some(after);
        } else {
            self.states[place][u][c] = after;
        }
        if let Some(slot) = task.slot {
            self.parked.push((task.unit, task.chunk, slot));
        }
        self.step(|m, out| m.chunk_ran(task.unit, task.chunk, out));
    }
}
