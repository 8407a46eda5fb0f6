//! Which unit comes next: learned from the order of past openings; a hint that may be wrong.

use std::collections::HashMap;

use crate::quantities::UnitId;

/// In which part of a step a unit is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Forward with gradients recorded.
    Forward,
    /// Backward.
    Backward,
    /// Forward without gradients.
    Eval,
}

/// One opening of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Token {
    phase: Phase,
    unit: UnitId,
}

/// A table of what followed a pair of openings, else a single one, the last time.
#[derive(Debug, Default)]
pub struct Order {
    pairs: HashMap<(Token, Token), Token>,
    singles: HashMap<Token, Token>,
    last: Option<Token>,
    before: Option<Token>,
    /// Per unit, the last listing it was in; 0 for one never opened.
    listed: Vec<u64>,
    listing: u64,
    /// Units ever opened.
    known: usize,
}

impl Order {
    /// Notes that `unit` is opened now.
    pub fn saw(&mut self, phase: Phase, unit: UnitId) {
        let token = Token { phase, unit };
        if self.listed.len() <= unit.index() {
            self.listed.resize(unit.index() + 1, 0);
        }
        if self.listed[unit.index()] == 0 {
            self.listing += 1;
            self.listed[unit.index()] = self.listing;
            self.known += 1;
        }
        if self.last == Some(token) {
            return;
        }
        if let Some(last) = self.last {
            self.singles.insert(last, token);
            if let Some(before) = self.before {
                self.pairs.insert((before, last), token);
            }
        }
        self.before = self.last;
        self.last = Some(token);
    }

    /// Appends the units that are expected next, in order, until `enough` says so or the table knows no further. The same
    /// unit appears once, at its first expected use: also the one open now, which the turn-around needs again at once.
    pub fn upcoming(&mut self, mut enough: impl FnMut(UnitId) -> bool, out: &mut Vec<UnitId>) {
        let Some(mut last) = self.last else { return };
        let mut before = self.before;
        self.listing += 1;
        let mut left = self.known;
        // A walk that goes in circles without meeting all units ends with the table.
        for _ in 0..=self.pairs.len() {
            let next = before.and_then(|b| self.pairs.get(&(b, last))).or_else(|| self.singles.get(&last));
            let Some(&next) = next else { return };
            before = Some(last);
            last = next;
            let listed = &mut self.listed[next.unit.index()];
            if *listed == self.listing {
                continue;
            }
            *listed = self.listing;
            if enough(next.unit) {
                return;
            }
            out.push(next.unit);
            left -= 1;
            if left == 0 {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expected(order: &mut Order, n: usize) -> Vec<u32> {
        let mut out = Vec::new();
        let mut left = n;
        order.upcoming(
            |_| {
                left = left.saturating_sub(1);
                left == usize::MAX
            },
            &mut out,
        );
        out.truncate(n);
        out.iter().map(|u| u.0).collect()
    }

    #[test]
    fn knows_the_turn_around_after_one_step() {
        let mut order = Order::default();
        for _ in 0..2 {
            for u in 0..4 {
                order.saw(Phase::Forward, UnitId(u));
            }
            for u in (0..4).rev() {
                order.saw(Phase::Backward, UnitId(u));
            }
        }
        order.saw(Phase::Forward, UnitId(0));
        assert_eq!(expected(&mut order, 3), [1, 2, 3]);
        order.saw(Phase::Forward, UnitId(1));
        order.saw(Phase::Forward, UnitId(2));
        order.saw(Phase::Forward, UnitId(3));
        assert_eq!(expected(&mut order, 4), [3, 2, 1, 0], "after the last of the forward comes its own backward");
    }

    #[test]
    fn a_unit_used_twice_is_told_apart_by_what_came_before() {
        let mut order = Order::default();
        for _ in 0..3 {
            for u in [0, 9, 1, 9, 2] {
                order.saw(Phase::Eval, UnitId(u));
            }
        }
        order.saw(Phase::Eval, UnitId(0));
        order.saw(Phase::Eval, UnitId(9));
        assert_eq!(expected(&mut order, 1), [1]);
        order.saw(Phase::Eval, UnitId(1));
        order.saw(Phase::Eval, UnitId(9));
        assert_eq!(expected(&mut order, 1), [2]);
    }

    #[test]
    fn every_unit_is_listed_once_at_its_first_use() {
        let mut order = Order::default();
        for _ in 0..2 {
            for u in [0, 1, 2, 1, 0] {
                order.saw(Phase::Forward, UnitId(u));
            }
        }
        assert_eq!(expected(&mut order, 9), [1, 2, 0], "0 follows itself: the same opening told twice counts once");
    }

    #[test]
    fn a_detour_is_forgotten_when_the_usual_way_is_taken_again() {
        let mut order = Order::default();
        let mut step = |units: &[u32]| units.iter().for_each(|&u| order.saw(Phase::Eval, UnitId(u)));
        step(&[0, 1, 2, 0, 1, 2]);
        step(&[0, 2]);
        step(&[0, 1]);
        assert_eq!(expected(&mut order, 2), [2, 0]);
    }

    #[test]
    fn phases_are_told_apart() {
        let mut order = Order::default();
        for _ in 0..2 {
            for (phase, units) in [(Phase::Eval, [0, 2, 1]), (Phase::Forward, [0, 1, 2])] {
                units.iter().for_each(|&u| order.saw(phase, UnitId(u)));
            }
        }
        order.saw(Phase::Eval, UnitId(0));
        assert_eq!(expected(&mut order, 2), [2, 1]);
    }

    #[test]
    fn nothing_learned_means_nothing_expected() {
        let mut order = Order::default();
        order.saw(Phase::Forward, UnitId(0));
        assert!(expected(&mut order, 3).is_empty());
    }
}
