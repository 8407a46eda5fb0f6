//! Copy on update: which units' bytes a save still needs as they were when it was asked for.
//!
//! A save reads each unit once. What is about to overwrite a unit's parameters or states (an update, an edit) calls
//! [`Saves::preserve`] first, and waits there until that unit has been read: no second copy of the state is ever made.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use parking_lot::Condvar;

use crate::{
    checkpoint::Control,
    error::{Code, Error, Result},
    quantities::UnitId,
    runtime::{
        disk::ends::Ends,
        shared::lock_order::{Line, Ordered},
    },
};

const SLICE: Duration = Duration::from_millis(50);

/// The group of everything that is not in the runtime.
pub(crate) const PLAIN: u32 = 0;

/// The group of a unit.
pub(crate) const fn group_of(unit: UnitId) -> u32 {
    unit.0 + 1
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// The update before the save is still under way: it belongs to what is saved.
    Updating,
    Ready,
    Reading,
    /// Read, or not part of the save.
    Done,
}

#[derive(Debug, Default)]
struct State {
    groups: Vec<Progress>,
    urgent: VecDeque<u32>,
}

/// What the reader of a save does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Read this group.
    Group(u32),
    /// Ask again: updates are under way.
    Later,
    /// All were read.
    Nothing,
}

/// The save under way, if there is one.
#[derive(Debug)]
pub(crate) struct Saves {
    active: AtomicBool,
    state: Ordered<State>,
    changed: Condvar,
    running: Ordered<Option<(Arc<Control>, JoinHandle<()>)>>,
    /// Where the reads of the save under way end, and the writes of a load.
    pub(crate) reads: Ends,
    pub(crate) writes: Ends,
}

impl Default for Saves {
    fn default() -> Self {
        Self {
            active: AtomicBool::new(false),
            state: Ordered::new(Line::Moment, State::default()),
            changed: Condvar::new(),
            running: Ordered::new(Line::Moment, None),
            reads: Ends::default(),
            writes: Ends::default(),
        }
    }
}

impl Saves {
    /// A save begins: per group, whether it is part of it, and whether an update of it is under way. The caller keeps
    /// updates from being submitted meanwhile.
    pub(crate) fn begin(&self, groups: impl Iterator<Item = (bool, bool)>) {
        let mut state = self.state.lock();
        state.urgent.clear();
        state.groups.clear();
        state.groups.extend(groups.map(|(saved, updating)| match (saved, updating) {
            (false, _) => Progress::Done,
            (true, true) => Progress::Updating,
            (true, false) => Progress::Ready,
        }));
        self.active.store(true, Ordering::Release);
    }

    /// Whether there is one that needs something.
    pub(crate) fn active(&self) -> bool {
        self.active.load(Ordering::Acquire)
    }

    /// The save needs nothing any more.
    pub(crate) fn end(&self) {
        self.active.store(false, Ordering::Release);
        self.state.lock().groups.clear();
        self.changed.notify_all();
    }

    /// The update that was under way when the save began is over.
    pub(crate) fn updated(&self, unit: UnitId) {
        if self.active() {
            let mut state = self.state.lock();
            if let Some(progress) = state.groups.get_mut(group_of(unit) as usize).filter(|p| **p == Progress::Updating)
            {
                *progress = Progress::Ready;
                self.changed.notify_all();
            }
        }
    }

    /// Waits until the save under way does not need the unit's bytes any more; at once while the update that it waits for is under way, which is to
    /// write them. For what updates.
    ///
    /// # Errors
    /// `FN-E106` for an interruption.
    pub(crate) fn preserve(&self, group: u32, interrupted: &mut dyn FnMut() -> bool) -> Result<()> {
        self.wait_for_reads(group, |progress| matches!(progress, Progress::Ready | Progress::Reading), interrupted)
    }

    /// Waits until the save under way has read a group, the update that it waits for included.
    ///
    /// # Errors
    /// `FN-E106` for an interruption.
    pub(crate) fn await_read(&self, group: u32, interrupted: &mut dyn FnMut() -> bool) -> Result<()> {
        self.wait_for_reads(group, |progress| *progress != Progress::Done, interrupted)
    }

    fn wait_for_reads(
        &self,
        group: u32,
        needed: fn(&Progress) -> bool,
        interrupted: &mut dyn FnMut() -> bool,
    ) -> Result<()> {
        if !self.active() {
            return Ok(());
        }
        let mut state = self.state.lock();
        while state.groups.get(group as usize).is_some_and(needed) {
            if !state.urgent.contains(&group) {
                state.urgent.push_back(group);
                self.changed.notify_all();
            }
            state.wait_for(&self.changed, SLICE);
            if state.unlocked(&mut *interrupted) {
                return Err(Error::new(Code::Interrupted, "interrupted while waiting for a save to have read a unit."));
            }
        }
        Ok(())
    }

    /// Whether the save under way has yet to read a group: it must not be overwritten. Decided for as long as the caller holds the
    /// runtime's lock.
    pub(crate) fn needs(&self, group: u32) -> bool {
        let wanted = |p: &Progress| *p != Progress::Done;
        self.active() && self.state.lock().groups.get(group as usize).is_some_and(wanted)
    }

    /// Takes the group to be read next: first those that a thread waits for. Waits a moment if there is none yet.
    pub(crate) fn next(&self) -> Next {
        let mut state = self.state.lock();
        let State { groups, urgent } = &mut *state;
        let ready = |groups: &[Progress], g: u32| groups.get(g as usize) == Some(&Progress::Ready);
        while urgent.front().is_some_and(|&g| !ready(groups, g)) {
            urgent.pop_front();
        }
        let first = groups.iter().position(|p| *p == Progress::Ready);
        if let Some(group) = urgent.pop_front().or(first.and_then(|g| u32::try_from(g).ok())) {
            groups[group as usize] = Progress::Reading;
            return Next::Group(group);
        }
        if groups.contains(&Progress::Updating) {
            state.wait_for(&self.changed, SLICE);
            return Next::Later;
        }
        Next::Nothing
    }

    /// A group was read.
    pub(crate) fn done(&self, group: u32) {
        if let Some(progress) = self.state.lock().groups.get_mut(group as usize) {
            *progress = Progress::Done;
        }
        self.changed.notify_all();
    }

    /// Keeps the thread of a save; the one before has ended.
    pub(crate) fn keep(&self, control: &Arc<Control>, thread: JoinHandle<()>) {
        *self.running.lock() = Some((Arc::clone(control), thread));
    }

    /// Waits for the end of the save under way; how it ended is said elsewhere.
    ///
    /// # Errors
    /// `FN-E106` for an interruption.
    pub(crate) fn wait(&self, interrupted: &mut dyn FnMut() -> bool) -> Result<()> {
        // Once more: a signal handler may have begun another meanwhile.
        while let Some(control) = self.under_way() {
            if let Err(e) = control.wait(interrupted)
                && e.code() == Code::Interrupted
            {
                return Err(e);
            }
        }
        Ok(())
    }

    fn under_way(&self) -> Option<Arc<Control>> {
        let running = self.running.lock();
        running.as_ref().filter(|(control, _)| control.outcome().is_none()).map(|(control, _)| Arc::clone(control))
    }

    /// Gives the save under way up and waits for its thread.
    pub(crate) fn stop(&self) {
        let running = self.running.lock().take();
        if let Some((control, thread)) = running {
            control.cancel();
            self.changed.notify_all();
            if thread.thread().id() != std::thread::current().id() {
                // A panic was reported as the outcome.
                let _ = thread.join();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begun(groups: &[(bool, bool)]) -> Saves {
        let saves = Saves::default();
        saves.begin(groups.iter().copied());
        saves
    }

    #[test]
    fn groups_are_read_in_order_and_those_waited_for_first() {
        let saves = Arc::new(begun(&[(true, false), (true, false), (false, false), (true, false)]));
        assert_eq!(saves.next(), Next::Group(0));
        let waiter = {
            let saves = Arc::clone(&saves);
            std::thread::spawn(move || saves.preserve(3, &mut || false))
        };
        while saves.state.lock().urgent.is_empty() {
            std::thread::yield_now();
        }
        saves.done(0);
        assert_eq!(saves.next(), Next::Group(3));
        saves.done(3);
        waiter.join().expect("no panic").expect("was read");
        assert_eq!(saves.next(), Next::Group(1));
        saves.done(1);
        assert_eq!(saves.next(), Next::Nothing);
    }

    #[test]
    fn an_update_under_way_belongs_to_the_save() {
        let saves = begun(&[(true, false), (true, true)]);
        assert_eq!(saves.next(), Next::Group(0));
        saves.done(0);
        assert_eq!(saves.next(), Next::Later);
        saves.preserve(1, &mut || false).expect("the update goes on");
        assert!(saves.await_read(1, &mut || true).is_err(), "what is no update waits for it");
        saves.updated(UnitId(0));
        assert_eq!(saves.next(), Next::Group(1));
        assert!(saves.preserve(1, &mut || true).is_err(), "now the next one waits, and can be interrupted");
    }

    #[test]
    fn a_save_that_begins_during_a_wait_is_waited_for_too() {
        let saves = Saves::default();
        let (first, second) = (Arc::new(Control::default()), Arc::new(Control::default()));
        saves.keep(&first, std::thread::spawn(|| ()));
        let mut looks = 0;
        let waited = saves.wait(&mut || {
            looks += 1;
            if looks == 1 {
                saves.keep(&second, std::thread::spawn(|| ()));
                first.ended(Ok(Vec::new()));
            }
            looks == 2
        });
        assert_eq!(waited.expect_err("the second goes on").code(), Code::Interrupted);
        second.ended(Ok(Vec::new()));
        saves.wait(&mut || true).expect("both have ended");
    }

    #[test]
    fn what_was_read_is_not_needed() {
        let saves = begun(&[(true, false), (true, true), (false, false)]);
        assert_eq!([0, 1, 2, 9].map(|group| saves.needs(group)), [true, true, false, false]);
        assert_eq!(saves.next(), Next::Group(0));
        saves.done(0);
        assert!(!saves.needs(0));
        saves.end();
        assert!(!saves.needs(1));
    }

    #[test]
    fn the_end_releases_all_who_wait() {
        let saves = begun(&[(true, false)]);
        saves.end();
        saves.preserve(0, &mut || true).expect("no save needs it");
        assert_eq!(saves.next(), Next::Nothing);
    }
}
