//! Faults on demand, for tests and for `debug.faults`: the engines ask here before each block they begin.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use parking_lot::Mutex;

use super::Direction;
use crate::error::{Code, Error, Result};

fn parse_rule(text: &str) -> Option<Rule> {
    let (direction, rest) = text.split_once(':')?;
    let direction = match direction {
        "read" => Direction::Read,
        "write" => Direction::Write,
        _ => return None,
    };
    let (kind, place) = rest.split_once('@').unwrap_or((rest, "1"));
    let (first, times) = place.split_once('x').unwrap_or((place, "1"));
    let fault = match kind.split_once('=') {
        None => match kind {
            "eio" => Fault::Errno(libc::EIO),
            "enospc" => Fault::Errno(libc::ENOSPC),
            "short" => Fault::Short(4096),
            "flip" => Fault::FlipBit,
            "lost" => Fault::Lost,
            _ => return None,
        },
        Some(("delay", time)) => Fault::Delay(Duration::from_millis(time.strip_suffix("ms")?.parse().ok()?)),
        Some(_) => return None,
    };
    Some(Rule { direction, first: first.parse().ok()?, times: times.parse().ok()?, fault })
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing is transferred and the system reports this error number.
    Errno(i32),
    /// At most this many bytes are transferred.
    Short(usize),
    /// The first byte read has a bit flipped. No effect on writes.
    FlipBit,
    /// Success is reported and nothing is transferred.
    Lost,
    /// The block takes this much longer.
    Delay(Duration),
}

/// Applies a fault to blocks `first .. first + times` of a direction, counted from 1 since the rule was added; every
/// block begun counts, retries too.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// Reads or writes.
    pub direction: Direction,
    /// The first block it applies to, from 1.
    pub first: u64,
    /// To how many.
    pub times: u64,
    /// What happens.
    pub fault: Fault,
}

/// The rules in force, shared by the code that injects faults and the engine. Costs one relaxed load per block while
/// there are none.
#[derive(Debug, Default)]
pub struct Faults {
    on: AtomicBool,
    rules: Mutex<Vec<(Rule, u64)>>,
}

impl Faults {
    /// Reads rules as `debug.faults` writes them: `read:eio@3`, `write:enospc@2x5`, `read:short`, `read:flip`,
    /// `write:lost`, `read:delay=20ms`, separated by commas. `@N` is the first block (1), `xN` how many (1).
    ///
    /// # Errors
    /// `FN-E503` naming the rule.
    pub fn parse(text: &str) -> Result<Self> {
        let faults = Self::default();
        for rule in text.split(',').map(str::trim).filter(|r| !r.is_empty()) {
            faults.add(parse_rule(rule).ok_or_else(|| {
                Error::new(Code::PolicyValue, format!("debug.faults: '{rule}' is not a fault."))
                    .action("Write direction:kind@first, such as \"read:eio@3\" or \"write:enospc@2x5\".")
            })?);
        }
        Ok(faults)
    }

    /// Adds a rule.
    pub fn add(&self, rule: Rule) {
        self.rules.lock().push((rule, 0));
        self.on.store(true, Ordering::Relaxed);
    }

    /// Removes all rules.
    pub fn clear(&self) {
        self.on.store(false, Ordering::Relaxed);
        self.rules.lock().clear();
    }

    /// What shall happen to the block about to begin. With several rules that apply, the one added first.
    pub(super) fn next(&self, direction: Direction) -> Option<Fault> {
        if !self.on.load(Ordering::Relaxed) {
            return None;
        }
        let mut hit = None;
        for (rule, seen) in self.rules.lock().iter_mut().filter(|(rule, _)| rule.direction == direction) {
            *seen += 1;
            if *seen >= rule.first && *seen - rule.first < rule.times {
                hit = hit.or(Some(rule.fault));
            }
        }
        hit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_applies_to_its_blocks_and_direction_only() {
        let faults = Faults::default();
        assert_eq!(faults.next(Direction::Read), None);
        faults.add(Rule { direction: Direction::Read, first: 2, times: 2, fault: Fault::Errno(5) });
        let mut hits = Vec::new();
        for _ in 0..5 {
            assert_eq!(faults.next(Direction::Write), None);
            hits.push(faults.next(Direction::Read).is_some());
        }
        assert_eq!(hits, [false, true, true, false, false]);
        faults.clear();
        assert_eq!(faults.next(Direction::Read), None);
    }
}
