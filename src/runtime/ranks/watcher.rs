//! The thread that learns of other ranks: when they have made their parts of an update, and when one of them is gone.

use std::{
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::{
    error::{Code, Error, Result},
    runtime::{
        ranks::together::Ranks,
        shared::{Shared, waits::SLICE},
    },
};

/// Between two looks whether the other processes are there.
const LOOK: Duration = Duration::from_millis(200);

/// Starts the watcher, where there are other ranks; it ends when the runtime closes or is gone.
pub(crate) fn spawn(shared: &Arc<Shared>) -> Result<Option<JoinHandle<()>>> {
    let Some(ranks) = shared.ranks.clone() else { return Ok(None) };
    let shared = Arc::downgrade(shared);
    let name = "funicular-peers";
    let body = move || {
        let mut looked = Instant::now();
        let mut waits_at = None;
        loop {
            let rung = ranks.words.rung();
            let Some(shared) = shared.upgrade() else { return };
            let look = looked.elapsed() >= LOOK;
            if look {
                looked = Instant::now();
            }
            let work = || watch(&shared, &ranks, look, &mut waits_at);
            match std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)) {
                Ok(Ok(true)) => {}
                Ok(Ok(false)) => return,
                Ok(Err(error)) => shared.fail(error),
                Err(_) => shared.fail(Error::new(Code::Panicked, format!("thread '{name}' panicked."))),
            }
            drop(shared);
            ranks.words.wait(rung, SLICE);
        }
    };
    let thread = crate::os_error::start_thread(name, body);
    thread.map(Some).map_err(|e| crate::os_error::no_thread(name, &e, ""))
}

/// Looks once; false if there is nothing more to look for.
fn watch(shared: &Shared, ranks: &Ranks, look: bool, waits_at: &mut Option<(u64, Instant)>) -> Result<bool> {
    {
        let inner = shared.inner.lock();
        if inner.failed.is_some() {
            ranks.release_devices();
            return Ok(true);
        }
        if inner.closing {
            return Ok(false);
        }
    }
    ranks.hurry_meetings(waits_at);
    shared.end_updates(ranks)?;
    shared.answer_for_states(ranks)?;
    match look.then(|| ranks.lost()).flatten() {
        Some(error) => Err(error),
        None => Ok(true),
    }
}
