//! Where the segments that live in host memory lie: three regions of exact size, one per life cycle.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::{
    dtype::StateKind,
    error::Result,
    memory::{self, HostRegion, Shadow, ShadowSpace, page_size},
    model::Layout,
    quantities::{ByteCount, Tier, UnitId, round_up},
    schedule::Placement,
};

/// Host addresses of one unit's segments.
#[derive(Debug)]
pub struct UnitHome {
    /// The parameter segment: in the region of parameters, or a shadow of what lives on NVMe.
    pub params: u64,
    /// The gradient segment; 0 where nothing is trained.
    pub grads: u64,
    /// Per section, master, exp_avg and exp_avg_sq; 0 where there is none or it lives elsewhere. The second set is there for
    /// units with a spare copy.
    sets: [Vec<[u64; 3]>; 2],
    /// The second set is the current one.
    swapped: AtomicBool,
    /// Where a speculative update puts the new parameters; 0 without a spare copy.
    pub spare_params: u64,
    /// Set where the parameters live on NVMe.
    pub shadow: Option<Arc<Shadow>>,
}

/// One of a unit's two sets of states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Set {
    /// What the unit's states are.
    Current,
    /// Where a speculative update puts the next ones.
    Spare,
}

impl UnitHome {
    /// Addresses of master, exp_avg and exp_avg_sq of a section; 0 where there is none or it lives elsewhere. They change with
    /// [`Self::swap`], so they are asked for when the unit's update is known not to be under way, or by the runner itself.
    pub fn states(&self, section: usize, set: Set) -> [u64; 3] {
        let index = usize::from(self.swapped.load(Ordering::Acquire) != (set == Set::Spare));
        self.sets[index][section]
    }

    /// Makes the spare set the current one.
    pub fn swap(&self) {
        self.swapped.fetch_xor(true, Ordering::AcqRel);
    }
}

/// Host memory of a model.
#[derive(Debug)]
pub struct Homes {
    /// Parameters that live on the host.
    pub params: Arc<HostRegion>,
    /// Gradients.
    pub grads: Arc<HostRegion>,
    /// Optimizer states that live on the host.
    pub states: Arc<HostRegion>,
    /// Spare copies of parameters and states.
    pub spare: Arc<HostRegion>,
    /// Where what lives on NVMe can be read outside of windows; none if nothing does.
    pub shadows: Option<Arc<ShadowSpace>>,
    bytes: u64,
    units: Vec<UnitHome>,
}

impl Homes {
    /// Maps the regions; pages are taken at first touch.
    ///
    /// # Errors
    /// `FN-E204` when the system refuses.
    pub fn new(layout: &Layout, placement: &Placement) -> Result<Self> {
        // A forked child that touches any of it ends with a message.
        memory::watch_faults()?;
        let mut units = Vec::with_capacity(layout.units.len());
        let on_nvme = || {
            layout
                .units
                .iter()
                .zip(&placement.homes)
                .filter(|(_, home)| home.params == Tier::Nvme)
                .map(|(unit, _)| unit)
        };
        let (shadows, parts) = match on_nvme().next() {
            None => (None, Vec::new()),
            Some(_) => ShadowSpace::reserve(on_nvme().map(|unit| (unit.param_bytes(), &*unit.name)))
                .map(|(s, p)| (Some(s), p))?,
        };
        let mut parts = parts.into_iter();
        let (mut params, mut grads, mut states, mut spare) = (0, 0, 0, 0);
        let take = |total: &mut u64, bytes: u64| {
            let at = *total;
            // Whole pages, so that advice to the kernel about one unit's part touches no other unit.
            *total += round_up(bytes, page_size() as u64);
            at
        };
        // Offsets first, addresses once the regions exist; offset + 1 so that 0 can mean none.
        for ((unit, home), &has_spare) in layout.units.iter().zip(&placement.homes).zip(&placement.spare) {
            let (on_host, resident) = (home.params == Tier::Host, home.params == Tier::Hbm);
            let set = |total: &mut u64, there: bool| -> Vec<[u64; 3]> {
                let section = |s: &crate::model::Section| {
                    StateKind::OPTIMIZER.map(|k| match s.bytes(k) {
                        0 => 0,
                        _ if !there => 0,
                        bytes => take(total, bytes) + 1,
                    })
                };
                unit.sections.iter().map(section).collect()
            };
            units.push(UnitHome {
                params: if on_host { take(&mut params, unit.param_bytes()) + 1 } else { 0 },
                grads: if unit.trainable() && !resident { take(&mut grads, unit.grad_bytes()) + 1 } else { 0 },
                sets: [set(&mut states, home.optimizer == Tier::Host), set(&mut spare, has_spare)],
                swapped: AtomicBool::new(false),
                spare_params: if has_spare { take(&mut spare, unit.param_bytes()) + 1 } else { 0 },
                shadow: if on_host || resident { None } else { parts.next() },
            });
        }
        let bytes = params + grads + states + spare;
        let params = HostRegion::new(ByteCount(params), "parameters")?;
        let grads = HostRegion::new(ByteCount(grads), "gradients")?;
        let states = HostRegion::new(ByteCount(states), "optimizer states")?;
        let spare = HostRegion::new(ByteCount(spare), "spare copies")?;
        let absolute = |at: &mut u64, region: &HostRegion| {
            if *at > 0 {
                *at = region.as_ptr() as u64 + (*at - 1);
            }
        };
        for u in &mut units {
            absolute(&mut u.params, &params);
            absolute(&mut u.grads, &grads);
            u.sets[0].iter_mut().flatten().for_each(|s| absolute(s, &states));
            u.sets[1].iter_mut().flatten().for_each(|s| absolute(s, &spare));
            absolute(&mut u.spare_params, &spare);
            if let Some(shadow) = &u.shadow {
                u.params = shadow.as_ptr() as u64;
            }
        }
        Ok(Self { params, grads, states, spare, shadows, bytes, units })
    }

    /// One unit's addresses.
    pub fn unit(&self, unit: UnitId) -> &UnitHome {
        &self.units[unit.index()]
    }

    /// Where a kind of a section lies now, whose parameters begin at `offset` of the unit's; 0 if not on the host.
    pub fn address(&self, unit: UnitId, section: usize, offset: u64, kind: StateKind) -> u64 {
        let home = self.unit(unit);
        match kind {
            StateKind::Param => home.params + offset,
            StateKind::Grad => home.grads + offset,
            StateKind::Master => home.states(section, Set::Current)[0],
            StateKind::ExpAvg => home.states(section, Set::Current)[1],
            StateKind::ExpAvgSq => home.states(section, Set::Current)[2],
        }
    }

    /// Has the system provide the memory of these bytes of a kind of a section, where that is on the host, ahead of its first use.
    pub fn populate(&self, unit: UnitId, section: usize, offset: u64, kind: StateKind, bytes: Range<u64>) {
        let region = if kind == StateKind::Param { &self.params } else { &self.states };
        let inside = self.address(unit, section, offset, kind).checked_sub(region.as_ptr() as u64);
        if let Some(at) = inside.filter(|at| at + bytes.end <= region.len() as u64) {
            region.populate((at + bytes.start) as usize, (bytes.end - bytes.start) as usize);
        }
    }

    /// Lets forks copy what is left of it when the runtime is closed: tensors that the user kept.
    pub fn let_fork(&self) {
        [&self.params, &self.grads, &self.states, &self.spare].into_iter().for_each(|region| region.let_fork());
        if let Some(shadows) = &self.shadows {
            shadows.let_fork();
        }
    }

    /// Bytes that are mapped for homes and gradients.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}
