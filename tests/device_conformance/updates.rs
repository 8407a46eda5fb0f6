//! AdamW on a stream of the device against AdamW on the processor, bit for bit.
#![expect(unsafe_code, reason = "hands buffers of the bench to the device by address")]

use funicular::{
    device::StreamRef,
    dtype::{DType, StateKind},
    error::Code,
    optim::{AdamWOptions, Hyper, Span, adamw},
};

use crate::{
    bench::{Bench, DOWN, UP, pattern, round_to},
    on_every_device,
};

const KINDS: [StateKind; 5] =
    [StateKind::Param, StateKind::Grad, StateKind::Master, StateKind::ExpAvg, StateKind::ExpAvgSq];
/// Bytes between two arrays: more than any of them needs.
const ROOM: usize = 16 << 10;

fn span(base: u64, len: usize, dtype: DType) -> Span {
    let at = |i: u64| (base + i * ROOM as u64) as *mut u8;
    Span {
        param: at(0),
        grad: at(1),
        master: at(2),
        exp_avg: at(3).cast(),
        exp_avg_sq: at(4).cast(),
        len,
        dtype,
        reset_master: false,
    }
}

#[test]
fn an_update_on_a_stream_has_the_bits_of_the_processor() {
    on_every_device(|device| {
        if let Err(error) = device.prepare_updates() {
            assert_eq!(error.code(), Code::NoCompiler, "{error}");
            assert!(std::env::var_os("FUNICULAR_REQUIRE_CUDA").is_none(), "{error}");
            return;
        }
        let bench = Bench::new(device, 1 << 20);
        let chunk = round_to(KINDS.len() * ROOM, bench.device.granularity());
        let frames = bench.frames(1, chunk as u64, &[(0, 1)]);
        for (round, dtype) in [DType::F32, DType::Bf16, DType::F16].into_iter().enumerate() {
            for (len, clip) in [(1, 1.0), (129, 0.37), (4095, 1.0), (4096, 0.051)] {
                let mut state = pattern(round as u64 * 100 + len as u64, KINDS.len() * ROOM);
                // Second moments are not negative, and no exponent is all ones: ordinary numbers with ordinary results.
                state.iter_mut().skip(1).step_by(2).for_each(|byte| *byte &= 0x3f);
                let options = AdamWOptions { lr: 1e-3, weight_decay: 0.1, ..AdamWOptions::default() };
                let hyper = Hyper { clip, ..Hyper::new(&options, 3, 0.5) };
                bench.set(0, &state);
                bench.copy(UP, frames.address(0), bench.at(0), state.len());
                // SAFETY: the frames hold the five arrays, and only this stream touches them.
                unsafe { bench.device.adamw(UP, &span(frames.address(0), len, dtype), &hyper) }.expect("enqueued");
                bench.order(UP, DOWN);
                bench.copy(DOWN, bench.at(0), frames.address(0), state.len());
                bench.finish(DOWN);
                let mut words = vec![0u64; state.len() / 8];
                let expected: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
                expected.copy_from_slice(&state);
                // SAFETY: the buffer is this test's own and aligned for any element.
                unsafe { adamw(&span(expected.as_mut_ptr() as u64, len, dtype), &hyper) }.expect("trainable");
                assert!(expected != &state[..], "nothing was updated");
                assert!(bench.get(0, state.len()) == *expected, "{dtype:?} of {len} on {:?}", bench.device.kind());
            }
        }
    });
}

#[test]
fn a_type_without_a_kernel_is_refused() {
    on_every_device(|device| {
        let none = span(0, 8, DType::Opaque { size: 1 });
        let hyper = Hyper::new(&AdamWOptions::default(), 1, 1.0);
        for stream in [StreamRef::Up, StreamRef::Compute(0)] {
            // SAFETY: nothing is touched.
            let refused = unsafe { device.adamw(stream, &none, &hyper) }.expect_err("no kernel");
            assert!(matches!(refused.code(), Code::UnsupportedParam | Code::NoCompiler), "{refused}");
        }
    });
}
