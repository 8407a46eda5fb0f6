//! What the machine starts by itself after every event: updates, page-ins of pending openings, prefetches.

use super::{Command, Frame, Machine, Update};
use crate::quantities::UnitId;

/// Updates handed to the runner at a time: one at work, one waiting, so that a demand can still overtake.
const RUN_AHEAD: u32 = 2;

impl Machine {
    /// The units expected next, as far as one ring of frames reaches.
    pub(super) fn foresee(&mut self) {
        self.upcoming.clear();
        let mut left = self.window_chunks;
        let spans = &self.spans;
        self.order.upcoming(
            |u| {
                let n = spans[u.index()].1;
                let full = n > left;
                left = left.saturating_sub(n);
                full
            },
            &mut self.upcoming,
        );
    }

    fn chunk_indices(&self, unit: UnitId) -> impl Iterator<Item = usize> + use<> {
        let (first, n) = self.spans[unit.index()];
        let ring = self.owners.len();
        (0..n as usize).map(move |i| (first as usize + i) % ring)
    }

    /// Another unit that is held and owns one of this unit's frames.
    pub(super) fn holder(&self, unit: UnitId) -> Option<UnitId> {
        self.chunk_indices(unit).filter_map(|c| self.owners[c]).find(|&v| v != unit && self.units[v.index()].held)
    }

    /// True if another unit that owns frames of this one is held, or has a pending opening: two pending openings must not
    /// take each other's frames for ever.
    fn taken(&self, unit: UnitId) -> bool {
        self.chunk_indices(unit).filter_map(|c| self.owners[c]).any(|v| {
            let s = &self.units[v.index()];
            v != unit && (s.held || (s.wanted && matches!(s.frame, Frame::Full | Frame::Claimed)))
        })
    }

    pub(super) fn pump(&mut self, out: &mut Vec<Command>) {
        self.pump_updates(out);
        for i in 0..self.units.len() {
            if self.units[i].wanted {
                #[expect(clippy::cast_possible_truncation, reason = "units are numbered by u32")]
                self.fill(UnitId(i as u32), out);
            }
        }
        self.pump_prefetch(out);
    }

    pub(super) fn pump_updates(&mut self, out: &mut Vec<Command>) {
        self.pump_queue(out);
        self.pump_trail(out);
        self.pump_ahead(out);
        while self.homing.is_none()
            && let Some(unit) = self.homeward.pop_front()
        {
            // Else an update has brought the parameters home, or will.
            if self.in_spare(unit) && !self.update_unmade(unit) {
                if self.is_ahead(unit) || self.is_dropping(unit) {
                    // It writes to the home that is wanted.
                    self.homeward.push_front(unit);
                    if self.is_dropping(unit) {
                        return;
                    }
                    self.drop_ahead(unit, out);
                    continue;
                }
                self.homing = Some(unit);
                out.push(Command::CopyHome(unit));
            }
        }
    }

    fn pump_queue(&mut self, out: &mut Vec<Command>) {
        while let Some(&unit) = self.queue.front() {
            if !self.grads_settled(unit) {
                // G2: it goes on when they are written.
                self.flush_grads(unit, out);
                return;
            }
            if self.is_dropping(unit) {
                // H2: it goes on when what was begun ahead has ended.
                return;
            }
            let s = &mut self.units[unit.index()];
            let Update::Queued { next, ran } = s.update else {
                unreachable!("a queued unit has an update");
            };
            if s.streamed {
                // The writes of the unit's previous update must end before its chunks are read again.
                if self.update_free == 0 || (next == 0 && s.writing > 0) {
                    return;
                }
                self.update_free -= 1;
                out.push(Command::ReadChunk(unit, next));
            } else {
                if self.running >= RUN_AHEAD {
                    return;
                }
                self.running += 1;
                out.push(Command::RunChunk(unit, next));
            }
            s.update = Update::Queued { next: next + 1, ran };
            if next + 1 == s.chunks {
                self.queue.pop_front();
            }
        }
    }

    /// States that trail follow while no weights can be made, one unit at a time; those that a caller waits for at once.
    fn pump_trail(&mut self, out: &mut Vec<Command>) {
        self.follow(self.running == 0, out);
    }

    /// Has the next states made, if there are any that a caller waits for, or if the runner is `idle`.
    pub(super) fn follow(&mut self, idle: bool, out: &mut Vec<Command>) {
        if self.following.is_some() {
            return;
        }
        let wanted = self.trail.iter().position(|u| self.units[u.index()].states_wanted);
        let idle = idle.then_some(0);
        if let Some(unit) = wanted.or(idle).and_then(|at| self.trail.remove(at)) {
            self.following = Some(unit);
            out.push(Command::RunStates(unit));
        }
    }

    fn pump_prefetch(&mut self, out: &mut Vec<Command>) {
        for i in 0..self.upcoming.len() {
            let unit = self.upcoming[i];
            let s = &self.units[unit.index()];
            // A held unit with stale frames is filled when its caller opens it again: kernels may be reading the older
            // bytes.
            if s.held || matches!(s.frame, Frame::Full | Frame::Claimed) {
                continue;
            }
            let sooner = &self.upcoming[..i];
            let blocked =
                self.chunk_indices(unit).filter_map(|c| self.owners[c]).any(|v| v != unit && self.keeps(v, sooner));
            if blocked || !self.fill(unit, out) {
                return;
            }
            self.units[unit.index()].prefetched = true;
        }
    }

    /// True if a prefetch must not take this unit's frames.
    fn keeps(&self, unit: UnitId, sooner: &[UnitId]) -> bool {
        let s = &self.units[unit.index()];
        s.held || s.wanted || (matches!(s.frame, Frame::Full | Frame::Claimed) && sooner.contains(&unit))
    }

    /// Starts paging a unit in, evicting the units that own its chunks; false if that must wait.
    pub(super) fn fill(&mut self, unit: UnitId, out: &mut Vec<Command>) -> bool {
        let s = &self.units[unit.index()];
        if matches!(s.frame, Frame::Full | Frame::Claimed) {
            return true;
        }
        if self.update_queued(unit) || (s.on_nvme && (s.writing > 0 || s.discard)) || self.taken(unit) {
            return false;
        }
        if s.on_nvme && !s.reading {
            if self.page_free == 0 {
                return false;
            }
            self.page_free -= 1;
            self.units[unit.index()].reading = true;
            out.push(Command::ReadParams(unit));
        }
        self.claim(unit);
        if !self.units[unit.index()].on_nvme {
            self.copy_up(unit, out);
        }
        true
    }

    /// Makes the unit the owner of its chunks.
    fn claim(&mut self, unit: UnitId) {
        for c in self.chunk_indices(unit) {
            if let Some(v) = self.owners[c].replace(unit).filter(|&v| v != unit) {
                let victim = &mut self.units[v.index()];
                self.prefetches.wasted += u64::from(victim.prefetched);
                victim.prefetched = false;
                victim.frame = Frame::Absent;
            }
        }
        self.units[unit.index()].frame = Frame::Claimed;
    }

    /// Commands the copy, after waits for the windows of all units whose bytes it overwrites.
    pub(super) fn copy_up(&mut self, unit: UnitId, out: &mut Vec<Command>) {
        self.units[unit.index()].frame = Frame::Full;
        let first = out.len();
        for c in self.chunk_indices(unit) {
            // Units copied in before `v` need no wait here: the copy of `v` waited for them, on the same stream.
            if let Some(v) = self.copied[c].replace(unit) {
                let wait = Command::WaitReleased(v);
                if !out[first..].contains(&wait) {
                    out.push(wait);
                }
            }
        }
        if self.spans[unit.index()].1 > 0 {
            out.push(Command::CopyUp(unit));
        }
    }
}
