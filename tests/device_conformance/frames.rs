//! Frames: aliasing, permanent addresses, exact copies and fills.

use funicular::{device::FrameSpan, error::Code};

use crate::{
    bench::{Bench, DOWN, UP, USER, pattern},
    on_every_device,
};

#[test]
fn units_alias_the_ring_and_keep_their_addresses() {
    on_every_device(|device| {
        let chunk = device.granularity() as usize;
        let bench = Bench::new(device, 8 * chunk as u64);
        // Units 0 and 2 are the same memory, unit 1 lies behind them, unit 3 lies over the end of one and all of the other.
        let frames = bench.frames(4, chunk as u64, &[(0, 2), (2, 2), (0, 2), (1, 3)]);
        let addresses: Vec<_> = (0..4).map(|unit| frames.address(unit)).collect();
        for (a, pair) in addresses.iter().zip(addresses.iter().skip(1)) {
            assert_ne!(a, pair, "units have addresses of their own");
        }
        for round in 0..3 {
            let (first, second) = (pattern(round, 2 * chunk), pattern(round + 100, 2 * chunk));
            bench.set(0, &first);
            bench.set(2 * chunk, &second);
            bench.copy(UP, frames.address(0), bench.at(0), 2 * chunk);
            bench.copy(UP, frames.address(1), bench.at(2 * chunk), 2 * chunk);
            bench.order(UP, DOWN);
            assert!(bench.read(frames.address(2), 2 * chunk) == first, "alias of unit 0");
            assert!(bench.read(frames.address(1), 2 * chunk) == second, "unit 1 is apart");
            let both: Vec<u8> = first.iter().chain(&second).copied().skip(chunk).collect();
            assert!(bench.read(frames.address(3), 3 * chunk) == both, "unit 3 sees both");
            bench.copy(UP, frames.address(2), bench.at(2 * chunk), chunk);
            bench.order(UP, DOWN);
            assert!(bench.read(frames.address(0), chunk) == second[..chunk], "and the other way round");
            assert_eq!(addresses, (0..4).map(|unit| frames.address(unit)).collect::<Vec<_>>());
        }
    });
}

#[test]
fn spans_wrap_around_the_end_of_the_ring() {
    on_every_device(|device| {
        let chunk = 3 * device.granularity() as usize;
        let bench = Bench::new(device, 10 * chunk as u64);
        let frames = bench.frames(3, chunk as u64, &[(2, 3), (0, 3), (1, 1)]);
        let bytes = pattern(7, 3 * chunk);
        bench.set(0, &bytes);
        bench.copy(UP, frames.address(0), bench.at(0), 3 * chunk);
        bench.order(UP, DOWN);
        let straight: Vec<u8> = [&bytes[chunk..], &bytes[..chunk]].concat();
        assert!(bench.read(frames.address(1), 3 * chunk) == straight);
        assert!(bench.read(frames.address(2), chunk) == bytes[2 * chunk..]);
    });
}

#[test]
fn many_units_share_a_small_ring() {
    on_every_device(|device| {
        let chunk = device.granularity() as usize;
        let bench = Bench::new(device, 8 * chunk as u64);
        let spans: Vec<_> = (0..200).map(|unit| (unit % 4, 1 + unit % 3)).collect();
        let frames = bench.frames(4, chunk as u64, &spans);
        for (unit, &(first, chunks)) in spans.iter().enumerate() {
            let bytes = pattern(unit as u64, 64);
            bench.set(0, &bytes);
            let last = (chunks as usize - 1) * chunk;
            bench.copy(UP, frames.address(unit) + last as u64, bench.at(0), 64);
            bench.order(UP, DOWN);
            let twin = (0..unit).rev().find(|&other| spans[other].0 == (first + chunks - 1) % 4);
            if let Some(twin) = twin {
                assert!(bench.read(frames.address(twin), 64) == bytes, "unit {unit} through unit {twin}");
            }
        }
    });
}

#[test]
fn a_ring_that_cannot_hold_a_unit_is_refused() {
    on_every_device(|device| {
        let span = FrameSpan { first_chunk: 0, chunks: 4 };
        let e = device.create_frames(3, device.granularity(), &[span]).err().expect("too small");
        assert_eq!(e.code(), Code::HbmBudget, "{e}");
    });
}

#[test]
fn odd_sizes_and_alignments_arrive_exactly() {
    const WINDOW: usize = 4224;
    on_every_device(|device| {
        let chunk = device.granularity();
        let bench = Bench::new(device, 1 << 20);
        let frames = bench.frames(3, chunk, &[(1, 3)]);
        // Across the border of two chunks.
        let window = frames.address(0) + chunk - 64;
        for (i, len) in [0, 1, 3, 7, 63, 65, 511, 4095].into_iter().enumerate() {
            for shift in [0, 1, 2, 5, 13] {
                let bytes = pattern(i as u64 * 31 + shift as u64, len);
                bench.set(3 + shift, &bytes);
                bench.fill(UP, window, 0xEE, WINDOW);
                bench.copy(UP, window + 24 + shift as u64, bench.at(3 + shift), len);
                bench.order(UP, DOWN);
                let mut expected = vec![0xEE; WINDOW];
                expected[24 + shift..24 + shift + len].copy_from_slice(&bytes);
                assert!(bench.read(window, WINDOW) == expected, "{len} bytes shifted by {shift}");
            }
        }
    });
}

#[test]
fn poison_fills_exactly_its_range() {
    on_every_device(|device| {
        let chunk = device.granularity() as usize;
        let bench = Bench::new(device, 4 * chunk as u64);
        let frames = bench.frames(2, chunk as u64, &[(0, 2)]);
        let bytes = pattern(3, 2 * chunk);
        bench.set(0, &bytes);
        for stream in [UP, DOWN, USER] {
            bench.copy(UP, frames.address(0), bench.at(0), 2 * chunk);
            bench.order(UP, stream);
            bench.fill(stream, frames.address(0) + 101, 0xDB, chunk);
            bench.order(stream, DOWN);
            let mut expected = bytes.clone();
            expected[101..101 + chunk].fill(0xDB);
            assert!(bench.read(frames.address(0), 2 * chunk) == expected, "{stream:?}");
        }
    });
}
