//! The clock of a round: it runs while the flow is steady, and for whole laps of what is in flight.
//!
//! Disks that answer everything in flight at once let blocks end in bursts. A clock that starts after a burst and stops amid one
//! misses the rest of it: on a virtual disk, with 32 blocks in flight and rounds of 50 ms, a third of the rate.

use std::time::{Duration, Instant};

use crate::bench::stats::Round;

/// A warm-up is never cut short before this.
const SHORT: Duration = Duration::from_millis(50);

/// Measures a steady flow: what ends before the clock starts, or after its time, does not count.
pub(super) struct Clock {
    warm_up: usize,
    /// It stops after a multiple of so many blocks.
    lap: usize,
    time: Duration,
    start: Instant,
    began: Instant,
    /// Bytes moved since the last piece ended.
    moved: u64,
    pub(super) round: Round,
    over: bool,
}

impl Clock {
    /// Starts after `warm_up` blocks, or with the first that ends after `time`.
    pub(super) fn new(warm_up: usize, time: Duration) -> Self {
        Self {
            warm_up,
            lap: 1,
            time,
            start: Instant::now(),
            began: Instant::now(),
            moved: 0,
            round: Round::default(),
            over: false,
        }
    }

    /// Lets it stop only after whole laps of as many blocks as are in flight.
    pub(super) fn in_laps(self, lap: usize) -> Self {
        Self { lap: lap.max(1), ..self }
    }

    /// Whether it runs.
    pub(super) fn is_warm(&self) -> bool {
        self.warm_up == 0
    }

    /// Notes that a piece on its way has moved; it counts when the next one ends.
    pub(super) fn moved(&mut self, bytes: u64) {
        self.moved += bytes;
    }

    /// Notes that a block ended; true if another shall begin.
    pub(super) fn ended(&mut self, bytes: u64, params: u64, nanos: u64) -> bool {
        let moved = std::mem::take(&mut self.moved);
        if self.warm_up > 0 {
            self.warm_up = if self.began.elapsed() > self.time.max(SHORT) { 0 } else { self.warm_up - 1 };
            self.start = Instant::now();
            return true;
        }
        if self.over {
            return false;
        }
        self.round.time = self.start.elapsed();
        self.round.bytes += bytes + moved;
        self.round.params += params;
        self.round.latencies.push(nanos);
        let whole = self.round.latencies.len().is_multiple_of(self.lap);
        // What is so slow does not come in bursts that are short beside the time.
        self.over = self.round.time >= self.time && (whole || self.round.time >= 2 * self.time.max(SHORT));
        !self.over
    }

    /// Lets it run for another block, although its time is over.
    pub(super) fn extend(&mut self) {
        self.over = false;
    }
}

pub(super) fn nanos(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_counts_the_steady_part_only() {
        let mut clock = Clock::new(2, Duration::ZERO);
        assert!(clock.ended(10, 1, 5) && clock.ended(10, 1, 5));
        assert!(!clock.ended(10, 1, 7));
        assert!(!clock.ended(10, 1, 5));
        assert_eq!((clock.round.bytes, clock.round.params, clock.round.latencies.as_slice()), (10, 1, &[7][..]));
    }

    #[test]
    fn bursts_count_as_a_whole_or_not_at_all() {
        let mut clock = Clock::new(4, Duration::ZERO).in_laps(4);
        let bursts = (0..3).map(|_| (0..4).filter(|_| clock.ended(10, 0, 5)).count());
        assert_eq!(bursts.collect::<Vec<_>>(), [4, 3, 0], "warming up, measured, too late");
        assert_eq!(clock.round.bytes, 40);
    }

    #[test]
    fn what_moved_before_the_clock_started_does_not_count() {
        let mut clock = Clock::new(1, Duration::ZERO);
        clock.moved(100);
        assert!(clock.ended(10, 0, 5));
        clock.moved(7);
        assert!(!clock.ended(10, 0, 5));
        assert_eq!(clock.round.bytes, 17);
    }
}
