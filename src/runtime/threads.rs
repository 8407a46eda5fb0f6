//! The threads of a runtime: the driver takes completions from the disk, the runner updates, the reapers learn when
//! copies have ended.

use std::{collections::VecDeque, sync::Arc, thread::JoinHandle, time::Duration};

use crossbeam::channel::{Receiver, RecvTimeoutError, select};

use crate::{
    error::{Code, Error, Result},
    io::{Direction, IoCompletion},
    runtime::{
        core::{Landing, RunTask, Shared},
        saves::group_of,
        stats::{Busy, Link},
        ticket::Ticket,
    },
    units::UnitId,
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
        .map_err(|e| Error::new(Code::HostAlloc, format!("thread '{name}' could not be started: {e}.")))
}

/// Starts the runner: it updates what steps ask for, and has nothing of that to do, works ahead.
pub(crate) fn spawn_runner(
    shared: &Arc<Shared>,
    tasks: Receiver<RunTask>,
    ahead: Receiver<UnitId>,
) -> Result<JoinHandle<()>> {
    let shared = Arc::downgrade(shared);
    std::thread::Builder::new()
        .name("funicular-run".to_owned())
        .spawn(move || {
            let mut waiting = VecDeque::new();
            while let Some(task) = next_task(&tasks, &ahead, &mut waiting) {
                let Some(shared) = shared.upgrade() else { return };
                let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| match task {
                    Task::Step(task) => run(&shared, task),
                    Task::Ahead => work_ahead(&shared, &mut waiting),
                }));
                match outcome {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => shared.fail(error),
                    Err(_) => shared.fail(Error::new(Code::Panicked, "thread 'funicular-run' panicked.")),
                }
            }
        })
        .map_err(|e| Error::new(Code::HostAlloc, format!("thread 'funicular-run' could not be started: {e}.")))
}

enum Task {
    Step(RunTask),
    Ahead,
}

/// What to do next: steps first. None when the runtime is gone.
fn next_task(tasks: &Receiver<RunTask>, ahead: &Receiver<UnitId>, waiting: &mut VecDeque<UnitId>) -> Option<Task> {
    while let Ok(unit) = ahead.try_recv() {
        waiting.push_back(unit);
    }
    if !waiting.is_empty() {
        return match tasks.recv_timeout(Duration::ZERO) {
            Ok(task) => Some(Task::Step(task)),
            Err(RecvTimeoutError::Timeout) => Some(Task::Ahead),
            Err(RecvTimeoutError::Disconnected) => None,
        };
    }
    select! {
        recv(tasks) -> task => task.ok().map(Task::Step),
        recv(ahead) -> unit => {
            waiting.push_back(unit.ok()?);
            Some(Task::Ahead)
        }
    }
}

/// Between two looks at a gate that has not passed.
const NAP: Duration = Duration::from_micros(200);

/// One piece of the first unit in line.
fn work_ahead(shared: &Shared, waiting: &mut VecDeque<UnitId>) -> Result<()> {
    let Some(&unit) = waiting.front() else { return Ok(()) };
    match shared.work_ahead(unit) {
        Ok(Some(true)) => {}
        // Gradients arrive in the order of the line: what comes later has not landed either.
        Ok(Some(false)) => std::thread::sleep(NAP),
        Ok(None) => drop(waiting.pop_front()),
        Err(error) => {
            waiting.clear();
            return Err(error);
        }
    }
    Ok(())
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
        Ticket::Service(_) => Ok(()),
    }
}

/// Runs one piece of an update.
pub(crate) fn run(shared: &Shared, task: RunTask) -> Result<()> {
    let RunTask { unit, chunk, mut lease } = task;
    // Copy on update: a save under way reads the unit first.
    shared.saves.preserve(group_of(unit), &mut || false)?;
    let start = shared.trace.now();
    let after = {
        let mut inner = shared.lock()?;
        inner.at_work = Some(unit);
        inner.gates[unit.index()].update
    };
    let bytes = {
        let _at_work = AtWork(shared);
        shared.run_chunk(unit, chunk, after, lease.as_mut())?
    };
    shared.stats.moved(Link::Update, bytes, shared.trace.now().saturating_sub(start));
    shared.trace.span("cpu update", "adamw", u64::from(unit.0), start, bytes);
    let mut inner = shared.lock()?;
    if let Some(lease) = lease {
        Shared::park_chunk(&mut inner, unit, chunk, lease);
    }
    shared.happened(&mut inner, |m, out| m.chunk_ran(unit, chunk, out))?;
    if !inner.machine.update_pending(unit) {
        shared.saves.updated(unit);
    }
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

/// Waits for the end of one copy.
pub(crate) fn land(shared: &Shared, link: Link, busy: &mut Busy, landing: Landing) -> Result<()> {
    while !shared.device.block(landing.gate, Duration::from_millis(100))? {
        if shared.inner.lock().closing {
            return Ok(());
        }
    }
    let nanos = busy.add(landing.start, shared.trace.now());
    shared.stats.moved(link, landing.bytes, nanos);
    let (track, name) = if link == Link::Up { ("up", "page in") } else { ("down", "gradient") };
    shared.trace.span(track, name, u64::from(landing.unit.0), landing.start, landing.bytes);
    if landing.lease.is_some() {
        drop(landing.lease);
        let unit = landing.unit;
        shared.event(|m, out| m.copied(unit, out))?;
    }
    Ok(())
}
