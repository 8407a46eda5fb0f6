//! Where the segments that live in host memory lie: regions of exact size, one per life cycle.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use crate::{
    dtype::StateKind,
    error::Result,
    memory::{self, HostRegion, Shadow, ShadowSpace, page_size},
    model::{Layout, SECTION_ALIGN},
    quantities::{ByteCount, Tier, UnitId, round_up},
    schedule::{
        Placement,
        growth::{self, Own},
        placement,
    },
};

/// Host addresses of one unit's segments.
#[derive(Debug)]
pub struct UnitHome {
    /// The parameter segment: in the region of parameters, or a shadow of what lives on NVMe.
    pub params: u64,
    /// The gradient segment: in the region of gradients, or a shadow of what lives on NVMe; 0 where nothing is trained.
    pub grads: u64,
    /// Set where the gradients live on NVMe.
    pub grad_shadow: Option<GradShadow>,
    /// Per section, master, exp_avg and exp_avg_sq; 0 where there is none or it lives elsewhere. The second set is there for
    /// units with a spare copy.
    sets: [Vec<[u64; 3]>; 2],
    /// Where the bytes of both sets lie in memory of the compute tier, while the states are there.
    lifted: Lifted,
    /// The second set is the current one.
    swapped: AtomicBool,
    /// Where a speculative update puts the new parameters; 0 without a spare copy.
    pub spare_params: u64,
    /// Set where the parameters live on NVMe.
    pub shadow: Option<Arc<Shadow>>,
}

/// Where gradients that live on NVMe are read and edited. While they are in memory, that memory is what an update reads.
#[derive(Debug)]
pub struct GradShadow {
    /// The memory, while there is any.
    pub shadow: Arc<Shadow>,
    /// All bytes are there: a read that began earlier must not go on, because they may have been edited since.
    complete: AtomicBool,
}

impl GradShadow {
    /// Whether the gradients are in memory, all of them.
    pub fn in_memory(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    /// Takes note that they are, or are not any more.
    pub fn set_in_memory(&self, complete: bool) {
        self.complete.store(complete, Ordering::Release);
    }
}

/// One of a unit's two sets of states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Set {
    /// What the unit's states are.
    Current,
    /// Where a speculative update puts the next ones.
    Spare,
}

/// One state of one section, or what a rank owns of it: where the section's state begins at home, the first byte of it and how many, and from
/// which byte on these lie in memory of the compute tier.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    pub(crate) home: u64,
    pub(crate) start: u64,
    pub(crate) bytes: u64,
    pub(crate) offset: u64,
}

/// The place of a unit's states in the compute tier. The home stays; it is older while they are there.
#[derive(Debug, Default)]
struct Lifted {
    /// First byte; 0 while the states are at home.
    base: AtomicU64,
    /// What both sets take there.
    bytes: u64,
    /// Per set, in the order of sections and of [`StateKind::OPTIMIZER`].
    parts: [Vec<Part>; 2],
    /// Per set, parameters that are kept beside it, with their section; `home` counts from the first byte of the unit's parameters.
    held: [Vec<(usize, Part)>; 2],
}

impl UnitHome {
    /// Addresses of master, exp_avg and exp_avg_sq of a section where the update finds them, in the compute tier or at home; 0 where
    /// there is none or it lives elsewhere. Where this is one of several ranks, only what it owns lies there. They change with [`Self::swap`] and `lift`, so they are asked for with the lock of
    /// updates (`share`).
    pub fn states(&self, section: usize, set: Set) -> [u64; 3] {
        let (home, index) = (self.states_at_home(section, set), self.index(set));
        let base = self.lifted.base.load(Ordering::Acquire);
        if base == 0 {
            return home;
        }
        home.map(|at| {
            let part = self.lifted.parts[index].iter().find(|part| at > 0 && part.home == at);
            // Of what begins before the part, as if it began there too.
            part.map_or(0, |part| (base + part.offset).wrapping_sub(part.start))
        })
    }

    /// The same, at home. While the states are in the compute tier the bytes there are older.
    pub fn states_at_home(&self, section: usize, set: Set) -> [u64; 3] {
        self.sets[self.index(set)][section]
    }

    /// Which of the two sets is the current one, or the other one.
    pub(crate) fn index(&self, set: Set) -> usize {
        usize::from(self.swapped.load(Ordering::Acquire) != (set == Set::Spare))
    }

    /// What one of the two sets is made of.
    pub(crate) fn parts(&self, index: usize) -> &[Part] {
        &self.lifted.parts[index]
    }

    /// Parameters that are kept beside one of the two sets in the compute tier: which bytes of the unit's parameters, and from where on they lie
    /// there, counted from the first byte of what is up.
    pub(crate) fn held(&self, index: usize) -> impl Iterator<Item = Part> {
        self.lifted.held[index].iter().map(|(_, part)| *part)
    }

    /// Where the parameters of a section begin there, as if all of them were; none where none are.
    pub(crate) fn held_params(&self, section: usize, set: Set) -> Option<u64> {
        let base = self.lifted()?;
        let parts = &self.lifted.held[self.index(set)];
        let found = parts.iter().find(|(index, _)| *index == section);
        found.map(|(_, part)| (base + part.offset).wrapping_sub(part.start))
    }

    /// Where the states are in the compute tier; none while they are at home.
    pub(crate) fn lifted(&self) -> Option<u64> {
        Some(self.lifted.base.load(Ordering::Acquire)).filter(|&base| base > 0)
    }

    /// The states are at `base` in the compute tier from now on; none: at home.
    pub(crate) fn lift(&self, base: Option<u64>) {
        self.lifted.base.store(base.unwrap_or(0), Ordering::Release);
    }

    /// Lays both sets out in the compute tier, one behind the other; their homes are known. `own`: of one of several ranks.
    fn lay_out(&mut self, unit: &crate::model::Unit, own: Option<Own>) {
        let Lifted { parts, held, bytes, .. } = &mut self.lifted;
        for (set, (parts, held)) in self.sets.iter().zip(parts.iter_mut().zip(held)) {
            for state in growth::states(unit, own) {
                let slot = StateKind::OPTIMIZER.iter().position(|&kind| kind == state.kind);
                let there = Part { home: 0, start: state.start, bytes: state.bytes, offset: *bytes };
                match slot.map(|slot| set[state.section][slot]) {
                    Some(home) if home > 0 => parts.push(Part { home, ..there }),
                    None if set[state.section].iter().any(|&home| home > 0) => {
                        held.push((state.section, Part { home: unit.sections[state.section].offset, ..there }));
                    }
                    _ => continue,
                }
                *bytes += round_up(state.bytes, SECTION_ALIGN);
            }
        }
    }

    /// Whether the gradients are in memory: always, unless they live on NVMe.
    pub fn grads_in_memory(&self) -> bool {
        self.grad_shadow.as_ref().is_none_or(GradShadow::in_memory)
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
    /// Where parameters that live on NVMe can be read outside of windows; none if none do.
    pub shadows: Option<Arc<ShadowSpace>>,
    /// The same for gradients.
    pub grad_shadows: Option<Arc<ShadowSpace>>,
    bytes: u64,
    units: Vec<UnitHome>,
}

impl Homes {
    /// Maps regions of memory that is this process's own; pages are taken at first touch.
    ///
    /// # Errors
    /// `FN-E204` when the system refuses.
    pub fn private([params, grads, states, spare]: [u64; 4]) -> Result<[Arc<HostRegion>; 4]> {
        Ok([
            HostRegion::new(ByteCount(params), "parameters")?,
            HostRegion::new(ByteCount(grads), "gradients")?,
            HostRegion::new(ByteCount(states), "optimizer states")?,
            HostRegion::new(ByteCount(spare), "spare copies")?,
        ])
    }

    /// Lays everything out in the regions that `map` makes for these bytes of parameters, gradients, states and spare copies. `own`: of one
    /// of several ranks.
    ///
    /// # Errors
    /// `FN-E204` when the system refuses.
    pub fn new(
        layout: &Layout,
        placement: &Placement,
        own: Option<Own>,
        map: impl FnOnce([u64; 4]) -> Result<[Arc<HostRegion>; 4]>,
    ) -> Result<Self> {
        // A forked child that touches any of it ends with a message.
        memory::watch_faults()?;
        let mut units = Vec::with_capacity(layout.units.len());
        let (shadows, mut parts) = reserve(layout, placement, |home| home.params == Tier::Nvme)?;
        let (grad_shadows, mut grad_parts) = reserve(layout, placement, |home| home.grads == Tier::Nvme)?;
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
                grads: if unit.trainable() && home.grads == Tier::Host {
                    take(&mut grads, unit.grad_bytes()) + 1
                } else {
                    0
                },
                grad_shadow: (home.grads == Tier::Nvme)
                    .then(|| grad_parts.next())
                    .flatten()
                    .map(|shadow| GradShadow { shadow, complete: AtomicBool::new(false) }),
                sets: [
                    set(&mut states, home.optimizer == Tier::Host),
                    set(&mut spare, has_spare && home.optimizer == Tier::Host),
                ],
                lifted: Lifted::default(),
                swapped: AtomicBool::new(false),
                spare_params: if has_spare && on_host { take(&mut spare, unit.param_bytes()) + 1 } else { 0 },
                shadow: if on_host || resident { None } else { parts.next() },
            });
        }
        let bytes = params + grads + states + spare;
        let [params, grads, states, spare] = map([params, grads, states, spare])?;
        let absolute = |at: &mut u64, region: &HostRegion| {
            if *at > 0 {
                *at = region.as_ptr() as u64 + (*at - 1);
            }
        };
        for (u, packed) in units.iter_mut().zip(&layout.units) {
            absolute(&mut u.params, &params);
            absolute(&mut u.grads, &grads);
            u.sets[0].iter_mut().flatten().for_each(|s| absolute(s, &states));
            u.sets[1].iter_mut().flatten().for_each(|s| absolute(s, &spare));
            absolute(&mut u.spare_params, &spare);
            if let Some(shadow) = &u.shadow {
                u.params = shadow.as_ptr() as u64;
            }
            if let Some(of_grads) = &u.grad_shadow {
                u.grads = of_grads.shadow.as_ptr() as u64;
            }
            u.lay_out(packed, own);
        }
        Ok(Self { params, grads, states, spare, shadows, grad_shadows, bytes, units })
    }

    /// One unit's addresses.
    pub fn unit(&self, unit: UnitId) -> &UnitHome {
        &self.units[unit.index()]
    }

    /// Where a kind of a section has its home now, whose parameters begin at `offset` of the unit's; 0 if not on the host.
    pub fn address(&self, unit: UnitId, section: usize, offset: u64, kind: StateKind) -> u64 {
        let home = self.unit(unit);
        match kind {
            StateKind::Param => home.params + offset,
            StateKind::Grad => home.grads + offset,
            StateKind::Master => home.states_at_home(section, Set::Current)[0],
            StateKind::ExpAvg => home.states_at_home(section, Set::Current)[1],
            StateKind::ExpAvgSq => home.states_at_home(section, Set::Current)[2],
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
        [&self.shadows, &self.grad_shadows].into_iter().flatten().for_each(|shadows| shadows.let_fork());
    }

    /// Bytes that are mapped for homes and gradients.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// A range of addresses, and its parts.
type Reserved = (Option<Arc<ShadowSpace>>, std::vec::IntoIter<Arc<Shadow>>);

/// Addresses for what lives on NVMe of the units that `which` selects, as large as their parameters.
fn reserve(layout: &Layout, placement: &Placement, which: impl Fn(&placement::Homes) -> bool) -> Result<Reserved> {
    let mut units =
        layout.units.iter().zip(&placement.homes).filter(|(_, home)| which(home)).map(|(unit, _)| unit).peekable();
    if units.peek().is_none() {
        return Ok((None, Vec::new().into_iter()));
    }
    let (space, parts) = ShadowSpace::reserve(units.map(|unit| (unit.param_bytes(), &*unit.name)))?;
    Ok((Some(space), parts.into_iter()))
}
