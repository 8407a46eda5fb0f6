//! States that ranks keep in free memory of their devices, where others look for them at home: on the host device, whose memory is made up.
#![expect(unsafe_code, reason = "hands buffers of its own to the runtime")]
#![expect(clippy::unwrap_used, reason = "tests")]

use std::{
    ops::Range,
    sync::Barrier,
    thread::{scope, sleep},
    time::{Duration, Instant},
};

use super::{
    ahead_tests::backward,
    spec::RankSpec,
    tests::{POLICY, SIZES, UNITS, contents, hyper, never, open, whole},
};
use crate::{dtype::StateKind, io::Direction, quantities::UnitId, runtime::Runtime};

const GROWS: &str = r#"{"device": "host", "budget": {"host": "64MiB", "threads": 1}}"#;
const CAPACITY: u64 = 4 << 20;

/// Two ranks whose devices have room for all states.
pub(super) fn growing() -> Vec<Runtime> {
    let spec = |rank, file| Some(RankSpec { rank, size: 2, file, grows: Some(true) });
    let first = open(GROWS, spec(0, None)).unwrap();
    let (policy, file) = (first.concrete_policy().unwrap(), first.shared_file().unwrap());
    let all = vec![first, open(&policy, spec(1, Some(file))).unwrap()];
    all.iter().for_each(|rt| rt.make_memory_up(CAPACITY, 0).unwrap());
    all
}

/// A step that updates some units, for gradients of all.
pub(super) fn step(rt: &Runtime, rank: Option<usize>, number: u64, units: Range<u32>) {
    backward(rt, rank, number);
    if rank.is_some() {
        assert_eq!(rt.at_step(number, &mut never).unwrap(), None);
    }
    let updates: Vec<_> = units.map(|unit| whole(unit, number == 1)).collect();
    // SAFETY: there are no residents.
    unsafe { rt.update(&updates, &[hyper(0.1, number)], &[], 0, false, &mut never) }.unwrap();
}

/// Waits until nothing is left to move up.
pub(super) fn risen(rt: &Runtime) {
    rt.settle_all(&mut never).unwrap();
    let (shared, begun) = (rt.shared().unwrap(), Instant::now());
    while shared.growing.waits_to_rise() {
        assert!(begun.elapsed() < Duration::from_mins(1), "states do not move up");
        sleep(Duration::from_millis(1));
    }
    // The last one may be on its way.
    drop(shared.share.lock());
}

/// Writes a state of the first unit, as a rank does that loads states for all.
pub(super) fn load(rt: &Runtime, value: f32) {
    let mut values = vec![value; SIZES[0] as usize];
    let place = (UnitId(0), 0, StateKind::ExpAvg);
    // SAFETY: the buffer has all elements of the section.
    unsafe { rt.state_io(place, 0..SIZES[0], values.as_mut_ptr().cast(), Direction::Write, &mut never) }.unwrap();
}

/// States of a unit are loaded again and again, between steps that do not update it; what all come to.
fn loads(rt: &Runtime, rank: Option<usize>, meet: &dyn Fn()) -> Vec<Vec<u8>> {
    let mut numbers = 1..;
    let mut steps = |units: Range<u32>, count| {
        numbers.by_ref().take(count).for_each(|number| step(rt, rank, number, units.clone()));
        risen(rt);
    };
    steps(0..UNITS, 6);
    for value in [0.5, 0.25] {
        meet();
        if rank != Some(1) {
            load(rt, value);
        }
        meet();
        steps(1..UNITS, 3);
    }
    steps(0..UNITS, 2);
    assert!(rank.is_none() || rt.grown().unwrap().up > 0, "nothing moved up");
    rt.give_memory_back().unwrap();
    meet();
    contents(rt)
}

#[test]
fn states_loaded_twice_between_two_updates_of_a_unit_are_those_loaded_last() {
    let expected = loads(&open(POLICY, None).unwrap(), None, &|| {});
    let (all, barrier) = (growing(), Barrier::new(2));
    scope(|scope| {
        for (rank, rt) in all.iter().enumerate() {
            let (expected, barrier) = (&expected, &barrier);
            let meet = || {
                barrier.wait();
            };
            scope.spawn(move || assert!(loads(rt, Some(rank), &meet) == *expected, "rank {rank}"));
        }
    });
}
