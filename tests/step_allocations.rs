//! In steady state whole steps of the runtime allocate nothing. Alone in its process: it counts every allocation.
#![expect(unsafe_code, reason = "an allocator that counts, and a gradient's address")]
#![expect(clippy::unwrap_used, clippy::print_stderr, reason = "tests")]

use std::{
    alloc::{GlobalAlloc, Layout as Shape, System},
    sync::atomic::{AtomicUsize, Ordering},
};

use funicular::{
    dtype::DType,
    model::{Layout, ParamSpec, UnitSpec},
    optim::{AdamWOptions, Hyper},
    policy::Policy,
    quantities::{ByteCount, UnitId},
    runtime::{JobSpan, Runtime, StepHyper, UnitUpdate, UpdateOn},
    schedule::Phase,
};

struct Counting;
static COUNT: AtomicUsize = AtomicUsize::new(0);

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, shape: Shape) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(shape) }
    }
    unsafe fn dealloc(&self, at: *mut u8, shape: Shape) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(at, shape) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const UNITS: u32 = 6;
const ELEMS: u64 = 1 << 16;

fn open(
    params: &str,
    optimizer: &str,
    engine: &str,
    at: &str,
    dir: &std::path::Path,
) -> funicular::error::Result<Runtime> {
    let unit = |n: u32| UnitSpec {
        name: format!("unit {n}"),
        params: vec![ParamSpec { name: format!("{n}.w"), numel: ELEMS, dtype: DType::Bf16, trainable: true }],
    };
    // Three units, and lanes for a piece of 32 Ki elements each.
    let hbm = if at == "gpu" { 384 + 3 * 512 } else { 384 };
    let policy = format!(
        r#"{{"device": "host", "budget": {{"host": "64MiB", "hbm": "{hbm}KiB"}}, "params": {{"tier": "{params}"}},
            "optimizer": {{"tier": "{optimizer}", "where": "{at}"}}, "nvme": {{"paths": [{dir:?}], "engine": "{engine}"}}}}"#
    );
    let layout = Layout::new(&(0..UNITS).map(unit).collect::<Vec<_>>()).unwrap();
    Runtime::open(layout, &Policy::from_json_str(&policy, "test").unwrap(), ByteCount(0), None)
}

/// One step: forward, backward with a gradient per unit, update, end of all updates.
fn step(rt: &Runtime, updates: &[UnitUpdate], hypers: &[StepHyper], gradient: &[u16]) {
    let interrupted = &mut || false;
    let units = (0..UNITS).map(UnitId);
    for unit in units.clone() {
        assert!(rt.open_window(unit, Phase::Forward, 0, interrupted).unwrap());
        rt.release(unit, 0, interrupted).unwrap();
    }
    for unit in units.rev() {
        assert!(rt.open_window(unit, Phase::Backward, 0, interrupted).unwrap());
        // SAFETY: the gradient outlives the copy, which is waited for below.
        unsafe { rt.gradient(unit, (0, true), gradient.as_ptr() as u64, ELEMS * 2, 0, interrupted).unwrap() };
        rt.release(unit, 0, interrupted).unwrap();
    }
    rt.wait_gradients(0, interrupted).unwrap();
    // SAFETY: there are no residents.
    unsafe { rt.update(updates, hypers, &[], 0, false, interrupted).unwrap() };
    rt.settle_all(interrupted).unwrap();
}

/// In 50 calls.
fn allocations(mut step: impl FnMut()) -> usize {
    let before = COUNT.load(Ordering::Relaxed);
    (0..50).for_each(|_| step());
    COUNT.load(Ordering::Relaxed) - before
}

#[test]
fn steady_steps_allocate_nothing() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let o = AdamWOptions { lr: 1e-3, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1, maximize: false };
    let hypers = [StepHyper { hyper: Hyper::new(&o, 1, 1.0), clip: None }];
    let span = JobSpan { section: 0, start: 0, len: ELEMS, hyper: 0, reset_master: false };
    let updates: Vec<_> =
        (0..UNITS).map(|n| UnitUpdate { unit: UnitId(n), spans: vec![span], speculated: false }).collect();
    let gradient = vec![0x3f80; ELEMS as usize];
    for (params, optimizer, engine, at) in [
        ("host", "host", "threads", "cpu"),
        ("host", "host", "threads", "gpu"),
        ("host", "nvme", "threads", "cpu"),
        ("nvme", "nvme", "threads", "gpu"),
        ("nvme", "nvme", "io_uring", "cpu"),
    ] {
        let rt = match open(params, optimizer, engine, at, dir.path()) {
            Ok(rt) => rt,
            Err(e) if e.code().as_str() == "FN-E601" => {
                eprintln!("skipped: {e}");
                continue;
            }
            Err(e) => panic!("{e}"),
        };
        // Where there are lanes, they take half.
        assert_eq!(rt.set_update_on(UpdateOn::Halves).unwrap(), at == "gpu");
        (0..20).for_each(|_| step(&rt, &updates, &hypers, &gradient));
        assert!(COUNT.load(Ordering::Relaxed) > 0, "the allocator counts");
        // A thread that has to wait at a channel for the first time makes what it waits with: on a busy machine that may be late.
        let none = (0..4).any(|_| allocations(|| step(&rt, &updates, &hypers, &gradient)) == 0);
        assert!(none, "{params}, {optimizer}, {engine}, {at}: something in each 50 steps");
    }
}
