//! The moves: up when the runner has nothing else to do, down when memory is short, torch asks, or a home is written.
#![expect(unsafe_code, reason = "copies between homes and memory of the compute tier")]

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use crate::{
    device::{FrameSpan, Frames, StreamRef},
    error::{Code, Error, Result},
    quantities::UnitId,
    runtime::{
        growth::record::Why,
        paging::homes::{Part, Set},
        shared::{Shared, waits::Interrupted},
        update::share::Share,
    },
    schedule::growth::chunk,
};

/// Bytes of one copy: copies of units on their way up find their turn in between.
const COPY: u64 = 32 << 20;
/// How long a wait for a copy lasts before it is counted, and how many of them there are before it is given up.
const SLICE: Duration = Duration::from_millis(100);
const SLICES: u32 = 1200;

impl Shared {
    /// A step begins: looks at the memory, and names the units that move up when the runner has nothing else to do.
    pub(crate) fn grow(&self, interrupted: Interrupted<'_>) -> Result<()> {
        if !self.growing.on() {
            return Ok(());
        }
        self.give_back_spent();
        self.look(interrupted)?;
        let mut state = self.growing.state.lock();
        state.decide.step();
        while let Some(unit) = state.decide.take() {
            state.rising.push_back(unit);
        }
        Ok(())
    }

    /// Amid a step: gives memory back if too little is free.
    pub(crate) fn watch_memory(&self, interrupted: Interrupted<'_>) -> Result<()> {
        if self.growing.any_up() && self.growing.state.lock().due() { self.look(interrupted) } else { Ok(()) }
    }

    fn look(&self, interrupted: Interrupted<'_>) -> Result<()> {
        let Some(free) = self.free_memory()? else { return Ok(()) };
        if !self.growing.state.lock().decide.look(free) {
            return Ok(());
        }
        self.growing.state.lock().forget_rising();
        self.give_back_spent();
        while let Some(free) = self.free_memory()?
            && let Some(unit) = self.next_down(free)
        {
            self.lower(unit, Why::Short)?;
            if interrupted() {
                return Err(Error::new(Code::Interrupted, "interrupted while states moved down."));
            }
        }
        self.growing.state.lock().decide.was_short();
        Ok(())
    }

    fn next_down(&self, free: u64) -> Option<UnitId> {
        self.growing.state.lock().decide.give(free)
    }

    /// Bytes that are free on the compute device, or that a test says are.
    fn free_memory(&self) -> Result<Option<u64>> {
        let (made_up, taken) = {
            let state = self.growing.state.lock();
            (state.made_up, state.decide.taken())
        };
        match made_up {
            Some(memory) => Ok(Some(memory.capacity.saturating_sub(memory.others + taken))),
            None => Ok(self.device.free_memory()?.map(|free| free.0)),
        }
    }

    /// Moves the next unit up that is to, or finds that it is not to any more; false if there is none. No memory for it is no error.
    pub(crate) fn rise(&self) -> Result<bool> {
        // Before the first move the lock of updates is not taken.
        let Some(next) = self.growing.state.lock().rising.front().copied() else { return Ok(false) };
        // Where states trail, they are made at home first. Only the caller, which runs the updates, can have them trail. Of several ranks all have
        // made theirs, and sets have changed places: parameters are at home beside the current one.
        if self.lock()?.machine.update_unmade(next) {
            return Ok(false);
        }
        let mut updates = self.share.lock();
        if self.growing.stopped.load(Ordering::Relaxed) {
            return Ok(false);
        }
        {
            let mut state = self.growing.state.lock();
            // Another one may be the first since, of which nothing was asked.
            let Some(unit) = state.rising.pop_front_if(|first| *first == next) else { return Ok(true) };
            // Looked at with the lock of updates, with which it is promised.
            if self.ranks.as_ref().is_some_and(|ranks| ranks.posts().promised(unit.index())) {
                state.decide.at_home(unit);
                return Ok(true);
            }
        }
        let unit = next;
        let Some(frames) = self.take_memory(unit) else {
            let mut state = self.growing.state.lock();
            state.record.refused += 1;
            state.decide.at_home(unit);
            state.forget_rising();
            state.decide.was_short();
            return Ok(false);
        };
        let home = self.homes.unit(unit);
        let base = frames.address(0);
        for set in 0..2 {
            if !self.carry(&mut updates, unit, set, base, StreamRef::Up)? {
                self.growing.state.lock().decide.at_home(unit);
                return Ok(false);
            }
            self.growing.current(unit, set);
        }
        let mut state = self.growing.state.lock();
        state.taken[unit.index()] = Some(frames);
        state.decide.rose(unit);
        state.record.note(self.stats.steps(), unit, self.growing.bytes_of(unit), Why::Room);
        home.lift(Some(base));
        self.growing.count(true);
        Ok(true)
    }

    /// Memory of the compute tier for a unit's states; none where the device has none.
    fn take_memory(&self, unit: UnitId) -> Option<Arc<dyn Frames>> {
        let made_up = self.growing.state.lock().made_up;
        let bytes = self.growing.bytes_of(unit);
        if made_up.is_some() && self.free_memory().ok().flatten().is_none_or(|free| free < bytes) {
            return None;
        }
        let chunk = chunk(bytes, self.device.granularity());
        let chunks = u32::try_from(bytes.div_ceil(chunk)).ok()?;
        self.device.create_frames(chunks, chunk, &[FrameSpan { first_chunk: 0, chunks }]).ok()
    }

    /// Copies one set of a unit's states up or down, and waits for it; false if the runtime ends meanwhile. Other copies wait for computations,
    /// and so for other ranks, for which there is no limit: where there are lanes these wait for neither.
    fn carry(&self, updates: &mut Share, unit: UnitId, set: usize, base: u64, stream: StreamRef) -> Result<bool> {
        let home = self.homes.unit(unit);
        let params = if set == home.index(Set::Current) { home.params } else { home.spare_params };
        let held =
            home.held(set).filter(|_| stream == StreamRef::Up).map(|part| Part { home: params + part.home, ..part });
        for part in home.parts(set).iter().copied().chain(held) {
            for at in (0..part.bytes).step_by(COPY as usize) {
                let (here, there, len) =
                    (base + part.offset + at, part.home + part.start + at, COPY.min(part.bytes - at));
                let (dst, src) = if stream == StreamRef::Up { (here, there) } else { (there, here) };
                // SAFETY: both ranges are the unit's own, in a registered region and in memory taken for it; the lock of updates is
                // held, and readers of a home have it made current with that lock first.
                if !unsafe { updates.copy(dst, src, len as usize) }? {
                    // SAFETY: as above.
                    unsafe { self.device.copy(stream, dst, src, len as usize)? };
                    self.await_copy(stream)?;
                }
                if stream == StreamRef::Up && self.growing.stopped.load(Ordering::Relaxed) {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Waits until what was enqueued on a stream is done.
    fn await_copy(&self, stream: StreamRef) -> Result<()> {
        let gate = self.device.record(stream)?;
        for _ in 0..SLICES {
            if self.device.block(gate, SLICE)? {
                return Ok(());
            }
        }
        let message = format!("a copy of optimizer states did not end for {:?}.", SLICE * SLICES);
        Err(Error::new(Code::Stuck, message)
            .action("Check the device with its own tools; start again from the last checkpoint."))
    }

    /// Moves a unit's states down, if they are up, and gives their memory back: without the lock of updates, as the device is waited for then, whose
    /// streams may wait for another rank. Where the home of a set is current nothing is copied.
    fn lower(&self, unit: UnitId, why: Why) -> Result<()> {
        let frames = self.lower_states(&mut self.share.lock(), unit, why)?;
        drop(frames);
        Ok(())
    }

    fn lower_states(&self, updates: &mut Share, unit: UnitId, why: Why) -> Result<Option<Arc<dyn Frames>>> {
        let home = self.homes.unit(unit);
        let Some(base) = home.lifted() else { return Ok(None) };
        for set in 0..2 {
            self.bring_down(updates, unit, set, base)?;
        }
        home.lift(None);
        self.growing.count(false);
        let mut state = self.growing.state.lock();
        state.decide.at_home(unit);
        state.record.note(self.stats.steps(), unit, self.growing.bytes_of(unit), why);
        Ok(state.taken[unit.index()].take())
    }

    fn bring_down(&self, updates: &mut Share, unit: UnitId, set: usize, base: u64) -> Result<()> {
        if self.growing.newer(unit, set) {
            self.carry(updates, unit, set, base, StreamRef::Down)?;
            self.growing.current(unit, set);
        }
        Ok(())
    }

    /// Makes the home of a unit's states current, for a reader; its update is made, and no other one begins meanwhile.
    pub(crate) fn states_current(&self, unit: UnitId, interrupted: Interrupted<'_>) -> Result<()> {
        self.own_states_current(unit)?;
        self.await_states(unit, false, interrupted)
    }

    /// The same, of what this rank owns of them.
    pub(crate) fn own_states_current(&self, unit: UnitId) -> Result<()> {
        let home = self.homes.unit(unit);
        if home.lifted().is_none() {
            return Ok(());
        }
        let mut updates = self.share.lock();
        // They may have moved down while this waited.
        let set = home.index(Set::Current);
        home.lifted().map_or(Ok(()), |base| self.bring_down(&mut updates, unit, set, base))
    }

    /// Has a unit's states at home, for a writer; they stay there until the next step at least, those of other ranks until the unit is updated.
    pub(crate) fn states_home(&self, unit: UnitId, interrupted: Interrupted<'_>) -> Result<()> {
        drop(self.own_states_home(unit)?);
        self.await_states(unit, true, interrupted)
    }

    /// The same, of what this rank owns of them. Returns their memory, if they were up; to give it back is to wait for the device.
    pub(crate) fn own_states_home(&self, unit: UnitId) -> Result<Option<Arc<dyn Frames>>> {
        let to_rise = {
            let mut state = self.growing.state.lock();
            let before = state.rising.len();
            state.rising.retain(|&rising| rising != unit);
            before > state.rising.len()
        };
        if to_rise {
            self.growing.state.lock().decide.at_home(unit);
        }
        if !self.growing.any_up() && !self.growing.on() {
            return Ok(None);
        }
        self.lower_states(&mut self.share.lock(), unit, Why::Written)
    }

    fn give_back_spent(&self) {
        let spent = std::mem::take(&mut self.growing.state.lock().spent);
        drop(spent);
    }

    /// Moves everything down at once.
    pub(crate) fn all_down(&self, why: Why) -> Result<()> {
        self.growing.state.lock().forget_rising();
        if !self.growing.any_up() && !self.growing.on() {
            self.give_back_spent();
            return Ok(());
        }
        // A move up that is under way ends first: until then its unit is not known to be up.
        drop(self.share.lock());
        while let Some(unit) = self.last_up() {
            self.lower(unit, why)?;
        }
        self.give_back_spent();
        self.growing.state.lock().decide.was_short();
        Ok(())
    }

    fn last_up(&self) -> Option<UnitId> {
        self.growing.state.lock().decide.last()
    }

    /// Whether an update of a unit, which writes that set of its states, has to be made by the device alone, since the processor cannot reach
    /// them; with the lock of updates. What it writes in the compute tier is newer than its home from now on.
    pub(crate) fn updates_above(&self, unit: UnitId, writes: Set) -> bool {
        let home = self.homes.unit(unit);
        let up = home.lifted().is_some();
        if up {
            self.growing.updated(unit, home.index(writes));
        }
        up && self.growing.above
    }
}
