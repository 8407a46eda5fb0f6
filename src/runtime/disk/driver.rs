//! The driver: the thread that takes completions from the disk. Also how the runtime's threads that serve a channel are started.

use std::{sync::Arc, thread::JoinHandle};

use crossbeam::channel::Receiver;

use crate::{
    dtype::StateKind,
    error::{Code, Error, Result},
    io::{Direction, IoCompletion},
    memory::SlotLease,
    quantities::UnitId,
    runtime::{disk::ticket::Ticket, measure::stats::Link, paging::homes::Set, shared::Shared},
};

/// Starts a named thread that runs `body` per message until the channel closes; an error or a panic fails the runtime.
pub(crate) fn spawn<T: Send + 'static>(
    name: &str,
    shared: &Arc<Shared>,
    from: Receiver<T>,
    mut body: impl FnMut(&Shared, T) -> Result<()> + Send + 'static,
) -> Result<JoinHandle<()>> {
    let shared = Arc::downgrade(shared);
    let label = name.to_owned();
    let work = move || {
        while let Ok(message) = from.recv() {
            let Some(shared) = shared.upgrade() else { return };
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| body(&shared, message)));
            match outcome {
                Ok(Ok(())) => {}
                Ok(Err(error)) => shared.fail(error),
                Err(_) => shared.fail(Error::new(Code::Panicked, format!("thread '{label}' panicked."))),
            }
        }
    };
    crate::os_error::start_thread(name, work).map_err(|e| crate::os_error::no_thread(name, &e, ""))
}

/// When a request began, by the trace's clock, and the bytes that it moved.
#[derive(Clone, Copy)]
struct Moved {
    started: u64,
    bytes: u64,
}

/// Handles one completion from the disk.
pub(crate) fn completed(shared: &Shared, done: IoCompletion) -> Result<()> {
    let moved = count(shared, &done);
    let numbered = |number: u32, done| IoCompletion { ticket: u64::from(number), ..done };
    match Ticket::decode(done.ticket) {
        Ticket::Params(unit) => params_read(shared, unit, slot_of(shared, done)?, moved)?,
        Ticket::ReadChunk(unit, index) => chunk_read(shared, unit, index, slot_of(shared, done)?, moved)?,
        Ticket::WriteChunk(unit, index) => chunk_written(shared, unit, index, slot_of(shared, done)?, moved)?,
        Ticket::OffStep(number) => off_step(shared, number, done),
        Ticket::Save(number) => shared.saves.reads.ended(numbered(number, done)),
        Ticket::Load(number) => shared.saves.writes.ended(numbered(number, done)),
        Ticket::Fault(number) => shared.faults.reads.ended(numbered(number, done)),
        Ticket::ReadGrads(unit) => grads_read(shared, unit, slot_of(shared, done)?, moved)?,
        Ticket::Grads(unit) => grads_written(shared, unit, slot_of(shared, done)?, moved)?,
    }
    Ok(())
}

/// Keeps the vector of a request for the next one; the slot of the request, if it succeeded.
fn slot_of(shared: &Shared, done: IoCompletion) -> Result<SlotLease> {
    Shared::return_parts(&mut shared.inner.lock(), done.parts);
    done.result.map(|()| done.lease)
}

/// Counts the bytes and the time of a request.
fn count(shared: &Shared, done: &IoCompletion) -> Moved {
    let now = shared.trace.now();
    let started = now.saturating_sub(done.nanos);
    let bytes = |way| done.parts.iter().filter(|p| p.direction == way).map(|p| p.len as u64).sum::<u64>();
    let (read, written) = (bytes(Direction::Read), bytes(Direction::Write));
    let mut inner = shared.inner.lock();
    if read > 0 {
        let busy = inner.busy_read.add(started, now);
        shared.stats.moved(Link::NvmeRead, read, busy);
    }
    if written > 0 {
        let busy = inner.busy_write.add(started, now);
        shared.stats.moved(Link::NvmeWrite, written, busy);
    }
    Moved { started, bytes: read + written }
}

fn off_step(shared: &Shared, number: u32, done: IoCompletion) {
    let mut inner = shared.inner.lock();
    inner.off_step.out = false;
    // The thread that waited for an earlier request has given up: that request's slot goes back to the pool.
    if number == inner.off_step.last {
        inner.off_step.done = Some(IoCompletion { ticket: 0, ..done });
    }
    shared.changed.notify_all();
}

fn params_read(shared: &Shared, unit: UnitId, mut lease: SlotLease, moved: Moved) -> Result<()> {
    shared.trace.span("nvme read", "params", u64::from(unit.0), moved.started, moved.bytes);
    let wanted = shared.inner.lock().machine.wants_params(unit);
    if wanted {
        let disk = shared.disk()?;
        for (index, section) in shared.layout.unit(unit).sections.iter().enumerate() {
            if let Some(segment) = disk.map.segment(unit, index, StateKind::Param) {
                let mut at = section.offset as usize;
                for c in 0..disk.store.segment_chunks(segment) {
                    let len = disk.store.chunk_len(segment, c) as usize;
                    disk.store.verify(segment, c, &lease.bytes()[at..at + len])?;
                    at += disk.store.chunk_bytes() as usize;
                }
            }
        }
    }
    let mut inner = shared.lock()?;
    Shared::park_page(&mut inner, unit, lease);
    shared.apply_event(&mut inner, |m, out| m.params_read(unit, out))
}

fn chunk_read(shared: &Shared, unit: UnitId, index: u32, mut lease: SlotLease, moved: Moved) -> Result<()> {
    shared.trace.span("nvme read", "states", u64::from(unit.0), moved.started, moved.bytes);
    let disk = shared.disk()?;
    let chunk = disk.map.chunk(unit, index);
    let grads = !shared.homes.unit(unit).grads_in_memory();
    let way = (Direction::Read, Set::Current, grads);
    let checked = disk.map.check(&disk.store, &shared.layout, unit, chunk, way, lease.bytes());
    let mut inner = shared.lock()?;
    // Another rank may be loading states there, for which all drop what they have begun: what no step asks for may be anything. Damage is
    // found again by the step, which reads anew.
    let in_vain = checked.is_err() && shared.ranks.is_some() && inner.machine.may_drop(unit);
    if !in_vain {
        checked?;
    }
    Shared::park_chunk(&mut inner, unit, index, lease);
    shared.apply_event(&mut inner, |m, out| {
        if in_vain { m.read_in_vain(unit, index, out) } else { m.chunk_read(unit, index, out) }
    })
}

fn chunk_written(shared: &Shared, unit: UnitId, index: u32, lease: SlotLease, moved: Moved) -> Result<()> {
    shared.trace.span("nvme write", "states", u64::from(unit.0), moved.started, moved.bytes);
    drop(lease);
    let mut inner = shared.lock()?;
    shared.apply_event(&mut inner, |m, out| m.chunk_written(unit, index, out))?;
    shared.publish_stored(&inner, unit);
    Ok(())
}

fn grads_written(shared: &Shared, unit: UnitId, lease: SlotLease, moved: Moved) -> Result<()> {
    shared.trace.span("nvme write", "gradients", u64::from(unit.0), moved.started, moved.bytes);
    drop(lease);
    shared.event(|m, out| m.grads_written(unit, out))
}

fn grads_read(shared: &Shared, unit: UnitId, lease: SlotLease, moved: Moved) -> Result<()> {
    shared.trace.span("nvme read", "gradients", u64::from(unit.0), moved.started, moved.bytes);
    shared.grads_read(unit, lease)
}
