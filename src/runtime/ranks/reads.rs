//! Copy on update across ranks: what a save of one rank has yet to read, no other rank overwrites. What is posted for that stands in
//! [`crate::schedule::ranks::posts`], A8; the updates of the rank that saves wait by [`crate::runtime::saving::copy_on_update`].

use crate::{
    error::Result,
    quantities::UnitId,
    runtime::{
        ranks::waits::Seen,
        saving::copy_on_update::{PLAIN, group_of},
        shared::{Shared, waits::Interrupted},
    },
};

impl Shared {
    /// A save of these units begins. The caller holds the lock under which steps are posted.
    pub(crate) fn begin_reads(&self, units: impl Iterator<Item = UnitId>) {
        if let Some(ranks) = &self.ranks {
            units.for_each(|unit| ranks.posts().begin_read(unit.index()));
        }
    }

    /// A group was read.
    pub(crate) fn end_read(&self, group: u32) {
        self.saves.done(group);
        if let Some((ranks, unit)) = self.ranks.as_ref().zip(group.checked_sub(PLAIN + 1)) {
            ranks.posts().end_read(unit as usize);
            ranks.words.ring();
        }
    }

    /// The save needs nothing any more.
    pub(crate) fn end_reads(&self) {
        self.saves.end();
        if let Some(ranks) = &self.ranks {
            self.layout.ids().for_each(|unit| ranks.posts().end_read(unit.index()));
            ranks.words.ring();
        }
    }

    /// Waits until a save under way, of this rank or another one, has read a unit, the update that it waits for included. For what overwrites the
    /// unit beside steps.
    ///
    /// # Errors
    /// An interruption, or why the runtime has failed.
    pub(crate) fn await_read(&self, unit: UnitId, interrupted: Interrupted<'_>) -> Result<()> {
        self.saves.await_read(group_of(unit), interrupted)?;
        let Some(ranks) = &self.ranks else { return Ok(()) };
        let what = format!("its save of '{}'", self.layout.unit(unit).name);
        self.await_ranks(ranks, (&what, None), interrupted, || {
            Ok(ranks.posts().read_by(unit.index(), u64::MAX).map_or(Seen::Done(()), Seen::Waits))
        })
    }
}
