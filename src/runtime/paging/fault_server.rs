//! Brings parameters that live on NVMe where a thread touches their shadow past all guards: compiled code, extensions, raw addresses.
//!
//! F1: the server takes no lock that is held while Python is asked for anything, so that it can answer a thread that holds the GIL. It
//! reads by itself, not through the one slot of `off_step_io`.
//! F2: the digests of what was brought are kept until the wrapper takes them: edits made through such memory show against them.
#![expect(unsafe_code, reason = "exposes shadows to the device")]

use std::{
    sync::{Arc, Weak},
    thread::JoinHandle,
};

use crossbeam::channel::{Receiver, RecvTimeoutError};
use twox_hash::XxHash3_64;

use crate::{
    dtype::StateKind,
    error::{Code, Error, Result},
    io::{Direction, IoCompletion},
    memory::{self, HostRegion, Shadow, ShadowSpace, SlotPool},
    model::ParamPlace,
    quantities::{ByteCount, Tier, UnitId},
    runtime::{
        disk::{files::Disk, ticket::Ticket},
        handle::Runtime,
        shared::{
            Shared,
            settle::Until,
            waits::{Interrupted, SLICE},
        },
    },
};

/// A read that meets a write of the same bytes is tried again so often.
const ATTEMPTS: u32 = 5;

/// How often in a row a unit is brought that had just been taken back: two units that one instruction needs would otherwise take each
/// other's place for ever. A use of the model in between begins anew.
const MOST_RETURNS: u32 = 10_000;

impl Runtime {
    /// Whether a unit's parameters were brought to their shadow because a thread touched it: digests of what was brought, returned once. From
    /// then on the shadow belongs to the caller, which discards it.
    ///
    /// # Errors
    /// `FN-E002` when the device refuses the memory; in a forked child, or when closed.
    pub fn adopt_fault(&self, unit: UnitId) -> Result<Option<Vec<u64>>> {
        self.shared()?.adopt(unit)
    }
}

/// Starts the thread that serves, if there is anything to bring.
pub(crate) fn spawn(shared: &Arc<Shared>) -> Result<Option<JoinHandle<()>>> {
    let Some(space) = shared.homes.shadows.clone() else { return Ok(None) };
    let on_nvme = |unit: &UnitId| shared.placement.homes[unit.index()].params == Tier::Nvme;
    let units: Vec<UnitId> = shared.layout.ids().filter(on_nvme).collect();
    let shared = Arc::downgrade(shared);
    space.serve();
    crate::os_error::start_thread("funicular-faults", move || serve(&space, &units, &shared))
        .map(Some)
        .map_err(|e| crate::os_error::no_thread("funicular-faults", &e, ""))
}

fn serve(space: &ShadowSpace, units: &[UnitId], shared: &Weak<Shared>) {
    while let Some(part) = space.wanted() {
        let Some(shared) = shared.upgrade() else { break };
        let unit = units[part];
        let Some(shadow) = shared.homes.unit(unit).shadow.as_ref() else { continue };
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| shared.bring(unit, shadow)));
        let outcome = outcome.unwrap_or_else(|_| Err(Error::new(Code::Panicked, "a read panicked.")));
        if let Err(error) = outcome {
            tell(&shared.layout.unit(unit).name, &error);
            shadow.refuse();
        }
    }
    space.refuse_all();
}

/// The thread that touched the weights cannot raise an exception: it ends the process.
#[expect(clippy::print_stderr, reason = "the process is about to end by a signal")]
fn tell(name: &str, error: &Error) {
    eprintln!(
        "{error}\n'{name}' lives on NVMe and was touched past torch's dispatcher (compiled code, an extension, a raw address), where this can \
         be no exception: the process ends. Call p.detach() before, which raises it."
    );
}

impl Shared {
    /// Brings a unit's parameters into its shadow, all at once for other threads.
    fn bring(&self, unit: UnitId, shadow: &Shadow) -> Result<()> {
        let bytes = shadow.len() as u64;
        let name = format!("'{}'", self.layout.unit(unit).name);
        let returns = self.faults.times_in_a_row(unit);
        while let Err(error) = self.lend(bytes, &name) {
            if returns > MOST_RETURNS || !self.take_back()? {
                return Err(error);
            }
        }
        let placed = (1..=ATTEMPTS).find_map(|attempt| match self.read_and_place(unit, shadow) {
            Err(error) if error.code() == Code::Corrupted && attempt < ATTEMPTS => None,
            result => Some(result),
        });
        let placed = placed.unwrap_or(Ok(false));
        if !matches!(placed, Ok(true)) {
            self.stats.returned(bytes);
        }
        placed.map(drop)
    }

    /// False if the wrapper has filled the shadow meanwhile.
    fn read_and_place(&self, unit: UnitId, shadow: &Shadow) -> Result<bool> {
        let never = &mut || false;
        self.await_update(unit, None, Until::Home, never)?;
        let inner = self.lock()?;
        let what = || format!("writes of '{}'", self.layout.unit(unit).name);
        // Under the lock that saw the last write end: no other begins until the read is over.
        self.wait(inner, &what, never, |i| {
            let still = !i.machine.unsettled(unit);
            if still {
                i.machine.hold_still(unit);
            }
            Ok(still.then_some(()))
        })?;
        let placed = self.read_still(unit, shadow);
        self.event(|m, out| m.end_write(unit, out))?;
        placed
    }

    fn read_still(&self, unit: UnitId, shadow: &Shadow) -> Result<bool> {
        let disk = self.disk()?;
        let pool = SlotPool::whole(HostRegion::movable(ByteCount(shadow.len() as u64), "a read of parameters")?);
        let mut lease = pool.lease().ok_or_else(|| Error::new(Code::Stale, "a new pool has no slot."))?;
        let mut parts = Vec::new();
        for (segment, at) in self.param_segments(disk, unit) {
            let mut at = at;
            for chunk in 0..disk.store.segment_chunks(segment) {
                if disk.store.written(segment, chunk) {
                    disk.store.parts(segment, chunk..chunk + 1, Direction::Read, at, &mut parts);
                }
                at += disk.store.chunk_bytes() as usize;
            }
        }
        if !parts.is_empty() {
            let ends = self.faults.reads.open();
            let number = self.faults.reads.number();
            self.submit_io(Ticket::Fault(number), lease, parts)?;
            let done = self.next_read(&ends, number)?;
            done.result?;
            lease = done.lease;
        }
        for (segment, at) in self.param_segments(disk, unit) {
            let mut at = at;
            for chunk in 0..disk.store.segment_chunks(segment) {
                let len = disk.store.chunk_len(segment, chunk) as usize;
                disk.store.verify(segment, chunk, &lease.bytes()[at..at + len])?;
                at += disk.store.chunk_bytes() as usize;
            }
        }
        let digests = self.digests(unit, lease.bytes());
        // First: a thread that finds the shadow filled finds the digests, too.
        self.faults.brought.lock().push((unit, digests));
        let placed = shadow.place(pool.region());
        if !matches!(placed, Ok(true)) {
            self.faults.take(unit);
        }
        placed
    }

    /// To make room, takes away what was brought longest ago and is unchanged; false if there is none such. A thread that touches it
    /// meanwhile, or later, has it brought again.
    fn take_back(&self) -> Result<bool> {
        let known: Vec<UnitId> = self.faults.brought.lock().iter().map(|(unit, _)| *unit).collect();
        for unit in known {
            let Some(shadow) = self.homes.unit(unit).shadow.as_ref() else { continue };
            // The wrapper may take it at the same time: the one that gets the digests has the shadow.
            let Some(digests) = self.faults.take(unit) else { continue };
            if shadow.discard_if(|bytes| self.digests(unit, bytes) == digests)? {
                self.stats.returned(shadow.len() as u64);
                self.faults.returned.lock().0 = Some(unit);
                return Ok(true);
            }
            self.faults.brought.lock().push((unit, digests));
        }
        Ok(false)
    }

    fn param_segments(&self, disk: &Disk, unit: UnitId) -> impl Iterator<Item = (usize, usize)> {
        let sections = self.layout.unit(unit).sections.iter().enumerate();
        sections.filter_map(move |(index, section)| {
            Some((disk.map.segment(unit, index, StateKind::Param)?, section.offset as usize))
        })
    }

    fn next_read(&self, ends: &Receiver<IoCompletion>, number: u32) -> Result<IoCompletion> {
        loop {
            match ends.recv_timeout(SLICE) {
                Ok(done) if done.ticket == u64::from(number) => return Ok(done),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => drop(self.lock()?),
                Err(RecvTimeoutError::Disconnected) => return Err(Error::new(Code::Stale, "a read has no end.")),
            }
        }
    }

    /// A digest per parameter, as the wrapper takes them.
    fn digests(&self, unit: UnitId, bytes: &[u8]) -> Vec<u64> {
        let packed = self.layout.unit(unit);
        let digest = |p: &ParamPlace| {
            let section = &packed.sections[p.section];
            let size = section.dtype.size() as u64;
            let first = (section.offset + p.start * size) as usize;
            XxHash3_64::oneshot(&bytes[first..first + (p.numel * size) as usize])
        };
        packed.params.iter().map(digest).collect()
    }

    /// If a unit was brought because it was touched: makes it as readable for the device as what the wrapper asks for, and returns the
    /// digests of what was brought.
    pub(crate) fn adopt(&self, unit: UnitId) -> Result<Option<Vec<u64>>> {
        self.faults.returned.lock().1 = 0;
        memory::watch_faults()?;
        let Some(shadow) = self.homes.unit(unit).shadow.as_ref().filter(|s| s.filled()) else { return Ok(None) };
        let Some(digests) = self.faults.take(unit) else { return Ok(None) };
        if let Err(error) = self.expose(shadow) {
            self.faults.brought.lock().push((unit, digests));
            return Err(error);
        }
        Ok(Some(digests))
    }

    /// Fills a shadow for the wrapper, all at once for other threads.
    pub(crate) fn fill_whole(
        &self,
        unit: UnitId,
        shadow: &Shadow,
        stream: u64,
        interrupted: Interrupted<'_>,
    ) -> Result<()> {
        let bytes = shadow.len() as u64;
        self.lend(bytes, &format!("'{}'", self.layout.unit(unit).name))?;
        let placed = HostRegion::movable(ByteCount(bytes), "a read of parameters").and_then(|region| {
            self.read_params_into(unit, region.as_ptr(), stream, interrupted)?;
            shadow.place(&region)
        });
        if !matches!(placed, Ok(true)) {
            self.stats.returned(bytes);
        }
        if placed? {
            self.expose(shadow).or_else(|error| self.discard_shadow(unit).and(Err(error)))?;
        }
        Ok(())
    }

    /// Lets the device read a filled shadow, until it is discarded.
    pub(crate) fn expose(&self, shadow: &Shadow) -> Result<()> {
        let address = shadow.as_ptr() as u64;
        // SAFETY: the range is hidden, by what is registered below, before it is discarded or unmapped.
        unsafe { self.device.expose(address, shadow.len()) }?;
        let device = Arc::clone(&self.device);
        shadow.before_release(Box::new(move || {
            // A device that fails now has failed the runtime already.
            let _ = device.hide(address);
        }));
        Ok(())
    }
}
