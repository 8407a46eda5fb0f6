//! What the last steps tell of the next one: how fast each portion of an update is made, how long the processor has between the updates of
//! one step and those of the next, and whether the gradients will be clipped.

use crate::{optim::Portion, runtime::update::share::Work};

/// Of the rates and times measured last, the new one counts a fourth.
const NEW: f64 = 0.25;
/// What is left, from step to step, of what callers once waited.
const FORGOTTEN: f64 = 0.98;
/// So many of the last steps tell of clipping; with fewer than [`PATIENCE`] nothing is told.
const HISTORY: u32 = 4;
const PATIENCE: u32 = 3;
/// Bytes of host memory's traffic for a bf16 parameter: all of it in one pass; the weights; what follows them. For what was not measured yet.
const BYTES: [f64; 3] = [26.0, 17.0, 21.0];

/// Measured times.
#[derive(Debug, Default)]
pub(crate) struct Rhythm {
    /// Nanoseconds per element of the whole, the weights, the states.
    nanos: [Option<f64>; 3],
    /// Nanoseconds from the end of one step's updates, but for states that trail, to the beginning of the next one's.
    rest: Option<f64>,
    /// Nanoseconds for which callers waited for states that trailed: since the last step's beginning, and in a step on average.
    waited: u64,
    delay: f64,
    /// States of the last step followed their weights.
    trailed: bool,
    /// Elements that the step at work has updated, and the one before.
    elems: [f64; 2],
    /// When the last piece of a step's update ended.
    ended: u64,
    /// A step was submitted, and no piece of it has begun.
    fresh: bool,
    /// A piece of a step's update is at work.
    at_work: bool,
    /// In which of the last steps the gradients were clipped, a bit each, the last step's the lowest; how many steps there were.
    clipped: u8,
    steps: u32,
}

fn average(old: Option<f64>, new: f64) -> f64 {
    old.map_or(new, |old| old + (new - old) * NEW)
}

#[expect(clippy::cast_precision_loss, reason = "rates are no bookkeeping")]
impl Rhythm {
    /// A step is submitted.
    pub(crate) fn submitted(&mut self) {
        self.fresh = true;
        self.clipped <<= 1;
        self.steps = self.steps.saturating_add(1);
    }

    /// The gradients of the step at work were clipped.
    pub(crate) fn clipped(&mut self) {
        self.clipped |= 1;
    }

    /// A piece of a step's update begins: its inputs are there.
    pub(crate) fn begins(&mut self, now: u64) {
        self.at_work = true;
        if !std::mem::take(&mut self.fresh) {
            return;
        }
        if self.ended > 0 {
            self.rest = Some(average(self.rest, now.saturating_sub(self.ended) as f64));
        }
        self.elems = [0.0, self.elems[0]];
        let waited = std::mem::take(&mut self.waited) as f64;
        // Where states do not follow nothing waits for them: it is tried again after a while.
        self.delay = if std::mem::take(&mut self.trailed) { waited } else { self.delay * FORGOTTEN };
    }

    /// A caller waited for states that trailed.
    pub(crate) fn waited(&mut self, nanos: u64) {
        self.waited += nanos;
    }

    /// It has ended.
    pub(crate) fn ends(&mut self, now: u64) {
        (self.ended, self.at_work) = (now, false);
    }

    /// A set of updates took so long.
    pub(crate) fn ran(&mut self, portion: Portion, done: [Work; 2]) {
        let elems: u64 = done.iter().map(|work| work.elems).sum();
        let worked = || done.iter().filter(|work| work.elems > 0);
        let (Some(begun), Some(ended)) = (worked().map(|w| w.time.0).min(), worked().map(|w| w.time.1).max()) else {
            return;
        };
        let which = match portion {
            Portion::Whole => 0,
            Portion::Weights | Portion::Param => 1,
            Portion::Moments | Portion::States => 2,
        };
        let nanos = ended.saturating_sub(begun) as f64 / elems as f64;
        self.nanos[which] = Some(average(self.nanos[which], nanos));
        self.trailed |= which == 2;
        if self.at_work {
            self.elems[0] += elems as f64;
        }
    }

    /// Nanoseconds per element, measured or told from another portion's.
    fn nanos(&self, which: usize) -> Option<f64> {
        let other = |i: usize| self.nanos[i].map(|nanos| nanos * BYTES[which] / BYTES[i]);
        self.nanos[which].or_else(|| (0..3).find_map(other))
    }

    /// Whether updates should begin before their step, which makes them in vain if its gradients are clipped: then they take the time of
    /// states that trail. What is spared by those that are used must be more than what those in vain cost.
    pub(crate) fn speculation_pays(&self) -> bool {
        let known = self.steps.min(HISTORY);
        let clipped = (self.clipped & ((1 << HISTORY) - 1)).count_ones();
        if clipped == 0 || known < PATIENCE {
            return true;
        }
        let [whole, weights, states] = [0, 1, 2].map(|which| self.nanos(which));
        let (Some(whole), Some(weights), Some(states), Some(rest)) = (whole, weights, states, self.rest) else {
            return clipped < known;
        };
        let elems = self.elems[0].max(self.elems[1]);
        let (spared, cost) = (weights * elems, ((whole + states) * elems - rest).max(0.0));
        f64::from(known - clipped) * spared > f64::from(clipped) * cost
    }

    /// Whether so many steps in a row were clipped that updates ahead, which write to NVMe, would only wear it.
    pub(crate) fn clipped_in_a_row(&self) -> bool {
        self.clipped.trailing_ones() >= PATIENCE
    }

    /// Whether a step is sooner over with its weights first and their states later: what comes later must have gone by the time that the
    /// next step's updates begin, or else delay them, and callers that look at states and gradients before, less than it spares now.
    pub(crate) fn weights_first(&self) -> bool {
        let [whole, weights, states] = [0, 1, 2].map(|which| self.nanos(which));
        let (Some(whole), Some(weights), Some(states), Some(rest)) = (whole, weights, states, self.rest) else {
            return false;
        };
        let elems = self.elems[0].max(self.elems[1]);
        weights * elems + (states * elems).max(rest) + self.delay < whole * elems + rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One step whose updates take `took` nanoseconds for 1000 elements, `rest` after the one before.
    fn step(rhythm: &mut Rhythm, now: &mut u64, portion: Portion, took: u64, rest: u64) {
        rhythm.submitted();
        *now += rest;
        rhythm.begins(*now);
        let work = Work { elems: 1000, bytes: 0, time: (*now, *now + took) };
        rhythm.ran(portion, [work, Work::default()]);
        *now += took;
        rhythm.ends(*now);
    }

    #[test]
    fn weights_come_first_where_there_is_time_for_their_states() {
        for (rest, expected) in [(1_000_000, true), (30_000, true), (20_000, true), (10_000, false), (100, false)] {
            let (mut rhythm, mut now) = (Rhythm::default(), 0);
            assert!(!rhythm.weights_first(), "nothing is known");
            for _ in 0..9 {
                step(&mut rhythm, &mut now, Portion::Whole, 26_000, rest);
            }
            assert_eq!(rhythm.weights_first(), expected, "{rest} ns");
        }
    }

    #[test]
    fn updates_begin_ahead_where_those_in_vain_cost_less_than_the_others_spare() {
        // Which of eight steps are clipped, of which the last four count, the time between updates of 1000 elements that take 26 microseconds, and the answer.
        let cases = [
            (0b0000_0000, 1_000, true),
            (0b1111_0000, 1_000, true),
            (0b0000_1111, 1_000_000, false),
            (0b1111_1110, 1_000_000, true),
            (0b0101_0101, 1_000, false),
            (0b0000_0001, 1_000, true),
            (0b0111_0111, 40_000, false),
            (0b0111_0111, 45_000, true),
        ];
        for (clipped, rest, expected) in cases {
            let (mut rhythm, mut now) = (Rhythm::default(), 0);
            for n in (0..8).rev() {
                step(&mut rhythm, &mut now, Portion::Whole, 26_000, rest);
                if clipped >> n & 1 == 1 {
                    rhythm.clipped();
                }
            }
            assert_eq!(rhythm.speculation_pays(), expected, "{clipped:08b} {rest}");
        }
        let mut rhythm = Rhythm::default();
        rhythm.submitted();
        rhythm.clipped();
        assert!(rhythm.speculation_pays(), "one step tells nothing");
    }

    #[test]
    fn states_do_not_follow_where_callers_wait_for_them() {
        let (mut rhythm, mut now) = (Rhythm::default(), 0);
        let mut one = |rhythm: &mut Rhythm, wait: u64| {
            rhythm.submitted();
            now += 90_000;
            rhythm.begins(now);
            let first = rhythm.weights_first();
            let (portion, took) = if first { (Portion::Param, 17_000) } else { (Portion::Whole, 26_000) };
            rhythm.ran(portion, [Work { elems: 1000, bytes: 0, time: (now, now + took) }, Work::default()]);
            now += took;
            rhythm.ends(now);
            if first {
                let work = Work { elems: 1000, bytes: 0, time: (now, now + 21_000) };
                rhythm.ran(Portion::States, [work, Work::default()]);
                rhythm.waited(wait);
            }
            first
        };
        let made: Vec<bool> = (0..9).map(|_| one(&mut rhythm, 0)).collect();
        assert!(made[2..].iter().all(|&first| first), "{made:?}");
        let made: Vec<bool> = (0..200).map(|_| one(&mut rhythm, 21_000)).collect();
        let tried = made.iter().filter(|&&first| first).count();
        assert!((2..10).contains(&tried), "tried again now and then: {made:?}");
        let made: Vec<bool> = (0..200).map(|_| one(&mut rhythm, 5_000)).collect();
        assert!(made[100..].iter().all(|&first| first), "a short wait is worth it");
    }

    #[test]
    fn what_is_measured_decides() {
        let (mut rhythm, mut now) = (Rhythm::default(), 0);
        for _ in 0..9 {
            step(&mut rhythm, &mut now, Portion::Whole, 26_000, 1_000_000);
        }
        assert!(rhythm.weights_first());
        for _ in 0..9 {
            step(&mut rhythm, &mut now, Portion::Param, 30_000, 1_000_000);
        }
        assert!(!rhythm.weights_first(), "weights alone take longer than all");
    }
}
