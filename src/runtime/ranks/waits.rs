//! Waiting for other ranks. A rank that is slow is no failure: such a wait lasts until the others are there, or one of them is gone, or waits
//! for this rank in another call.

use std::time::Instant;

use crate::{
    error::{Code, Error, Result},
    runtime::{
        ranks::{elsewhere, together::Ranks},
        shared::{
            Shared,
            waits::{Interrupted, SLICE},
        },
    },
    schedule::ranks::crossed::Call,
};

/// What a look at the others came to.
pub(crate) enum Seen<T> {
    /// They are all there.
    Done(T),
    /// This rank is not there yet.
    Waits(usize),
}

impl Shared {
    /// Waits until `look` finds all ranks there. `call`: where they have to come for that; none where their threads do it by themselves.
    pub(crate) fn await_ranks<T>(
        &self,
        ranks: &Ranks,
        (what, call): (&str, Option<Call>),
        interrupted: Interrupted<'_>,
        mut look: impl FnMut() -> Result<Seen<T>>,
    ) -> Result<T> {
        let _waiting = ranks.waiting();
        let mut asked = Instant::now();
        // What a rank did before it closed its model counts.
        let mut gone = None;
        let mut inside = None;
        loop {
            let rung = ranks.words.rung();
            let rank = match look()? {
                Seen::Done(value) => return Ok(value),
                Seen::Waits(rank) => rank,
            };
            drop(self.lock()?);
            if let Some(error) = gone.take() {
                return Err(error);
            }
            gone = ranks.closed(rank, what);
            if gone.is_some() {
                continue;
            }
            if let Some(call) = call {
                inside.get_or_insert_with(|| elsewhere::enter(ranks, call));
                self.refuse_crossed(ranks, call)?;
            }
            ranks.words.wait(rung, SLICE);
            if asked.elapsed() >= SLICE {
                asked = Instant::now();
                if interrupted() {
                    let text = format!("interrupted while waiting for {}: {what}.", ranks.name(rank));
                    return Err(Error::new(Code::Interrupted, text));
                }
            }
        }
    }
}
