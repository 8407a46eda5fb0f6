//! The models that this process trains with other ranks. A thread that waits in a call of one of them comes to no call of another: those who
//! wait for it there are told.
//!
//! Where several threads of a process come to such calls, a wait of one says nothing of the others, and nothing is told or concluded.

use std::{
    sync::{Arc, Weak},
    thread::{ThreadId, current},
};

use crate::{
    error::Result,
    runtime::{
        handle::Runtime,
        ranks::together::Ranks,
        shared::{
            Shared,
            closed::closed,
            lock_order::{Line, Ordered},
        },
    },
    schedule::ranks::crossed::Call,
};

/// Models of this process, and the threads that have waited in calls.
#[derive(Debug)]
struct Here {
    models: Vec<Weak<Shared>>,
    threads: Vec<ThreadId>,
}

static HERE: Ordered<Here> = Ordered::new(Line::Moment, Here { models: Vec::new(), threads: Vec::new() });

impl Runtime {
    /// Counts the model among those that this process trains with other ranks.
    ///
    /// # Errors
    /// When closed.
    pub fn enlist(&self) -> Result<()> {
        let shared = self.shared.as_ref().ok_or_else(closed)?;
        let mut here = HERE.lock();
        here.models.retain(|model| model.strong_count() > 0);
        here.models.push(Arc::downgrade(shared));
        Ok(())
    }
}

/// Whether this thread is the only one of its process that has come to calls.
pub(super) fn is_only_caller() -> bool {
    let (mut here, this) = (HERE.lock(), current().id());
    // Two are as many as any number.
    if here.threads.len() < 2 && !here.threads.contains(&this) {
        here.threads.push(this);
    }
    here.threads == [this]
}

/// The model of this process whose board has this identity.
pub(super) fn model(identity: u64) -> Option<Arc<Shared>> {
    let is_it = |model: &Arc<Shared>| model.ranks.as_ref().is_some_and(|ranks| ranks.posts().identity() == identity);
    let models: Vec<_> = HERE.lock().models.iter().filter_map(Weak::upgrade).collect();
    models.into_iter().find(is_it)
}

/// Tells that this rank waits in a call, until what this returns is dropped: on its board, and on those of this process's other models.
pub(super) fn enter(ranks: &Ranks, call: Call) -> Inside<'_> {
    let identity = ranks.posts().identity();
    let models: Vec<_> = match is_only_caller() {
        true => HERE.lock().models.iter().filter_map(Weak::upgrade).collect(),
        false => Vec::new(),
    };
    let is_other = |model: &Arc<Shared>| model.ranks.as_ref().is_some_and(|of| of.posts().identity() != identity);
    let others: Vec<_> = models.into_iter().filter(is_other).collect();
    ranks.wait_in(Some(call));
    for other in others.iter().filter_map(|model| model.ranks.as_ref()) {
        other.wait_in(Some(Call::Elsewhere(identity)));
    }
    Inside { ranks, others: others.iter().map(Arc::downgrade).collect() }
}

/// A thread that waits in a call.
pub(super) struct Inside<'a> {
    ranks: &'a Ranks,
    others: Vec<Weak<Shared>>,
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.ranks.wait_in(None);
        for other in self.others.iter().filter_map(Weak::upgrade) {
            other.ranks.iter().for_each(|ranks| ranks.wait_in(None));
        }
    }
}
