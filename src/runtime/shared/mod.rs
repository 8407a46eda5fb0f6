//! The shared state of a runtime, and the one place that turns the machine's commands into device and disk operations.
//!
//! C1: the machine is touched only under the lock. C2: nothing under the lock waits for a device or a disk. C3: a slot's
//! lease is in exactly one place: the pool, a request in flight, `pages`, `chunks`, a runner's task or a reaper's.
//!
//! A thread takes locks in this order only; two of one line never together:
//!
//! | lock | held | inside it |
//! |---|---|---|
//! | `Session.lock`, in Python | for a window, an access, a step | all below; it is let go of in no wait, so nothing below may want it |
//! | the GIL | never amid a call of the runtime: `Engine::call` releases it, a look at signals takes it for the handler | none of these |
//! | `service` | for requests outside of steps, between looks at signals | `inner` |
//! | `inner` | for an event | all below, but `share` |
//! | `jobs` | for a piece of an update | `guesses`, `share` |
//! | `guesses` | for a piece of an update ahead | `share` |
//! | `share` | for a piece of an update | all below |
//! | `Saves::state`, `Saves::running`, `Ends::to`, `paging`, `Split::state` | for a moment | those of the device, the pools, the trace |
//!
//! A look at signals (`interrupted`) is made with none of the locks of the runtime held: a handler may call the runtime.
#![expect(unsafe_code, reason = "enqueues copies between raw addresses that it owns")]

pub(super) mod end;
pub(super) mod locked;
pub(super) mod settle;

use std::{
    sync::{Arc, atomic::AtomicU32},
    time::Duration,
};

use crossbeam::channel::Sender;
use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::{
    device::{Device, DeviceKind, Frames, Gate, Mark, StreamRef},
    error::{Code, Error, Result},
    io::{Direction, EngineOptions, IoPart, IoRequest},
    memory::{SlotLease, SlotPool},
    model::Layout,
    optim::Pool,
    runtime::{
        closed,
        disk::{map::Map, threads::Ended, ticket::Ticket},
        measure::{
            slow::Slow,
            stats::{Cause, Stats},
            step_time::Split,
            trace::Trace,
        },
        paging::{faults::Faults, homes::Homes},
        saving::copy_on_update::Saves,
        shared::locked::Inner,
        update::{ahead, factors::Factors, run::Job, share::Share},
    },
    schedule::{Command, Machine, Opening, Phase, Placement, machine::Wait},
    store::Store,
    units::{Tier, UnitId},
};

/// A thread that waits looks this often whether it was interrupted.
pub(crate) const SLICE: Duration = Duration::from_millis(50);
/// Without any event for this long a wait gives up.
const STUCK_AFTER_SLICES: u32 = if cfg!(test) { 20 } else { 120 * 20 };

/// What the machine asks of the runner.
#[derive(Debug)]
pub(crate) enum Task {
    /// A piece of an update.
    Update { unit: UnitId, chunk: u32, lease: Option<SlotLease> },
    /// To copy parameters from the spare place to their home.
    Home(UnitId),
}

/// A copy whose end somebody wants to know.
#[derive(Debug)]
pub(crate) struct Landing {
    pub(crate) gate: Gate,
    pub(crate) unit: UnitId,
    pub(crate) lease: Option<SlotLease>,
    /// Before and after it, on its stream.
    pub(crate) marks: (Mark, Mark),
    pub(crate) bytes: u64,
}

/// The disk side of a runtime.
pub(crate) struct Disk {
    pub(crate) store: Store,
    pub(crate) map: Map,
    pub(crate) page_pool: Option<SlotPool>,
    pub(crate) update_pool: SlotPool,
}

/// Everything that threads share.
pub(crate) struct Shared {
    pub(crate) layout: Layout,
    pub(crate) placement: Placement,
    pub(crate) homes: Homes,
    /// Of the runner; before the device, whose lanes it has.
    pub(crate) share: Mutex<Share>,
    pub(crate) device: Arc<dyn Device>,
    pub(crate) frames: Arc<dyn Frames>,
    pub(crate) disk: Option<Disk>,
    pub(crate) pool: Pool,
    /// The beginning of the copy up that ends next, while its end is waited for.
    pub(crate) paging: Mutex<Option<Mark>>,
    pub(crate) factors: Factors,
    pub(crate) jobs: Vec<Mutex<Job>>,
    pub(crate) guesses: Vec<ahead::Place>,
    pub(crate) clipped: ahead::Clipped,
    pub(crate) stats: Stats,
    pub(crate) trace: Trace,
    pub(crate) split: Split,
    pub(crate) slow: Slow,
    pub(crate) poison: bool,
    pub(crate) sync: bool,
    pub(crate) inner: Mutex<Inner>,
    pub(crate) changed: Condvar,
    pub(crate) service: Mutex<()>,
    /// How many reads into each unit's shadow are under way: a signal handler may begin one amid another.
    pub(crate) reads: Vec<AtomicU32>,
    pub(crate) saves: Saves,
    pub(crate) faults: Faults,
    /// How checkpoints are read and written: the engine, and whether past the page cache.
    pub(crate) checkpoint_io: (EngineOptions, bool),
    pub(crate) to_runner: Sender<Task>,
    pub(crate) to_ahead: Sender<UnitId>,
    pub(crate) to_up: Sender<Ended>,
    pub(crate) to_down: Sender<Ended>,
}

impl Shared {
    /// Takes the lock, unless the runtime failed or is closed.
    pub(crate) fn lock(&self) -> Result<MutexGuard<'_, Inner>> {
        let inner = self.inner.lock();
        inner.usable()?;
        Ok(inner)
    }

    /// Runs one event under the lock and performs what the machine commands.
    pub(crate) fn event<R>(&self, f: impl FnOnce(&mut Machine, &mut Vec<Command>) -> R) -> Result<R> {
        let mut inner = self.lock()?;
        self.happened(&mut inner, f)
    }

    /// As [`Shared::step`], for something that has happened: whoever waits looks again, whatever it commands.
    pub(crate) fn happened<R>(
        &self,
        inner: &mut Inner,
        f: impl FnOnce(&mut Machine, &mut Vec<Command>) -> R,
    ) -> Result<R> {
        inner.events += 1;
        self.changed.notify_all();
        self.step(inner, f)
    }

    /// As [`Shared::event`], with the lock held already. Asking the machine is no event: it may command nothing.
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
        inner.failed.get_or_insert(error);
        self.changed.notify_all();
    }

    /// Waits for a change of state until `ready` gives a value; `interrupted` is asked about twenty times a second.
    pub(crate) fn wait<T>(
        &self,
        mut inner: MutexGuard<'_, Inner>,
        what: &dyn Fn() -> String,
        interrupted: &mut dyn FnMut() -> bool,
        mut ready: impl FnMut(&mut Inner) -> Result<Option<T>>,
    ) -> Result<T> {
        let (mut seen, mut quiet) = (inner.events, 0);
        loop {
            if let Some(value) = ready(&mut inner)? {
                return Ok(value);
            }
            inner.usable()?;
            let timed_out = self.changed.wait_for(&mut inner, SLICE).timed_out();
            if timed_out {
                quiet = if inner.events == seen { quiet + 1 } else { 0 };
                seen = inner.events;
                if MutexGuard::unlocked(&mut inner, &mut *interrupted) {
                    return Err(Error::new(Code::Interrupted, format!("interrupted while waiting for {}.", what())));
                }
                if quiet >= STUCK_AFTER_SLICES {
                    return Err(Error::new(
                        Code::Stuck,
                        format!(
                            "nothing moved for {:?} while waiting for {}: {}.",
                            SLICE * STUCK_AFTER_SLICES,
                            what(),
                            inner.machine.describe()
                        ),
                    )
                    .action("The kernel log may show a failing drive; start again from the last checkpoint."));
                }
            }
        }
    }

    /// Makes the user's stream wait for a gate; on the host the caller itself waits.
    pub(crate) fn wait_gate(
        &self,
        stream: u64,
        gate: Gate,
        cause: Cause,
        interrupted: &mut dyn FnMut() -> bool,
    ) -> Result<()> {
        if self.device.kind() == DeviceKind::Host {
            return self.block_gate(Some(stream), gate, cause, interrupted);
        }
        if self.device.passed(gate)? { Ok(()) } else { self.wait_in_order(stream, gate, cause) }
    }

    /// Blocks the caller until the work enqueued on a stream of the user is done: the processor is about to touch what it touches.
    pub(crate) fn block_stream(&self, stream: u64, interrupted: &mut dyn FnMut() -> bool) -> Result<()> {
        let gate = self.device.record(StreamRef::Compute(stream))?;
        self.block_gate(Some(stream), gate, Cause::Copy, interrupted)
    }

    /// Blocks the caller until a gate has passed.
    pub(crate) fn block_gate(
        &self,
        stream: Option<u64>,
        gate: Gate,
        cause: Cause,
        interrupted: &mut dyn FnMut() -> bool,
    ) -> Result<()> {
        if self.device.passed(gate)? {
            return Ok(());
        }
        let _pause = self.pause(stream, cause);
        let mut slices = 0;
        while !self.device.block(gate, SLICE)? {
            if self.inner.lock().closing {
                return Err(closed());
            }
            if interrupted() {
                return Err(Error::new(Code::Interrupted, format!("interrupted while waiting for {}.", cause.name())));
            }
            slices += 1;
            if slices >= STUCK_AFTER_SLICES {
                let after = SLICE * STUCK_AFTER_SLICES;
                return Err(Error::new(Code::Stuck, format!("a copy did not end for {after:?} ({}).", cause.name()))
                    .action("Check the device with its own tools; start again from the last checkpoint."));
            }
        }
        Ok(())
    }

    /// Opens a unit's window: true if its frames may be used on `stream`, false if the home must be used instead. Without a phase it
    /// fills the frames anew, which is no use of the unit in the order that the machine learns.
    pub(crate) fn open(
        &self,
        unit: UnitId,
        phase: Option<Phase>,
        stream: u64,
        interrupted: &mut dyn FnMut() -> bool,
    ) -> Result<bool> {
        if let Some(phase) = phase {
            self.entered(unit, phase, stream);
        }
        let (first, phase) = (phase.is_some(), phase.unwrap_or(Phase::Eval));
        let mut inner = self.lock()?;
        if inner.machine.held(unit) {
            // Views of it are alive: kernels enqueued since its last release may still read what a refill overwrites.
            inner.gates[unit.index()].release = self.device.record(StreamRef::Compute(stream))?;
        }
        let mut answer = self.step(&mut inner, |m, out| m.open(unit, phase, first, out))?;
        if let Opening::Pending(why) = answer {
            let mut pause = self.pause(Some(stream), cause_of(why));
            let name = || format!("'{}' ({why:?})", self.layout.unit(unit).name);
            let waited = self.wait(inner, &name, interrupted, |inner| {
                let again = self.step(inner, |m, out| m.open(unit, phase, false, out))?;
                if let Opening::Pending(why) = again {
                    pause.turn(cause_of(why));
                    return Ok(None);
                }
                Ok(Some(again))
            });
            drop(pause);
            if waited.is_err() {
                self.inner.lock().machine.forget(unit);
            }
            answer = waited?;
            inner = self.lock()?;
        }
        if answer == Opening::Conflict {
            self.stats.used_home();
            return Ok(false);
        }
        let gate = inner.gates[unit.index()].fill;
        drop(inner);
        if let Err(error) = self.wait_gate(stream, gate, Cause::Copy, interrupted) {
            self.event(|m, out| m.release(unit, out))?;
            return Err(error);
        }
        Ok(true)
    }

    /// Ends a unit's window: everything enqueued on `stream` so far may still read the frames, nothing later does. Nothing to do
    /// for a unit that is not held, so that it can be said twice, or after a failure.
    pub(crate) fn release(&self, unit: UnitId, stream: u64) -> Result<()> {
        let mut inner = self.inner.lock();
        if inner.failed.is_some() || !inner.machine.held(unit) {
            return Ok(());
        }
        inner.usable()?;
        let gate = self.device.record(StreamRef::Compute(stream))?;
        inner.gates[unit.index()].release = gate;
        if self.poison {
            let bytes = self.layout.unit(unit).param_bytes() as usize;
            self.device.wait(StreamRef::Up, gate)?;
            // SAFETY: the frames are the unit's until `release` below, and copies into them come later on this stream.
            unsafe { self.device.fill(StreamRef::Up, self.frames.address(unit.index()), 0xff, bytes)? };
            inner.machine.invalidate(unit);
        }
        self.happened(&mut inner, |m, out| m.release(unit, out))
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
                Command::CopyHome(unit) => self.send(&self.to_runner, Task::Home(unit))?,
                Command::WriteChunk(unit, chunk) => self.write_chunk(inner, unit, chunk)?,
            }
        }
        Ok(())
    }

    pub(crate) fn send<T>(&self, to: &Sender<T>, what: T) -> Result<()> {
        to.send(what).map_err(|_| Error::new(Code::Panicked, "a worker thread of the runtime is gone."))
    }

    fn copy_up(&self, inner: &mut Inner, unit: UnitId) -> Result<()> {
        let bytes = self.layout.unit(unit).param_bytes();
        let lease = inner.pages[unit.index()].take();
        let (on_host, home) = (self.placement.homes[unit.index()].params == Tier::Host, self.homes.unit(unit));
        let src = match &lease {
            Some(slot) => slot.as_ptr() as u64,
            None if inner.machine.in_spare(unit) => home.spare_params,
            None if on_host => home.params,
            None => return Err(Error::new(Code::Stale, format!("{unit} has no bytes to page in."))),
        };
        self.device.wait(StreamRef::Up, inner.gates[unit.index()].home)?;
        let before = self.mark(StreamRef::Up);
        for _ in 0..self.slow.up {
            // SAFETY: the frames are this unit's by R1 and their last readers were waited for by R3; the source is the
            // unit's home or spare place, which nobody writes while a copy is under way (updates wait for this stream, those ahead
            // for the gate below), or a leased slot that the reaper holds until that gate has passed.
            unsafe { self.device.copy(StreamRef::Up, self.frames.address(unit.index()), src, bytes as usize)? };
        }
        let marks = (before, self.mark(StreamRef::Up));
        let gate = self.device.record(StreamRef::Up)?;
        inner.gates[unit.index()].fill = gate;
        self.send(&self.to_up, Ended::Copy(Landing { gate, unit, lease, marks, bytes }))
    }

    pub(crate) fn disk(&self) -> Result<&Disk> {
        self.disk
            .as_ref()
            .ok_or_else(|| Error::new(Code::Stale, "something is said to live on NVMe, but there is no store."))
    }

    pub(crate) fn take_parts(inner: &mut Inner) -> Vec<IoPart> {
        inner.spare_parts.pop().unwrap_or_default()
    }

    /// Keeps a completion's vector for the next request.
    pub(crate) fn return_parts(inner: &mut Inner, mut parts: Vec<IoPart>) {
        parts.clear();
        inner.spare_parts.push(parts);
    }

    pub(crate) fn submit_io(&self, ticket: Ticket, lease: SlotLease, parts: Vec<IoPart>) -> Result<()> {
        let request = IoRequest { ticket: ticket.encode(), lease, parts };
        self.disk()?.store.engine().submit(request).map_err(|rejected| rejected.error)
    }

    fn read_params(&self, inner: &mut Inner, unit: UnitId) -> Result<()> {
        let disk = self.disk()?;
        let exhausted = || Error::new(Code::Stale, "a page slot was promised but none is free.");
        let lease = disk.page_pool.as_ref().and_then(SlotPool::lease).ok_or_else(exhausted)?;
        let mut parts = Self::take_parts(inner);
        for (index, section) in self.layout.unit(unit).sections.iter().enumerate() {
            if let Some(segment) = disk.map.segment(unit, index, crate::dtype::StateKind::Param) {
                let n = disk.store.segment_chunks(segment);
                disk.store.parts(segment, 0..n, Direction::Read, section.offset as usize, &mut parts);
            }
        }
        self.submit_io(Ticket::Params(unit), lease, parts)
    }

    /// True if nothing had to be read.
    fn read_chunk(&self, inner: &mut Inner, unit: UnitId, index: u32) -> Result<bool> {
        let disk = self.disk()?;
        let exhausted = || Error::new(Code::Stale, "an update slot was promised but none is free.");
        let mut lease = disk.update_pool.lease().ok_or_else(exhausted)?;
        let mut parts = Self::take_parts(inner);
        let chunk = disk.map.chunk(unit, index);
        if disk.map.update_parts(&disk.store, &self.layout, unit, chunk, Direction::Read, &mut parts) {
            // What was never written is zero.
            lease.bytes().fill(0);
        }
        if parts.is_empty() {
            inner.chunks.push((unit, index, lease));
            Self::return_parts(inner, parts);
            return Ok(true);
        }
        self.submit_io(Ticket::ReadChunk(unit, index), lease, parts)?;
        Ok(false)
    }

    fn write_chunk(&self, inner: &mut Inner, unit: UnitId, index: u32) -> Result<()> {
        let disk = self.disk()?;
        let lost = || Error::new(Code::Stale, "an updated chunk has no slot.");
        let at = inner.chunks.iter().position(|(u, c, _)| (*u, *c) == (unit, index)).ok_or_else(lost)?;
        let lease = inner.chunks.swap_remove(at).2;
        let mut parts = Self::take_parts(inner);
        let chunk = disk.map.chunk(unit, index);
        disk.map.update_parts(&disk.store, &self.layout, unit, chunk, Direction::Write, &mut parts);
        self.submit_io(Ticket::WriteChunk(unit, index), lease, parts)
    }

    /// Keeps a slot until the machine's next command for it.
    pub(crate) fn park_chunk(inner: &mut Inner, unit: UnitId, chunk: u32, lease: SlotLease) {
        inner.chunks.push((unit, chunk, lease));
    }

    /// Keeps a page slot until it is copied up.
    pub(crate) fn park_page(inner: &mut Inner, unit: UnitId, lease: SlotLease) {
        inner.pages[unit.index()] = Some(lease);
    }
}

fn cause_of(wait: Wait) -> Cause {
    match wait {
        Wait::Update => Cause::Update,
        Wait::NvmeRead => Cause::NvmeRead,
        Wait::NvmeWrite => Cause::NvmeWrite,
    }
}
