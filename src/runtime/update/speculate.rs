//! Speculative updates: made during backward, before their step, into a spare copy. A step whose inputs turn out to be the same finds its
//! update made.
//!
//! A1: nothing that the program can see changes before the step: a unit with a spare copy has two places for its parameters and two sets of
//! states; a speculative update reads the current ones and writes the others, those of the parameters only once no copy up reads them. A
//! reader of the home of parameters that are in their spare copy first waits for a copy from there; that copy cancels a speculative update
//! that writes to the home. A2: a speculative update is used only if the step asks for the same thing with the same inputs; every write to
//! an input drops it. A3: it covers all that is trained of a unit, so that after the swap no element is older in the new places than in
//! the old ones. A4: only the runner works on it, piece by piece, and does first what a step needs.
#![expect(unsafe_code, reason = "hands raw spans of homes and spare copies to the kernel")]

use std::ops::Range;

use crate::{
    device::{Gate, StreamRef},
    dtype::StateKind,
    error::Result,
    memory::copy_past_caches,
    optim::Portion,
    quantities::UnitId,
    runtime::{
        measure::stats::Link,
        paging::homes::Set,
        shared::Shared,
        update::{
            job::{Arrays, Job, Outcome, StepHyper, UnitUpdate},
            speculation::Speculation,
        },
    },
};

/// Elements of one piece: a few milliseconds, for which a step may have to wait. Lanes idle while a piece ends, so it is longer
/// with them.
const PIECE: [u64; 2] = [16 << 20, 64 << 20];
/// Bytes of one piece of a copy home.
const COPY: usize = 1 << 20;

impl Shared {
    /// Begins a unit's speculative update; false where the unit has no spare copy, or is being updated.
    pub(crate) fn begin_speculation(&self, update: &UnitUpdate, hypers: &[StepHyper], stream: u64) -> Result<bool> {
        let unit = update.unit;
        let wears = self.streams_ahead(unit) && self.rhythm.lock().clipped_in_a_row();
        if !self.placement.spare[unit.index()] || wears || !self.rhythm.lock().speculation_pays() {
            return Ok(false);
        }
        let after = {
            let inner = self.lock()?;
            if inner.machine.update_unmade(unit) {
                return Ok(false);
            }
            [self.device.record(StreamRef::Compute(stream))?, self.device.record(StreamRef::Down)?]
        };
        let spans = match &self.ranks {
            None => update.spans.clone(),
            Some(ranks) => ranks.own(self.layout.unit(unit), self.placement.owned_block(unit), &update.spans).collect(),
        };
        if spans.is_empty() {
            return Ok(false);
        }
        let speculation = Speculation::new(spans, hypers.to_vec(), after);
        *self.speculations[unit.index()].lock() = Some(speculation);
        if self.streams_ahead(unit) {
            return self.foresee_ahead(unit).map(|()| true);
        }
        self.send(&self.to_speculate, unit)?;
        Ok(true)
    }

    /// Drops a unit's speculative update: one of its inputs is about to change.
    pub(crate) fn drop_speculation(&self, unit: UnitId) {
        if self.streams_ahead(unit) {
            let mut inner = self.inner.lock();
            // What a step has taken over is being completed: its inputs stay as they are until that is done.
            if inner.machine.update_queued(unit) || inner.failed.is_some() {
                return;
            }
            inner.foreseen.retain(|&u| u != unit);
            // First, so that no piece of it is used that reads what comes next; this ends with the piece that runs now.
            if self.apply_event(&mut inner, |m, out| m.drop_ahead(unit, out)).unwrap_or(false) {
                self.stats.speculated(false);
            }
            drop(inner);
            self.drop_begun(unit);
        } else {
            self.forget_speculation(unit);
        }
    }

    /// Forgets a unit's speculative update in host memory.
    pub(crate) fn forget_speculation(&self, unit: UnitId) {
        if self.speculations[unit.index()].lock().take().is_some_and(|speculation| speculation.begun()) {
            self.stats.speculated(false);
        }
    }

    /// Makes one piece of a unit's speculative update; `None` when nothing is left to do, `Some(false)` if it has to wait.
    pub(crate) fn speculate(&self, unit: UnitId) -> Result<Option<bool>> {
        if self.streams_ahead(unit) {
            return self.run_ahead(unit);
        }
        let (fill, spare) = {
            let inner = self.lock()?;
            (inner.gates[unit.index()].fill, inner.machine.in_spare(unit))
        };
        let mut speculation = self.speculations[unit.index()].lock();
        let Some(speculation) = speculation.as_mut().filter(|s| !s.done()) else { return Ok(None) };
        // A copy into frames may still read what this writes.
        if !speculation.begun() && !self.device.passed(fill)? {
            return Ok(Some(false));
        }
        for gate in speculation.after {
            if !self.device.passed(gate)? {
                return Ok(Some(false));
            }
        }
        self.speculate_piece(unit, speculation, spare)?;
        Ok(if speculation.done() { None } else { Some(true) })
    }

    /// Cancels a speculative update that writes to a home which a caller needs now; it may be begun again.
    pub(crate) fn restart_speculation(&self, unit: UnitId) {
        let mut speculation = self.speculations[unit.index()].lock();
        if let Some(speculation) = speculation.as_mut().filter(|s| s.begun()) {
            speculation.at = (0, 0);
            self.stats.speculated(false);
            // The runner is the caller and the receiver: if the channel is full, the update is not begun again.
            let _ = self.to_speculate.try_send(unit);
        }
    }

    /// Updates the next piece into the other place.
    pub(crate) fn speculate_piece(&self, unit: UnitId, speculation: &mut Speculation, spare: bool) -> Result<()> {
        let mut share = self.share.lock();
        share.clear();
        let mut room = PIECE[usize::from(share.uses_lanes())];
        let (mut index, mut done) = speculation.at;
        while room > 0 && index < speculation.spans.len() {
            let span = speculation.spans[index];
            let (start, len) = (span.start + done, room.min(span.len - done));
            let from = self.span_of(unit, &span, start, len, &Arrays::Places { set: Set::Current, spare });
            let to = self.span_of(unit, &span, start, len, &Arrays::Places { set: Set::Spare, spare });
            let (from, to) = self.with_held(unit, &span, start, from, Some(to));
            share.add(from, speculation.hypers[span.hyper].hyper, to, Portion::Whole)?;
            room -= len;
            (index, done) = if done + len == span.len { (index + 1, 0) } else { (index, done + len) };
        }
        // States that are up lie in memory taken for them, and move under the lock of updates, which is held; all else in registered regions.
        // SAFETY: the current places are only read, and their writers drop the speculation first, under the lock that is held; the
        // gradients have landed; the other places are the runner's alone, for `speculate` began only once no copy up read them, and a
        // reader that needs the home as it was has it copied there by the runner.
        unsafe { self.run_share(&mut share, unit, "adamw speculative") }?;
        speculation.at = (index, done);
        Ok(())
    }

    /// Whether a step multiplies gradients by anything but 1, which changes nothing; all else is not foreseen, and is taken note of. The gates
    /// of the job have passed.
    pub(crate) fn is_clipped(&self, job: &Job) -> bool {
        let clipped = job.hypers.iter().any(|h| self.hyper_of(*h).clip.to_bits() != 1.0_f32.to_bits());
        if clipped {
            self.rhythm.lock().clipped();
        }
        clipped
    }

    /// Completes the speculative update of a unit, if the step asks for the same; false if there is none, or it does not.
    pub(crate) fn complete_speculation(&self, unit: UnitId, job: &Job, spare: bool) -> Result<bool> {
        let clipped = self.is_clipped(job);
        let begun = self.speculations[unit.index()].lock().take().filter(Speculation::begun);
        let good = |s: &Speculation| job.speculated && job.covers && !clipped && s.same_as(job);
        if let Some(speculation) = &begun {
            self.stats.speculated(good(speculation));
        }
        let Some(mut speculation) = begun.filter(good) else { return Ok(false) };
        while !speculation.done() {
            self.speculate_piece(unit, &mut speculation, spare)?;
        }
        Ok(true)
    }

    /// At the step: completes the speculative update and swaps the places, if it is what the step asks for. Else makes the weights first, if
    /// that is the better way. Else, where the parameters are in their spare copy, updates into the other places, so that they are at home
    /// again; `None` if the update is to be made in place. The gates of the job have passed. Where some of the unit is not trained, and so not in the spare copy, parameters go home at once.
    pub(crate) fn finish_speculation(&self, unit: UnitId, job: &mut Job, spare: bool) -> Result<Option<Outcome>> {
        let packed = self.layout.unit(unit);
        if self.complete_speculation(unit, job, spare)? {
            // Only the places are left to be swapped.
        } else if self.weights_first(unit) {
            return self.make_weights(unit, job, spare).map(Some);
        } else if !spare {
            return Ok(None);
        } else if job.covers {
            let hypers = job.hypers.iter().map(|h| StepHyper { hyper: self.hyper_of(*h), clip: None }).collect();
            let mut whole = Speculation::new(job.spans.clone(), hypers, [Gate::OPEN; 2]);
            while !whole.done() {
                self.speculate_piece(unit, &mut whole, spare)?;
            }
        } else {
            self.copy_home(unit)?;
            return Ok(None);
        }
        self.homes.unit(unit).swap();
        if packed.sections.iter().all(|s| s.trainable || s.elems == 0) {
            return Ok(Some(Outcome::Swapped));
        }
        self.copy_home(unit)?;
        Ok(Some(Outcome::Ran))
    }

    /// Copies the parameters, all that is trained of them, from the spare copy to their home, which never moves.
    pub(crate) fn copy_home(&self, unit: UnitId) -> Result<()> {
        let sections = self.layout.unit(unit).sections.iter().enumerate().filter(|(_, section)| section.trainable);
        self.copy_parts_home(unit, sections.map(|(index, section)| (index, 0..section.elems)))
    }

    /// The same of some elements of sections.
    pub(crate) fn copy_parts_home(&self, unit: UnitId, parts: impl Iterator<Item = (usize, Range<u64>)>) -> Result<()> {
        let start = self.trace.now();
        let (packed, home, mut moved) = (self.layout.unit(unit), self.homes.unit(unit), 0);
        for (index, elems) in parts {
            let section = &packed.sections[index];
            let size = StateKind::Param.element_size(section.dtype) as u64;
            let at = section.offset + elems.start * size;
            let (from, to) = (home.spare_params + at, home.params + at);
            let len = ((elems.end - elems.start) * size) as usize;
            moved += 2 * len as u64;
            self.pool.run(len.div_ceil(COPY), &|piece| {
                let at = piece * COPY;
                let bytes = COPY.min(len - at);
                // SAFETY: both ranges are the unit's own; the runner, which alone writes them, is the caller, or has come to its end.
                unsafe {
                    copy_past_caches((to as usize + at) as *mut u8, (from as usize + at) as *const u8, bytes);
                }
            })?;
        }
        self.stats.moved(Link::Update, moved, self.trace.now().saturating_sub(start));
        self.trace.span("cpu update", "copy home", u64::from(unit.0), start, moved);
        Ok(())
    }
}
