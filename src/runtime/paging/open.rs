//! Windows: opening one, ending one, and the copy of parameters into frames.
#![expect(unsafe_code, reason = "enqueues copies between raw addresses that it owns")]

use crate::{
    device::StreamRef,
    error::{Code, Error, Result},
    quantities::{Tier, UnitId},
    runtime::{
        measure::stats::Cause,
        paging::landing::{Ended, Landing},
        shared::{Shared, locked::Inner, waits::Interrupted},
    },
    schedule::{Opening, Phase, machine::Wait},
};

impl Shared {
    /// Opens a window on `stream`, and under `debug.sync` waits for the copy into its frames: true if the frames may be used, false if the
    /// home must be.
    pub(crate) fn open_window(
        &self,
        unit: UnitId,
        phase: Option<Phase>,
        stream: u64,
        interrupted: Interrupted<'_>,
    ) -> Result<bool> {
        self.watch_memory(interrupted)?;
        let opened = self.open(unit, phase, stream, interrupted)?;
        if self.sync {
            let gate = self.lock()?.gates[unit.index()].fill;
            self.block_gate(Some(stream), gate, Cause::Copy, interrupted)?;
        }
        Ok(opened)
    }

    /// Ends a window. Under `debug.sync` waits for its kernels; interrupted there, it has ended all the same.
    pub(crate) fn end_window(&self, unit: UnitId, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        self.release(unit, stream)?;
        if self.sync {
            // A fault of the window's own kernels shows here, not somewhere later.
            let gate = self.lock()?.gates[unit.index()].release;
            self.block_gate(Some(stream), gate, Cause::Copy, interrupted)?;
        }
        Ok(())
    }

    /// The home was edited by work enqueued on `stream`: the frames are out of date.
    pub(crate) fn invalidate(&self, unit: UnitId, stream: u64) -> Result<()> {
        self.drop_speculation(unit);
        let mut inner = self.lock()?;
        inner.gates[unit.index()].home = self.device.record(StreamRef::Compute(stream))?;
        self.apply_event(&mut inner, |m, _| m.invalidate(unit))
    }

    /// Opens a unit's window: true if its frames may be used on `stream`, false if the home must be used instead. Without a phase it
    /// fills the frames anew, which is no use of the unit in the order that the machine learns.
    fn open(&self, unit: UnitId, phase: Option<Phase>, stream: u64, interrupted: Interrupted<'_>) -> Result<bool> {
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
            let mut pause = self.pause(Some(stream), self.cause_of(&inner, unit, why));
            let name = || format!("'{}' ({why:?})", self.layout.unit(unit).name);
            let waited = self.wait(inner, &name, interrupted, |inner| {
                let again = self.step(inner, |m, out| m.open(unit, phase, false, out))?;
                if let Opening::Pending(why) = again {
                    pause.change_cause(self.cause_of(inner, unit, why));
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
        self.apply_event(&mut inner, |m, out| m.release(unit, out))
    }

    pub(crate) fn copy_up(&self, inner: &mut Inner, unit: UnitId) -> Result<()> {
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
            // unit's home or its spare copy, which no thread writes while a copy up is under way (updates wait for this stream,
            // speculative ones for the gate below), or a leased slot that the reaper holds until that gate has passed.
            unsafe { self.device.copy(StreamRef::Up, self.frames.address(unit.index()), src, bytes as usize)? };
        }
        let marks = (before, self.mark(StreamRef::Up));
        let gate = self.device.record(StreamRef::Up)?;
        inner.gates[unit.index()].fill = gate;
        self.send(&self.to_up, Ended::Copy(Landing { gate, unit, lease, marks, bytes }))
    }

    fn cause_of(&self, inner: &Inner, unit: UnitId, wait: Wait) -> Cause {
        match wait {
            Wait::Update => self.update_cause(inner, [unit].into_iter()),
            Wait::NvmeRead => Cause::NvmeRead,
            Wait::NvmeWrite => Cause::NvmeWrite,
        }
    }
}
