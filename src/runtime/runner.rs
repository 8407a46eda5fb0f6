//! The thread that updates: what steps ask for, in the order of the machine; ahead of steps, whenever those have to wait.

use std::{collections::VecDeque, sync::Arc, thread::JoinHandle, time::Duration};

use crossbeam::channel::{Receiver, TryRecvError, select};

use crate::{
    error::{Code, Error, Result},
    memory::SlotLease,
    runtime::{
        core::{Shared, Task},
        saves::group_of,
        stats::Link,
        update::Outcome,
    },
    units::UnitId,
};

/// Between two looks at a gate that has not passed.
const NAP: Duration = Duration::from_micros(100);

/// What the runner has taken and not done.
struct Runner {
    tasks: Receiver<Task>,
    ahead: Receiver<UnitId>,
    /// Of a step's update. The program runs ahead of the device: the step may be submitted long before its inputs are there.
    step: Option<Task>,
    waiting: VecDeque<UnitId>,
}

/// Starts the runner; it ends when the runtime is gone.
pub(crate) fn spawn(shared: &Arc<Shared>, tasks: Receiver<Task>, ahead: Receiver<UnitId>) -> Result<JoinHandle<()>> {
    let shared = Arc::downgrade(shared);
    let mut runner = Runner { tasks, ahead, step: None, waiting: VecDeque::new() };
    std::thread::Builder::new()
        .name("funicular-run".to_owned())
        .spawn(move || {
            while runner.take() {
                let Some(shared) = shared.upgrade() else { return };
                match std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| runner.work(&shared))) {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => shared.fail(error),
                    Err(_) => shared.fail(Error::new(Code::Panicked, "thread 'funicular-run' panicked.")),
                }
            }
        })
        .map_err(|e| Error::new(Code::HostAlloc, format!("thread 'funicular-run' could not be started: {e}.")))
}

impl Runner {
    /// Takes what there is to do, and waits for it where there is nothing; false when the runtime is gone.
    fn take(&mut self) -> bool {
        while let Ok(unit) = self.ahead.try_recv() {
            self.waiting.push_back(unit);
        }
        if self.step.is_none() && !self.waiting.is_empty() {
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
                recv(self.ahead) -> unit => match unit {
                    Ok(unit) => self.waiting.push_back(unit),
                    Err(_) => return false,
                },
            }
        }
        true
    }

    /// Does the step's piece if its inputs are there, else a piece ahead; at the least it naps.
    fn work(&mut self, shared: &Shared) -> Result<()> {
        if let Some(task) = self.step.take() {
            match task {
                Task::Home(unit) => return home(shared, unit),
                Task::Update { unit, chunk, lease } if self.waiting.is_empty() || shared.inputs_there(unit)? => {
                    return run(shared, unit, chunk, lease);
                }
                later @ Task::Update { .. } => self.step = Some(later),
            }
        }
        let Some(&unit) = self.waiting.front() else { return Ok(()) };
        match shared.work_ahead(unit) {
            Ok(Some(true)) => {}
            // Gradients arrive in the order of the line: what comes later has not landed either.
            Ok(Some(false)) => std::thread::sleep(NAP),
            Ok(None) => drop(self.waiting.pop_front()),
            Err(error) => {
                self.waiting.clear();
                return Err(error);
            }
        }
        Ok(())
    }
}

impl Shared {
    /// True if what a unit's update waits for has happened.
    fn inputs_there(&self, unit: UnitId) -> Result<bool> {
        let gates = self.lock()?.gates[unit.index()].update;
        for gate in gates {
            if !self.device.passed(gate)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Runs one piece of an update.
fn run(shared: &Shared, unit: UnitId, chunk: u32, mut lease: Option<SlotLease>) -> Result<()> {
    // Copy on update: a save under way reads the unit first.
    shared.saves.preserve(group_of(unit), &mut || false)?;
    let after = {
        let mut inner = shared.lock()?;
        inner.at_work = Some(unit);
        inner.gates[unit.index()].update
    };
    let outcome = {
        let _at_work = AtWork(shared);
        for gate in after {
            while !shared.device.block(gate, Duration::from_millis(100))? {
                drop(shared.lock()?);
            }
        }
        std::thread::sleep(shared.slow.update);
        shared.stats.moved(Link::Update, 0, shared.slow.update.as_nanos() as u64);
        shared.run_chunk(unit, chunk, lease.as_mut())?
    };
    let mut inner = shared.lock()?;
    if let Some(lease) = lease {
        Shared::park_chunk(&mut inner, unit, chunk, lease);
    }
    shared.happened(&mut inner, |m, out| match outcome {
        Outcome::Ran => m.chunk_ran(unit, chunk, out),
        Outcome::TakenOver => m.taken_over(unit, out),
    })?;
    if !inner.machine.update_pending(unit) {
        shared.saves.updated(unit);
    }
    Ok(())
}

/// Copies parameters home that frames could be filled with already.
fn home(shared: &Shared, unit: UnitId) -> Result<()> {
    shared.lock()?.at_work = Some(unit);
    {
        let _at_work = AtWork(shared);
        std::thread::sleep(shared.slow.home);
        shared.copy_home(unit, &shared.jobs[unit.index()].lock().spans)?;
    }
    let mut inner = shared.lock()?;
    shared.happened(&mut inner, |m, out| m.homed(unit, out))?;
    shared.saves.updated(unit);
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
