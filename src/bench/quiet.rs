//! Whether the machine was quiet: what other processes, and other machines on the same processor, took meanwhile.

use std::time::{Duration, Instant};

use crate::{bench::stats::as_f64, machine::text};

/// Ticks in a second in the files of /proc, on every kernel.
const TICKS: f64 = 100.0;

/// A process that is older than this has done other things before the benchmark.
const OTHER_THINGS: Duration = Duration::from_secs(15);

/// A moment, and what had been used by then.
pub(super) struct Watch {
    since: Instant,
    all: u64,
    own: u64,
}

impl Watch {
    pub(super) fn start() -> Self {
        Self { since: Instant::now(), all: busy(&text("/proc/stat")), own: own(&text("/proc/self/stat")) }
    }

    /// Ticks that this process used since then.
    pub(super) fn used(&self) -> u64 {
        Self::start().own.saturating_sub(self.own)
    }

    /// How many CPUs others kept busy since then, on average; 0 where the kernel does not tell. `ours`: ticks of other ranks.
    pub(super) fn others(&self, ours: u64) -> f64 {
        let now = Self::start();
        let ticks = (now.all - self.all.min(now.all)).saturating_sub(self.used() + ours);
        as_f64(ticks) / TICKS / self.since.elapsed().as_secs_f64().max(1.0 / TICKS)
    }
}

/// How long ago this process was started for this benchmark: the time that Python and torch took counts for the user, too.
/// Zero in a process that did other things before.
pub(super) fn start_up() -> Duration {
    let age = age(&text("/proc/uptime"), &text("/proc/self/stat")).unwrap_or_default();
    if age > OTHER_THINGS { Duration::ZERO } else { age }
}

/// From the seconds since the system started, and the ticks at which the process did.
fn age(uptime: &str, stat: &str) -> Option<Duration> {
    let now: f64 = uptime.split_whitespace().next()?.parse().ok()?;
    let start: u64 = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()?;
    Duration::try_from_secs_f64(now - as_f64(start) / TICKS).ok()
}

/// Why the figures are not to be relied on, if others were in the way.
pub(super) fn doubt(others: f64, cpus: u32) -> Option<String> {
    (others > f64::from(cpus) / 10.0)
        .then(|| format!("other programs or virtual machines kept {others:.1} of {cpus} CPUs busy meanwhile"))
}

/// Ticks of user, nice, system and stolen time in `/proc/stat`. Interrupts are left out: they are mostly our own.
fn busy(stat: &str) -> u64 {
    let numbers: Vec<u64> =
        stat.lines().next().unwrap_or_default().split_whitespace().filter_map(|word| word.parse().ok()).collect();
    [0, 1, 2, 7].iter().filter_map(|&at| numbers.get(at)).sum()
}

/// Ticks of this process and its children that ended, in `/proc/self/stat`.
fn own(stat: &str) -> u64 {
    // After the name, which may hold anything, comes the third field.
    let after = stat.rsplit_once(')').map_or("", |(_, after)| after);
    after.split_whitespace().skip(11).take(4).filter_map(|word| word.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_read_from_the_kernels_texts() {
        assert_eq!(busy("cpu  10 2 30 400 5 6 7 80 9 0\ncpu0 1 1 1 1"), 122);
        assert_eq!(busy(""), 0);
        assert_eq!(own("42 (a ) b) S 1 2 3 4 5 6 7 8 9 10 100 20 3 4 20 0"), 127);
        assert_eq!(own(""), 0);
        let stat = "42 (a ) b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 950 20";
        assert_eq!(age("12.50 3.00", stat), Some(Duration::from_secs(3)));
        assert_eq!(age("1.0 0.0", stat), None);
    }

    #[test]
    fn only_what_matters_is_said() {
        assert_eq!(doubt(0.1, 2), None);
        assert!(doubt(1.4, 2).is_some_and(|doubt| doubt.contains("1.4 of 2 CPUs")));
        // Spinning here is no work of others.
        let watch = Watch::start();
        while watch.since.elapsed().as_millis() < 50 {}
        assert!(watch.others(0) >= 0.0);
    }
}
