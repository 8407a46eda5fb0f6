//! Threads of a runtime: the driver takes completions from the disk, the reapers learn when copies have ended.

use std::{sync::Arc, thread::JoinHandle, time::Duration};

use crossbeam::channel::Receiver;

use crate::{
    device::{Elapsed, Gate},
    error::{Code, Error, Result},
    io::{Direction, IoCompletion},
    runtime::{
        disk::ticket::Ticket,
        measure::stats::Link,
        shared::{Landing, Shared},
    },
};

/// What a reaper is told to wait for, in the order of its stream.
#[derive(Debug)]
pub(crate) enum Ended {
    /// A copy.
    Copy(Landing),
    /// A step on the compute stream, and when it ended if that is known.
    Step { gate: Gate, at: Option<u64> },
}

/// Starts a named thread that runs `body` per message until the channel closes; an error or a panic fails the runtime.
pub(crate) fn spawn<T: Send + 'static>(
    name: &str,
    shared: &Arc<Shared>,
    from: Receiver<T>,
    mut body: impl FnMut(&Shared, T) -> Result<()> + Send + 'static,
) -> Result<JoinHandle<()>> {
    let shared = Arc::downgrade(shared);
    let label = name.to_owned();
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            while let Ok(message) = from.recv() {
                let Some(shared) = shared.upgrade() else { return };
                let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| body(&shared, message)));
                match outcome {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => shared.fail(error),
                    Err(_) => shared.fail(Error::new(Code::Panicked, format!("thread '{label}' panicked."))),
                }
            }
        })
        .map_err(|e| crate::os_error::no_thread(name, &e, ""))
}

/// Handles one completion from the disk.
pub(crate) fn completed(shared: &Shared, done: IoCompletion) -> Result<()> {
    let IoCompletion { ticket, mut lease, parts, result, nanos } = done;
    let ticket = Ticket::decode(ticket);
    let now = shared.trace.now();
    let started = now.saturating_sub(nanos);
    let mut read = 0;
    let mut written = 0;
    for p in &parts {
        match p.direction {
            Direction::Read => read += p.len as u64,
            Direction::Write => written += p.len as u64,
        }
    }
    {
        let mut inner = shared.inner.lock();
        if read > 0 {
            let busy = inner.busy_read.add(started, now);
            shared.stats.moved(Link::NvmeRead, read, busy);
        }
        if written > 0 {
            let busy = inner.busy_write.add(started, now);
            shared.stats.moved(Link::NvmeWrite, written, busy);
        }
        if let Ticket::Save(number) | Ticket::Load(number) | Ticket::Fault(number) = ticket {
            drop(inner);
            let ends = match ticket {
                Ticket::Save(_) => &shared.saves.reads,
                Ticket::Load(_) => &shared.saves.writes,
                _ => &shared.faults.reads,
            };
            ends.ended(IoCompletion { ticket: u64::from(number), lease, parts, result, nanos });
            return Ok(());
        }
        if let Ticket::Service(number) = ticket {
            inner.service.out = false;
            // Whoever waited for an earlier one has given up: its slot goes back to the pool.
            if number == inner.service.last {
                inner.service.done = Some(IoCompletion { ticket: 0, lease, parts, result, nanos });
            }
            shared.changed.notify_all();
            return Ok(());
        }
        Shared::return_parts(&mut inner, parts);
    }
    result?;
    let disk = shared.disk()?;
    match ticket {
        Ticket::Params(unit) => {
            shared.trace.span("nvme read", "params", u64::from(unit.0), started, read);
            let wanted = shared.inner.lock().machine.wants_params(unit);
            if wanted {
                for (index, section) in shared.layout.unit(unit).sections.iter().enumerate() {
                    if let Some(segment) = disk.map.segment(unit, index, crate::dtype::StateKind::Param) {
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
            shared.happened(&mut inner, |m, out| m.params_read(unit, out))
        }
        Ticket::ReadChunk(unit, index) => {
            shared.trace.span("nvme read", "states", u64::from(unit.0), started, read);
            let chunk = disk.map.chunk(unit, index);
            disk.map.check(&disk.store, &shared.layout, unit, chunk, Direction::Read, lease.bytes())?;
            let mut inner = shared.lock()?;
            Shared::park_chunk(&mut inner, unit, index, lease);
            shared.happened(&mut inner, |m, out| m.chunk_read(unit, index, out))
        }
        Ticket::WriteChunk(unit, index) => {
            shared.trace.span("nvme write", "states", u64::from(unit.0), started, written);
            drop(lease);
            shared.event(|m, out| m.chunk_written(unit, index, out))
        }
        Ticket::Service(_) | Ticket::Save(_) | Ticket::Load(_) | Ticket::Fault(_) => Ok(()),
    }
}

/// Waits for the end of a copy, or of a step.
pub(crate) fn ended(shared: &Shared, link: Link, what: Ended) -> Result<()> {
    let (Ended::Copy(Landing { gate, .. }) | Ended::Step { gate, .. }) = what;
    if let Ended::Copy(Landing { marks, .. }) = &what
        && link == Link::Up
    {
        *shared.paging.lock() = Some(marks.0);
    }
    while !shared.device.block(gate, Duration::from_millis(100))? {
        if shared.inner.lock().closing {
            return Ok(());
        }
    }
    if link == Link::Up {
        *shared.paging.lock() = None;
    }
    match what {
        Ended::Copy(landing) => landed(shared, link, landing),
        Ended::Step { at, .. } => shared.step_ended(at),
    }
}

fn landed(shared: &Shared, link: Link, landing: Landing) -> Result<()> {
    let (from, to) = landing.marks;
    shared.trace.saw(&*shared.device, to)?;
    let nanos = match shared.device.elapsed(from, to)? {
        Elapsed::Nanos(nanos) => u64::try_from(nanos).unwrap_or(0),
        Elapsed::Pending | Elapsed::Lost => {
            shared.stats.lost_one();
            0
        }
    };
    shared.stats.moved(link, landing.bytes, nanos);
    let (track, name) = if link == Link::Up { ("up", "page in") } else { ("down", "gradient") };
    shared.trace.device_span(&*shared.device, track, name, u64::from(landing.unit.0), (from, to), landing.bytes)?;
    if landing.lease.is_some() {
        drop(landing.lease);
        let unit = landing.unit;
        shared.event(|m, out| m.copied(unit, out))?;
    }
    Ok(())
}
