//! Residency of units in the ring of frames, and the progress of updates. A plain state machine.
//!
//! Its owner calls a method per event and then performs the commands in the order in which they were pushed.
//!
//! R1: a chunk of the ring has one owner. R2: a held unit keeps its frames. R3: a copy into frames is commanded only
//! after [`Command::WaitReleased`] for every unit whose bytes it overwrites. R4: a unit is filled only when its update,
//! and the writes of its parameters, are finished. R5: every slot taken is given back exactly once. R6: a home counts as current
//! only when the result of the last update is in it; frames may be filled from the spare copy before.

mod pump;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use crate::{
    quantities::{Tier, UnitId},
    schedule::{
        order::{Order, Phase},
        placement::Placement,
    },
};

/// Something to be done, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Read all parameters of the unit from NVMe into a page slot; answer with [`Machine::params_read`].
    ReadParams(UnitId),
    /// The page slot holds bytes that are no longer wanted: give it back.
    DropSlot(UnitId),
    /// Make the up stream wait until the unit's last window is over on the compute stream.
    WaitReleased(UnitId),
    /// Enqueue the copy into the unit's frames, from its page slot if its parameters live on NVMe, else from its home, or while
    /// [`Machine::in_spare`] from its spare copy.
    /// With a slot: answer with [`Machine::copied`] once the copy is over and the slot given back.
    CopyUp(UnitId),
    /// Read the states of one chunk into an update slot; answer with [`Machine::chunk_read`].
    ReadChunk(UnitId, u32),
    /// Update one chunk; answer with [`Machine::chunk_ran`], or with [`Machine::swapped`].
    RunChunk(UnitId, u32),
    /// Copy the parameters from the spare copy to their home; answer with [`Machine::homed`].
    CopyHome(UnitId),
    /// Write one chunk's states back, then give the slot back; answer with [`Machine::chunk_written`].
    WriteChunk(UnitId, u32),
}

/// Answer to [`Machine::open`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// The bytes are in the frames, or their copy is enqueued. The unit is held now.
    Ready,
    /// On its way; ask again after the next event.
    Pending(Wait),
    /// A held unit owns one of the frames: use the home.
    Conflict,
}

/// What a pending opening waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// The unit's update.
    Update,
    /// Bytes from NVMe.
    NvmeRead,
    /// Bytes on their way to NVMe, which must be there before they are read.
    NvmeWrite,
}

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
    Queued { next: u32, ran: u32 },
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
    writing: u32,
}

impl UnitState {
    /// Notes that the home holds the result of the last update.
    fn at_home(&mut self) {
        (self.spare, self.home_wanted) = (false, false);
    }
}

/// Moves a unit to the front of a queue, if it is in it.
fn first(queue: &mut VecDeque<UnitId>, unit: UnitId) {
    if let Some(at) = queue.iter().position(|&u| u == unit).filter(|&at| at > 0) {
        queue.remove(at);
        queue.push_front(unit);
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
    page_free: u32,
    update_free: u32,
    running: u32,
    window_chunks: u32,
    prefetches: Prefetches,
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
                writing: 0,
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
            page_free: placement.page_slots.0,
            // One slot is kept for reads and writes outside of steps.
            update_free: placement.update_slots.0.saturating_sub(1),
            running: 0,
            window_chunks: window_chunks.min(placement.ring_chunks),
            prefetches: Prefetches::default(),
            units,
        }
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
            _ if matches!(s.update, Update::Queued { .. }) => self.prefetches.late += 1,
            _ => self.prefetches.demand += 1,
        }
        s.prefetched = false;
    }

    fn try_open(&mut self, unit: UnitId, out: &mut Vec<Command>) -> Opening {
        let conflict = self.units[unit.index()].frame != Frame::Full && self.holder(unit).is_some();
        // On a conflict the caller uses the home, which must be current.
        if self.update_queued(unit) || (conflict && self.update_pending(unit)) {
            self.hurry(unit, conflict);
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

    /// True while updates are queued or running; their results may be in spare copies, and their writes to NVMe may trail.
    pub fn updating(&self) -> bool {
        self.units.iter().any(|s| s.update != Update::None)
    }

    /// The home has newer bytes than the frames.
    pub fn invalidate(&mut self, unit: UnitId) {
        let s = &mut self.units[unit.index()];
        if s.frame == Frame::Full {
            s.frame = Frame::Stale;
        }
        s.discard |= s.reading;
    }

    /// The unit's parameters are to be updated now.
    ///
    /// # Panics
    /// If an update of the unit is still under way: its owner must wait for it first.
    pub fn submit(&mut self, unit: UnitId, out: &mut Vec<Command>) {
        assert!(!self.update_queued(unit), "{unit} is being updated already");
        self.invalidate(unit);
        if self.units[unit.index()].frame == Frame::Claimed {
            self.units[unit.index()].frame = Frame::Stale;
        }
        self.units[unit.index()].update = Update::Queued { next: 0, ran: 0 };
        self.queue.push_back(unit);
        // No page-ins yet: the units expected next may be submitted next.
        self.pump_updates(out);
    }

    /// Moves a unit's update to the front of the queue, as a caller waits for it; with `home`, its copy home too.
    pub fn promote(&mut self, unit: UnitId, home: bool, out: &mut Vec<Command>) {
        self.hurry(unit, home);
        self.pump_updates(out);
    }

    fn hurry(&mut self, unit: UnitId, home: bool) {
        first(&mut self.queue, unit);
        self.units[unit.index()].home_wanted |= home && self.update_pending(unit);
        self.bring_home(unit);
    }

    /// Queues the unit's copy home, if a caller waits for its home and no queued update will fill it.
    fn bring_home(&mut self, unit: UnitId) {
        let s = &self.units[unit.index()];
        if s.home_wanted && s.spare && !self.update_queued(unit) && self.homing != Some(unit) {
            if self.homeward.contains(&unit) {
                first(&mut self.homeward, unit);
            } else {
                self.homeward.push_front(unit);
            }
        }
    }

    /// True until the unit's home holds the result of its last submitted update.
    pub fn update_pending(&self, unit: UnitId) -> bool {
        self.update_queued(unit) || self.in_spare(unit)
    }

    /// True until the last submitted update is made; its result may be in the spare copy.
    pub fn update_queued(&self, unit: UnitId) -> bool {
        matches!(self.units[unit.index()].update, Update::Queued { .. })
    }

    /// True while an update of the unit is queued or running, or bytes of it are on their way to NVMe.
    pub fn unsettled(&self, unit: UnitId) -> bool {
        self.update_queued(unit) || self.units[unit.index()].writing > 0
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
    }

    /// The unit's parameters on NVMe are about to be read without a command of the machine: until
    /// [`Machine::end_write`] no update of them begins.
    pub fn hold_still(&mut self, unit: UnitId) {
        self.units[unit.index()].writing += 1;
    }

    /// Ends [`Machine::begin_write`] or [`Machine::hold_still`].
    pub fn end_write(&mut self, unit: UnitId, out: &mut Vec<Command>) {
        self.units[unit.index()].writing -= 1;
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

    /// A [`Command::ReadChunk`] has finished.
    pub fn chunk_read(&mut self, unit: UnitId, chunk: u32, out: &mut Vec<Command>) {
        self.running += 1;
        out.push(Command::RunChunk(unit, chunk));
    }

    /// A [`Command::RunChunk`] has finished.
    pub fn chunk_ran(&mut self, unit: UnitId, chunk: u32, out: &mut Vec<Command>) {
        self.running -= 1;
        let s = &mut self.units[unit.index()];
        if s.streamed {
            s.writing += 1;
            out.push(Command::WriteChunk(unit, chunk));
        }
        if let Update::Queued { next, ran } = s.update {
            s.update = if ran + 1 == s.chunks { Update::None } else { Update::Queued { next, ran: ran + 1 } };
            if s.update == Update::None {
                s.at_home();
            }
        }
        self.pump(out);
    }

    /// A [`Command::RunChunk`] made all of its unit's update, or found it made ahead, in the other of the unit's two places: in the
    /// spare copy if the parameters were at home, else at home.
    pub fn swapped(&mut self, unit: UnitId, out: &mut Vec<Command>) {
        self.running -= 1;
        let s = &mut self.units[unit.index()];
        s.update = Update::None;
        if s.spare {
            s.at_home();
        } else {
            s.spare = true;
        }
        self.bring_home(unit);
        self.pump(out);
    }

    /// True while the parameters are in the spare copy, and their home is older. It changes only when an update of the unit, or a
    /// [`Command::CopyHome`], has finished.
    pub fn in_spare(&self, unit: UnitId) -> bool {
        self.units[unit.index()].spare
    }

    /// A [`Command::CopyHome`] has finished.
    pub fn homed(&mut self, unit: UnitId, out: &mut Vec<Command>) {
        if self.homing == Some(unit) {
            self.homing = None;
        }
        // A caller may wait for the result of an update queued meanwhile to be at home, too.
        let queued = self.update_queued(unit);
        let s = &mut self.units[unit.index()];
        (s.spare, s.home_wanted) = (false, s.home_wanted && queued);
        self.pump(out);
    }

    /// A [`Command::WriteChunk`] has finished.
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
        format!(
            "{} updates queued, {} running, {reading} units being read, {writing} chunks being written, {held} windows open, {} page and {} update slots free",
            self.queue.len(),
            self.running,
            self.page_free,
            self.update_free
        )
    }
}
