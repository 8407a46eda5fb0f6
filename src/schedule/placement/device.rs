//! The compute tier: which units live there for good, and the ring through which the others pass.

use super::{
    lanes,
    plan::{Budgets, FAIR_FRAMES, Limits, Tiers, at_least},
};
use crate::{
    error::{Code, Error, Result},
    model::{FrameSpan, Layout, Unit},
    quantities::{ByteCount, Tier, round_up},
};

/// What a resident unit's tensors are rounded up to: the allocator of the device hands out no less.
const TENSOR_ALIGN: u64 = 2 << 20;
/// With one more, a late unit does not hold the next one up.
const AMPLE_FRAMES: u64 = 4;

/// The compute tier's share of a placement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Device {
    /// Per unit, whether it lives here.
    pub(super) resident: Vec<bool>,
    /// What those units take.
    pub(super) resident_bytes: u64,
    /// Elements of a lane's group, and the bytes of all lanes.
    pub(super) lane_elems: u64,
    pub(super) lane_bytes: u64,
    pub(super) chunk_bytes: u64,
    /// Chunks of each unit that streams; 0 for residents.
    chunks: Vec<u64>,
    /// Chunks of the largest of them, and of all.
    widest: u64,
    total: u64,
    /// Chunks of the ring, where `budget.hbm` decides; none where the host's budget does.
    allowed: Option<u64>,
    /// Processes that have staging of their own.
    pub(super) ranks: u64,
}

/// What a resident unit takes: parameters, gradients and states.
pub(super) fn resident_bytes(unit: &Unit) -> u64 {
    [unit.param_bytes(), unit.grad_bytes(), unit.optimizer_bytes()].iter().map(|&b| round_up(b, TENSOR_ALIGN)).sum()
}

/// The wishes with contradictions refused; a frozen unit has no states to wish for. A unit without bytes has its home on the
/// host: it needs no store on NVMe, and no place in the compute tier.
pub(super) fn sound(layout: &Layout, tiers: &[Tiers]) -> Result<Vec<Tiers>> {
    let one = |(unit, wish): (&Unit, &Tiers)| match (wish.params, wish.optimizer) {
        _ if unit.param_bytes() == 0 => {
            Ok(Tiers { params: Some(Tier::Host), optimizer: Some(Tier::Host), grads: Some(Tier::Host) })
        }
        (_, Some(Tier::Hbm)) if !unit.trainable() => Ok(Tiers { optimizer: None, ..*wish }),
        (Some(Tier::Host | Tier::Nvme), Some(Tier::Hbm)) => Err(Error::new(
            Code::PolicyValue,
            format!(
                "unit '{}': optimizer.tier is hbm, which keeps its parameters there too, but params.tier is not auto.",
                unit.name
            ),
        )
        .action("Set params.tier to \"auto\" for it, or another optimizer.tier.")),
        _ => Ok(*wish),
    };
    layout.units.iter().zip(tiers).map(one).collect()
}

impl Device {
    /// Only the units that have to be here.
    pub(super) fn least(
        layout: &Layout,
        tiers: &[Tiers],
        budgets: &Budgets,
        limits: &Limits,
        lane_elems: u64,
    ) -> Result<Self> {
        let must = tiers.iter().map(|t| t.optimizer == Some(Tier::Hbm)).collect();
        Self::new(layout, must, budgets, limits, lane_elems)
    }

    /// As many of the units that may be here as there is room for, the first in forward order: the next forward needs them
    /// before the host's updates are through.
    pub(super) fn fullest(
        layout: &Layout,
        tiers: &[Tiers],
        budgets: &Budgets,
        limits: &Limits,
        lane_elems: u64,
    ) -> Result<Self> {
        let least = Self::least(layout, tiers, budgets, limits, lane_elems)?;
        let may = |i: usize| {
            let free = tiers[i].params.is_none() && tiers[i].optimizer.is_none();
            free && layout.units[i].param_bytes() > 0 && limits.residents
        };
        let free: Vec<usize> = (0..tiers.len()).filter(|&i| may(i)).collect();
        let with = |count: usize| {
            let mut resident = least.resident.clone();
            free[..count].iter().for_each(|&i| resident[i] = true);
            Self::new(layout, resident, budgets, limits, lane_elems)
        };
        let Some(hbm) = budgets.hbm else { return with(free.len()) };
        for frames in [AMPLE_FRAMES, FAIR_FRAMES] {
            let mut taken: u64 = free.iter().map(|&i| resident_bytes(&layout.units[i])).sum();
            for count in (1..=free.len()).rev() {
                if least.fixed_bytes() + taken <= hbm.0
                    && let Ok(device) = with(count)
                    && device.fixed_bytes() + device.ring_of(frames) <= hbm.0
                {
                    return Ok(device);
                }
                taken -= resident_bytes(&layout.units[free[count - 1]]);
            }
        }
        Ok(least)
    }

    fn new(layout: &Layout, resident: Vec<bool>, budgets: &Budgets, limits: &Limits, lane_elems: u64) -> Result<Self> {
        let units = || layout.units.iter().zip(&resident);
        let bytes: Vec<u64> = units().map(|(u, &r)| if r { 0 } else { u.param_bytes() }).collect();
        let resident_bytes: u64 = units().map(|(u, &r)| if r { resident_bytes(u) } else { 0 }).sum();
        let largest = bytes.iter().copied().max().unwrap_or(0);
        // Chunks as large as waste little: fewer handles to map.
        let mut chunk_bytes = limits.granularity;
        while chunk_bytes < 32 << 20 && chunk_bytes * 64 <= largest {
            chunk_bytes *= 2;
        }
        let chunks: Vec<u64> = bytes.iter().map(|b| b.div_ceil(chunk_bytes)).collect();
        let (widest, total) = (largest.div_ceil(chunk_bytes), chunks.iter().sum());
        let lane_bytes =
            if lane_elems > 0 { lanes::COUNT * lanes::bytes_each(lane_elems, limits.granularity) } else { 0 };
        let left = budgets.hbm.map(|b| b.0.checked_sub(resident_bytes + lane_bytes));
        let allowed = left.map(|left| left.map_or(0, |b| (b / chunk_bytes).min(total)));
        if left == Some(None) || allowed.is_some_and(|a| a < widest) {
            let index = bytes.iter().position(|&b| b == largest).unwrap_or(0);
            let need = resident_bytes + lane_bytes + widest * chunk_bytes;
            let hbm = budgets.hbm.unwrap_or_default();
            return Err(too_small(&layout.units[index].name, resident_bytes, lane_bytes, need, hbm));
        }
        let ranks = u64::from(limits.ranks.max(1));
        Ok(Self {
            resident,
            resident_bytes,
            lane_elems,
            lane_bytes,
            chunk_bytes,
            chunks,
            widest,
            total,
            allowed,
            ranks,
        })
    }

    /// Bytes beside the ring.
    pub(super) fn fixed_bytes(&self) -> u64 {
        self.resident_bytes + self.lane_bytes
    }

    /// Bytes of a ring of `frames` of the largest unit, as far as there is use for it.
    pub(super) fn ring_of(&self, frames: u64) -> u64 {
        (self.widest * frames).min(self.total) * self.chunk_bytes
    }

    /// Bytes of the ring, the residents and the lanes that the host's budget has to hold: the compute tier is the host's memory
    /// where `budget.hbm` sets no bound. `frames` as for [`Self::ring_of`].
    pub(super) fn on_host(&self, frames: u64) -> u64 {
        if self.allowed.is_some() { 0 } else { self.fixed_bytes() + self.ring_of(frames) }
    }

    /// Chunks of the ring: as `budget.hbm` allows, or `base` with up to `more` bytes on top.
    pub(super) fn ring_chunks(&self, base: u64, more: u64) -> Result<u32> {
        let chunks = self.allowed.unwrap_or(((base + more) / self.chunk_bytes).min(self.total));
        u32::try_from(chunks).map_err(|_| Error::new(Code::HbmBudget, "the model has too many frames to be addressed."))
    }

    /// Units one after the other around the ring, so that neighbours never share a frame.
    pub(super) fn spans(&self, ring_chunks: u32) -> Vec<FrameSpan> {
        let mut next = 0u64;
        let span = |&n: &u64| {
            let first = if n == 0 || ring_chunks == 0 { 0 } else { next % u64::from(ring_chunks) };
            next += n;
            #[expect(clippy::cast_possible_truncation, reason = "both are at most ring_chunks")]
            FrameSpan { first_chunk: first as u32, chunks: n as u32 }
        };
        self.chunks.iter().map(span).collect()
    }
}

fn too_small(unit: &str, resident: u64, lanes: u64, need: u64, hbm: ByteCount) -> Error {
    let need = ByteCount(need);
    let (mut what, mut instead) = if resident == 0 {
        (format!("unit '{unit}' needs {need} on the compute tier at once"), "name smaller modules in units.match.")
    } else {
        let resident = ByteCount(resident);
        let what = format!("the units with optimizer.tier hbm, {resident}, and frames for the others need {need}");
        (what, "set optimizer.tier to \"auto\".")
    };
    if lanes > 0 {
        let lanes = ByteCount(lanes);
        what = format!("{what}, with {lanes} for updates on the device (optimizer.where is gpu)");
        instead = "set optimizer.where to \"auto\".";
    }
    Error::new(Code::HbmBudget, format!("{what}; budget.hbm allows {hbm}."))
        .needing(need)
        .action(format!("Raise budget.hbm to {}, or {instead}", at_least(need.0)))
}
