//! What a step costs in time: the windows of a step played through, one clock per link and processor, at measured rates.
//!
//! T1: pure; the same input gives the same prediction. T2: a faster link or processor never predicts a longer step.

use crate::{
    model::Layout,
    schedule::{
        Placement,
        order::Phase,
        traffic::{self, Traffic, UnitTraffic, Uses, Window},
    },
    units::{Tier, UnitId},
};

/// How fast things go: bytes, or parameters, per second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Over the link to the device.
    pub up: f64,
    /// Over the link from the device.
    pub down: f64,
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
}

impl Resource {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Compute, Self::Up, Self::Down, Self::Nvme, Self::Update];

    /// The name in tables: that of the statistics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Compute => "compute",
            Self::Up => "host_to_device",
            Self::Down => "device_to_host",
            Self::Nvme => "nvme",
            Self::Update => "cpu_update",
        }
    }
}

/// The prediction for a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Cost {
    /// From one step to the next.
    pub seconds: f64,
    /// How long each resource is busy, in the order of [`Resource::ALL`].
    pub busy: [f64; 5],
    /// How long the training thread waits for each; 0 for compute.
    pub waits: [f64; 5],
    /// What it is bound by.
    pub binding: Resource,
    /// Bytes moved.
    pub traffic: Traffic,
}

/// What the hooks around a window cost the training thread.
const WINDOW_SECONDS: f64 = 40e-6;
/// Steps played before one is believed.
const WARM: usize = 3;
/// Waiting for less than this part of a step does not bind it.
const NEGLIGIBLE: f64 = 0.02;

/// Predicts a step.
pub fn predict(layout: &Layout, plan: &Placement, rates: &Rates, work: &Work) -> Cost {
    let windows = traffic::windows(layout, plan, &work.uses);
    let units: Vec<UnitTraffic> =
        layout.units.iter().zip(&plan.homes).map(|(u, h)| traffic::of_unit(u, h.params, h.optimizer)).collect();
    let mut clocks = Clocks {
        layout,
        plan,
        rates,
        work,
        units: &units,
        windows: &windows,
        free: [0.0; 5],
        home: vec![(0.0, Resource::Update); units.len()],
        landed: vec![0.0; units.len()],
        frames: vec![0.0; plan.ring_chunks as usize],
        busy: [0.0; 5],
        waits: [0.0; 5],
    };
    let mut start = 0.0;
    for _ in 0..WARM {
        start = clocks.step();
        (clocks.busy, clocks.waits) = ([0.0; 5], [0.0; 5]);
    }
    let seconds = clocks.step() - start;
    let (busy, waits) = (clocks.busy, clocks.waits);
    let longest = |of: &[f64; 5]| Resource::ALL.into_iter().max_by(|a, b| of[*a as usize].total_cmp(&of[*b as usize]));
    let waited: f64 = waits.iter().sum();
    let binding =
        if rates.shared.is_some() || waited < NEGLIGIBLE * seconds { longest(&busy) } else { longest(&waits) };
    let traffic = traffic::of_step(layout, plan, &work.uses);
    Cost { seconds, busy, waits, binding: binding.unwrap_or(Resource::Compute), traffic }
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
                Resource::Up => rates.up *= 2.0,
                Resource::Down => rates.down *= 2.0,
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

/// When each resource is free, and since when each unit's bytes are where they are needed.
struct Clocks<'a> {
    layout: &'a Layout,
    plan: &'a Placement,
    rates: &'a Rates,
    work: &'a Work,
    units: &'a [UnitTraffic],
    windows: &'a [Window],
    free: [f64; 5],
    /// The unit's home holds the result of its last update, and what that waited for.
    home: Vec<(f64, Resource)>,
    /// Its last gradient is in host memory.
    landed: Vec<f64>,
    /// The last window over a chunk of the ring has ended.
    frames: Vec<f64>,
    busy: [f64; 5],
    waits: [f64; 5],
}

#[expect(clippy::cast_precision_loss, reason = "a prediction is no bookkeeping")]
fn seconds(bytes: u64, rate: f64) -> f64 {
    if bytes == 0 { 0.0 } else { bytes as f64 / rate }
}

impl Clocks<'_> {
    /// Plays one step; the time at which the next one begins.
    fn step(&mut self) -> f64 {
        let last = self.windows.len() / self.work.uses.passes.max(1) as usize;
        let last = self.windows.len() - last;
        for (at, &window) in self.windows.iter().enumerate() {
            self.window(window, at >= last);
        }
        self.take(Resource::Compute, 0.0, self.work.rest);
        let unread: Vec<UnitId> = self.layout.ids().filter(|u| !self.work.uses.backward[u.index()]).collect();
        for unit in unread {
            // Its gradient leaves although its parameters were not needed.
            self.gradient(unit, true);
        }
        // The step is the caller's only when all gradients are down.
        self.await_for(Resource::Down, self.free[Resource::Down as usize]);
        self.update();
        self.free[Resource::Compute as usize]
    }

    /// Occupies a resource from `ready` on, or from when it is free; the end.
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

    /// Brings a unit's parameters to the device: when they are there, and what they came late for.
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
        if last_pass && self.plan.spare[u] {
            let update = self.on_processor(u, self.rates.update_beside);
            self.home[u] = (self.take(Resource::Update, self.landed[u], update), Resource::Update);
            if self.rates.shared.is_some() {
                self.free[Resource::Compute as usize] += update;
            }
        }
    }

    /// A copy on the processor that computes takes one of its threads.
    fn steal(&mut self, copy: f64) {
        if let Some(threads) = self.rates.shared {
            self.free[Resource::Compute as usize] += copy / f64::from(threads);
        }
    }

    /// An update at a rate beside copies; where those are made by the processor itself, they have taken their time already.
    fn on_processor(&self, u: usize, beside: f64) -> f64 {
        let rate = if self.rates.shared.is_some() { self.rates.update } else { beside };
        seconds(self.units[u].update, rate)
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
                // Only the commit is left, of what ran ahead.
                self.home[u].0 = self.home[u].0.max(step);
                continue;
            }
            let update = self.on_processor(u, (self.rates.update + self.rates.update_beside) / 2.0);
            let moved = seconds(one.nvme_read + one.nvme_write, self.rates.nvme_both);
            let disk = self.take(Resource::Nvme, step, moved);
            let end = self.take(Resource::Update, step, update);
            self.home[u] = if moved > 0.0 && disk > end { (disk, Resource::Nvme) } else { (end, Resource::Update) };
            // Pieces pass through both; the processor waits for the drive, not the drive for it.
            if moved > 0.0 {
                let update = &mut self.free[Resource::Update as usize];
                *update = update.max(disk);
            }
            if self.rates.shared.is_some() {
                self.free[Resource::Compute as usize] += update;
            }
        }
        if self.rates.shared.is_some() && !streams {
            // The step waits for updates that would compete with the forward for the same cores.
            let end = self.home.iter().map(|h| h.0).fold(0.0, f64::max);
            self.await_for(Resource::Update, end);
        }
    }
}
