//! The order of things: what is set up, which rounds are run, and how they become a report.

use std::{cell::RefCell, rc::Rc, sync::Arc, time::Duration};

use crate::{
    bench::{
        Exercise, Interrupt, Options, Progress,
        disk::{Disk, DiskHop, Lane, Mix, fill_with_numbers},
        fio::{self, Fio},
        link::{DEPTH, HostMemory, Link, LinkHop, Way},
        memory::{AdamwCpu, Arrays, States, Triad},
        pipeline::{AdamwNvme, Parts, Relay, params_of},
        report::{Figure, Group, Hop, MARK, Report, Series, Sweep},
        stats::{Rates, Round, as_f64},
        verdict,
    },
    device::DeviceKind,
    doctor::machine::{self, Machine},
    error::{Code, Error, Result},
    memory::SlotPool,
    optim::Pool,
    units::ByteCount,
};

/// Bytes of a piece of a pipeline, where there are few threads: small, so that what is in flight stays near the caches.
const PIECE: u64 = 1 << 20;
/// The same with many threads: a piece has to have a task of AdamW for each.
const LARGE_PIECE: u64 = 4 << 20;
/// Pieces on their way between hops, besides those that keep the disk busy.
const BETWEEN: u64 = 8;
/// Bytes in flight in one engine at most, whatever block and depth ask for.
const IN_FLIGHT: u64 = 256 << 20;
/// One block of a link's hop, as nvbandwidth has it.
const LINK_BLOCK: u64 = 64 << 20;

/// A hop and its rounds so far.
struct Planned {
    hop: Hop,
    exercise: Option<Box<dyn Exercise>>,
    rounds: Vec<Round>,
    fio: Option<(Fio, Vec<String>, Vec<f64>)>,
}

impl Planned {
    fn new(name: &str, place: &str, group: Group, exercise: impl Exercise + 'static) -> Self {
        Self { exercise: Some(Box::new(exercise)), ..Self::skipped(name, place, group, None) }
    }

    fn skipped(name: &str, place: &str, group: Group, why: Option<String>) -> Self {
        let hop = Hop {
            name: name.to_owned(),
            place: place.to_owned(),
            group,
            figure: None,
            skipped: why,
            block: None,
            depth: None,
            engine: None,
            direct: None,
            limit: None,
            fio: None,
            fio_bytes_per_second: None,
        };
        Self { hop, exercise: None, rounds: Vec::new(), fio: None }
    }

    fn blocks(mut self, block: u64, depth: usize) -> Self {
        (self.hop.block, self.hop.depth) = (Some(block), Some(depth as u64));
        self
    }

    fn through(mut self, lane: &Lane) -> Self {
        (self.hop.engine, self.hop.direct) = (Some(lane.engine().to_owned()), Some(true));
        self
    }

    fn finished(mut self) -> Hop {
        self.hop.figure = Figure::of(&self.rounds);
        if let Some((_, _, mut rates)) = self.fio {
            rates.sort_by(f64::total_cmp);
            let median = super::stats::median(&rates);
            self.hop.fio_bytes_per_second = (median > 0.0).then_some(median);
        }
        self.hop
    }
}

/// Everything that was set up.
struct Bench<'a> {
    options: &'a Options,
    machine: Machine,
    threads: u32,
    disk: Option<Disk>,
    link: Rc<Link>,
    blocks: SlotPool,
    pieces: SlotPool,
    arrays: Rc<RefCell<Arrays>>,
    states: Rc<RefCell<States>>,
    pool: Arc<Pool>,
    notes: Vec<String>,
}

/// Measures.
///
/// # Errors
/// Those of the device, the paths and the engines, before anything is measured; `FN-E106` when interrupted.
pub fn run(options: &Options, interrupt: &Interrupt, progress: &mut dyn Progress) -> Result<Report> {
    let least = options.block.0.max(LARGE_PIECE) * 4;
    if options.file.0 < least || options.block.0 < 4096 || !options.block.0.is_multiple_of(4096) {
        let message = format!("files of {} and blocks of {} cannot be measured.", options.file, options.block);
        let action = format!("Give --block as a multiple of 4KiB, and --size as at least {}.", ByteCount(least));
        return Err(Error::new(Code::PolicyValue, message).action(action));
    }
    let mut bench = Bench::set_up(options, interrupt, progress)?;
    let planned = bench.hops()?;
    let mut hops = bench.measure(planned, interrupt, progress)?;
    let sweeps = if options.point.is_zero() { Vec::new() } else { bench.sweeps(interrupt, progress)? };
    verdict::set_limits(&mut hops, &bench.machine);
    let (with_nvme, in_memory) = verdict::loads(&hops);
    let verdict = verdict::sentences(&hops, &sweeps, &with_nvme, &in_memory, options);
    let mut notes = std::mem::take(&mut bench.notes);
    notes.sort();
    notes.dedup();
    Ok(Report {
        made_by: MARK,
        version: env!("CARGO_PKG_VERSION"),
        date: machine::utc_now(),
        machine: bench.machine.clone(),
        hops,
        sweeps,
        with_nvme,
        in_memory,
        verdict,
        notes,
    })
}

/// Touches all slots of a pool, so that no first touch is timed, and leaves nothing in them that a drive could compress.
fn fill_slots(pool: &SlotPool) {
    let mut leases: Vec<_> = std::iter::from_fn(|| pool.lease()).collect();
    leases.iter_mut().for_each(|lease| fill_with_numbers(lease.bytes()));
}

impl<'a> Bench<'a> {
    fn set_up(options: &'a Options, interrupt: &Interrupt, progress: &mut dyn Progress) -> Result<Self> {
        progress.at(0.0, "looking at the paths");
        let machine = Machine::read(machine::chosen(options.device)?)?;
        let (disk, mut notes) = if options.paths.is_empty() {
            (None, vec!["no path was given: nothing that needs a disk was measured.".to_owned()])
        } else {
            let (disk, notes) = Disk::open(&options.paths, options.file.0 >> 20 << 20)?;
            (Some(disk), notes)
        };
        let paths = options.paths.len().max(1) as u64;
        // An eighth of what is free, and not more than the file asks for: a small test stays small.
        let most = (machine.available / 8).clamp(32 << 20, 4 << 30);
        let side = (LINK_BLOCK * DEPTH as u64).min(most / 4).min(options.file.0);
        let arrays = (machine.cache * 4).max(if options.quick { 192 << 20 } else { 768 << 20 }).min(most);
        let arrays = arrays.min(options.file.0.max(16 << 20));
        let depth = Self::fit(options.block.0, u64::from(options.depth) * paths, most);
        let blocks = SlotPool::new(depth, options.block, "blocks of the benchmark")?;
        let in_flight = (options.block.0 * u64::from(options.depth) * paths).max(LARGE_PIECE);
        let piece = if options.threads.unwrap_or(machine.cpus) > 4 { LARGE_PIECE } else { PIECE };
        let pieces = Self::fit(piece, in_flight / piece + BETWEEN, most.min(options.file.0 / 2 + piece));
        let pieces = SlotPool::new(pieces, ByteCount(piece), "pieces of the benchmark")?;
        fill_slots(&blocks);
        fill_slots(&pieces);
        let link = Link::open(options.device, side, &[Arc::clone(pieces.region())])?;
        let pool = Arc::new(Pool::new(Some(options.threads.unwrap_or(machine.cpus) as usize))?);
        progress.at(0.01, "making arrays in memory");
        let bench = Self {
            options,
            threads: u32::try_from(pool.threads()).unwrap_or(u32::MAX),
            disk,
            link: Rc::new(link),
            blocks,
            pieces,
            arrays: Arrays::new(arrays / 3)?,
            states: States::new((arrays / 14) as usize)?,
            pool,
            notes: std::mem::take(&mut notes),
            machine,
        };
        if let Some(disk) = &bench.disk {
            disk.fill(interrupt, |part| progress.at(0.01 + 0.04 * part, "writing the files"))?;
        }
        Ok(bench)
    }

    /// How many slots of `len` bytes to have, at least one.
    fn fit(len: u64, count: u64, most: u64) -> u32 {
        let count = count.min(IN_FLIGHT.max(len) / len).min(most / len).clamp(1, 4096);
        u32::try_from(count).unwrap_or(1)
    }

    /// Indices of the paths that can be measured.
    fn measurable(disk: &Disk) -> Vec<usize> {
        (0..disk.paths.len()).filter(|&n| disk.paths[n].direct.is_ok()).collect()
    }

    fn lane(&self, disk: &Disk, which: &[usize]) -> Result<Lane> {
        let regions = [Arc::clone(self.blocks.region()), Arc::clone(self.pieces.region())];
        let depth = self.options.depth.saturating_mul(u32::try_from(which.len()).unwrap_or(1)).min(4096);
        disk.lane(which, self.options.engine, self.options.block.0 as usize, depth, &regions)
    }

    /// All hops, in the order of the table.
    fn hops(&mut self) -> Result<Vec<Planned>> {
        let mut planned = Vec::new();
        let mut lane = None;
        let disk = self.disk.take();
        if let Some(disk) = &disk {
            lane = self.disk_hops(disk, &mut planned)?;
        }
        self.disk = disk;
        self.link_hops(&mut planned);
        let threads = format!("{} threads", self.threads);
        planned.push(Planned::new(
            "host_memory",
            &threads,
            Group::Host,
            Triad::new(Rc::clone(&self.arrays), Arc::clone(&self.pool)),
        ));
        planned.push(Planned::new(
            "adamw_cpu",
            &threads,
            Group::Host,
            AdamwCpu::new(Rc::clone(&self.states), Arc::clone(&self.pool)),
        ));
        if let Some(lane) = lane {
            self.pipelines(&lane, &mut planned);
        }
        Ok(planned)
    }

    /// The hops of each path alone, then striped over all; gives the engine of the last.
    fn disk_hops(&mut self, disk: &Disk, planned: &mut Vec<Planned>) -> Result<Option<Rc<Lane>>> {
        let blocks = self.blocks.clone();
        let good = Self::measurable(disk);
        let mut scopes: Vec<(String, Vec<usize>)> =
            (0..disk.paths.len()).map(|n| (disk.paths[n].dir.display().to_string(), vec![n])).collect();
        if good.len() > 1 {
            scopes.push((format!("striped over {}", good.len()), good));
        }
        let (mut last, with_fio) = (None, self.options.check && fio::installed());
        if self.options.check && !with_fio {
            self.notes
                .push("--check: fio is not installed; apt install fio, or run the commands elsewhere.".to_owned());
        }
        for (place, which) in scopes {
            if let [only] = which[..]
                && let Err(why) = &disk.paths[only].direct
            {
                for mix in [Mix::Read, Mix::Write, Mix::Both] {
                    planned.push(Planned::skipped(mix.name(), &place, Group::Nvme, Some(why.clone())));
                }
                continue;
            }
            let lane = Rc::new(self.lane(disk, &which)?);
            self.notes.extend(lane.notes.iter().cloned());
            let depth = (self.options.depth as usize * which.len()).min(blocks.free());
            for mix in [Mix::Read, Mix::Write, Mix::Both] {
                let block = blocks.slot_len();
                let hop = DiskHop::new(Rc::clone(&lane), blocks.clone(), mix, block, depth);
                let fio = Fio { mix, block, depth, engine: lane.engine(), file_bytes: disk.file_bytes };
                let dirs: Vec<String> = which.iter().map(|&n| disk.paths[n].dir.display().to_string()).collect();
                let mut plan =
                    Planned::new(mix.name(), &place, Group::Nvme, hop).blocks(block as u64, depth).through(&lane);
                plan.hop.fio = Some(fio.command(&dirs));
                plan.fio = with_fio.then(|| (fio, disk.links(&which), Vec::new()));
                planned.push(plan);
            }
            last = Some(lane);
        }
        Ok(last)
    }

    fn link_hops(&self, planned: &mut Vec<Planned>) {
        const UP: &[Way] = &[Way::Up];
        const DOWN: &[Way] = &[Way::Down];
        const BOTH: &[Way] = &[Way::Up, Way::Down];
        let device = match self.link.kind() {
            DeviceKind::Host => "host".to_owned(),
            DeviceKind::Cuda(ordinal) => format!("cuda:{ordinal}"),
        };
        let pinned = format!("{device}, pinned");
        let block = self.link.block(LINK_BLOCK as usize);
        let mut add = |name, place: &str, ways, memory| {
            let hop = LinkHop::new(Rc::clone(&self.link), ways, memory, block);
            planned.push(Planned::new(name, place, Group::Link, hop).blocks(block as u64, DEPTH));
        };
        if self.link.has_pageable() {
            let pageable = format!("{device}, pageable");
            add("host_to_device", &pageable, UP, HostMemory::Pageable);
            add("device_to_host", &pageable, DOWN, HostMemory::Pageable);
        }
        add("host_to_device", &pinned, UP, HostMemory::Pinned);
        add("device_to_host", &pinned, DOWN, HostMemory::Pinned);
        add("bidirectional", &pinned, BOTH, HostMemory::Pinned);
    }

    fn pipelines(&self, lane: &Rc<Lane>, planned: &mut Vec<Planned>) {
        let piece = self.link.block(self.pieces.slot_len());
        let parts = Parts { lane: Rc::clone(lane), slots: self.pieces.clone(), piece, link: Rc::clone(&self.link) };
        let place = "all".to_owned();
        let depth = self.pieces.free();
        for (name, way) in [("nvme_to_device", Way::Up), ("device_to_nvme", Way::Down)] {
            let hop = Relay::new(parts.clone(), way);
            planned.push(Planned::new(name, &place, Group::Pipeline, hop).blocks(piece as u64, depth).through(lane));
        }
        for (name, traffic) in [("adamw_nvme", false), ("train_traffic", true)] {
            let hop = AdamwNvme::new(parts.clone(), Rc::clone(&self.states), Arc::clone(&self.pool), traffic);
            let block = params_of(piece) as u64 * super::memory::STATE_BYTES;
            planned.push(Planned::new(name, &place, Group::Pipeline, hop).blocks(block, depth).through(lane));
        }
    }

    /// Round after round over all hops; the first is for warming up.
    fn measure(
        &self,
        mut planned: Vec<Planned>,
        interrupt: &Interrupt,
        progress: &mut dyn Progress,
    ) -> Result<Vec<Hop>> {
        let runs = planned.iter().filter(|plan| plan.exercise.is_some()).count().max(1);
        let rounds = self.options.rounds.max(1);
        let time = (self.options.time / (rounds * u32::try_from(runs).unwrap_or(1))).min(Duration::from_secs(1));
        let (mut done, all) = (0, runs as u64 * u64::from(rounds));
        for round in 0..=rounds {
            for plan in &mut planned {
                let Some(exercise) = &mut plan.exercise else { continue };
                interrupt.check()?;
                let what = format!("{} {}", plan.hop.name, plan.hop.place);
                progress.at(0.05 + 0.7 * as_f64(done) / as_f64(all), &what);
                if round == 0 {
                    exercise.round(time / 8)?;
                    continue;
                }
                plan.rounds.push(exercise.round(time)?);
                if let Some((fio, files, rates)) = &mut plan.fio {
                    rates.push(fio.run(files, time)?);
                }
                done += 1;
            }
        }
        Ok(planned.into_iter().map(Planned::finished).collect())
    }

    fn sweeps(&mut self, interrupt: &Interrupt, progress: &mut dyn Progress) -> Result<Vec<Sweep>> {
        let mut sweeps = Vec::new();
        if let Some(disk) = &self.disk {
            let which = Self::measurable(disk);
            if !which.is_empty() {
                sweeps.extend(self.disk_sweep(disk, &which, interrupt, progress)?);
            }
        }
        sweeps.extend(self.link_sweep(interrupt, progress)?);
        sweeps.extend(self.thread_sweep(interrupt, progress)?);
        Ok(sweeps)
    }

    fn point(&self, exercise: &mut dyn Exercise, interrupt: &Interrupt) -> Result<f64> {
        interrupt.check()?;
        let round = exercise.round(self.options.point)?;
        Ok(Rates::of(&[round], |round| round.bytes).map_or(0.0, |rates| rates.median))
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
                if !fits {
                    continue;
                }
                let pool = SlotPool::new(slots as u32, ByteCount(block), "the sweep")?;
                fill_slots(&pool);
                let regions = [Arc::clone(pool.region())];
                let lane = Rc::new(disk.lane(which, self.options.engine, block as usize, slots as u32, &regions)?);
                for (sweep, mix) in sweeps.iter_mut().zip([Mix::Read, Mix::Write]) {
                    let part = as_f64(n as u64) / as_f64(depths.len() as u64);
                    progress.at(
                        0.75 + 0.18 * part,
                        &format!("sweep of {}, depth {depth}, {}", mix.name(), ByteCount(block)),
                    );
                    let mut hop = DiskHop::new(Rc::clone(&lane), pool.clone(), mix, block as usize, slots as usize);
                    let rate = self.point(&mut hop, interrupt)?;
                    if let Some(series) = sweep.series.last_mut() {
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
            progress.at(0.94, &format!("sweep of {name}"));
            let mut points = Vec::new();
            for block in blocks.into_iter().filter(|&block| self.link.block(block) == block) {
                let mut hop = LinkHop::new(Rc::clone(&self.link), ways, HostMemory::Pinned, block);
                points.push((block as u64, self.point(&mut hop, interrupt)?));
            }
            sweep.series.push(Series { label: name.to_owned(), points });
        }
        Ok(vec![sweep])
    }

    fn thread_sweep(&self, interrupt: &Interrupt, progress: &mut dyn Progress) -> Result<Vec<Sweep>> {
        let mut counts: Vec<u32> = (0..12).map(|n| 1 << n).filter(|&n| n < self.threads).collect();
        counts.push(self.threads);
        let mut series = ["host_memory", "adamw_cpu"].map(|name| Series { label: name.to_owned(), points: Vec::new() });
        for threads in counts {
            progress.at(0.97, &format!("sweep of threads: {threads}"));
            let pool = Arc::new(Pool::new(Some(threads as usize))?);
            let mut triad = Triad::new(Rc::clone(&self.arrays), Arc::clone(&pool));
            series[0].points.push((u64::from(threads), self.point(&mut triad, interrupt)?));
            let mut adamw = AdamwCpu::new(Rc::clone(&self.states), pool);
            series[1].points.push((u64::from(threads), self.point(&mut adamw, interrupt)?));
        }
        Ok(vec![Sweep { name: "processor".to_owned(), over: "threads", series: series.into() }])
    }
}
