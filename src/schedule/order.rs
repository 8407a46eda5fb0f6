//! Which unit comes next: learned from what followed what, a hint and never an assertion.

use std::collections::HashMap;

use crate::units::UnitId;

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
}

impl Order {
    /// Notes that `unit` is opened now.
    pub fn saw(&mut self, phase: Phase, unit: UnitId) {
        let token = Token { phase, unit };
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

    /// Appends the units that are expected next, in order, without the one open now, until `enough` says so or
    /// the table knows no further. The same unit appears once, at its first expected use.
    pub fn upcoming(&self, mut enough: impl FnMut(UnitId) -> bool, out: &mut Vec<UnitId>) {
        let Some(mut last) = self.last else { return };
        let mut before = self.before;
        let open = last.unit;
        for _ in 0..4 * self.singles.len() {
            let next = before.and_then(|b| self.pairs.get(&(b, last))).or_else(|| self.singles.get(&last));
            let Some(&next) = next else { return };
            before = Some(last);
            last = next;
            if next.unit == open || out.contains(&next.unit) {
                continue;
            }
            if enough(next.unit) {
                return;
            }
            out.push(next.unit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expected(order: &Order, n: usize) -> Vec<u32> {
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
        assert_eq!(expected(&order, 3), [1, 2, 3]);
        order.saw(Phase::Forward, UnitId(1));
        order.saw(Phase::Forward, UnitId(2));
        order.saw(Phase::Forward, UnitId(3));
        assert_eq!(expected(&order, 3), [2, 1, 0], "after the last of the forward comes the backward");
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
        assert_eq!(expected(&order, 1), [1]);
        order.saw(Phase::Eval, UnitId(1));
        order.saw(Phase::Eval, UnitId(9));
        assert_eq!(expected(&order, 1), [2]);
    }

    #[test]
    fn nothing_learned_means_nothing_expected() {
        let mut order = Order::default();
        order.saw(Phase::Forward, UnitId(0));
        assert!(expected(&order, 3).is_empty());
    }
}
