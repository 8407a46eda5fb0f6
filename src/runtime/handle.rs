//! One model's runtime as its owner holds it, and how it ends: by a failure, by being closed, in a forked child.

use std::{sync::Arc, thread::JoinHandle};

use crate::{
    device::DeviceKind,
    error::{Error, Result},
    runtime::{
        setup::admission::Running,
        shared::{
            Shared,
            closed::{check_process, closed},
        },
    },
    schedule::{Budgets, ranks::posts::State},
};

/// One model's runtime.
pub struct Runtime {
    pub(super) shared: Option<Arc<Shared>>,
    pub(super) threads: Vec<JoinHandle<()>>,
    pub(super) pid: u32,
    pub(super) budgets: Budgets,
    pub(super) notes: Vec<String>,
    /// The note by which other processes of this machine know of this one.
    pub(super) running: Option<Running>,
}

impl Runtime {
    /// What its threads share with it.
    pub(super) fn shared(&self) -> Result<&Shared> {
        check_process(self.pid)?;
        self.shared.as_deref().ok_or_else(closed)
    }

    /// Makes every later call fail with this error, unless an earlier one does already.
    pub fn fail(&self, error: Error) {
        if let Ok(shared) = self.shared() {
            shared.fail(error);
        }
    }

    /// Records that the caller saw this error. If it is the runtime's failure, intact homes may be read from then on.
    pub fn failure_seen(&self, error: &Error) {
        if let Ok(shared) = self.shared() {
            let mut inner = shared.inner.lock();
            inner.failure_seen |= inner.failed.as_ref().is_some_and(|failed| failed.same(error));
        }
    }

    /// True once it has failed and the caller has seen the failure.
    ///
    /// # Errors
    /// In a forked child, or when closed.
    pub fn failed(&self) -> Result<bool> {
        let inner = self.shared()?.inner.lock();
        Ok(inner.failed.is_some() && inner.failure_seen)
    }

    /// True once the runtime has failed, whether or not the caller has been told.
    pub fn has_failed(&self) -> Result<bool> {
        Ok(self.shared()?.inner.lock().failed.is_some())
    }

    /// Ends the waits of calls under way in other threads, and of later ones, with `FN-E104`; a save under way is given up.
    pub fn shut(&self) {
        if let Ok(shared) = self.shared() {
            shared.finish_parts();
            shared.saves.stop();
            shared.growing.stopped.store(true, std::sync::atomic::Ordering::Relaxed);
            shared.leave_states();
            shared.inner.lock().closing = true;
            shared.changed.notify_all();
            if let Some(ranks) = &shared.ranks {
                ranks.ended(State::Closed, None);
                ranks.release_devices();
            }
        }
    }

    /// Ends everything: waits for copies and I/O in flight, stops the threads, gives memory and disk space back.
    pub fn close(&mut self) {
        if check_process(self.pid).is_err() {
            // A forked child owns neither the threads nor the device.
            std::mem::forget(self.shared.take());
            std::mem::forget(self.running.take());
            self.threads.drain(..).for_each(std::mem::forget);
            return;
        }
        self.running = None;
        self.shut();
        let Some(shared) = self.shared.take() else { return };
        if let Some(ranks) = &shared.ranks {
            shared.end_meetings(ranks);
        }
        shared.device.drain();
        if let Some(shadows) = &shared.homes.shadows {
            shadows.stop();
        }
        if shared.device.kind() == DeviceKind::Host {
            shared.homes.let_fork();
        }
        drop(shared);
        for thread in self.threads.drain(..) {
            if thread.thread().id() != std::thread::current().id() {
                // A panic was reported by the thread itself.
                let _ = thread.join();
            }
        }
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        self.close();
    }
}
