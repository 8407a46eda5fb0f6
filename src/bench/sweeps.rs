//! The sweeps: one short round for each point of a curve.

use std::{rc::Rc, sync::Arc};

use crate::{
    bench::{
        Exercise, Interrupt, Progress,
        disk::{Disk, DiskHop, Mix},
        link::{HostMemory, LinkHop, Way},
        memory::{AdamwCpu, Bandwidth},
        report::{Series, Sweep},
        setup::{Bench, IN_FLIGHT, fill_slots},
        stats::{as_f64, median_rate, rates},
    },
    error::Result,
    memory::SlotPool,
    optim::Pool,
    units::ByteCount,
};

impl Bench<'_> {
    /// All sweeps, as far as the time goes.
    pub(super) fn sweeps(&mut self, interrupt: &Interrupt, progress: &mut dyn Progress) -> Result<Vec<Sweep>> {
        let mut sweeps = self.link_sweep(interrupt, progress)?;
        if self.cached.is_none() {
            sweeps.push(self.thread_sweep(interrupt, progress)?);
        }
        if let Some(disk) = &self.disk {
            let which = Self::measurable(disk);
            if !which.is_empty() {
                // First in the report, last in time: on a slow disk they are cut short.
                sweeps.splice(0..0, self.disk_sweep(disk, &which, interrupt, progress)?);
            }
        }
        if self.is_late() {
            self.notes.push("The sweeps were cut short: the time was up.".to_owned());
        }
        sweeps.retain(|sweep| sweep.series.iter().any(|series| !series.points.is_empty()));
        Ok(sweeps)
    }

    /// Whether all the time has been used.
    fn is_late(&self) -> bool {
        self.began.elapsed() > self.options.limit
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
                let slots = u64::from(depth) * which.len() as u64;
                let fits = block * slots <= IN_FLIGHT.min(disk.file_bytes).min(self.machine.available / 8);
                if !fits || self.is_late() {
                    continue;
                }
                let pool = SlotPool::new(slots as u32, ByteCount(block), "the sweep")?;
                fill_slots(&pool);
                let regions = [Arc::clone(pool.region())];
                let lane = Rc::new(disk.lane(which, self.options.engine, block as usize, slots as u32, &regions)?);
                for (sweep, mix) in sweeps.iter_mut().zip([Mix::Read, Mix::Write]) {
                    let part = as_f64(n as u64) / as_f64(depths.len() as u64);
                    progress.at(
                        0.82 + 0.18 * part,
                        &format!("sweep of {}, depth {depth}, {}", mix.name(), ByteCount(block)),
                    );
                    let mut hop = DiskHop::new(Rc::clone(&lane), pool.clone(), mix, block as usize, slots as usize);
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
