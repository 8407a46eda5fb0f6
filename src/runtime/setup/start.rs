//! Setting a runtime up: plan, memory, disk space, threads.

use std::{
    sync::{Arc, atomic::AtomicU32},
    thread::JoinHandle,
};

use crossbeam::channel::{Receiver, Sender, bounded};
use parking_lot::Condvar;

use crate::{
    device::{self, DeviceKind, Lanes},
    error::{Code, Result},
    io::{DirectIo, EngineOptions, IoCompletion},
    memory::{self, SlotPool},
    model::Layout,
    optim::Pool,
    policy::Policy,
    quantities::{ByteCount, Tier, UnitId},
    runtime::{
        disk::{driver, files::Disk, map::Map},
        growth::{asked, state::Growing},
        measure::{
            stats::{Link, Stats},
            step_time::StepTimes,
            trace::Trace,
        },
        paging::{fault_server, faults::Faults, homes::Homes, landing::Ended, reapers},
        ranks::{shelf, spec::RankSpec, together::Ranks, watcher},
        saving::copy_on_update::Saves,
        setup::{
            admission::{self, Running},
            config::Config,
        },
        shared::{
            Shared,
            lock_order::{Line, Ordered},
            locked::Inner,
        },
        update::{factors::Factors, job::Job, rhythm::Rhythm, runner, share::Share, task::Task, update_on::UpdateOn},
    },
    schedule::{
        Budgets, LaneUse, Machine, Placement,
        growth::{self, Own},
        placement,
        ranks::posts::State,
    },
    store::{Common, OpenedStore, SegmentSpec, Store, StoreSpec},
};

/// A runtime that has just been set up.
pub(crate) struct Started {
    pub(crate) shared: Arc<Shared>,
    pub(crate) threads: Vec<JoinHandle<()>>,
    pub(crate) budgets: Budgets,
    pub(crate) notes: Vec<String>,
    pub(crate) running: Running,
}

/// The most that channels and other queues take of the heap, and what the heap takes at a time.
const QUEUES: u64 = 48 << 20;
/// A thread's stack, and what lies around it.
const STACK: u64 = (2 << 20) + (64 << 10);
/// Threads of a runtime besides its update pool: its own, those of an I/O engine, and one for a save with its helpers.
const THREADS: u64 = 5 + 16 + 4;

struct Channels {
    done: (Sender<IoCompletion>, Receiver<IoCompletion>),
    run: (Sender<Task>, Receiver<Task>),
    speculate: (Sender<UnitId>, Receiver<UnitId>),
    up: (Sender<Ended>, Receiver<Ended>),
    down: (Sender<Ended>, Receiver<Ended>),
}

/// Plans, takes memory and disk space, and starts the threads. `freed` bytes of host memory are given back as the model moves
/// in: its own weights.
/// Other ranks are told of a failure after they could know of this one.
pub(crate) fn start(layout: Layout, policy: &Policy, freed: ByteCount, spec: Option<RankSpec>) -> Result<Started> {
    let mut among = None;
    let started = begin(layout, policy, freed, spec, &mut among);
    if let (Err(error), Some(ranks)) = (&started, among) {
        ranks.ended(State::Failed, Some(&error.to_string()));
    }
    started
}

fn begin(
    layout: Layout,
    policy: &Policy,
    freed: ByteCount,
    spec: Option<RankSpec>,
    among: &mut Option<Arc<Ranks>>,
) -> Result<Started> {
    let device = device::open(Config::device_of(policy))?;
    let device_free = device.free_memory()?;
    let mut config = Config::resolve(policy, &layout, device_free, freed, spec)?;
    if let Some((number, size)) = spec.and_then(|spec| Some((spec.file?, spec.size))) {
        config.budgets.nvme_free = shelf::free_at_first(number, size)?;
    }
    let config = &config;
    let on_host = device.kind() == DeviceKind::Host;
    let (mut plan, running) = admission::admit(&layout, config, device.granularity(), on_host, freed, spec)?;
    let frames = device.create_frames(plan.ring_chunks, plan.chunk_bytes, &plan.spans)?;
    let mut notes = running.notes();
    let share = open_share(|count, bytes| device.create_lanes(count, bytes), config.updates, &mut plan, &mut notes)?;
    // The GPU alone can update what lies in its memory.
    let above = share.uses_lanes() && (!on_host || config.updates.0 == UpdateOn::Gpu);
    let own = spec.map(|RankSpec { rank, size, .. }| Own { rank, size, holds: above });
    let map = Map::new(&layout, &plan, spec);
    let (homes, ranks, common) = match spec {
        None => (Homes::new(&layout, &plan, None, Homes::private)?, None, None),
        Some(spec) => {
            let segments = map.specs.iter().map(|(bytes, _)| *bytes);
            let files = match segments.len() {
                0 => 0,
                _ => StoreSpec::common_words(config.paths.len(), plan.chunk_on_nvme(), segments),
            };
            let files = (files, config.budgets.nvme_free);
            let (homes, ranks, common) =
                shelf::open(spec, &layout, &plan, shelf::concrete(policy, config), own, files)?;
            (homes, Some(Arc::new(ranks)), common)
        }
    };
    among.clone_from(&ranks);
    memory::headroom(
        ByteCount(QUEUES + STACK * (u64::from(config.threads) + THREADS)),
        "the runtime's threads and queues",
    )?;
    let channels = Channels {
        done: bounded(4096),
        run: bounded(4096),
        speculate: bounded(1 << 14),
        up: bounded(1 << 14),
        down: bounded(1 << 16),
    };
    let counts: Vec<u32> = layout.ids().map(|u| map.chunk_count(u)).collect();
    let disk = if map.specs.is_empty() {
        None
    } else {
        Some(open_disk((config, common), &plan, map, channels.done.0.clone(), &mut notes)?)
    };
    if plan.homes.iter().any(|h| h.params == Tier::Hbm) {
        device.prepare_updates()?;
    }
    if ranks.is_some() {
        device.prepare_means()?;
    }
    for region in [&homes.params, &homes.grads, &homes.states, &homes.spare] {
        device.register(region)?;
    }
    if let Some(ranks) = &ranks {
        device.register(ranks.words.region())?;
    }
    if let Some(disk) = &disk {
        device.register(disk.update_pool.region())?;
        for pool in [&disk.page_pool, &disk.grad_pool].into_iter().flatten() {
            device.register(pool.region())?;
        }
    }
    let window =
        config.prefetch_window.map_or(plan.ring_chunks, |w| u32::try_from(w.0 / plan.chunk_bytes).unwrap_or(u32::MAX));
    let machine = Machine::new(&plan, &counts, window);
    let machine = if ranks.is_some() { machine.among_peers() } else { machine };
    let units = layout.units.len();
    let free = spec.and_then(|spec| spec.grows).unwrap_or_else(|| policy.budget.hbm.given().is_none());
    let grows = free && (on_host || above);
    let candidates = if grows { growth::candidates(&layout, &plan, device.granularity(), own) } else { Vec::new() };
    if let Some(ranks) = ranks.as_ref().filter(|_| candidates.is_empty()) {
        ranks.posts().states_stay();
    }
    let shared = Arc::new(Shared {
        jobs: (0..units).map(|_| Ordered::new(Line::Job, Job::default())).collect(),
        rhythm: Ordered::new(Line::Moment, Rhythm::default()),
        paging: Ordered::new(Line::Moment, None),
        speculations: (0..units).map(|_| Ordered::new(Line::Speculation, None)).collect(),
        inner: Ordered::new(Line::Inner, Inner::new(machine, units)),
        placement: plan,
        layout,
        factors: Factors::new(&*device)?,
        homes,
        share: Ordered::new(Line::Share, share),
        growing: Growing::new(units, candidates, device_free.unwrap_or_default().0, above),
        device,
        frames,
        disk,
        pool: Pool::new(Some(config.threads as usize))?,
        stats: Stats::default(),
        trace: Trace::default(),
        step_times: StepTimes::default(),
        slow: config.slow,
        poison: config.poison,
        sync: config.sync,
        changed: Condvar::new(),
        off_step_io: Ordered::new(Line::OffStepIo, ()),
        reads: (0..units).map(|_| AtomicU32::new(0)).collect(),
        saves: Saves::default(),
        ranks,
        faults: Faults::default(),
        checkpoint_io: (engine_options(config), config.direct != DirectIo::Off),
        to_runner: channels.run.0.clone(),
        to_speculate: channels.speculate.0.clone(),
        to_up: channels.up.0.clone(),
        to_down: channels.down.0.clone(),
    });
    let threads = spawn(&shared, channels)?;
    asked::enlist(&shared);
    Ok(Started { shared, threads, budgets: config.budgets, notes, running })
}

/// Makes the lanes that the plan has room for. Where the policy does not insist on them, there are none without a compiler for their kernels.
pub(crate) fn open_share(
    create: impl FnOnce(usize, u64) -> Result<Arc<dyn Lanes>>,
    (update_on, wish): (UpdateOn, LaneUse),
    plan: &mut Placement,
    notes: &mut Vec<String>,
) -> Result<Share> {
    if plan.lane_elems == 0 {
        return Ok(Share::new(None, UpdateOn::Cpu));
    }
    let lanes = placement::lanes::COUNT;
    match create(lanes as usize, plan.lane_bytes / lanes) {
        Ok(lanes) => Ok(Share::new(Some((lanes, plan.lane_elems)), update_on)),
        Err(error) if wish == LaneUse::IfRoom && error.code() == Code::NoCompiler => {
            notes.push(format!("FN-W210 the GPU takes no part in updates: {}", error.message()));
            plan.without_lanes();
            Ok(Share::new(None, UpdateOn::Cpu))
        }
        Err(error) => Err(error),
    }
}

fn engine_options(config: &Config) -> EngineOptions {
    EngineOptions {
        choice: config.engine,
        queue_depth: config.queue_depth,
        block: config.block as usize,
        faults: Arc::clone(&config.faults),
        ..EngineOptions::default()
    }
}

fn open_disk(
    (config, common): (&Config, Option<Common>),
    plan: &Placement,
    map: Map,
    done: Sender<IoCompletion>,
    notes: &mut Vec<String>,
) -> Result<Disk> {
    let (count, bytes) = plan.page_slots;
    let page_pool = if count > 0 { Some(SlotPool::new(count, ByteCount(bytes), "pages from NVMe")?) } else { None };
    let (count, bytes) = plan.update_slots;
    let update_pool = SlotPool::new(count, ByteCount(bytes), "states from NVMe")?;
    let (count, bytes) = plan.grad_slots;
    let grad_pool = if count > 0 { Some(SlotPool::new(count, ByteCount(bytes), "gradients for NVMe")?) } else { None };
    let mut regions = vec![Arc::clone(update_pool.region())];
    regions.extend([&page_pool, &grad_pool].into_iter().flatten().map(|pool| Arc::clone(pool.region())));
    let chunk_bytes = plan.chunk_on_nvme();
    let spec = StoreSpec {
        paths: config.paths.clone(),
        chunk_bytes,
        segments: map.specs.iter().map(|(bytes, label)| SegmentSpec { bytes: *bytes, label: label.clone() }).collect(),
        checksums: config.checksums,
        direct: config.direct,
        engine: engine_options(config),
        budget: Some(config.budgets.nvme),
        common,
    };
    let sink = move |completion: IoCompletion| {
        // The driver is gone only when the runtime is being dropped; the lease goes back to its pool.
        let _ = done.send(completion);
    };
    let OpenedStore { store, notes: said } = Store::open(spec, &regions, sink)?;
    notes.extend(said);
    Ok(Disk { store, map, page_pool, update_pool, grad_pool })
}

fn spawn(shared: &Arc<Shared>, channels: Channels) -> Result<Vec<JoinHandle<()>>> {
    let mut threads = vec![
        driver::spawn("funicular-driver", shared, channels.done.1, driver::completed)?,
        runner::spawn(shared, channels.run.1, channels.speculate.1)?,
        driver::spawn("funicular-up-end", shared, channels.up.1, |s, m| reapers::ended(s, Link::Up, m))?,
        driver::spawn("funicular-dn-end", shared, channels.down.1, |s, m| reapers::ended(s, Link::Down, m))?,
    ];
    // Last: only the end of a runtime that has started ends this thread.
    threads.extend(fault_server::spawn(shared)?);
    threads.extend(watcher::spawn(shared)?);
    Ok(threads)
}
