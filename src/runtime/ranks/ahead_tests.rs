//! Updates that ranks begin before their step: the bits are those of one process that begins none, and nothing shows before all take the step.
#![expect(unsafe_code, reason = "hands buffers of its own to the runtime, and looks at homes")]
#![expect(clippy::unwrap_used, reason = "tests")]

use std::{
    sync::{
        Barrier,
        atomic::{AtomicU64, Ordering},
    },
    thread::{scope, sleep},
    time::Duration,
};

use super::tests::{POLICY, UNITS, contents, gradients, hyper, look, never, open, together_by, whole};
use crate::{
    error::Code,
    quantities::UnitId,
    runtime::{Runtime, StepHyper, UnitUpdate, paging::homes::Set, update::update_on::UpdateOn},
    schedule::placement::spare_bytes,
};

/// With lanes, which update half of the pieces where a test says so.
pub(super) const SPARE: &str = r#"{"device": "host", "budget": {"host": "64MiB", "hbm": "16MiB", "threads": 1}, "optimizer": {"spare": "16MiB", "where": "gpu"}}"#;

/// The same with weights that are made first wherever no update made ahead can be used, and states that follow so much later.
pub(super) fn trailing(policy: &str, delay: u32) -> String {
    let head = policy.strip_suffix('}').unwrap();
    format!("{head}, \"debug\": {{\"faults\": \"states:delay={delay}ms\"}}}}")
}

/// Without second places.
pub(super) const IN_PLACE: &str = r#"{"device": "host", "budget": {"host": "64MiB", "hbm": "16MiB", "threads": 1}, "optimizer": {"spare": "0B", "where": "gpu"}}"#;

/// What happens between the beginning of updates and the step.
#[derive(Clone, Copy, Debug)]
pub(super) enum Between {
    Nothing,
    /// The step has another learning rate.
    OtherRate,
    /// The gradients are multiplied.
    Clipped(f32),
    /// Other gradients come.
    Again,
    /// A section of each unit is not stepped.
    Partial,
}

pub(super) const STEPS: [Between; 11] = [
    Between::Nothing,
    Between::Nothing,
    Between::OtherRate,
    Between::Clipped(1.0),
    Between::Again,
    Between::Nothing,
    Between::Partial,
    Between::Nothing,
    Between::Clipped(0.5),
    Between::Nothing,
    Between::Nothing,
];

/// Begins the updates of all units, and waits until they are made; how many there were.
fn begin(rt: &Runtime, updates: &[UnitUpdate], hypers: &[StepHyper]) -> usize {
    let begun = updates.iter().filter(|update| rt.update_speculatively(update, hypers, 0).unwrap()).count();
    let shared = rt.shared().unwrap();
    let streams = |unit: UnitId| shared.streams_ahead(unit);
    let left = |unit: UnitId| shared.speculations[unit.index()].lock().as_ref().is_some_and(|s| !s.done());
    while (0..UNITS).map(UnitId).any(|unit| !streams(unit) && left(unit)) {
        sleep(Duration::from_millis(1));
    }
    // Of what streams the step finds all made, or some of it under way.
    if begun > 0 && (0..UNITS).map(UnitId).any(streams) {
        static TIMES: AtomicU64 = AtomicU64::new(0);
        sleep(Duration::from_millis(TIMES.fetch_add(1, Ordering::Relaxed) % 3 * 10));
    }
    begun
}

/// The gradients of a backward are exchanged, or come of one process.
pub(super) fn backward(rt: &Runtime, rank: Option<usize>, number: u64) {
    if rank.is_some() {
        for unit in (0..UNITS).map(UnitId) {
            rt.post_gradients(unit, number, &[1, 1]).unwrap();
            rt.await_gradients(unit, number, &mut never).unwrap();
        }
    }
    gradients(rt, rank, number);
    if rank.is_some() {
        rt.await_landed(number, &mut never).unwrap();
    }
}

fn updates(number: u64) -> Vec<UnitUpdate> {
    (0..UNITS).map(|unit| UnitUpdate { speculated: true, ..whole(unit, number == 1) }).collect()
}

/// A step, for which updates were begun or not; how many were.
pub(super) fn take(rt: &Runtime, rank: Option<usize>, number: u64, between: Between, ahead: bool) -> usize {
    backward(rt, rank, 2 * number);
    let (mut updates, mut hypers) = (updates(number), [hyper(0.1, number)]);
    let begun = if ahead { begin(rt, &updates, &hypers) } else { 0 };
    match between {
        Between::Nothing => {}
        Between::OtherRate => hypers = [hyper(0.2, number)],
        Between::Clipped(factor) => {
            // SAFETY: the number lives until the copy is over, which is at once on this device.
            hypers[0].clip = Some(unsafe { rt.factor(std::ptr::from_ref(&factor) as u64, 0) }.unwrap());
        }
        Between::Again => backward(rt, rank, 2 * number + 1),
        Between::Partial => updates.iter_mut().for_each(|update| update.spans.truncate(1)),
    }
    // SAFETY: there are no residents.
    unsafe { rt.update(&updates, &hypers, &[], 0, false, &mut never) }.unwrap();
    begun
}

pub(super) fn used(rt: &Runtime) -> u64 {
    rt.stats().unwrap().speculations().0
}

/// What one process has after each of [`STEPS`].
pub(super) fn of_one() -> Vec<Vec<Vec<u8>>> {
    let alone = open(POLICY, None).unwrap();
    let one = |(number, between)| {
        take(&alone, None, number, between, false);
        contents(&alone)
    };
    (1..).zip(STEPS).map(one).collect()
}

#[test]
fn what_ranks_begin_ahead_or_not_gives_the_bits_of_one() {
    let expected = of_one();
    // All ranks begin ahead, or none, or some of them in some steps; states come with their weights, or follow, in place or not.
    let cases = [(2, 3_usize), (2, 0), (2, 1), (3, 2), (3, 5), (8, 0xff)];
    let all = cases.map(|case| (case, SPARE.to_owned()));
    let trail = cases.map(|case| (case, trailing(SPARE, 2)));
    for ((size, which), policy) in all.into_iter().chain(trail).chain([((2, 0), trailing(IN_PLACE, 2))]) {
        let all = together_by(&policy, size);
        for rt in &all {
            assert!(rt.set_update_on(if which == 3 { UpdateOn::Cpu } else { UpdateOn::Halves }).unwrap());
        }
        let barrier = Barrier::new(size);
        scope(|scope| {
            for (rank, rt) in all.iter().enumerate() {
                let (barrier, expected) = (&barrier, &expected);
                scope.spawn(move || {
                    for ((number, between), expected) in (1..).zip(STEPS).zip(expected) {
                        let ahead = which >> ((rank + number as usize) % size) & 1 == 1;
                        let (before, owns) = (used(rt), rt.owned(UnitId(0), rank).unwrap());
                        let begun = take(rt, Some(rank), number, between, ahead);
                        let same = contents(rt) == *expected;
                        assert!(same, "{size} ranks, {which:b}: rank {rank} after step {number}, {between:?}");
                        let taken = matches!(between, Between::Nothing | Between::Clipped(1.0));
                        assert_eq!(used(rt) - before, if taken { begun as u64 } else { 0 }, "step {number}");
                        // Later it may have learned from clipping that it does not pay.
                        let sure = ahead && number < 9 && owns.iter().any(|(_, part)| !part.is_empty());
                        assert!(begun == if sure { UNITS as usize } else { begun }, "step {number}: {begun}");
                        barrier.wait();
                    }
                });
            }
        });
        let first: Vec<u64> = all.iter().map(|rt| rt.stats().unwrap().speculations().2).collect();
        let follows = policy.contains("states:");
        assert!(first.iter().all(|&units| follows == (units > 0)), "{size} ranks, {which:b}: {first:?}");
    }
}

#[test]
fn weights_are_there_before_states_that_follow() {
    for policy in [SPARE, IN_PLACE] {
        let all = together_by(&trailing(policy, 150), 2);
        scope(|scope| {
            for (rank, rt) in all.iter().enumerate() {
                scope.spawn(move || take(rt, Some(rank), 1, Between::Clipped(0.5), false));
            }
        });
        let unit = UnitId(UNITS - 1);
        for rt in &all {
            rt.settle(unit, 0, &mut never).unwrap();
            assert!(rt.update_unmade(UnitId(0)).unwrap(), "its states are not there yet");
        }
        let (weights, states) = (look(&all[0]), places(&all[0]));
        assert!(contents(&all[0]) == contents(&all[1]) && look(&all[0]) == weights);
        assert_eq!(places(&all[0]) != states, policy == SPARE, "states change places when all of them are made");
    }
}

#[test]
fn gradients_wait_for_states_that_follow() {
    let steps = |rt: &Runtime, rank| {
        for number in 1..=3 {
            take(rt, rank, number, Between::Clipped(0.5), false);
        }
    };
    let alone = open(POLICY, None).unwrap();
    steps(&alone, None);
    let expected = contents(&alone);
    for policy in [SPARE, IN_PLACE] {
        let all = together_by(&trailing(policy, 30), 2);
        scope(|scope| all.iter().enumerate().for_each(|(rank, rt)| drop(scope.spawn(move || steps(rt, Some(rank))))));
        assert!(all.iter().all(|rt| contents(rt) == expected));
    }
}

#[test]
fn states_follow_while_an_update_waits_for_another_rank() {
    let all = together_by(&trailing(SPARE, 100), 2);
    let one = |rt: &Runtime, unit: u32, number: u64| {
        // SAFETY: there are no residents.
        unsafe { rt.update(&[whole(unit, true)], &[hyper(0.1, number)], &[], 0, false, &mut never) }.unwrap();
    };
    for rt in &all {
        gradients(rt, None, 1);
        one(rt, 0, 1);
    }
    // Rank 1 is not there yet: it looks at the states of rank 0 first.
    one(&all[0], 1, 2);
    let since = std::time::Instant::now();
    let mut late = || since.elapsed() > Duration::from_secs(20);
    all[1].settle_update(UnitId(0), 0, &mut late).unwrap();
    all[0].settle_update(UnitId(0), 0, &mut late).unwrap();
    one(&all[1], 1, 2);
    assert!(contents(&all[0]) == contents(&all[1]));
}

#[test]
fn who_closes_makes_its_states_for_the_others() {
    let mut all = together_by(&trailing(SPARE, 20), 2);
    for rt in &all {
        gradients(rt, None, 1);
        // SAFETY: there are no residents.
        unsafe { rt.update(&updates(1), &[hyper(0.1, 1)], &[], 0, false, &mut never) }.unwrap();
    }
    all[0].settle(UnitId(0), 0, &mut never).unwrap();
    all[1].close();
    contents(&all[0]);
}

#[test]
fn what_is_begun_ahead_is_seen_when_all_have_taken_the_step() {
    let all = together_by(SPARE, 2);
    let seen = || all.iter().map(|rt| (look(rt), places(rt))).collect::<Vec<_>>();
    let mut before = Vec::new();
    for number in 1..=3 {
        scope(|scope| {
            for (rank, rt) in all.iter().enumerate() {
                scope.spawn(move || backward(rt, Some(rank), number));
            }
        });
        let asked: Vec<_> = all.iter().map(contents).collect();
        before = seen();
        let hypers = [hyper(0.1, number)];
        for rt in &all {
            assert_eq!(begin(rt, &updates(number), &hypers), UNITS as usize);
        }
        assert!(seen() == before, "before any rank takes step {number}");
        // SAFETY: there are no residents.
        unsafe { all[0].update(&updates(number), &hypers, &[], 0, false, &mut never) }.unwrap();
        sleep(Duration::from_millis(50));
        assert!(seen() == before, "before rank 1 takes step {number}");
        // SAFETY: there are no residents.
        unsafe { all[1].update(&updates(number), &hypers, &[], 0, false, &mut never) }.unwrap();
        assert!(contents(&all[0]) == contents(&all[1]) && contents(&all[0]) != asked[0]);
        assert!(places(&all[0]) == places(&all[1]) && places(&all[0]) != before[0].1, "states change places");
    }
    assert!(seen() != before);
}

#[test]
fn second_places_are_there_once_and_within_the_budget() {
    let bytes = |policy: &str, size| {
        let all = together_by(policy, size);
        let (plan, layout) = (all[0].placement().unwrap(), all[0].layout().unwrap());
        let units: Vec<UnitId> = layout.ids().filter(|unit| plan.spare[unit.index()]).collect();
        let spare: u64 = units.iter().map(|&unit| spare_bytes(layout.unit(unit), plan.homes[unit.index()]).0).sum();
        assert!(
            all.iter().all(|rt| rt.homes().unwrap().spare.len() as u64 == all[0].homes().unwrap().spare.len() as u64)
        );
        let file = all[0].shared().unwrap().ranks.as_ref().unwrap().file.size();
        (units.len(), spare, plan.host_bytes, file)
    };
    let small = SPARE.replace("16MiB\", \"where", "400KiB\", \"where");
    for size in [2, 8] {
        let (none, some, all) = (
            bytes(&SPARE.replace("\"spare\": \"16MiB\"", "\"spare\": \"0B\""), size),
            bytes(&small, size),
            bytes(SPARE, size),
        );
        assert_eq!((none.0, some.0, all.0), (0, 1, UNITS as usize));
        assert_eq!((some.2 - none.2, all.2 - none.2), (some.1, all.1), "{size} ranks plan with them once");
        assert!(all.3 - none.3 >= all.1 && all.3 - none.3 < 2 * all.1 + (4 << 20), "{size} ranks: {all:?} {none:?}");
    }
}

/// Which of two places the states of each unit are in.
fn places(rt: &Runtime) -> Vec<usize> {
    (0..UNITS).map(|unit| rt.homes().unwrap().unit(UnitId(unit)).index(Set::Current)).collect()
}

#[test]
fn a_step_that_others_take_otherwise_makes_nothing_of_what_was_begun() {
    let all = together_by(SPARE, 2);
    for rt in &all {
        gradients(rt, None, 1);
        begin(rt, &updates(1), &[hyper(0.1, 1)]);
    }
    let before: Vec<_> = all.iter().map(|rt| (look(rt), places(rt))).collect();
    scope(|scope| {
        for (rank, rt) in all.iter().enumerate() {
            let hypers = [hyper(if rank == 0 { 0.1 } else { 0.2 }, 1)];
            // SAFETY: there are no residents. Who comes last may be told at once.
            scope.spawn(move || drop(unsafe { rt.update(&updates(1), &hypers, &[], 0, false, &mut never) }));
        }
    });
    for rt in &all {
        let error = rt.settle_all(&mut never).unwrap_err();
        assert!(matches!(error.code(), Code::RanksDiffer | Code::PeerLost), "{error}");
    }
    assert!(all.iter().map(|rt| (look(rt), places(rt))).collect::<Vec<_>>() == before);
}
