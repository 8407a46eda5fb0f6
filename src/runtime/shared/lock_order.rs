//! The order in which a thread takes the runtime's locks, checked in debug builds; the table stands in `shared`.

use std::{
    ops::{Deref, DerefMut},
    time::Duration,
};

use parking_lot::{Condvar, Mutex, MutexGuard, WaitTimeoutResult};

/// A line of the table of locks, the outermost first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Line {
    /// `off_step_io`.
    OffStepIo,
    /// `inner`.
    Inner,
    /// One of `jobs`.
    Job,
    /// One of `speculations`.
    Speculation,
    /// `share`.
    Share,
    /// Locks that are held for a moment, with none of these inside.
    Moment,
}

impl Line {
    /// Whether a thread that holds a lock of the line `outer` may take one of this line.
    #[cfg(any(debug_assertions, test))]
    fn may_follow(self, outer: Self) -> bool {
        outer < self && (outer, self) != (Self::Inner, Self::Share)
    }
}

/// A mutex that has its line in the table. In debug builds a thread that takes it against the order panics; release builds look at
/// nothing.
#[derive(Debug)]
pub(crate) struct Ordered<T> {
    mutex: Mutex<T>,
    line: Line,
}

/// The lock of an [`Ordered`], held until this is dropped.
pub(crate) struct OrderedGuard<'a, T> {
    guard: MutexGuard<'a, T>,
    held: Held,
}

impl<T> Ordered<T> {
    pub(crate) const fn new(line: Line, value: T) -> Self {
        Self { mutex: Mutex::new(value), line }
    }

    /// Takes the lock, and waits for it.
    pub(crate) fn lock(&self) -> OrderedGuard<'_, T> {
        let held = Held::new(self.line);
        OrderedGuard { guard: self.mutex.lock(), held }
    }

    /// Takes the lock, and waits for it no longer than so; none if the time is over.
    pub(crate) fn try_lock_for(&self, time: Duration) -> Option<OrderedGuard<'_, T>> {
        let held = Held::new(self.line);
        Some(OrderedGuard { guard: self.mutex.try_lock_for(time)?, held })
    }
}

impl<T> OrderedGuard<'_, T> {
    /// Lets go of the lock until another thread notifies, or the time is over.
    pub(crate) fn wait_for(&mut self, changed: &Condvar, time: Duration) -> WaitTimeoutResult {
        changed.wait_for(&mut self.guard, time)
    }

    /// Lets go of the lock while `f` runs.
    pub(crate) fn unlocked<R>(&mut self, f: impl FnOnce() -> R) -> R {
        self.held.pause();
        let answer = MutexGuard::unlocked(&mut self.guard, f);
        self.held.resume();
        answer
    }
}

impl<T> Deref for OrderedGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> DerefMut for OrderedGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

/// The note of this thread that it holds a lock of some line.
#[cfg(debug_assertions)]
struct Held(Line);

#[cfg(debug_assertions)]
thread_local! {
    /// One bit for each line of which this thread holds a lock: it never holds two of one line.
    static LINES: std::cell::Cell<u8> = const { std::cell::Cell::new(0) };
}

#[cfg(debug_assertions)]
impl Held {
    const ALL: [Line; 6] = [Line::OffStepIo, Line::Inner, Line::Job, Line::Speculation, Line::Share, Line::Moment];

    /// Checks the order before the lock is waited for: a deadlock would show no message.
    fn new(line: Line) -> Self {
        let held = LINES.get();
        let against = |outer: &&Line| held & outer.bit() != 0 && !line.may_follow(**outer);
        if let Some(outer) = Self::ALL.iter().find(against)
            && !std::thread::panicking()
        {
            panic!(
                "a thread that holds the lock {outer:?} takes the lock {line:?}: see the table in runtime/shared/mod.rs"
            );
        }
        LINES.set(held | line.bit());
        Self(line)
    }

    fn pause(&self) {
        LINES.set(LINES.get() & !self.0.bit());
    }

    fn resume(&self) {
        LINES.set(LINES.get() | self.0.bit());
    }
}

#[cfg(debug_assertions)]
impl Line {
    fn bit(self) -> u8 {
        1 << self as u8
    }
}

#[cfg(debug_assertions)]
impl Drop for Held {
    fn drop(&mut self) {
        self.pause();
    }
}

#[cfg(not(debug_assertions))]
struct Held;

#[cfg(not(debug_assertions))]
impl Held {
    #[inline]
    fn new(_: Line) -> Self {
        Self
    }

    #[inline]
    fn pause(&self) {}

    #[inline]
    fn resume(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_that_of_the_table() {
        let may = |outer: Line, inner: Line| inner.may_follow(outer);
        assert!(may(Line::OffStepIo, Line::Inner) && may(Line::Inner, Line::Job) && may(Line::Job, Line::Share));
        assert!(may(Line::Inner, Line::Speculation) && may(Line::Speculation, Line::Share));
        assert!(may(Line::Inner, Line::Moment) && may(Line::Share, Line::Moment));
        assert!(
            !may(Line::Inner, Line::OffStepIo) && !may(Line::Share, Line::Inner) && !may(Line::Moment, Line::Inner)
        );
        assert!(!may(Line::Inner, Line::Share), "a piece of an update is longer than anything under `inner`");
        assert!(!may(Line::Job, Line::Job), "two of one line never together");
    }

    #[cfg(debug_assertions)]
    #[test]
    fn the_wrong_order_is_caught_and_leaves_nothing_held() {
        let (inner, job) = (Ordered::new(Line::Inner, 1), Ordered::new(Line::Job, 2));
        let wrong = || {
            let _job = job.lock();
            drop(inner.lock());
        };
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(wrong)).expect_err("the wrong order");
        let message = caught.downcast_ref::<String>().expect("a message");
        assert!(message.contains("holds the lock Job takes the lock Inner"), "{message}");
        // Both are free, and the right order is none the worse for it.
        let first = inner.lock();
        assert_eq!((*first, *job.lock()), (1, 2));
        drop(first);
        drop(job.lock());
    }

    #[cfg(debug_assertions)]
    #[test]
    fn a_lock_that_is_let_go_of_in_a_wait_is_not_held() {
        let (inner, outer) = (Ordered::new(Line::Inner, ()), Ordered::new(Line::OffStepIo, ()));
        let mut held = inner.lock();
        held.unlocked(|| drop(outer.lock()));
        let wrong = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(outer.lock())));
        assert!(wrong.is_err(), "it is held again");
    }
}
