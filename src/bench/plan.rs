//! Which hops there are, in which order, and how they become a report.

use std::{rc::Rc, sync::Arc};

use crate::{
    bench::{
        Interrupt, Options, Progress,
        disk::{Disk, DiskHop, Lane, Mix},
        fio::{self, Fio},
        gpu::{AdamwGpu, DeviceMemory},
        link::{DEPTH, HostMemory, LinkHop, Way},
        measure::Planned,
        memory::{AdamwAndCopies, AdamwCpu, Bandwidth, STATE_BYTES},
        peers::Crew,
        pipeline::{AdamwNvme, Parts, Relay, params_of},
        quiet,
        report::{Group, MARK, Report},
        setup::Bench,
        stats::as_f64,
        together::{Telling, join},
        trust, verdict,
    },
    device::DeviceKind,
    doctor::facts,
    error::Result,
    optim::Pool,
};

const UP: &[Way] = &[Way::Up];
const DOWN: &[Way] = &[Way::Down];
const BOTH: &[Way] = &[Way::Up, Way::Down];

/// Measures; with `crew` as rank 0, whose other ranks call [`follow`](super::follow).
///
/// # Errors
/// Those of the device, the paths and the engines, before anything is measured; `FN-E106` when interrupted; `FN-E701` without a rank.
pub fn run(
    options: &Options,
    crew: Option<&Rc<Crew>>,
    interrupt: &Interrupt,
    progress: &mut dyn Progress,
) -> Result<Report> {
    let mut telling = crew.map(|crew| Telling::new(crew, progress));
    let progress: &mut dyn Progress = match &mut telling {
        Some(telling) => telling,
        None => progress,
    };
    let mut bench = Bench::new(options, interrupt, progress)?;
    let mut planned = bench.hops()?;
    if let Some(crew) = crew {
        join(crew, &mut planned, interrupt)?;
        bench.notes.push(format!(
            "Figures of {} ranks at once are sums over ranks; disks are measured by rank 0 alone, without what goes through them elsewhere.",
            options.ranks
        ));
    }
    let mut hops = bench.measure(planned, interrupt, progress)?;
    let (sweeps, faster) =
        if options.point.is_zero() { (Vec::new(), None) } else { bench.sweeps(&hops, interrupt, progress)? };
    verdict::set_limits(&mut hops);
    let (with_nvme, in_memory) = verdict::loads(&hops, options.ranks);
    let ours = crew.map_or(Ok(0), |crew| crew.end(interrupt))?;
    let others = bench.watch.others(ours);
    let mut doubts: Vec<String> = quiet::doubt(others, bench.machine.cpus).into_iter().collect();
    doubts.extend(trust::doubts(&hops, [&with_nvme, &in_memory]));
    let verdict = if doubts.is_empty() || options.force {
        verdict::sentences(&hops, faster.as_ref(), &with_nvme, &in_memory, options)
    } else {
        Vec::new()
    };
    let mut notes = std::mem::take(&mut bench.notes);
    notes.sort();
    notes.dedup();
    Ok(Report {
        made_by: MARK,
        version: env!("CARGO_PKG_VERSION"),
        date: facts::utc_now(),
        machine: bench.machine.clone(),
        ranks: crew.map(|_| options.ranks),
        others_cpus: others,
        hops,
        sweeps,
        with_nvme,
        in_memory,
        doubts,
        verdict,
        notes,
    })
}

impl Bench<'_> {
    /// All hops, in the order in which they are measured: each pipeline next to the hop that limits it.
    pub(super) fn hops(&mut self) -> Result<Vec<Planned>> {
        let mut planned = Vec::new();
        let disk = self.disk.take();
        if let Some(disk) = &disk {
            self.disk_hops(disk, &mut planned)?;
        }
        self.disk = disk;
        self.link_hops(&mut planned);
        self.device_hops(&mut planned);
        self.memory_hops(&mut planned)?;
        Ok(planned)
    }

    /// The hops of each path alone, then those striped over all, with the pipelines over the last.
    fn disk_hops(&mut self, disk: &Disk, planned: &mut Vec<Planned>) -> Result<()> {
        let good = Self::measurable(disk);
        let mut scopes: Vec<(String, Vec<usize>)> =
            (0..disk.paths.len()).map(|n| (disk.paths[n].dir.display().to_string(), vec![n])).collect();
        if good.len() > 1 {
            scopes.push((format!("striped over {}", good.len()), good.clone()));
        }
        let with_fio = self.options.check && fio::installed();
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
            // Ranks have nothing on NVMe that could go elsewhere.
            let over_all = which == good && self.options.ranks == 1;
            for mix in [Mix::Read, Mix::Write, Mix::Both] {
                planned.push(self.disk_hop(disk, &lane, mix, &place, &which, with_fio));
                if over_all {
                    self.pipelines(&lane, mix, planned);
                }
            }
        }
        Ok(())
    }

    fn disk_hop(
        &self,
        disk: &Disk,
        lane: &Rc<Lane>,
        mix: Mix,
        place: &str,
        which: &[usize],
        with_fio: bool,
    ) -> Planned {
        let (blocks, block) = (self.blocks.clone(), self.blocks.slot_len());
        let depth = (self.options.depth as usize * which.len()).min(blocks.free());
        let fio = Fio {
            mix,
            block,
            depth,
            engine: lane.engine(),
            registered: lane.has_registered_buffers(),
            file_bytes: disk.file_bytes,
        };
        let dirs: Vec<String> = which.iter().map(|&n| disk.paths[n].dir.display().to_string()).collect();
        let hop = DiskHop::new(Rc::clone(lane), blocks, mix, block, depth);
        let mut plan = Planned::new(mix.name(), place, Group::Nvme, hop).blocks(block as u64, depth).through(lane);
        plan.hop.fio = Some(fio.command(&dirs));
        // All drives together; reads and writes each have their direction.
        let lines: Option<u64> = which.iter().map(|&n| disk.paths[n].drive.line_rate).sum();
        plan.hop.line_rate = lines.map(|line| as_f64(line * if mix == Mix::Both { 2 } else { 1 }));
        plan.fio = with_fio.then(|| (fio, disk.links(which)));
        plan
    }

    /// The pipelines whose disk does `mix`.
    fn pipelines(&self, lane: &Rc<Lane>, mix: Mix, planned: &mut Vec<Planned>) {
        let piece = self.link.block(self.pieces.slot_len());
        let parts = Parts { lane: Rc::clone(lane), slots: self.pieces.clone(), piece, link: Rc::clone(&self.link) };
        let depth = self.pieces.free();
        let states = params_of(piece) as u64 * STATE_BYTES;
        let adamw = |traffic| AdamwNvme::new(parts.clone(), Rc::clone(&self.states), Arc::clone(&self.pool), traffic);
        let mut add = |plan: Planned, block: u64| planned.push(plan.blocks(block, depth).through(lane));
        match mix {
            Mix::Read => {
                let hop = Relay::new(parts.clone(), Way::Up);
                add(Planned::new("nvme_to_device", "all", Group::Pipeline, hop), piece as u64);
            }
            Mix::Write => {
                let hop = Relay::new(parts.clone(), Way::Down);
                add(Planned::new("device_to_nvme", "all", Group::Pipeline, hop), piece as u64);
            }
            Mix::Both => {
                add(Planned::new("adamw_nvme", "all", Group::Pipeline, adamw(false)), states);
                add(Planned::new("train_traffic", "all", Group::Pipeline, adamw(true)), states);
            }
        }
    }

    fn device_name(&self) -> String {
        match self.link.kind() {
            DeviceKind::Host => "host".to_owned(),
            DeviceKind::Cuda(_) if self.options.ranks > 1 => format!("{} GPUs", self.options.ranks),
            DeviceKind::Cuda(ordinal) => format!("cuda:{ordinal}"),
        }
    }

    fn link_hops(&self, planned: &mut Vec<Planned>) {
        let device = self.device_name();
        let pinned = format!("{device}, pinned");
        let block = self.link_block();
        let mut add = |name, place: &str, ways, memory| {
            let hop = LinkHop::new(Rc::clone(&self.link), ways, memory, block);
            let mut plan = Planned::new(name, place, Group::Link, hop).blocks(block as u64, DEPTH);
            plan.hop.line_rate = self
                .machine
                .link_line_rate
                .map(|line| as_f64(line * ways.len() as u64 * u64::from(self.options.ranks)));
            planned.push(plan);
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

    /// The hops of a GPU's own memory; where its kernels cannot be compiled, why.
    fn device_hops(&self, planned: &mut Vec<Planned>) {
        if self.link.kind() == DeviceKind::Host {
            return;
        }
        let place = format!("{}, in its memory", self.device_name());
        planned.push(Planned::new("device_memory", &place, Group::Link, DeviceMemory::new(Rc::clone(&self.link))));
        planned.push(match AdamwGpu::new(Rc::clone(&self.link), &self.states.borrow()) {
            Ok(hop) => Planned::new("adamw_gpu", &place, Group::Link, hop),
            Err(e) => Planned::skipped("adamw_gpu", &place, Group::Link, Some(format!("not measured: {e}"))),
        });
    }

    fn memory_hops(&self, planned: &mut Vec<Planned>) -> Result<()> {
        let threads = self.threads();
        let (triad, in_place) = (format!("{threads}, triad"), format!("{threads}, in place"));
        if let Some(why) = &self.cached {
            for name in ["host_memory", "adamw_cpu"] {
                planned.push(Planned::skipped(name, &threads, Group::Host, Some(why.clone())));
            }
            return Ok(());
        }
        let (arrays, states, pool) =
            (|| Rc::clone(&self.arrays), || Rc::clone(&self.states), || Arc::clone(&self.pool));
        let block = self.link_block();
        let copies = LinkHop::new(Rc::clone(&self.link), BOTH, HostMemory::Pinned, block);
        let one = Arc::new(Pool::new(Some(1))?);
        let one_thread = if self.options.ranks > 1 { "1 thread per rank" } else { "1 thread" };
        planned.extend([
            Planned::new("host_memory", &triad, Group::Host, Bandwidth::triad(arrays(), states(), pool())),
            Planned::new("host_memory", &in_place, Group::Host, Bandwidth::in_place(arrays(), states(), pool())),
            Planned::new("adamw_cpu", &threads, Group::Host, AdamwCpu::new(states(), pool())),
            Planned::new("adamw_one_thread", one_thread, Group::Host, AdamwCpu::new(states(), one)),
            Planned::new("adamw_and_copies", &threads, Group::Host, AdamwAndCopies::new(states(), pool(), copies)),
        ]);
        Ok(())
    }
}
