//! The other ranks as this one sees them: where they are, whether they are still there, and what is said of one that is not.

use crate::{
    error::{Code, Error},
    machine::began,
    runtime::ranks::together::Ranks,
    schedule::ranks::posts::State,
};

impl Ranks {
    /// A rank's name in messages.
    pub(crate) fn name(&self, rank: usize) -> String {
        match self.posts().process(rank).0 {
            0 => format!("rank {rank} (not there yet)"),
            pid => format!("rank {rank} (process {pid})"),
        }
    }

    /// What a rank said of where it is, in brackets.
    pub(crate) fn place(&self, rank: usize) -> String {
        let said = self.posts().said(rank).filter(|text| !text.is_empty());
        said.map(|text| format!(", {text}")).unwrap_or_default()
    }

    /// The error of a rank that has failed, or whose process is gone while it was at work.
    pub(crate) fn lost(&self) -> Option<Error> {
        let others = || (0..self.spec.size).filter(|&rank| rank != self.spec.rank);
        // A rank that was killed is why others fail.
        others().find_map(|rank| self.killed(rank)).or_else(|| others().find_map(|rank| self.failed(rank)))
    }

    fn killed(&self, rank: usize) -> Option<Error> {
        let (pid, started) = self.posts().process(rank);
        let pid = u32::try_from(pid).ok().filter(|&pid| pid > 0)?;
        if self.posts().state(rank) != State::Running || began(pid) == Some(started) {
            return None;
        }
        // It may have closed its model and ended meanwhile.
        (self.posts().state(rank) == State::Running).then(|| {
            let text = format!(
                "{} ended without closing its model{}. It was killed, or its process was left without an end of Python.",
                self.name(rank),
                self.place(rank)
            );
            Error::new(Code::PeerLost, text).action(RESTART)
        })
    }

    fn failed(&self, rank: usize) -> Option<Error> {
        (self.posts().state(rank) == State::Failed).then(|| {
            let why = self.posts().said(rank).unwrap_or_default();
            let crossed = Code::RanksCrossed.as_str();
            if let Some(rest) = why.strip_prefix(crossed) {
                // All of them are told the same.
                return Error::new(Code::RanksCrossed, rest.trim_start());
            }
            let own = Code::PeerLost.as_str();
            let text = match why.strip_prefix(own) {
                // It only follows a third rank.
                Some(rest) => rest.trim_start().to_owned(),
                None => format!("{} failed: {why}", self.name(rank)),
            };
            Error::new(Code::PeerLost, text)
        })
    }

    /// The error of a wait for a rank that has closed its model.
    pub(crate) fn closed(&self, rank: usize, what: &str) -> Option<Error> {
        (self.posts().state(rank) == State::Closed).then(|| {
            let text = format!("{} has closed its model, and this rank waits for it: {what}.", self.name(rank));
            Error::new(Code::PeerLost, text).action(
                "Look at that rank's own output first: a program that ends by an error closes its model. Else have all ranks do the same steps, and end together: read a weight, save, or call funicular.unwrap on each of them.",
            )
        })
    }

    /// The error of ranks that do not agree.
    pub(crate) fn differs(&self, rank: usize, what: &str) -> Error {
        let text = format!("rank {} and {} differ: {what}.", self.spec.rank, self.name(rank));
        Error::new(Code::RanksDiffer, text).action("All ranks must take the same steps, with the same hyperparameters.")
    }
}

const RESTART: &str = "Look at that rank's own output first. Start all ranks again from the last checkpoint.";
