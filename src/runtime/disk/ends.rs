//! Where requests end that neither steps nor a single wait have begun.

use std::sync::atomic::{AtomicU32, Ordering};

use crossbeam::channel::{Receiver, Sender, unbounded};

use crate::{
    io::IoCompletion,
    runtime::shared::lock_order::{Line, Ordered},
};

/// The receiver of the completions of such requests, and their numbers.
#[derive(Debug)]
pub(crate) struct Ends {
    to: Ordered<Option<Sender<IoCompletion>>>,
    number: AtomicU32,
}

impl Default for Ends {
    fn default() -> Self {
        Self { to: Ordered::new(Line::Moment, None), number: AtomicU32::new(0) }
    }
}

impl Ends {
    /// Makes a new receiver; the one before gets no more.
    pub(crate) fn open(&self) -> Receiver<IoCompletion> {
        let (sender, receiver) = unbounded();
        *self.to.lock() = Some(sender);
        receiver
    }

    /// A number that no other request has used.
    pub(crate) fn number(&self) -> u32 {
        self.number.fetch_add(1, Ordering::Relaxed)
    }

    /// A request has ended.
    pub(crate) fn ended(&self, done: IoCompletion) {
        if let Some(to) = &*self.to.lock() {
            // The receiver is gone if its owner has given up: the request's memory is dropped.
            let _ = to.send(done);
        }
    }
}
