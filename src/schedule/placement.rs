//! Where every segment lives: pure arithmetic from layout, budgets and wishes to a placement that holds.
//!
//! P1: the sum of what is placed in a tier, staging included, never exceeds its budget. P2: the same input gives the
//! same placement.

use crate::{
    device::FrameSpan,
    error::{Code, Error, Result},
    model::{Layout, SECTION_ALIGN},
    units::{ByteCount, Tier, UnitId, round_up},
};

/// What may be used, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Budgets {
    /// Frames on the compute tier; `None`: as much as all parameters need.
    pub hbm: Option<ByteCount>,
    /// Page-locked host memory.
    pub host: ByteCount,
    /// Files.
    pub nvme: ByteCount,
}

/// Where a unit's segments are wanted; `None` lets the planner choose between host and NVMe.
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
}

/// The homes of one unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Homes {
    /// `Host` or `Nvme`.
    pub params: Tier,
    /// `Host` or `Nvme`.
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
    /// Each unit's place in the ring.
    pub spans: Vec<FrameSpan>,
    /// Host frames through which parameters pass on their way from NVMe, and their size.
    pub page_slots: (u32, u64),
    /// Host frames through which states pass on their way from and to NVMe, and their size. One of them serves what is
    /// not part of a step: loading, stray reads, checkpoints.
    pub update_slots: (u32, u64),
    /// Elements of one step of an update that streams its states.
    pub update_elems: u64,
    /// Host bytes in all, without shadows.
    pub host_bytes: u64,
    /// Host bytes left for what is read outside of steps: parameters that live on NVMe, and optimizer states.
    pub shadow_bytes: u64,
    /// NVMe bytes in all.
    pub nvme_bytes: u64,
}

const MAX_UPDATE_ELEMS: u64 = 1 << 20;
/// Two bytes per element of the narrowest kind must still be a whole block of direct I/O.
const MIN_UPDATE_ELEMS: u64 = SECTION_ALIGN / 2;
/// Below this, transfers are too short for the drive.
const FAIR_UPDATE_ELEMS: u64 = 1 << 16;
const UPDATE_SLOTS: u32 = 5;
/// Room for parameter, master and both moments, four bytes each.
const SLOT_BYTES_PER_ELEM: u64 = 16;
const PAGE_SLOTS: u32 = 3;

/// Places a model.
///
/// # Errors
/// `FN-E201`, `FN-E202`, `FN-E203` with what is needed, what is allowed, and what would help.
pub fn place(layout: &Layout, tiers: &[Tiers], budgets: &Budgets, limits: &Limits) -> Result<Placement> {
    assert_eq!(layout.units.len(), tiers.len(), "one wish per unit");
    let (chunk_bytes, ring_chunks, spans) = ring(layout, budgets, limits)?;
    let mut homes = wished(tiers);
    if !limits.has_nvme && tiers.iter().any(|t| t.params == Some(Tier::Nvme) || t.optimizer == Some(Tier::Nvme)) {
        return Err(Error::new(Code::NvmeBudget, "the policy places states on NVMe, but nvme.paths is empty.")
            .action("Name a directory on a local disk in nvme.paths."));
    }
    if !limits.has_nvme {
        homes = raised(tiers, &homes, true, true, |_| true);
    } else {
        homes = least(layout, tiers, &homes);
        climb(layout, tiers, budgets, &mut homes);
        homes = best(layout, tiers, budgets, homes);
    }
    let plan = measure(layout, homes, (chunk_bytes, ring_chunks, spans), budgets);
    check(layout, budgets, limits, &plan)?;
    Ok(plan)
}

/// The ring: units one after the other around it, so that neighbours never share a frame.
fn ring(layout: &Layout, budgets: &Budgets, limits: &Limits) -> Result<(u64, u32, Vec<FrameSpan>)> {
    let bytes: Vec<u64> = layout.units.iter().map(|u| u.param_bytes()).collect();
    let largest = bytes.iter().copied().max().unwrap_or(0);
    // Chunks as large as waste little: fewer handles to map.
    let mut chunk = limits.granularity;
    while chunk < 32 << 20 && chunk * 64 <= largest {
        chunk *= 2;
    }
    let chunks = |b: u64| b.div_ceil(chunk);
    let total: u64 = bytes.iter().map(|&b| chunks(b)).sum();
    let allowed = budgets.hbm.map_or(total, |b| (b.0 / chunk).min(total));
    let widest = chunks(largest);
    if widest > allowed {
        let index = bytes.iter().position(|&b| b == largest).unwrap_or(0);
        return Err(Error::new(
            Code::HbmBudget,
            format!(
                "unit '{}' needs {} on the compute tier at once; budget.hbm allows {}.",
                layout.units[index].name,
                ByteCount(widest * chunk),
                budgets.hbm.unwrap_or_default()
            ),
        )
        .action(format!("Raise budget.hbm to {}, or name smaller modules in units.match.", at_least(widest * chunk))));
    }
    let ring_chunks = u32::try_from(allowed)
        .map_err(|_| Error::new(Code::HbmBudget, "the model has too many frames to be addressed."))?;
    let mut next = 0u64;
    let spans = bytes
        .iter()
        .map(|&b| {
            let n = chunks(b);
            let first = if ring_chunks == 0 { 0 } else { next % u64::from(ring_chunks) };
            next += n;
            #[expect(clippy::cast_possible_truncation, reason = "both are below ring_chunks")]
            FrameSpan { first_chunk: first as u32, chunks: n as u32 }
        })
        .collect();
    Ok((chunk, ring_chunks, spans))
}

/// The homes with what may choose its tier on the host, as far as asked and `which` says of the unit.
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
fn least(layout: &Layout, tiers: &[Tiers], down: &[Homes]) -> Vec<Homes> {
    let width = |i: usize| layout.units[i].param_bytes();
    let mut widths: Vec<u64> = (0..tiers.len()).filter(|&i| tiers[i].params.is_none()).map(width).collect();
    widths.sort_unstable();
    widths.dedup();
    let mut choices = vec![down.to_vec(), raised(tiers, down, true, true, |_| true)];
    let mut found = (u64::MAX, Vec::new());
    for homes in choices.drain(..).chain(widths.iter().map(|&w| raised(tiers, down, true, false, |i| width(i) >= w))) {
        let need = HostNeed::new(layout, &homes).smallest().total();
        if need < found.0 {
            found = (need, homes);
        }
    }
    found.1
}

/// Moves what may choose its tier up into the host while the budget holds it beside ample staging: parameters first (they
/// are read twice a step), then the optimizer's states, in the order of the units.
fn climb(layout: &Layout, tiers: &[Tiers], budgets: &Budgets, homes: &mut [Homes]) {
    let fits = |homes: &[Homes]| HostNeed::new(layout, homes).ample(budgets).total() <= budgets.host.0;
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
fn best(layout: &Layout, tiers: &[Tiers], budgets: &Budgets, climbed: Vec<Homes>) -> Vec<Homes> {
    let down = wished(tiers);
    let plain = [(true, true), (true, false), (false, true), (false, false)];
    let mut found = climbed;
    for (params, optimizer) in plain {
        let homes = raised(tiers, &down, params, optimizer, |_| true);
        let holds = |homes: &[Homes]| {
            HostNeed::new(layout, homes).smallest().total() <= budgets.host.0
                && nvme_bytes(layout, homes) <= budgets.nvme.0
        };
        if holds(&homes) && (!holds(&found) || step_bytes(layout, &homes) < step_bytes(layout, &found)) {
            found = homes;
        }
    }
    found
}

/// Every wish fulfilled, and what may choose on NVMe.
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

/// Host bytes by purpose.
#[derive(Clone, Copy)]
struct HostNeed {
    homes: u64,
    grads: u64,
    page_slots: (u32, u64),
    update_slots: (u32, u64),
    update_elems: u64,
    shadow: u64,
}

impl HostNeed {
    /// Without staging.
    fn new(layout: &Layout, homes: &[Homes]) -> Self {
        let mut need = Self {
            homes: 0,
            grads: 0,
            page_slots: (0, 0),
            update_slots: (0, 0),
            update_elems: MAX_UPDATE_ELEMS,
            shadow: 0,
        };
        for (unit, home) in layout.units.iter().zip(homes) {
            need.grads += unit.grad_bytes();
            match home.params {
                Tier::Host => need.homes += unit.param_bytes(),
                _ => need.shadow = need.shadow.max(unit.param_bytes()),
            }
            if home.optimizer == Tier::Host {
                need.homes += unit.optimizer_bytes();
            }
        }
        if nvme_bytes(layout, homes) > 0 {
            need.update_slots.0 = UPDATE_SLOTS;
        }
        need
    }

    fn staged(mut self, pages: u32, elems: u64) -> Self {
        if self.shadow > 0 {
            self.page_slots = (pages, self.shadow);
        }
        if self.update_slots.0 > 0 {
            self.update_elems = elems;
            self.update_slots.1 = elems * SLOT_BYTES_PER_ELEM;
        }
        self
    }

    /// With the least staging that works.
    fn smallest(self) -> Self {
        self.staged(1, MIN_UPDATE_ELEMS)
    }

    /// With staging for full speed, as far as an eighth of the budget goes.
    fn ample(self, budgets: &Budgets) -> Self {
        let mut elems = MAX_UPDATE_ELEMS;
        while elems > MIN_UPDATE_ELEMS && elems * SLOT_BYTES_PER_ELEM * u64::from(UPDATE_SLOTS) > budgets.host.0 / 8 {
            elems /= 2;
        }
        self.staged(PAGE_SLOTS, elems)
    }

    /// With as much staging as the budget has room for; the least, if it has room for none. More budget never needs
    /// more than there is of it.
    fn fitted(self, budgets: &Budgets) -> Self {
        let mut need = self.ample(budgets);
        while need.total() > budgets.host.0 {
            let (pages, elems) = (need.page_slots.0, need.update_elems);
            need = match (pages > 1, elems > MIN_UPDATE_ELEMS && need.update_slots.0 > 0) {
                // Short transfers are slower than few slots.
                (_, true) if elems > FAIR_UPDATE_ELEMS => need.staged(pages, elems / 2),
                (true, _) => need.staged(pages - 1, elems),
                (false, true) => need.staged(pages, elems / 2),
                (false, false) => return need,
            };
        }
        need
    }

    fn fixed(&self) -> u64 {
        let slots = |(n, b): (u32, u64)| u64::from(n) * b;
        self.homes + self.grads + slots(self.page_slots) + slots(self.update_slots)
    }
    fn total(&self) -> u64 {
        self.fixed() + self.shadow
    }
}

fn measure(layout: &Layout, homes: Vec<Homes>, ring: (u64, u32, Vec<FrameSpan>), budgets: &Budgets) -> Placement {
    let need = HostNeed::new(layout, &homes).fitted(budgets);
    Placement {
        chunk_bytes: ring.0,
        ring_chunks: ring.1,
        spans: ring.2,
        page_slots: need.page_slots,
        update_slots: need.update_slots,
        update_elems: need.update_elems,
        host_bytes: need.fixed(),
        shadow_bytes: budgets.host.0.saturating_sub(need.fixed()),
        nvme_bytes: nvme_bytes(layout, &homes),
        homes,
    }
}

fn check(layout: &Layout, budgets: &Budgets, limits: &Limits, plan: &Placement) -> Result<()> {
    let need = HostNeed::new(layout, &plan.homes).smallest();
    if need.total() > budgets.host.0 {
        let on_host = |f: fn(&Homes) -> Tier| plan.homes.iter().any(|h| f(h) == Tier::Host);
        let or = match (limits.has_nvme, on_host(|h| h.optimizer), on_host(|h| h.params)) {
            (false, _, _) => "or name a directory on a local disk in nvme.paths.",
            (true, true, _) => "or set optimizer.tier to \"nvme\" or \"auto\".",
            (true, false, true) => "or set params.tier to \"nvme\" or \"auto\".",
            (true, false, false) => "or offload a smaller model; everything that can lie on NVMe does already.",
        };
        return Err(Error::new(
            Code::HostBudget,
            format!(
                "the plan needs {} of host memory (homes {}, gradients {}, staging {}); budget.host allows {}.",
                ByteCount(need.total()),
                ByteCount(need.homes),
                ByteCount(need.grads),
                ByteCount(need.total() - need.homes - need.grads),
                budgets.host
            ),
        )
        .action(format!("Raise budget.host to {}, {or}", at_least(need.total()))));
    }
    if plan.nvme_bytes > budgets.nvme.0 {
        return Err(Error::new(
            Code::NvmeBudget,
            format!("the plan needs {} on NVMe; budget.nvme allows {}.", ByteCount(plan.nvme_bytes), budgets.nvme),
        )
        .action(format!(
            "Raise budget.nvme to {}, or budget.host so that less has to lie there.",
            at_least(plan.nvme_bytes)
        )));
    }
    Ok(())
}

/// A size as a policy spells it, rounded up: enough.
fn at_least(bytes: u64) -> String {
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

    /// Bytes of the ring.
    pub fn ring_bytes(&self) -> u64 {
        u64::from(self.ring_chunks) * self.chunk_bytes
    }

    /// Rounds a length up to what direct I/O moves.
    pub fn padded(bytes: u64) -> u64 {
        round_up(bytes, SECTION_ALIGN)
    }
}
