//! Hops and their rounds.

use std::time::Duration;

use crate::{
    bench::{
        Exercise, Interrupt, Progress,
        disk::Lane,
        fio::Fio,
        report::{Figure, Group, Hop},
        setup::Bench,
        stats::{Round, as_f64, median_rate},
    },
    error::Result,
};

/// Rounds are planned to take at least this long, and at most [`LONGEST_ROUND`].
const SHORTEST_ROUND: Duration = Duration::from_millis(50);
const LONGEST_ROUND: Duration = Duration::from_secs(1);
/// Rounds per hop at least, also on a slow disk.
const FEWEST_ROUNDS: u32 = 2;
/// Percent of the whole time by which the rounds have to be over.
const ROUNDS_UNTIL: u32 = 78;

/// A hop and its rounds so far.
pub(super) struct Planned {
    pub(super) hop: Hop,
    pub(super) exercise: Option<Box<dyn Exercise>>,
    pub(super) fio: Option<(Fio, Vec<String>)>,
    rounds: Vec<Round>,
}

impl Planned {
    pub(super) fn new(name: &str, place: &str, group: Group, exercise: impl Exercise + 'static) -> Self {
        Self { exercise: Some(Box::new(exercise)), ..Self::skipped(name, place, group, None) }
    }

    pub(super) fn skipped(name: &str, place: &str, group: Group, why: Option<String>) -> Self {
        let hop = Hop {
            name: name.to_owned(),
            place: place.to_owned(),
            group,
            figure: None,
            skipped: why,
            block: None,
            depth: None,
            engine: None,
            direct: None,
            line_rate: None,
            limit: None,
            fio: None,
            fio_bytes_per_second: None,
            fio_rates: Vec::new(),
        };
        Self { hop, exercise: None, rounds: Vec::new(), fio: None }
    }

    pub(super) fn blocks(mut self, block: u64, depth: usize) -> Self {
        (self.hop.block, self.hop.depth) = (Some(block), Some(depth as u64));
        self
    }

    pub(super) fn through(mut self, lane: &Lane) -> Self {
        (self.hop.engine, self.hop.direct) = (Some(lane.engine().to_owned()), Some(true));
        self
    }

    fn finished(mut self) -> Hop {
        self.hop.figure = Figure::of(&self.rounds);
        self.hop.fio_bytes_per_second = median_rate(&self.hop.fio_rates);
        self.hop
    }
}

impl Bench<'_> {
    /// Round after round over all hops in the order given; the first is for warming up. On a slow disk rounds take
    /// longer than they should, and there are fewer.
    pub(super) fn measure(
        &mut self,
        mut planned: Vec<Planned>,
        interrupt: &Interrupt,
        progress: &mut dyn Progress,
    ) -> Result<Vec<Hop>> {
        let runs = planned.iter().filter(|plan| plan.exercise.is_some()).count().max(1);
        let share = self.options.time / u32::try_from(runs).unwrap_or(1);
        // Rounds that are too short say nothing: there are fewer of them then.
        let in_time = u32::try_from(share.as_nanos() / SHORTEST_ROUND.as_nanos()).unwrap_or(u32::MAX);
        let rounds = self.options.rounds.min(in_time.max(FEWEST_ROUNDS)).max(1);
        let time = (share / rounds).min(LONGEST_ROUND);
        let until = self.options.limit / 100 * ROUNDS_UNTIL;
        // Filling the files has warmed a slow disk up, and took the time.
        let is_slow = self.disk.as_ref().is_some_and(|disk| disk.file_bytes < self.options.file.0 >> 20 << 20);
        let (mut done, all) = (0, runs as u64 * u64::from(rounds));
        for round in 0..=rounds {
            if round > FEWEST_ROUNDS && self.began.elapsed() > until {
                self.notes.push(format!(
                    "{} rounds per hop in place of {rounds}: something is slow here, and the time was up.",
                    round - 1
                ));
                break;
            }
            for plan in &mut planned {
                let Some(exercise) = &mut plan.exercise else { continue };
                interrupt.check()?;
                let what = format!("{} {}", plan.hop.name, plan.hop.place);
                progress.at(0.05 + 0.7 * as_f64(done) / as_f64(all), &what);
                if round == 0 {
                    if !is_slow {
                        exercise.round(time / 8)?;
                    }
                    continue;
                }
                plan.rounds.push(exercise.round(time)?);
                if let Some((fio, files)) = &plan.fio {
                    plan.hop.fio_rates.push(fio.run(files, time)?);
                }
                done += 1;
            }
        }
        let mut hops: Vec<Hop> = planned.into_iter().map(Planned::finished).collect();
        hops.sort_by_key(|hop| hop.group);
        Ok(hops)
    }
}
