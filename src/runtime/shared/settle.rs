//! Waits for updates: until they are made, or their results at home; after a failure, until nothing is written any more.

use crate::{
    error::{Code, Error, Result},
    quantities::{Tier, UnitId},
    runtime::{
        measure::stats::Cause,
        ranks::together::Ranks,
        shared::{
            Shared,
            lock_order::OrderedGuard,
            locked::Inner,
            waits::{Interrupted, SLICE},
        },
    },
    schedule::{Machine, Want},
};

/// What a caller that waits for an update needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Until {
    /// The weights: frames can be filled.
    Weights,
    /// This rank's part has read its gradients: they may be written.
    Read,
    /// All of it made: its inputs are free, and the states are the new ones.
    Made,
    /// The weights in the unit's home.
    Home,
    /// All of it made, and the weights at home.
    Whole,
}

impl Until {
    pub(crate) fn pending(self, machine: &Machine, unit: UnitId) -> bool {
        match self {
            Self::Weights => machine.update_queued(unit),
            Self::Read => machine.reads_gradients(unit),
            Self::Made => machine.update_unmade(unit),
            Self::Home => machine.update_pending(unit),
            Self::Whole => machine.update_unmade(unit) || machine.update_pending(unit),
        }
    }

    fn wants(self) -> &'static [Want] {
        match self {
            Self::Weights => &[Want::Weights],
            Self::Read | Self::Made => &[Want::States],
            Self::Home => &[Want::Home],
            Self::Whole => &[Want::States, Want::Home],
        }
    }
}

impl Shared {
    /// As [`Shared::settle_home`]; then makes `stream` wait for what streams write to the home.
    pub(crate) fn settle_for(&self, unit: UnitId, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        self.settle_home(unit, stream, interrupted)?;
        let gate = self.inner.lock().gates[unit.index()].home;
        self.wait_gate(stream, gate, Cause::Copy, interrupted)
    }

    /// Waits until the unit's home holds the result of its last update.
    pub(crate) fn settle(&self, unit: UnitId, stream: Option<u64>, interrupted: Interrupted<'_>) -> Result<()> {
        self.await_update(unit, stream, Until::Home, interrupted)
    }

    /// Waits for a unit's update. What callers wait for states is taken into account where the next ones are to follow their weights or not.
    pub(crate) fn await_update(
        &self,
        unit: UnitId,
        stream: Option<u64>,
        until: Until,
        interrupted: Interrupted<'_>,
    ) -> Result<()> {
        let trails = matches!(until, Until::Made | Until::Whole) && {
            let inner = self.inner.lock();
            inner.machine.update_unmade(unit) && !inner.machine.update_queued(unit)
        };
        let since = self.trace.now();
        let waited = self.wait_for_update(unit, stream, until, interrupted);
        if trails {
            self.rhythm.lock().waited(self.trace.now().saturating_sub(since));
        }
        waited
    }

    /// As [`Shared::await_update`], for gradients that arrive in backward: the device has more to do meanwhile.
    pub(crate) fn wait_for_update(
        &self,
        unit: UnitId,
        stream: Option<u64>,
        until: Until,
        interrupted: Interrupted<'_>,
    ) -> Result<()> {
        let mut inner = self.inner.lock();
        if !until.pending(&inner.machine, unit) {
            return Ok(());
        }
        inner.usable()?;
        self.step(&mut inner, |m, out| until.wants().iter().for_each(|&want| m.promote(unit, want, out)))?;
        let mut pause = self.pause(stream, self.update_cause(&inner, [unit].into_iter()));
        let what = || format!("the update of '{}'", self.layout.unit(unit).name);
        self.wait(inner, &what, interrupted, |i| {
            let pending = until.pending(&i.machine, unit);
            if pending {
                pause.change_cause(self.update_cause(i, [unit].into_iter()));
            }
            Ok((!pending).then_some(()))
        })
    }

    /// Why updates of these units are waited for: this rank has to make its part of one, or all wait for other ranks.
    pub(crate) fn update_cause(&self, inner: &Inner, mut units: impl Iterator<Item = UnitId>) -> Cause {
        // Who waits here is not among those that wait for ranks, but the runner may be.
        let peers = |ranks: &Ranks| ranks.waits() || units.all(|unit| inner.machine.awaits_peers(unit));
        if self.ranks.as_deref().is_some_and(peers) { Cause::PeersUpdate } else { Cause::Update }
    }

    /// As [`Shared::settle`], for readers. After a failure that the caller has seen nothing is awaited but the runner: what is in
    /// host memory stays readable.
    pub(crate) fn settle_home(&self, unit: UnitId, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        let Some(mut inner) = self.stopped(unit, interrupted)? else {
            return self.settle(unit, Some(stream), interrupted);
        };
        if inner.machine.in_spare(unit) {
            // The runner does nothing more once its speculative piece has ended; the lock keeps other threads from doing this too.
            self.forget_speculation(unit);
            self.copy_home(unit)?;
            inner.machine.homed(unit, &mut Vec::new());
        }
        Ok(())
    }

    /// Waits until the unit's last update is made as a whole: it has read its gradients, and the weights may be in the spare copy. For
    /// readers of gradients: see [`Shared::settle_home`].
    pub(crate) fn settle_made(&self, unit: UnitId, stream: u64, interrupted: Interrupted<'_>) -> Result<()> {
        if self.stopped(unit, interrupted)?.is_some() {
            return Ok(());
        }
        self.await_update(unit, Some(stream), Until::Made, interrupted)
    }

    /// After a failure that the caller has seen, and where the unit's parameters are in host memory: waits until the runner has come to
    /// its end there.
    fn stopped(&self, unit: UnitId, interrupted: Interrupted<'_>) -> Result<Option<OrderedGuard<'_, Inner>>> {
        let mut inner = self.inner.lock();
        let on_host = self.placement.homes[unit.index()].params == Tier::Host;
        if inner.failed.is_none() || !inner.failure_seen || !on_host {
            return Ok(None);
        }
        while inner.at_work == Some(unit) && !inner.closing {
            inner.wait_for(&self.changed, SLICE);
            if inner.unlocked(&mut *interrupted) {
                return Err(Error::new(Code::Interrupted, "interrupted while waiting for an update."));
            }
        }
        Ok(Some(inner))
    }

    /// Waits for the updates of all units; writes to NVMe may trail.
    pub(crate) fn settle_all(&self, stream: Option<u64>, until: Until, interrupted: Interrupted<'_>) -> Result<()> {
        let mut inner = self.lock()?;
        if until == Until::Whole {
            self.bring_home(&mut inner, self.layout.ids())?;
        }
        let mut pause = self.pause(stream, Cause::Update);
        self.wait(inner, &|| "the updates".into(), interrupted, |i| {
            let mut pending = self.layout.ids().filter(|&unit| until.pending(&i.machine, unit)).peekable();
            if pending.peek().is_none() {
                return Ok(Some(()));
            }
            pause.change_cause(self.update_cause(i, pending));
            Ok(None)
        })
    }

    /// Has units' last updates made as a whole and brought home, without waiting for it.
    pub(crate) fn bring_home(&self, inner: &mut Inner, units: impl Iterator<Item = UnitId>) -> Result<()> {
        for unit in units {
            if Until::Whole.pending(&inner.machine, unit) {
                self.step(inner, |m, out| Until::Whole.wants().iter().for_each(|&want| m.promote(unit, want, out)))?;
            }
        }
        Ok(())
    }

    pub(crate) fn settle_disk(&self, unit: UnitId, interrupted: Interrupted<'_>) -> Result<()> {
        let inner = self.lock()?;
        let what = || format!("writes of '{}'", self.layout.unit(unit).name);
        self.wait(inner, &what, interrupted, |i| Ok((!i.machine.unsettled(unit)).then_some(())))
    }
}
