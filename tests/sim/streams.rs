//! The simulated device: FIFO streams whose operations take several steps each, over one ring of chunks.

use std::collections::VecDeque;

use funicular::quantities::UnitId;

use crate::model::Model;

/// What memory holds where a write is half done, or where pieces of different versions meet.
pub(crate) const TORN: u64 = 0;
/// What a released frame is filled with under `debug.poison`.
const POISON: u64 = 0xffff;

pub(crate) const COMPUTE: usize = 0;
pub(crate) const UP: usize = 1;
pub(crate) const DOWN: usize = 2;

/// A point in a stream: passed once that many operations are done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Gate {
    pub(crate) stream: usize,
    pub(crate) seq: u64,
}

/// What is copied into frames.
#[derive(Clone, Debug)]
pub(crate) enum From {
    /// A slot that holds these pieces.
    Slot(Vec<u64>),
    Home,
    Spare,
}

#[derive(Clone, Debug)]
pub(crate) enum Op {
    /// Go on only after another stream has passed a gate.
    Wait(Gate),
    /// Copy a unit into its frames.
    CopyUp(UnitId, From),
    /// A kernel that reads the unit's frames, chunk by chunk, and must see this content.
    Read(UnitId, u64),
    /// A kernel that reads the unit's home.
    ReadHome(UnitId, u64),
    /// A kernel that edits the unit's home.
    EditHome(UnitId, u64),
    /// A kernel that edits the unit's frames.
    EditFrames(UnitId, u64),
    /// Copy these gradients of a unit into its slot.
    CopyGrad(UnitId, u64),
    /// Copy a unit's frames to its home.
    CopyDown(UnitId),
    Poison(UnitId),
}

#[derive(Debug, Default)]
struct Stream {
    ops: VecDeque<Op>,
    step: usize,
    enqueued: u64,
    done: u64,
}

/// One chunk of the ring: whose bytes it holds, which of them, and their content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cell {
    unit: u32,
    index: u32,
    content: u64,
}

#[derive(Debug)]
pub(crate) struct Device {
    streams: [Stream; 3],
    ring: Vec<Cell>,
    places: Vec<Vec<usize>>,
    /// Per unit and piece of its update: the home, or what lies on NVMe.
    pub(crate) params: Vec<Vec<u64>>,
    /// Per unit, what its spare copy holds.
    pub(crate) spare: Vec<Vec<u64>>,
    /// Per unit, what its gradient slot holds, if it has one.
    pub(crate) gathered: Vec<Option<u64>>,
}

impl Device {
    pub(crate) fn new(model: &Model, params: Vec<Vec<u64>>) -> Self {
        Self {
            streams: Default::default(),
            ring: vec![Cell { unit: u32::MAX, index: 0, content: POISON }; model.plan.ring_chunks as usize],
            places: model.layout.ids().map(|u| model.places(u)).collect(),
            spare: params.iter().map(|pieces| vec![TORN; pieces.len()]).collect(),
            gathered: vec![None; params.len()],
            params,
        }
    }

    pub(crate) fn record(&self, stream: usize) -> Gate {
        Gate { stream, seq: self.streams[stream].enqueued }
    }

    pub(crate) fn passed(&self, gate: Gate) -> bool {
        self.streams[gate.stream].done >= gate.seq
    }

    pub(crate) fn enqueue(&mut self, stream: usize, op: Op) {
        if let Op::Wait(gate) = op {
            assert!(gate.seq <= self.streams[gate.stream].enqueued, "D3: a wait for what is not enqueued yet");
            if gate.stream == stream {
                return;
            }
        }
        self.streams[stream].ops.push_back(op);
        self.streams[stream].enqueued += 1;
    }

    pub(crate) fn idle(&self, stream: usize) -> bool {
        self.streams[stream].ops.is_empty()
    }

    /// True if the stream's first operation can go on.
    pub(crate) fn can_advance(&self, stream: usize) -> bool {
        match self.streams[stream].ops.front() {
            None => false,
            Some(Op::Wait(gate)) => self.passed(*gate),
            Some(_) => true,
        }
    }

    /// What a piece-wise segment holds as chunk `index` of `chunks`.
    fn part(pieces: &[u64], index: usize, chunks: usize) -> u64 {
        let from = index * pieces.len() / chunks;
        let to = ((index + 1) * pieces.len() / chunks).max(from + 1);
        let first = pieces[from];
        if pieces[from..to].iter().all(|&p| p == first) { first } else { TORN }
    }

    fn read_cell(&self, unit: UnitId, index: usize, expected: u64) {
        let cell = self.ring[self.places[unit.index()][index]];
        let wanted = Cell { unit: unit.0, index: index as u32, content: expected };
        assert!(cell == wanted, "R2/R3: compute in a window of {unit} reads {cell:x?} instead of {wanted:x?}");
    }

    fn write_cell(&mut self, unit: UnitId, index: usize, content: u64) {
        self.ring[self.places[unit.index()][index]] = Cell { unit: unit.0, index: index as u32, content };
    }

    /// One step of the stream's first operation.
    pub(crate) fn advance(&mut self, stream: usize) {
        let step = self.streams[stream].step;
        let op = self.streams[stream].ops.pop_front().expect("asked only if it can");
        if self.run(&op, step) {
            self.streams[stream].step = 0;
            self.streams[stream].done += 1;
        } else {
            self.streams[stream].step += 1;
            self.streams[stream].ops.push_front(op);
        }
    }

    /// True if that was the last step.
    fn run(&mut self, op: &Op, step: usize) -> bool {
        let chunks = |unit: &UnitId| self.places[unit.index()].len();
        match op {
            Op::Wait(_) => true,
            Op::CopyUp(unit, from) => {
                let n = chunks(unit);
                if step < n {
                    let content = match from {
                        From::Slot(pieces) => Self::part(pieces, step, n),
                        From::Home => Self::part(&self.params[unit.index()], step, n),
                        From::Spare => Self::part(&self.spare[unit.index()], step, n),
                    };
                    self.write_cell(*unit, step, content);
                }
                step + 1 >= n
            }
            Op::Read(unit, expected) => {
                // Chunk by chunk, then all of them once more: a copy may have come in between.
                let n = chunks(unit);
                if step < n {
                    self.read_cell(*unit, step, *expected);
                    return false;
                }
                (0..n).for_each(|i| self.read_cell(*unit, i, *expected));
                true
            }
            Op::ReadHome(unit, expected) => {
                let pieces = &self.params[unit.index()];
                assert!(pieces.iter().all(|p| p == expected), "the home of {unit} holds {pieces:x?}, not {expected:x}");
                step >= 1
            }
            Op::EditHome(unit, content) => {
                self.params[unit.index()].fill(if step == 0 { TORN } else { *content });
                step >= 1
            }
            Op::EditFrames(unit, content) => {
                let n = chunks(unit);
                if step < n {
                    self.write_cell(*unit, step, *content);
                }
                step + 1 >= n
            }
            Op::CopyGrad(unit, content) => {
                let slot = self.gathered[unit.index()].as_mut();
                *slot.expect("G1: gradients are copied into a slot that is another's") =
                    if step == 0 { TORN } else { *content };
                step >= 1
            }
            Op::CopyDown(unit) => {
                let places = &self.places[unit.index()];
                if let Some(&first) = places.first() {
                    let cell = self.ring[first];
                    let same =
                        places.iter().all(|&c| self.ring[c].unit == unit.0 && self.ring[c].content == cell.content);
                    assert!(same, "R2: the frames of {unit} are not its own while they are written back");
                    self.params[unit.index()].fill(if step == 0 { TORN } else { cell.content });
                }
                step >= 1
            }
            Op::Poison(unit) => {
                (0..chunks(unit)).for_each(|i| self.write_cell(*unit, i, POISON));
                true
            }
        }
    }
}
