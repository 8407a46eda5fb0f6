//! One rank: its training thread, its runner, its device; and the bytes of the model. Updates made ahead stand in [`super::ahead`].

use std::collections::VecDeque;

use funicular::schedule::ranks::{
    board::Board,
    crossed::Call,
    posts::{Arrival, Line, Look, Posts},
};

use super::{
    Fault,
    above::Above,
    ahead::{Ahead, Places, Trailing},
    memory::{Clock, Memory, View},
    program::{Op, Program, Way},
    saves::Saved,
};
use crate::chance::Chance;

/// What a turn of a rank came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    Moved,
    Waits,
    /// Another rank waits for this one in another call.
    Crossed,
}

/// Bytes with one owner: which version they are, and who wrote and read them when.
#[derive(Clone, Debug, Default)]
pub(super) struct Bytes {
    version: u64,
    written: Option<(usize, u64)>,
    read: Vec<(usize, u64)>,
}

impl Bytes {
    /// Which version they are.
    pub(super) fn version(&self) -> u64 {
        self.version
    }

    pub(super) fn write(&mut self, memory: &Memory, rank: usize, version: u64, what: &str) {
        if let Some((writer, action)) = self.written {
            assert!(memory.knows(rank, writer, action), "{what}: rank {rank} writes what rank {writer} may be writing");
        }
        for (reader, action) in self.read.drain(..) {
            assert!(memory.knows(rank, reader, action), "{what}: rank {rank} writes what rank {reader} may be reading");
        }
        self.version = version;
        self.written = Some((rank, memory.act(rank)[rank]));
    }

    pub(super) fn read(&mut self, memory: &Memory, rank: usize, version: u64, what: &str) {
        assert_eq!(self.version, version, "{what}: rank {rank} reads another version than it should");
        if let Some((writer, action)) = self.written {
            assert!(memory.knows(rank, writer, action), "{what}: rank {rank} reads what rank {writer} may be writing");
        }
        self.read.push((rank, memory.act(rank)[rank]));
    }
}

/// The bytes of the model, per unit and owner, and the messages of exchanges.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) board: Board,
    pub(super) weights: Vec<Vec<Bytes>>,
    pub(super) grads: Vec<Vec<Bytes>>,
    pub(super) places: Places,
    /// In the order in which each rank comes to them.
    exchanges: Vec<Exchange>,
}

/// An exchange of gradients.
#[derive(Debug)]
struct Exchange {
    /// The unit and the backward.
    what: (usize, u64),
    /// What each rank knew that has come to it.
    came: Vec<Option<Clock>>,
}

impl Model {
    pub(crate) fn new(program: &Program) -> Self {
        let parts = vec![vec![Bytes::default(); program.size]; program.units.len()];
        let board = Board::new(program.size, program.units.iter().copied());
        let places = Places::new(&parts);
        Self { board, weights: parts.clone(), grads: parts, places, exchanges: Vec::new() }
    }

    pub(crate) fn check_end(&self, program: &Program, ranks: &[Rank]) {
        for (unit, parts) in self.weights.iter().enumerate() {
            let last = program.steps.iter().rposition(|units| units.contains(&unit)).map_or(0, |at| at as u64 + 1);
            for rank in ranks {
                let (step, result) = (rank.versions[unit], rank.ahead.results[unit]);
                let alike = step == last && parts.iter().all(|part| part.version == result);
                assert!(alike, "unit {unit} ends as {parts:?}, not as step {last}");
            }
        }
    }

    /// Comes to the exchange of this number; true when all ranks have.
    fn exchange(&mut self, memory: &Memory, rank: usize, number: usize, what: (usize, u64)) -> bool {
        if number == self.exchanges.len() {
            self.exchanges.push(Exchange { what, came: vec![None; self.board.ranks()] });
        }
        let Exchange { what: first, came } = &mut self.exchanges[number];
        assert_eq!(*first, what, "exchange {number} of rank {rank} is another one than the others'");
        came[rank].get_or_insert_with(|| memory.act(rank));
        if came.iter().any(Option::is_none) {
            return false;
        }
        came.iter().flatten().for_each(|clock| memory.learn(rank, clock));
        true
    }
}

/// What the device does in its order.
#[derive(Debug)]
enum Work {
    Read {
        unit: usize,
        result: u64,
    },
    Slice {
        unit: usize,
        post: u64,
        backward: u64,
    },
    /// Everything before a step.
    Gate {
        step: u64,
    },
}

/// A rank.
#[derive(Debug)]
pub(crate) struct Rank {
    pub(super) rank: usize,
    pub(super) fault: Fault,
    ops: VecDeque<Op>,
    steps: Vec<Vec<usize>>,
    ways: Vec<Way>,
    pub(super) ahead: Ahead,
    pub(super) above: Above,
    parameters: Vec<usize>,
    device: VecDeque<Work>,
    /// The last step whose gate has passed, and the last one that was said to be.
    passed: u64,
    quiet: u64,
    /// Units to update, with the step, and the step of each unit's last update.
    pub(super) queue: Vec<(usize, u64)>,
    /// States that follow their weights.
    pub(super) trail: Vec<Trailing>,
    pub(super) versions: Vec<u64>,
    /// What its save has yet to read.
    pub(super) saving: Vec<Saved>,
    /// The backward of each unit's last exchange in which any rank had a gradient.
    pub(super) exchanged: Vec<u64>,
    exchanges: usize,
    /// How many units of the backward at work were exchanged.
    through: usize,
    arrived: bool,
    /// The call in which it waits, and the one that it has told of.
    waits: Option<Call>,
    told: Option<Call>,
    /// It is at a meeting, and has found another rank at another one.
    met: bool,
    differs: bool,
}

impl Rank {
    pub(crate) fn new(rank: usize, program: &Program, fault: Fault) -> Self {
        Self {
            rank,
            fault,
            ops: program.ops[rank].iter().cloned().collect(),
            steps: program.steps.clone(),
            ways: program.ways.clone(),
            ahead: Ahead::new(program.units.len()),
            above: Above::new(program.units.len()),
            parameters: program.units.clone(),
            device: VecDeque::new(),
            passed: 0,
            quiet: 0,
            queue: Vec::new(),
            trail: Vec::new(),
            versions: vec![0; program.units.len()],
            saving: Vec::new(),
            exchanged: vec![0; program.units.len()],
            exchanges: 0,
            through: 0,
            arrived: false,
            waits: None,
            told: None,
            met: false,
            differs: false,
        }
    }

    pub(crate) fn done(&self) -> bool {
        self.ops.is_empty() && self.idle()
    }

    /// Nothing is under way on its device, it has no updates to make, and no save to end.
    pub(super) fn idle(&self) -> bool {
        self.device.is_empty() && self.queue.is_empty() && self.trail.is_empty() && self.saving.is_empty()
    }

    pub(crate) fn describe(&self) -> String {
        let Self { rank, ops, queue, device, saving, .. } = self;
        format!("rank {rank} is at {:?}, updates {queue:?}, device {device:?}, saves {saving:?}", ops.front())
    }

    /// One of its threads, or its device, does one thing.
    pub(crate) fn turn(&mut self, memory: &Memory, model: &mut Model, chance: &mut Chance) -> Turn {
        let moved = match chance.below(5) {
            0 => self.work(memory, model),
            1 => self.update(memory, model, chance),
            2 => self.grow(memory, model, chance),
            3 => self.read_saved(memory, model, chance),
            _ => return self.call(memory, model),
        };
        if moved { Turn::Moved } else { Turn::Waits }
    }

    /// The training thread, which tells where it waits.
    fn call(&mut self, memory: &Memory, model: &mut Model) -> Turn {
        self.waits = None;
        let moved = self.train(memory, model);
        let view = memory.view(self.rank);
        let posts = posts(&model.board, &view, self.rank);
        if self.told != self.waits && self.fault != Fault::Silent {
            posts.wait_in(self.waits);
            self.told = self.waits;
        }
        match self.waits {
            _ if moved => Turn::Moved,
            _ if self.differs => Turn::Crossed,
            Some(call) if posts.crossed(call).is_some() => Turn::Crossed,
            _ => Turn::Waits,
        }
    }

    fn work(&mut self, memory: &Memory, model: &mut Model) -> bool {
        let (rank, view) = (self.rank, memory.view(self.rank));
        match self.device.pop_front() {
            None => return false,
            Some(Work::Read { unit, result }) => {
                model.weights[unit].iter_mut().for_each(|part| part.read(memory, rank, result, "weights"));
            }
            Some(Work::Slice { unit, post, backward }) => {
                model.grads[unit][rank].write(memory, rank, backward, "gradients");
                self.ahead.landed(unit, backward);
                posts(&model.board, &view, rank).land(unit, post);
            }
            Some(Work::Gate { step }) => self.passed = step,
        }
        true
    }

    /// The runner: a piece of a step's update, or of one ahead.
    fn update(&mut self, memory: &Memory, model: &mut Model, chance: &mut Chance) -> bool {
        let (rank, view) = (self.rank, memory.view(self.rank));
        if chance.percent(50) && self.make_ahead(memory, model) {
            return true;
        }
        if chance.percent(15) && self.make_states(memory, model, chance) {
            return true;
        }
        let Some(at) = (!self.queue.is_empty()).then(|| chance.index(self.queue.len())) else { return false };
        let (unit, step) = self.queue[at];
        let posts = posts(&model.board, &view, rank);
        while self.quiet < step && (self.passed > self.quiet || self.fault == Fault::Loud) {
            self.quiet += 1;
            posts.post(Line::Quiet, &[self.quiet]);
        }
        if self.quiet < step {
            return false;
        }
        match posts.may_begin(step) {
            Look::All => {}
            Look::Waits(_) if self.fault == Fault::Early => {}
            Look::Waits(_) => return false,
            found @ Look::Differs(..) => panic!("ranks that are alike differ: {found:?}"),
        }
        let wanted = posts.read_by(unit, step).is_some() && self.fault != Fault::Careless;
        if wanted || self.reads_before(unit, step) {
            return false;
        }
        self.queue.swap_remove(at);
        if self.fault == Fault::Hasty {
            posts.publish_states(unit, step);
            posts.publish(unit, step);
        }
        let trails = self.make_own(memory, model, (unit, step), chance.percent(40));
        let posts = self::posts(&model.board, &view, rank);
        if !trails || self.fault == Fault::Slack {
            posts.publish_states(unit, step);
        }
        posts.publish(unit, step);
        true
    }

    /// The training thread.
    fn train(&mut self, memory: &Memory, model: &mut Model) -> bool {
        let (rank, view) = (self.rank, memory.view(self.rank));
        let Some(op) = self.ops.front().cloned() else { return false };
        let done = match op {
            Op::Read(unit) => {
                // Of some readers that look at weights alone.
                let states = self.ops.len().is_multiple_of(2);
                let made = if states { self.settled(memory, model, unit) } else { self.published(memory, model, unit) };
                let there =
                    !self.queue.iter().any(|&(queued, _)| queued == unit) && (self.fault == Fault::Blind || made);
                let there = there && (!states || self.at_home(memory, model, unit, false));
                if there {
                    self.device.push_back(Work::Read { unit, result: self.ahead.results[unit] });
                }
                if there && states {
                    self.read_states(memory, model, unit, self.ahead.results[unit]);
                }
                there
            }
            Op::Post { unit, backward, notes } => {
                let posted = posts(&model.board, &view, rank).post_gradients(unit, backward, &notes);
                posted.expect("in order, and the one before was seen");
                true
            }
            Op::End { backward } => return self.exchange(memory, model, backward),
            Op::Look { backward } => self.look(memory, model, backward),
            Op::AtStep { backward } => return self.at_step(memory, model, backward),
            Op::Step { number } => self.step(memory, model, number),
            Op::Meet { place } => return self.meet(memory, model, place),
            Op::Quiesce => self.quiesce(),
            Op::Load { mine } => self.load(memory, model, mine),
            Op::Save => self.save(memory, model),
        };
        if done {
            self.ops.pop_front();
        }
        done
    }

    /// Exchanges the next unit, in the fixed order; ends the backward after the last.
    fn exchange(&mut self, memory: &Memory, model: &mut Model, backward: u64) -> bool {
        let (rank, view) = (self.rank, memory.view(self.rank));
        let Some(unit) = self.parameters.len().checked_sub(self.through + 1) else {
            self.through = 0;
            self.ops.pop_front();
            return true;
        };
        let mut notes = Vec::new();
        // An owner overwrites what its own update has yet to read.
        let reads = |trailing: &Trailing| trailing.unit == unit && self.fault != Fault::Hurried;
        let updated = !self.queue.iter().any(|&(queued, _)| queued == unit) && !self.trail.iter().any(reads);
        match posts(&model.board, &view, rank).gradients(unit, &mut notes) {
            Look::Waits(_) if self.fault == Fault::Unasked => notes = vec![vec![1; self.parameters[unit]]],
            Look::All if updated => {}
            Look::All => return false,
            Look::Waits(_) => {
                self.waits = Some(Call::Gradients(unit));
                return false;
            }
            found @ Look::Differs(..) => panic!("ranks that are alike differ: {found:?}"),
        }
        let post = posts(&model.board, &view, rank).post_of(unit, backward).expect("it was posted");
        if notes.iter().any(|of_rank| of_rank.contains(&1)) {
            if !model.exchange(memory, rank, self.exchanges, (unit, backward)) {
                return false;
            }
            self.exchanges += 1;
            self.exchanged[unit] = backward;
            self.ahead.foresee(unit, self.fault == Fault::Outdated);
            if self.fault == Fault::Airborne {
                posts(&model.board, &view, rank).land(unit, post);
            }
            self.device.push_back(Work::Slice { unit, post, backward });
        }
        self.through += 1;
        true
    }

    /// Reads all gradients that the backward gave.
    fn look(&mut self, memory: &Memory, model: &mut Model, backward: u64) -> bool {
        let (rank, view) = (self.rank, memory.view(self.rank));
        let posts = posts(&model.board, &view, rank);
        let mine: Vec<usize> = (0..self.parameters.len()).filter(|&unit| self.exchanged[unit] == backward).collect();
        for &unit in &mine {
            let post = posts.post_of(unit, backward).expect("it was posted");
            if posts.unlanded(unit, post).is_some() {
                return false;
            }
        }
        for unit in mine {
            model.grads[unit].iter_mut().for_each(|part| part.read(memory, rank, backward, "gradients"));
        }
        true
    }

    fn at_step(&mut self, memory: &Memory, model: &mut Model, backward: u64) -> bool {
        let (rank, view) = (self.rank, memory.view(self.rank));
        let posts = posts(&model.board, &view, rank);
        if !std::mem::replace(&mut self.arrived, true) {
            posts.arrive(backward);
        }
        let arrival = if self.fault == Fault::Alone { Arrival::Step } else { posts.arrived(backward) };
        match arrival {
            Arrival::Waits(_) => {
                self.waits = Some(Call::Step);
                return false;
            }
            Arrival::Step => drop(self.ops.pop_front()),
            Arrival::Join(later) => {
                assert_eq!(later, backward + 1, "one at a time");
                self.ops.pop_front();
                self.ops.push_front(Op::AtStep { backward: later });
                self.ops.push_front(Op::End { backward: later });
                for unit in 0..self.parameters.len() {
                    let notes = vec![0; self.parameters[unit]];
                    self.ops.push_front(Op::Post { unit, backward: later, notes });
                }
            }
        }
        self.arrived = false;
        true
    }

    fn step(&mut self, memory: &Memory, model: &mut Model, number: u64) -> bool {
        let (rank, view) = (self.rank, memory.view(self.rank));
        let posts = posts(&model.board, &view, rank);
        let (units, way) = (self.steps[number as usize - 1].clone(), self.ways[number as usize - 1]);
        let before = posts.count(Line::Steps);
        let queued = |&unit: &usize| self.queue.iter().any(|&(queued, _)| queued == unit);
        if units.iter().any(queued) || !units.clone().into_iter().all(|unit| self.settled(memory, model, unit)) {
            return false;
        }
        match if before > 0 { posts.look(Line::Steps, before) } else { Look::All } {
            Look::All => {}
            Look::Waits(_) => return false,
            found @ Look::Differs(..) => panic!("ranks that are alike differ: {found:?}"),
        }
        self.device.push_back(Work::Gate { step: number });
        posts.post(Line::Steps, &[number, number * 3, 5, 7, 9]);
        for unit in units {
            self.queue.push((unit, number));
            self.versions[unit] = number;
            self.ahead.step(unit, self.exchanged[unit], way);
            self.above.step(unit);
        }
        true
    }
}

impl Rank {
    fn meet(&mut self, memory: &Memory, model: &Model, place: u64) -> bool {
        let view = memory.view(self.rank);
        let posts = posts(&model.board, &view, self.rank);
        if !std::mem::replace(&mut self.met, true) {
            posts.post(Line::Meetings, &[place]);
        }
        match posts.look(Line::Meetings, posts.count(Line::Meetings)) {
            Look::All => self.met = false,
            Look::Waits(_) => self.waits = Some(Call::Meeting),
            Look::Differs(..) => self.differs = true,
        }
        if !self.met {
            self.ops.pop_front();
        }
        !self.met
    }
}

pub(super) fn posts<'a>(board: &'a Board, view: &'a View<'a>, rank: usize) -> Posts<'a, View<'a>> {
    Posts { board, words: view, rank }
}
