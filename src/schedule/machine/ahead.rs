//! Updates ahead of their step, of units whose states live on NVMe and have a second place there.
//!
//! H1: such an update reads the current places and writes the others; [`Command::SwapPlaces`] makes those the current ones, once all of it is made
//! and the step has asked for the same. H2: of a unit either pieces of an update ahead are under way, or pieces of a step's, never both: what a
//! dropped one has under way ends first. H3: places are not swapped while bytes of the unit are read or written outside of updates.
//! H4: every slot taken for a piece is given back once: when the piece was written, or dropped. H5: among ranks nothing changes places here: this
//! rank's parameters go home, and its owner has the states change places when all ranks have made theirs.

use super::{Command, Machine, Update, progress::Ahead};
use crate::quantities::UnitId;

impl Machine {
    /// The unit's next update may be made now, into its other places; false where one is under way already.
    pub fn begin_ahead(&mut self, unit: UnitId, out: &mut Vec<Command>) -> bool {
        let s = &mut self.units[unit.index()];
        if s.update != Update::None || s.peers_trail || s.ahead.is_some() || !s.streamed {
            return false;
        }
        s.ahead = Some(Ahead::default());
        self.aheads.push(unit);
        // Its gradients are all there.
        self.flush_grads(unit, out);
        self.pump_updates(out);
        true
    }

    /// An input of the unit's update ahead changes; returns whether something was made in vain. Nothing to do for one that a step has taken
    /// over: its inputs stay.
    pub fn drop_ahead(&mut self, unit: UnitId, out: &mut Vec<Command>) -> bool {
        let s = &self.units[unit.index()];
        if s.update != Update::None {
            return false;
        }
        let in_vain = s.ahead.is_some_and(|a| !a.dropped && a.ran > 0);
        self.discard_ahead(unit, out);
        in_vain
    }

    fn discard_ahead(&mut self, unit: UnitId, out: &mut Vec<Command>) {
        let Some(ahead) = &mut self.units[unit.index()].ahead else { return };
        ahead.dropped = true;
        self.aheads.retain(|&u| u != unit);
        if ahead.flight == 0 {
            self.units[unit.index()].ahead = None;
            self.pump_updates(out);
        }
    }

    /// True while an update ahead is under way that may still be used.
    pub(super) fn is_ahead(&self, unit: UnitId) -> bool {
        self.units[unit.index()].ahead.is_some_and(|a| !a.dropped)
    }

    /// True while pieces of a dropped update ahead are under way: they read what is current.
    pub(super) fn is_dropping(&self, unit: UnitId) -> bool {
        self.units[unit.index()].ahead.is_some_and(|a| a.dropped)
    }

    /// The answer to [`Command::Decide`]: the step asks for what was begun ahead, or not.
    pub fn decided(&mut self, unit: UnitId, take: bool, out: &mut Vec<Command>) {
        if take && let Some(ahead) = &mut self.units[unit.index()].ahead {
            ahead.taken = true;
            self.end_ahead(unit, out);
        } else {
            self.units[unit.index()].update = Update::Queued { next: 0, ran: 0 };
            self.queue.push_back(unit);
            self.discard_ahead(unit, out);
        }
        self.pump(out);
    }

    /// The end of [`Command::RunAhead`]. Not `made`: the runner found that it was dropped.
    pub fn ran_ahead(&mut self, unit: UnitId, chunk: u32, made: bool, out: &mut Vec<Command>) {
        if !made {
            self.discard_ahead(unit, out);
        }
        let s = &mut self.units[unit.index()];
        let Some(ahead) = &mut s.ahead else { unreachable!("a piece under way keeps what it belongs to") };
        if ahead.dropped {
            self.drop_piece(unit, chunk, out);
            return;
        }
        ahead.flight -= 1;
        ahead.ran += 1;
        s.writing += 1;
        out.push(Command::WriteAhead(unit, chunk));
        self.end_ahead(unit, out);
        self.pump(out);
    }

    /// True while pieces of an update ahead may be dropped: no step has taken it over.
    pub fn may_drop(&self, unit: UnitId) -> bool {
        self.units[unit.index()].ahead.is_some_and(|a| !a.taken)
    }

    /// In place of [`Machine::chunk_read`], of a piece that may be dropped: it is of no use.
    pub fn read_in_vain(&mut self, unit: UnitId, chunk: u32, out: &mut Vec<Command>) {
        self.discard_ahead(unit, out);
        self.drop_piece(unit, chunk, out);
    }

    /// A piece of an update ahead was read; false if the unit has none, so that the piece is the step's.
    pub(super) fn read_ahead(&mut self, unit: UnitId, chunk: u32, out: &mut Vec<Command>) -> bool {
        match self.units[unit.index()].ahead {
            None => return false,
            Some(ahead) if ahead.dropped => self.drop_piece(unit, chunk, out),
            Some(_) => out.push(Command::RunAhead(unit, chunk)),
        }
        true
    }

    fn drop_piece(&mut self, unit: UnitId, chunk: u32, out: &mut Vec<Command>) {
        self.update_free += 1;
        out.push(Command::DropChunk(unit, chunk));
        if let Some(ahead) = &mut self.units[unit.index()].ahead {
            ahead.flight -= 1;
            if ahead.dropped && ahead.flight == 0 {
                self.units[unit.index()].ahead = None;
            }
        }
        self.pump(out);
    }

    /// Has the rest of an update that a step has taken over made next, as a caller waits for it.
    pub(super) fn hurry_ahead(&mut self, unit: UnitId) {
        if let Some(at) = self.aheads.iter().position(|&u| u == unit).filter(|_| self.update_queued(unit)) {
            self.aheads.remove(at);
            self.aheads.push(unit);
        }
    }

    /// Swaps places if all that the step asked for is made.
    pub(super) fn end_ahead(&mut self, unit: UnitId, out: &mut Vec<Command>) {
        let s = &mut self.units[unit.index()];
        if !s.ahead.is_some_and(|a| a.taken && a.ran == s.chunks) || s.holds > 0 {
            return;
        }
        if self.peers {
            s.ahead = None;
            out.push(Command::BringOwn(unit));
            return;
        }
        (s.ahead, s.update, s.states_wanted) = (None, Update::None, false);
        if s.params_at_home {
            // Parameters have changed places too.
            if s.spare {
                s.at_home();
            } else {
                s.spare = true;
            }
        }
        out.push(Command::SwapPlaces(unit));
        self.bring_home(unit);
    }

    /// True if no piece of an update ahead could be read, if there were slots: none is left, or gradients are not written yet.
    pub fn reads_nothing_ahead(&self) -> bool {
        !self.aheads.iter().any(|&unit| self.may_read(unit))
    }

    /// Whether the next piece of a unit's update ahead may be read.
    fn may_read(&self, unit: UnitId) -> bool {
        let s = &self.units[unit.index()];
        self.grads_settled(unit) && (s.ahead.is_some_and(|a| a.next > 0) || s.writing == 0)
    }

    /// Reads pieces: first of what a step has taken over, then, if no step waits for slots, of what is begun, then of what came last.
    pub(super) fn pump_ahead(&mut self, out: &mut Vec<Command>) {
        while self.update_free > 0 {
            let which = |f: fn(Ahead) -> bool| {
                self.aheads.iter().rposition(|&u| self.units[u.index()].ahead.is_some_and(f) && self.may_read(u))
            };
            let taken = which(|a| a.taken);
            let free = if self.queue.is_empty() { which(|a| a.next > 0).or_else(|| which(|_| true)) } else { None };
            let Some(at) = taken.or(free) else { return };
            let unit = self.aheads[at];
            let s = &mut self.units[unit.index()];
            let Some(ahead) = &mut s.ahead else { unreachable!("a unit in the list has an update ahead") };
            self.update_free -= 1;
            out.push(Command::ReadChunk(unit, ahead.next));
            ahead.next += 1;
            ahead.flight += 1;
            if ahead.next == s.chunks {
                self.aheads.remove(at);
            }
        }
    }
}
