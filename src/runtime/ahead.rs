//! Updates ahead of the step: during backward, into spare frames, so that a step whose inputs turn out to be the same finds them done.
//!
//! A1: nothing that anybody can see changes before the step: an update ahead reads homes and writes spare frames only, and those only
//! once their last contents are home and no copy up reads them. A2: it
//! is used only if the step asks for the same thing with the same inputs; every write to an input drops it. A3: it covers all that
//! is trained of a unit, so that after the turn no element is older in the new set than in the old one. A4: only the runner works
//! on it, piece by piece, and goes to whatever a step needs first.
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
        core::Shared,
        homes::Set,
        stats::Link,
        update::{Job, Outcome, Source},
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
    /// Begins a unit's update; false where it has no spare frames, or is being updated. What is on its way home is begun once it is
    /// there.
    pub(crate) fn begin_ahead(&self, update: &UnitUpdate, hypers: &[StepHyper], stream: u64) -> Result<bool> {
        let unit = update.unit;
        if !self.placement.spare[unit.index()] || self.clipped.expected() {
            return Ok(false);
        }
        let after = {
            let inner = self.lock()?;
            if inner.machine.update_pending(unit) && !inner.machine.in_spare(unit) {
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
        let fill = {
            let inner = self.lock()?;
            if inner.machine.in_spare(unit) {
                return Ok(Some(false));
            }
            inner.gates[unit.index()].fill
        };
        let mut place = self.guesses[unit.index()].lock();
        let Some(guess) = place.as_mut().filter(|guess| !guess.done()) else { return Ok(None) };
        // Frames may have been filled from the spare place.
        if !guess.begun() && !self.device.passed(fill)? {
            return Ok(Some(false));
        }
        for gate in guess.after {
            if !self.device.passed(gate)? {
                return Ok(Some(false));
            }
        }
        self.piece_ahead(unit, guess)?;
        Ok(if guess.done() { None } else { Some(true) })
    }

    /// Updates the next piece into the spare frames.
    fn piece_ahead(&self, unit: UnitId, guess: &mut Guess) -> Result<()> {
        let mut share = self.share.lock();
        share.clear();
        let mut room = PIECE[usize::from(share.shares())];
        let (mut index, mut done) = guess.at;
        while room > 0 && index < guess.spans.len() {
            let span = guess.spans[index];
            let (start, len) = (span.start + done, room.min(span.len - done));
            let from = self.span_of(unit, &span, start, len, &Source::Homes(Set::Current));
            let to = self.span_of(unit, &span, start, len, &Source::Homes(Set::Spare));
            share.add(from, guess.hypers[span.hyper].hyper, Some(Target::in_place(&to)))?;
            room -= len;
            (index, done) = if done + len == span.len { (index + 1, 0) } else { (index, done + len) };
        }
        // SAFETY: the homes are only read, and their writers drop the guess first, under the lock that is held; the gradients have
        // landed; the spare frames are the runner's alone, for `work_ahead` began only once they were home and no copy up read
        // them; all lie in registered regions.
        unsafe { self.run_share(&mut share, unit, "adamw ahead") }?;
        guess.at = (index, done);
        Ok(())
    }

    /// At the step: completes and takes over what was begun, if it is what the step asks for; `None` if the update is yet to be
    /// made. The gates of the job have passed. Frames are filled from the spare place until the parameters are home; where some of
    /// the unit is not trained, and so not there, they go home at once.
    pub(crate) fn commit_ahead(&self, unit: UnitId, job: &Job) -> Result<Option<Outcome>> {
        // Multiplying by 1 changes nothing; anything else is not foreseen.
        let clip = |h: &StepHyper| self.hyper_of(*h).clip.to_bits() != 1.0_f32.to_bits();
        let clipped = job.hypers.iter().any(clip);
        if clipped {
            self.clipped.note();
        }
        let Some(mut guess) = self.guesses[unit.index()].lock().take() else { return Ok(None) };
        let good = job.guessed && guess.begun() && !clipped && guess.same_as(job);
        if guess.begun() {
            self.stats.guessed(good);
        }
        if !good {
            return Ok(None);
        }
        while !guess.done() {
            self.piece_ahead(unit, &mut guess)?;
        }
        self.homes.unit(unit).turn();
        if self.layout.unit(unit).sections.iter().all(|s| s.trainable || s.elems == 0) {
            return Ok(Some(Outcome::TakenOver));
        }
        self.copy_home(unit, &job.spans)?;
        Ok(Some(Outcome::Ran))
    }

    /// Copies the new parameters to their home, which never moves.
    pub(crate) fn copy_home(&self, unit: UnitId, spans: &[JobSpan]) -> Result<()> {
        let start = self.trace.now();
        let packed = self.layout.unit(unit);
        let home = self.homes.unit(unit);
        for span in spans {
            let section = &packed.sections[span.section];
            let size = section.dtype.size() as u64;
            let offset = section.offset + span.start * size;
            let (from, to, len) = (home.spare_params + offset, home.params + offset, (span.len * size) as usize);
            self.pool.run(len.div_ceil(COPY), &|piece| {
                let at = piece * COPY;
                let bytes = COPY.min(len - at);
                // SAFETY: both ranges are the unit's own, and its update is the runner's until the machine hears of its end.
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
