//! Where the segments that live in host memory lie: three regions of exact size, one per life cycle.

use std::sync::Arc;

use crate::{
    dtype::StateKind,
    error::Result,
    memory::{HostRegion, Shadow},
    model::Layout,
    schedule::Placement,
    units::{ByteCount, Tier, UnitId, round_up},
};

/// Sections of every kind start at whole pages.
const ALIGN: u64 = 4096;

/// Host addresses of one unit's segments.
#[derive(Debug)]
pub struct UnitHome {
    /// The parameter segment: in the region of parameters, or a shadow of what lives on NVMe.
    pub params: u64,
    /// The gradient segment; 0 where nothing is trained.
    pub grads: u64,
    /// Per section, master, exp_avg and exp_avg_sq; 0 where there is none or it lives on NVMe.
    pub states: Vec<[u64; 3]>,
    /// Set where the parameters live on NVMe.
    pub shadow: Option<Arc<Shadow>>,
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
    bytes: u64,
    units: Vec<UnitHome>,
}

impl Homes {
    /// Maps the regions; pages are taken at first touch.
    ///
    /// # Errors
    /// `FN-E204` when the system refuses.
    pub fn new(layout: &Layout, placement: &Placement) -> Result<Self> {
        let mut units = Vec::with_capacity(layout.units.len());
        let (mut params, mut grads, mut states) = (0, 0, 0);
        let take = |total: &mut u64, bytes: u64| {
            let at = *total;
            *total += round_up(bytes, ALIGN);
            at
        };
        // Offsets first, addresses once the regions exist; offset + 1 so that 0 can mean none.
        for (unit, home) in layout.units.iter().zip(&placement.homes) {
            let on_host = home.params == Tier::Host;
            let optimizer_on_host = home.optimizer == Tier::Host;
            units.push(UnitHome {
                params: if on_host { take(&mut params, unit.param_bytes()) + 1 } else { 0 },
                grads: if unit.trainable() { take(&mut grads, unit.grad_bytes()) + 1 } else { 0 },
                states: unit
                    .sections
                    .iter()
                    .map(|s| {
                        StateKind::OPTIMIZER.map(|k| match s.bytes(k) {
                            0 => 0,
                            _ if !optimizer_on_host => 0,
                            bytes => take(&mut states, bytes) + 1,
                        })
                    })
                    .collect(),
                shadow: if on_host { None } else { Some(Shadow::new(unit.param_bytes())?) },
            });
        }
        let bytes = params + grads + states;
        let params = HostRegion::new(ByteCount(params), "parameters")?;
        let grads = HostRegion::new(ByteCount(grads), "gradients")?;
        let states = HostRegion::new(ByteCount(states), "optimizer states")?;
        let absolute = |at: &mut u64, region: &HostRegion| {
            if *at > 0 {
                *at = region.as_ptr() as u64 + (*at - 1);
            }
        };
        for u in &mut units {
            absolute(&mut u.params, &params);
            absolute(&mut u.grads, &grads);
            u.states.iter_mut().flatten().for_each(|s| absolute(s, &states));
            if let Some(shadow) = &u.shadow {
                u.params = shadow.as_ptr() as u64;
            }
        }
        Ok(Self { params, grads, states, bytes, units })
    }

    /// One unit's addresses.
    pub fn unit(&self, unit: UnitId) -> &UnitHome {
        &self.units[unit.index()]
    }

    /// Bytes that are mapped for homes and gradients.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}
