//! Updates: queued by steps, made whole or their weights first, and the parameters' way home.

use std::collections::VecDeque;

use super::{Command, Frame, Machine, Update, Want};
use crate::quantities::UnitId;

/// Moves a unit to the front of a queue, if it is in it.
fn first(queue: &mut VecDeque<UnitId>, unit: UnitId) {
    if let Some(at) = queue.iter().position(|&u| u == unit).filter(|&at| at > 0) {
        queue.remove(at);
        queue.push_front(unit);
    }
}

impl Machine {
    /// True while updates are queued or running, or states trail; results may be in spare copies, and writes to NVMe be under way.
    pub fn updating(&self) -> bool {
        self.units.iter().any(|s| s.update != Update::None || s.trailing || s.peers_trail)
    }

    /// The unit's parameters are to be updated now.
    ///
    /// # Panics
    /// If an update of the unit is still under way: its owner must wait for it first.
    pub fn submit(&mut self, unit: UnitId, out: &mut Vec<Command>) {
        assert!(!self.update_unmade(unit), "{unit} is being updated already");
        self.invalidate(unit);
        if self.units[unit.index()].frame == Frame::Claimed {
            self.units[unit.index()].frame = Frame::Stale;
        }
        if self.is_ahead(unit) {
            self.units[unit.index()].update = Update::Ahead;
            out.push(Command::Decide(unit));
        } else {
            self.units[unit.index()].update = Update::Queued { next: 0, ran: 0 };
            self.queue.push_back(unit);
        }
        // No page-ins yet: the units expected next may be submitted next.
        self.pump_updates(out);
    }

    /// Moves a unit's update to the front of the queue, and what a caller wants of it.
    pub fn promote(&mut self, unit: UnitId, want: Want, out: &mut Vec<Command>) {
        self.hurry(unit, want);
        self.pump_updates(out);
    }

    pub(super) fn hurry(&mut self, unit: UnitId, want: Want) {
        first(&mut self.queue, unit);
        self.hurry_ahead(unit);
        let (unmade, pending) = (self.update_unmade(unit), self.update_pending(unit));
        let s = &mut self.units[unit.index()];
        s.home_wanted |= want == Want::Home && pending;
        // A copy home waits for states that trail.
        s.states_wanted |= (want == Want::States && unmade) || (want == Want::Home && s.trailing && s.spare);
        self.bring_home(unit);
    }

    /// Queues the unit's copy home, if a caller waits for its home and no queued update will fill it. States that trail are made from what
    /// the home holds, and come first (R7).
    pub(super) fn bring_home(&mut self, unit: UnitId) {
        let s = &self.units[unit.index()];
        if s.home_wanted && s.spare && !self.update_unmade(unit) && self.homing != Some(unit) {
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

    /// True until the last submitted update has made the weights; they may be in the spare copy, and the states may trail.
    pub fn update_queued(&self, unit: UnitId) -> bool {
        self.units[unit.index()].update != Update::None
    }

    /// True until the last submitted update is made as a whole: it has read its gradients, and the states are the new ones.
    pub fn update_unmade(&self, unit: UnitId) -> bool {
        self.reads_gradients(unit) || self.units[unit.index()].peers_trail
    }

    /// True until the last submitted update has read its gradients, of which this rank's own part is.
    pub fn reads_gradients(&self, unit: UnitId) -> bool {
        self.update_queued(unit) || self.units[unit.index()].trailing
    }

    /// True while an update of the unit is under way, or bytes of it are on their way to NVMe, or read for nothing.
    pub fn unsettled(&self, unit: UnitId) -> bool {
        self.update_unmade(unit) || self.units[unit.index()].writing > 0 || self.is_dropping(unit)
    }

    /// True until the first piece of a queued update has run.
    pub fn at_first_piece(&self, unit: UnitId) -> bool {
        matches!(self.units[unit.index()].update, Update::Queued { ran: 0, .. })
    }

    /// A [`Command::ReadChunk`] has finished.
    pub fn chunk_read(&mut self, unit: UnitId, chunk: u32, out: &mut Vec<Command>) {
        if self.read_ahead(unit, chunk, out) {
            return;
        }
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
            let made = if self.peers { Update::Peers } else { Update::None };
            s.update = if ran + 1 == s.chunks { made } else { Update::Queued { next, ran: ran + 1 } };
            if s.update == Update::None {
                s.at_home();
                s.states_wanted = false;
            }
        }
        self.pump(out);
    }

    /// A [`Command::BringOwn`] has finished.
    pub fn brought(&mut self, unit: UnitId, out: &mut Vec<Command>) {
        self.units[unit.index()].update = Update::Peers;
        self.pump(out);
    }

    /// All ranks have made their parts of the unit's weights. Nothing to do for a unit that does not wait for that.
    pub fn peers_done(&mut self, unit: UnitId, out: &mut Vec<Command>) {
        let s = &mut self.units[unit.index()];
        if s.update == Update::Peers {
            (s.update, s.peers_trail) = (Update::None, true);
            s.at_home();
            self.pump(out);
        }
    }

    /// After [`Machine::peers_done`]: all ranks have made their parts of the unit's states, too.
    pub fn peers_made(&mut self, unit: UnitId, out: &mut Vec<Command>) {
        let s = &mut self.units[unit.index()];
        if s.peers_trail && !s.trailing {
            (s.peers_trail, s.states_wanted) = (false, false);
            self.pump(out);
        }
    }

    /// True while the unit's own part of an update is made, and those of other ranks are not known to be.
    pub fn awaits_peers(&self, unit: UnitId) -> bool {
        let s = &self.units[unit.index()];
        !s.trailing && (s.update == Update::Peers || s.peers_trail)
    }

    /// True once this rank's own part of an update's weights is made, until all ranks have made theirs.
    pub fn own_weights_made(&self, unit: UnitId) -> bool {
        self.units[unit.index()].update == Update::Peers
    }

    /// True once this rank's own part of an update is made, states included, and nothing of it is on its way to NVMe any more; until all ranks have
    /// made theirs.
    pub fn own_part_stored(&self, unit: UnitId) -> bool {
        let s = &self.units[unit.index()];
        self.awaits_peers(unit) && s.writing == s.holds
    }

    /// True while this rank has states to make that trail behind their weights.
    pub fn trails(&self) -> bool {
        self.following.is_some() || !self.trail.is_empty()
    }

    /// The updates handed out wait for other ranks: states that trail follow meanwhile.
    pub fn stalled(&mut self, out: &mut Vec<Command>) {
        self.follow(true, out);
    }

    /// A [`Command::RunChunk`] made all of its unit's update, or found it made ahead, in the other of the unit's two places: in the
    /// spare copy if the parameters were at home, else at home.
    pub fn swapped(&mut self, unit: UnitId, out: &mut Vec<Command>) {
        self.running -= 1;
        let s = &mut self.units[unit.index()];
        (s.update, s.states_wanted) = (Update::None, false);
        if s.spare {
            s.at_home();
        } else {
            s.spare = true;
        }
        self.bring_home(unit);
        self.pump(out);
    }

    /// A [`Command::RunChunk`] has made all of its unit's weights: in place at home, or (`turned`) in the other of the unit's two places.
    /// The states follow.
    pub fn weights_ran(&mut self, unit: UnitId, turned: bool, out: &mut Vec<Command>) {
        self.running -= 1;
        let s = &mut self.units[unit.index()];
        s.update = if self.peers { Update::Peers } else { Update::None };
        s.trailing = true;
        if turned && !s.spare {
            s.spare = true;
            s.states_wanted |= s.home_wanted;
        } else {
            s.at_home();
        }
        self.trail.push_front(unit);
        self.pump(out);
    }

    /// A [`Command::RunStates`] has finished.
    pub fn states_ran(&mut self, unit: UnitId, out: &mut Vec<Command>) {
        self.following = None;
        let s = &mut self.units[unit.index()];
        (s.trailing, s.states_wanted) = (false, false);
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
}
