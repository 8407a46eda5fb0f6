//! What one step moves, in bytes: over each link, and through each processor. A pure function of sizes, homes and order.

use crate::{
    dtype::StateKind,
    model::{Layout, Unit},
    quantities::{Tier, UnitId},
    schedule::{Placement, order::Phase, placement::Homes},
};

/// Bytes of one unit's part of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UnitTraffic {
    /// Parameters, once over the link to the device.
    pub params: u64,
    /// Gradients, once over the link from the device.
    pub grads: u64,
    /// Trained parameters, in elements.
    pub trained: u64,
    /// Host memory read and written by the update.
    pub update: u64,
    /// Read from NVMe by the update.
    pub nvme_read: u64,
    /// Written to NVMe by the update.
    pub nvme_write: u64,
    /// Gradients written to NVMe by each backward, and read by each but the first; their read by the update is counted above.
    pub grads_out: u64,
}

/// Bytes of a whole step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Over the link to the device.
    pub up: u64,
    /// Over the link from the device.
    pub down: u64,
    /// Read from NVMe.
    pub nvme_read: u64,
    /// Written to NVMe.
    pub nvme_write: u64,
    /// Host memory read and written by updates on the processor.
    pub update: u64,
    /// Trained parameters that the processor updates, in elements.
    pub updated_on_host: u64,
    /// Trained parameters that the device updates, in elements.
    pub updated_on_device: u64,
}

/// A window in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Forward or backward.
    pub phase: Phase,
    /// Whose.
    pub unit: UnitId,
    /// Its parameters have to be paged in: they are neither resident nor still in the ring.
    pub pages_in: bool,
}

/// One unit's bytes.
pub fn of_unit(unit: &Unit, home: Homes) -> UnitTraffic {
    let mut sum = UnitTraffic::default();
    for s in &unit.sections {
        let size = |kind: StateKind| kind.element_size(s.dtype) as u64;
        if s.trainable {
            let states: u64 = StateKind::OPTIMIZER.iter().map(|&k| size(k)).sum();
            sum.trained += s.elems;
            sum.grads += s.elems * size(StateKind::Grad);
            sum.update += s.elems * (2 * (size(StateKind::Param) + states) + size(StateKind::Grad));
            let on_nvme = [(home.params, size(StateKind::Param)), (home.optimizer, states)];
            let bytes: u64 = on_nvme.iter().filter(|(tier, _)| *tier == Tier::Nvme).map(|(_, b)| b).sum();
            sum.nvme_read += s.elems * bytes;
            sum.nvme_write += s.elems * bytes;
            if home.grads == Tier::Nvme {
                sum.grads_out += s.elems * size(StateKind::Grad);
            }
        }
    }
    sum.nvme_read += sum.grads_out;
    if home.params != Tier::Hbm {
        sum.params = unit.param_bytes();
    }
    sum
}

/// How a step uses the units.
#[derive(Clone, Debug)]
pub struct Uses {
    /// Forwards and backwards before each update.
    pub passes: u32,
    /// Per unit, whether its backward reads its parameters: not that of an embedding.
    pub backward: Vec<bool>,
}

/// The windows of a step in which each forward is followed by its backward, once the ring has come to rest: which of them
/// find their parameters in the ring still.
pub fn windows(layout: &Layout, plan: &Placement, uses: &Uses) -> Vec<Window> {
    let mut ring = Ring { plan, owners: vec![None; plan.ring_chunks as usize] };
    // The second step meets the ring as every later one does.
    ring.step(layout, uses);
    for unit in layout.ids().filter(|&u| layout.unit(u).trainable()) {
        ring.forget(unit);
    }
    ring.step(layout, uses)
}

struct Ring<'a> {
    plan: &'a Placement,
    owners: Vec<Option<UnitId>>,
}

impl Ring<'_> {
    fn step(&mut self, layout: &Layout, uses: &Uses) -> Vec<Window> {
        let mut out = Vec::new();
        for _ in 0..uses.passes {
            for unit in layout.ids() {
                out.push(Window { phase: Phase::Forward, unit, pages_in: self.open(unit) });
            }
            // A unit that is not trained is read by the backward all the same, for the gradient of its input.
            for unit in layout.ids().rev().filter(|u| uses.backward[u.index()]) {
                out.push(Window { phase: Phase::Backward, unit, pages_in: self.open(unit) });
            }
        }
        out
    }

    fn open(&mut self, unit: UnitId) -> bool {
        let span = self.plan.spans[unit.index()];
        let mut missing = false;
        for chunk in self.plan.chunks_of(span) {
            missing |= self.owners[chunk as usize].replace(unit) != Some(unit);
        }
        missing
    }

    fn forget(&mut self, unit: UnitId) {
        self.owners.iter_mut().filter(|o| **o == Some(unit)).for_each(|o| *o = None);
    }
}

/// A step.
pub fn of_step(layout: &Layout, plan: &Placement, uses: &Uses) -> Traffic {
    let mut sum = Traffic::default();
    for window in windows(layout, plan, uses).into_iter().filter(|w| w.pages_in) {
        let bytes = layout.unit(window.unit).param_bytes();
        sum.up += bytes;
        if plan.homes[window.unit.index()].params == Tier::Nvme {
            sum.nvme_read += bytes;
        }
    }
    for (unit, home) in layout.units.iter().zip(&plan.homes) {
        let one = of_unit(unit, *home);
        if home.params == Tier::Hbm {
            sum.updated_on_device += one.trained;
            continue;
        }
        sum.down += one.grads * u64::from(uses.passes);
        let passes = u64::from(uses.passes);
        sum.nvme_read += one.nvme_read + one.grads_out * (passes - 1);
        sum.nvme_write += one.nvme_write + one.grads_out * passes;
        sum.update += one.update;
        sum.updated_on_host += one.trained;
    }
    sum
}
