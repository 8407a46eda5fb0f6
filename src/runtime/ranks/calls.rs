//! What the wrapper asks of a runtime that is one of several ranks.
#![expect(unsafe_code, reason = "passes raw addresses of gradients to the device")]

use std::{ops::Range, os::fd::RawFd, sync::atomic::Ordering};

use crate::{
    device::StreamRef,
    error::{Code, Error, Result},
    optim::MeanPart,
    quantities::UnitId,
    runtime::{
        handle::Runtime,
        measure::stats::Cause,
        paging::landing::Ended,
        ranks::{together::Ranks, waits::Seen},
        shared::{Shared, waits::Interrupted},
    },
    schedule::ranks::{
        crossed::Call,
        owned::owned,
        posts::{Arrival, Line, Look, Misuse},
    },
};

impl Runtime {
    fn together(&self) -> Result<(&Shared, &Ranks)> {
        let shared = self.shared()?;
        let ranks = shared.ranks.as_deref();
        Ok((shared, ranks.ok_or_else(|| Error::argument("the model is not trained by several ranks."))?))
    }

    /// The number of the file that ranks share, to be passed to the others; it stays open as long as the runtime.
    ///
    /// # Errors
    /// Without other ranks, or when closed; so for all calls here.
    pub fn shared_file(&self) -> Result<RawFd> {
        Ok(self.together()?.1.file.number())
    }

    /// The policy with concrete budgets, as JSON: what the other ranks plan with.
    pub fn concrete_policy(&self) -> Result<String> {
        Ok(self.together()?.1.policy.clone())
    }

    /// A digest of what all ranks have alike: version, model, policy, plan.
    pub fn plan_digest(&self) -> Result<u64> {
        let alike = self.together()?.1.alike;
        Ok(alike.iter().fold(0, |all, part| all.rotate_left(17) ^ part))
    }

    /// The elements of each trained section of a unit that a rank owns.
    pub fn owned(&self, unit: UnitId, rank: usize) -> Result<Vec<(usize, Range<u64>)>> {
        let (shared, ranks) = self.together()?;
        if rank >= ranks.spec.size {
            return Err(Error::argument(format!("there is no rank {rank}, of {}.", ranks.spec.size)));
        }
        let sections = shared.layout.unit(unit).sections.iter().enumerate().filter(|(_, section)| section.trainable);
        let (block, size) = (shared.placement.owned_block(unit), ranks.spec.size);
        Ok(sections.map(|(index, section)| (index, owned(section.elems, block, rank, size))).collect())
    }

    /// Posts which gradients of a unit a backward gave this rank: a byte for each parameter, which the other ranks read.
    pub fn post_gradients(&self, unit: UnitId, backward: u64, notes: &[u8]) -> Result<()> {
        let (shared, ranks) = self.together()?;
        drop(shared.lock()?);
        let wrong = |misuse| {
            let name = &shared.layout.unit(unit).name;
            Error::argument(match misuse {
                Misuse::Backward => format!("backward {backward} of '{name}' is not later than the one before."),
                Misuse::Unseen => {
                    format!("what all ranks posted of '{name}' for the backward before {backward} was not asked for.")
                }
                Misuse::Notes => format!("{} notes do not fit the parameters of '{name}'.", notes.len()),
            })
        };
        ranks.posts().post_gradients(unit.index(), backward, notes).map_err(wrong)?;
        ranks.words.ring();
        Ok(())
    }

    /// What all ranks posted of a unit for that backward; none while one has not.
    pub fn posted_gradients(&self, unit: UnitId, backward: u64) -> Result<Option<Vec<Vec<u8>>>> {
        let (shared, ranks) = self.together()?;
        drop(shared.lock()?);
        let mut notes = Vec::new();
        Ok(match shared.notes(ranks, unit, backward, &mut notes)? {
            Seen::Done(()) => Some(notes),
            Seen::Waits(_) => None,
        })
    }

    /// Waits until all ranks have posted their gradients of a unit for that backward.
    pub fn await_gradients(&self, unit: UnitId, backward: u64, interrupted: Interrupted<'_>) -> Result<Vec<Vec<u8>>> {
        let (shared, ranks) = self.together()?;
        let what = format!("its gradients of '{}' from backward {backward}", shared.layout.unit(unit).name);
        let mut notes = Vec::new();
        let call = Some(Call::Gradients(unit.index()));
        shared.await_ranks(ranks, (&what, call), interrupted, || shared.notes(ranks, unit, backward, &mut notes))?;
        Ok(notes)
    }

    /// Makes the mean over so many ranks of parts of gradients, in the order of the user's stream; also without other ranks.
    ///
    /// # Errors
    /// Those of [`crate::optim::mean`], of the device, or when closed.
    ///
    /// # Safety
    /// As for [`crate::optim::mean`], until the stream is past this.
    pub unsafe fn mean_of_ranks(&self, parts: &[MeanPart], ranks: usize, stream: u64) -> Result<()> {
        let shared = self.shared()?;
        drop(shared.lock()?);
        // SAFETY: passed on to the caller.
        unsafe { shared.device.mean(stream, parts, ranks) }
    }

    /// This rank's slices of a unit's gradients, of its last post, are on their way down: the others are told when they are there. To be said
    /// of a unit by all ranks or by none, also by one that owns nothing of it.
    pub fn gradients_sent(&self, unit: UnitId, backward: u64) -> Result<()> {
        let (shared, ranks) = self.together()?;
        let post = ranks.posts().post_of(unit.index(), backward);
        let post = post.ok_or_else(|| Error::argument(format!("{unit} was not posted for backward {backward}.")))?;
        let inner = shared.lock()?;
        let gate = shared.device.record(StreamRef::Down)?;
        shared.send(&shared.to_down, Ended::Slices { unit, post, gate })?;
        drop(inner);
        ranks.sent[unit.index()].store(post, Ordering::Release);
        Ok(())
    }

    /// Waits until the slices of all ranks are in the segments, of all units of which this rank's were sent for that backward.
    pub fn await_landed(&self, backward: u64, interrupted: Interrupted<'_>) -> Result<()> {
        let (shared, ranks) = self.together()?;
        let posts = ranks.posts();
        for unit in shared.layout.ids() {
            let sent = ranks.sent[unit.index()].load(Ordering::Acquire);
            let Some(post) = posts.post_of(unit.index(), backward).filter(|&post| post == sent) else { continue };
            let name = &shared.layout.unit(unit).name;
            let what = format!("its part of the gradients of '{name}' from backward {backward}");
            shared.await_ranks(ranks, (&what, None), interrupted, || {
                Ok(posts.unlanded(unit.index(), post).map_or(Seen::Done(()), Seen::Waits))
            })?;
        }
        Ok(())
    }

    /// Says that this rank is at its step after so many backwards, and waits for the others: none if they all are, else the number of a later
    /// backward that this rank has to join.
    pub fn at_step(&self, backward: u64, interrupted: Interrupted<'_>) -> Result<Option<u64>> {
        let (shared, ranks) = self.together()?;
        if backward > u64::from(u32::MAX) {
            return Err(Error::argument("backwards count from 1."));
        }
        drop(shared.lock()?);
        let posts = ranks.posts();
        posts.arrive(backward);
        ranks.words.ring();
        let what = format!("its step after backward {backward}");
        let next = shared.await_ranks(ranks, (&what, Some(Call::Step)), interrupted, || {
            Ok(match posts.arrived(backward) {
                Arrival::Step => Seen::Done(None),
                Arrival::Join(later) => Seen::Done(Some(later)),
                Arrival::Waits(rank) => Seen::Waits(rank),
            })
        });
        // Others may have waited to see that.
        ranks.words.ring();
        next
    }

    /// Waits until all ranks have come here: `what` names the place, which must be the same for all. `open`: those that have closed their
    /// models count as here.
    pub fn meet(&self, what: &str, open: bool, interrupted: Interrupted<'_>) -> Result<()> {
        let (shared, ranks) = self.together()?;
        drop(shared.lock()?);
        let posts = ranks.posts();
        ranks.say(what);
        let meeting = posts.count(Line::Meetings) + 1;
        posts.post(Line::Meetings, &[twox_hash::XxHash3_64::oneshot(what.as_bytes())]);
        ranks.words.ring();
        let look =
            || if open { posts.look_at_open(Line::Meetings, meeting) } else { posts.look(Line::Meetings, meeting) };
        shared.await_ranks(ranks, (what, Some(Call::Meeting)), interrupted, || match look() {
            Look::All => Ok(Seen::Done(())),
            Look::Waits(rank) => Ok(Seen::Waits(rank)),
            Look::Differs(rank, _) => Err(shared.end_crossed(ranks, Call::Meeting, rank, Call::Meeting)),
        })
    }

    /// An exchange between the devices of all ranks comes next on this stream: it begins when all of them have come to it. `waits`: this one takes
    /// part. Called equally often by all ranks.
    pub fn meet_on_devices(&self, stream: u64, waits: bool) -> Result<()> {
        let (shared, ranks) = self.together()?;
        shared.meet_on_devices(ranks, stream, waits)
    }

    /// From here on the program waits for other ranks, or for bytes of them, of a unit or of all; returns the time.
    pub fn begin_wait(&self, stream: u64, cause: Cause, unit: Option<UnitId>) -> Result<u64> {
        Ok(self.together()?.0.begin_wait(stream, cause, unit))
    }

    /// That wait, which began then, is over; so many bytes came and went in it.
    pub fn end_wait(&self, stream: u64, wait: (Cause, Option<UnitId>), since: u64, bytes: u64) -> Result<()> {
        self.together()?.0.end_wait(stream, wait, since, bytes);
        Ok(())
    }

    /// Looks whether a rank that is to come to a call outside of this model, `place`, waits for this rank in one of the model.
    ///
    /// # Errors
    /// `FN-E706` if it does; or why the model has failed.
    pub fn refuse_call_elsewhere(&self, rank: usize, place: &str) -> Result<()> {
        let (shared, ranks) = self.together()?;
        drop(shared.lock()?);
        shared.refuse_waits_of(ranks, rank, place)
    }

    /// Looks whether another rank is gone. `cut`: a connection to it was, so that one that has closed its model counts.
    ///
    /// # Errors
    /// `FN-E701` when one was killed, has failed, or has closed its model; or why this rank's model has failed.
    pub fn look_at_ranks(&self, cut: bool) -> Result<()> {
        let (shared, ranks) = self.together()?;
        drop(shared.lock()?);
        if !cut {
            return Ok(()); // the watcher has looked
        }
        let closed = || (0..ranks.spec.size).find_map(|rank| ranks.closed(rank, "the connection to it is cut"));
        ranks.lost().or_else(closed).map_or(Ok(()), |error| {
            shared.fail(error.clone());
            Err(error)
        })
    }

    /// Ends this rank's model by an error that the others are told. `backward`: because a backward failed amid the exchange of its gradients.
    pub fn give_up(&self, text: &str, backward: bool) -> Result<()> {
        let code = if backward { Code::RanksBroken } else { Code::RankFailed };
        self.together()?.0.fail(Error::new(code, text));
        Ok(())
    }

    /// Tells the other ranks where this one is, for their messages.
    pub fn tell(&self, text: &str) -> Result<()> {
        self.together()?.1.say(text);
        Ok(())
    }
}

impl Shared {
    fn notes(&self, ranks: &Ranks, unit: UnitId, backward: u64, into: &mut Vec<Vec<u8>>) -> Result<Seen<()>> {
        let posts = ranks.posts();
        let name = &self.layout.unit(unit).name;
        if posts.post_of(unit.index(), backward).is_none() {
            return Err(Error::argument(format!("'{name}' was not posted for backward {backward}.")));
        }
        match posts.gradients(unit.index(), into) {
            Look::All => Ok(Seen::Done(())),
            Look::Waits(rank) => Ok(Seen::Waits(rank)),
            Look::Differs(rank, _) => {
                Err(ranks.differs(rank, &format!("the number of the backward that gave gradients of '{name}'")))
            }
        }
    }
}
