//! The host's memory: homes, gradients and staging, from the least that works to as much as the budget has room for.

use super::{
    device::Device,
    plan::{Budgets, Homes, SAVE_FRAMES, SMALLEST_SAVE_FRAME, chunk_on_nvme, nvme_bytes},
};
use crate::{
    model::{Layout, SECTION_ALIGN},
    quantities::Tier,
};

const MAX_UPDATE_ELEMS: u64 = 1 << 20;
/// Two bytes per element of the narrowest kind must still be a whole block of direct I/O.
const MIN_UPDATE_ELEMS: u64 = SECTION_ALIGN / 2;
/// Below this, transfers are too short for the drive.
const FAIR_UPDATE_ELEMS: u64 = 1 << 16;
const UPDATE_SLOTS: u32 = 5;
/// Room for parameter, master and both moments, four bytes each; and for the gradient where gradients live on NVMe.
const SLOT_BYTES_PER_ELEM: u64 = 16;
const SLOT_BYTES_WITH_GRAD: u64 = 20;
const PAGE_SLOTS: u32 = 3;
/// Host memory left free for checkpoints at least, so that a model that fits can be saved and loaded: a save gets half of what is
/// left, of which parameters read outside of steps may hold half.
const CHECKPOINT_BYTES: u64 = 4 * SAVE_FRAMES as u64 * SMALLEST_SAVE_FRAME;
/// Frames of the largest unit, where the ring is the host's memory.
const RING_FRAMES: u64 = 4;
const FAIR_RING_FRAMES: u64 = 2;

/// Host bytes by purpose.
#[derive(Clone, Copy)]
pub(super) struct HostNeed<'a> {
    device: &'a Device,
    pub(super) homes: u64,
    pub(super) grads: u64,
    pub(super) page_slots: (u32, u64),
    pub(super) update_slots: (u32, u64),
    pub(super) grad_slots: (u32, u64),
    pub(super) update_elems: u64,
    /// Frames of the ring and units that live on the compute tier, where those are the host's memory.
    pub(super) compute: u64,
    frames: u64,
    /// The largest parameters that live on NVMe, and the largest gradients.
    pub(super) shadow: u64,
    widest_grads: u64,
}

impl<'a> HostNeed<'a> {
    /// Without staging.
    pub(super) fn new(layout: &Layout, device: &'a Device, homes: &[Homes]) -> Self {
        let mut need = Self {
            device,
            homes: 0,
            grads: 0,
            page_slots: (0, 0),
            update_slots: (0, 0),
            grad_slots: (0, 0),
            update_elems: MAX_UPDATE_ELEMS,
            compute: 0,
            frames: 0,
            shadow: 0,
            widest_grads: 0,
        };
        for (unit, home) in layout.units.iter().zip(homes).filter(|(_, h)| h.params != Tier::Hbm) {
            match home.grads {
                Tier::Nvme => need.widest_grads = need.widest_grads.max(unit.grad_bytes()),
                _ => need.grads += unit.grad_bytes(),
            }
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

    fn staged(mut self, pages: u32, elems: u64, frames: u64) -> Self {
        if self.shadow > 0 {
            self.page_slots = (pages, self.shadow);
        }
        if self.widest_grads > 0 {
            self.grad_slots = (pages, self.widest_grads);
        }
        if self.update_slots.0 > 0 {
            self.update_elems = elems;
            self.update_slots.1 = elems * self.slot_bytes_per_elem();
        }
        self.frames = frames;
        self.compute = self.device.on_host(frames);
        self
    }

    fn slot_bytes_per_elem(&self) -> u64 {
        if self.widest_grads > 0 { SLOT_BYTES_WITH_GRAD } else { SLOT_BYTES_PER_ELEM }
    }

    /// With the least staging that works.
    pub(super) fn smallest(self) -> Self {
        self.staged(1, MIN_UPDATE_ELEMS, 1)
    }

    /// With staging for full speed, as far as an eighth of the budget goes.
    pub(super) fn ample(self, budgets: &Budgets) -> Self {
        let mut elems = MAX_UPDATE_ELEMS;
        let each = self.slot_bytes_per_elem();
        while elems > MIN_UPDATE_ELEMS
            && elems * each * u64::from(UPDATE_SLOTS) * self.device.ranks > budgets.host.0 / 8
        {
            elems /= 2;
        }
        self.staged(PAGE_SLOTS, elems, RING_FRAMES)
    }

    /// With as much staging as the budget has room for; the least, if it has room for none. A larger budget never leads
    /// to a need above it.
    pub(super) fn fitted(self, budgets: &Budgets) -> Self {
        let mut need = self.ample(budgets);
        while need.total() > budgets.host.0 {
            let pages = need.page_slots.0.max(need.grad_slots.0);
            let (elems, frames) = (need.update_elems, need.frames);
            let streams = need.update_slots.0 > 0;
            // Short transfers are slower than few slots, and few slots slower than few frames.
            need = if streams && elems > FAIR_UPDATE_ELEMS {
                need.staged(pages, elems / 2, frames)
            } else if frames > FAIR_RING_FRAMES {
                need.staged(pages, elems, frames - 1)
            } else if pages > 1 {
                need.staged(pages - 1, elems, frames)
            } else if frames > 1 {
                need.staged(pages, elems, frames - 1)
            } else if streams && elems > MIN_UPDATE_ELEMS {
                need.staged(pages, elems / 2, frames)
            } else {
                return need;
            };
        }
        need
    }

    /// Bytes of the ring for which there is room.
    pub(super) fn ring_bytes(&self) -> u64 {
        self.device.ring_of(self.frames)
    }

    pub(super) fn fixed(&self) -> u64 {
        let slots = |(n, b): (u32, u64)| u64::from(n) * b;
        let slots = [self.page_slots, self.update_slots, self.grad_slots].into_iter().map(slots).sum::<u64>();
        self.homes + self.grads + slots * self.device.ranks + self.compute
    }

    pub(super) fn total(&self) -> u64 {
        let read = if self.update_slots.0 > 0 { 2 * chunk_on_nvme(self.update_elems) } else { 0 };
        self.fixed() + (self.shadow + self.widest_grads + CHECKPOINT_BYTES + read) * self.device.ranks
    }
}
