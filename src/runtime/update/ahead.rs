//! Updates ahead of the step: during backward, into spare frames, so that a step whose inputs turn out to be the same finds them done.
//!
//! A1: nothing that anybody can see changes before the step: a unit with spare frames has two places for its parameters and two
//! sets of states; an update ahead reads the current ones and writes the others, those of the parameters only once no copy up reads
//! them. Who needs the home of parameters that are in their spare place has them copied there first, which undoes what was begun into
//! it. A2: it is used only if the step asks for the same thing with the same inputs; every write to an input drops it. A3: it covers
//! all that is trained of a unit, so that after the turn no element is older in the new places than in the old ones. A4: only the
//! runner works on it, piece by piece, and goes to whatever a step needs first.
#![expect(unsafe_code, reason = "hands raw spans of homes and spare frames to the kernel")]

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use parking_lot::Mutex;

use crate::{
    device::{Gate, StreamRef},
    dtype::StateKind,
    error::Result,
    memory::copy_past_caches,
    optim::Target,
    runtime::{
        JobSpan, StepHyper, UnitUpdate,
        measure::stats::Link,
        paging::homes::Set,
        shared::Shared,
        update::run::{Job, Outcome, Source},
    },
    units::UnitId,
};

/// Elements of one piece: a few milliseconds, for which a step may have to wait. Lanes idle while a piece ends, so it is longer
/// with them.
const PIECE: [u64; 2] = [16 << 20, 64 << 20];
/// Bytes of one piece of a copy home.
const COPY: usize = 1 << 20;

/// So many steps in a row whose gradients were clipped, and the next one will be too, as a rule. Work in vain costs little, for the
/// processor has nothing else to do meanwhile; work left undone costs the step.
const PATIENCE: u32 = 3;

/// In how many steps up to now the gradients were clipped, without one between in which they were not.
#[derive(Debug, Default)]
pub(crate) struct Clipped {
    /// Up to the step before the last.
    row: AtomicU32,
    last: AtomicBool,
}

impl Clipped {
    /// A step is submitted: what it is told of from now on is its own.
    pub(crate) fn next_step(&self) {
        let row = if self.last.swap(false, Ordering::Relaxed) {
            self.row.load(Ordering::Relaxed).saturating_add(1)
        } else {
            0
        };
        self.row.store(row, Ordering::Relaxed);
    }

    /// The gradients of the last step were clipped.
    fn note(&self) {
        self.last.store(true, Ordering::Relaxed);
    }

    /// Whether the next step's are expected to be.
    fn expected(&self) -> bool {
        self.last.load(Ordering::Relaxed) && self.row.load(Ordering::Relaxed) + 1 >= PATIENCE
    }
}

/// An update that was begun before its step.
#[derive(Debug)]
pub(crate) struct Guess {
    spans: Vec<JobSpan>,
    hypers: Vec<StepHyper>,
    /// What must have passed first: the user's stream and gradients down.
    after: [Gate; 2],
    /// The span at work, and how many of its elements are done.
    at: (usize, u64),
}

/// One unit's guess.
pub(crate) type Place = Mutex<Option<Guess>>;

impl Guess {
    fn begun(&self) -> bool {
        self.at != (0, 0)
    }

    fn done(&self) -> bool {
        self.at.0 == self.spans.len()
    }

    fn same_as(&self, job: &Job) -> bool {
        let place = |s: &JobSpan| (s.section, s.start, s.len, s.reset_master);
        let same = |(a, b): (&JobSpan, &JobSpan)| {
            place(a) == place(b) && self.hypers[a.hyper].hyper == job.hypers[b.hyper].hyper
        };
        self.spans.len() == job.spans.len() && self.spans.iter().zip(&job.spans).all(same)
    }
}

impl Shared {
    /// Begins a unit's update; false where it has no spare frames, or is being updated.
    pub(crate) fn begin_ahead(&self, update: &UnitUpdate, hypers: &[StepHyper], stream: u64) -> Result<bool> {
        let unit = update.unit;
        if !self.placement.spare[unit.index()] || self.clipped.expected() {
            return Ok(false);
        }
        let after = {
            let inner = self.lock()?;
            if inner.machine.update_queued(unit) {
                return Ok(false);
            }
            [self.device.record(StreamRef::Compute(stream))?, self.device.record(StreamRef::Down)?]
        };
        let guess = Guess { spans: update.spans.clone(), hypers: hypers.to_vec(), after, at: (0, 0) };
        *self.guesses[unit.index()].lock() = Some(guess);
        self.send(&self.to_ahead, unit)?;
        Ok(true)
    }

    /// An input of the unit's update is about to change: what was begun is worth nothing.
    pub(crate) fn drop_ahead(&self, unit: UnitId) {
        if self.guesses[unit.index()].lock().take().is_some_and(|guess| guess.begun()) {
            self.stats.guessed(false);
        }
    }

    /// Works on a unit's guess for one piece; `None` when nothing is left to do, `Some(false)` if it has to wait.
    pub(crate) fn work_ahead(&self, unit: UnitId) -> Result<Option<bool>> {
        let (fill, spare) = {
            let inner = self.lock()?;
            (inner.gates[unit.index()].fill, inner.machine.in_spare(unit))
        };
        let mut place = self.guesses[unit.index()].lock();
        let Some(guess) = place.as_mut().filter(|guess| !guess.done()) else { return Ok(None) };
        // Frames may have been filled from the place that is written now.
        if !guess.begun() && !self.device.passed(fill)? {
            return Ok(Some(false));
        }
        for gate in guess.after {
            if !self.device.passed(gate)? {
                return Ok(Some(false));
            }
        }
        self.piece_ahead(unit, guess, spare)?;
        Ok(if guess.done() { None } else { Some(true) })
    }

    /// Undoes what was begun into a home that somebody needs now; it may be begun again.
    pub(crate) fn restart_ahead(&self, unit: UnitId) {
        let mut place = self.guesses[unit.index()].lock();
        if let Some(guess) = place.as_mut().filter(|guess| guess.begun()) {
            guess.at = (0, 0);
            self.stats.guessed(false);
            // The runner itself is the one that takes this: with no room it is not begun again.
            let _ = self.to_ahead.try_send(unit);
        }
    }

    /// Updates the next piece into the other place.
    fn piece_ahead(&self, unit: UnitId, guess: &mut Guess, spare: bool) -> Result<()> {
        let mut share = self.share.lock();
        share.clear();
        let mut room = PIECE[usize::from(share.shares())];
        let (mut index, mut done) = guess.at;
        while room > 0 && index < guess.spans.len() {
            let span = guess.spans[index];
            let (start, len) = (span.start + done, room.min(span.len - done));
            let from = self.span_of(unit, &span, start, len, &Source::Places { set: Set::Current, spare });
            let to = self.span_of(unit, &span, start, len, &Source::Places { set: Set::Spare, spare });
            share.add(from, guess.hypers[span.hyper].hyper, Some(Target::in_place(&to)))?;
            room -= len;
            (index, done) = if done + len == span.len { (index + 1, 0) } else { (index, done + len) };
        }
        // SAFETY: the current places are only read, and their writers drop the guess first, under the lock that is held; the gradients
        // have landed; the other places are the runner's alone, for `work_ahead` began only once no copy up read them, and who needs
        // the home as it was has it copied there by the runner; all lie in registered regions.
        unsafe { self.run_share(&mut share, unit, "adamw ahead") }?;
        guess.at = (index, done);
        Ok(())
    }

    /// At the step: completes and takes over what was begun, if it is what the step asks for. Else, where the parameters are in their
    /// spare place, updates into the other places, so that they are at home again; `None` if the update is to be made in place. The
    /// gates of the job have passed. Where some of the unit is not trained, and so not in the spare place, parameters go home at once.
    pub(crate) fn change_places(&self, unit: UnitId, job: &Job, spare: bool) -> Result<Option<Outcome>> {
        // Multiplying by 1 changes nothing; anything else is not foreseen.
        let clip = |h: &StepHyper| self.hyper_of(*h).clip.to_bits() != 1.0_f32.to_bits();
        let clipped = job.hypers.iter().any(clip);
        if clipped {
            self.clipped.note();
        }
        let guess = self.guesses[unit.index()].lock().take().filter(Guess::begun);
        let good = |guess: &Guess| job.guessed && !clipped && guess.same_as(job);
        if let Some(guess) = &guess {
            self.stats.guessed(good(guess));
        }
        let packed = self.layout.unit(unit);
        if let Some(mut guess) = guess.filter(good) {
            while !guess.done() {
                self.piece_ahead(unit, &mut guess, spare)?;
            }
        } else if !spare {
            return Ok(None);
        } else if covers(packed, &job.spans) {
            let hypers = job.hypers.iter().map(|h| StepHyper { hyper: self.hyper_of(*h), clip: None }).collect();
            let after = [Gate::OPEN; 2];
            let mut whole = Guess { spans: job.spans.clone(), hypers, after, at: (0, 0) };
            while !whole.done() {
                self.piece_ahead(unit, &mut whole, spare)?;
            }
        } else {
            self.copy_home(unit)?;
            return Ok(None);
        }
        self.homes.unit(unit).turn();
        if packed.sections.iter().all(|s| s.trainable || s.elems == 0) {
            return Ok(Some(Outcome::Turned));
        }
        self.copy_home(unit)?;
        Ok(Some(Outcome::Ran))
    }

    /// Copies the parameters, all that is trained of them, from the spare place to their home, which never moves.
    pub(crate) fn copy_home(&self, unit: UnitId) -> Result<()> {
        let start = self.trace.now();
        let packed = self.layout.unit(unit);
        let home = self.homes.unit(unit);
        for section in packed.sections.iter().filter(|s| s.trainable) {
            let (from, to) = (home.spare_params + section.offset, home.params + section.offset);
            let len = section.bytes(StateKind::Param) as usize;
            self.pool.run(len.div_ceil(COPY), &|piece| {
                let at = piece * COPY;
                let bytes = COPY.min(len - at);
                // SAFETY: both ranges are the unit's own; the runner, who alone writes them, is the caller, or has come to its end.
                unsafe {
                    copy_past_caches((to as usize + at) as *mut u8, (from as usize + at) as *const u8, bytes);
                }
            })?;
        }
        let bytes = 2 * packed.param_bytes();
        self.stats.moved(Link::Update, bytes, self.trace.now().saturating_sub(start));
        self.trace.span("cpu update", "copy home", u64::from(unit.0), start, bytes);
        Ok(())
    }
}

/// True if the spans are all that is trained of a unit (A3).
pub(crate) fn covers(unit: &crate::model::Unit, spans: &[JobSpan]) -> bool {
    let trained = unit.params.iter().filter(|p| unit.sections[p.section].trainable && p.numel > 0);
    trained.into_iter().all(|p| {
        let inside = |s: &JobSpan| s.section == p.section && s.start <= p.start && p.start + p.numel <= s.start + s.len;
        spans.iter().any(inside)
    }) && unit.sections.iter().any(|s| s.bytes(StateKind::ExpAvg) > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_expected_to_be_clipped_after_three_that_were() {
        let clipped = Clipped::default();
        let mut step = |bites: bool| {
            clipped.next_step();
            // Once for each unit.
            (0..2).filter(|_| bites).for_each(|_| clipped.note());
            clipped.expected()
        };
        assert_eq!([true, true, true, true].map(&mut step), [false, false, true, true]);
        assert_eq!(
            [false, true, true, false, true, true, true].map(&mut step),
            [false, false, false, false, false, false, true]
        );
    }
}
