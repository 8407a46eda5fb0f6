//! Several runtimes of one process as the ranks of one run, over one file.
#![expect(unsafe_code, reason = "hands buffers of its own to the runtime, and looks at homes")]
#![expect(clippy::unwrap_used, reason = "tests")]

use std::{
    process::Command,
    sync::{
        Barrier,
        atomic::{AtomicBool, Ordering},
    },
    thread::{scope, sleep},
    time::{Duration, Instant},
};

use super::spec::RankSpec;
use crate::{
    device::PAST_ALL,
    dtype::{DType, StateKind},
    error::{Code, Result},
    io::Direction,
    machine::began,
    model::{Layout, ParamSpec, UnitSpec},
    optim::{AdamWOptions, Hyper},
    policy::Policy,
    quantities::{ByteCount, UnitId},
    runtime::{JobSpan, Runtime, StepHyper, UnitUpdate},
    schedule::ranks::{
        board::{AT_EXCHANGE, Board},
        posts::{Line, Look},
    },
};

/// A section of four blocks, the last one short, and one that is smaller than a block.
pub(super) const SIZES: [u64; 2] = [3 * 8192 + 128, 256];
pub(super) const UNITS: u32 = 3;

pub(super) fn never() -> bool {
    false
}

fn layout() -> Layout {
    let param = |unit: u32, index: usize, dtype| ParamSpec {
        name: format!("{unit}.{index}"),
        numel: SIZES[index],
        dtype,
        trainable: true,
    };
    let unit = |unit| UnitSpec {
        name: format!("unit {unit}"),
        params: vec![param(unit, 0, DType::F32), param(unit, 1, DType::Bf16)],
    };
    Layout::new(&(0..UNITS).map(unit).collect::<Vec<_>>()).unwrap()
}

pub(super) fn open(policy: &str, ranks: Option<RankSpec>) -> Result<Runtime> {
    Runtime::open(layout(), &Policy::from_json_str(policy, "test").unwrap(), ByteCount(0), ranks)
}

pub(super) const POLICY: &str = r#"{"device": "host", "budget": {"host": "64MiB", "hbm": "256KiB", "threads": 1}}"#;

/// The runtimes of a run, rank 0 first.
fn together(size: usize) -> Vec<Runtime> {
    together_by(POLICY, size)
}

pub(super) fn together_by(policy: &str, size: usize) -> Vec<Runtime> {
    let first = open(policy, Some(RankSpec { rank: 0, size, file: None, grows: None })).unwrap();
    let (policy, file) = (first.concrete_policy().unwrap(), first.shared_file().unwrap());
    let mut all = vec![first];
    all.extend(
        (1..size).map(|rank| open(&policy, Some(RankSpec { rank, size, file: Some(file), grows: None })).unwrap()),
    );
    let digests: Vec<u64> = all.iter().map(|rt| rt.plan_digest().unwrap()).collect();
    assert!(digests.iter().all(|digest| *digest == digests[0]));
    all
}

pub(super) fn hyper(lr: f64, step: u64) -> StepHyper {
    let options = AdamWOptions { lr, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1, maximize: false };
    StepHyper { hyper: Hyper::new(&options, step, 1.0), clip: None }
}

pub(super) fn whole(unit: u32, first: bool) -> UnitUpdate {
    let span = |section| JobSpan { section, start: 0, len: SIZES[section], hyper: 0, reset_master: first };
    UnitUpdate { unit: UnitId(unit), spans: vec![span(0), span(1)], speculated: false }
}

fn step(rt: &Runtime, number: u64, lr: f64) -> Result<()> {
    let updates: Vec<UnitUpdate> = (0..UNITS).map(|unit| whole(unit, number == 1)).collect();
    // SAFETY: there are no residents.
    unsafe { rt.update(&updates, &[hyper(lr, number)], &[], 0, false, &mut never) }
}

/// Bytes that tell where they are, and which step they are for.
pub(super) fn made_up(unit: u32, section: usize, step: u64, bytes: u64) -> Vec<u8> {
    // The high byte of a number stays small.
    let byte = |at: u64| (at.wrapping_mul(0x9e37_79b9) >> 7).wrapping_add(u64::from(unit) * 31 + step * 7) as u8 & 0x3b;
    (0..bytes).map(|at| byte(at + section as u64 * 77)).collect()
}

/// Sends the slices that a rank owns of the gradients of a step, or all of them.
pub(super) fn gradients(rt: &Runtime, owner: Option<usize>, step: u64) {
    let mut sent = Vec::new();
    for unit in (0..UNITS).map(UnitId) {
        let sections = &rt.layout().unwrap().unit(unit).sections;
        let parts = match owner {
            None => (0..2).map(|section| (section, 0..sections[section].elems)).collect(),
            Some(rank) => rt.owned(unit, rank).unwrap(),
        };
        for (section, part) in parts {
            let (size, offset) = (sections[section].dtype.size() as u64, sections[section].offset);
            let all = made_up(unit.0, section, step, sections[section].elems * size);
            let slice = all[(part.start * size) as usize..(part.end * size) as usize].to_vec();
            let at = offset + part.start * size;
            if !slice.is_empty() {
                // SAFETY: the slice lives until all copies have landed.
                unsafe { rt.gradient(unit, (at, true), slice.as_ptr() as u64, slice.len() as u64, 0, &mut never) }
                    .unwrap();
            }
            sent.push(slice);
        }
        if owner.is_some() {
            rt.gradients_sent(unit, step).unwrap();
        }
    }
    rt.wait_gradients(0, &mut never).unwrap();
}

/// One step of one rank, as the wrapper takes it.
fn train(rt: &Runtime, rank: usize, number: u64) {
    for unit in (0..UNITS).rev().map(UnitId) {
        rt.post_gradients(unit, number, &[rank as u8 + 1, number as u8]).unwrap();
        let posted = rt.await_gradients(unit, number, &mut never).unwrap();
        let expected: Vec<Vec<u8>> = (0..posted.len()).map(|rank| vec![rank as u8 + 1, number as u8]).collect();
        assert_eq!(posted, expected);
        assert_eq!(rt.posted_gradients(unit, number).unwrap(), Some(expected));
    }
    gradients(rt, Some(rank), number);
    rt.await_landed(number, &mut never).unwrap();
    assert_eq!(rt.at_step(number, &mut never).unwrap(), None);
    step(rt, number, 0.1).unwrap();
}

/// All bytes of the model's parameters, gradients and states, in host memory or on NVMe.
pub(super) fn contents(rt: &Runtime) -> Vec<Vec<u8>> {
    rt.settle_all(&mut never).unwrap();
    let (layout, homes) = (rt.layout().unwrap(), rt.homes().unwrap());
    let mut all = Vec::new();
    for unit in layout.ids() {
        for (index, section) in layout.unit(unit).sections.iter().enumerate() {
            for kind in [StateKind::Param, StateKind::Grad].into_iter().chain(StateKind::OPTIMIZER) {
                let (at, len) = (homes.address(unit, index, section.offset, kind), section.bytes(kind));
                if len > 0 && at == 0 {
                    let (place, mut bytes) = ((unit, index, kind), vec![0; len as usize]);
                    // SAFETY: the buffer has room for all elements.
                    unsafe { rt.state_io(place, 0..section.elems, bytes.as_mut_ptr(), Direction::Read, &mut never) }
                        .unwrap();
                    all.push(bytes);
                } else if len > 0 {
                    // SAFETY: a home of that many bytes, which nothing writes now.
                    all.push(unsafe { std::slice::from_raw_parts(at as *const u8, len as usize) }.to_vec());
                }
            }
        }
    }
    all
}

#[test]
fn several_ranks_make_the_bits_of_one() {
    let alone = open(POLICY, None).unwrap();
    for number in 1..=3 {
        gradients(&alone, None, number);
        step(&alone, number, 0.1).unwrap();
        alone.settle_all(&mut never).unwrap();
    }
    let expected = contents(&alone);
    assert!(expected[0].iter().any(|byte| *byte != 0));
    for size in [2, 3, 8] {
        let all = together(size);
        scope(|scope| {
            for (rank, rt) in all.iter().enumerate() {
                scope.spawn(move || (1..=3).for_each(|number| train(rt, rank, number)));
            }
        });
        for rt in &all {
            assert!(contents(rt) == expected, "{size} ranks");
        }
    }
}

#[test]
fn no_rank_sees_a_step_before_all_take_it_and_a_slow_one_is_waited_for() {
    let all = together(2);
    let early = AtomicBool::new(true);
    let before = look(&all[1]);
    scope(|scope| {
        scope.spawn(|| {
            gradients(&all[0], None, 1);
            step(&all[0], 1, 0.1).unwrap();
            // Longer than a wait without events lasts in tests.
            all[0].settle(UnitId(1), 0, &mut never).unwrap();
            assert!(!early.load(Ordering::Acquire), "the other rank has not taken its step");
        });
        sleep(Duration::from_millis(1500));
        let same = look(&all[1]) == before;
        early.store(false, Ordering::Release);
        step(&all[1], 1, 0.1).unwrap();
        assert!(same, "half a step is there");
    });
    assert!(contents(&all[0]) == contents(&all[1]));
}

/// The parameters as they lie in memory now.
pub(super) fn look(rt: &Runtime) -> Vec<u8> {
    let homes = rt.homes().unwrap();
    // SAFETY: memory of the runtime; atomic enough for a test that compares bytes which nothing should write.
    unsafe { std::slice::from_raw_parts(homes.params.as_ptr(), homes.params.len()) }.to_vec()
}

#[test]
fn a_rank_that_waits_can_be_interrupted_and_goes_on() {
    let all = together(2);
    step(&all[0], 1, 0.1).unwrap();
    let error = all[0].settle(UnitId(0), 0, &mut || true).unwrap_err();
    assert_eq!(error.code(), Code::Interrupted);
    let error = all[0].meet("a place", false, &mut || true).unwrap_err();
    assert!(error.code() == Code::Interrupted && error.message().contains("rank 1"), "{error}");
    step(&all[1], 1, 0.1).unwrap();
    assert!(contents(&all[0]) == contents(&all[1]));
}

#[test]
fn another_learning_rate_is_named_and_nothing_of_the_step_is_made() {
    let all = together(3);
    let before = look(&all[0]);
    scope(|scope| {
        for (rank, rt) in all.iter().enumerate() {
            // Who comes last may be told at once.
            scope.spawn(move || drop(step(rt, 1, if rank == 2 { 0.2 } else { 0.1 })));
        }
    });
    for (rank, rt) in all.iter().enumerate() {
        let error = rt.settle_all(&mut never).unwrap_err();
        assert!(matches!(error.code(), Code::RanksDiffer | Code::PeerLost), "{error}");
        assert!(error.message().contains("hyperparameters") && error.message().contains('2'), "rank {rank}: {error}");
    }
    assert!(look(&all[0]) == before);
}

#[test]
fn a_step_of_other_units_and_an_edit_of_one_rank_are_named() {
    for (updates, part) in
        [(vec![whole(0, false)], "the units"), ((0..UNITS).map(|unit| whole(unit, unit == 1)).collect(), "were edited")]
    {
        let all = together(2);
        // SAFETY: there are no residents.
        unsafe { all[1].update(&updates, &[hyper(0.1, 2)], &[], 0, false, &mut never) }.unwrap();
        drop(step(&all[0], 2, 0.1));
        let error = all[1].settle_all(&mut never).unwrap_err();
        assert!(error.message().contains(part), "{error}");
    }
}

#[test]
fn another_model_or_policy_is_refused_and_rank_0_is_told() {
    let first = open(POLICY, Some(RankSpec { rank: 0, size: 2, file: None, grows: None })).unwrap();
    let (policy, file) = (first.concrete_policy().unwrap(), first.shared_file().unwrap());
    let second = RankSpec { rank: 1, size: 2, file: Some(file), grows: None };
    let other = policy.replace(r#""poison":false"#, r#""poison":true"#);
    assert_ne!(other, policy);
    let error = open(&other, Some(second)).err().expect("another policy");
    assert!(error.code() == Code::RanksUnlike && error.message().contains("another policy"), "{error}");
    let error = first.meet("offload", false, &mut never).unwrap_err();
    assert!(error.code() == Code::PeerLost && error.message().contains("another policy"), "{error}");
    let first = open(POLICY, Some(RankSpec { rank: 0, size: 2, file: None, grows: None })).unwrap();
    let second = RankSpec { file: Some(first.shared_file().unwrap()), ..second };
    let mut units = layout();
    units.units[1].params[0].name = "other".to_owned();
    let parsed = Policy::from_json_str(&first.concrete_policy().unwrap(), "test").unwrap();
    let error = Runtime::open(units, &parsed, ByteCount(0), Some(second)).err().expect("another model");
    assert!(error.code() == Code::RanksUnlike && error.message().contains("another model"), "{error}");
    for wrong in [RankSpec { size: 3, ..second }, RankSpec { file: Some(0), ..second }] {
        let error = open(POLICY, Some(wrong)).err().expect("not what rank 0 shares");
        assert_eq!(error.code(), Code::Argument);
    }
}

#[test]
fn what_ranks_cannot_do_yet_is_refused() {
    let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR").to_owned() + "/target").unwrap();
    let nvme = format!(
        r#"{{"device": "host", "budget": {{"host": "64MiB"}}, "nvme": {{"paths": [{:?}]}}, "optimizer": {{"tier": "nvme"}}}}"#,
        dir.path()
    );
    let (params, grads) = (nvme.replace("optimizer", "params"), nvme.replace("optimizer", "gradients"));
    let hbm = r#"{"device": "host", "budget": {"host": "64MiB"}, "optimizer": {"tier": "hbm"}}"#;
    for policy in [&*params, &grads, hbm] {
        let error = open(policy, Some(RankSpec { rank: 0, size: 2, file: None, grows: None })).err().expect("refused");
        assert_eq!(error.code(), Code::RanksUnsupported, "{error}");
    }
}

#[test]
fn a_rank_that_closes_is_named_by_who_needs_it_and_only_by_them() {
    let mut all = together(3);
    scope(|scope| {
        for rt in &all {
            scope.spawn(move || {
                rt.meet("the start", false, &mut never).unwrap();
                step(rt, 1, 0.1).unwrap();
                rt.settle_all(&mut never).unwrap();
            });
        }
    });
    all[2].close();
    sleep(Duration::from_millis(300));
    // What needs no other rank goes on.
    contents(&all[0]);
    let error = all[0].meet("a save", false, &mut never).unwrap_err();
    assert!(error.code() == Code::PeerLost && error.message().contains("rank 2"), "{error}");
    step(&all[0], 2, 0.1).unwrap();
    step(&all[1], 2, 0.1).unwrap();
    let error = all[1].settle_all(&mut never).unwrap_err();
    assert!(error.code() == Code::PeerLost && error.message().contains("closed its model"), "{error}");
}

#[test]
fn who_closes_makes_its_part_of_what_all_have_asked_for() {
    for _ in 0..5 {
        let mut all = together(2);
        step(&all[0], 1, 0.1).unwrap();
        step(&all[1], 1, 0.1).unwrap();
        let quiet = all[0].shared().unwrap().ranks.clone().unwrap();
        while quiet.posts().look(Line::Quiet, 1) != Look::All {
            sleep(Duration::from_millis(1));
        }
        all[1].close();
        contents(&all[0]);
    }
}

#[test]
fn closing_waits_for_nobody() {
    let mut all = together(2);
    step(&all[0], 1, 0.1).unwrap();
    sleep(Duration::from_millis(100));
    all[0].close();
}

#[test]
fn a_failure_of_one_rank_is_told_by_the_others() {
    let all = together(3);
    all[1].tell("backward of unit 2").unwrap();
    assert!(all[0].look_at_ranks(true).is_ok());
    all[1].give_up("a disk broke.", false).unwrap();
    assert_eq!(all[1].meet("a place", false, &mut never).unwrap_err().code(), Code::RankFailed);
    assert!(all[0].look_at_ranks(true).is_err());
    for rt in [&all[0], &all[2]] {
        let error = rt.meet("a place", false, &mut never).unwrap_err();
        assert!(error.code() == Code::PeerLost && error.message().contains("a disk broke"), "{error}");
        assert!(error.message().contains("rank 1") && !error.message().contains("rank 1 (process 1)"), "{error}");
    }
    // It is told once, not as a failure of who has told it.
    let told = all[0].shared().unwrap().ranks.as_ref().unwrap().posts().said(2).unwrap();
    assert_eq!(told.matches("failed").count(), 1, "{told}");
}

#[test]
fn a_device_that_waits_for_long_goes_on() {
    let all = together(3);
    let ranks = all[0].shared().unwrap().ranks.clone().unwrap();
    let word = |rank| Board::of_rank(rank, AT_EXCHANGE);
    // Rank 2 has come there, and rank 1 has not.
    ranks.words.store(word(2), 7);
    let began = Instant::now();
    ranks.words.store(word(0), 7);
    while ranks.words.load(word(1)) == 0 {
        assert!(began.elapsed() < Duration::from_secs(20), "the device waits for rank 1");
        sleep(Duration::from_millis(1));
    }
    assert!(began.elapsed() >= Duration::from_millis(80), "it was not waited for");
    assert_eq!([0, 1, 2].map(|rank| ranks.words.load(word(rank))), [7, PAST_ALL, 7]);
}

#[test]
fn no_device_waits_for_a_rank_that_has_failed() {
    let all = together(2);
    let ranks = all[0].shared().unwrap().ranks.clone().unwrap();
    let word = Board::of_rank(1, AT_EXCHANGE);
    assert_eq!(ranks.words.load(word), 0);
    all[1].give_up("a disk broke.", false).unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    // What its device had still to store comes later.
    for late in 0..3 {
        ranks.words.store(word, late);
        // As devices compare.
        while ranks.words.load(word).wrapping_sub(1000).cast_signed() < 0 {
            assert!(Instant::now() < end, "a device waits for rank 1");
            sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn a_killed_process_is_named_with_its_place() {
    let all = together(2);
    all[1].tell("forward of unit 0").unwrap();
    let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
    all[1].shared().unwrap().ranks.as_ref().unwrap().posts().enter(child.id(), began(child.id()).unwrap());
    sleep(Duration::from_millis(400));
    assert!(!all[0].failed().unwrap());
    step(&all[0], 1, 0.1).unwrap();
    child.kill().unwrap();
    let error = all[0].settle_all(&mut never).unwrap_err();
    assert!(error.code() == Code::PeerLost && error.message().contains("forward of unit 0"), "{error}");
    assert!(error.message().contains(&child.id().to_string()), "{error}");
    child.wait().unwrap();
}

#[test]
fn ranks_meet_at_one_place_and_are_named_at_two() {
    let all = together(2);
    let barrier = Barrier::new(2);
    scope(|scope| {
        for (rank, rt) in all.iter().enumerate() {
            let barrier = &barrier;
            scope.spawn(move || {
                (0..50).for_each(|turn| rt.meet(&format!("place {turn}"), false, &mut never).unwrap());
                barrier.wait();
                let error = rt.meet(["a save", "a load"][rank], false, &mut never).unwrap_err();
                assert!(error.code() == Code::RanksCrossed && error.message().contains("a load"), "{error}");
            });
        }
    });
}

#[test]
fn a_rank_with_fewer_backwards_joins() {
    let all = together(2);
    let post = |rt: &Runtime, backward, note| {
        (0..UNITS).for_each(|unit| rt.post_gradients(UnitId(unit), backward, &[note, note]).unwrap());
        let wait = |unit| rt.await_gradients(UnitId(unit), backward, &mut never).unwrap();
        (0..UNITS).map(wait).collect::<Vec<_>>()
    };
    scope(|scope| {
        scope.spawn(|| {
            post(&all[0], 1, 1);
            post(&all[0], 2, 1);
            assert_eq!(all[0].at_step(2, &mut never).unwrap(), None);
            step(&all[0], 1, 0.1).unwrap();
        });
        post(&all[1], 1, 1);
        assert_eq!(all[1].at_step(1, &mut never).unwrap(), Some(2));
        assert_eq!(post(&all[1], 2, 0), vec![vec![vec![1, 1], vec![0, 0]]; UNITS as usize]);
        assert_eq!(all[1].at_step(2, &mut never).unwrap(), None);
        step(&all[1], 1, 0.1).unwrap();
    });
    assert!(contents(&all[0]) == contents(&all[1]));
}

#[test]
fn calls_out_of_turn_are_refused() {
    let all = together(2);
    let refused = |result: Result<()>| assert_eq!(result.unwrap_err().code(), Code::Argument);
    refused(all[0].post_gradients(UnitId(0), 0, &[0, 0]));
    refused(all[0].post_gradients(UnitId(0), 1, &[0]));
    refused(all[0].posted_gradients(UnitId(0), 1).map(drop));
    refused(all[0].gradients_sent(UnitId(0), 1));
    all[0].post_gradients(UnitId(0), 1, &[0, 1]).unwrap();
    refused(all[0].post_gradients(UnitId(0), 1, &[0, 1]));
    refused(all[0].post_gradients(UnitId(0), 2, &[0, 1]));
    assert_eq!(all[0].posted_gradients(UnitId(0), 1).unwrap(), None);
    all[1].post_gradients(UnitId(0), 2, &[0, 1]).unwrap();
    let error = all[0].posted_gradients(UnitId(0), 1).unwrap_err();
    assert!(error.code() == Code::RanksDiffer && error.message().contains("backward"), "{error}");
    refused(all[0].owned(UnitId(0), 2).map(drop));
    let alone = open(POLICY, None).unwrap();
    refused(alone.meet("a place", false, &mut never));
    refused(alone.shared_file().map(drop));
}
