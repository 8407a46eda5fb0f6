//! How a runtime ends: by a failure, by being closed, in a forked child.

use crate::runtime::Runtime;
use crate::{
    device::DeviceKind,
    error::{Code, Error, Result},
};

impl Runtime {
    /// Makes every later call fail with this error, unless an earlier one does already.
    pub fn fail(&self, error: Error) {
        if let Ok(shared) = self.shared() {
            shared.fail(error);
        }
    }

    /// Notes that the caller sees this error: once it was the runtime's failure, what is intact may be read.
    pub fn told(&self, error: &Error) {
        if let Ok(shared) = self.shared() {
            let mut inner = shared.inner.lock();
            inner.told |= inner.failed.as_ref().is_some_and(|failed| failed.same(error));
        }
    }

    /// True once it has failed and the caller has been told.
    ///
    /// # Errors
    /// In a forked child, or when closed.
    pub fn failed(&self) -> Result<bool> {
        let inner = self.shared()?.inner.lock();
        Ok(inner.failed.is_some() && inner.told)
    }

    /// Ends the waits of calls under way in other threads, and of later ones, with `FN-E104`; a save under way is given up.
    pub fn shut(&self) {
        if let Ok(shared) = self.shared() {
            shared.saves.stop();
            shared.inner.lock().closing = true;
            shared.changed.notify_all();
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

/// Fails in a process that was forked from the one of this number.
///
/// # Errors
/// `FN-E103`.
pub fn check_process(pid: u32) -> Result<()> {
    if std::process::id() == pid {
        return Ok(());
    }
    Err(Error::new(Code::Forked, "the model was offloaded by the parent of this process.")
        .action("Use the model in the process that offloaded it; in a child, load a copy."))
}

/// The error of a call after the end.
pub fn closed() -> Error {
    Error::new(Code::Closed, "the runtime is closed.").action("Offload the model again.")
}
