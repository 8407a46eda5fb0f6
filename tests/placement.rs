//! Placements hold: recomputed from the layout, for random models, wishes and budgets.
#![expect(clippy::unwrap_used, reason = "tests")]

use funicular::{
    Code, Error,
    dtype::{DType, StateKind},
    model::{Layout, ParamSpec, UnitSpec},
    schedule::{Budgets, Limits, Placement, Tiers, placement::place},
    units::{ByteCount, Tier},
};
use proptest::prelude::*;

#[derive(Clone, Debug)]
struct Case {
    layout: Layout,
    tiers: Vec<Tiers>,
    budgets: Budgets,
    limits: Limits,
}

impl Case {
    fn place(&self) -> Result<Placement, Error> {
        place(&self.layout, &self.tiers, &self.budgets, &self.limits)
    }
}

fn layouts() -> impl Strategy<Value = Layout> {
    let dtype = prop_oneof![
        4 => Just(DType::Bf16), 2 => Just(DType::F32), 1 => Just(DType::F16), 1 => Just(DType::Opaque { size: 1 })
    ];
    let numel = prop_oneof![1 => Just(0u64), 3 => 1u64..3000, 3 => 1u64..3_000_000, 1 => 1u64..40_000_000];
    let param = (numel, dtype, prop::bool::weighted(0.85));
    prop::collection::vec(prop::collection::vec(param, 0..4), 1..24).prop_map(|units| {
        let spec = |(u, params): (usize, &Vec<(u64, DType, bool)>)| UnitSpec {
            name: format!("u{u}"),
            params: params
                .iter()
                .enumerate()
                .map(|(p, &(numel, dtype, trainable))| ParamSpec {
                    name: format!("u{u}.p{p}"),
                    numel,
                    dtype,
                    trainable,
                })
                .collect(),
        };
        Layout::new(&units.iter().enumerate().map(spec).collect::<Vec<_>>()).unwrap()
    })
}

fn bytes(layout: &Layout) -> (u64, u64, u64) {
    let sum = |f: fn(&funicular::model::Unit) -> u64| layout.units.iter().map(f).sum();
    (sum(|u| u.param_bytes()), sum(|u| u.optimizer_bytes()), sum(|u| u.grad_bytes()))
}

fn cases() -> impl Strategy<Value = Case> {
    let tier = prop_oneof![3 => Just(None), 1 => Just(Some(Tier::Host)), 1 => Just(Some(Tier::Nvme))];
    let wish = (tier.clone(), tier).prop_map(|(params, optimizer)| Tiers { params, optimizer });
    (
        layouts(),
        prop::collection::vec(wish, 24),
        prop_oneof![2 => Just(None), 1 => (0u64..24).prop_map(Some)],
        (0u64..200, prop::option::of(0u64..120), prop::option::of(0u64..150)),
        prop::bool::weighted(0.8),
        prop_oneof![Just(4096u64), Just(2 << 20)],
    )
        .prop_map(|(layout, wishes, same, (host, hbm, nvme), has_nvme, granularity)| {
            let (params, states, grads) = bytes(&layout);
            let all = params + states + grads;
            let n = layout.units.len();
            let tiers = match same {
                None => vec![Tiers::default(); n],
                Some(0..12) => vec![wishes[0]; n],
                Some(_) => wishes[..n].to_vec(),
            };
            let budgets = Budgets {
                hbm: hbm.map(|p| ByteCount(params / 100 * p)),
                host: ByteCount(all / 100 * host),
                nvme: ByteCount(nvme.map_or(u64::MAX, |p| all / 100 * p)),
            };
            Case { layout, tiers, budgets, limits: Limits { granularity, block: 1 << 20, has_nvme } }
        })
}

/// Host and NVMe bytes of a placement, and NVMe traffic per step, from the sections alone.
fn recount(layout: &Layout, plan: &Placement) -> (u64, u64, u64) {
    let (mut host, mut nvme, mut step) = (0, 0, 0);
    for (unit, home) in layout.units.iter().zip(&plan.homes) {
        let trains = unit.sections.iter().any(|s| s.trainable);
        for s in &unit.sections {
            let padded = |kind| s.bytes(kind).next_multiple_of(4096);
            let (param, states) = (padded(StateKind::Param), StateKind::OPTIMIZER.map(padded).iter().sum::<u64>());
            host += if trains { param } else { 0 };
            match home.params {
                Tier::Host => host += param,
                _ => (nvme, step) = (nvme + param, step + param * if trains { 4 } else { 2 }),
            }
            match home.optimizer {
                Tier::Host => host += states,
                _ => (nvme, step) = (nvme + states, step + 2 * states),
            }
        }
    }
    let slots = |(n, b): (u32, u64)| u64::from(n) * b;
    (host + slots(plan.page_slots) + slots(plan.update_slots), nvme, step)
}

/// The size after the word "to" in an error's advice.
fn advised(error: &Error) -> u64 {
    let text = error.to_string();
    let size = text.split(" to ").nth(1).unwrap_or_else(|| panic!("no size in: {text}"));
    let size = size.split(',').next().unwrap();
    let (digits, unit) = size.split_at(size.find(|c: char| !c.is_ascii_digit()).unwrap());
    digits.parse::<u64>().unwrap() * if unit == "KiB" { 1 << 10 } else { 1 << 20 }
}

fn holds(case: &Case, plan: &Placement) -> Result<(), TestCaseError> {
    let (host, nvme, _) = recount(&case.layout, plan);
    prop_assert_eq!((host, nvme), (plan.host_bytes, plan.nvme_bytes));
    prop_assert!(host + plan.shadow_bytes <= case.budgets.host.0, "P1 host");
    prop_assert!(nvme <= case.budgets.nvme.0, "P1 nvme");
    prop_assert!(case.budgets.hbm.is_none_or(|b| plan.ring_bytes() <= b.0), "P1 hbm");
    let units = || case.layout.units.iter().zip(&plan.homes);
    let widest = units().filter(|(_, h)| h.params == Tier::Nvme).map(|(u, _)| u.param_bytes()).max().unwrap_or(0);
    prop_assert!(plan.shadow_bytes >= widest, "any unit can be read outside its window");
    prop_assert!(widest == 0 || (plan.page_slots.0 >= 1 && plan.page_slots.1 >= widest), "it fits a page slot");
    // The machine leaves one update slot to the runtime.
    prop_assert!(nvme == 0 || plan.update_slots.0 >= 2);
    for (home, wish) in plan.homes.iter().zip(&case.tiers) {
        prop_assert!(
            wish.params.is_none_or(|t| t == home.params) && wish.optimizer.is_none_or(|t| t == home.optimizer)
        );
    }
    for (unit, span) in case.layout.units.iter().zip(&plan.spans) {
        prop_assert!(
            u64::from(span.chunks) * plan.chunk_bytes >= unit.param_bytes() && span.chunks <= plan.ring_chunks
        );
        prop_assert!(span.chunks == 0 || span.first_chunk < plan.ring_chunks);
    }
    for (a, b) in case.layout.ids().zip(case.layout.ids().skip(1)) {
        let both = plan.spans[a.index()].chunks + plan.spans[b.index()].chunks;
        prop_assert!(both > plan.ring_chunks || !plan.share_frames(a, b), "neighbours overlap");
    }
    Ok(())
}

/// No placement with each kind in one tier moves fewer bytes from and to NVMe.
fn moves_least(case: &Case, plan: &Placement) -> Result<(), TestCaseError> {
    for params in [Tier::Host, Tier::Nvme] {
        for optimizer in [Tier::Host, Tier::Nvme] {
            let fixed =
                |t: &Tiers| Tiers { params: t.params.or(Some(params)), optimizer: t.optimizer.or(Some(optimizer)) };
            let other = Case { tiers: case.tiers.iter().map(fixed).collect(), ..case.clone() };
            if let Ok(other) = other.place() {
                let (mine, theirs) = (recount(&case.layout, plan).2, recount(&case.layout, &other).2);
                prop_assert!(mine <= theirs, "{mine} bytes per step, but {params:?}/{optimizer:?} has {theirs}");
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn placements_hold_or_say_what_is_missing(case in cases()) {
        let mut case = case;
        let mut raised = Vec::new();
        let plan = loop {
            match case.place() {
                Ok(plan) => break plan,
                Err(error) => {
                    // Raising each budget once, to the size that the message names, must do.
                    let named = (error.code(), case.limits.has_nvme);
                    prop_assert!(!raised.contains(&named), "the size named was not enough: {error}");
                    raised.push(named);
                    match error.code() {
                        Code::HbmBudget => case.budgets.hbm = Some(ByteCount(advised(&error))),
                        Code::HostBudget => case.budgets.host = ByteCount(advised(&error)),
                        Code::NvmeBudget if case.limits.has_nvme => case.budgets.nvme = ByteCount(advised(&error)),
                        Code::NvmeBudget => case.limits.has_nvme = true,
                        code => prop_assert!(false, "{code:?}: {error}"),
                    }
                }
            }
        };
        holds(&case, &plan)?;
        moves_least(&case, &plan)?;
        prop_assert_eq!(case.place().unwrap(), plan, "P2");
    }

    #[test]
    fn more_budget_never_fits_less(case in cases(), more in 0u64..300) {
        let mut case = case;
        if case.place().is_ok() {
            case.budgets.host.0 += case.budgets.host.0 / 100 * more;
            let plan = case.place();
            prop_assert!(plan.is_ok(), "{}", plan.unwrap_err());
        }
    }
}

#[test]
fn a_wide_unit_stays_home_where_paging_it_would_cost_more() {
    let unit = |name: &str, numel| UnitSpec {
        name: name.into(),
        params: vec![ParamSpec { name: format!("{name}.w"), numel, dtype: DType::Bf16, trainable: false }],
    };
    let mut specs = vec![unit("embedding", 64 << 20)];
    specs.extend((0..8).map(|i| unit(&format!("layer{i}"), 1 << 20)));
    let layout = Layout::new(&specs).unwrap();
    let budgets = Budgets { hbm: None, host: ByteCount::mib(140), nvme: ByteCount(u64::MAX) };
    let limits = Limits { granularity: 4096, block: 1 << 20, has_nvme: true };
    let plan = place(&layout, &[Tiers::default(); 9], &budgets, &limits).unwrap();
    assert_eq!(plan.homes[0].params, Tier::Host, "128 MiB at home; a slot and a shadow of it would be 256");
    assert!(plan.homes[1..].iter().any(|h| h.params == Tier::Nvme));
}
