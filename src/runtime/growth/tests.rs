//! Moves of states on the host device, whose memory is made up.
#![expect(unsafe_code, reason = "hands buffers of its own to the runtime")]
#![expect(clippy::unwrap_used, reason = "tests")]

use std::{
    thread::{scope, sleep},
    time::Duration,
};

use crate::{
    dtype::{DType, StateKind},
    io::Direction,
    model::{Layout, ParamSpec, UnitSpec},
    policy::Policy,
    quantities::{ByteCount, UnitId},
    runtime::{Runtime, Why, paging::homes::Set},
    schedule::growth::LOOKS,
};

const ELEMS: u64 = 4096;
const CAPACITY: u64 = 1 << 20;

fn never() -> bool {
    false
}

fn runtime(budget: &str) -> Runtime {
    let param = |unit: u32| ParamSpec { name: format!("{unit}.w"), numel: ELEMS, dtype: DType::F32, trainable: true };
    let units: Vec<UnitSpec> =
        (0..3).map(|unit| UnitSpec { name: format!("unit {unit}"), params: vec![param(unit)] }).collect();
    let policy = format!(
        r#"{{"device": "host", "budget": {{"host": "64MiB"{budget}}}, "params": {{"tier": "host"}}, "optimizer": {{"tier": "host"}}}}"#
    );
    Runtime::open(Layout::new(&units).unwrap(), &Policy::from_json_str(&policy, "test").unwrap(), ByteCount(0), None)
        .unwrap()
}

/// Looks at as many steps as it takes.
fn look(rt: &Runtime) {
    (0..LOOKS).for_each(|_| rt.shared().unwrap().grow(&mut never).unwrap());
}

/// Moves up what is to: without tasks the runner does not.
fn rise(rt: &Runtime) -> u32 {
    let mut count = 0;
    while rt.shared().unwrap().rise().unwrap() {
        count += 1;
    }
    count
}

fn state(rt: &Runtime, unit: u32, values: &mut [f32], direction: Direction) {
    let place = (UnitId(unit), 0, StateKind::ExpAvg);
    // SAFETY: the slice has `ELEMS` elements of four bytes.
    unsafe { rt.state_io(place, 0..ELEMS, values.as_mut_ptr().cast(), direction, &mut never).unwrap() };
}

#[test]
fn states_move_up_and_down_and_are_the_same() {
    let rt = runtime("");
    let mut values: Vec<f32> = (0..ELEMS as u16).map(f32::from).collect();
    state(&rt, 1, &mut values, Direction::Write);
    rt.make_memory_up(CAPACITY, 0).unwrap();
    look(&rt);
    assert_eq!(rise(&rt), 3);
    let grown = rt.grown().unwrap();
    assert_eq!((grown.taken, grown.up, grown.down), (6 * 4 * ELEMS, 6 * 4 * ELEMS, 0));
    let there = rt.homes().unwrap().unit(UnitId(1)).lifted().unwrap();
    // What an update would do there.
    // SAFETY: the first state of the unit begins there, and nothing else uses it now.
    unsafe { std::slice::from_raw_parts_mut(there as *mut f32, ELEMS as usize).fill(0.5) };
    let shared = rt.shared().unwrap();
    assert!(!shared.updates_above(UnitId(1), Set::Current), "the processor reaches it");
    let mut got = vec![0.0; ELEMS as usize];
    state(&rt, 1, &mut got, Direction::Read);
    assert!(got.iter().all(|&v| v.to_bits() == 0.5_f32.to_bits()));
    state(&rt, 1, &mut values, Direction::Write);
    assert_eq!(rt.grown().unwrap().moves.back().unwrap().why, Why::Written);
    rt.give_memory_back().unwrap();
    assert_eq!(rt.grown().unwrap().taken, 0);
    state(&rt, 1, &mut got, Direction::Read);
    assert_eq!(got, values);
}

#[test]
fn what_is_on_its_way_up_is_waited_for() {
    let rt = runtime("");
    rt.make_memory_up(CAPACITY, 0).unwrap();
    look(&rt);
    // As a move up holds it. None is up yet.
    let updates = rt.shared().unwrap().share.lock();
    scope(|s| {
        let asked = s.spawn(|| rt.give_memory_back().unwrap());
        sleep(Duration::from_millis(100));
        assert!(!asked.is_finished(), "what moves up would stay there");
        drop(updates);
    });
}

#[test]
fn a_device_that_has_no_memory_after_all_is_no_error() {
    let rt = runtime("");
    rt.make_memory_up(CAPACITY, 0).unwrap();
    look(&rt);
    rt.make_memory_up(CAPACITY, CAPACITY).unwrap();
    assert_eq!(rise(&rt), 0);
    let grown = rt.grown().unwrap();
    assert_eq!((grown.refused, grown.taken, grown.moves.len()), (1, 0, 0));
    rt.make_memory_up(CAPACITY, 0).unwrap();
    look(&rt);
    assert_eq!(rise(&rt), 0, "not at once");
    (0..10).for_each(|_| look(&rt));
    assert_eq!(rise(&rt), 3);
}

#[test]
fn a_fixed_budget_takes_nothing() {
    let rt = runtime(r#", "hbm": "64KiB""#);
    rt.make_memory_up(CAPACITY, 0).unwrap();
    (0..10).for_each(|_| look(&rt));
    assert_eq!((rise(&rt), rt.may_grow().unwrap()), (0, false));
}
