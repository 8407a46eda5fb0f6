//! The parts that are neither disk nor arithmetic: the scheduler's decisions, and the checksums of what is on disk.
#![expect(clippy::unwrap_used, reason = "a benchmark")]

use std::{hint::black_box, path::PathBuf, time::Duration};

use criterion::{Criterion, Throughput};
use funicular::{
    dtype::DType,
    io::{DirectIo, EngineOptions},
    model::{Layout, ParamSpec, UnitSpec},
    quantities::{ByteCount, Tier, UnitId},
    schedule::{Budgets, LaneUse, Limits, Machine, Phase, Tiers, placement},
    store::{SegmentSpec, Store, StoreSpec},
};

const UNITS: u32 = 128;
const SEGMENT: u64 = 16 << 20;

/// A model of equal blocks, and a ring that holds a sixteenth of it.
fn model() -> (Layout, Vec<Tiers>, Budgets, Limits) {
    let param = |n: u32| ParamSpec { name: format!("w{n}"), numel: 4 << 20, dtype: DType::Bf16, trainable: true };
    let units: Vec<UnitSpec> =
        (0..UNITS).map(|n| UnitSpec { name: format!("layers.{n}"), params: (0..8).map(param).collect() }).collect();
    let layout = Layout::new(&units).unwrap();
    let tiers = vec![Tiers { params: Some(Tier::Host), optimizer: Some(Tier::Host), grads: None }; UNITS as usize];
    let hbm = layout.units.iter().map(|unit| unit.param_bytes()).sum::<u64>() / 16;
    let budgets = Budgets {
        hbm: Some(ByteCount(hbm)),
        host: ByteCount::gib(1024),
        nvme: ByteCount::gib(1024),
        nvme_free: None,
        spare: None,
    };
    (
        layout,
        tiers,
        budgets,
        Limits {
            granularity: 2 << 20,
            block: 1 << 20,
            has_nvme: false,
            residents: false,
            lanes: LaneUse::Never,
            ranks: 1,
        },
    )
}

fn scheduler(criterion: &mut Criterion) {
    let (layout, tiers, budgets, limits) = model();
    let mut group = criterion.benchmark_group("scheduler");
    group.measurement_time(Duration::from_secs(2));
    group.bench_function(format!("place {UNITS} units"), |b| {
        b.iter(|| placement::place(black_box(&layout), &tiers, &budgets, &limits).unwrap());
    });
    let placement = placement::place(&layout, &tiers, &budgets, &limits).unwrap();
    let mut machine = Machine::new(&placement, &[0; UNITS as usize], placement.ring_chunks / 2);
    let mut commands = Vec::with_capacity(64);
    group.throughput(Throughput::Elements(u64::from(2 * UNITS)));
    group.bench_function("a forward and a backward, per window", |b| {
        b.iter(|| {
            for (phase, unit) in (0..UNITS)
                .map(|unit| (Phase::Forward, unit))
                .chain((0..UNITS).rev().map(|unit| (Phase::Backward, unit)))
            {
                black_box(machine.open(UnitId(unit), phase, true, &mut commands));
                machine.release(UnitId(unit), &mut commands);
                commands.clear();
            }
        });
    });
    group.finish();
}

fn checksums(criterion: &mut Criterion) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let spec = StoreSpec {
        paths: vec![PathBuf::from(dir.path())],
        chunk_bytes: SEGMENT,
        segments: vec![SegmentSpec { label: "states".to_owned(), bytes: SEGMENT }],
        checksums: true,
        direct: DirectIo::Preferred,
        engine: EngineOptions::default(),
        budget: None,
        common: None,
    };
    let store = Store::open(spec, &[], drop).unwrap().store;
    let bytes: Vec<u8> = (0..SEGMENT).map(|n| (n * 31 + (n >> 9)) as u8).collect();
    let mut group = criterion.benchmark_group("checksum");
    group.throughput(Throughput::Bytes(SEGMENT)).measurement_time(Duration::from_secs(2)).sample_size(20);
    group.bench_function("seal", |b| b.iter(|| store.seal(0, 0, black_box(&bytes))));
    group.bench_function("verify", |b| b.iter(|| store.verify(0, 0, black_box(&bytes)).unwrap()));
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    scheduler(&mut criterion);
    checksums(&mut criterion);
    criterion.final_summary();
}
