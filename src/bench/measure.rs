//! Hops and their rounds.

use std::time::{Duration, Instant};

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

/// Rounds without a disk are planned to take at least this long, and at most [`LONGEST_ROUND`].
const SHORTEST_ROUND: Duration = Duration::from_millis(20);
const LONGEST_ROUND: Duration = Duration::from_millis(350);
/// Rounds with a disk are so many times as long: the limit of a virtual disk's rate lets bursts through, every 100 ms on some.
const WITH_A_DISK: u32 = 3;
/// Rounds per hop at least, also on a slow disk.
const FEWEST_ROUNDS: u32 = 2;
/// Percent of the whole time by which the rounds are to be over, so that there is time for sweeps.
const ROUNDS_UNTIL: u32 = 82;

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

    /// How long a round is, as a multiple of one without a disk.
    fn weight(&self) -> u32 {
        match &self.exercise {
            None => 0,
            Some(_) if self.hop.engine.is_some() => WITH_A_DISK,
            Some(_) => 1,
        }
    }

    fn finished(mut self) -> Hop {
        self.hop.figure = Figure::of(&self.rounds);
        if self.exercise.is_some() && self.rounds.is_empty() {
            self.hop.skipped = Some("not measured: the time was up.".to_owned());
        }
        self.hop.fio_bytes_per_second = median_rate(&self.hop.fio_rates);
        self.hop
    }
}

/// How long rounds are: as planned, or shorter where setting up and slow hops took the time.
struct Pace {
    planned: Duration,
    /// Of all hops together.
    weights: u32,
}

impl Pace {
    /// A round of the next turn, if `left` is to be enough for `turns` turns that each take `more` than their rounds.
    fn round(&self, left: Duration, turns: u32, more: Duration) -> Duration {
        let each = (left / turns.max(1)).saturating_sub(more) / self.weights;
        each.max(SHORTEST_ROUND).min(self.planned)
    }
}

impl Bench<'_> {
    /// Turn after turn over all hops in the order given, a round of each; the first turn is for warming up. Where hops take longer
    /// than their rounds, rounds become shorter; where that is not enough, there are fewer, and on a very slow machine none of some hops.
    pub(super) fn measure(
        &mut self,
        mut planned: Vec<Planned>,
        interrupt: &Interrupt,
        progress: &mut dyn Progress,
    ) -> Result<Vec<Hop>> {
        let weights = planned.iter().map(Planned::weight).sum::<u32>().max(1);
        let share = self.options.time / weights;
        // Rounds that are too short say nothing: there are fewer of them then.
        let in_time = u32::try_from(share.as_nanos() / SHORTEST_ROUND.as_nanos()).unwrap_or(u32::MAX);
        let rounds = self.options.rounds.min(in_time.max(FEWEST_ROUNDS)).max(1);
        let pace = Pace { planned: (share / rounds).min(LONGEST_ROUND), weights };
        let (until, limit) = (self.options.limit / 100 * ROUNDS_UNTIL, self.options.limit);
        // Filling the files has warmed a slow disk up, and took the time.
        let is_slow = self.disk.as_ref().is_some_and(|disk| disk.file_bytes < self.options.file.0 >> 20 << 20);
        let (mut more, mut last) = (Duration::ZERO, Duration::ZERO);
        'turns: for turn in 0..=rounds {
            if turn > FEWEST_ROUNDS && self.spent() + last > limit {
                break;
            }
            let (begun, beside) = (Instant::now(), self.beside);
            let time = pace.round(until.saturating_sub(self.spent()), rounds + 1 - turn, more);
            for (n, plan) in planned.iter_mut().enumerate() {
                let weight = plan.weight();
                let Some(exercise) = &mut plan.exercise else { continue };
                interrupt.check()?;
                match turn {
                    // Too slow for warming up.
                    0 if self.spent() > limit / 4 => break,
                    1 if self.spent() > limit => continue,
                    2.. if self.spent() > limit => break 'turns,
                    _ => {}
                }
                let done = f64::from(turn) + as_f64(n as u64) / as_f64(weights.into());
                progress
                    .at(0.05 + 0.7 * done / f64::from(rounds + 1), &format!("{} {}", plan.hop.name, plan.hop.place));
                if turn == 0 {
                    if !is_slow {
                        exercise.round(time * weight / 8)?;
                    }
                    continue;
                }
                plan.rounds.push(exercise.round(time * weight)?);
                if let Some((fio, files)) = &plan.fio {
                    let begun = Instant::now();
                    plan.hop.fio_rates.push(fio.run(files, time * weight)?);
                    self.beside += begun.elapsed();
                }
            }
            last = begun.elapsed().saturating_sub(self.beside - beside);
            more = last.saturating_sub(if turn == 0 { Duration::ZERO } else { time * weights });
        }
        let measured = || planned.iter().filter(|plan| plan.exercise.is_some()).map(|plan| plan.rounds.len());
        let (least, most) = (measured().min().unwrap_or(0), measured().max().unwrap_or(0));
        if (least as u64) < u64::from(rounds) {
            let made = if least == most { least.to_string() } else { format!("{least} to {most}") };
            let why = "something is slow here, and the time was up";
            self.notes.push(format!("{made} rounds per hop in place of {rounds}: {why}."));
        }
        let mut hops: Vec<Hop> = planned.into_iter().map(Planned::finished).collect();
        hops.sort_by_key(|hop| hop.group);
        Ok(hops)
    }

    /// The time used so far, without what fio took beside it.
    pub(super) fn spent(&self) -> Duration {
        self.began.elapsed().saturating_sub(self.beside)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_become_shorter_before_there_are_fewer() {
        let pace = Pace { planned: Duration::from_millis(40), weights: 10 };
        let round = |left, more| pace.round(Duration::from_millis(left), 5, Duration::from_millis(more)).as_millis();
        assert_eq!(round(60_000, 100), 40, "there is time enough");
        assert_eq!(round(2_000, 100), 30);
        assert_eq!(round(2_000, 390), 20, "and no shorter");
        assert_eq!(round(0, 0), 20);
        assert_eq!(pace.round(Duration::MAX, 5, Duration::ZERO).as_millis(), 40);
    }
}
