//! What the planner is asked for, and its answer.

use crate::{
    model::{FrameSpan, Layout, SECTION_ALIGN},
    quantities::{ByteCount, Tier, UnitId, round_up},
    schedule::ranks::owned::OWNED_BLOCK,
};

/// What may be used, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Budgets {
    /// Frames and resident units on the compute tier; `None`: it is the host's memory, and `host` holds them too.
    pub hbm: Option<ByteCount>,
    /// Page-locked host memory.
    pub host: ByteCount,
    /// Files.
    pub nvme: ByteCount,
    /// Space that is free where files will lie, if it is known: second places take at most half of what the first ones leave.
    pub nvme_free: Option<ByteCount>,
    /// Of `host`, for speculative updates; `None`: at most half of what everything else leaves.
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
    /// Home of the gradients; `None`: on NVMe only where host memory does not hold them.
    pub grads: Option<Tier>,
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
    /// Processes that train the model together: what lives on the host or on NVMe is there once, staging for each.
    pub ranks: u32,
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
    /// Home of the gradients. A unit without any has it on the host; a resident unit on the compute tier.
    pub grads: Tier,
}

impl Homes {
    /// Whether all of the unit is at home in one tier.
    pub fn all_in(self, tier: Tier) -> bool {
        [self.params, self.optimizer, self.grads].iter().all(|&home| home == tier)
    }
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
    /// Host frames in which gradients of a unit are gathered on their way to NVMe, and their size.
    pub grad_slots: (u32, u64),
    /// Elements of one step of an update that streams its states.
    pub update_elems: u64,
    /// Per unit: its update may be speculative, into a second set of states and a second place for its parameters.
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
/// A ring of so many of the largest units streams at full speed: one computes, one comes, one goes.
pub(super) const FAIR_FRAMES: u64 = 3;

/// Bytes on NVMe.
pub(super) fn nvme_bytes(layout: &Layout, homes: &[Homes]) -> u64 {
    let on = |tier, bytes| if tier == Tier::Nvme { bytes } else { 0 };
    let units = layout.units.iter().zip(homes);
    units
        .map(|(u, h)| {
            on(h.params, u.param_bytes()) + on(h.optimizer, u.optimizer_bytes()) + on(h.grads, u.grad_bytes())
        })
        .sum()
}

/// Bytes per element of the narrowest kind.
const NARROWEST: u64 = 2;

/// Bytes of one chunk of a segment on NVMe: every kind's piece of an update is whole chunks.
pub(super) fn chunk_on_nvme(update_elems: u64) -> u64 {
    (update_elems * NARROWEST).min(1 << 20)
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
    pub(super) fn streams(&self) -> bool {
        let chunks = || self.spans.iter().map(|span| u64::from(span.chunks));
        let fair = FAIR_FRAMES * chunks().max().unwrap_or(0);
        u64::from(self.ring_chunks) >= fair.min(chunks().sum())
    }

    /// Removes the lanes from the placement, when they cannot be made after all.
    pub fn without_lanes(&mut self) {
        self.hbm_bytes -= self.lane_bytes;
        (self.lane_elems, self.lane_bytes) = (0, 0);
    }

    /// The largest parameters and the largest gradients that live on NVMe: what is in host memory besides while they are read or
    /// written as a whole.
    pub fn widest_on_nvme(&self, layout: &Layout) -> u64 {
        let units = || layout.units.iter().zip(&self.homes);
        let params = units().filter(|(_, h)| h.params == Tier::Nvme).map(|(u, _)| u.param_bytes()).max();
        let grads = units().filter(|(_, h)| h.grads == Tier::Nvme).map(|(u, _)| u.grad_bytes()).max();
        params.unwrap_or(0) + grads.unwrap_or(0)
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

    /// Elements of the blocks of which each belongs to one of several ranks: where something of the unit is updated on NVMe, no chunk of it
    /// there has two owners.
    pub fn owned_block(&self, unit: UnitId) -> u64 {
        let home = self.homes[unit.index()];
        let chunk = self.chunk_on_nvme() / NARROWEST;
        if [home.params, home.optimizer].contains(&Tier::Nvme) { OWNED_BLOCK.max(chunk) } else { OWNED_BLOCK }
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
