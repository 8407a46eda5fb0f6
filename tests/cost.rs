//! The cost model: bytes recounted, times bounded, faster never slower.
#![expect(clippy::unwrap_used, reason = "tests")]

use funicular::{
    dtype::DType,
    model::{Layout, ParamSpec, UnitSpec},
    quantities::{ByteCount, Tier},
    schedule::{
        Budgets, LaneUse, Limits, Phase, Placement, Tiers,
        cost::{Rates, Resource, Work, gains, predict},
        placement::place,
        traffic::{Uses, of_step, windows},
    },
};
use proptest::prelude::*;

fn layout(layers: usize, numel: u64, frozen: usize) -> Layout {
    let unit = |i: usize| UnitSpec {
        name: format!("layer{i}"),
        params: vec![ParamSpec { name: format!("layer{i}.w"), numel, dtype: DType::Bf16, trainable: i >= frozen }],
    };
    Layout::new(&(0..layers).map(unit).collect::<Vec<_>>()).unwrap()
}

fn placed(layout: &Layout, tiers: Tiers, hbm: Option<u64>, host: u64, spare: Option<u64>) -> Placement {
    placed_with(LaneUse::Never, layout, tiers, hbm, host, spare)
}

fn placed_with(
    lanes: LaneUse,
    layout: &Layout,
    tiers: Tiers,
    hbm: Option<u64>,
    host: u64,
    spare: Option<u64>,
) -> Placement {
    let budgets = Budgets {
        hbm: hbm.map(ByteCount),
        host: ByteCount(host),
        nvme: ByteCount(u64::MAX),
        nvme_free: None,
        spare: spare.map(ByteCount),
    };
    let limits = Limits { granularity: 4096, block: 1 << 20, has_nvme: true, residents: true, lanes, ranks: 1 };
    place(layout, &vec![tiers; layout.units.len()], &budgets, &limits).unwrap()
}

fn work(layers: usize, passes: u32, forward: f64) -> Work {
    let uses = Uses { passes, backward: vec![true; layers] };
    Work { uses, forward: vec![forward; layers], backward: vec![2.0 * forward; layers], rest: 0.0, lanes_alone: false }
}

const GIB: f64 = 1073741824.0;

fn rates() -> Rates {
    Rates {
        up: 50.0 * GIB,
        down: 50.0 * GIB,
        both: 90.0 * GIB,
        nvme_read: 5.0 * GIB,
        nvme_write: 4.0 * GIB,
        nvme_both: 6.0 * GIB,
        update: 100.0 * GIB,
        update_beside: 70.0 * GIB,
        device_update: 1e11,
        shared: None,
    }
}

const HOST: Tiers = Tiers { params: Some(Tier::Host), optimizer: Some(Tier::Host), grads: None };
const NVME: Tiers = Tiers { params: Some(Tier::Nvme), optimizer: Some(Tier::Nvme), grads: None };

#[test]
fn a_step_moves_what_arithmetic_says() {
    let n: u64 = 1 << 20;
    let layout = layout(8, n, 0);
    let uses = Uses { passes: 1, backward: vec![true; 8] };
    // A ring of two: the last two of the forward are the first two of the backward.
    let plan = placed(&layout, HOST, Some(4 * n), 1 << 30, Some(0));
    let moved = of_step(&layout, &plan, &uses);
    assert_eq!(moved.up, (8 + 6) * 2 * n);
    assert_eq!((moved.down, moved.update, moved.updated_on_host), (8 * 2 * n, 8 * 26 * n, 8 * n));
    assert_eq!((moved.nvme_read, moved.nvme_write), (0, 0));
    // What is trained comes again in the next step, though it lies in the ring; what is frozen does not.
    let roomy = placed(&layout, HOST, Some(16 * n), 1 << 30, Some(0));
    assert_eq!(of_step(&layout, &roomy, &uses).up, 8 * 2 * n);
    let frozen = self::layout(8, n, 8);
    let plan = placed(&frozen, HOST, Some(16 * n), 1 << 30, Some(0));
    assert_eq!(of_step(&frozen, &plan, &uses), Default::default());
    // From NVMe: parameters for every page-in and for the update, states for the update.
    let plan = placed(&layout, NVME, Some(4 * n), 1 << 30, Some(0));
    let moved = of_step(&layout, &plan, &uses);
    assert_eq!((moved.nvme_read, moved.nvme_write), (14 * 2 * n + 8 * 12 * n, 8 * 12 * n));
    // Two passes: gradients and parameters twice, updates once.
    let twice = of_step(&layout, &plan, &Uses { passes: 2, ..uses.clone() });
    assert_eq!((twice.down, twice.update, twice.nvme_write), (2 * moved.down, moved.update, moved.nvme_write));
    // An embedding's backward does not read it.
    let mut embedding = uses;
    embedding.backward[0] = false;
    let backward = |w: &&funicular::schedule::traffic::Window| w.phase == Phase::Backward;
    assert_eq!(windows(&layout, &plan, &embedding).iter().filter(backward).count(), 7);
}

#[test]
fn a_step_that_only_computes_is_bound_by_compute() {
    let layout = layout(8, 1 << 20, 0);
    let plan = placed(&layout, Tiers::default(), Some(1 << 30), 1 << 30, None);
    assert_eq!(plan.ring_chunks, 0);
    let cost = predict(&layout, &plan, &rates(), &work(8, 1, 0.01));
    assert!((cost.seconds - 0.24).abs() < 0.001, "{cost:?}");
    assert_eq!((cost.binding, cost.traffic.up), (Resource::Compute, 0));
}

#[test]
fn what_binds_is_named() {
    let layout = layout(16, 8 << 20, 0);
    let host = placed(&layout, HOST, Some(64 << 20), 8 << 30, Some(0));
    let nvme = placed(&layout, NVME, Some(64 << 20), 8 << 30, Some(0));
    let fast = Rates {
        up: 1e15,
        down: 1e15,
        update: 1e15,
        update_beside: 1e15,
        nvme_read: 1e15,
        nvme_write: 1e15,
        nvme_both: 1e15,
        ..rates()
    };
    let cases = [
        (Resource::Up, &host, Rates { up: 1e9, ..fast }),
        (Resource::Down, &host, Rates { down: 1e9, ..fast }),
        (Resource::Update, &host, Rates { update: 1e9, update_beside: 1e9, ..fast }),
        (Resource::Nvme, &nvme, Rates { nvme_read: 1e9, nvme_both: 1e9, ..fast }),
    ];
    for (expected, plan, rates) in cases {
        let work = work(16, 1, 1e-4);
        let cost = predict(&layout, plan, &rates, &work);
        assert_eq!(cost.binding, expected, "{cost:?}");
        assert_eq!(gains(&layout, plan, &rates, &work)[0].0, expected);
    }
}

#[test]
fn updates_ahead_of_the_step_hide_behind_the_backward() {
    let layout = layout(16, 8 << 20, 0);
    let update = 26.0 * 16.0 * 8388608.0 / 0.3;
    let slow = Rates { update, update_beside: 0.7 * update, ..rates() };
    let work = work(16, 1, 0.01);
    let behind = predict(&layout, &placed(&layout, HOST, Some(64 << 20), 8 << 30, Some(0)), &slow, &work);
    let ahead = predict(&layout, &placed(&layout, HOST, Some(64 << 20), 8 << 30, None), &slow, &work);
    assert!(ahead.seconds < behind.seconds - 0.05, "{} {}", ahead.seconds, behind.seconds);
}

/// Parameters per second that lanes update on what is left of a link in a step of so many seconds.
fn lanes(rates: &Rates, up: u64, down: u64, step: f64) -> f64 {
    let (up, down) = (up as f64 / step, down as f64 / step);
    ((rates.up - up) / 14.0).min((rates.down - down) / 12.0).min((rates.both - up - down) / 26.0)
}

#[test]
fn lanes_take_their_part_of_the_update_and_of_the_link() {
    let (layers, n) = (16, 8 << 20);
    let layout = layout(layers, n, 0);
    let plan = placed_with(LaneUse::Always, &layout, HOST, Some(256 << 20), 8 << 30, Some(0));
    assert!(plan.lane_elems > 0);
    let processor = 1e9;
    let rates = Rates { update: 26.0 * processor, update_beside: 26.0 * processor, ..rates() };
    let mut work = work(layers, 1, 1e-5);
    let without = predict(&layout, &Placement { lane_elems: 0, ..plan.clone() }, &rates, &work);
    assert_eq!((without.by_lanes, without.binding), (0.0, Resource::Update));
    let both = predict(&layout, &plan, &rates, &work);
    // As fast as the processor and the lanes together, on what the copies of the step leave of the link.
    let trained = layers as f64 * n as f64;
    let paged = both.traffic;
    let least = trained / (processor + lanes(&rates, paged.up, paged.down, both.seconds));
    assert!((both.busy[Resource::Lanes as usize] / least - 1.0).abs() < 1e-4, "{least} {both:?}");
    assert!((both.busy[Resource::Update as usize] - both.busy[Resource::Lanes as usize]).abs() < 1e-9, "they meet");
    assert!((least..1.4 * least).contains(&both.seconds), "{least} {both:?}");
    assert!(both.seconds < 0.6 * without.seconds, "{} {}", both.seconds, without.seconds);
    assert!((0.5..0.8).contains(&both.by_lanes), "{both:?}");
    // Alone they take longer, and what they copy is the link's time.
    work.lanes_alone = true;
    let alone = predict(&layout, &plan, &rates, &work);
    assert!(alone.seconds > both.seconds, "{} {}", alone.seconds, both.seconds);
    assert_eq!((alone.by_lanes, alone.binding), (1.0, Resource::Lanes));
    assert_eq!(alone.busy[Resource::Update as usize], 0.0);
    let copied = (paged.up as f64 + 14.0 * trained) / rates.up;
    assert!((alone.busy[Resource::Up as usize] / copied - 1.0).abs() < 1e-6, "{copied} {alone:?}");
    // A processor that is the device has none.
    let host = Rates { shared: Some(4), ..rates };
    assert_eq!(predict(&layout, &plan, &host, &work).by_lanes, 0.0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn predictions_are_bounded_and_faster_is_never_slower(
        layers in 1usize..20,
        tiers in 0usize..3,
        hbm in 1u64..20,
        forward in 1e-6f64..0.1,
        scale in prop::array::uniform6(0.01f64..10.0),
        which in 0usize..6,
        passes in 1u32..3,
        shared in prop::option::of(1u32..8),
        spare in prop::bool::ANY,
        lanes in prop::option::of(prop::bool::ANY),
    ) {
        let n = 1 << 20;
        let layout = layout(layers, n, 0);
        let tiers = [HOST, NVME, Tiers { params: Some(Tier::Host), optimizer: Some(Tier::Nvme), grads: None }][tiers];
        let (used, room) = if lanes.is_some() { (LaneUse::Always, 18 * n) } else { (LaneUse::Never, 0) };
        let plan = placed_with(used, &layout, tiers, Some(hbm * 2 * n + room), 4 << 30, (!spare).then_some(0));
        let base = rates();
        let scaled = |s: [f64; 6]| Rates {
            up: base.up * s[0],
            down: base.down * s[1],
            update: base.update * s[2],
            update_beside: base.update_beside * s[2],
            nvme_read: base.nvme_read * s[3],
            nvme_write: base.nvme_write * s[4],
            nvme_both: base.nvme_both * s[5],
            shared,
            ..base
        };
        let work = Work { lanes_alone: lanes == Some(true), ..work(layers, passes, forward) };
        let cost = predict(&layout, &plan, &scaled(scale), &work);
        let compute = f64::from(passes) * layers as f64 * 3.0 * forward;
        prop_assert!(cost.seconds >= compute * 0.999, "no step is faster than its compute");
        for resource in Resource::ALL {
            prop_assert!(shared.is_some() || cost.seconds >= cost.busy[resource as usize] * 0.999, "nor than {resource:?}");
        }
        let serial: f64 = cost.busy.iter().sum();
        prop_assert!(cost.seconds <= 2.0 * serial + 1e-3, "{} but all parts are {serial}", cost.seconds);
        let mut faster = scale;
        faster[which] *= 2.0;
        let other = predict(&layout, &plan, &scaled(faster), &work);
        prop_assert!(other.seconds <= cost.seconds * 1.0001 + 1e-9, "{} > {}", other.seconds, cost.seconds);
        prop_assert_eq!(predict(&layout, &plan, &scaled(scale), &work), cost);
    }
}
