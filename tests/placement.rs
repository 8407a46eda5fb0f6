//! Placements hold: recomputed from the layout, for random models, wishes and budgets.
#![expect(clippy::unwrap_used, reason = "tests")]

use funicular::{
    Code, Error,
    dtype::{DType, StateKind},
    model::{Layout, ParamSpec, Section, Unit, UnitSpec},
    quantities::{ByteCount, Tier, UnitId},
    schedule::{
        Budgets, LaneUse, Limits, Placement, Tiers,
        advice::{place_or_demote, ways},
        placement::{may_have_spare, place, spare_bytes},
    },
};
use proptest::prelude::*;

/// What a save or a load finds always.
fn checkpoint(plan: &Placement) -> u64 {
    (256 << 10) + if plan.nvme_bytes > 0 { 2 * plan.chunk_on_nvme() } else { 0 }
}

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
    let wish =
        (tier.clone(), tier.clone(), tier, prop::bool::weighted(0.1)).prop_map(|(params, optimizer, grads, here)| {
            if here {
                Tiers { optimizer: Some(Tier::Hbm), ..Tiers::default() }
            } else {
                Tiers { params, optimizer, grads }
            }
        });
    // In percent of the parameters; residents take seven times as much and more.
    let hbm = prop_oneof![0u64..120, 100u64..2000];
    (
        layouts(),
        prop::collection::vec(wish, 24),
        prop_oneof![2 => Just(None), 1 => (0u64..24).prop_map(Some)],
        (0u64..200, prop::option::of(hbm), prop::option::of(0u64..150), prop::option::of(0u64..50)),
        (prop::bool::weighted(0.8), prop::bool::weighted(0.8)),
        (
            prop_oneof![Just(4096u64), Just(2 << 20)],
            prop_oneof![2 => Just(LaneUse::Never), 1 => Just(LaneUse::IfRoom), 1 => Just(LaneUse::Always)],
            prop_oneof![2 => Just(1_u32), 1 => 2_u32..9],
        ),
    )
        .prop_map(
            |(layout, wishes, same, (host, hbm, nvme, spare), (has_nvme, residents), (granularity, lanes, ranks))| {
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
                    nvme_free: None,
                    spare: spare.map(|p| ByteCount(all / 100 * p)),
                };
                Case {
                    layout,
                    tiers,
                    budgets,
                    limits: Limits { granularity, block: 1 << 20, has_nvme, residents, lanes, ranks },
                }
            },
        )
}

/// Bytes of a placement, from the sections alone.
#[derive(Debug, Default)]
struct Recount {
    hbm: u64,
    host: u64,
    nvme: u64,
    /// From and to NVMe in a step.
    step: u64,
    spare: u64,
}

fn recount(case: &Case, plan: &Placement) -> Recount {
    let mut sum = Recount::default();
    for ((unit, home), &spare) in case.layout.units.iter().zip(&plan.homes).zip(&plan.spare) {
        let trains = unit.sections.iter().any(|s| s.trainable);
        let of = |kinds: &[StateKind]| -> u64 {
            let bytes = |s: &Section, k: &StateKind| s.bytes(*k).next_multiple_of(4096);
            unit.sections.iter().map(|s| kinds.iter().map(|k| bytes(s, k)).sum::<u64>()).sum()
        };
        let (param, states) = (of(&[StateKind::Param]), of(&StateKind::OPTIMIZER));
        let grad = if trains { param } else { 0 };
        if home.params == Tier::Hbm {
            sum.hbm += [param, grad, states].map(|b| b.next_multiple_of(2 << 20)).iter().sum::<u64>();
            continue;
        }
        match home.grads {
            Tier::Nvme => (sum.nvme, sum.step) = (sum.nvme + grad, sum.step + 2 * grad),
            _ => sum.host += grad,
        }
        match home.params {
            Tier::Host => sum.host += param,
            _ => (sum.nvme, sum.step) = (sum.nvme + param, sum.step + param * if trains { 4 } else { 2 }),
        }
        match home.optimizer {
            Tier::Host => sum.host += states,
            _ => (sum.nvme, sum.step) = (sum.nvme + states, sum.step + 2 * states),
        }
        if spare {
            let on =
                |tier| if home.params == tier { param } else { 0 } + if home.optimizer == tier { states } else { 0 };
            (sum.spare, sum.nvme) = (sum.spare + on(Tier::Host), sum.nvme + on(Tier::Nvme));
        }
    }
    sum.hbm += plan.chunk_bytes * u64::from(plan.ring_chunks);
    // Parameter, gradient and moments of fp32, on each of three lanes.
    sum.hbm += 3 * (16 * plan.lane_elems).next_multiple_of(case.limits.granularity);
    let slots = |(n, b): (u32, u64)| u64::from(n) * b;
    let staging = slots(plan.page_slots) + slots(plan.update_slots) + slots(plan.grad_slots);
    sum.host += staging * u64::from(case.limits.ranks) + sum.spare;
    if case.budgets.hbm.is_none() {
        sum.host += sum.hbm;
    }
    sum
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
    let sum = recount(case, plan);
    prop_assert_eq!((sum.hbm, sum.host, sum.nvme), (plan.hbm_bytes, plan.host_bytes, plan.nvme_bytes));
    prop_assert!(sum.host + plan.shadow_bytes <= case.budgets.host.0, "P1 host");
    prop_assert!(plan.host_bytes + plan.checkpoint_bytes() <= case.budgets.host.0, "P1 checkpoint");
    prop_assert!(sum.nvme <= case.budgets.nvme.0, "P1 nvme");
    prop_assert!(case.budgets.hbm.is_none_or(|b| sum.hbm <= b.0), "P1 hbm");
    prop_assert!(case.budgets.spare.is_none_or(|b| sum.spare <= b.0), "P1 spare");
    let paged = case.layout.ids().any(|u| case.layout.unit(u).optimizer_bytes() > 0 && !plan.resident(u));
    match case.limits.lanes {
        LaneUse::Never => prop_assert_eq!(plan.lane_elems, 0),
        LaneUse::IfRoom => prop_assert!(paged || plan.lane_elems == 0, "nothing to update there"),
        LaneUse::Always => prop_assert_eq!(plan.lane_elems > 0, paged),
    }
    let units = || case.layout.units.iter().zip(&plan.homes);
    let widest = units().filter(|(_, h)| h.params == Tier::Nvme).map(|(u, _)| u.param_bytes()).max().unwrap_or(0);
    let grads = units().filter(|(_, h)| h.grads == Tier::Nvme).map(|(u, _)| u.grad_bytes()).max().unwrap_or(0);
    let reads = (widest + grads + checkpoint(plan)) * u64::from(case.limits.ranks);
    prop_assert!(plan.shadow_bytes >= reads, "any unit can be read outside its window");
    prop_assert!(grads == 0 || (plan.grad_slots.0 >= 1 && plan.grad_slots.1 >= grads), "they fit a gradient slot");
    prop_assert!(widest == 0 || (plan.page_slots.0 >= 1 && plan.page_slots.1 >= widest), "it fits a page slot");
    // The machine leaves one update slot to the runtime.
    prop_assert!(sum.nvme == 0 || plan.update_slots.0 >= 2);
    for (unit, (home, wish)) in case.layout.units.iter().zip(plan.homes.iter().zip(&case.tiers)) {
        prop_assert_eq!(home.params == Tier::Hbm, home.optimizer == Tier::Hbm, "residents are whole");
        let asked = if unit.trainable() { wish.optimizer } else { wish.optimizer.filter(|&t| t != Tier::Hbm) };
        if unit.param_bytes() == 0 {
            prop_assert_eq!(home.params, Tier::Host, "what has no bytes needs no store and no place in the ring");
            continue;
        }
        prop_assert!(wish.params.is_none_or(|t| t == home.params) && asked.is_none_or(|t| t == home.optimizer));
        let grads = wish.grads.filter(|_| home.grads != Tier::Hbm && unit.trainable());
        prop_assert!(grads.is_none_or(|t| t == home.grads));
    }
    for (unit, id) in case.layout.units.iter().zip(case.layout.ids()) {
        let span = plan.spans[id.index()];
        let streams = if plan.resident(id) { 0 } else { unit.param_bytes() };
        prop_assert!(u64::from(span.chunks) * plan.chunk_bytes >= streams && span.chunks <= plan.ring_chunks);
        prop_assert!(span.chunks == 0 || (streams > 0 && span.first_chunk < plan.ring_chunks));
    }
    for (a, b) in case.layout.ids().zip(case.layout.ids().skip(1)) {
        let both = plan.spans[a.index()].chunks + plan.spans[b.index()].chunks;
        prop_assert!(both > plan.ring_chunks || !plan.share_frames(a, b), "neighbours overlap");
    }
    Ok(())
}

/// The compute tier's residents are the first in forward order, as many as leave a ring that streams at full speed.
fn fills_the_compute_tier(case: &Case, plan: &Placement) -> Result<(), TestCaseError> {
    let units = || case.layout.ids().map(|u| (u, case.layout.unit(u)));
    let free: Vec<_> = units()
        .filter(|(u, unit)| {
            let wish = case.tiers[u.index()];
            let optimizer = wish.optimizer.filter(|&t| t != Tier::Hbm || unit.trainable());
            unit.param_bytes() > 0 && wish.params.is_none() && optimizer.is_none()
        })
        .collect();
    let count = free.iter().filter(|(u, _)| plan.resident(*u)).count();
    prop_assert!(free[..count].iter().all(|(u, _)| plan.resident(*u)), "the first ones");
    prop_assert!(count == 0 || case.limits.residents);
    let (Some(hbm), true) = (case.budgets.hbm, case.limits.residents) else { return Ok(()) };
    let cost = |unit: &Unit| [unit.param_bytes(), unit.grad_bytes(), unit.optimizer_bytes()];
    let cost = |unit: &Unit| cost(unit).map(|b| b.next_multiple_of(2 << 20)).iter().sum::<u64>();
    let hbm = hbm.0 - plan.lane_bytes;
    let resident: u64 = units().filter(|(u, _)| plan.resident(*u)).map(|(_, unit)| cost(unit)).sum();
    // An upper bound of what a ring of that many frames may take, for any size of its chunks.
    let ring = |but: usize, frames: u64| {
        let streamed = units().filter(|(u, _)| !plan.resident(*u) && free[count..but].iter().all(|(v, _)| v != u));
        let bytes: Vec<u64> = streamed.map(|(_, unit)| unit.param_bytes().next_multiple_of(plan.chunk_bytes)).collect();
        bytes.iter().sum::<u64>().min(frames * bytes.iter().copied().max().unwrap_or(0))
    };
    prop_assert!(count == 0 || plan.ring_bytes() >= ring(count, 3), "a ring for streaming");
    for but in count + 1..=free.len() {
        let more: u64 = free[count..but].iter().map(|(_, unit)| cost(unit)).sum();
        let chunk = plan.chunk_bytes.max(case.limits.granularity) * 4;
        prop_assert!(resident + more + ring(but, 4) + chunk > hbm, "{} more would have fitted", but - count);
    }
    Ok(())
}

/// Second places are for units on the host or on NVMe, the first in forward order, from at most half of what is left of host memory.
fn spares_are_left_over(case: &Case, plan: &Placement) -> Result<(), TestCaseError> {
    let may = |u: UnitId| {
        let unit = case.layout.unit(u);
        unit.trainable() && may_have_spare(unit, plan.homes[u.index()])
    };
    for u in case.layout.ids() {
        prop_assert!(may(u) || !plan.spare[u.index()]);
    }
    if case.budgets.spare == Some(ByteCount(0)) {
        prop_assert!(!plan.spare.contains(&true), "none are wanted");
        return Ok(());
    }
    let bytes = |u: UnitId| spare_bytes(case.layout.unit(u), plan.homes[u.index()]);
    let sum = |units: &mut dyn Iterator<Item = UnitId>| units.map(bytes).fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
    let taken = sum(&mut case.layout.ids().filter(|u| plan.spare[u.index()]));
    prop_assert_eq!(taken.0, recount(case, plan).spare);
    let left = case.budgets.host.0 - plan.host_bytes;
    if case.budgets.spare.is_none() {
        prop_assert!(taken.0 <= left, "half is left");
    }
    if let Some(first) = case.layout.ids().find(|&u| may(u) && !plan.spare[u.index()]) {
        let before = sum(&mut case.layout.ids().filter(|&u| u < first && may(u)));
        let reads = (plan.widest_on_nvme(&case.layout) + checkpoint(plan)) * u64::from(case.limits.ranks);
        let room = case.budgets.host.0 - (plan.host_bytes - taken.0) - reads;
        let room = case.budgets.spare.map_or(room / 2, |b| b.0.min(room));
        let on_nvme = case.budgets.nvme.0 - (plan.nvme_bytes - taken.1);
        let fits = before.0 + bytes(first).0 <= room && before.1 + bytes(first).1 <= on_nvme;
        prop_assert!(!fits, "there was room for {first}");
    }
    Ok(())
}

/// No placement with parameters and states in one tier each, and gradients on the host, moves fewer bytes from and to NVMe.
fn moves_least(case: &Case, plan: &Placement) -> Result<(), TestCaseError> {
    if plan.homes.iter().zip(&case.tiers).any(|(home, wish)| home.grads == Tier::Nvme && wish.grads.is_none()) {
        return Ok(());
    }
    for params in [Tier::Host, Tier::Nvme] {
        for optimizer in [Tier::Host, Tier::Nvme] {
            let fixed = |(t, unit): (&Tiers, &Unit)| match t.optimizer {
                Some(Tier::Hbm) if unit.trainable() => *t,
                Some(Tier::Hbm) => Tiers { params: Some(params), optimizer: None, ..*t },
                _ => Tiers { params: t.params.or(Some(params)), optimizer: t.optimizer.or(Some(optimizer)), ..*t },
            };
            let here = |t: Tiers| Tiers { grads: t.grads.or(Some(Tier::Host)), ..t };
            let tiers = case.tiers.iter().zip(&case.layout.units).map(fixed).map(here).collect();
            let other = Case { tiers, ..case.clone() };
            if let Ok(other) = other.place() {
                let (mine, theirs) = (recount(case, plan).step, recount(case, &other).step);
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
        fills_the_compute_tier(&case, &plan)?;
        spares_are_left_over(&case, &plan)?;
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
    let budgets = Budgets {
        hbm: Some(ByteCount::mib(256)),
        host: ByteCount::mib(140),
        nvme: ByteCount(u64::MAX),
        nvme_free: None,
        spare: None,
    };
    let limits =
        Limits { granularity: 4096, block: 1 << 20, has_nvme: true, residents: false, lanes: LaneUse::Never, ranks: 1 };
    let plan = place(&layout, &[Tiers::default(); 9], &budgets, &limits).unwrap();
    assert_eq!(plan.homes[0].params, Tier::Host, "128 MiB at home; a slot and a shadow of it would be 256");
    assert!(plan.homes[1..].iter().any(|h| h.params == Tier::Nvme));
}

/// Twelve layers of 2 MiB of parameters each.
fn layers() -> Layout {
    let unit = |i: usize| UnitSpec {
        name: format!("layer{i}"),
        params: vec![ParamSpec { name: format!("layer{i}.w"), numel: 1 << 20, dtype: DType::Bf16, trainable: true }],
    };
    Layout::new(&(0..12).map(unit).collect::<Vec<_>>()).unwrap()
}

fn placed(tiers: Tiers, hbm: Option<u64>, host: u64) -> Result<Placement, Error> {
    placed_with(LaneUse::Never, tiers, hbm, host)
}

fn placed_with(lanes: LaneUse, tiers: Tiers, hbm: Option<u64>, host: u64) -> Result<Placement, Error> {
    let budgets = Budgets {
        hbm: hbm.map(ByteCount::mib),
        host: ByteCount::mib(host),
        nvme: ByteCount(u64::MAX),
        nvme_free: None,
        spare: None,
    };
    let limits = Limits { granularity: 2 << 20, block: 1 << 20, has_nvme: true, residents: true, lanes, ranks: 1 };
    place(&layers(), &[tiers; 12], &budgets, &limits)
}

#[test]
fn of_several_ranks_states_alone_go_lower() {
    let here = Tiers { params: Some(Tier::Host), optimizer: Some(Tier::Host), grads: Some(Tier::Host) };
    let budgets = |host| Budgets {
        hbm: Some(ByteCount::mib(64)),
        host: ByteCount::mib(host),
        nvme: ByteCount(u64::MAX),
        nvme_free: None,
        spare: None,
    };
    let limits = |ranks| Limits {
        granularity: 4096,
        block: 1 << 20,
        has_nvme: true,
        residents: false,
        lanes: LaneUse::Never,
        ranks,
    };
    let demoted = |host, ranks| place_or_demote(&layers(), &[here; 12], &budgets(host), &limits(ranks), true);
    let (plan, note) = demoted(100, 4).unwrap();
    assert!(plan.homes.iter().all(|h| h.params == Tier::Host && h.grads == Tier::Host), "48 MiB of both");
    assert!(plan.homes.iter().any(|h| h.optimizer == Tier::Nvme) && note.is_some());
    assert!(demoted(40, 1).is_ok(), "one process keeps parameters there, too");
    assert_eq!(demoted(40, 4).unwrap_err().code(), Code::HostBudget);
    let ways = ways(&layers(), &[here; 12], &budgets(100), &limits(4));
    let said: Vec<&str> = ways.iter().map(|way| &*way.change).collect();
    assert_eq!(said, ["optimizer.tier = \"auto\"", "optimizer.tier = \"nvme\""]);
}

#[test]
fn a_model_that_fits_is_left_alone() {
    // 2 + 2 + 10 MiB each, and no ring.
    let plan = placed(Tiers::default(), Some(168), 1).unwrap();
    assert!(plan.homes.iter().all(|h| h.params == Tier::Hbm));
    assert_eq!((plan.ring_chunks, plan.hbm_bytes, plan.host_bytes, plan.nvme_bytes), (0, 168 << 20, 0, 0));
    // One byte less: a ring, and eleven at home.
    let plan = placed(Tiers::default(), Some(167), 300).unwrap();
    let resident = plan.homes.iter().filter(|h| h.params == Tier::Hbm).count();
    assert_eq!((resident, plan.ring_chunks), (11, 1));
    // Without a budget of its own the compute tier is the host's memory.
    let plan = placed(Tiers::default(), None, 169).unwrap();
    assert_eq!((plan.ring_chunks, plan.hbm_bytes, plan.host_bytes), (0, 168 << 20, 168 << 20));
    let plan = placed(Tiers::default(), None, 168).unwrap();
    assert!(plan.homes.iter().all(|h| h.params != Tier::Hbm) && plan.host_bytes <= 168 << 20);
}

#[test]
fn wishes_for_the_compute_tier_are_fulfilled_or_refused() {
    let here = |params| Tiers { params, optimizer: Some(Tier::Hbm), grads: None };
    assert_eq!(placed(here(None), Some(168), 1).unwrap().ring_chunks, 0);
    let error = placed(here(None), Some(167), 1000).unwrap_err();
    assert_eq!(error.code(), Code::HbmBudget);
    assert!(error.to_string().contains("Raise budget.hbm to 168MiB"), "{error}");
    let error = placed(here(Some(Tier::Host)), Some(1000), 1000).unwrap_err();
    assert_eq!(error.code(), Code::PolicyValue);
    for wish in [(Some(Tier::Host), None), (None, Some(Tier::Host)), (None, Some(Tier::Nvme)), (Some(Tier::Nvme), None)]
    {
        let plan = placed(Tiers { params: wish.0, optimizer: wish.1, grads: None }, Some(1000), 1000).unwrap();
        assert!(plan.homes.iter().all(|h| h.params != Tier::Hbm), "{wish:?}");
        assert_eq!(plan.ring_chunks, 12, "all of budget.hbm is ring");
    }
}

#[test]
fn lanes_take_of_the_compute_tier_where_there_is_room() {
    let paged = Tiers { params: Some(Tier::Host), optimizer: Some(Tier::Host), grads: None };
    // A third of 1 Mi elements, in pieces of 32 Ki: 11 of them, 16 bytes each, rounded up to 2 MiB.
    let (elems, bytes) = (11 << 15, 18 << 20);
    let plan = placed_with(LaneUse::Always, paged, Some(20), 1000).unwrap();
    assert_eq!((plan.lane_elems, plan.lane_bytes, plan.ring_chunks, plan.hbm_bytes), (elems, bytes, 1, 20 << 20));
    let error = placed_with(LaneUse::Always, paged, Some(19), 1000).unwrap_err();
    assert_eq!(error.code(), Code::HbmBudget);
    assert!(error.to_string().contains("Raise budget.hbm to 20MiB, or set optimizer.where"), "{error}");
    // Only beside a ring of three units.
    for (hbm, lanes) in [(20, 0), (23, 0), (24, bytes)] {
        let plan = placed_with(LaneUse::IfRoom, paged, Some(hbm), 1000).unwrap();
        assert_eq!((plan.lane_bytes, plan.hbm_bytes), (lanes, (hbm / 2 * 2) << 20), "{hbm} MiB");
    }
    // Without a budget of its own the compute tier is the host's memory.
    let plan = placed_with(LaneUse::Always, paged, None, 1000).unwrap();
    assert_eq!((plan.lane_bytes, plan.hbm_bytes - plan.ring_bytes()), (bytes, bytes));
    // Where all is resident nothing passes through lanes.
    assert_eq!(placed_with(LaneUse::Always, Tiers::default(), Some(168), 1000).unwrap().lane_bytes, 0);
}
