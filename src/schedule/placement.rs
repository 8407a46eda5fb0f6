//! Where every segment lives: pure arithmetic from layout, budgets and wishes to a placement that holds.
//!
//! P1: the sum of what is placed in a tier, staging included, never exceeds its budget. P2: the same input gives the
//! same placement.

mod device;
mod host;
pub mod lanes;
mod plan;

pub(crate) use plan::at_least;
pub use plan::{Budgets, Homes, LaneUse, Limits, Placement, SAVE_FRAME, SAVE_FRAMES, SMALLEST_SAVE_FRAME, Tiers};

use crate::{
    dtype::StateKind,
    error::{Code, Error, Result},
    model::{Layout, Unit},
    quantities::{ByteCount, Tier},
};
use device::Device;
use host::HostNeed;
use plan::nvme_bytes;

/// Places a model.
///
/// # Errors
/// `FN-E201`, `FN-E202`, `FN-E203` with what is needed, what is allowed, and what would help; `FN-E503` for wishes that
/// contradict each other.
pub fn place(layout: &Layout, tiers: &[Tiers], budgets: &Budgets, limits: &Limits) -> Result<Placement> {
    assert_eq!(layout.units.len(), tiers.len(), "one wish per unit");
    if !limits.has_nvme && tiers.iter().any(|t| [t.params, t.optimizer, t.grads].contains(&Some(Tier::Nvme))) {
        return Err(Error::new(Code::NvmeBudget, "the policy places states on NVMe, but nvme.paths is empty.")
            .action("Name a directory on a local disk in nvme.paths."));
    }
    let tiers = device::sound(layout, tiers)?;
    // Gradients go to NVMe only where nothing else makes the model fit.
    let on_host: Vec<Tiers> = tiers.iter().map(|t| Tiers { grads: t.grads.or(Some(Tier::Host)), ..*t }).collect();
    let placed = place_grads(layout, &on_host, budgets, limits);
    let Err(error) = &placed else { return placed };
    if !limits.has_nvme || on_host == tiers || !matches!(error.code(), Code::HostBudget | Code::NvmeBudget) {
        return placed;
    }
    let lower = place_grads(layout, &tiers, budgets, limits);
    if lower.is_ok() || error.code() == Code::HostBudget { lower } else { placed }
}

/// Places a model, with gradients on NVMe where the wishes have no other home for them and host memory no room.
fn place_grads(layout: &Layout, tiers: &[Tiers], budgets: &Budgets, limits: &Limits) -> Result<Placement> {
    let alone = with_lanes(layout, tiers, budgets, limits, 0);
    let elems = lanes::elems(layout);
    let paged = |plan: &Placement| layout.ids().any(|u| layout.unit(u).optimizer_bytes() > 0 && !plan.resident(u));
    match limits.lanes {
        LaneUse::Never => alone,
        _ if elems == 0 || alone.as_ref().is_ok_and(|plan| !paged(plan)) => alone,
        LaneUse::Always => with_lanes(layout, tiers, budgets, limits, elems),
        LaneUse::IfRoom => {
            let alone = alone?;
            let shared = with_lanes(layout, tiers, budgets, limits, elems);
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
    let here = Tiers { params: Some(Tier::Hbm), optimizer: Some(Tier::Hbm), grads: Some(Tier::Hbm) };
    let none = |unit: &Unit, t: Tiers| if unit.trainable() { t } else { Tiers { grads: Some(Tier::Host), ..t } };
    let units = layout.units.iter().zip(tiers).zip(&device.resident);
    let tiers: Vec<Tiers> = units.map(|((unit, &t), &r)| if r { here } else { none(unit, t) }).collect();
    let down = wished(&tiers);
    if !limits.has_nvme {
        let up = raised(&tiers, &down, true, true, |_| true);
        return up.into_iter().zip(&tiers).map(|(h, t)| Homes { grads: t.grads.unwrap_or(Tier::Host), ..h }).collect();
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
            grads: h.grads,
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
/// are read twice a step), then gradients, which have to be there before an update, then the optimizer's states, in the order of the units.
fn climb(layout: &Layout, tiers: &[Tiers], budgets: &Budgets, device: &Device, homes: &mut [Homes]) {
    let fits = |homes: &[Homes]| HostNeed::new(layout, device, homes).ample(budgets).total() <= budgets.host.0;
    for kind in [StateKind::Param, StateKind::Grad, StateKind::ExpAvg] {
        for i in 0..homes.len() {
            let before = homes[i];
            let (wish, home) = match kind {
                StateKind::Param => (tiers[i].params, &mut homes[i].params),
                StateKind::Grad => (tiers[i].grads, &mut homes[i].grads),
                _ => (tiers[i].optimizer, &mut homes[i].optimizer),
            };
            if wish.is_some() {
                continue;
            }
            *home = Tier::Host;
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
    let one = |t: &Tiers| Homes { params: or_nvme(t.params), optimizer: or_nvme(t.optimizer), grads: or_nvme(t.grads) };
    tiers.iter().map(one).collect()
}

/// Bytes read from and written to NVMe in a step: parameters for both passes, both kinds for the update, gradients once each way.
fn step_bytes(layout: &Layout, homes: &[Homes]) -> u64 {
    let on = |tier, bytes| if tier == Tier::Nvme { 2 * bytes } else { 0 };
    let units = layout.units.iter().zip(homes);
    units
        .map(|(u, h)| {
            let updated = if u.trainable() { u.param_bytes() } else { 0 };
            on(h.params, u.param_bytes() + updated) + on(h.optimizer, u.optimizer_bytes()) + on(h.grads, u.grad_bytes())
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
    let nvme = nvme_bytes(layout, &homes);
    let free = budgets.nvme_free.map_or(u64::MAX, |free| free.0.saturating_sub(nvme) / 2);
    let room = (budgets.spare.map_or(left / 2, |b| b.0.min(left)), (budgets.nvme.0 - nvme).min(free));
    let (spare, spare_bytes) = spares(layout, &homes, room, budgets.spare != Some(ByteCount(0)));
    let host_bytes = need.fixed() + more + spare_bytes.0;
    Ok(Placement {
        chunk_bytes: device.chunk_bytes,
        ring_chunks,
        spans: device.spans(ring_chunks),
        page_slots: need.page_slots,
        update_slots: need.update_slots,
        grad_slots: need.grad_slots,
        update_elems: need.update_elems,
        spare,
        lane_elems: device.lane_elems,
        lane_bytes: device.lane_bytes,
        hbm_bytes: ring_bytes + device.fixed_bytes(),
        host_bytes,
        shadow_bytes: budgets.host.0.saturating_sub(host_bytes),
        nvme_bytes: nvme + spare_bytes.1,
        homes,
    })
}

/// Which units get a second set of states and parameters, each in its tier, and the bytes of all in host memory and on NVMe: the first
/// in forward order, whose updates the next forward waits for.
fn spares(layout: &Layout, homes: &[Homes], mut room: (u64, u64), wanted: bool) -> (Vec<bool>, (u64, u64)) {
    let before = room;
    let one = |(unit, &home): (&Unit, &Homes)| {
        let bytes = spare_bytes(unit, home);
        let fits = wanted && unit.trainable() && may_have_spare(unit, home) && bytes.0 <= room.0 && bytes.1 <= room.1;
        if fits {
            room = (room.0 - bytes.0, room.1 - bytes.1);
        }
        fits
    };
    let spare = layout.units.iter().zip(homes).map(one).collect();
    (spare, (before.0 - room.0, before.1 - room.1))
}

/// Whether updates of such a unit can be made ahead of their step: of one that streams, only if it is trained as a whole.
pub fn may_have_spare(unit: &Unit, home: Homes) -> bool {
    match (home.params, home.optimizer, home.grads) {
        (Tier::Host, Tier::Host, grads) => grads == Tier::Host,
        (Tier::Host | Tier::Nvme, Tier::Nvme, _) => unit.sections.iter().all(|s| s.trainable || s.elems == 0),
        _ => false,
    }
}

/// What a second place for an update's results takes, in host memory and on NVMe.
pub fn spare_bytes(unit: &Unit, home: Homes) -> (u64, u64) {
    let on = |tier| {
        let params = if home.params == tier { unit.param_bytes() } else { 0 };
        params + if home.optimizer == tier { unit.optimizer_bytes() } else { 0 }
    };
    (on(Tier::Host), on(Tier::Nvme))
}

fn check(layout: &Layout, budgets: &Budgets, limits: &Limits, device: &Device, homes: &[Homes]) -> Result<()> {
    let need = HostNeed::new(layout, device, homes).smallest();
    if need.total() > budgets.host.0 {
        let on_host = |f: fn(&Homes) -> Tier| homes.iter().any(|h| f(h) == Tier::Host);
        let grads = need.grads > 0;
        let or = match (limits.has_nvme, on_host(|h| h.optimizer), on_host(|h| h.params)) {
            (false, _, _) => "or name a directory on a local disk in nvme.paths.",
            (true, true, _) => "or set optimizer.tier to \"nvme\" or \"auto\".",
            (true, false, true) if limits.ranks > 1 => {
                "or offload a smaller model: of several ranks, only states can lie on NVMe."
            }
            (true, false, true) => "or set params.tier to \"nvme\" or \"auto\".",
            (true, false, false) if grads => "or set gradients.tier to \"nvme\" or \"auto\".",
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
