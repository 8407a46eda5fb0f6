//! Marks: times of points in streams, in the order of the stream, and what happens to more of them than are remembered.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use funicular::device::{Device, Elapsed, HostDevice, MARKS, Mark};

use crate::{
    bench::{Bench, DOWN, UP, USER, round_to},
    on_every_device,
};

fn nanos(device: &dyn Device, from: Mark, to: Mark) -> i64 {
    match device.elapsed(from, to).expect("works") {
        Elapsed::Nanos(n) => n,
        other => panic!("{other:?}"),
    }
}

#[test]
fn marks_lie_in_the_order_of_their_stream() {
    on_every_device(|device| {
        let chunk = round_to(1 << 24, device.granularity());
        let bench = Bench::new(device, chunk as u64);
        let frames = bench.frames(1, chunk as u64, &[(0, 1)]);
        for stream in [UP, DOWN, USER] {
            let before = Instant::now();
            let mut marks = vec![bench.device.mark(stream).expect("made")];
            for _ in 0..4 {
                bench.copy(stream, frames.address(0), bench.at(0), chunk);
                marks.push(bench.device.mark(stream).expect("made"));
            }
            bench.finish(stream);
            let whole = nanos(&*bench.device, marks[0], marks[4]);
            let parts: Vec<i64> = marks.windows(2).map(|pair| nanos(&*bench.device, pair[0], pair[1])).collect();
            assert!(parts.iter().all(|&part| part > 0), "{stream:?}: a copy of {chunk} bytes took {parts:?}");
            let rounding = 4 * 1000;
            assert!((parts.iter().sum::<i64>() - whole).abs() <= rounding, "{stream:?}: {parts:?} of {whole}");
            assert!(whole <= before.elapsed().as_nanos() as i64 + rounding, "longer than the clock on the wall");
            assert_eq!(nanos(&*bench.device, marks[1], marks[0]), -parts[0], "backwards");
            assert_eq!(nanos(&*bench.device, marks[2], marks[2]), 0);
        }
    });
}

#[test]
fn times_of_different_streams_compare() {
    on_every_device(|device| {
        let chunk = round_to(1 << 24, device.granularity());
        let bench = Bench::new(device, chunk as u64);
        let frames = bench.frames(1, chunk as u64, &[(0, 1)]);
        let first = bench.device.mark(UP).expect("made");
        bench.copy(UP, frames.address(0), bench.at(0), chunk);
        bench.order(UP, DOWN);
        let second = bench.device.mark(DOWN).expect("made");
        bench.copy(DOWN, bench.at(0), frames.address(0), chunk);
        bench.order(DOWN, USER);
        let third = bench.device.mark(USER).expect("made");
        for stream in [DOWN, USER] {
            bench.finish(stream);
        }
        assert!(nanos(&*bench.device, first, second) > 0);
        assert!(nanos(&*bench.device, second, third) > 0);
        assert!(nanos(&*bench.device, third, first) < 0);
    });
}

#[test]
fn a_mark_is_pending_while_its_stream_is_busy() {
    let device = HostDevice::with_caps(None, Some(1e6)).expect("starts");
    let bench = Bench::new(Arc::new(device), 1 << 20);
    let before = bench.device.mark(DOWN).expect("made");
    bench.copy(DOWN, bench.at(1 << 19), bench.at(0), 300_000);
    let behind = bench.device.mark(DOWN).expect("made");
    assert_eq!(bench.device.elapsed(before, behind).expect("works"), Elapsed::Pending);
    bench.finish(DOWN);
    // A stream with a cap sleeps: never shorter than it should.
    assert!(Duration::from_nanos(nanos(&*bench.device, before, behind) as u64) >= Duration::from_millis(250));
}

#[test]
fn of_more_marks_than_are_remembered_the_oldest_are_lost() {
    on_every_device(|device| {
        let old = device.mark(USER).expect("made");
        let marks: Vec<Mark> = (0..MARKS).map(|_| device.mark(USER).expect("made")).collect();
        let bench = Bench::new(device, 4096);
        bench.finish(USER);
        assert_eq!(bench.device.elapsed(old, marks[0]).expect("works"), Elapsed::Lost);
        assert_eq!(bench.device.elapsed(marks[0], Mark::LOST).expect("works"), Elapsed::Lost);
        assert!(nanos(&*bench.device, marks[0], marks[marks.len() - 1]) >= 0, "the others are kept");
        let one_more = bench.device.mark(USER).expect("made");
        bench.finish(USER);
        assert_eq!(bench.device.elapsed(marks[0], one_more).expect("works"), Elapsed::Lost);
        assert!(nanos(&*bench.device, marks[1], one_more) >= 0);
    });
}
