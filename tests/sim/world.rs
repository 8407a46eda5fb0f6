//! Everything around the machine: disk, runner, reaper, slot pools. It carries out commands as `runtime::core` does, and
//! checks at every command and event what the machine promises.

mod actors;
mod ahead;
mod grads;

use std::collections::VecDeque;

use funicular::{
    quantities::UnitId,
    schedule::{Command, Machine, Opening, Phase},
};

use crate::{
    chance::mix,
    model::Model,
    streams::{COMPUTE, DOWN, Device, From, Gate, Op, TORN, UP},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Params,
    ReadChunk(u32),
    WriteChunk(u32),
    WriteGrads,
    ReadGrads,
    /// The runtime's own reads and writes of parameters on NVMe, through its own slot.
    Service {
        write: Option<u64>,
    },
}

/// A request on the disk. Reads take a piece per step, so that a write beside them is seen.
#[derive(Debug)]
struct Io {
    unit: UnitId,
    purpose: Purpose,
    step: usize,
    seen: Vec<u64>,
    slot: Slot,
    /// Which of the unit's two places.
    place: usize,
}

/// An update slot's contents, where the kind lives on NVMe.
#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    param: Option<u64>,
    grad: Option<u64>,
    state: Option<u64>,
    update: u64,
}

#[derive(Debug)]
struct Task {
    unit: UnitId,
    chunk: u32,
    slot: Option<Slot>,
    started: bool,
    work: Work,
}

/// What a task of the runner is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    Update,
    Decide,
    /// An update into the other of the unit's two places.
    Turn,
    /// The weights of an update: in place, or into the other of the two places.
    Weights {
        turned: bool,
    },
    /// The states of an update whose weights were made.
    States,
    CopyHome,
}

/// A submitted update: what it finds and what it leaves.
#[derive(Clone, Debug, Default)]
struct Job {
    number: u64,
    from: u64,
    to: u64,
    /// What its gradients have to be.
    grad: u64,
    after: [Gate; 3],
    ran: Vec<bool>,
    /// Its weights are made and its states are not; where the old weights are, if they are kept: in the spare copy, or at home.
    trailing: Option<Option<bool>>,
}

/// What the runtime remembers of a unit.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Gates {
    pub(crate) release: Gate,
    pub(crate) fill: Gate,
    pub(crate) home: Gate,
}

/// Who may act next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Actor {
    Stream(usize),
    Disk,
    Runner,
    Reaper,
    /// The reaper of copies down.
    Sealer,
    /// The runner, ahead of steps.
    Ahead,
    /// The same, of units that stream.
    AheadPiece,
}

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) model: Model,
    pub(crate) machine: Machine,
    pub(crate) device: Device,
    pub(crate) gates: Vec<Gates>,
    /// What each unit's parameters are in the order of the program.
    pub(crate) content: Vec<u64>,
    /// Which windows are open.
    pub(crate) held: Vec<bool>,
    /// Set once a command has failed: nothing more may be expected, and nothing may hang.
    pub(crate) failed: bool,
    /// Grows with every event.
    pub(crate) events: u64,
    /// A digest of all that happened.
    pub(crate) trace: u64,
    pub(crate) off_step_done: Option<Vec<u64>>,
    commands: Vec<Command>,
    /// By place, unit and piece.
    states: [Vec<Vec<u64>>; 2],
    /// Parameters on NVMe in their second place.
    second_params: Vec<Vec<u64>>,
    /// Which place of a unit is current.
    current: Vec<usize>,
    /// Updates begun ahead, of units that stream.
    begun: Vec<Option<ahead::Begun>>,
    /// Pieces of them that were read.
    ahead: Vec<(UnitId, u32, Slot)>,
    /// Whether chunks that are read now belong to a step's update.
    ordinary: Vec<bool>,
    /// Per unit, what its gradients are in the order of the program, and what lies on NVMe of those that live there.
    pub(crate) grads: Vec<(u64, u64)>,
    grad_free: u32,
    /// Units whose slot is complete once a gate has passed.
    sealing: VecDeque<(Gate, UnitId)>,
    jobs: Vec<Job>,
    disk: Vec<Io>,
    pages: Vec<Option<Vec<u64>>>,
    page_free: u32,
    update_free: u32,
    parked: Vec<(UnitId, u32, Slot)>,
    tasks: VecDeque<Task>,
    landings: VecDeque<(Gate, UnitId)>,
    reopening: Option<UnitId>,
    faulty: bool,
    loud: bool,
}

/// The states after update number `n`.
const fn state(n: u64) -> u64 {
    mix(n, 77)
}

impl World {
    pub(crate) fn new(model: Model, faulty: bool) -> Self {
        let n = model.units();
        let content: Vec<u64> = (0..n as u64).map(|u| mix(u, 3)).collect();
        let pieces = |u: usize| model.chunks[u].max(1) as usize;
        let params = (0..n).map(|u| vec![content[u]; pieces(u)]).collect();
        Self {
            machine: Machine::new(&model.plan, &model.chunks, model.window),
            device: Device::new(&model, params),
            gates: vec![Gates::default(); n],
            content,
            held: vec![false; n],
            failed: false,
            events: 0,
            trace: 0,
            off_step_done: None,
            commands: Vec::new(),
            states: [0, 1].map(|_| (0..n).map(|u| vec![state(0); pieces(u)]).collect()),
            second_params: (0..n).map(|u| vec![TORN; pieces(u)]).collect(),
            current: vec![0; n],
            begun: vec![None; n],
            ahead: Vec::new(),
            ordinary: vec![true; n],
            grads: vec![(0, 0); n],
            grad_free: model.plan.grad_slots.0,
            sealing: VecDeque::new(),
            jobs: vec![Job::default(); n],
            disk: Vec::new(),
            pages: vec![None; n],
            page_free: model.plan.page_slots.0,
            // One is for requests outside of steps.
            update_free: model.plan.update_slots.0.saturating_sub(1),
            parked: Vec::new(),
            tasks: VecDeque::new(),
            landings: VecDeque::new(),
            reopening: None,
            faulty,
            loud: std::env::var_os("FUNICULAR_SIM_SEED").is_some(),
            model,
        }
    }

    fn note(&mut self, what: u64) {
        self.trace = mix(self.trace, what);
    }

    /// Tells of an event when one seed is replayed.
    pub(crate) fn tell(&self, what: &dyn std::fmt::Debug) {
        if self.loud {
            crate::report(&format!("{what:?}"));
        }
    }

    /// Tells the machine of an event and carries out what it commands.
    pub(crate) fn step<R>(&mut self, f: impl FnOnce(&mut Machine, &mut Vec<Command>) -> R) -> R {
        let mut commands = std::mem::take(&mut self.commands);
        let answer = f(&mut self.machine, &mut commands);
        let mut next = 0;
        while next < commands.len() {
            self.tell(&commands[next]);
            self.perform(commands[next], &mut commands);
            next += 1;
        }
        self.events += 1;
        commands.clear();
        self.commands = commands;
        answer
    }

    fn perform(&mut self, command: Command, commands: &mut Vec<Command>) {
        match command {
            Command::WaitReleased(unit) => {
                self.note(mix(1, u64::from(unit.0)));
                assert!(!self.held[unit.index()] || self.reopening == Some(unit), "R3: {unit} is not released yet");
                let gate = self.gates[unit.index()].release;
                self.device.enqueue(UP, Op::Wait(gate));
            }
            Command::CopyUp(unit) => self.copy_up(unit),
            Command::ReadParams(unit) => {
                self.note(mix(3, u64::from(unit.0)));
                assert!(self.model.params_on_nvme(unit), "{unit} has no parameters on NVMe");
                assert!(self.page_free > 0, "R5: no page slot is free");
                assert!(!self.model.places(unit).is_empty(), "a read of nothing");
                self.page_free -= 1;
                let twice = self.disk.iter().any(|io| io.unit == unit && io.purpose == Purpose::Params);
                assert!(!twice && self.pages[unit.index()].is_none(), "R5: {unit} has a page slot already");
                assert!(!self.writing(unit, None), "R4: {unit} is read while it is written");
                self.submit(unit, Purpose::Params, Slot::default());
            }
            Command::DropSlot(unit) => {
                self.note(mix(4, u64::from(unit.0)));
                assert!(self.pages[unit.index()].take().is_some(), "R5: {unit} has no page slot to drop");
                self.page_free += 1;
            }
            Command::ReadChunk(unit, chunk) => self.read_chunk(unit, chunk, commands),
            Command::RunChunk(unit, chunk) => self.run_chunk(unit, chunk),
            Command::RunStates(unit) => {
                self.note(mix(9, u64::from(unit.0)));
                assert!(self.jobs[unit.index()].trailing.is_some(), "the states of {unit} do not trail");
                let twice = |t: &Task| t.work == Work::States;
                assert!(!self.tasks.iter().any(twice), "the states of two units at once");
                self.tasks.push_back(Task { unit, chunk: 0, slot: None, started: false, work: Work::States });
            }
            Command::CopyHome(unit) => {
                self.note(mix(8, u64::from(unit.0)));
                assert!(self.machine.in_spare(unit), "R6: {unit} has nothing to copy home");
                assert!(self.jobs[unit.index()].trailing.is_none(), "R7: {unit} is copied over its old weights");
                let same = |t: &Task| t.unit == unit;
                assert!(!self.tasks.iter().any(same), "R6: {unit} is copied home twice");
                self.tasks.push_back(Task { unit, chunk: 0, slot: None, started: false, work: Work::CopyHome });
            }
            Command::WriteChunk(unit, chunk) => {
                self.note(mix(7, u64::from(unit.0)));
                let slot = self.unpark(unit, chunk);
                let same = |io: &Io| io.unit == unit && io.purpose == Purpose::WriteChunk(chunk);
                assert!(!self.disk.iter().any(same), "R4: two writes of one piece");
                self.submit(unit, Purpose::WriteChunk(chunk), slot);
            }
            Command::Decide(unit) => {
                self.ordinary[unit.index()] = false;
                self.tasks.push_back(Task { unit, chunk: 0, slot: None, started: false, work: Work::Decide });
            }
            Command::RunAhead(unit, chunk) => {
                let slot = self.unpark(unit, chunk);
                self.ahead.push((unit, chunk, slot));
            }
            Command::WriteAhead(unit, chunk) => self.write_ahead(unit, chunk),
            Command::DropChunk(unit, chunk) => {
                self.unpark(unit, chunk);
                self.update_free += 1;
            }
            Command::SwapPlaces(unit) => self.swap_places(unit),
            Command::BringOwn(unit) => panic!("{unit} has no other ranks here"),
            Command::ReadGrads(unit) => self.read_grads(unit),
            Command::SealGrads(unit) => self.seal_grads(unit),
            Command::WriteGrads(unit) => self.write_grads(unit),
        }
    }

    fn copy_up(&mut self, unit: UnitId) {
        self.note(mix(2, u64::from(unit.0)));
        let u = unit.index();
        assert!(!self.held[u] || self.reopening == Some(unit), "R2: {unit} is held and its frames are overwritten");
        for v in self.model.layout.ids().filter(|&v| v != unit && self.held[v.index()]) {
            assert!(!self.model.plan.share_frames(unit, v), "R2: {v} is held and {unit} is copied over it");
        }
        let slot = self.pages[u].take();
        assert!(slot.is_some() || !self.model.params_on_nvme(unit), "R5: {unit} has no bytes to page in");
        let spare = self.machine.in_spare(unit);
        assert!(!self.machine.update_queued(unit), "R4: {unit} is copied up before its update");
        self.device.enqueue(UP, Op::Wait(self.gates[u].home));
        let staged = slot.is_some();
        self.device
            .enqueue(UP, Op::CopyUp(unit, slot.map_or(if spare { From::Spare } else { From::Home }, From::Slot)));
        self.gates[u].fill = self.device.record(UP);
        if staged {
            self.landings.push_back((self.gates[u].fill, unit));
        }
    }

    fn read_chunk(&mut self, unit: UnitId, chunk: u32, commands: &mut Vec<Command>) {
        self.note(mix(5, u64::from(unit.0)));
        assert!(self.update_free > 0, "R5: no update slot is free");
        self.update_free -= 1;
        let ordinary = self.ordinary[unit.index()];
        let number = self.jobs[unit.index()].number + u64::from(!ordinary && !self.machine.update_queued(unit));
        let ahead = self.ahead.iter().any(|(u, ..)| *u == unit);
        assert!(!(ordinary && ahead), "H2: a step's update of {unit} begins beside one ahead");
        assert!(!self.writing(unit, Some(number)), "R4: {unit} is updated while its last update is being written");
        let slot = Slot { update: number, ..Slot::default() };
        self.check_grads(unit);
        // States that were never written are zero: there is nothing to read then.
        let first = self.states[self.current[unit.index()]][unit.index()][chunk as usize] == state(0);
        let fresh = first && !self.model.params_on_nvme(unit) && !self.model.grads_on_nvme(unit);
        if fresh {
            let state = self.model.states_on_nvme(unit).then_some(state(0));
            self.parked.push((unit, chunk, Slot { state, ..slot }));
            self.machine.chunk_read(unit, chunk, commands);
        } else {
            self.submit(unit, Purpose::ReadChunk(chunk), slot);
        }
    }

    /// True while writes of the unit are on their way, other than those of update `except`.
    fn writing(&self, unit: UnitId, except: Option<u64>) -> bool {
        self.disk.iter().any(|io| {
            io.unit == unit
                && match io.purpose {
                    Purpose::WriteChunk(_) => Some(io.slot.update) != except,
                    Purpose::Service { write } => write.is_some(),
                    _ => false,
                }
        })
    }

    fn submit(&mut self, unit: UnitId, purpose: Purpose, slot: Slot) {
        self.submit_to(unit, purpose, slot, self.current[unit.index()]);
    }

    fn submit_to(&mut self, unit: UnitId, purpose: Purpose, slot: Slot, place: usize) {
        self.disk.push(Io { unit, purpose, step: 0, seen: Vec::new(), slot, place });
    }

    /// A unit's parameters in one of its places, where they live on NVMe; else at home.
    fn params_in(&mut self, unit: UnitId, place: usize) -> &mut Vec<u64> {
        if place == 1 && self.model.params_on_nvme(unit) {
            &mut self.second_params[unit.index()]
        } else {
            &mut self.device.params[unit.index()]
        }
    }

    /// Starts a read or a write of a unit's parameters by the runtime itself.
    pub(crate) fn begin_off_step(&mut self, unit: UnitId, write: Option<u64>) {
        assert!(!self.machine.update_pending(unit), "S2: {unit} is being updated");
        // Updates ahead write the other place.
        let here = |io: &&Io| io.unit == unit && io.place == self.current[unit.index()];
        let written = |io: &Io| matches!(io.purpose, Purpose::WriteChunk(_) | Purpose::Service { write: Some(_) });
        assert!(!self.disk.iter().filter(here).any(written), "S2: {unit} is being written");
        let read = |io: &&Io| io.unit == unit && matches!(io.purpose, Purpose::ReadChunk(_));
        let torn = write.is_some() && self.disk.iter().any(|io| read(&io));
        assert!(!torn, "S2: a piece of {unit} is read while it is written, and would fail its checksum");
        self.submit(unit, Purpose::Service { write }, Slot::default());
    }

    /// True while such a read or write is under way.
    pub(crate) fn serving(&self) -> bool {
        self.disk.iter().any(|io| matches!(io.purpose, Purpose::Service { .. }))
    }

    /// Opens a window as the runtime does.
    pub(crate) fn open(&mut self, unit: UnitId, phase: Phase, first: bool) -> Opening {
        self.reopening = Some(unit);
        assert_eq!(self.machine.held(unit), self.held[unit.index()], "{unit} is held, or not");
        if first && self.held[unit.index()] {
            self.gates[unit.index()].release = self.device.record(COMPUTE);
        }
        let answer = self.step(|m, out| m.open(unit, phase, first, out));
        if !matches!(answer, Opening::Pending(_)) {
            self.reopening = None;
        }
        self.tell(&answer);
        let overlaps = |w: &Self, v: UnitId| v != unit && w.held[v.index()] && w.model.plan.share_frames(unit, v);
        let holder = self.model.layout.ids().find(|&v| overlaps(self, v));
        match answer {
            Opening::Ready => {
                assert!(holder.is_none(), "R1: {unit} and {holder:?} are open in the same frames");
                self.held[unit.index()] = true;
                self.device.enqueue(COMPUTE, Op::Wait(self.gates[unit.index()].fill));
            }
            Opening::Conflict => {
                assert!(holder.is_some(), "{unit} is refused, but nothing is in its frames");
                assert!(!self.machine.update_pending(unit), "R6: {unit} is used from a home that is older");
            }
            Opening::Pending(_) => {}
        }
        answer
    }

    /// The thread gave up waiting for a window.
    pub(crate) fn forget(&mut self, unit: UnitId) {
        self.reopening = None;
        self.machine.forget(unit);
    }

    pub(crate) fn release(&mut self, unit: UnitId, poison: bool) {
        let gate = self.device.record(COMPUTE);
        self.gates[unit.index()].release = gate;
        self.held[unit.index()] = false;
        self.tell(&("release", unit));
        if poison {
            self.device.enqueue(UP, Op::Wait(gate));
            self.device.enqueue(UP, Op::Poison(unit));
            self.machine.invalidate(unit);
        }
        self.step(|m, out| m.release(unit, out));
    }

    /// Submits an update; its kernels wait for what was enqueued before `after`.
    pub(crate) fn update(&mut self, unit: UnitId, after: [Gate; 3]) {
        let u = unit.index();
        let number = self.jobs[u].number + 1;
        let (from, to) = (self.content[u], mix(self.content[u], number));
        assert!(self.jobs[u].ran.iter().all(|&r| r), "the update before is not over");
        assert!(self.jobs[u].trailing.is_none(), "R7: the states of the update before are not made");
        let ran = vec![false; self.model.chunks[u].max(1) as usize];
        self.jobs[u] = Job { number, from, to, grad: self.grads[u].0, after, ran, trailing: None };
        self.content[u] = to;
        self.step(|m, out| m.submit(unit, out));
    }

    /// Whether all states of a unit are those of the last update that was submitted.
    pub(crate) fn has_last_states(&self, unit: UnitId) -> bool {
        let (u, last) = (unit.index(), state(self.jobs[unit.index()].number));
        self.states[self.current[u]][u].iter().all(|&s| s == last)
    }

    /// At the end: everything is home, applied once and in order, and every slot is back.
    pub(crate) fn check_end(&mut self) {
        assert!(!self.machine.updating(), "an update was never run");
        assert!([COMPUTE, UP, DOWN].iter().all(|&s| self.device.idle(s)), "a stream never ended");
        assert_eq!(self.grad_free, self.model.plan.grad_slots.0, "G3: a gradient slot is lost");
        assert!(
            self.sealing.is_empty() && self.device.gathered.iter().all(Option::is_none),
            "G3: gradients were left over"
        );
        assert!(self.tasks.is_empty() && self.parked.is_empty() && self.landings.is_empty(), "something was left over");
        assert_eq!(self.page_free, self.model.plan.page_slots.0, "R5: a page slot is lost");
        assert_eq!(self.update_free, self.model.plan.update_slots.0.saturating_sub(1), "R5: an update slot is lost");
        assert!(self.ahead.is_empty(), "H4: a piece of an update ahead was left over");
        for unit in self.model.layout.ids() {
            let u = unit.index();
            let place = self.current[u];
            let params = self.params_in(unit, place).clone();
            assert!(!self.machine.unsettled(unit) && !self.machine.reading(unit), "{unit} is not settled");
            assert!(self.pages[u].is_none(), "R5: {unit} still has a page slot");
            assert!(params.iter().all(|&p| p == self.content[u]), "{unit}'s parameters are not the last");
            let last = state(self.jobs[u].number);
            assert!(
                self.states[place][u].iter().all(|&s| s == last),
                "{unit}'s states are not those of its last update"
            );
        }
    }
}
