//! The sweeps: one short round for each point of a curve.

use std::{rc::Rc, sync::Arc};

use crate::{
    bench::{
        Exercise, Interrupt, Progress,
        disk::{Disk, DiskHop, Mix},
        link::{HostMemory, LinkHop, Way},
        memory::{AdamwCpu, Bandwidth},
        report::{Hop, Series, Sweep, find},
        setup::{Bench, IN_FLIGHT, fill_slots},
        stats::{Round, as_f64, median_rate, rates},
    },
    error::Result,
    memory::SlotPool,
    optim::Pool,
    quantities::ByteCount,
};

/// How much faster another block and depth has to be before the report advises to change a setting.
const WORTH_IT: f64 = 1.1;
/// Rounds in turns of the present setting and of the one that may be faster.
const TURNS: usize = 5;

/// A block and depth, and bytes per second with them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Setting {
    pub(super) block: u64,
    /// Per path.
    pub(super) depth: u32,
    pub(super) read: f64,
    pub(super) write: f64,
}

impl Setting {
    /// A step reads as much as it writes.
    fn together(&self) -> f64 {
        2.0 / (1.0 / self.read + 1.0 / self.write)
    }
}

/// What the sweep over the disk says of settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Settings {
    /// No other is faster beyond the noise.
    Best,
    /// The first is faster than the second, in turns.
    Faster(Setting, Setting),
}

impl Bench<'_> {
    /// All sweeps, as far as the time goes, and what they say of settings. `hops` were measured before. A quick run has too few and
    /// too short rounds to say anything.
    pub(super) fn sweeps(
        &mut self,
        hops: &[Hop],
        interrupt: &Interrupt,
        progress: &mut dyn Progress,
    ) -> Result<(Vec<Sweep>, Option<Settings>)> {
        let mut settings = None;
        // Of ranks only rank 0 is here: the others rest.
        let alone = self.options.ranks == 1;
        let mut sweeps = if alone { self.link_sweep(interrupt, progress)? } else { Vec::new() };
        if alone && self.cached.is_none() {
            sweeps.push(self.thread_sweep(interrupt, progress)?);
        }
        if let Some(disk) = &self.disk {
            let which = Self::measurable(disk);
            if !which.is_empty() {
                // First in the report, last in time: on a slow disk they are cut short.
                let swept = self.disk_sweep(disk, &which, interrupt, progress)?;
                if !self.options.quick && !self.is_late() {
                    settings = self.settings(disk, &which, &swept, hops)?;
                }
                sweeps.splice(0..0, swept);
            }
        }
        if self.is_late() {
            self.notes.push("The sweeps were cut short: the time was up.".to_owned());
        }
        sweeps.retain(|sweep| sweep.series.iter().any(|series| !series.points.is_empty()));
        Ok((sweeps, settings))
    }

    /// Whether the fastest point of the sweep is faster than the present setting, also when both are measured in turns: of many points
    /// measured once, the fastest is mostly the luckiest.
    fn settings(&self, disk: &Disk, which: &[usize], swept: &[Sweep], hops: &[Hop]) -> Result<Option<Settings>> {
        let (Some(read), Some(write)) = (find(hops, "nvme_read"), find(hops, "nvme_write")) else { return Ok(None) };
        let (block, depth) = (self.options.block.0, self.options.depth);
        let now = Setting { block, depth, read: read.rate(), write: write.rate() };
        let Some(best) = fastest(swept).filter(|best| best.together() > WORTH_IT * now.together()) else {
            return Ok(Some(Settings::Best));
        };
        // Of both settings, reads and writes.
        let mut rounds = <[[Vec<Round>; 2]; 2]>::default();
        let settings = [best, now];
        let mut hops: Vec<[DiskHop; 2]> =
            settings.iter().map(|setting| self.disk_point(disk, which, setting)).collect::<Result<_>>()?;
        for _ in 0..TURNS {
            for (hops, rounds) in hops.iter_mut().zip(&mut rounds) {
                for (hop, rounds) in hops.iter_mut().zip(rounds) {
                    rounds.push(hop.round(self.options.point)?);
                }
            }
        }
        let again = |n: usize| {
            let rate = |way: usize| median_rate(&rates(&rounds[n][way], |round| round.bytes)).unwrap_or(1.0);
            Setting { read: rate(0), write: rate(1), ..settings[n] }
        };
        let (best, now) = (again(0), again(1));
        Ok(Some(if best.together() > WORTH_IT * now.together() { Settings::Faster(best, now) } else { Settings::Best }))
    }

    /// Reads and writes with a setting.
    fn disk_point(&self, disk: &Disk, which: &[usize], setting: &Setting) -> Result<[DiskHop; 2]> {
        let depth = setting.depth * which.len() as u32;
        let pool = SlotPool::new(2 * depth, ByteCount(setting.block), "the sweep")?;
        fill_slots(&pool);
        let regions = [Arc::clone(pool.region())];
        let block = setting.block as usize;
        let lane = Rc::new(disk.lane(which, self.options.engine, block, depth, &regions)?);
        Ok([Mix::Read, Mix::Write].map(|mix| DiskHop::new(Rc::clone(&lane), pool.clone(), mix, block, depth as usize)))
    }

    /// Whether all the time has been used.
    fn is_late(&self) -> bool {
        self.spent() > self.options.limit
    }

    /// One point; none when the time is up.
    fn point(&self, exercise: &mut dyn Exercise, interrupt: &Interrupt) -> Result<Option<f64>> {
        interrupt.check()?;
        if self.is_late() {
            return Ok(None);
        }
        let round = exercise.round(self.options.point)?;
        Ok(median_rate(&rates(&[round], |round| round.bytes)))
    }

    fn disk_sweep(
        &self,
        disk: &Disk,
        which: &[usize],
        interrupt: &Interrupt,
        progress: &mut dyn Progress,
    ) -> Result<Vec<Sweep>> {
        let (blocks, depths): (&[u64], &[u32]) = if self.options.quick {
            (&[256 << 10, 1 << 20, 4 << 20], &[4, 32])
        } else {
            (&[64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20], &[1, 4, 16, 32, 64])
        };
        let mut sweeps: Vec<Sweep> = [Mix::Read, Mix::Write]
            .map(|mix| Sweep { name: mix.name().to_owned(), over: "block", series: Vec::new() })
            .into();
        for (n, &depth) in depths.iter().enumerate() {
            for sweep in &mut sweeps {
                sweep.series.push(Series { label: format!("depth {depth}"), points: Vec::new() });
            }
            for &block in blocks {
                let in_flight = block * u64::from(depth) * which.len() as u64;
                let fits = in_flight <= IN_FLIGHT.min(disk.file_bytes).min(self.machine.available / 16);
                if !fits || self.is_late() {
                    continue;
                }
                let hops = self.disk_point(disk, which, &Setting { block, depth, read: 0.0, write: 0.0 })?;
                for (sweep, mut hop) in sweeps.iter_mut().zip(hops) {
                    let part = as_f64(n as u64) / as_f64(depths.len() as u64);
                    progress.at(
                        0.82 + 0.18 * part,
                        &format!("sweep of {}, depth {depth}, {}", sweep.name, ByteCount(block)),
                    );
                    if let (Some(rate), Some(series)) = (self.point(&mut hop, interrupt)?, sweep.series.last_mut()) {
                        series.points.push((block, rate));
                    }
                }
            }
        }
        Ok(sweeps)
    }

    fn link_sweep(&self, interrupt: &Interrupt, progress: &mut dyn Progress) -> Result<Vec<Sweep>> {
        const WAYS: [(&str, &[Way]); 3] = [
            ("host_to_device", &[Way::Up]),
            ("device_to_host", &[Way::Down]),
            ("bidirectional", &[Way::Up, Way::Down]),
        ];
        let blocks = [64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20];
        let mut sweep = Sweep { name: "link".to_owned(), over: "block", series: Vec::new() };
        for (name, ways) in WAYS {
            progress.at(0.77, &format!("sweep of {name}"));
            let mut points = Vec::new();
            for block in blocks.into_iter().filter(|&block| self.link.block(block) == block) {
                let mut hop = LinkHop::new(Rc::clone(&self.link), ways, HostMemory::Pinned, block);
                points.extend(self.point(&mut hop, interrupt)?.map(|rate| (block as u64, rate)));
            }
            sweep.series.push(Series { label: name.to_owned(), points });
        }
        Ok(vec![sweep])
    }

    fn thread_sweep(&self, interrupt: &Interrupt, progress: &mut dyn Progress) -> Result<Sweep> {
        let all = self.pool.threads();
        let mut counts: Vec<usize> = (0..12).map(|n| 1 << n).filter(|&n| n < all).collect();
        counts.push(all);
        let mut series = ["triad", "AdamW's arrays in place", "adamw_cpu"]
            .map(|name| Series { label: name.to_owned(), points: Vec::new() });
        for threads in counts {
            progress.at(0.8, &format!("sweep of threads: {threads}"));
            let pool = Arc::new(Pool::new(Some(threads))?);
            let (arrays, states) = (|| Rc::clone(&self.arrays), || Rc::clone(&self.states));
            let mut hops: [Box<dyn Exercise>; 3] = [
                Box::new(Bandwidth::triad(arrays(), states(), Arc::clone(&pool))),
                Box::new(Bandwidth::in_place(arrays(), states(), Arc::clone(&pool))),
                Box::new(AdamwCpu::new(states(), pool)),
            ];
            for (series, hop) in series.iter_mut().zip(&mut hops) {
                series.points.extend(self.point(&mut **hop, interrupt)?.map(|rate| (threads as u64, rate)));
            }
        }
        Ok(Sweep { name: "processor".to_owned(), over: "threads", series: series.into() })
    }
}

/// The point of the sweeps over reads and writes at which both together are fastest.
fn fastest(sweeps: &[Sweep]) -> Option<Setting> {
    let sweep = |mix: Mix| sweeps.iter().find(|sweep| sweep.name == mix.name());
    let (reads, writes) = (sweep(Mix::Read)?, sweep(Mix::Write)?);
    let pairs = reads.series.iter().zip(&writes.series);
    let points = pairs.flat_map(|(reads, writes)| {
        let depth = reads.label.trim_start_matches("depth ").parse().unwrap_or(1);
        let both = reads.points.iter().zip(&writes.points);
        both.map(move |(&(block, read), &(_, write))| Setting { block, depth, read, write })
    });
    points.filter(|at| at.read > 0.0 && at.write > 0.0).max_by(|a, b| a.together().total_cmp(&b.together()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fastest_point_is_that_of_reads_and_writes_together() {
        let sweep = |mix: Mix, points: [&[(u64, f64)]; 2]| Sweep {
            name: mix.name().to_owned(),
            over: "block",
            series: (["depth 4", "depth 32"].into_iter().zip(points))
                .map(|(label, points)| Series { label: label.to_owned(), points: points.to_vec() })
                .collect(),
        };
        let reads = sweep(Mix::Read, [&[(4096, 9.0), (8192, 3.0)], &[(4096, 4.0)]]);
        let writes = sweep(Mix::Write, [&[(4096, 1.0), (8192, 3.0)], &[(4096, 2.0)]]);
        assert_eq!(fastest(&[reads.clone(), writes]), Some(Setting { block: 8192, depth: 4, read: 3.0, write: 3.0 }));
        assert_eq!(fastest(&[reads]), None);
    }
}
