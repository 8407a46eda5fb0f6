//! What a step costs in time: the windows of a step played through, one clock per link and processor, at measured rates.
//!
//! T1: pure; the same input gives the same prediction. T2: a faster link or processor never predicts a longer step.

use crate::{
    model::Layout,
    quantities::{Tier, UnitId},
    schedule::{
        Placement,
        order::Phase,
        traffic::{self, Traffic, UnitTraffic, Uses, Window},
    },
};

/// How fast things go: bytes, or parameters, per second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Over the link to the device.
    pub up: f64,
    /// Over the link from the device.
    pub down: f64,
    /// Over the link in both directions at once, together.
    pub both: f64,
    /// Reads from all NVMe paths together.
    pub nvme_read: f64,
    /// Writes to them.
    pub nvme_write: f64,
    /// Both at once, together.
    pub nvme_both: f64,
    /// Host memory moved by AdamW on the processor, alone.
    pub update: f64,
    /// The same beside copies both ways: they share the host's memory.
    pub update_beside: f64,
    /// Parameters updated by the device where their states live there.
    pub device_update: f64,
    /// Set where device and processor are the same, to the number of its threads: compute, copies and updates share it.
    pub shared: Option<u32>,
}

/// What is computed in a step.
#[derive(Clone, Debug)]
pub struct Work {
    /// Which windows there are.
    pub uses: Uses,
    /// Seconds of each unit's forward.
    pub forward: Vec<f64>,
    /// Seconds of each unit's backward, recomputation included.
    pub backward: Vec<f64>,
    /// Seconds of everything else: loss, clipping, data.
    pub rest: f64,
    /// Lanes of the device, where the plan has them, make all updates; else they share them with the processor.
    pub lanes_alone: bool,
}

/// A part of the machine that a step may be bound by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// The device's arithmetic.
    Compute,
    /// The link to the device.
    Up,
    /// The link from the device.
    Down,
    /// The drives.
    Nvme,
    /// AdamW on the processor.
    Update,
    /// AdamW on the device, of states that pass through it.
    Lanes,
}

impl Resource {
    /// All of them.
    pub const ALL: [Self; COUNT] = [Self::Compute, Self::Up, Self::Down, Self::Nvme, Self::Update, Self::Lanes];

    /// The name in tables: that of the statistics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Compute => "compute",
            Self::Up => "host_to_device",
            Self::Down => "device_to_host",
            Self::Nvme => "nvme",
            Self::Update => "cpu_update",
            Self::Lanes => "gpu_update",
        }
    }
}

/// The prediction for a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Cost {
    /// From one step to the next.
    pub seconds: f64,
    /// How long each resource is busy, in the order of [`Resource::ALL`].
    pub busy: [f64; COUNT],
    /// How long the training thread waits for each; 0 for compute.
    pub waits: [f64; COUNT],
    /// What it is bound by.
    pub binding: Resource,
    /// Of the parameters whose states are not the device's own, the part that its lanes update.
    pub by_lanes: f64,
    /// Bytes moved.
    pub traffic: Traffic,
}

/// How many resources there are.
const COUNT: usize = 6;
/// What the hooks around a window cost the training thread.
const WINDOW_SECONDS: f64 = 40e-6;
/// Steps played before one is believed.
const WARM: usize = 3;
/// Waiting for less than this part of a step does not bind it.
const NEGLIGIBLE: f64 = 0.02;
/// Halvings of the interval in which a step's time lies; and how small an interval will do, as part of it.
const HALVINGS: u32 = 40;
const NARROW: f64 = 1e-6;

/// Predicts a step.
///
/// Lanes have what parameters and gradients leave of the link: how much that is depends on how long the step takes, and the
/// other way round. A longer step leaves more and is played through sooner, so there is one time at which both agree.
pub fn predict(layout: &Layout, plan: &Placement, rates: &Rates, work: &Work) -> Cost {
    let cost = play(layout, plan, rates, work, f64::INFINITY);
    if cost.by_lanes == 0.0 {
        return cost;
    }
    let (mut least, mut most) = (cost.seconds, play(layout, plan, rates, work, cost.seconds).seconds);
    for _ in 0..HALVINGS {
        if most - least <= NARROW * most {
            break;
        }
        let middle = least.midpoint(most);
        let longer = play(layout, plan, rates, work, middle).seconds > middle;
        *(if longer { &mut least } else { &mut most }) = middle;
    }
    Cost { seconds: most, ..play(layout, plan, rates, work, most) }
}

/// Plays steps in which lanes get what a step of `believed` seconds leaves them of the link.
fn play(layout: &Layout, plan: &Placement, rates: &Rates, work: &Work, believed: f64) -> Cost {
    let windows = traffic::windows(layout, plan, &work.uses);
    let units: Vec<UnitTraffic> = layout.units.iter().zip(&plan.homes).map(|(u, h)| traffic::of_unit(u, *h)).collect();
    let traffic = traffic::of_step(layout, plan, &work.uses);
    // Where the device is the processor, lanes add nothing.
    let lanes = (plan.lane_elems > 0 && rates.shared.is_none()).then(|| Link::left(rates, &traffic, believed));
    let mut clocks = Clocks {
        lanes,
        layout,
        plan,
        rates,
        work,
        units: &units,
        windows: &windows,
        free: [0.0; COUNT],
        home: vec![(0.0, Resource::Update); units.len()],
        landed: vec![0.0; units.len()],
        frames: vec![0.0; plan.ring_chunks as usize],
        busy: [0.0; COUNT],
        waits: [0.0; COUNT],
        updated: [0.0; 2],
    };
    let mut start = 0.0;
    for _ in 0..WARM {
        start = clocks.step();
        (clocks.busy, clocks.waits, clocks.updated) = ([0.0; COUNT], [0.0; COUNT], [0.0; 2]);
    }
    let seconds = clocks.step() - start;
    let (busy, waits, [updated, by_lanes]) = (clocks.busy, clocks.waits, clocks.updated);
    let longest =
        |of: &[f64; COUNT]| Resource::ALL.into_iter().max_by(|a, b| of[*a as usize].total_cmp(&of[*b as usize]));
    let waited: f64 = waits.iter().sum();
    let binding =
        if rates.shared.is_some() || waited < NEGLIGIBLE * seconds { longest(&busy) } else { longest(&waits) };
    let by_lanes = if by_lanes > 0.0 { by_lanes / updated } else { 0.0 };
    Cost { seconds, busy, waits, binding: binding.unwrap_or(Resource::Compute), by_lanes, traffic }
}

/// The seconds that a step would take less if a resource were twice as fast, the most helpful first.
pub fn gains(layout: &Layout, plan: &Placement, rates: &Rates, work: &Work) -> Vec<(Resource, f64)> {
    let now = predict(layout, plan, rates, work).seconds;
    let mut gains: Vec<_> = Resource::ALL
        .into_iter()
        .map(|resource| {
            let (mut rates, mut work) = (*rates, work.clone());
            match resource {
                Resource::Compute => {
                    work.forward.iter_mut().chain(&mut work.backward).for_each(|s| *s /= 2.0);
                    work.rest /= 2.0;
                }
                Resource::Up => (rates.up, rates.both) = (rates.up * 2.0, rates.both * 1.5),
                Resource::Down => (rates.down, rates.both) = (rates.down * 2.0, rates.both * 1.5),
                // Lanes are as fast as the link.
                Resource::Lanes => {}
                Resource::Update => {
                    (rates.update, rates.update_beside) = (rates.update * 2.0, rates.update_beside * 2.0);
                }
                Resource::Nvme => {
                    (rates.nvme_read, rates.nvme_write) = (rates.nvme_read * 2.0, rates.nvme_write * 2.0);
                    rates.nvme_both *= 2.0;
                }
            }
            (resource, now - predict(layout, plan, &rates, &work).seconds)
        })
        .collect();
    gains.sort_by(|a, b| b.1.total_cmp(&a.1));
    gains
}

/// Rates of the link: up, down, both together.
#[derive(Clone, Copy, Debug)]
struct Link {
    up: f64,
    down: f64,
    both: f64,
}

impl Link {
    /// What parameters and gradients leave of it in a step of so many seconds.
    #[expect(clippy::cast_precision_loss, reason = "a prediction is no bookkeeping")]
    fn left(rates: &Rates, paged: &Traffic, step: f64) -> Self {
        let (up, down) = (paged.up as f64 / step, paged.down as f64 / step);
        let left = |rate: f64, taken: f64| (rate - taken).max(0.01 * rate);
        Self { up: left(rates.up, up), down: left(rates.down, down), both: left(rates.both, up + down) }
    }

    fn seconds(self, up: u64, down: u64) -> f64 {
        seconds(up, self.up).max(seconds(down, self.down)).max(seconds(up + down, self.both))
    }
}

/// When each resource is free, and since when each unit's bytes are where they are needed.
struct Clocks<'a> {
    layout: &'a Layout,
    plan: &'a Placement,
    rates: &'a Rates,
    work: &'a Work,
    units: &'a [UnitTraffic],
    windows: &'a [Window],
    /// The part of the link that lanes have; none without lanes.
    lanes: Option<Link>,
    free: [f64; COUNT],
    /// Per unit, when its home holds the result of its last update, and the resource that this waited for.
    home: Vec<(f64, Resource)>,
    /// Per unit, when its last gradient is in host memory.
    landed: Vec<f64>,
    /// Per chunk of the ring, when the last window over it has ended.
    frames: Vec<f64>,
    busy: [f64; COUNT],
    waits: [f64; COUNT],
    /// Parameters updated on behalf of the host, and those of them that lanes updated.
    updated: [f64; 2],
}

#[expect(clippy::cast_precision_loss, reason = "a prediction is no bookkeeping")]
fn seconds(bytes: u64, rate: f64) -> f64 {
    if bytes == 0 { 0.0 } else { bytes as f64 / rate }
}

impl Clocks<'_> {
    /// Plays one step; returns the time at which the next one begins.
    fn step(&mut self) -> f64 {
        let last = self.windows.len() / self.work.uses.passes.max(1) as usize;
        let last = self.windows.len() - last;
        for (at, &window) in self.windows.iter().enumerate() {
            self.window(window, at >= last);
        }
        self.take(Resource::Compute, 0.0, self.work.rest);
        let unread: Vec<UnitId> = self.layout.ids().filter(|u| !self.work.uses.backward[u.index()]).collect();
        for unit in unread {
            // The unit's gradient goes down although its backward reads no parameters.
            self.gradient(unit, true);
        }
        // The optimizer's step begins only when all gradients are down.
        self.await_for(Resource::Down, self.free[Resource::Down as usize]);
        self.update();
        self.free[Resource::Compute as usize]
    }

    /// Occupies a resource from `ready` on, or from when it is free; returns the end.
    fn take(&mut self, resource: Resource, ready: f64, seconds: f64) -> f64 {
        let r = resource as usize;
        self.free[r] = self.free[r].max(ready) + seconds;
        self.busy[r] += seconds;
        self.free[r]
    }

    /// The training thread waits until `ready`, because of `cause`.
    fn await_for(&mut self, cause: Resource, ready: f64) {
        let compute = &mut self.free[Resource::Compute as usize];
        if ready > *compute {
            self.waits[cause as usize] += ready - *compute;
            *compute = ready;
        }
    }

    fn window(&mut self, window: Window, last_pass: bool) {
        let (unit, u) = (window.unit, window.unit.index());
        if window.pages_in {
            let (ready, cause) = self.page_in(unit);
            self.await_for(cause, ready);
        }
        let compute = match window.phase {
            Phase::Backward => self.work.backward[u],
            _ => self.work.forward[u],
        };
        let resident = self.plan.resident(unit);
        let end = self.take(Resource::Compute, 0.0, compute + if resident { 0.0 } else { WINDOW_SECONDS });
        for chunk in self.plan.chunks_of(self.plan.spans[u]) {
            self.frames[chunk as usize] = end;
        }
        if window.phase == Phase::Backward {
            self.gradient(unit, last_pass);
        }
    }

    /// Brings a unit's parameters to the device; returns when they are there, and the resource that delayed them.
    fn page_in(&mut self, unit: UnitId) -> (f64, Resource) {
        let u = unit.index();
        let bytes = self.units[u].params;
        let (mut ready, mut cause) = self.home[u];
        if self.plan.homes[u].params == Tier::Nvme {
            let end = self.take(Resource::Nvme, ready, seconds(bytes, self.rates.nvme_read));
            (ready, cause) = (end, Resource::Nvme);
        }
        let frames = self.plan.chunks_of(self.plan.spans[u]).map(|c| self.frames[c as usize]).fold(0.0, f64::max);
        let link = self.free[Resource::Up as usize].max(frames);
        if link >= ready {
            cause = Resource::Up;
        }
        let copy = seconds(bytes, self.rates.up);
        self.steal(copy);
        (self.take(Resource::Up, ready.max(frames), copy), cause)
    }

    fn gradient(&mut self, unit: UnitId, last_pass: bool) {
        let u = unit.index();
        if self.plan.resident(unit) || self.units[u].grads == 0 {
            return;
        }
        let copy = seconds(self.units[u].grads, self.rates.down);
        self.steal(copy);
        self.landed[u] = self.take(Resource::Down, self.free[Resource::Compute as usize], copy);
        let out = seconds(self.units[u].grads_out, self.rates.nvme_write);
        if out > 0.0 {
            self.landed[u] = self.take(Resource::Nvme, self.landed[u], out);
        }
        if last_pass && self.plan.spare[u] {
            let update = self.on_processor(u, self.rates.update_beside);
            self.home[u] = self.stream(u, self.landed[u], update);
        }
    }

    /// Makes a unit's update from `ready` on, with what it reads from and writes to NVMe, for which the processor alone needs `update`
    /// seconds; returns the end, and the resource that decides it.
    fn stream(&mut self, u: usize, ready: f64, update: f64) -> (f64, Resource) {
        let one = self.units[u];
        let moved = seconds(one.nvme_read + one.nvme_write, self.rates.nvme_both);
        let disk = self.take(Resource::Nvme, ready, moved);
        let (end, whose) = self.run(u, ready, update);
        // Pieces pass through the drive and the update; the update waits for the drive, not the drive for the update.
        if moved > 0.0 {
            let runner = if self.lanes.is_some() { Resource::Lanes } else { Resource::Update };
            let update = &mut self.free[runner as usize];
            *update = update.max(disk);
        }
        if self.rates.shared.is_some() {
            self.free[Resource::Compute as usize] += update;
        }
        if moved > 0.0 && disk > end { (disk, Resource::Nvme) } else { (end, whose) }
    }

    /// Where the device is the processor, a copy takes one of the threads that compute.
    fn steal(&mut self, copy: f64) {
        if let Some(threads) = self.rates.shared {
            self.free[Resource::Compute as usize] += copy / f64::from(threads);
        }
    }

    /// Seconds of an update at the rate `beside` copies. Where the processor makes the copies, `steal` has counted their
    /// time.
    fn on_processor(&self, u: usize, beside: f64) -> f64 {
        let rate = if self.rates.shared.is_some() { self.rates.update } else { beside };
        seconds(self.units[u].update, rate)
    }

    /// Makes a unit's update, for which the processor alone needs `processor` seconds: on its threads, on lanes, or on both until
    /// they meet. Returns the end, and the resource that decides it.
    #[expect(clippy::cast_precision_loss, reason = "a prediction is no bookkeeping")]
    fn run(&mut self, u: usize, ready: f64, processor: f64) -> (f64, Resource) {
        let one = self.units[u];
        let elems = one.trained as f64;
        self.updated[0] += elems;
        let Some(link) = self.lanes else {
            return (self.take(Resource::Update, ready, processor), Resource::Update);
        };
        // All that the update reads and writes, except the gradient, crosses the link once each way.
        let down = (one.update - one.grads) / 2;
        let up = down + one.grads;
        let alone = link.seconds(up, down);
        let part = if self.work.lanes_alone || alone == 0.0 { 1.0 } else { processor / (processor + alone) };
        self.updated[1] += part * elems;
        self.busy[Resource::Up as usize] += part * seconds(up, self.rates.up);
        self.busy[Resource::Down as usize] += part * seconds(down, self.rates.down);
        // One thread of the runtime leads both: one update at a time.
        let end = self.take(Resource::Lanes, ready, part * alone);
        if self.work.lanes_alone {
            return (end, Resource::Lanes);
        }
        self.busy[Resource::Update as usize] += (1.0 - part) * processor;
        (end, Resource::Update)
    }

    /// The updates of a step, in forward order: the device's at once, the processor's while the next forward begins.
    fn update(&mut self) {
        let streams = self.plan.nvme_bytes > 0;
        for u in 0..self.units.len() {
            if self.plan.homes[u].params == Tier::Hbm {
                let device = seconds(self.units[u].trained, self.rates.device_update);
                self.take(Resource::Compute, 0.0, device);
            }
        }
        let step = self.free[Resource::Compute as usize];
        for u in 0..self.units.len() {
            let one = self.units[u];
            if self.plan.homes[u].params == Tier::Hbm || one.trained == 0 {
                continue;
            }
            if self.plan.spare[u] {
                // Of an update that ran ahead only the commit is left.
                self.home[u].0 = self.home[u].0.max(step);
                continue;
            }
            // Lanes copy too: their updates run beside copies.
            let beside = self.rates.update_beside;
            let rate = if self.lanes.is_some() { beside } else { f64::midpoint(self.rates.update, beside) };
            let update = self.on_processor(u, rate);
            self.home[u] = self.stream(u, step, update);
        }
        if self.rates.shared.is_some() && !streams {
            // The step waits for updates that would compete with the forward for the same cores.
            let end = self.home.iter().map(|h| h.0).fold(0.0, f64::max);
            self.await_for(Resource::Update, end);
        }
    }
}
