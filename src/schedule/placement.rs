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
    /// Host bytes left for reading parameters that live on NVMe outside their windows.
    pub shadow_bytes: u64,
    /// NVMe bytes in all.
    pub nvme_bytes: u64,
}

const MAX_UPDATE_ELEMS: u64 = 1 << 20;
/// Two bytes per element of the narrowest kind must still be a whole block of direct I/O.
const MIN_UPDATE_ELEMS: u64 = SECTION_ALIGN / 2;
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
    let mut homes: Vec<Homes> = tiers
        .iter()
        .map(|t| Homes { params: t.params.unwrap_or(Tier::Nvme), optimizer: t.optimizer.unwrap_or(Tier::Nvme) })
        .collect();
    // What may choose starts on NVMe where there is one, and moves up while the host budget holds.
    if !limits.has_nvme {
        for (h, t) in homes.iter_mut().zip(tiers) {
            h.params = t.params.unwrap_or(Tier::Host);
            h.optimizer = t.optimizer.unwrap_or(Tier::Host);
        }
        if homes.iter().any(|h| h.params == Tier::Nvme || h.optimizer == Tier::Nvme) {
            return Err(Error::new(Code::NvmeBudget, "the policy places states on NVMe, but nvme.paths is empty.")
                .action("Name a directory on a local disk in nvme.paths."));
        }
    } else {
        climb(layout, tiers, budgets, &mut homes);
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
        .action("Raise budget.hbm, or name smaller modules in units.match."));
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

/// Moves what may choose its tier up into the host while the budget holds: parameters first (they are read twice a step),
/// then the optimizer's states, in the order of the units.
fn climb(layout: &Layout, tiers: &[Tiers], budgets: &Budgets, homes: &mut [Homes]) {
    // Without any segment on NVMe no staging is needed, so all of it may fit where all but one would not.
    let all_up: Vec<Homes> = homes
        .iter()
        .zip(tiers)
        .map(|(h, t)| Homes {
            params: if t.params.is_none() { Tier::Host } else { h.params },
            optimizer: if t.optimizer.is_none() { Tier::Host } else { h.optimizer },
        })
        .collect();
    if host_need(layout, &all_up, budgets).total() <= budgets.host.0 {
        homes.copy_from_slice(&all_up);
        return;
    }
    for pass in [true, false] {
        for i in 0..homes.len() {
            let free = if pass { tiers[i].params.is_none() } else { tiers[i].optimizer.is_none() };
            if !free {
                continue;
            }
            let before = homes[i];
            if pass {
                homes[i].params = Tier::Host;
            } else {
                homes[i].optimizer = Tier::Host;
            }
            if host_need(layout, homes, budgets).total() > budgets.host.0 {
                homes[i] = before;
            }
        }
    }
}

/// Host bytes by purpose.
struct HostNeed {
    homes: u64,
    grads: u64,
    page_slots: (u32, u64),
    update_slots: (u32, u64),
    update_elems: u64,
    shadow: u64,
}

impl HostNeed {
    fn fixed(&self) -> u64 {
        let slots = |(n, b): (u32, u64)| u64::from(n) * b;
        self.homes + self.grads + slots(self.page_slots) + slots(self.update_slots)
    }
    fn total(&self) -> u64 {
        self.fixed() + self.shadow
    }
}

fn host_need(layout: &Layout, homes: &[Homes], budgets: &Budgets) -> HostNeed {
    let mut need = HostNeed {
        homes: 0,
        grads: 0,
        page_slots: (0, 0),
        update_slots: (0, 0),
        update_elems: MAX_UPDATE_ELEMS,
        shadow: 0,
    };
    let mut widest_page = 0;
    let mut any_nvme = false;
    for (unit, home) in layout.units.iter().zip(homes) {
        need.grads += unit.grad_bytes();
        match home.params {
            Tier::Host => need.homes += unit.param_bytes(),
            _ => widest_page = widest_page.max(unit.param_bytes()),
        }
        if home.optimizer == Tier::Host {
            need.homes += unit.optimizer_bytes();
        }
        any_nvme |= home.params == Tier::Nvme || (home.optimizer == Tier::Nvme && unit.trainable());
    }
    if widest_page > 0 {
        need.page_slots = (PAGE_SLOTS, widest_page);
        need.shadow = widest_page;
        if need.total() > budgets.host.0 {
            need.page_slots.0 = 1;
        }
    }
    if any_nvme {
        // Staging shrinks with the budget: an eighth of what is allowed at most.
        let mut elems = MAX_UPDATE_ELEMS;
        let slots = |elems: u64| elems * SLOT_BYTES_PER_ELEM * u64::from(UPDATE_SLOTS);
        while elems > MIN_UPDATE_ELEMS && slots(elems) > budgets.host.0 / 8 {
            elems /= 2;
        }
        need.update_elems = elems;
        need.update_slots = (UPDATE_SLOTS, elems * SLOT_BYTES_PER_ELEM);
    }
    need
}

fn measure(layout: &Layout, homes: Vec<Homes>, ring: (u64, u32, Vec<FrameSpan>), budgets: &Budgets) -> Placement {
    let need = host_need(layout, &homes, budgets);
    let nvme_bytes = layout
        .units
        .iter()
        .zip(&homes)
        .map(|(u, h)| {
            let params = if h.params == Tier::Nvme { u.param_bytes() } else { 0 };
            params + if h.optimizer == Tier::Nvme { u.optimizer_bytes() } else { 0 }
        })
        .sum();
    Placement {
        chunk_bytes: ring.0,
        ring_chunks: ring.1,
        spans: ring.2,
        page_slots: need.page_slots,
        update_slots: need.update_slots,
        update_elems: need.update_elems,
        host_bytes: need.fixed(),
        shadow_bytes: if need.shadow == 0 { 0 } else { budgets.host.0.saturating_sub(need.fixed()) },
        nvme_bytes,
        homes,
    }
}

fn check(layout: &Layout, budgets: &Budgets, limits: &Limits, plan: &Placement) -> Result<()> {
    let need = host_need(layout, &plan.homes, budgets);
    if need.total() > budgets.host.0 {
        let on_host = |f: fn(&Homes) -> Tier| plan.homes.iter().any(|h| f(h) == Tier::Host);
        let action = match (limits.has_nvme, on_host(|h| h.optimizer), on_host(|h| h.params)) {
            (false, _, _) => "Raise budget.host, or name a directory on a local disk in nvme.paths.",
            (true, true, _) => "Raise budget.host, or set optimizer.tier to \"nvme\" or \"auto\".",
            (true, false, true) => "Raise budget.host, or set params.tier to \"nvme\" or \"auto\".",
            (true, false, false) => "Raise budget.host; everything that can lie on NVMe does already.",
        };
        let need = enough(layout, &plan.homes, budgets);
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
        .action(action));
    }
    if plan.nvme_bytes > budgets.nvme.0 {
        return Err(Error::new(
            Code::NvmeBudget,
            format!("the plan needs {} on NVMe; budget.nvme allows {}.", ByteCount(plan.nvme_bytes), budgets.nvme),
        )
        .action("Raise budget.nvme, or budget.host so that less has to lie there."));
    }
    Ok(())
}

/// The need at the least budget that holds it: staging grows with what is allowed.
fn enough(layout: &Layout, homes: &[Homes], budgets: &Budgets) -> HostNeed {
    let mut budgets = *budgets;
    loop {
        let need = host_need(layout, homes, &budgets);
        // What a message shows is rounded up by at most a tenth of its unit.
        if need.total() <= budgets.host.0 {
            return need;
        }
        budgets.host = ByteCount(need.total() + need.total() / 10);
    }
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
