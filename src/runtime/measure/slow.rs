//! Slowness on demand, for tests and for `debug.faults`: which resource binds must follow what is made slow.

use std::time::Duration;

use crate::error::{Code, Error, Result};

/// What is slower than it is. Each copy is made so many times, each piece of an update takes so much longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slow {
    /// Copies to the device.
    pub up: u32,
    /// Copies of gradients to the host.
    pub down: u32,
    /// Pieces of updates.
    pub update: Duration,
    /// Copies home of parameters that were updated speculatively.
    pub home: Duration,
    /// States that follow their weights; where it is given, they do so in every step.
    pub states: Option<Duration>,
    /// Gradients that a backward adds to are brought up for it on the host device, too.
    pub sums_up: bool,
}

impl Default for Slow {
    fn default() -> Self {
        Self { up: 1, down: 1, update: Duration::ZERO, home: Duration::ZERO, states: None, sums_up: false }
    }
}

/// The rules of `debug.faults` that hold for one of several ranks: those that begin with `rank N` are for that one.
pub(crate) fn rules_of(text: &str, rank: usize) -> String {
    let one = |rule: &str| {
        let Some((number, rest)) = rule.strip_prefix("rank ").and_then(|rest| rest.split_once(' ')) else {
            return Some(rule.to_owned());
        };
        (number.parse() == Ok(rank)).then(|| rest.to_owned())
    };
    text.split(',').map(str::trim).filter_map(one).collect::<Vec<_>>().join(",")
}

impl Slow {
    /// Takes `up:times=N`, `down:times=N`, `update:delay=Nms`, `home:delay=Nms`, `states:delay=Nms` and `sums:up` out of the rules of `debug.faults`; returns the others too.
    ///
    /// # Errors
    /// `FN-E503` naming the rule.
    pub fn parse(text: &str) -> Result<(Self, String)> {
        let mut slow = Self::default();
        let mut others = Vec::new();
        for rule in text.split(',').map(str::trim).filter(|rule| !rule.is_empty()) {
            let Some(place @ ("up" | "down" | "update" | "home" | "states" | "sums")) = rule.split(':').next() else {
                others.push(rule);
                continue;
            };
            if slow.set(place, &rule[place.len()..]).is_none() {
                return Err(Error::new(Code::PolicyValue, format!("debug.faults: '{rule}' slows nothing down."))
                    .action("Write \"up:times=8\", \"down:times=8\", \"update:delay=20ms\", \"home:delay=20ms\", \"states:delay=20ms\" or \"sums:up\"."));
            }
        }
        Ok((slow, others.join(",")))
    }

    fn set(&mut self, place: &str, rest: &str) -> Option<()> {
        let times = || rest.strip_prefix(":times=")?.parse().ok().filter(|&times| times > 0);
        match place {
            "up" => self.up = times()?,
            "down" => self.down = times()?,
            "sums" => self.sums_up = (rest == ":up").then_some(true)?,
            _ => {
                let delay = rest.strip_prefix(":delay=")?.strip_suffix("ms")?;
                let delay = Duration::from_millis(delay.parse().ok()?);
                match place {
                    "home" => self.home = delay,
                    "states" => self.states = Some(delay),
                    _ => self.update = delay,
                }
            }
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_rules_are_told_from_those_of_disks() {
        let (slow, others) = Slow::parse(
            "read:eio@3, up:times=8,update:delay=20ms, write:short,home:delay=3ms,states:delay=0ms,sums:up",
        )
        .expect("rules");
        let (update, home) = (Duration::from_millis(20), Duration::from_millis(3));
        assert_eq!(slow, Slow { up: 8, down: 1, update, home, states: Some(Duration::ZERO), sums_up: true });
        assert_eq!(others, "read:eio@3,write:short");
        assert_eq!(Slow::parse("").expect("none"), (Slow::default(), String::new()));
        for wrong in ["up:times=0", "up:delay=2ms", "down", "update:delay=2", "update:times=3", "sums:down"] {
            let error = Slow::parse(wrong).expect_err(wrong);
            assert_eq!(error.code(), Code::PolicyValue);
            assert!(error.to_string().contains(wrong), "{error}");
        }
    }
}
