//! Means over ranks on a stream of the device against those on the processor, bit for bit.
#![expect(unsafe_code, reason = "hands buffers of the bench to the device by address")]

use funicular::{
    device::StreamRef,
    dtype::DType,
    error::Code,
    optim::{MeanPart, mean},
};

use crate::{
    bench::{Bench, DOWN, UP, USER, pattern, round_to},
    on_every_device,
};

const DTYPES: [DType; 3] = [DType::Bf16, DType::F32, DType::F16];
/// More than one launch takes, of each type.
const PARTS: usize = 200;
/// Bytes between two arrays of a part, and how many it has: the mean, the own piece, those of three other ranks.
const ROOM: usize = 4 << 10;
const ARRAYS: usize = 5;
/// A part that is larger than all others, for many blocks of a grid.
const LARGE: usize = 300_000;

/// Part number `i` in memory at `base`: some begin at any element, some ranks have no piece.
fn part(base: u64, i: usize) -> MeanPart {
    let dtype = DTYPES[i % 3];
    let (len, shift) = ([1, 7, 64, 999][i % 4], [0, 1, 8][i / 3 % 3]);
    let at = |array: usize| base + ((i * ARRAYS + array) * ROOM + shift * dtype.size()) as u64;
    let count = i / 2 % 4;
    let own = if !i.is_multiple_of(5) || count == 0 { at(1) } else { 0 };
    MeanPart {
        out: at(0) as *mut u8,
        own: own as *const u8,
        others: at(2) as *const u8,
        stride: if i.is_multiple_of(7) { len * dtype.size() } else { ROOM },
        count,
        before: if count == 0 { 0 } else { i % (count + 1) },
        len,
        dtype,
    }
}

fn parts(base: u64) -> Vec<MeanPart> {
    let large = |array: usize| base + (PARTS * ARRAYS * ROOM + array * LARGE * 2) as u64;
    let last = MeanPart {
        out: large(0) as *mut u8,
        own: large(1) as *const u8,
        others: large(2) as *const u8,
        stride: LARGE * 2,
        count: 2,
        before: 1,
        len: LARGE - 3,
        dtype: DType::Bf16,
    };
    (0..PARTS).map(|i| part(base, i)).chain([last]).collect()
}

#[test]
fn means_on_a_stream_have_the_bits_of_the_processor() {
    on_every_device(|device| {
        if let Err(error) = device.prepare_means() {
            assert_eq!(error.code(), Code::NoCompiler, "{error}");
            assert!(std::env::var_os("FUNICULAR_REQUIRE_CUDA").is_none(), "{error}");
            return;
        }
        let bytes = PARTS * ARRAYS * ROOM + 4 * LARGE * 2;
        let bench = Bench::new(device, 8 << 20);
        let chunk = round_to(bytes, bench.device.granularity());
        let frames = bench.frames(1, chunk as u64, &[(0, 1)]);
        let base = frames.address(0);
        let state = pattern(7, bytes);
        bench.set(0, &state);
        bench.copy(UP, base, bench.at(0), bytes);
        bench.order(UP, USER);
        let StreamRef::Compute(stream) = USER else { unreachable!("the user's") };
        // SAFETY: the frames hold all arrays, and only this stream touches them.
        unsafe { bench.device.mean(stream, &parts(base), 5) }.expect("enqueued");
        bench.order(USER, DOWN);
        bench.copy(DOWN, bench.at(0), base, bytes);
        bench.finish(DOWN);
        let mut words = vec![0u64; bytes.div_ceil(8)];
        let expected: &mut [u8] = &mut bytemuck::cast_slice_mut(&mut words)[..bytes];
        expected.copy_from_slice(&state);
        // SAFETY: the buffer is this test's own and aligned for any element.
        unsafe { mean(&parts(expected.as_mut_ptr() as u64), 5) }.expect("means");
        assert!(expected != &state[..], "nothing was made");
        let found = bench.get(0, bytes);
        let wrong = found.iter().zip(&*expected).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "first byte that differs on {:?}", bench.device.kind());
    });
}

#[test]
fn what_has_no_mean_is_refused() {
    on_every_device(|device| {
        let none = MeanPart { dtype: DType::Opaque { size: 1 }, ..part(0, 1) };
        // SAFETY: nothing is touched.
        let refused = unsafe { device.mean(0, &[none], 5) }.expect_err("no kernel");
        assert!(matches!(refused.code(), Code::UnsupportedParam | Code::NoCompiler), "{refused}");
    });
}
