//! Several ranks whose states live on NVMe, in files that all have open: the bits are those of one process with states in host memory.
#![expect(unsafe_code, reason = "hands buffers of its own to the runtime")]
#![expect(clippy::unwrap_used, reason = "tests")]

use std::{
    path::Path,
    sync::Barrier,
    thread::{scope, sleep},
    time::Duration,
};

use tempfile::TempDir;

use super::{
    ahead_tests::{STEPS, backward, of_one, take, used},
    tests::{POLICY, SIZES, UNITS, contents, gradients, hyper, never, open, together_by, whole},
};
use crate::{
    dtype::StateKind,
    error::Code,
    io::Direction,
    quantities::{Tier, UnitId},
    runtime::{RankSpec, Runtime, UnitUpdate, measure::stats::Link},
};

pub(super) fn disk() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR").to_owned() + "/target").unwrap()
}

/// States on NVMe, pieces of updates as small as so much host memory makes them.
pub(super) fn policy(disks: &[&Path], host: &str, faults: &str) -> String {
    format!(
        r#"{{"device": "host", "budget": {{"host": {host:?}, "hbm": "256KiB", "threads": 1}}, "nvme": {{"paths": {disks:?}}},
            "optimizer": {{"tier": "nvme"}}, "debug": {{"faults": {faults:?}}}}}"#
    )
}

fn update(rt: &Runtime, number: u64) {
    let updates: Vec<_> = (0..UNITS).map(|unit| whole(unit, number == 1)).collect();
    // SAFETY: there are no residents.
    unsafe { rt.update(&updates, &[hyper(0.1, number)], &[], 0, false, &mut never) }.unwrap();
}

fn moved(rt: &Runtime, link: Link) -> u64 {
    rt.stats().unwrap().flow(link).bytes
}

/// What one process has after each step.
fn alone(steps: u64) -> Vec<Vec<Vec<u8>>> {
    let alone = open(POLICY, None).unwrap();
    let one = |number| {
        gradients(&alone, None, number);
        update(&alone, number);
        contents(&alone)
    };
    (1..=steps).map(one).collect()
}

#[test]
fn states_on_nvme_have_the_bits_of_one_process_in_host_memory() {
    let expected = alone(4);
    let (first, second) = (disk(), disk());
    let both = [first.path(), second.path()];
    // Of the last ones a chunk is wider than a section: one rank owns all of it.
    for (size, disks, host) in
        [(2, &both[..1], "4MiB"), (3, &both[..], "4MiB"), (8, &both[..], "8MiB"), (2, &both[..], "64MiB")]
    {
        let all = together_by(&policy(disks, host, ""), size);
        let barrier = Barrier::new(size);
        scope(|scope| {
            for (rank, rt) in all.iter().enumerate() {
                let (expected, barrier) = (&expected, &barrier);
                scope.spawn(move || {
                    for (number, expected) in (1..).zip(expected) {
                        backward(rt, Some(rank), number);
                        update(rt, number);
                        // Every second step no rank looks at states before the next one.
                        if number % 2 == 0 {
                            assert!(contents(rt) == *expected, "rank {rank} of {size}, step {number}, {host}");
                        }
                        barrier.wait();
                    }
                });
            }
        });
        let owned = |rank: usize| {
            all[rank].owned(UnitId(0), rank).unwrap().iter().map(|(_, part)| part.end - part.start).sum::<u64>()
        };
        let owners = (0..size).filter(|&rank| owned(rank) > 0).count();
        assert_eq!(owners > 1, host != "64MiB", "{size} ranks, {host}");
        for (rank, rt) in all.iter().enumerate() {
            assert_eq!(moved(rt, Link::NvmeWrite) > 0, owned(rank) > 0, "a rank writes its own part");
        }
    }
}

#[test]
fn updates_ahead_into_second_places_there_give_the_bits_of_one() {
    let expected = of_one();
    let dir = disk();
    let spare =
        |host: &str| policy(&[dir.path()], host, "").replace(r#""tier": "nvme""#, r#""tier": "nvme", "spare": "1MiB""#);
    // All ranks begin ahead, or none, or some of them in some steps; one has no part at all.
    for ((size, which), host) in [
        ((2, 3_usize), "6MiB"),
        ((2, 0), "6MiB"),
        ((2, 1), "6MiB"),
        ((3, 5), "8MiB"),
        ((8, 0xff), "8MiB"),
        ((2, 3), "64MiB"),
    ] {
        let all = together_by(&spare(host), size);
        assert!(all.iter().all(|rt| rt.placement().unwrap().spare == [true; UNITS as usize]));
        let barrier = Barrier::new(size);
        scope(|scope| {
            for (rank, rt) in all.iter().enumerate() {
                let (barrier, expected) = (&barrier, &expected);
                scope.spawn(move || {
                    for ((number, between), expected) in (1..).zip(STEPS).zip(expected) {
                        let ahead = which >> ((rank + number as usize) % size) & 1 == 1;
                        take(rt, Some(rank), number, between, ahead);
                        let same = contents(rt) == *expected;
                        assert!(same, "{size} ranks, {which:b}, {host}: rank {rank} after step {number}, {between:?}");
                        barrier.wait();
                    }
                });
            }
        });
        let begun: Vec<u64> = all.iter().map(used).collect();
        assert_eq!(begun.iter().any(|&used| used > 0), which > 0, "{size} ranks, {which:b}, {host}: {begun:?}");
    }
}

#[test]
fn what_is_read_ahead_while_another_rank_writes_is_read_again() {
    let expected = alone(3);
    let dir = disk();
    let damaged = policy(&[dir.path()], "6MiB", "rank 1 read:flip@1x1");
    let all = together_by(&damaged.replace(r#""tier": "nvme""#, r#""tier": "nvme", "spare": "1MiB""#), 2);
    for number in 1..=3 {
        all.iter().for_each(|rt| gradients(rt, None, number));
        let updates: Vec<_> =
            (0..UNITS).map(|unit| UnitUpdate { speculated: true, ..whole(unit, number == 1) }).collect();
        let before = moved(&all[1], Link::NvmeRead);
        for rt in all.iter().filter(|_| number == 2) {
            updates.iter().for_each(|one| assert!(rt.update_speculatively(one, &[hyper(0.1, number)], 0).unwrap()));
        }
        while number == 2 && moved(&all[1], Link::NvmeRead) == before {
            sleep(Duration::from_millis(1));
        }
        sleep(Duration::from_millis(20));
        for rt in &all {
            // SAFETY: there are no residents.
            unsafe { rt.update(&updates, &[hyper(0.1, number)], &[], 0, false, &mut never) }.unwrap();
        }
        all.iter().for_each(|rt| rt.settle_all(&mut never).unwrap());
    }
    // Not before: the first read must be one that was made ahead.
    assert!(all.iter().all(|rt| contents(rt) == expected[2]));
}

#[test]
fn states_are_there_once_and_each_rank_writes_its_part() {
    let dir = disk();
    let bytes: u64 = (0..UNITS).map(|_| SIZES[0] * 8 + SIZES[1] * 10).sum();
    for size in [2, 3] {
        let all = together_by(&policy(&[dir.path()], "4MiB", ""), size);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "one run, of rank 0");
        for rt in &all {
            assert_eq!(rt.placement().unwrap().nvme_bytes, all[0].placement().unwrap().nvme_bytes);
            assert!(rt.placement().unwrap().nvme_bytes - bytes < 64 << 10);
        }
        for number in 1..=2 {
            all.iter().for_each(|rt| gradients(rt, None, number));
            all.iter().for_each(|rt| update(rt, number));
            all.iter().for_each(|rt| rt.settle_all(&mut never).unwrap());
        }
        let written: u64 = all.iter().map(|rt| moved(rt, Link::NvmeWrite)).sum();
        assert!(written >= 2 * bytes && written < 2 * bytes + (128 << 10), "{written} of {}", 2 * bytes);
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left");
}

#[test]
fn a_reader_waits_for_what_another_rank_is_yet_to_write() {
    let expected = alone(1);
    let dir = disk();
    let all = together_by(&policy(&[dir.path()], "4MiB", "rank 1 write:delay=150ms@1x1000"), 2);
    all.iter().for_each(|rt| gradients(rt, None, 1));
    all.iter().for_each(|rt| update(rt, 1));
    let last = UnitId(UNITS - 1);
    all[0].settle(last, 0, &mut never).unwrap();
    let (place, mut bytes) = ((last, 0, StateKind::ExpAvg), vec![0; SIZES[0] as usize * 4]);
    // SAFETY: the buffer has room for all elements.
    unsafe { all[0].state_io(place, 0..SIZES[0], bytes.as_mut_ptr(), Direction::Read, &mut never) }.unwrap();
    assert!(expected[0].contains(&bytes) && contents(&all[0]) == expected[0]);
}

#[test]
fn who_closes_stores_what_others_need() {
    let expected = alone(1);
    let dir = disk();
    let mut all = together_by(&policy(&[dir.path()], "4MiB", "rank 1 write:delay=60ms@1x1000"), 2);
    all.iter().for_each(|rt| gradients(rt, None, 1));
    all.iter().for_each(|rt| update(rt, 1));
    // The weights are there, so that no rank waits for another one but for states.
    (0..UNITS).for_each(|unit| all[1].settle(UnitId(unit), 0, &mut never).unwrap());
    all[1].close();
    assert!(contents(&all[0]) == expected[0]);
}

#[test]
fn a_disk_that_fails_one_rank_is_named_by_all() {
    for (fault, code, word) in [
        ("rank 1 write:eio@2x99", Code::IoFailed, "Input/output error"),
        ("rank 1 write:enospc@1x99", Code::IoFailed, "space"),
        ("rank 1 read:flip@1x9", Code::Corrupted, "checksum"),
        ("rank 0 read:eio@1x99", Code::IoFailed, "Input/output error"),
    ] {
        let dir = disk();
        let all = together_by(&policy(&[dir.path()], "4MiB", fault), 2);
        let guilty = usize::from(fault.starts_with("rank 1"));
        scope(|scope| {
            for (rank, rt) in all.iter().enumerate() {
                scope.spawn(move || {
                    for number in 1..=3 {
                        gradients(rt, None, number);
                        let updates: Vec<_> = (0..UNITS).map(|unit| whole(unit, number == 1)).collect();
                        // SAFETY: there are no residents. Who comes last may be told at once.
                        let said = unsafe { rt.update(&updates, &[hyper(0.1, number)], &[], 0, false, &mut never) };
                        if let Err(error) = said.and_then(|()| rt.settle_all(&mut never)) {
                            let expected = if rank == guilty { code } else { Code::PeerLost };
                            assert!(
                                error.code() == expected && error.to_string().contains(word),
                                "{fault}, rank {rank}: {error}"
                            );
                            return;
                        }
                    }
                    panic!("{fault}: rank {rank} has not been told");
                });
            }
        });
    }
}

#[test]
fn what_the_leader_loads_the_others_update() {
    let (dir, bytes) = (disk(), vec![0x3f; SIZES[0] as usize * 4]);
    let all = together_by(&policy(&[dir.path()], "4MiB", ""), 2);
    let alone = open(POLICY, None).unwrap();
    for rt in [&all[0], &alone] {
        for (kind, elems) in [(StateKind::ExpAvg, 0..SIZES[0]), (StateKind::ExpAvgSq, 100..9000)] {
            let place = (UnitId(1), 0, kind);
            let buffer = bytes.as_ptr().cast_mut();
            // SAFETY: the buffer has the elements, and is read.
            unsafe { rt.state_io(place, elems, buffer, Direction::Write, &mut never) }.unwrap();
        }
    }
    gradients(&alone, None, 1);
    update(&alone, 1);
    all.iter().for_each(|rt| gradients(rt, None, 1));
    all.iter().for_each(|rt| update(rt, 1));
    let expected = contents(&alone);
    assert!(all.iter().all(|rt| contents(rt) == expected));
}

#[test]
fn files_that_cannot_be_opened_are_named_and_rank_0_is_told() {
    let dir = disk();
    let first =
        open(&policy(&[dir.path()], "4MiB", ""), Some(RankSpec { rank: 0, size: 2, file: None, grows: None })).unwrap();
    let (policy, file) = (first.concrete_policy().unwrap(), first.shared_file().unwrap());
    // As where another process has that number.
    let ranks = first.shared().unwrap().ranks.clone().unwrap();
    let posts = ranks.posts();
    let (pid, began) = posts.process(0);
    posts.enter(1, began);
    let error =
        open(&policy, Some(RankSpec { rank: 1, size: 2, file: Some(file), grows: None })).err().expect("no such file");
    posts.enter(u32::try_from(pid).unwrap(), began);
    assert!(error.code() == Code::PathUnusable && error.message().contains("/proc/1/fd/"), "{error}");
    let error = first.meet("offload", false, &mut never).unwrap_err();
    assert!(error.code() == Code::PeerLost && error.message().contains("/proc/1/fd/"), "{error}");
}

#[test]
fn staging_of_all_ranks_is_within_the_budget() {
    let dir = disk();
    for size in [2, 4, 8] {
        let all = together_by(&policy(&[dir.path()], "8MiB", ""), size);
        let plan = all[0].placement().unwrap();
        let staging = u64::from(plan.update_slots.0) * plan.update_slots.1 * size as u64;
        let homes = all[0].homes().unwrap().bytes();
        assert!(all.iter().all(|rt| rt.budgets.nvme_free == all[0].budgets.nvme_free), "what rank 0 has found counts");
        assert!(staging > 0 && homes + staging <= plan.host_bytes && plan.host_bytes <= 8 << 20, "{plan:?}");
        assert!(plan.homes.iter().all(|home| home.optimizer == Tier::Nvme && home.params == Tier::Host));
    }
}
