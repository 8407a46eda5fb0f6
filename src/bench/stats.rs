//! What rounds become: medians, percentiles, and how far apart the rounds lie.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What was moved in one round of a hop.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Round {
    /// Bytes moved while the clock ran.
    pub bytes: u64,
    /// Parameters updated while the clock ran; 0 where a hop updates none.
    pub params: u64,
    /// Bytes that copies carried beside it while the clock ran; 0 where none run beside it.
    pub copied: u64,
    /// How long the clock ran.
    pub time: Duration,
    /// Nanoseconds that each block took from its submission to its completion.
    pub latencies: Vec<u64>,
    /// Bytes per second of each rank, where several measured at once.
    pub each: Vec<f64>,
}

impl Round {
    /// Of ranks that did it at once, for about the same time each: what all moved in the time of the first, at the rate of each.
    pub fn at_once(rounds: &[Self]) -> Self {
        let time = rounds.first().map_or(Duration::ZERO, |round| round.time);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "bytes of a round")]
        let all = |count: fn(&Self) -> u64| (rates(rounds, count).iter().sum::<f64>() * time.as_secs_f64()) as u64;
        Self {
            bytes: all(|round| round.bytes),
            params: all(|round| round.params),
            copied: all(|round| round.copied),
            time,
            latencies: rounds.iter().flat_map(|round| &round.latencies).copied().collect(),
            each: rates(rounds, |round| round.bytes),
        }
    }
}

/// What each round did per second, in units that `count` gives; 0 for a round whose clock did not run.
pub fn rates(rounds: &[Round], count: impl Fn(&Round) -> u64) -> Vec<f64> {
    let rate = |round: &Round| {
        if round.time.is_zero() { 0.0 } else { as_f64(count(round)) / round.time.as_secs_f64() }
    };
    rounds.iter().map(rate).collect()
}

/// The median of what is above zero; none if nothing is.
pub fn median_rate(rates: &[f64]) -> Option<f64> {
    let mut rates: Vec<f64> = rates.iter().copied().filter(|&rate| rate > 0.0).collect();
    rates.sort_by(f64::total_cmp);
    (!rates.is_empty()).then(|| median(&rates))
}

/// How far apart the rounds lie: from the slowest to the fastest, as a part of the median. 0 of none.
///
/// Two runs' medians differ by less, as long as others leave the machine alone or disturb it evenly: with fifteen rounds
/// all but always, with nine in 98 of 100. Few rounds have hardly seen the extremes; below six it is widened.
pub fn spread(rates: &[f64]) -> f64 {
    let moved = || rates.iter().copied().filter(|&rate| rate > 0.0);
    let (low, high) = moved().fold((f64::INFINITY, 0.0), |(low, high), rate| (rate.min(low), rate.max(high)));
    let few = 6.0 / as_f64(moved().count() as u64);
    median_rate(rates).map_or(0.0, |median| few.max(1.0) * (high - low) / median)
}

/// Between which of the rounds the median of any number of such rounds lies, in 95 of 100 cases. Of few rounds, all of them.
pub fn interval(rates: &[f64]) -> Option<(f64, f64)> {
    let mut rates: Vec<f64> = rates.iter().copied().filter(|&rate| rate > 0.0).collect();
    rates.sort_by(f64::total_cmp);
    let n = as_f64(rates.len() as u64);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rank within the list")]
    let left_out = ((n - 1.96 * n.sqrt()) / 2.0).max(0.0) as usize;
    Some((*rates.get(left_out)?, *rates.get(rates.len() - 1 - left_out)?))
}

/// `rates` as a part of `limits`: the median over the rounds of both, each against the one that ran next to it, so that
/// what slowed the machine for a while slowed both. Of the medians, where their numbers differ.
pub fn fraction(rates: &[f64], limits: &[f64]) -> Option<f64> {
    if rates.len() == limits.len() {
        let ratios: Vec<f64> =
            rates.iter().zip(limits).filter(|&(_, &limit)| limit > 0.0).map(|(rate, limit)| rate / limit).collect();
        return median_rate(&ratios);
    }
    Some(median_rate(rates)? / median_rate(limits)?)
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
    fn the_rate_of_ranks_at_once_is_the_sum_of_their_rates() {
        let all = Round::at_once(&[round(100, 1000), round(600, 2000)]);
        assert_eq!((rates(std::slice::from_ref(&all), |r| r.bytes), all.each), (vec![400.0], vec![100.0, 300.0]));
        assert_eq!((all.time, all.latencies), (Duration::from_secs(1), vec![100, 600]));
    }

    #[test]
    fn the_median_is_of_rates_and_not_of_bytes() {
        let rounds = [round(100, 1000), round(100, 500), round(900, 1000), round(1, 0)];
        let of = rates(&rounds, |r| r.bytes);
        assert_eq!(of, [100.0, 200.0, 900.0, 0.0]);
        assert_eq!(median_rate(&of), Some(200.0));
        assert_eq!(median_rate(&rates(&rounds, |r| r.params)), None);
        assert_eq!(median(&[1.0, 2.0, 4.0, 8.0]), 3.0);
    }

    #[test]
    fn a_fraction_is_of_rounds_that_ran_side_by_side() {
        // The machine was half as fast in the second round, for both.
        assert_eq!(fraction(&[9.0, 4.5, 9.0], &[10.0, 5.0, 10.0]), Some(0.9));
        assert_eq!(fraction(&[9.0, 1.0, 8.0], &[10.0]), Some(0.8));
        assert_eq!(fraction(&[], &[10.0]), None);
    }

    /// Rates of `n` rounds: three in ten lose up to half, as beside other work, and all vary by a few percent.
    fn noisy(state: &mut u64, n: usize) -> Vec<f64> {
        let mut uniform = || {
            *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            as_f64(*state >> 40) / as_f64(1 << 24)
        };
        (0..n).map(|_| 1.0 - 0.05 * uniform() - if uniform() < 0.3 { 0.5 * uniform() } else { 0.0 }).collect()
    }

    #[test]
    fn two_runs_differ_less_than_the_spread_they_print() {
        for (rounds, allowed) in [(5, 60), (9, 20), (15, 2)] {
            let mut state = 7;
            let outside = (0..1000).filter(|_| {
                let (one, other) = (noisy(&mut state, rounds), noisy(&mut state, rounds));
                let (a, b) = (median_rate(&one).expect("moved"), median_rate(&other).expect("moved"));
                (a - b).abs() / a > spread(&one)
            });
            let outside = outside.count();
            assert!(outside <= allowed, "{outside} of 1000 with {rounds} rounds");
        }
    }

    #[test]
    fn the_interval_of_a_median_leaves_out_extremes_of_many_rounds() {
        let of = |n: u32| interval(&(1..=n).map(f64::from).collect::<Vec<_>>());
        assert_eq!((of(0), of(1), of(4)), (None, Some((1.0, 1.0)), Some((1.0, 4.0))));
        assert_eq!((of(9), of(15)), (Some((2.0, 8.0)), Some((4.0, 12.0))));
        // The median of other rounds of the same kind lies there.
        let mut state = 11;
        let outside = (0..1000).filter(|_| {
            let (one, other) = (noisy(&mut state, 9), noisy(&mut state, 999));
            let (low, high) = interval(&one).expect("rates");
            !(low..=high).contains(&median_rate(&other).expect("rates"))
        });
        assert!(outside.count() < 70);
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
