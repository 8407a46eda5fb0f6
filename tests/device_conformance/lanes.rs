//! Updates of host memory through lanes against those of the processor, bit for bit.
#![expect(unsafe_code, reason = "hands buffers of the bench to the device by address")]

use std::sync::Arc;

use funicular::{
    device::{Device, Lanes, Launch, staging_bytes},
    dtype::{DType, StateKind},
    error::Code,
    optim::{AdamWOptions, Hyper, Isa, Portion, Span, Target, adamw, adamw_into_with},
};

use crate::{
    bench::{Bench, PATIENCE, pattern, round_to},
    on_every_device,
};

const KINDS: [StateKind; 5] =
    [StateKind::Param, StateKind::Grad, StateKind::Master, StateKind::ExpAvg, StateKind::ExpAvgSq];
/// Most elements of a launch.
const ELEMS: usize = 1 << 16;
/// Bytes between two arrays, five of a span and four of its target.
const ROOM: usize = 4 * ELEMS;
const LAUNCH: usize = 9 * ROOM;

/// The lanes of a device, unless it has no compiler for their kernel.
fn lanes_of(device: &Arc<dyn Device>, count: usize) -> Option<Arc<dyn Lanes>> {
    match device.create_lanes(count, staging_bytes(ELEMS as u64)) {
        Ok(lanes) => Some(lanes),
        Err(error) => {
            assert_eq!(error.code(), Code::NoCompiler, "{error}");
            assert!(std::env::var_os("FUNICULAR_REQUIRE_CUDA").is_none(), "{error}");
            None
        }
    }
}

/// A launch whose arrays lie behind `base`.
#[derive(Clone, Copy)]
struct Arrays {
    span: Span,
    to: Option<Target>,
    hyper: Hyper,
}

impl Arrays {
    fn new(base: u64, len: usize, dtype: DType, number: usize) -> Self {
        let at = |i: u64| (base + i * ROOM as u64) as *mut u8;
        let span = Span {
            param: at(0),
            grad: at(1),
            master: if dtype == DType::F32 { std::ptr::null_mut() } else { at(2) },
            exp_avg: at(3).cast(),
            exp_avg_sq: at(4).cast(),
            len,
            dtype,
            reset_master: number.is_multiple_of(3),
        };
        let target = Target {
            param: at(5),
            master: at(6),
            exp_avg: at(7).cast(),
            exp_avg_sq: at(8).cast(),
            second: std::ptr::null_mut(),
        };
        let options =
            AdamWOptions { lr: 1e-3, weight_decay: 0.1, maximize: number % 5 == 4, ..AdamWOptions::default() };
        let clip = if number.is_multiple_of(2) { 1.0 } else { 0.37 };
        let hyper = Hyper { clip, ..Hyper::new(&options, number as u64 + 1, 0.5) };
        Self { span, to: (number % 4 > 1).then_some(target), hyper }
    }

    fn work<'a>(&'a self, target: &'a Target, portion: Portion) -> Launch<'a> {
        Launch { span: &self.span, target, portion, hyper: &self.hyper, above: false }
    }

    fn target(&self) -> Target {
        self.to.unwrap_or_else(|| Target::in_place(&self.span))
    }

    /// What it makes of `state`, computed here.
    fn expected(len: usize, dtype: DType, number: usize, state: &[u8]) -> Vec<u8> {
        Self::computed(state, |base| Self::new(base, len, dtype, number))
    }

    /// What an update in place makes of it.
    fn in_place(len: usize, dtype: DType, number: usize, state: &[u8]) -> Vec<u8> {
        Self::computed(state, |base| Self { to: None, ..Self::new(base, len, dtype, number) })
    }

    fn computed(state: &[u8], launch: impl FnOnce(u64) -> Self) -> Vec<u8> {
        let mut words = vec![0u64; state.len() / 8];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
        bytes.copy_from_slice(state);
        let same = launch(bytes.as_mut_ptr() as u64);
        // SAFETY: the buffer is this test's own and aligned for any element.
        let done = unsafe {
            match same.to {
                None => adamw(&same.span, &same.hyper),
                Some(to) => adamw_into_with(Isa::best(), &same.span, &to, &same.hyper),
            }
        };
        done.expect("trainable");
        bytes.to_vec()
    }
}

fn state(seed: u64) -> Vec<u8> {
    let mut state = pattern(seed, LAUNCH);
    // Second moments are not negative, and no exponent is all ones: ordinary numbers with ordinary results.
    state.iter_mut().skip(1).step_by(2).for_each(|byte| *byte &= 0x3f);
    state
}

#[test]
fn an_update_through_a_lane_has_the_bits_of_the_processor() {
    assert_eq!(KINDS.map(|kind| kind.element_size(DType::F32)).iter().sum::<usize>(), 16);
    on_every_device(|device| {
        let Some(lanes) = lanes_of(&device, 2) else { return };
        assert_eq!(lanes.count(), 2);
        let bench = Bench::new(device, LAUNCH as u64);
        let mut number = 0;
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            for len in [0, 1, 129, 4095, ELEMS - 8, ELEMS] {
                // A device reads and writes registered memory itself, too: states that it is told are near need not pass through the lane.
                for above in [false, true].into_iter().flat_map(|above| [above; 4]) {
                    let before = state(number as u64);
                    bench.set(0, &before);
                    let launch = Arrays::new(bench.at(0), len, dtype, number);
                    let lane = number % 2;
                    // SAFETY: the arrays lie in the registered region, and the lane is waited for.
                    unsafe { lanes.launch(lane, &Launch { above, ..launch.work(&launch.target(), Portion::Whole) }) }
                        .expect("enqueued");
                    assert!(lanes.block(lane, PATIENCE).expect("works"));
                    let expected = Arrays::expected(len, dtype, number, &before);
                    assert_eq!(expected == before, len == 0, "something is updated");
                    let kind = bench.device.kind();
                    assert!(bench.get(0, LAUNCH) == expected, "{dtype:?} of {len}, launch {number} on {kind:?}");
                    number += 1;
                }
            }
        }
    });
}

#[test]
fn two_passes_through_lanes_leave_the_bits_of_one() {
    on_every_device(|device| {
        let Some(lanes) = lanes_of(&device, 2) else { return };
        let bench = Bench::new(device, LAUNCH as u64);
        let array = |bytes: &[u8], i: usize, len: usize| bytes[i * ROOM..i * ROOM + len].to_vec();
        for (dtype, number) in
            [DType::F32, DType::Bf16, DType::F16].into_iter().flat_map(|d| (0..8).map(move |n| (d, n)))
        {
            let len = ELEMS - 8 * number;
            let before = state(number as u64);
            bench.set(0, &before);
            let launch = Arrays::new(bench.at(0), len, dtype, number);
            let passes = match launch.to {
                None => [Portion::Weights, Portion::Moments],
                Some(_) => [Portion::Param, Portion::States],
            };
            let in_place = Target::in_place(&launch.span);
            for (lane, (portion, to)) in passes.into_iter().zip([launch.to.unwrap_or(in_place), in_place]).enumerate() {
                // SAFETY: the arrays lie in the registered region, and the lane is waited for.
                unsafe { lanes.launch(lane, &launch.work(&to, portion)) }.expect("enqueued");
                assert!(lanes.block(lane, PATIENCE).expect("works"));
            }
            let (after, expected) = (bench.get(0, LAUNCH), Arrays::in_place(len, dtype, number, &before));
            let param = if launch.to.is_some() { 5 } else { 0 };
            let bytes = len * dtype.size();
            assert!(array(&after, param, bytes) == array(&expected, 0, bytes), "{dtype:?}, {passes:?}: the parameter");
            assert!(after[ROOM..5 * ROOM] == expected[ROOM..5 * ROOM], "{dtype:?}, {passes:?}: gradient and states");
            if launch.to.is_some() {
                assert!(array(&after, 0, ROOM) == array(&before, 0, ROOM), "the old parameter is only read");
                assert!(after[6 * ROOM..] == before[6 * ROOM..], "nothing else is written");
            }
        }
    });
}

#[test]
fn lanes_at_once_and_launches_in_a_row() {
    const EACH: usize = 3;
    on_every_device(|device| {
        let Some(lanes) = lanes_of(&device, 3) else { return };
        let bench = Bench::new(device, (3 * EACH * LAUNCH) as u64);
        for round in 0..5 {
            let all = || (0..3 * EACH).map(|n| (n, ELEMS - 8 * n, [DType::Bf16, DType::F32, DType::F16][n % 3]));
            all().for_each(|(n, ..)| bench.set(n * LAUNCH, &state((round * 100 + n) as u64)));
            for (n, len, dtype) in all() {
                let launch = Arrays::new(bench.at(n * LAUNCH), len, dtype, n);
                // SAFETY: the arrays lie in the registered region, are disjoint, and the lanes are waited for.
                unsafe { lanes.launch(n % 3, &launch.work(&launch.target(), Portion::Whole)) }.expect("enqueued");
            }
            (0..3).for_each(|lane| assert!(lanes.block(lane, PATIENCE).expect("works")));
            for (n, len, dtype) in all() {
                let expected = Arrays::expected(len, dtype, n, &state((round * 100 + n) as u64));
                assert!(bench.get(n * LAUNCH, LAUNCH) == expected, "launch {n} of round {round}");
            }
        }
    });
}

#[test]
fn what_does_not_fit_or_has_no_kernel_is_refused() {
    on_every_device(|device| {
        let Some(lanes) = lanes_of(&device, 1) else { return };
        let bench = Bench::new(device, 1 << 20);
        for (len, dtype, code) in
            [(8, DType::Opaque { size: 4 }, Code::UnsupportedParam), (64 * ELEMS, DType::F32, Code::Stale)]
        {
            let launch = Arrays::new(bench.at(0), len, dtype, 1);
            // SAFETY: nothing is touched.
            let refused = unsafe { lanes.launch(0, &launch.work(&launch.target(), Portion::Whole)) };
            assert_eq!(refused.expect_err("refused").code(), code);
        }
        assert!(lanes.block(0, PATIENCE).expect("works"), "nothing is under way");
    });
}

#[test]
fn dropping_lanes_waits_for_them() {
    on_every_device(|device| {
        for waits in [true, false] {
            let Some(lanes) = lanes_of(&device, 1) else { return };
            let bench = Bench::new(Arc::clone(&device), LAUNCH as u64);
            let before = state(7);
            bench.set(0, &before);
            let launch = Arrays::new(bench.at(0), ELEMS, DType::F32, 0);
            // SAFETY: the arrays lie in the registered region; dropping the lanes waits.
            unsafe { lanes.launch(0, &launch.work(&launch.target(), Portion::Whole)) }.expect("enqueued");
            if waits {
                assert!(lanes.block(0, PATIENCE).expect("works"));
            }
            drop(lanes);
            assert!(bench.get(0, LAUNCH) == Arrays::expected(ELEMS, DType::F32, 0, &before));
        }
    });
}

#[test]
fn a_lane_copies_in_its_order_and_fills_a_second_place() {
    on_every_device(|device| {
        let Some(lanes) = lanes_of(&device, 1) else { return };
        let bench = Bench::new(device, 2 * LAUNCH as u64);
        let chunk = round_to(LAUNCH, bench.device.granularity());
        let frames = bench.frames(1, chunk as u64, &[(0, 1)]);
        let (len, before) = (ELEMS, state(11));
        for above in [false, true] {
            bench.set(0, &before);
            let launch = Arrays { to: None, ..Arrays::new(bench.at(0), len, DType::Bf16, 1) };
            let (held, size) = (frames.address(0), len * DType::Bf16.size());
            // SAFETY: all lies in the registered region or in the frame, and the lane is waited for.
            unsafe {
                // The parameters lie in the device's memory, and come from there.
                lanes.copy(0, held, launch.span.param as u64, size).expect("enqueued");
                let span = Span { param: held as *mut u8, ..launch.span };
                let to = Target { second: held as *mut u8, ..Target::in_place(&launch.span) };
                lanes.launch(0, &Launch { span: &span, above, ..launch.work(&to, Portion::Whole) }).expect("enqueued");
                lanes.copy(0, bench.at(LAUNCH), held, size).expect("enqueued");
            }
            assert!(lanes.block(0, PATIENCE).expect("works"));
            let expected = Arrays::in_place(len, DType::Bf16, 1, &before);
            assert!(bench.get(0, LAUNCH) == expected, "at home");
            assert!(bench.get(LAUNCH, size) == expected[..size], "in the second place");
            assert!(expected[..size] != before[..size], "something is updated");
        }
    });
}
