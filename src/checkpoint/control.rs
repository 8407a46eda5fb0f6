//! A save under way, as seen from other threads: how far it is, how it ended, and that it shall stop.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use parking_lot::{Condvar, Mutex};

use crate::error::{Code, Error, Result};

/// Shared between the thread that saves or loads and the threads that watch it.
#[derive(Debug, Default)]
pub struct Control {
    cancelled: AtomicBool,
    done: AtomicU64,
    total: AtomicU64,
    outcome: Mutex<Option<Result<Vec<String>>>>,
    changed: Condvar,
}

impl Control {
    /// Cancels the save; what it has written is removed.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
    }

    /// Fails once the save was cancelled.
    ///
    /// # Errors
    /// `FN-E412`.
    pub fn check(&self) -> Result<()> {
        if !self.cancelled.load(Ordering::Acquire) {
            return Ok(());
        }
        Err(Error::new(Code::CheckpointCancelled, "the save was given up; nothing of it was kept.")
            .action("Earlier checkpoints are whole; save again."))
    }

    /// Sets how many bytes there are in all.
    pub fn expect(&self, total: u64) {
        self.total.store(total, Ordering::Relaxed);
    }

    /// Notes progress.
    pub fn moved(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes done, and bytes in all.
    pub fn progress(&self) -> (u64, u64) {
        (self.done.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed))
    }

    /// Notes the end; the value of a success is notes for the user.
    pub fn ended(&self, outcome: Result<Vec<String>>) {
        self.outcome.lock().get_or_insert(outcome);
        self.changed.notify_all();
    }

    /// How it ended, if it has.
    pub fn outcome(&self) -> Option<Result<Vec<String>>> {
        self.outcome.lock().clone()
    }

    /// Waits for the end; `interrupted` is asked about twenty times a second.
    ///
    /// # Errors
    /// What the save failed with; `FN-E106` for an interruption: the save goes on.
    pub fn wait(&self, interrupted: &mut dyn FnMut() -> bool) -> Result<Vec<String>> {
        loop {
            let mut outcome = self.outcome.lock();
            if outcome.is_none() {
                self.changed.wait_for(&mut outcome, Duration::from_millis(50));
            }
            if let Some(outcome) = &*outcome {
                return outcome.clone();
            }
            drop(outcome);
            if interrupted() {
                return Err(Error::new(Code::Interrupted, "interrupted while waiting for a save."));
            }
        }
    }
}
