//! Residency of units in the ring of frames, and the progress of updates. A plain state machine.
//!
//! Its owner calls a method per event and then performs the commands in the order in which they were pushed.
//!
//! R1: a chunk of the ring has one owner. R2: a held unit keeps its frames. R3: a copy into frames is commanded only
//! after [`Command::WaitReleased`] for every unit whose bytes it overwrites. R4: a unit is filled only when its update,
//! and the writes of its parameters, are finished. R5: every slot taken is given back exactly once. R6: a home counts as current
//! only when the result of the last update is in it; frames may be filled from the spare copy before. R7: while the states of an update
//! trail behind its weights, what they are made from is left alone: no home is filled from the spare copy, no other update is submitted.
//! R8: where other ranks update parts of a unit, its weights are made when theirs are, too, and its states likewise.

mod ahead;
mod command;
#[cfg(test)]
mod disk_tests;
mod grads;
#[cfg(test)]
mod peers_tests;
mod progress;
mod pump;
#[cfg(test)]
mod tests;
mod updates;

use std::collections::VecDeque;

pub use self::command::{Command, Opening, Wait, Want};
use self::progress::{Ahead, Grads};
use crate::{
    quantities::{Tier, UnitId},
    schedule::{
        order::{Order, Phase},
        placement::Placement,
    },
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Frame {
    /// Owns no chunk.
    Absent,
    /// Owns its chunks, bytes still on their way from NVMe.
    Claimed,
    /// Owns its chunks; current bytes are there or their copy is enqueued.
    Full,
    /// Owns its chunks, which hold older bytes.
    Stale,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Update {
    None,
    Queued {
        next: u32,
        ran: u32,
    },
    /// It is being decided whether it has been made ahead, or what was begun ahead is being completed.
    Ahead,
    /// This rank's part is made; the parts of others are yet to be.
    Peers,
}

#[derive(Debug)]
struct UnitState {
    frame: Frame,
    held: bool,
    wanted: bool,
    prefetched: bool,
    reading: bool,
    discard: bool,
    on_nvme: bool,
    streamed: bool,
    chunks: u32,
    update: Update,
    /// The parameters are in the spare copy; their home is older.
    spare: bool,
    /// A caller waits for the home to be current.
    home_wanted: bool,
    /// The last update has made the weights; the states are yet to follow.
    trailing: bool,
    /// The weights of all ranks are made, and the states of another one are yet to follow.
    peers_trail: bool,
    /// A caller waits for the states, or for what they are made from.
    states_wanted: bool,
    writing: u32,
    /// Reads and writes outside of updates, which are among `writing` too.
    holds: u32,
    grads: Grads,
    ahead: Option<Ahead>,
    /// The parameters have their home in host memory.
    params_at_home: bool,
}

impl UnitState {
    /// Notes that the home holds the result of the last update.
    fn at_home(&mut self) {
        (self.spare, self.home_wanted) = (false, false);
    }
}

/// Counts of how openings went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prefetches {
    /// Openings whose bytes had been prefetched, or were still there.
    pub hits: u64,
    /// Openings of units whose prefetch was still on its way.
    pub late: u64,
    /// Openings that no prefetch had begun to serve.
    pub demand: u64,
    /// Prefetched bytes overwritten before use, counted in units.
    pub wasted: u64,
    /// Openings that found their frames held.
    pub conflicts: u64,
}

/// The machine.
#[derive(Debug)]
pub struct Machine {
    units: Vec<UnitState>,
    spans: Vec<(u32, u32)>,
    owners: Vec<Option<UnitId>>,
    /// Per chunk, the unit whose bytes were copied in last.
    copied: Vec<Option<UnitId>>,
    order: Order,
    upcoming: Vec<UnitId>,
    queue: VecDeque<UnitId>,
    /// Units in their spare copy that are to be copied home, as a caller waits for their home.
    homeward: VecDeque<UnitId>,
    /// The unit that is being copied home.
    homing: Option<UnitId>,
    /// Units whose states trail, the one whose weights were made last first: backward wants it first.
    trail: VecDeque<UnitId>,
    /// The unit whose states are being updated.
    following: Option<UnitId>,
    page_free: u32,
    update_free: u32,
    grad_free: u32,
    /// Units that gather gradients in a slot, the first of them first.
    gathering: Vec<UnitId>,
    /// Units with pieces of an update ahead that are yet to be read, in the order in which they came.
    aheads: Vec<UnitId>,
    running: u32,
    window_chunks: u32,
    prefetches: Prefetches,
    /// Other ranks update parts of every unit.
    peers: bool,
}

impl Machine {
    /// A machine for a placement. `chunks[u]` is the number of streamed chunks of unit `u`'s update, 0 if its update
    /// needs no NVMe at all. `window_chunks` bounds how far ahead is paged in.
    pub fn new(placement: &Placement, chunks: &[u32], window_chunks: u32) -> Self {
        let units = placement
            .homes
            .iter()
            .zip(chunks)
            .zip(&placement.spans)
            .map(|((home, &n), span)| UnitState {
                frame: Frame::Absent,
                held: false,
                wanted: false,
                prefetched: false,
                reading: false,
                discard: false,
                on_nvme: home.params == Tier::Nvme && span.chunks > 0,
                streamed: n > 0,
                chunks: n.max(1),
                update: Update::None,
                spare: false,
                home_wanted: false,
                trailing: false,
                peers_trail: false,
                states_wanted: false,
                writing: 0,
                holds: 0,
                grads: Grads::Settled,
                ahead: None,
                params_at_home: home.params == Tier::Host,
            })
            .collect::<Vec<_>>();
        Self {
            spans: placement.spans.iter().map(|s| (s.first_chunk, s.chunks)).collect(),
            owners: vec![None; placement.ring_chunks as usize],
            copied: vec![None; placement.ring_chunks as usize],
            order: Order::default(),
            upcoming: Vec::with_capacity(units.len()),
            queue: VecDeque::with_capacity(units.len() + 1),
            homeward: VecDeque::with_capacity(units.len()),
            homing: None,
            trail: VecDeque::with_capacity(units.len()),
            following: None,
            page_free: placement.page_slots.0,
            // One slot is kept for reads and writes outside of steps.
            update_free: placement.update_slots.0.saturating_sub(1),
            grad_free: placement.grad_slots.0,
            gathering: Vec::with_capacity(placement.grad_slots.0 as usize),
            aheads: Vec::with_capacity(units.len()),
            running: 0,
            window_chunks: window_chunks.min(placement.ring_chunks),
            prefetches: Prefetches::default(),
            peers: false,
            units,
        }
    }

    /// The same where other ranks update parts of every unit, too: an update ends with [`Machine::peers_done`] and [`Machine::peers_made`].
    #[must_use]
    pub fn among_peers(self) -> Self {
        Self { peers: true, ..self }
    }

    /// The caller wants to use the unit's frames. `first` is false when it asks again after `Pending`.
    pub fn open(&mut self, unit: UnitId, phase: Phase, first: bool, out: &mut Vec<Command>) -> Opening {
        if first {
            self.count_opening(unit);
            self.order.saw(phase, unit);
            self.foresee();
        }
        let answer = self.try_open(unit, out);
        if answer == Opening::Conflict {
            self.units[unit.index()].wanted = false;
            self.prefetches.conflicts += u64::from(first);
        }
        self.pump(out);
        answer
    }

    fn count_opening(&mut self, unit: UnitId) {
        let s = &mut self.units[unit.index()];
        match s.frame {
            Frame::Full => self.prefetches.hits += 1,
            Frame::Claimed if s.prefetched => self.prefetches.late += 1,
            _ if s.update != Update::None => self.prefetches.late += 1,
            _ => self.prefetches.demand += 1,
        }
        s.prefetched = false;
    }

    fn try_open(&mut self, unit: UnitId, out: &mut Vec<Command>) -> Opening {
        let conflict = self.units[unit.index()].frame != Frame::Full && self.holder(unit).is_some();
        // On a conflict the caller uses the home, which must be current.
        if self.update_queued(unit) || (conflict && self.update_pending(unit)) {
            self.hurry(unit, if conflict { Want::Home } else { Want::Weights });
            self.units[unit.index()].wanted = true;
            return Opening::Pending(Wait::Update);
        }
        if self.units[unit.index()].frame != Frame::Full {
            if conflict {
                return Opening::Conflict;
            }
            self.units[unit.index()].wanted = true;
            self.fill(unit, out);
        }
        let s = &mut self.units[unit.index()];
        if s.frame != Frame::Full {
            let written = s.on_nvme && s.writing > 0;
            return Opening::Pending(if written { Wait::NvmeWrite } else { Wait::NvmeRead });
        }
        s.held = true;
        s.wanted = false;
        s.prefetched = false;
        Opening::Ready
    }

    /// The window is over, and nothing holds a view of the frames: they may be reused.
    pub fn release(&mut self, unit: UnitId, out: &mut Vec<Command>) {
        self.units[unit.index()].held = false;
        self.pump(out);
    }

    /// True while a window is open, or a view of the frames alive. Before such a unit is opened again its owner records a new
    /// release for [`Command::WaitReleased`]: kernels may be reading older bytes through the view.
    pub fn held(&self, unit: UnitId) -> bool {
        self.units[unit.index()].held
    }

    /// The caller of [`Machine::open`] gave up waiting.
    pub fn forget(&mut self, unit: UnitId) {
        self.units[unit.index()].wanted = false;
    }

    /// The home has newer bytes than the frames.
    pub fn invalidate(&mut self, unit: UnitId) {
        let s = &mut self.units[unit.index()];
        if s.frame == Frame::Full {
            s.frame = Frame::Stale;
        }
        s.discard |= s.reading;
    }

    /// True while results of an update, or an edit, are on their way to NVMe.
    pub fn writing(&self, unit: UnitId) -> bool {
        self.units[unit.index()].writing > 0
    }

    /// The unit's parameters on NVMe are about to be overwritten: nothing of it is read until [`Machine::end_write`]. The
    /// caller waits until [`Machine::reading`] is over.
    pub fn begin_write(&mut self, unit: UnitId) {
        self.invalidate(unit);
        let s = &mut self.units[unit.index()];
        if s.frame == Frame::Claimed {
            s.frame = Frame::Stale;
        }
        s.writing += 1;
        s.holds += 1;
    }

    /// The unit's parameters on NVMe are about to be read without a command of the machine: until
    /// [`Machine::end_write`] no update of them begins.
    pub fn hold_still(&mut self, unit: UnitId) {
        self.units[unit.index()].writing += 1;
        self.units[unit.index()].holds += 1;
    }

    /// Ends [`Machine::begin_write`] or [`Machine::hold_still`].
    pub fn end_write(&mut self, unit: UnitId, out: &mut Vec<Command>) {
        self.units[unit.index()].writing -= 1;
        self.units[unit.index()].holds -= 1;
        self.end_ahead(unit, out);
        self.pump(out);
    }

    /// True while the unit's parameters are being read from NVMe.
    pub fn reading(&self, unit: UnitId) -> bool {
        self.units[unit.index()].reading
    }

    /// True if the bytes of a [`Command::ReadParams`] under way are still wanted, and so must be verified.
    pub fn wants_params(&self, unit: UnitId) -> bool {
        let s = &self.units[unit.index()];
        s.frame == Frame::Claimed && !s.discard
    }

    /// A [`Command::ReadParams`] has finished.
    pub fn params_read(&mut self, unit: UnitId, out: &mut Vec<Command>) {
        let wanted = self.wants_params(unit);
        let s = &mut self.units[unit.index()];
        s.reading = false;
        if wanted {
            self.copy_up(unit, out);
        } else {
            if s.frame == Frame::Claimed {
                s.frame = Frame::Stale;
            }
            s.discard = false;
            self.page_free += 1;
            out.push(Command::DropSlot(unit));
        }
        self.pump(out);
    }

    /// The copy of a [`Command::CopyUp`] from a page slot is over.
    pub fn copied(&mut self, _unit: UnitId, out: &mut Vec<Command>) {
        self.page_free += 1;
        self.pump(out);
    }

    /// A [`Command::WriteChunk`] or [`Command::WriteAhead`] has finished.
    pub fn chunk_written(&mut self, unit: UnitId, _chunk: u32, out: &mut Vec<Command>) {
        self.units[unit.index()].writing -= 1;
        self.update_free += 1;
        self.pump(out);
    }

    /// How openings went so far.
    pub fn prefetches(&self) -> Prefetches {
        self.prefetches
    }

    /// A few words on what is under way, for the message of a wait that took too long.
    pub fn describe(&self) -> String {
        let reading = self.units.iter().filter(|s| s.reading).count();
        let writing: u32 = self.units.iter().map(|s| s.writing).sum();
        let held = self.units.iter().filter(|s| s.held).count();
        let trailing = self.units.iter().filter(|s| s.trailing || s.peers_trail).count();
        format!(
            "{} updates queued, {} running, {} wait for other ranks, states of {trailing} units trail, {reading} units being read, {writing} chunks being written, {held} windows open, {} page and {} update slots free",
            self.queue.len(),
            self.running,
            self.units.iter().filter(|s| s.update == Update::Peers).count(),
            self.page_free,
            self.update_free
        )
    }
}
