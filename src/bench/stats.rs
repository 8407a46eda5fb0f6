//! What rounds become: medians, percentiles, and how far apart the rounds lie.

use std::time::Duration;

/// What was moved in one round of a hop.
#[derive(Clone, Debug, Default)]
pub struct Round {
    /// Bytes moved while the clock ran.
    pub bytes: u64,
    /// Parameters updated while the clock ran; 0 where a hop updates none.
    pub params: u64,
    /// How long the clock ran.
    pub time: Duration,
    /// Nanoseconds that each block took from its submission to its completion.
    pub latencies: Vec<u64>,
}

/// The rates of several rounds, in units per second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// The median: half of the rounds were faster.
    pub median: f64,
    /// The slowest round.
    pub low: f64,
    /// The fastest round.
    pub high: f64,
}

impl Rates {
    /// Of what `count` gives for each round; none if no round moved anything.
    pub fn of(rounds: &[Round], count: impl Fn(&Round) -> u64) -> Option<Self> {
        let mut rates: Vec<f64> = rounds
            .iter()
            .filter(|round| !round.time.is_zero())
            .map(|round| as_f64(count(round)) / round.time.as_secs_f64())
            .filter(|&rate| rate > 0.0)
            .collect();
        rates.sort_by(f64::total_cmp);
        let (&low, &high) = (rates.first()?, rates.last()?);
        Some(Self { median: median(&rates), low, high })
    }
}

/// The middle of sorted values; the mean of both in the middle of an even number. 0 of none.
pub fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    match sorted {
        [] => 0.0,
        _ if sorted.len() % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

/// The latency in nanoseconds below which `part` (0 to 1) of all blocks of all rounds stay.
pub fn percentile(rounds: &[Round], part: f64) -> Option<u64> {
    let mut all: Vec<u64> = rounds.iter().flat_map(|round| round.latencies.iter().copied()).collect();
    all.sort_unstable();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rank within the list")]
    let rank = (as_f64(all.len() as u64) * part).ceil() as usize;
    all.get(rank.clamp(1, all.len().max(1)) - 1).copied()
}

/// Counts are far below 2^53.
#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
pub(crate) fn as_f64(n: u64) -> f64 {
    n as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(bytes: u64, millis: u64) -> Round {
        Round { bytes, time: Duration::from_millis(millis), latencies: vec![bytes], ..Round::default() }
    }

    #[test]
    fn the_median_is_of_rates_and_not_of_bytes() {
        let rounds = [round(100, 1000), round(100, 500), round(900, 1000)];
        let rates = Rates::of(&rounds, |r| r.bytes).expect("moved");
        assert_eq!((rates.low, rates.median, rates.high), (100.0, 200.0, 900.0));
        assert_eq!(Rates::of(&rounds, |r| r.params), None);
        assert_eq!(Rates::of(&[round(1, 0)], |r| r.bytes), None);
        assert_eq!(median(&[1.0, 2.0, 4.0, 8.0]), 3.0);
    }

    #[test]
    fn percentiles_are_ranks() {
        let rounds: Vec<Round> = (1..=100).map(|n| round(n, 1)).collect();
        assert_eq!(percentile(&rounds, 0.5), Some(50));
        assert_eq!(percentile(&rounds, 0.99), Some(99));
        assert_eq!(percentile(&rounds[..1], 0.99), Some(1));
        assert_eq!(percentile(&[], 0.5), None);
    }
}
