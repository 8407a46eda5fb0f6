//! The thread that updates: what steps ask for, in the order of the machine; speculative updates while a step has to wait.

use std::{collections::VecDeque, sync::Arc, thread::JoinHandle, time::Duration};

use crossbeam::channel::{Receiver, TryRecvError, select};

use crate::{
    error::{Code, Error, Result},
    memory::SlotLease,
    quantities::UnitId,
    runtime::{
        measure::stats::Link,
        saving::copy_on_update::group_of,
        shared::{Shared, locked::Inner, settle::Until},
        update::{job::Outcome, task::Task},
    },
};

/// How long it rests at most where there is nothing to do.
const REST: Duration = Duration::from_hours(1);
/// Between two looks whether states that are to move up can: other ranks may have to make theirs first.
const RISE: Duration = Duration::from_millis(2);
/// Between two looks at a gate that has not passed.
const NAP: Duration = Duration::from_micros(100);

/// What the runner has taken and not done.
struct Runner {
    tasks: Receiver<Task>,
    speculations: Receiver<UnitId>,
    /// A piece of a step's update. The program is faster than the device: the step may be submitted long before its inputs are there.
    step: Option<Task>,
    /// Tasks that were taken while that piece waited for other ranks.
    later: VecDeque<Task>,
    waiting: Waiting,
}

/// Units with a speculative update to make, in the order in which backward passed them.
#[derive(Debug, Default)]
struct Waiting {
    units: Vec<UnitId>,
    /// The one that was begun.
    begun: Option<UnitId>,
}

impl Waiting {
    /// Makes one piece: of the unit that was begun, else of the one that backward passed last. The next forward needs that one first, and
    /// it is what is left over when the step comes late. `work` says whether a unit has more to do, or has to wait, or is done; false if
    /// all wait.
    fn piece(&mut self, mut work: impl FnMut(UnitId) -> Result<Option<bool>>) -> Result<bool> {
        let begun = self.begun.take().and_then(|unit| self.units.iter().position(|&u| u == unit));
        for at in begun.into_iter().chain((0..self.units.len()).rev()) {
            let unit = self.units[at];
            match work(unit)? {
                Some(true) => self.begun = Some(unit),
                None => drop(self.units.remove(at)),
                Some(false) => continue,
            }
            return Ok(true);
        }
        Ok(false)
    }
}

/// Starts the runner; it ends when the runtime is gone.
pub(crate) fn spawn(
    shared: &Arc<Shared>,
    tasks: Receiver<Task>,
    speculations: Receiver<UnitId>,
) -> Result<JoinHandle<()>> {
    let shared = Arc::downgrade(shared);
    let mut runner = Runner { tasks, speculations, step: None, later: VecDeque::new(), waiting: Waiting::default() };
    let body = move || {
        let mut rises = false;
        while runner.take(rises) {
            let Some(shared) = shared.upgrade() else { return };
            let work = || runner.work(&shared).and_then(|()| runner.at_leisure(&shared));
            match std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)) {
                Ok(Ok(())) => {}
                Ok(Err(error)) => shared.fail(error),
                Err(_) => shared.fail(Error::new(Code::Panicked, "thread 'funicular-run' panicked.")),
            }
            rises = shared.growing.waits_to_rise() && shared.lock().is_ok();
        }
    };
    let started = crate::os_error::start_thread("funicular-run", body);
    started.map_err(|e| crate::os_error::no_thread("funicular-run", &e, ""))
}

impl Runner {
    /// Takes what there is to do, and waits for it if there is nothing, a moment only where states are to move up once that is possible; false
    /// when the runtime is gone.
    fn take(&mut self, rises: bool) -> bool {
        while let Ok(unit) = self.speculations.try_recv() {
            self.waiting.units.push(unit);
        }
        if self.step.is_none() {
            self.step = self.later.pop_front();
        }
        if self.step.is_none() && !self.waiting.units.is_empty() {
            match self.tasks.try_recv() {
                Ok(task) => self.step = Some(task),
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => return false,
            }
        } else if self.step.is_none() {
            select! {
                recv(self.tasks) -> task => match task {
                    Ok(task) => self.step = Some(task),
                    Err(_) => return false,
                },
                recv(self.speculations) -> unit => match unit {
                    Ok(unit) => self.waiting.units.push(unit),
                    Err(_) => return false,
                },
                default(if rises { RISE } else { REST }) => {}
            }
        }
        true
    }

    /// Runs the step's next piece if its inputs have landed, else one speculative piece, else sleeps for [`NAP`].
    fn work(&mut self, shared: &Shared) -> Result<()> {
        if let Some(task) = self.step.take() {
            match task {
                Task::Home(unit) => return home(shared, unit),
                Task::States(unit) => return states(shared, unit),
                Task::Decide(unit) if self.waiting.units.is_empty() || shared.may_begin(unit)? => {
                    return decide(shared, unit);
                }
                Task::Update { unit, chunk, lease }
                    if (self.waiting.units.is_empty() && !shared.trails_among_ranks()?)
                        || shared.may_begin(unit)? =>
                {
                    return run(shared, unit, chunk, lease);
                }
                Task::Own(unit)
                    if (self.waiting.units.is_empty() && !shared.trails_among_ranks()?)
                        || shared.may_begin(unit)? =>
                {
                    return own(shared, unit);
                }
                later @ (Task::Update { .. } | Task::Decide(_) | Task::Own(_)) => self.step = Some(later),
            }
        }
        if shared.trails_among_ranks()? {
            // Another rank may wait for these before it comes to where the update at hand may begin.
            shared.event(|m, out| m.stalled(out))?;
            while let Ok(task) = self.tasks.try_recv() {
                match task {
                    Task::States(unit) => return states(shared, unit),
                    other => self.later.push_back(other),
                }
            }
        }
        match self.waiting.piece(|unit| shared.speculate(unit)) {
            Ok(true) => {}
            Ok(false) => std::thread::sleep(NAP),
            Err(error) => {
                self.waiting = Waiting::default();
                return Err(error);
            }
        }
        Ok(())
    }

    /// Moves states up while there is nothing else to do.
    fn at_leisure(&self, shared: &Shared) -> Result<()> {
        let idle = || {
            self.step.is_none()
                && self.later.is_empty()
                && self.tasks.is_empty()
                && self.waiting.units.is_empty()
                && self.speculations.is_empty()
        };
        while idle() && shared.rise()? {}
        Ok(())
    }
}

impl Shared {
    /// Copy on update: waits until a save under way has read a unit that is about to be updated.
    pub(crate) fn await_save(&self, unit: UnitId) -> Result<()> {
        // The thread that ended the last update tells the save so before it gives this lock up.
        drop(self.lock()?);
        self.saves.preserve(group_of(unit), &mut || false)
    }

    /// True while this rank, which is one of several, has states to make that trail behind their weights.
    fn trails_among_ranks(&self) -> Result<bool> {
        Ok(self.ranks.is_some() && self.lock()?.machine.trails())
    }

    /// True if the gates that a unit's update waits for have passed, and other ranks are where it may begin.
    fn may_begin(&self, unit: UnitId) -> Result<bool> {
        let gates = self.lock()?.gates[unit.index()].update;
        for gate in gates {
            if !self.device.passed(gate)? {
                return Ok(false);
            }
        }
        self.is_quiet(unit)
    }

    /// A save may read a unit whose update is made as a whole and at home. One that was submitted meanwhile belongs to a save that began
    /// after it.
    pub(crate) fn updated(&self, inner: &Inner, unit: UnitId) {
        if !Until::Whole.pending(&inner.machine, unit) {
            self.saves.updated(unit);
        }
    }
}

/// Runs one piece of an update.
fn run(shared: &Shared, unit: UnitId, chunk: u32, mut lease: Option<SlotLease>) -> Result<()> {
    // This rank is quiet while it waits for its save: at its end it makes its parts if no rank is in the way, also not itself.
    shared.is_quiet(unit)?;
    shared.await_save(unit)?;
    shared.lock()?.at_work = Some(unit);
    let (outcome, step) = {
        let _at_work = AtWork(shared);
        await_inputs(shared, unit)?;
        let step = shared.await_quiet(unit)?;
        shared.rhythm.lock().begins(shared.trace.now());
        std::thread::sleep(shared.slow.update);
        shared.stats.moved(Link::Update, 0, shared.slow.update.as_nanos() as u64);
        let outcome = shared.run_chunk(unit, chunk, lease.as_mut())?;
        shared.rhythm.lock().ends(shared.trace.now());
        (outcome, step)
    };
    let mut inner = shared.lock()?;
    if let Some(lease) = lease {
        Shared::park_chunk(&mut inner, unit, chunk, lease);
    }
    shared.apply_event(&mut inner, |m, out| match outcome {
        Outcome::Ran => m.chunk_ran(unit, chunk, out),
        Outcome::Swapped => m.swapped(unit, out),
        Outcome::Weights { turned } => m.weights_ran(unit, turned, out),
    })?;
    shared.updated(&inner, unit);
    shared.publish(&inner, unit, step);
    Ok(())
}

/// Updates the states of a unit whose weights are updated.
fn states(shared: &Shared, unit: UnitId) -> Result<()> {
    shared.lock()?.at_work = Some(unit);
    {
        let _at_work = AtWork(shared);
        std::thread::sleep(shared.slow.states.unwrap_or_default());
        shared.make_states(unit)?;
    }
    let step = shared.jobs[unit.index()].lock().step;
    let mut inner = shared.lock()?;
    shared.apply_event(&mut inner, |m, out| m.states_ran(unit, out))?;
    shared.updated(&inner, unit);
    shared.publish_states(unit, step);
    Ok(())
}

/// Waits for the gates of a unit's update.
fn await_inputs(shared: &Shared, unit: UnitId) -> Result<()> {
    let after = shared.lock()?.gates[unit.index()].update;
    for gate in after {
        while !shared.device.block(gate, Duration::from_millis(100))? {
            drop(shared.lock()?);
        }
    }
    Ok(())
}

/// Finds out whether a step asks for what was begun ahead.
fn decide(shared: &Shared, unit: UnitId) -> Result<()> {
    await_inputs(shared, unit)?;
    let take = shared.take_ahead(unit)?;
    shared.event(|m, out| m.decided(unit, take, out))
}

/// Brings this rank's parameters home that were updated ahead, states on NVMe included.
fn own(shared: &Shared, unit: UnitId) -> Result<()> {
    shared.lock()?.at_work = Some(unit);
    let step = {
        let _at_work = AtWork(shared);
        await_inputs(shared, unit)?;
        let step = shared.await_quiet(unit)?;
        shared.bring_own(unit)?;
        step
    };
    let mut inner = shared.lock()?;
    shared.apply_event(&mut inner, |m, out| m.brought(unit, out))?;
    shared.updated(&inner, unit);
    shared.publish(&inner, unit, step);
    Ok(())
}

/// Copies parameters home from their spare copy: a caller needs them there.
fn home(shared: &Shared, unit: UnitId) -> Result<()> {
    shared.lock()?.at_work = Some(unit);
    {
        let _at_work = AtWork(shared);
        std::thread::sleep(shared.slow.home);
        shared.restart_speculation(unit);
        shared.copy_home(unit)?;
    }
    let mut inner = shared.lock()?;
    shared.apply_event(&mut inner, |m, out| m.homed(unit, out))?;
    shared.updated(&inner, unit);
    Ok(())
}

/// The runner writes a home, until this is dropped: also when the kernel fails or panics.
struct AtWork<'a>(&'a Shared);

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        self.0.inner.lock().at_work = None;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_last_is_next_and_what_was_begun_is_ended() {
        let mut waiting = Waiting::default();
        let mut made = Vec::new();
        // Two pieces each; 4 has not landed.
        let mut left = [2; 5];
        let mut piece = |waiting: &mut Waiting| {
            waiting
                .piece(|unit| {
                    let left = &mut left[unit.index()];
                    if unit == UnitId(4) {
                        return Ok(Some(false));
                    }
                    made.push(unit.0);
                    *left -= 1;
                    Ok(if *left > 0 { Some(true) } else { None })
                })
                .is_ok_and(|moved| moved)
        };
        waiting.units.extend([UnitId(0), UnitId(1)]);
        assert!(piece(&mut waiting));
        waiting.units.extend([UnitId(2), UnitId(3), UnitId(4)]);
        while piece(&mut waiting) {}
        assert_eq!(made, [1, 1, 3, 3, 2, 2, 0, 0]);
        assert_eq!(waiting.units, [UnitId(4)]);
    }
}
