//! The runtime: one model's memory, threads and state, and the operations that the Python wrapper calls.
//!
//! | folder | what it holds |
//! |---|---|
//! | `setup` | what a run is told, whether it may begin, how it starts |
//! | `shared` | the lock, the machine's commands performed, waiting, the end |
//! | `paging` | where parameters live, and what happens when they are touched where they are not |
//! | `update` | AdamW: a step, updates begun in backward, who does which part |
//! | `disk` | the map of the files, requests on their way, the threads that take completions, what is not part of a step |
//! | `saving` | checkpoints: saving beside training, loading |
//! | `measure` | counters, the time of a step, the trace, slow requests |

pub mod disk;
pub mod measure;
pub mod paging;
mod saving;
mod setup;
mod shared;
#[cfg(test)]
mod tests;
mod update;

use std::{sync::Arc, thread::JoinHandle};

pub use saving::{
    restore::{Buffer, Item, aside, read_buffers},
    save::{Place, Source, Unchanged, save_plain},
};
pub use setup::config::Config;
pub use shared::end::{check_process, closed};
pub use update::{
    factors::FACTORS_PER_STEP,
    run::{Job, JobSpan, StepHyper},
    share::Sharing,
};

use crate::{
    device::{self, Device, DeviceKind, Frames, Gate, StreamRef},
    dtype::StateKind,
    error::{Code, Error, Result},
    io::Direction,
    memory::HostRegion,
    model::Layout,
    policy::Policy,
    runtime::{
        disk::threads::Ended,
        measure::stats::{Cause, Stats},
        paging::homes::Homes,
        setup::{admission::Running, start::Started},
        shared::{Disk, Landing, Shared},
    },
    schedule::{Budgets, Phase, Placement, machine::Prefetches},
    units::{ByteCount, Tier, UnitId},
};

/// Asked about twenty times a second during a wait; true ends the wait with `FN-E106`.
pub type Interrupted<'a> = &'a mut dyn FnMut() -> bool;

/// A unit's part of an optimizer step.
#[derive(Clone, Debug)]
pub struct UnitUpdate {
    /// The unit.
    pub unit: UnitId,
    /// Its spans.
    pub spans: Vec<JobSpan>,
    /// Nothing has touched the gradients and parameters from which [`Runtime::update_ahead`] began.
    pub guessed: bool,
}

/// One model's runtime.
pub struct Runtime {
    shared: Option<Arc<Shared>>,
    threads: Vec<JoinHandle<()>>,
    pid: u32,
    budgets: Budgets,
    notes: Vec<String>,
    /// What other processes of this machine are told of this one.
    running: Option<Running>,
}

impl Runtime {
    /// Plans, takes memory and disk space, and starts the threads. `freed` bytes of host memory are given back as the model
    /// moves in: its own weights, where they lie there.
    ///
    /// # Errors
    /// Budgets (`FN-E20x`), device (`FN-E00x`), disk (`FN-E60x`), a trace that cannot be written (`FN-E606`); nothing is left behind.
    pub fn open(layout: Layout, policy: &Policy, freed: ByteCount) -> Result<Self> {
        if !policy.log.trace_steps.is_empty() {
            measure::trace::check(std::path::Path::new(&policy.log.trace))?;
        }
        let Started { shared, threads, budgets, notes, running } = setup::start::start(layout, policy, freed)?;
        Ok(Self { shared: Some(shared), threads, pid: std::process::id(), budgets, notes, running: Some(running) })
    }

    fn shared(&self) -> Result<&Shared> {
        check_process(self.pid)?;
        self.shared.as_deref().ok_or_else(closed)
    }

    /// Things worth knowing about how it was set up.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The device at work.
    pub fn device(&self) -> Result<&Arc<dyn Device>> {
        Ok(&self.shared()?.device)
    }

    /// The frames of all units.
    pub fn frames(&self) -> Result<&Arc<dyn Frames>> {
        Ok(&self.shared()?.frames)
    }

    /// How the model is packed.
    pub fn layout(&self) -> Result<&Layout> {
        Ok(&self.shared()?.layout)
    }

    /// Where everything lives.
    pub fn placement(&self) -> Result<&Placement> {
        Ok(&self.shared()?.placement)
    }

    /// Host memory of the model.
    pub fn homes(&self) -> Result<&Homes> {
        Ok(&self.shared()?.homes)
    }

    /// Counters.
    pub fn stats(&self) -> Result<&Stats> {
        Ok(&self.shared()?.stats)
    }

    /// How openings went.
    pub fn prefetches(&self) -> Result<Prefetches> {
        Ok(self.shared()?.inner.lock().machine.prefetches())
    }

    /// Name of the I/O engine at work, if there is a disk.
    pub fn engine_name(&self) -> Result<Option<&'static str>> {
        Ok(self.shared()?.disk.as_ref().map(|d| d.store.engine().kind().name()))
    }

    /// Threads of the update pool.
    pub fn pool_threads(&self) -> Result<usize> {
        Ok(self.shared()?.pool.threads())
    }

    /// Opens a window on `stream`: true if the frames may be used, false if the home must be.
    ///
    /// # Errors
    /// The runtime's first failure, or an interruption; the window is not open then.
    pub fn open_window(
        &self,
        unit: UnitId,
        phase: impl Into<Option<Phase>>,
        stream: u64,
        interrupted: Interrupted<'_>,
    ) -> Result<bool> {
        let shared = self.shared()?;
        let opened = shared.open(unit, phase.into(), stream, interrupted)?;
        if shared.sync {
            let gate = shared.lock()?.gates[unit.index()].fill;
            shared.block_gate(Some(stream), gate, Cause::Copy, interrupted)?;
        }
        Ok(opened)
    }

    /// Ends a window. Under `debug.sync` waits for its kernels; interrupted there, it has ended all the same.
    ///
    /// # Errors
    /// The runtime's first failure, or an interruption.
    pub fn release(&self, unit: UnitId, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        let shared = self.shared()?;
        shared.release(unit, stream)?;
        if shared.sync {
            // A fault of the window's own kernels shows here, not somewhere later.
            let gate = shared.lock()?.gates[unit.index()].release;
            shared.block_gate(Some(stream), gate, Cause::Copy, interrupted)?;
        }
        Ok(())
    }

    /// The home was edited by work enqueued on `stream`: the frames are out of date.
    ///
    /// # Errors
    /// The runtime's first failure.
    pub fn invalidate(&self, unit: UnitId, stream: u64) -> Result<()> {
        let shared = self.shared()?;
        shared.drop_ahead(unit);
        let mut inner = shared.lock()?;
        inner.gates[unit.index()].home = shared.device.record(StreamRef::Compute(stream))?;
        shared.happened(&mut inner, |m, _| m.invalidate(unit))
    }

    /// Brings edits made inside a window home.
    ///
    /// # Errors
    /// The runtime's first failure, or an interruption.
    pub fn write_back(&self, unit: UnitId, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        self.shared()?.write_back(unit, stream, interrupted)
    }

    /// Copies a gradient down to byte `offset` of the unit's gradient segment, after the work on `stream`. The source must
    /// stay untouched until [`Runtime::landed`] says so of the number returned.
    ///
    /// # Errors
    /// The runtime's first failure, or an interruption.
    ///
    /// # Safety
    /// `src` must be a valid address of `len` bytes on the device.
    #[expect(unsafe_code, reason = "the caller vouches for a raw address")]
    pub unsafe fn gradient(
        &self,
        unit: UnitId,
        offset: u64,
        src: u64,
        len: u64,
        stream: u64,
        interrupted: Interrupted<'_>,
    ) -> Result<u64> {
        let shared = self.shared()?;
        shared.settle_update(unit, stream, interrupted)?;
        shared.drop_ahead(unit);
        let home = shared.homes.unit(unit).grads;
        if home == 0 || offset.checked_add(len).is_none_or(|end| end > shared.layout.unit(unit).grad_bytes()) {
            return Err(Error::argument(format!("'{}' has no such gradient.", shared.layout.unit(unit).name)));
        }
        let mut inner = shared.lock()?;
        let gate = shared.device.record(StreamRef::Compute(stream))?;
        shared.device.wait(StreamRef::Down, gate)?;
        let before = shared.mark(StreamRef::Down);
        for _ in 0..shared.slow.down {
            // SAFETY: the source is the caller's promise; the destination is inside the gradient segment, whose update is over.
            unsafe { shared.device.copy(StreamRef::Down, home + offset, src, len as usize)? };
        }
        let marks = (before, shared.mark(StreamRef::Down));
        let gate = shared.device.record(StreamRef::Down)?;
        inner.last_down = gate;
        shared.send(&shared.to_down, Ended::Copy(Landing { gate, unit, lease: None, marks, bytes: len }))?;
        drop(inner);
        if shared.sync {
            shared.block_gate(Some(stream), gate, Cause::Grads, interrupted)?;
        }
        Ok(gate.seq)
    }

    /// True if the gradient copy of that number is over.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn landed(&self, seq: u64) -> Result<bool> {
        let shared = self.shared()?;
        shared.device.passed(Gate { role: device::Role::Down, seq }).map_err(|e| unknown_copy(e, seq))
    }

    /// Makes `stream` (on the host: the caller) wait for the gradient copy of that number.
    ///
    /// # Errors
    /// A failure of the device, or an interruption.
    pub fn wait_landed(&self, seq: u64, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        let gate = Gate { role: device::Role::Down, seq };
        self.landed(seq)?;
        self.shared()?.wait_gate(stream, gate, Cause::Grads, interrupted)
    }

    /// Makes `stream` (on the host: the caller) wait for all gradient copies so far.
    ///
    /// # Errors
    /// A failure of the device, or an interruption.
    pub fn wait_gradients(&self, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        let shared = self.shared()?;
        let gate = shared.inner.lock().last_down;
        shared.wait_gate(stream, gate, Cause::Grads, interrupted)
    }

    /// True if the unit's home is not yet that of its last update.
    ///
    /// # Errors
    /// In a forked child, or when closed.
    pub fn update_pending(&self, unit: UnitId) -> Result<bool> {
        Ok(self.shared()?.inner.lock().machine.update_pending(unit))
    }

    /// Waits until the unit's home is current, also for `stream`. Once the caller has seen the runtime's failure, until nothing
    /// writes to it any more: homes in host memory stay readable, each element as before or as after the last step.
    ///
    /// # Errors
    /// The runtime's first failure, or an interruption.
    pub fn settle(&self, unit: UnitId, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        let shared = self.shared()?;
        shared.settle_home(unit, stream, interrupted)?;
        let gate = shared.inner.lock().gates[unit.index()].home;
        shared.wait_gate(stream, gate, Cause::Copy, interrupted)
    }

    /// Waits until no update is under way and all homes are current.
    ///
    /// # Errors
    /// The runtime's first failure, or an interruption.
    pub fn settle_all(&self, interrupted: Interrupted<'_>) -> Result<()> {
        self.shared()?.settle_all(None, shared::settle::Until::Home, interrupted)
    }

    /// Waits until the unit's last update is made: its inputs may change, and its frames be filled. The home may be older. Once the
    /// caller has seen the runtime's failure, until nothing is made of it any more.
    ///
    /// # Errors
    /// The runtime's first failure, or an interruption.
    pub fn settle_update(&self, unit: UnitId, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        self.shared()?.settle_made(unit, stream, interrupted)
    }

    /// Reads parameters that live on NVMe into their shadow, for `stream`; nothing to do for others.
    ///
    /// # Errors
    /// `FN-E205` when the host budget has no room, `FN-E301` and `FN-E302` from the disk.
    pub fn fault_in(&self, unit: UnitId, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        self.shared()?.fault_in(unit, stream, interrupted)
    }

    /// Makes the shadow writable for its first contents.
    ///
    /// # Errors
    /// `FN-E204` when the system refuses memory.
    pub fn blank_shadow(&self, unit: UnitId) -> Result<()> {
        self.shared()?.blank_shadow(unit)
    }

    /// Stores a shadow's contents, as they are after the work on `stream`.
    ///
    /// # Errors
    /// From the disk.
    pub fn store_shadow(&self, unit: UnitId, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        let shared = self.shared()?;
        shared.block_stream(stream, interrupted)?;
        shared.store_shadow(unit, interrupted)
    }

    /// Reads a filled shadow anew, in place, once the work on `stream` no longer looks at it.
    ///
    /// # Errors
    /// From the disk.
    pub fn refresh_shadow(&self, unit: UnitId, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        let shared = self.shared()?;
        shared.block_stream(stream, interrupted)?;
        shared.refresh_shadow(unit, stream, interrupted)
    }

    /// Counts memory of the caller that holds what was read, with that of the shadows.
    ///
    /// # Errors
    /// `FN-E205` when the host budget has no room.
    pub fn lend(&self, bytes: u64) -> Result<()> {
        self.shared()?.lend(bytes, "optimizer states")
    }

    /// The caller has dropped that memory.
    ///
    /// # Errors
    /// When closed.
    pub fn returned(&self, bytes: u64) -> Result<()> {
        let stats = &self.shared()?.stats;
        if bytes > stats.shadows().0 {
            return Err(Error::argument(format!("{bytes} bytes were given back, and fewer are lent.")));
        }
        stats.returned(bytes);
        Ok(())
    }

    /// Gives a shadow's memory back.
    ///
    /// # Errors
    /// `FN-E204` when the system refuses.
    pub fn discard_shadow(&self, unit: UnitId) -> Result<()> {
        self.shared()?.discard_shadow(unit)
    }

    /// Copies optimizer state to or from the caller's memory.
    ///
    /// # Errors
    /// The runtime's first failure, or from the disk.
    ///
    /// # Safety
    /// `buffer` must be valid for the bytes of `elems` of that kind.
    #[expect(unsafe_code, reason = "the caller vouches for a raw address")]
    pub unsafe fn state_io(
        &self,
        place: (UnitId, usize, StateKind),
        elems: std::ops::Range<u64>,
        buffer: *mut u8,
        direction: Direction,
        interrupted: Interrupted<'_>,
    ) -> Result<()> {
        let (unit, section, kind) = place;
        // SAFETY: the caller's promise is passed on.
        unsafe { self.shared()?.state_io(unit, section, kind, elems, buffer, direction, interrupted) }
    }

    /// What the policy allows in a tier; none where it sets no bound.
    ///
    /// # Errors
    /// When closed.
    pub fn limit(&self, tier: Tier) -> Result<Option<u64>> {
        self.shared()?;
        Ok(match tier {
            Tier::Hbm => self.budgets.hbm.map(|b| b.0),
            Tier::Host => Some(self.budgets.host.0),
            Tier::Nvme => Some(self.budgets.nvme.0).filter(|&b| b != u64::MAX),
        })
    }

    /// Bytes in use by tier: frames, host memory with filled shadows, files.
    ///
    /// # Errors
    /// When closed.
    pub fn used(&self, tier: Tier) -> Result<(u64, u64)> {
        let shared = self.shared()?;
        let plan = &shared.placement;
        Ok(match tier {
            Tier::Hbm => (plan.hbm_bytes, plan.hbm_bytes),
            Tier::Host => {
                let staging = shared.disk.as_ref().map_or(0, Disk::staging_bytes);
                let (now, peak) = shared.stats.shadows();
                // Without a bound of its own the compute tier is the host's memory.
                let compute = if self.budgets.hbm.is_none() { plan.hbm_bytes } else { 0 };
                let fixed = shared.homes.bytes() + staging + compute;
                (fixed + now, fixed + peak)
            }
            Tier::Nvme => {
                let bytes = shared.disk.as_ref().map_or(0, |d| d.store.reserved().0);
                (bytes, bytes)
            }
        })
    }

    /// Page-locks host memory for activations: `wanted` bytes, or `least` where the budget has no room for more. It stays
    /// until the runtime is closed.
    ///
    /// # Errors
    /// `FN-E202` when `budget.host` has no room, `FN-E204` when the system refuses.
    pub fn activation_region(&self, least: u64, wanted: u64) -> Result<Arc<HostRegion>> {
        self.shared()?.activation_region(least, wanted)
    }
}

/// What a device says of a gate that it never recorded, for a number that the caller has made up.
fn unknown_copy(error: Error, seq: u64) -> Error {
    if error.code() == Code::Stuck { Error::argument(format!("there is no copy of number {seq}.")) } else { error }
}

/// True where the processor that computes is also the one that updates.
pub fn shares_processor(kind: DeviceKind) -> bool {
    kind == DeviceKind::Host
}
