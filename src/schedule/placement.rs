//! Where every segment lives: pure arithmetic from layout, budgets and wishes to a placement that holds.
//!
//! P1: the sum of what is placed in a tier, staging included, never exceeds its budget. P2: the same input gives the
//! same placement.

mod device;
mod host;
pub mod lanes;

use crate::{
    device::FrameSpan,
    error::{Code, Error, Result},
    model::{Layout, SECTION_ALIGN, Unit},
    units::{ByteCount, Tier, UnitId, round_up},
};
use device::Device;
use host::HostNeed;

/// What may be used, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Budgets {
    /// Frames and resident units on the compute tier; `None`: it is the host's memory, and `host` holds them too.
    pub hbm: Option<ByteCount>,
    /// Page-locked host memory.
    pub host: ByteCount,
    /// Files.
    pub nvme: ByteCount,
    /// Of `host`, for updates ahead of the step; `None`: at most half of what everything else leaves.
    pub spare: Option<ByteCount>,
}

/// Where a unit's segments are wanted; `None` lets the planner choose. A unit is resident on the compute device whole or not
/// at all: for that `params` is `None`, and `optimizer` is `None` or `Hbm`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tiers {
    /// Home of the parameters.
    pub params: Option<Tier>,
    /// Home of the optimizer's states.
    pub optimizer: Option<Tier>,
}

/// What the machine dictates.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Smallest size of a frame chunk.
    pub granularity: u64,
    /// Bytes of one transfer to or from NVMe.
    pub block: u64,
    /// Whether there are NVMe paths at all.
    pub has_nvme: bool,
    /// Whether units that the policy does not place there may live on the compute device.
    pub residents: bool,
    /// Whether lanes of the compute device take part in updates.
    pub lanes: LaneUse,
}

/// Whether the compute device takes part in updating what has its home on the host or on NVMe, which takes staging memory there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LaneUse {
    /// No.
    #[default]
    Never,
    /// Where the budget holds the staging memory beside a ring that streams at full speed.
    IfRoom,
    /// Yes.
    Always,
}

/// The homes of one unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Homes {
    /// Home of the parameters.
    pub params: Tier,
    /// Home of the states; `Hbm` if and only if `params` is: the unit is resident, with its gradients, and has no place in the
    /// ring, on the host or on NVMe.
    pub optimizer: Tier,
}

/// Where everything lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Per unit.
    pub homes: Vec<Homes>,
    /// Bytes of one chunk of the ring.
    pub chunk_bytes: u64,
    /// Chunks in the ring.
    pub ring_chunks: u32,
    /// Each unit's place in the ring; none for residents.
    pub spans: Vec<FrameSpan>,
    /// Host frames through which parameters pass on their way from NVMe, and their size.
    pub page_slots: (u32, u64),
    /// Host frames through which states pass on their way from and to NVMe, and their size. One of them serves what is
    /// not part of a step: loading, stray reads, checkpoints.
    pub update_slots: (u32, u64),
    /// Elements of one step of an update that streams its states.
    pub update_elems: u64,
    /// Per unit: its update may run ahead of the step, into a second set of states and a second place for its parameters.
    pub spare: Vec<bool>,
    /// Elements that a lane of the compute device updates at once; 0 where the processor updates alone.
    pub lane_elems: u64,
    /// Bytes of staging memory of all lanes, on the compute tier.
    pub lane_bytes: u64,
    /// Bytes on the compute tier in all: the ring, residents, and lanes.
    pub hbm_bytes: u64,
    /// Host bytes in all, without shadows. The compute tier's are among them where `budget.hbm` sets no bound.
    pub host_bytes: u64,
    /// Host bytes left for what is read outside of steps: parameters that live on NVMe, and optimizer states.
    pub shadow_bytes: u64,
    /// NVMe bytes in all.
    pub nvme_bytes: u64,
}

/// Frames of a save.
pub const SAVE_FRAMES: u32 = 8;
/// Bytes of the largest one.
pub const SAVE_FRAME: u64 = 2 << 20;
/// Bytes of the smallest one.
pub const SMALLEST_SAVE_FRAME: u64 = 8 << 10;
/// Chunks that a save reads ahead from NVMe at most.
const SAVE_CHUNKS: u64 = 16;

/// Places a model.
///
/// # Errors
/// `FN-E201`, `FN-E202`, `FN-E203` with what is needed, what is allowed, and what would help; `FN-E503` for wishes that
/// contradict each other.
pub fn place(layout: &Layout, tiers: &[Tiers], budgets: &Budgets, limits: &Limits) -> Result<Placement> {
    assert_eq!(layout.units.len(), tiers.len(), "one wish per unit");
    if !limits.has_nvme && tiers.iter().any(|t| t.params == Some(Tier::Nvme) || t.optimizer == Some(Tier::Nvme)) {
        return Err(Error::new(Code::NvmeBudget, "the policy places states on NVMe, but nvme.paths is empty.")
            .action("Name a directory on a local disk in nvme.paths."));
    }
    let tiers = device::sound(layout, tiers)?;
    let alone = with_lanes(layout, &tiers, budgets, limits, 0);
    let elems = lanes::elems(layout);
    let paged = |plan: &Placement| layout.ids().any(|u| layout.unit(u).optimizer_bytes() > 0 && !plan.resident(u));
    match limits.lanes {
        LaneUse::Never => alone,
        _ if elems == 0 || alone.as_ref().is_ok_and(|plan| !paged(plan)) => alone,
        LaneUse::Always => with_lanes(layout, &tiers, budgets, limits, elems),
        LaneUse::IfRoom => {
            let alone = alone?;
            let shared = with_lanes(layout, &tiers, budgets, limits, elems);
            let moved = |plan: &Placement| step_bytes(layout, &plan.homes);
            Ok(shared.ok().filter(|plan| plan.streams() && moved(plan) <= moved(&alone)).unwrap_or(alone))
        }
    }
}

/// Places a model beside lanes for so many elements each.
fn with_lanes(
    layout: &Layout,
    tiers: &[Tiers],
    budgets: &Budgets,
    limits: &Limits,
    lane_elems: u64,
) -> Result<Placement> {
    let arranged = |device: Device| {
        let homes = arrange(layout, tiers, budgets, limits, &device);
        (device, homes)
    };
    let mut found = arranged(Device::fullest(layout, tiers, budgets, limits, lane_elems)?);
    if budgets.hbm.is_none() {
        // Residents take the host's memory then: keep them only where all else fits too and nothing more goes to NVMe.
        let without = arranged(Device::least(layout, tiers, budgets, limits, lane_elems)?);
        let holds = holds(layout, budgets, &found.0, &found.1);
        if !holds || step_bytes(layout, &found.1) > step_bytes(layout, &without.1) {
            found = without;
        }
    }
    let (device, homes) = found;
    check(layout, budgets, limits, &device, &homes)?;
    measure(layout, budgets, &device, homes)
}

/// True if the homes are within the budgets of host and NVMe.
fn holds(layout: &Layout, budgets: &Budgets, device: &Device, homes: &[Homes]) -> bool {
    HostNeed::new(layout, device, homes).smallest().total() <= budgets.host.0
        && nvme_bytes(layout, homes) <= budgets.nvme.0
}

/// Homes for a model whose residents are known.
fn arrange(layout: &Layout, tiers: &[Tiers], budgets: &Budgets, limits: &Limits, device: &Device) -> Vec<Homes> {
    let here = Tiers { params: Some(Tier::Hbm), optimizer: Some(Tier::Hbm) };
    let tiers: Vec<Tiers> = tiers.iter().zip(&device.resident).map(|(&t, &r)| if r { here } else { t }).collect();
    let down = wished(&tiers);
    if !limits.has_nvme {
        return raised(&tiers, &down, true, true, |_| true);
    }
    let mut homes = least(layout, &tiers, device, &down);
    climb(layout, &tiers, budgets, device, &mut homes);
    best(layout, &tiers, budgets, device, homes)
}

/// `homes`, with parameters (if `params`) and states (if `optimizer`) on the host where they may choose their tier and
/// `which` selects the unit.
fn raised(
    tiers: &[Tiers],
    homes: &[Homes],
    params: bool,
    optimizer: bool,
    which: impl Fn(usize) -> bool,
) -> Vec<Homes> {
    let up = |wish: Option<Tier>, asked, i, now| if wish.is_none() && asked && which(i) { Tier::Host } else { now };
    let units = homes.iter().zip(tiers).enumerate();
    units
        .map(|(i, (h, t))| Homes {
            params: up(t.params, params, i, h.params),
            optimizer: up(t.optimizer, optimizer, i, h.optimizer),
        })
        .collect()
}

/// The homes that need the least host memory. Not all on NVMe: a unit much wider than the others costs less at home than
/// the staging through which it would have to pass.
fn least(layout: &Layout, tiers: &[Tiers], device: &Device, down: &[Homes]) -> Vec<Homes> {
    let width = |i: usize| layout.units[i].param_bytes();
    let mut widths: Vec<u64> = (0..tiers.len()).filter(|&i| tiers[i].params.is_none()).map(width).collect();
    widths.sort_unstable();
    widths.dedup();
    let mut choices = vec![down.to_vec(), raised(tiers, down, true, true, |_| true)];
    let mut found = (u64::MAX, Vec::new());
    for homes in choices.drain(..).chain(widths.iter().map(|&w| raised(tiers, down, true, false, |i| width(i) >= w))) {
        let need = HostNeed::new(layout, device, &homes).smallest().total();
        if need < found.0 {
            found = (need, homes);
        }
    }
    found.1
}

/// Moves what may choose its tier up into the host while the budget holds it beside ample staging: parameters first (they
/// are read twice a step), then the optimizer's states, in the order of the units.
fn climb(layout: &Layout, tiers: &[Tiers], budgets: &Budgets, device: &Device, homes: &mut [Homes]) {
    let fits = |homes: &[Homes]| HostNeed::new(layout, device, homes).ample(budgets).total() <= budgets.host.0;
    for pass in [true, false] {
        for i in 0..homes.len() {
            let before = homes[i];
            match (pass, tiers[i].params, tiers[i].optimizer) {
                (true, None, _) => homes[i].params = Tier::Host,
                (false, _, None) => homes[i].optimizer = Tier::Host,
                _ => continue,
            }
            if !fits(homes) {
                homes[i] = before;
            }
        }
    }
}

/// Of the homes found by climbing and those with each kind in one tier, the ones that hold and move the fewest bytes from
/// and to NVMe per step.
fn best(layout: &Layout, tiers: &[Tiers], budgets: &Budgets, device: &Device, climbed: Vec<Homes>) -> Vec<Homes> {
    let down = wished(tiers);
    let plain = [(true, true), (true, false), (false, true), (false, false)];
    let mut found = climbed;
    for (params, optimizer) in plain {
        let homes = raised(tiers, &down, params, optimizer, |_| true);
        let holds = |homes: &[Homes]| holds(layout, budgets, device, homes);
        if holds(&homes) && (!holds(&found) || step_bytes(layout, &homes) < step_bytes(layout, &found)) {
            found = homes;
        }
    }
    found
}

/// Every wish fulfilled; what has no wish goes to NVMe.
fn wished(tiers: &[Tiers]) -> Vec<Homes> {
    let or_nvme = |t: Option<Tier>| t.unwrap_or(Tier::Nvme);
    tiers.iter().map(|t| Homes { params: or_nvme(t.params), optimizer: or_nvme(t.optimizer) }).collect()
}

/// Bytes on NVMe.
fn nvme_bytes(layout: &Layout, homes: &[Homes]) -> u64 {
    let on = |tier, bytes| if tier == Tier::Nvme { bytes } else { 0 };
    let units = layout.units.iter().zip(homes);
    units.map(|(u, h)| on(h.params, u.param_bytes()) + on(h.optimizer, u.optimizer_bytes())).sum()
}

/// Bytes read from and written to NVMe in a step: parameters for both passes, and both kinds for the update.
fn step_bytes(layout: &Layout, homes: &[Homes]) -> u64 {
    let on = |tier, bytes| if tier == Tier::Nvme { 2 * bytes } else { 0 };
    let units = layout.units.iter().zip(homes);
    units
        .map(|(u, h)| {
            let updated = if u.trainable() { u.param_bytes() } else { 0 };
            on(h.params, u.param_bytes() + updated) + on(h.optimizer, u.optimizer_bytes())
        })
        .sum()
}

fn measure(layout: &Layout, budgets: &Budgets, device: &Device, homes: Vec<Homes>) -> Result<Placement> {
    let need = HostNeed::new(layout, device, &homes).fitted(budgets);
    let mut left = budgets.host.0.saturating_sub(need.total());
    let ring_chunks = device.ring_chunks(need.ring_bytes(), left / 2)?;
    let ring_bytes = u64::from(ring_chunks) * device.chunk_bytes;
    let more = if budgets.hbm.is_none() { ring_bytes - need.ring_bytes() } else { 0 };
    left -= more;
    let (spare, spare_bytes) = spares(layout, &homes, budgets.spare.map_or(left / 2, |b| b.0.min(left)));
    let host_bytes = need.fixed() + more + spare_bytes;
    Ok(Placement {
        chunk_bytes: device.chunk_bytes,
        ring_chunks,
        spans: device.spans(ring_chunks),
        page_slots: need.page_slots,
        update_slots: need.update_slots,
        update_elems: need.update_elems,
        spare,
        lane_elems: device.lane_elems,
        lane_bytes: device.lane_bytes,
        hbm_bytes: ring_bytes + device.fixed_bytes(),
        host_bytes,
        shadow_bytes: budgets.host.0.saturating_sub(host_bytes),
        nvme_bytes: nvme_bytes(layout, &homes),
        homes,
    })
}

/// Which units get a second set of states and parameters in host memory, and its bytes: the first in forward order, whose
/// updates the next forward waits for.
fn spares(layout: &Layout, homes: &[Homes], mut room: u64) -> (Vec<bool>, u64) {
    let before = room;
    let one = |(unit, home): (&Unit, &Homes)| {
        let on_host = home.params == Tier::Host && home.optimizer == Tier::Host;
        let bytes = spare_bytes(unit);
        let fits = unit.trainable() && on_host && bytes <= room;
        room -= if fits { bytes } else { 0 };
        fits
    };
    let spare = layout.units.iter().zip(homes).map(one).collect();
    (spare, before - room)
}

/// What a second place for an update's results takes.
pub fn spare_bytes(unit: &Unit) -> u64 {
    unit.param_bytes() + unit.optimizer_bytes()
}

fn check(layout: &Layout, budgets: &Budgets, limits: &Limits, device: &Device, homes: &[Homes]) -> Result<()> {
    let need = HostNeed::new(layout, device, homes).smallest();
    if need.total() > budgets.host.0 {
        let on_host = |f: fn(&Homes) -> Tier| homes.iter().any(|h| f(h) == Tier::Host);
        let or = match (limits.has_nvme, on_host(|h| h.optimizer), on_host(|h| h.params)) {
            (false, _, _) => "or name a directory on a local disk in nvme.paths.",
            (true, true, _) => "or set optimizer.tier to \"nvme\" or \"auto\".",
            (true, false, true) => "or set params.tier to \"nvme\" or \"auto\".",
            (true, false, false) => "or offload a smaller model; everything that can lie on NVMe does already.",
        };
        let compute = match need.compute {
            0 => String::new(),
            bytes => format!(", compute tier {}", ByteCount(bytes)),
        };
        return Err(Error::new(
            Code::HostBudget,
            format!(
                "the plan needs {} of host memory (homes {}, gradients {}, staging {}{compute}); budget.host allows {}.",
                ByteCount(need.total()),
                ByteCount(need.homes),
                ByteCount(need.grads),
                ByteCount(need.total() - need.homes - need.grads - need.compute),
                budgets.host
            ),
        )
        .needing(ByteCount(need.total()))
        .action(format!("Raise budget.host to {}, {or}", at_least(need.total()))));
    }
    let nvme = nvme_bytes(layout, homes);
    if nvme > budgets.nvme.0 {
        return Err(Error::new(
            Code::NvmeBudget,
            format!("the plan needs {} on NVMe; budget.nvme allows {}.", ByteCount(nvme), budgets.nvme),
        )
        .needing(ByteCount(nvme))
        .action(format!("Raise budget.nvme to {}, or budget.host so that less has to lie there.", at_least(nvme))));
    }
    Ok(())
}

/// Bytes of one chunk of a segment on NVMe. Two bytes per element is the narrowest kind; every kind's piece is then whole
/// chunks.
fn chunk_on_nvme(update_elems: u64) -> u64 {
    (update_elems * 2).min(1 << 20)
}

/// A size as a policy spells it, rounded up so that it is enough.
pub(crate) fn at_least(bytes: u64) -> String {
    let (unit, name) = if bytes < 16 << 20 { (1 << 10, "KiB") } else { (1 << 20, "MiB") };
    format!("{}{name}", bytes.div_ceil(unit))
}

impl Placement {
    /// True if the frames of two units overlap.
    pub fn share_frames(&self, a: UnitId, b: UnitId) -> bool {
        let (x, y) = (self.spans[a.index()], self.spans[b.index()]);
        self.chunks_of(x).any(|c| self.chunks_of(y).any(|d| c == d))
    }

    /// The ring chunks of a span.
    pub fn chunks_of(&self, span: FrameSpan) -> impl Iterator<Item = u32> + use<> {
        let ring = self.ring_chunks;
        (0..span.chunks).map(move |i| (span.first_chunk + i) % ring)
    }

    /// True if the unit lives on the compute device for good.
    pub fn resident(&self, unit: UnitId) -> bool {
        self.homes[unit.index()].params == Tier::Hbm
    }

    /// True if the ring holds what streams at full speed.
    fn streams(&self) -> bool {
        let chunks = || self.spans.iter().map(|span| u64::from(span.chunks));
        let fair = device::FAIR_FRAMES * chunks().max().unwrap_or(0);
        u64::from(self.ring_chunks) >= fair.min(chunks().sum())
    }

    /// Removes the lanes from the placement, when they cannot be made after all.
    pub fn without_lanes(&mut self) {
        self.hbm_bytes -= self.lane_bytes;
        (self.lane_elems, self.lane_bytes) = (0, 0);
    }

    /// The largest parameters that live on NVMe: what is in host memory besides while they are read or written as a whole.
    pub fn widest_on_nvme(&self, layout: &Layout) -> u64 {
        let on_nvme = layout.units.iter().zip(&self.homes).filter(|(_, h)| h.params == Tier::Nvme);
        on_nvme.map(|(u, _)| u.param_bytes()).max().unwrap_or(0)
    }

    /// Chunks of what a save reads from NVMe that are in host memory at a time, of which `slack` bytes are left: at most a quarter of it.
    pub fn chunks_ahead(&self, slack: u64) -> u64 {
        let chunk = self.chunk_on_nvme().max(1);
        (slack / 4 / chunk).clamp(2, SAVE_CHUNKS)
    }

    /// Host memory that a save or a load takes besides: frames of its writer, from at most half of what is left, and what it
    /// has read from NVMe.
    pub fn checkpoint_bytes(&self) -> u64 {
        let read = if self.nvme_bytes > 0 { self.chunks_ahead(self.shadow_bytes) * self.chunk_on_nvme() } else { 0 };
        let frames = u64::from(SAVE_FRAMES);
        let frame =
            (self.shadow_bytes.saturating_sub(read) / 2 / frames).min(SAVE_FRAME) / SECTION_ALIGN * SECTION_ALIGN;
        frames * frame + read
    }

    /// Bytes of one chunk of a segment on NVMe.
    pub fn chunk_on_nvme(&self) -> u64 {
        chunk_on_nvme(self.update_elems)
    }

    /// Bytes of the ring.
    pub fn ring_bytes(&self) -> u64 {
        u64::from(self.ring_chunks) * self.chunk_bytes
    }

    /// Rounds a length up to what direct I/O moves.
    pub fn padded(bytes: u64) -> u64 {
        round_up(bytes, SECTION_ALIGN)
    }
}
