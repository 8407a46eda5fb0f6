//! States that a rank keeps in free memory of its device, where no other rank looks: before one reads or writes them at home, it asks the owners to
//! have them there. An owner answers by its watcher, while its other threads do anything else. What is asked and answered stands in
//! [`crate::schedule::ranks::posts`], A7.

use crate::{
    error::Result,
    quantities::UnitId,
    runtime::{
        ranks::{together::Ranks, waits::Seen},
        shared::{Shared, waits::Interrupted},
    },
    schedule::ranks::posts::State,
};

impl Shared {
    /// Waits until the parts that other ranks own of a unit's states are at home, and, for a writer, stay there until the unit's next update; its
    /// last one is made by all, and no step follows meanwhile.
    pub(crate) fn await_states(&self, unit: UnitId, writes: bool, interrupted: Interrupted<'_>) -> Result<()> {
        let Some(ranks) = &self.ranks else { return Ok(()) };
        let number = ranks.want_states(unit.index(), writes);
        if ranks.posts().away(unit.index(), number).is_none() {
            return Ok(());
        }
        ranks.words.ring();
        let what = format!("its optimizer states of '{}'", self.layout.unit(unit).name);
        self.await_ranks(ranks, (&what, None), interrupted, || {
            Ok(ranks.posts().away(unit.index(), number).map_or(Seen::Done(()), Seen::Waits))
        })
    }

    /// Has this rank's parts of states at home that other ranks want there, and tells them.
    pub(super) fn answer_for_states(&self, ranks: &Ranks) -> Result<()> {
        for unit in self.layout.ids() {
            let Some((number, writes)) = ranks.posts().asked(unit.index()) else { continue };
            // Known to the others, and not here yet: they may be about to change places.
            if ranks.made.lock().iter().any(|made| made.unit == unit) {
                continue;
            }
            if writes {
                // Given back by another thread: the device may wait for a rank of which only this thread learns that it is gone.
                let memory = self.own_states_home(unit)?;
                self.growing.state.lock().spent.extend(memory);
            } else {
                self.own_states_current(unit)?;
            }
            {
                // None moves up meanwhile.
                let _updates = writes.then(|| self.share.lock());
                if writes && self.homes.unit(unit).lifted().is_some() {
                    continue; // It has; the next look finds it.
                }
                ranks.posts().answer(unit.index(), number);
            }
            ranks.words.ring();
        }
        Ok(())
    }

    /// At the end of this rank's model: leaves its states at home, if another rank may want them. What goes wrong leaves them older: then nothing
    /// is said of them.
    pub(crate) fn leave_states(&self) {
        let Some(ranks) = &self.ranks else { return };
        let mut others = (0..ranks.spec.size).filter(|&rank| rank != ranks.spec.rank);
        let failed = self.inner.lock().failed.is_some();
        if failed || !others.any(|rank| ranks.posts().state(rank) == State::Running) {
            return;
        }
        if self.all_down(crate::runtime::growth::record::Why::Off).is_ok() {
            ranks.posts().states_stay();
        }
    }
}

impl Ranks {
    fn want_states(&self, unit: usize, writes: bool) -> u64 {
        // Threads that save and that train may ask at once.
        let _asked = self.text.lock();
        self.posts().want_states(unit, writes)
    }
}
