//! Hops that several ranks measure at once. Rank 0 says which and for how long; a round is over when all have answered, so that the next one
//! begins on all together.

use std::{
    rc::Rc,
    time::{Duration, Instant},
};

use crate::{
    bench::{
        Exercise, Interrupt, Options, Progress,
        measure::Planned,
        peers::{Crew, Message},
        setup::Bench,
        stats::Round,
    },
    error::Result,
};

/// How often rank 0 says that it is at work.
const EVERY: Duration = Duration::from_secs(5);

/// Those of the hops that all ranks measure: all but those of disks.
fn shared(planned: &mut [Planned]) -> impl Iterator<Item = &mut Planned> {
    planned.iter_mut().filter(|plan| plan.exercise.is_some() && plan.hop.engine.is_none())
}

fn names(planned: &mut [Planned]) -> Vec<String> {
    shared(planned).map(|plan| plan.hop.name.clone()).collect()
}

/// Waits until all ranks are set up, and lets them take part in each round of the hops that all have.
pub(super) fn join(crew: &Rc<Crew>, planned: &mut [Planned], interrupt: &Interrupt) -> Result<()> {
    let theirs = crew.hear(interrupt, "its memory and its device", |message| match message {
        Message::Ready(hops) => Ok(hops),
        other => Err(other),
    })?;
    crew.compare(&names(planned), &theirs)?;
    for (hop, plan) in shared(planned).enumerate() {
        let (crew, interrupt, name) = (Rc::clone(crew), interrupt.clone(), plan.hop.name.clone());
        plan.exercise =
            plan.exercise.take().map(|own| Box::new(Together { own, hop, name, crew, interrupt }) as Box<dyn Exercise>);
    }
    Ok(())
}

/// What rank 0 does together with the others.
struct Together {
    own: Box<dyn Exercise>,
    hop: usize,
    name: String,
    crew: Rc<Crew>,
    interrupt: Interrupt,
}

impl Exercise for Together {
    fn round(&mut self, time: Duration) -> Result<Round> {
        self.crew.tell(&Message::Measure(self.hop, time))?;
        let own = self.own.round(time)?;
        let what = format!("its round of {}", self.name);
        let mut rounds = self.crew.hear(&self.interrupt, &what, |message| match message {
            Message::Measured(round) => Ok(round),
            other => Err(other),
        })?;
        rounds.insert(0, own);
        Ok(Round::at_once(&rounds))
    }
}

/// Measures what rank 0 asks for, until it asks for nothing more.
///
/// # Errors
/// Those of [`run`](super::run).
pub fn follow(options: &Options, crew: &Crew, interrupt: &Interrupt) -> Result<()> {
    let mut bench = Bench::new(options, interrupt, &mut Silent)?;
    let mut planned = bench.hops()?;
    crew.tell(&Message::Ready(names(&mut planned)))?;
    let mut hops: Vec<&mut Planned> = shared(&mut planned).collect();
    loop {
        let order = crew.hear(interrupt, "what to measure next", |message| match message {
            Message::Measure(hop, time) if hop < hops.len() => Ok(Some((hop, time))),
            Message::End => Ok(None),
            other => Err(other),
        })?;
        let [Some((hop, time))] = order[..] else { break };
        let Some(exercise) = &mut hops[hop].exercise else { break };
        crew.tell(&Message::Measured(exercise.round(time)?))?;
    }
    crew.tell(&Message::Used(bench.watch.used()))
}

/// Ranks besides rank 0 show nothing.
struct Silent;

impl Progress for Silent {
    fn at(&mut self, _: f64, _: &str) {}
}

/// Shows how far it is, and lets the others know now and then that it goes on.
pub(super) struct Telling<'a> {
    crew: &'a Crew,
    shown: &'a mut dyn Progress,
    last: Instant,
}

impl<'a> Telling<'a> {
    pub(super) fn new(crew: &'a Crew, shown: &'a mut dyn Progress) -> Self {
        Self { crew, shown, last: Instant::now() }
    }
}

impl Progress for Telling<'_> {
    fn at(&mut self, done: f64, what: &str) {
        self.shown.at(done, what);
        if self.last.elapsed() > EVERY {
            self.last = Instant::now();
            // A rank that is gone is found at the next round.
            let _ = self.crew.tell(&Message::Busy(what.to_owned()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{peers::tests::two, report::Group};

    /// Rank 0's part of a round, amid which the other rank looks for its order and answers.
    struct Both(Crew);

    impl Exercise for Both {
        fn round(&mut self, time: Duration) -> Result<Round> {
            let heard = self.0.hear(&Interrupt::default(), "an order", Ok)?;
            assert!(
                matches!(heard[..], [Message::Measure(0, of)] if of == time),
                "told before rank 0 begins: {heard:?}"
            );
            self.0.tell(&Message::Measured(Round { bytes: 300, time, ..Round::default() }))?;
            Ok(Round { bytes: 100, time, ..Round::default() })
        }
    }

    #[test]
    fn a_round_begins_on_all_ranks_and_is_the_sum_of_theirs() {
        let [lead, other] = two();
        let lead = Rc::new(lead);
        other.tell(&Message::Ready(vec!["adamw_cpu".to_owned()])).expect("sends");
        let mut planned = vec![
            Planned::skipped("nvme_read", "/nvme", Group::Nvme, Some("no disk".to_owned())),
            Planned::new("adamw_cpu", "2 threads", Group::Host, Both(other)),
        ];
        join(&lead, &mut planned, &Interrupt::default()).expect("both are there");
        let exercise = planned[1].exercise.as_mut().expect("measurable");
        for _ in 0..2 {
            let round = exercise.round(Duration::from_secs(2)).expect("both answer");
            assert_eq!((round.bytes, round.each), (400, vec![50.0, 150.0]));
        }
    }
}
