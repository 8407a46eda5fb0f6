//! Ranks that wait for each other in different calls: how that is found, and what they are told.

use crate::{
    error::{Code, Error, Result},
    runtime::{
        ranks::{elsewhere, together::Ranks},
        shared::Shared,
    },
    schedule::ranks::{crossed::Call, posts::State},
};

const ALIKE: &str = "Have all ranks make the same calls in the same order (offload, backward and step, load, unwrap; several models in one order), and start them again from the last checkpoint.";

impl Shared {
    /// Ends the model, on all ranks, if one for which this rank waits in a call waits for it in another.
    pub(super) fn refuse_crossed(&self, ranks: &Ranks, call: Call) -> Result<()> {
        let posts = ranks.posts();
        if let Some((rank, theirs)) = posts.crossed(call)
            && posts.state(rank) == State::Running
        {
            return Err(self.end_crossed(ranks, call, rank, theirs));
        }
        for (rank, identity) in posts.elsewhere(call) {
            let Some(other) = elsewhere::model(identity).filter(|_| elsewhere::is_only_caller()) else { continue };
            let Some(its) = other.ranks.as_deref() else { continue };
            let process = posts.process(rank);
            let there = (0..its.spec.size).find(|&r| its.posts().process(r) == process);
            let Some((there, theirs)) = there.and_then(|r| Some((r, its.posts().waits_for_this(r)?))) else { continue };
            let places = [
                format!("{} of one model", self.place_of(ranks, ranks.spec.rank, call)),
                format!("{} of another", other.place_of(its, there, theirs)),
            ];
            let error = ranks.crossed(rank, places);
            other.fail(error.clone());
            self.fail(error.clone());
            return Err(error);
        }
        Ok(())
    }

    /// Ends the model, on all ranks, if this rank waits for another one outside of it, at `place`, which waits for this one in a call.
    pub(super) fn refuse_waits_of(&self, ranks: &Ranks, rank: usize, place: &str) -> Result<()> {
        let posts = ranks.posts();
        let waits = || posts.waits_for_this(rank).filter(|_| posts.state(rank) == State::Running);
        let Some(theirs) = elsewhere::is_only_caller().then(waits).flatten() else { return Ok(()) };
        let error = ranks.crossed(rank, [place.to_owned(), self.place_of(ranks, rank, theirs)]);
        self.fail(error.clone());
        Err(error)
    }

    /// Ends the model by the error of two ranks that are in different calls, of this rank and another one.
    pub(super) fn end_crossed(&self, ranks: &Ranks, call: Call, rank: usize, theirs: Call) -> Error {
        let places = [self.place_of(ranks, ranks.spec.rank, call), self.place_of(ranks, rank, theirs)];
        let error = ranks.crossed(rank, places);
        self.fail(error.clone());
        error
    }

    fn place_of(&self, ranks: &Ranks, rank: usize, call: Call) -> String {
        match call {
            Call::Gradients(unit) => {
                let name = self.layout.units.get(unit).map_or("a unit", |unit| &*unit.name);
                format!("in a backward for gradients of '{name}'")
            }
            Call::Step => format!("at its step after backward {}", ranks.posts().step_after(rank)),
            Call::Meeting => format!("in '{}'", ranks.posts().said(rank).unwrap_or_default()),
            Call::Elsewhere(_) => "in a call".to_owned(),
        }
    }
}

impl Ranks {
    /// The error of this rank and another one, which wait for each other at these places.
    fn crossed(&self, rank: usize, [here, there]: [String; 2]) -> Error {
        let mut all = [(self.spec.rank, here), (rank, there)];
        all.sort();
        let [(first, at), (second, there)] = all;
        let text = format!(
            "{} waits {at}, and {} {there}: each for the other, which does not come there.",
            self.name(first),
            self.name(second)
        );
        Error::new(Code::RanksCrossed, text).action(ALIKE)
    }
}
