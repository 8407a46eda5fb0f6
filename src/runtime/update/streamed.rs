//! Updates of units whose states, parameters or gradients live on NVMe: piece by piece through slots, at the step, or ahead of it into their
//! second places there.
//!
//! An update ahead keeps to A1-A4 of `speculate`: its pieces read the current places and write the others, under the lock of the speculation that
//! every writer of an input drops first; the step takes it only if it asks for the same with the same inputs.
#![expect(unsafe_code, reason = "hands spans of leased slots and homes to the kernel")]

use crate::{
    error::Result,
    io::Direction,
    memory::SlotLease,
    optim::{Portion, Span},
    quantities::{Tier, UnitId},
    runtime::{
        disk::{files::Disk, map::UpdateChunk},
        paging::homes::Set,
        shared::{Shared, locked::Inner},
        update::{
            job::{Arrays, Job},
            run::intersect,
            speculation::Speculation,
        },
    },
};

/// Bytes that a thread copies at a time.
const COPY: usize = 256 << 10;

impl Shared {
    /// Whether a unit's updates are streamed, and can be made ahead.
    pub(crate) fn streams_ahead(&self, unit: UnitId) -> bool {
        let has = |disk: &Disk| disk.map.chunk_count(unit) > 0;
        self.placement.spare[unit.index()] && self.disk.as_ref().is_some_and(has)
    }

    /// Runs the kernel over one piece of a step's update, whose gates have passed; `spare`: the parameters are in their spare place; `first`: no
    /// piece has run.
    pub(crate) fn run_streamed(
        &self,
        unit: UnitId,
        index: u32,
        lease: &mut SlotLease,
        disk: &Disk,
        (job, spare, first): (&Job, bool, bool),
    ) -> Result<()> {
        self.is_clipped(job);
        if first {
            self.drop_begun(unit);
        }
        // Parameters that are in their spare place go home with the update; with what it leaves as it is, if there is any.
        let turn = spare && job.covers;
        if spare && !turn && first {
            self.copy_home(unit)?;
        }
        let chunk = disk.map.chunk(unit, index);
        let mut share = self.share.lock();
        share.clear();
        for span in &job.spans {
            let Some((start, len)) = intersect(span, chunk) else { continue };
            let at = |spare| self.span_of(unit, span, start, len, &Arrays::Slot(lease, chunk, spare));
            if turn {
                self.turn(&at(true), &at(false))?;
            }
            share.add(at(false), self.hyper_of(job.hypers[span.hyper]), None, Portion::Whole)?;
        }
        // SAFETY: all ranges lie in homes or in the leased slot, registered regions both, are disjoint, and belong to this update
        // until the machine hears of its end: the gates of the job have passed, so no stream touches them.
        unsafe { self.run_share(&mut share, unit, "adamw") }?;
        let set = if self.turns(unit, job) { Set::Spare } else { Set::Current };
        disk.map.check(&disk.store, &self.layout, unit, chunk, (Direction::Write, set, false), lease.bytes())
    }

    /// At the step, whose gates have passed: whether it asks for what the unit's update ahead was begun from. If it does, a save under way has
    /// read the unit.
    pub(crate) fn take_ahead(&self, unit: UnitId) -> Result<bool> {
        let job = self.jobs[unit.index()].lock();
        let clipped = self.is_clipped(&job);
        let good = {
            let mut speculation = self.speculations[unit.index()].lock();
            let good =
                job.speculated && job.covers && !clipped && speculation.as_ref().is_some_and(|s| s.same_as(&job));
            if !good {
                *speculation = None;
            }
            good
        };
        drop(job);
        self.stats.speculated(good);
        if good {
            self.await_save(unit)?;
        }
        Ok(good)
    }

    /// Has a unit's update ahead begun once its gradients are there, or sooner where the disk would rest.
    pub(crate) fn foresee_ahead(&self, unit: UnitId) -> Result<()> {
        let mut inner = self.lock()?;
        inner.foreseen.retain(|&u| u != unit);
        inner.foreseen.push(unit);
        drop(inner);
        self.send(&self.to_speculate, unit)
    }

    /// Begins a unit's update ahead, or runs a piece of it that was read: `None` when that is done, `Some(false)` if it has to wait.
    pub(crate) fn run_ahead(&self, unit: UnitId) -> Result<Option<bool>> {
        let (fill, spare, foreseen, resting) = {
            let inner = self.lock()?;
            let foreseen = inner.foreseen.iter().position(|&u| u == unit);
            (
                inner.gates[unit.index()].fill,
                inner.machine.in_spare(unit),
                foreseen,
                inner.machine.reads_nothing_ahead(),
            )
        };
        // A copy into frames may still read what this writes, and gradients may be on their way.
        let after = self.speculations[unit.index()].lock().as_ref().map(|speculation| speculation.after);
        let mut waits = false;
        if let Some(after) = after {
            for gate in after.into_iter().chain([fill]) {
                waits |= !self.device.passed(gate)?;
            }
        }
        // Gradients come in the order of the list: those of the first are there next.
        let soon = resting && foreseen == Some(0);
        if waits && !soon {
            return Ok(Some(false));
        }
        if foreseen.is_some() {
            self.begin_foreseen(unit)?;
            return Ok(None);
        }
        let piece = |inner: &mut Inner| {
            let at = inner.ahead.iter().position(|(u, ..)| *u == unit)?;
            Some(inner.ahead.swap_remove(at))
        };
        let Some((_, index, mut lease)) = piece(&mut *self.lock()?) else { return Ok(None) };
        let disk = self.disk()?;
        let made = {
            let speculation = self.speculations[unit.index()].lock();
            match speculation.as_ref() {
                Some(speculation) => self.ahead_piece(unit, index, &mut lease, speculation, spare).map(|()| true)?,
                None => false,
            }
        };
        if made {
            let chunk = disk.map.chunk(unit, index);
            let written = (Direction::Write, Set::Spare, false);
            disk.map.check(&disk.store, &self.layout, unit, chunk, written, lease.bytes())?;
        }
        let mut inner = self.lock()?;
        Self::park_chunk(&mut inner, unit, index, lease);
        self.apply_event(&mut inner, |m, out| m.ran_ahead(unit, index, made, out))?;
        Ok(None)
    }

    /// Begins what was foreseen, unless a step or a change of an input was faster.
    fn begin_foreseen(&self, unit: UnitId) -> Result<()> {
        let mut inner = self.lock()?;
        let before = inner.foreseen.len();
        inner.foreseen.retain(|&u| u != unit);
        if inner.foreseen.len() < before && !self.apply_event(&mut inner, |m, out| m.begin_ahead(unit, out))? {
            drop(inner);
            self.drop_begun(unit);
        }
        Ok(())
    }

    fn ahead_piece(
        &self,
        unit: UnitId,
        index: u32,
        lease: &mut SlotLease,
        speculation: &Speculation,
        spare: bool,
    ) -> Result<()> {
        let chunk: UpdateChunk = self.disk()?.map.chunk(unit, index);
        let turns = self.placement.homes[unit.index()].params == Tier::Host;
        let mut share = self.share.lock();
        share.clear();
        for span in &speculation.spans {
            let Some((start, len)) = intersect(span, chunk) else { continue };
            let at = |spare| self.span_of(unit, span, start, len, &Arrays::Slot(lease, chunk, spare));
            if turns {
                self.turn(&at(spare), &at(!spare))?;
            }
            share.add(at(turns && !spare), speculation.hypers[span.hyper].hyper, None, Portion::Whole)?;
        }
        // SAFETY: the slot is leased; parameters at home are only read in their current place, and their writers drop the speculation first, under
        // the lock that is held; the gradients have landed; the other place of the parameters is the runner's alone, because no copy up
        // reads it any more and a reader that needs the home as it was has this update dropped first; all lie in registered regions.
        unsafe { self.run_share(&mut share, unit, "adamw ahead") }
    }

    /// Copies parameters from one place in host memory to the other, where they are updated.
    fn turn(&self, from: &Span, to: &Span) -> Result<()> {
        let bytes = from.len * from.dtype.size();
        let (from, to) = (from.param as usize, to.param as usize);
        self.pool.run(bytes.div_ceil(COPY), &|piece| {
            let at = piece * COPY;
            // SAFETY: both places are the unit's, of equal length; the one is only read, the other is the runner's, which is the caller.
            unsafe {
                std::ptr::copy_nonoverlapping((from + at) as *const u8, (to + at) as *mut u8, COPY.min(bytes - at));
            }
        })
    }

    /// Forgets what was begun of a unit ahead; the machine knows, or drops it by itself.
    pub(crate) fn drop_begun(&self, unit: UnitId) {
        *self.speculations[unit.index()].lock() = None;
    }
}
