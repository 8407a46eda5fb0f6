//! Random models and budgets, placed by the real planner and cut by the real map.

use funicular::{
    Code,
    dtype::DType,
    model::{Layout, ParamSpec, Unit, UnitSpec},
    quantities::{ByteCount, Tier, UnitId},
    runtime::disk::map::Map,
    schedule::{Budgets, LaneUse, Limits, Placement, Tiers, placement},
};

use crate::chance::Chance;

/// What is simulated.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) layout: Layout,
    pub(crate) plan: Placement,
    /// Streamed chunks of each unit's update.
    pub(crate) chunks: Vec<u32>,
    pub(crate) window: u32,
    /// How many budgets were refused before one held.
    pub(crate) refused: u32,
}

pub(crate) fn layout(chance: &mut Chance) -> Layout {
    let units = 1 + chance.pick(&[3, 8, 8, 16, 40]);
    let units = 1 + chance.index(units);
    let uniform = chance.percent(30).then(|| 1 + chance.below(40_000));
    let specs: Vec<UnitSpec> = (0..units)
        .map(|u| {
            let frozen = chance.percent(15);
            let params = (0..chance.below(5))
                .map(|p| ParamSpec {
                    name: format!("u{u}.p{p}"),
                    numel: uniform.unwrap_or_else(|| {
                        let n = chance.pick(&[0, 1, 300, 5_000, 60_000]);
                        if n == 0 { 0 } else { 1 + chance.below(n) }
                    }),
                    dtype: chance.pick(&[DType::F32, DType::Bf16, DType::Bf16, DType::F16, DType::Opaque { size: 1 }]),
                    trainable: !frozen && chance.percent(90),
                })
                .collect();
            UnitSpec { name: format!("u{u}"), params }
        })
        .collect();
    Layout::new(&specs).expect("small units pack")
}

fn wishes(chance: &mut Chance, units: usize, has_nvme: bool) -> Vec<Tiers> {
    let free = chance.percent(40);
    let one = |chance: &mut Chance| match chance.below(4) {
        0 => Some(Tier::Host),
        1 | 2 if has_nvme => Some(Tier::Nvme),
        _ => None,
    };
    let all = Tiers { params: one(chance), optimizer: one(chance), grads: one(chance) };
    let each = chance.percent(50);
    (0..units)
        .map(|_| match (free, each) {
            (true, _) => Tiers::default(),
            (_, false) => all,
            (_, true) => Tiers { params: one(chance), optimizer: one(chance), grads: one(chance) },
        })
        .collect()
}

impl Model {
    pub(crate) fn random(chance: &mut Chance) -> Self {
        let layout = layout(chance);
        let bytes = |f: fn(&Unit) -> u64| layout.units.iter().map(f).sum::<u64>();
        let (params, states) = (bytes(|u| u.param_bytes()), bytes(|u| u.grad_bytes() + u.optimizer_bytes()));
        let has_nvme = chance.percent(80);
        // Residents take no part in what is simulated.
        let granularity = chance.pick(&[4096, 16384, 65536]);
        let limits =
            Limits { granularity, block: 1 << 20, has_nvme, residents: false, lanes: LaneUse::Never, ranks: 1 };
        let tiers = wishes(chance, layout.units.len(), has_nvme);
        let share = chance.pick(&[5, 20, 50, 100, 250]);
        let mut budgets = Budgets {
            hbm: chance.percent(90).then(|| ByteCount(params / 100 * chance.pick(&[10, 25, 40, 60, 120]))),
            host: ByteCount((params + states) / 100 * share),
            nvme: ByteCount(if chance.percent(10) { params + states } else { u64::MAX }),
            nvme_free: None,
            spare: None,
        };
        let mut refused = 0;
        let plan = loop {
            match placement::place(&layout, &tiers, &budgets, &limits) {
                Ok(plan) => break plan,
                Err(error) => {
                    refused += 1;
                    assert!(refused < 200, "no budget is enough: {error}");
                    match error.code() {
                        Code::HbmBudget => raise(budgets.hbm.as_mut().expect("bounded"), limits.granularity),
                        Code::HostBudget => raise(&mut budgets.host, 64 << 10),
                        Code::NvmeBudget => raise(&mut budgets.nvme, 64 << 10),
                        _ => panic!("a refused budget has a code of its own: {error}"),
                    }
                }
            }
        };
        let map = Map::new(&layout, &plan, None);
        let chunks = layout
            .ids()
            .map(|u| {
                let n = map.chunk_count(u);
                // More pieces than the staging asks for: the machine does not care, and more goes on at once.
                if n > 0 && chance.percent(50) { n + chance.below(4) as u32 } else { n }
            })
            .collect();
        let window =
            if chance.percent(70) { plan.ring_chunks } else { chance.below(u64::from(plan.ring_chunks) + 1) as u32 };
        Self { layout, plan, chunks, window, refused }
    }

    pub(crate) fn units(&self) -> usize {
        self.layout.units.len()
    }

    pub(crate) fn params_on_nvme(&self, unit: UnitId) -> bool {
        self.plan.homes[unit.index()].params == Tier::Nvme
    }

    pub(crate) fn states_on_nvme(&self, unit: UnitId) -> bool {
        self.plan.homes[unit.index()].optimizer == Tier::Nvme && self.chunks[unit.index()] > 0
    }

    pub(crate) fn grads_on_nvme(&self, unit: UnitId) -> bool {
        self.plan.homes[unit.index()].grads == Tier::Nvme && self.chunks[unit.index()] > 0
    }

    /// Positions in the ring, in the order of the unit's bytes.
    pub(crate) fn places(&self, unit: UnitId) -> Vec<usize> {
        self.plan.chunks_of(self.plan.spans[unit.index()]).map(|c| c as usize).collect()
    }
}

fn raise(budget: &mut ByteCount, by: u64) {
    budget.0 = (budget.0 + by).saturating_add(budget.0 / 8);
}
