//! The shared state of a runtime, and the one place that turns the machine's commands into device and disk operations.
//!
//! C1: the machine is touched only under the lock. C2: nothing under the lock waits for a device or a disk. C3: a slot's
//! lease is in exactly one place: the pool, a request in flight, `pages`, `chunks`, `ahead`, `grad_slots`, a runner's task or a reaper's.
//!
//! A thread takes locks in this order only; two of one line never together. [`lock_order`] checks it in debug builds.
//!
//! | lock | held | inside it |
//! |---|---|---|
//! | `Session.lock`, in Python | for a window, an access, a step | all below; no wait lets go of it, so nothing below may want it |
//! | the GIL | never during a call of the runtime: `Engine::call` releases it; a look at signals takes it for the handler | none of these |
//! | `off_step_io` | for requests outside of steps, between looks at signals | `inner` |
//! | `inner` | for an event | all below, but `share` |
//! | `jobs` | for a piece of an update | `speculations`, `share` |
//! | `speculations` | for a piece of a speculative update | `share` |
//! | `share` | for a piece of an update | all below |
//! | `Saves::state`, `Saves::running`, `Ends::to`, `Faults::brought`, `Faults::returned`, `paging`, `rhythm`, `StepTimes::state`, `Growing::state`, `Ranks::posted`, `Ranks::made`, `Ranks::text` | for a moment | those of the device, the pools, the trace |
//!
//! A look at signals (`interrupted`) is made with none of the locks of the runtime held: a handler may call the runtime.

pub(super) mod closed;
pub(super) mod lock_order;
pub(super) mod locked;
pub(super) mod settle;
pub(super) mod waits;

use std::sync::{Arc, atomic::AtomicU32};

use crossbeam::channel::Sender;
use parking_lot::Condvar;

use self::{
    lock_order::{Ordered, OrderedGuard},
    locked::{Gathered, Inner},
};
use crate::{
    device::{Device, Frames, Mark, StreamRef},
    error::{Code, Error, Result},
    io::EngineOptions,
    model::Layout,
    optim::Pool,
    quantities::UnitId,
    runtime::{
        disk::files::Disk,
        growth::state::Growing,
        measure::{slow::Slow, stats::Stats, step_time::StepTimes, trace::Trace},
        paging::{
            faults::Faults,
            homes::{Homes, Set},
            landing::Ended,
        },
        ranks::together::Ranks,
        saving::copy_on_update::Saves,
        update::{factors::Factors, job::Job, rhythm::Rhythm, share::Share, speculation::Speculation, task::Task},
    },
    schedule::{Command, Machine, Placement, ranks::posts::State},
};

/// Everything that threads share.
pub(crate) struct Shared {
    pub(crate) layout: Layout,
    pub(crate) placement: Placement,
    pub(crate) homes: Homes,
    /// For the runner. Dropped before the device, whose lanes it has.
    pub(crate) share: Ordered<Share>,
    /// States in free memory of the compute device.
    pub(crate) growing: Growing,
    pub(crate) device: Arc<dyn Device>,
    pub(crate) frames: Arc<dyn Frames>,
    pub(crate) disk: Option<Disk>,
    pub(crate) pool: Pool,
    /// The beginning of the copy up that ends next, while its end is waited for.
    pub(crate) paging: Ordered<Option<Mark>>,
    pub(crate) factors: Factors,
    pub(crate) jobs: Vec<Ordered<Job>>,
    pub(crate) speculations: Vec<Ordered<Option<Speculation>>>,
    pub(crate) rhythm: Ordered<Rhythm>,
    pub(crate) stats: Stats,
    pub(crate) trace: Trace,
    pub(crate) step_times: StepTimes,
    pub(crate) slow: Slow,
    pub(crate) poison: bool,
    pub(crate) sync: bool,
    pub(crate) inner: Ordered<Inner>,
    pub(crate) changed: Condvar,
    /// Held by the thread whose request outside of steps is under way.
    pub(crate) off_step_io: Ordered<()>,
    /// How many reads into each unit's shadow are under way: a signal handler may begin one amid another.
    pub(crate) reads: Vec<AtomicU32>,
    pub(crate) saves: Saves,
    /// Other ranks that train the model, too.
    pub(crate) ranks: Option<Arc<Ranks>>,
    pub(crate) faults: Faults,
    /// How checkpoints are read and written: the engine, and whether past the page cache.
    pub(crate) checkpoint_io: (EngineOptions, bool),
    pub(crate) to_runner: Sender<Task>,
    pub(crate) to_speculate: Sender<UnitId>,
    pub(crate) to_up: Sender<Ended>,
    pub(crate) to_down: Sender<Ended>,
}

impl Shared {
    /// Takes the lock, unless the runtime failed or is closed.
    pub(crate) fn lock(&self) -> Result<OrderedGuard<'_, Inner>> {
        let inner = self.inner.lock();
        inner.usable()?;
        Ok(inner)
    }

    /// Runs one event under the lock and performs what the machine commands.
    pub(crate) fn event<R>(&self, f: impl FnOnce(&mut Machine, &mut Vec<Command>) -> R) -> Result<R> {
        let mut inner = self.lock()?;
        self.apply_event(&mut inner, f)
    }

    /// As [`Shared::step`], for an event: it always wakes the threads that wait, even if the machine commands nothing.
    pub(crate) fn apply_event<R>(
        &self,
        inner: &mut Inner,
        f: impl FnOnce(&mut Machine, &mut Vec<Command>) -> R,
    ) -> Result<R> {
        inner.events += 1;
        self.changed.notify_all();
        self.step(inner, f)
    }

    /// For questions to the machine, with the lock held already: it wakes the threads that wait only if the machine commands something.
    pub(crate) fn step<R>(&self, inner: &mut Inner, f: impl FnOnce(&mut Machine, &mut Vec<Command>) -> R) -> Result<R> {
        let mut commands = std::mem::take(&mut inner.commands);
        let answer = f(&mut inner.machine, &mut commands);
        let result = self.perform(inner, &mut commands);
        let moved = !commands.is_empty();
        commands.clear();
        inner.commands = commands;
        if moved {
            inner.events += 1;
            self.changed.notify_all();
        }
        if let Err(error) = result {
            self.fail_locked(inner, error.clone());
            return Err(error);
        }
        Ok(answer)
    }

    /// Makes every later call fail with this error.
    pub(crate) fn fail(&self, error: Error) {
        self.fail_locked(&mut self.inner.lock(), error);
    }

    fn fail_locked(&self, inner: &mut Inner, error: Error) {
        if inner.failed.is_none()
            && !inner.closing
            && let Some(ranks) = &self.ranks
        {
            ranks.ended(State::Failed, Some(&error.to_string()));
        }
        inner.failed.get_or_insert(error);
        self.changed.notify_all();
    }

    fn perform(&self, inner: &mut Inner, commands: &mut Vec<Command>) -> Result<()> {
        let mut next = 0;
        while next < commands.len() {
            let command = commands[next];
            next += 1;
            match command {
                Command::WaitReleased(unit) => {
                    self.device.wait(StreamRef::Up, inner.gates[unit.index()].release)?;
                }
                Command::CopyUp(unit) => self.copy_up(inner, unit)?,
                Command::DropSlot(unit) => inner.pages[unit.index()] = None,
                Command::ReadParams(unit) => self.read_params(inner, unit)?,
                Command::ReadChunk(unit, chunk) => {
                    if self.read_chunk(inner, unit, chunk)? {
                        inner.machine.chunk_read(unit, chunk, commands);
                    }
                }
                Command::RunChunk(unit, chunk) => {
                    let at = inner.chunks.iter().position(|(u, c, _)| (*u, *c) == (unit, chunk));
                    let lease = at.map(|i| inner.chunks.swap_remove(i).2);
                    self.send(&self.to_runner, Task::Update { unit, chunk, lease })?;
                }
                Command::RunStates(unit) => self.send(&self.to_runner, Task::States(unit))?,
                Command::CopyHome(unit) => self.send(&self.to_runner, Task::Home(unit))?,
                Command::BringOwn(unit) => self.send(&self.to_runner, Task::Own(unit))?,
                Command::WriteChunk(unit, chunk) => {
                    // The runner has ended the piece: it holds no job.
                    let turns = self.ranks.is_some() && self.turns(unit, &self.jobs[unit.index()].lock());
                    let set = if turns { Set::Spare } else { Set::Current };
                    if self.write_chunk(inner, unit, chunk, set)? {
                        inner.machine.chunk_written(unit, chunk, commands);
                    }
                }
                Command::Decide(unit) => self.send(&self.to_runner, Task::Decide(unit))?,
                Command::RunAhead(unit, chunk) => {
                    let lease = Self::unpark_chunk(inner, unit, chunk)?;
                    inner.ahead.push((unit, chunk, lease));
                    self.send(&self.to_speculate, unit)?;
                }
                Command::WriteAhead(unit, chunk) => {
                    if self.write_chunk(inner, unit, chunk, Set::Spare)? {
                        inner.machine.chunk_written(unit, chunk, commands);
                    }
                }
                Command::DropChunk(unit, chunk) => drop(Self::unpark_chunk(inner, unit, chunk)?),
                Command::SwapPlaces(unit) => {
                    self.disk()?.map.swap(unit);
                    self.updated(inner, unit);
                }
                Command::ReadGrads(unit) => {
                    if let Some(lease) = self.read_grads(inner, unit)? {
                        inner.grad_slots[unit.index()] = Some(Gathered { lease, bytes: 0 });
                        inner.machine.grads_read(unit, commands);
                    }
                }
                Command::SealGrads(unit) => {
                    let gate = self.device.record(StreamRef::Down)?;
                    self.send(&self.to_down, Ended::Grads { unit, gate })?;
                }
                Command::WriteGrads(unit) => self.write_grads(inner, unit)?,
            }
        }
        Ok(())
    }

    pub(crate) fn send<T>(&self, to: &Sender<T>, what: T) -> Result<()> {
        to.send(what).map_err(|_| Error::new(Code::Panicked, "a worker thread of the runtime is gone."))
    }
}
