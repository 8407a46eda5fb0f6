//! Several threads at once, draining, and dropping with work under way.
#![expect(unsafe_code, reason = "looks at memory after its device is gone")]

use std::{
    sync::{Arc, Barrier},
    thread,
};

use funicular::{device::Frames, memory::HostRegion, quantities::ByteCount};

use crate::{
    bench::{Bench, DOWN, PATIENCE, UP, pattern, round_to},
    on_every_device,
};

#[test]
fn several_threads_enqueue_at_once() {
    const THREADS: usize = 4;
    const ROUNDS: usize = 200;
    const LEN: usize = 10_007;
    on_every_device(|device| {
        let chunk = device.granularity();
        let bench = Bench::new(device, 1 << 20);
        let frames = bench.frames(THREADS as u32, round_to(LEN, chunk) as u64, &[(0, 1), (1, 1), (2, 1), (3, 1)]);
        let start = Barrier::new(THREADS);
        thread::scope(|scope| {
            for me in 0..THREADS {
                let (bench, frames, start) = (&bench, &frames, &start);
                scope.spawn(move || {
                    let (from, to) = (2 * me * LEN, (2 * me + 1) * LEN);
                    start.wait();
                    for round in 0..ROUNDS {
                        let bytes = pattern((me * ROUNDS + round) as u64, LEN);
                        bench.set(from, &bytes);
                        bench.copy(UP, frames.address(me), bench.at(from), LEN);
                        bench.order(UP, DOWN);
                        bench.copy(DOWN, bench.at(to), frames.address(me), LEN);
                        let gate = bench.device.record(DOWN).expect("recorded");
                        assert!(bench.device.block(gate, PATIENCE).expect("works"));
                        assert!(bench.get(to, LEN) == bytes, "thread {me} round {round}");
                    }
                });
            }
        });
    });
}

#[test]
fn drain_leaves_nothing_under_way() {
    on_every_device(|device| {
        let chunk = device.granularity();
        let len = round_to(1 << 23, chunk);
        let bench = Bench::new(device, 8 * len as u64);
        let frames = bench.frames(1, len as u64, &[(0, 1)]);
        let bytes = pattern(5, len);
        bench.set(0, &bytes);
        for _ in 0..4 {
            bench.copy(UP, frames.address(0), bench.at(0), len);
        }
        bench.order(UP, DOWN);
        bench.copy(DOWN, bench.at(len), frames.address(0), len);
        let gate = bench.device.record(DOWN).expect("recorded");
        bench.device.drain();
        assert!(bench.device.passed(gate).expect("works"));
        assert!(bench.get(len, len) == bytes);
        bench.device.drain();
    });
}

#[test]
fn device_and_frames_may_be_dropped_with_work_under_way() {
    for frames_first in [false, true] {
        on_every_device(|device| {
            let chunk = device.granularity();
            let len = round_to(1 << 23, chunk);
            let bench = Bench::new(device, 2 * len as u64);
            let frames = bench.frames(1, len as u64, &[(0, 1)]);
            let bytes = pattern(6, len);
            bench.set(0, &bytes);
            for _ in 0..4 {
                bench.copy(UP, frames.address(0), bench.at(0), len);
            }
            bench.order(UP, DOWN);
            bench.copy(DOWN, bench.at(len), frames.address(0), len);
            let region = Arc::clone(&bench.region);
            // The one that goes second is kept until the bytes have been looked at.
            let kept: (Option<Bench>, Option<Arc<dyn Frames>>) = if frames_first {
                drop(frames);
                (Some(bench), None)
            } else {
                drop(bench);
                (None, Some(frames))
            };
            // SAFETY: the copies are done, or this test fails; the region is alive.
            let arrived = unsafe { std::slice::from_raw_parts(region.as_ptr().add(len), len) };
            assert!(arrived == bytes, "what was enqueued was done");
            drop(kept);
            assert_eq!(Arc::strong_count(&region), 1, "the device gave the region back");
        });
    }
}

#[test]
fn a_region_stays_alive_while_its_device_does() {
    on_every_device(|device| {
        let region = HostRegion::new(ByteCount(1 << 20), "a test").expect("maps");
        device.register(&region).expect("registers");
        device.register(&region).expect("a second time is harmless");
        let weak = Arc::downgrade(&region);
        drop(region);
        assert!(weak.upgrade().is_some());
        drop(device);
        assert!(weak.upgrade().is_none());
    });
}
