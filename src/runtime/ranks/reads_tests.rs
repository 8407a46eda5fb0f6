//! Saves that read while all ranks go on: the files hold the state of the call, although the ranks step before it has been read.
#![expect(unsafe_code, reason = "hands buffers of its own to the runtime")]
#![expect(clippy::unwrap_used, reason = "tests")]

use std::{
    path::Path,
    sync::{
        Arc, Barrier,
        atomic::{AtomicBool, Ordering},
    },
    thread::{scope, sleep},
    time::{Duration, Instant},
};

use serde_json::value::RawValue;
use tempfile::TempDir;

use super::{
    ahead_tests::{Between, IN_PLACE, SPARE, take, trailing},
    nvme_tests::{disk, policy},
    states_tests::{growing, risen, step},
    tests::{POLICY, UNITS, contents, never, open, together_by},
};
use crate::{
    checkpoint::{Control, Dtype, Request, TensorSpec},
    dtype::StateKind,
    error::{Code, Error},
    quantities::UnitId,
    runtime::{Place, Runtime, Source, Unchanged},
};

/// What is saved beside the model; it is read first, and whether it was changed is asked then.
static OTHER: [u8; 64] = [7; 64];

/// Keeps saves from reading the model until it is opened.
#[derive(Clone, Default)]
struct Door {
    reached: Arc<AtomicBool>,
    open: Arc<AtomicBool>,
}

impl Door {
    fn wait_here(&self) -> Unchanged {
        let door = self.clone();
        Box::new(move || {
            door.reached.store(true, Ordering::Release);
            let begun = Instant::now();
            while !door.open.load(Ordering::Acquire) {
                if begun.elapsed() > Duration::from_mins(1) {
                    return Err(Error::argument("the door stays shut."));
                }
                sleep(Duration::from_millis(1));
            }
            Ok(())
        })
    }

    fn open(&self) {
        self.open.store(true, Ordering::Release);
    }

    /// Begins a save, and waits until it stands here: a unit that an update waits for would be read before.
    fn save(&self, rt: &Runtime, target: &Path) -> Arc<Control> {
        let control = save(rt, target, self.wait_here());
        while !self.reached.load(Ordering::Acquire) {
            assert!(control.outcome().is_none(), "the save has not come to the door");
            sleep(Duration::from_millis(1));
        }
        control
    }
}

/// Longer than an update takes that does not wait for a save.
fn linger() {
    sleep(Duration::from_millis(200));
}

/// Begins a save of all weights and states.
fn save(rt: &Runtime, target: &Path, unchanged: Unchanged) -> Arc<Control> {
    let memory = Place::Memory { address: OTHER.as_ptr() as u64, on_device: false };
    let mut places = vec![("other".to_owned(), memory, OTHER.len() as u64, false)];
    let layout = rt.layout().unwrap();
    for unit in layout.ids() {
        for (section, packed) in layout.unit(unit).sections.iter().enumerate() {
            for kind in [StateKind::Param].into_iter().chain(StateKind::OPTIMIZER) {
                let name = format!("{unit}.{section}.{}", kind.name());
                let place = Place::Unit { unit, section, start: 0, kind };
                places.push((name, place, packed.bytes(kind), kind != StateKind::Param));
            }
        }
    }
    places.retain(|(.., bytes, _)| *bytes > 0);
    let spec = |(name, _, bytes, optimizer): &(String, Place, u64, bool)| TensorSpec {
        name: name.clone(),
        dtype: Dtype::U8,
        shape: vec![*bytes as usize],
        group: 0,
        optimizer: *optimizer,
    };
    let request = Request {
        target: target.to_owned(),
        overwrite: false,
        keep: None,
        tensors: places.iter().map(spec).collect(),
        aliases: Vec::new(),
        files: Vec::new(),
        training: RawValue::from_string("{}".to_owned()).unwrap(),
        shard: 5 << 30,
    };
    let sources = places.iter().map(|(_, place, ..)| Source { place: *place, master: None }).collect();
    // SAFETY: what lies beside the model lives for ever.
    unsafe { rt.save(request, sources, unchanged, 0, &mut never) }.unwrap()
}

fn ended(control: &Control) {
    control.wait(&mut never).unwrap();
}

/// The bytes of all tensors.
fn files(target: &Path) -> Vec<Vec<u8>> {
    let names = ["model.safetensors", "optimizer.safetensors"];
    names.map(|name| std::fs::read(target.join(name)).unwrap()).to_vec()
}

fn folder() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR").to_owned() + "/target").unwrap()
}

/// Saved after how many steps, and how many there are.
const SAVED: u64 = 3;
const STEPS: u64 = 6;

fn between(number: u64) -> Between {
    if number.is_multiple_of(3) { Between::Clipped(0.5) } else { Between::Nothing }
}

/// What one process saves after those steps, and has at the end.
fn of_one(folder: &Path) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    let (alone, target) = (open(POLICY, None).unwrap(), folder.join("alone"));
    for number in 1..=STEPS {
        take(&alone, None, number, between(number), false);
        if number == SAVED {
            ended(&save(&alone, &target, Box::new(|| Ok(()))));
        }
    }
    (files(&target), contents(&alone))
}

fn unmade(rt: &Runtime) -> bool {
    (0..UNITS).all(|unit| rt.update_unmade(UnitId(unit)).unwrap())
}

#[test]
fn a_save_has_the_state_of_the_call_whatever_ranks_do_beside_it() {
    let (folder, dir) = (folder(), disk());
    let (saved, end) = of_one(folder.path());
    let nvme = policy(&[dir.path()], "8MiB", "");
    let nvme_spare = nvme.replace(r#""tier": "nvme""#, r#""tier": "nvme", "spare": "1MiB""#);
    let slow = |text: &str| nvme.replace(r#""faults": """#, &format!(r#""faults": "{text}""#));
    // In place, with second places, weights first, states on NVMe, and some that are written late.
    let cases = [
        (2, POLICY.to_owned(), false),
        (3, IN_PLACE.to_owned(), false),
        (2, SPARE.to_owned(), true),
        (3, SPARE.to_owned(), true),
        (2, trailing(SPARE, 5), true),
        (3, trailing(IN_PLACE, 20), false),
        (2, nvme.clone(), false),
        (3, nvme_spare.clone(), true),
        (2, nvme_spare, true),
        (2, slow("rank 1 write:delay=20ms@1x1000"), false),
    ];
    for (case, (size, policy, ahead)) in cases.into_iter().enumerate() {
        let all = together_by(&policy, size);
        let (barrier, door, target) = (Barrier::new(size), Door::default(), folder.path().join(format!("case {case}")));
        scope(|scope| {
            for (rank, rt) in all.iter().enumerate() {
                let (barrier, door, target, end) = (&barrier, &door, &target, &end);
                scope.spawn(move || {
                    let steps = |numbers: std::ops::RangeInclusive<u64>| {
                        for number in numbers {
                            take(rt, Some(rank), number, between(number), ahead);
                        }
                    };
                    steps(1..=SAVED);
                    // The update before may be under way.
                    let control = (rank == 0).then(|| door.save(rt, target));
                    steps(SAVED + 1..=SAVED + 1);
                    linger();
                    let waits = unmade(rt);
                    barrier.wait();
                    if let Some(control) = &control {
                        assert!(control.outcome().is_none());
                        door.open();
                    }
                    steps(SAVED + 2..=STEPS);
                    control.iter().for_each(|control| ended(control));
                    assert!(waits, "case {case}: rank {rank} updates what was not read");
                    assert!(contents(rt) == *end, "case {case}: rank {rank} at the end");
                });
            }
        });
        assert!(files(&target) == saved, "case {case}: {size} ranks, {policy}");
    }
}

#[test]
fn states_that_are_up_come_home_before_their_next_update() {
    let folder = folder();
    let alone = open(POLICY, None).unwrap();
    (1..=6).for_each(|number| step(&alone, None, number, 0..UNITS));
    ended(&save(&alone, &folder.path().join("alone"), Box::new(|| Ok(()))));
    let (all, barrier, door) = (growing(), Barrier::new(2), Door::default());
    scope(|scope| {
        for (rank, rt) in all.iter().enumerate() {
            let (barrier, door, target) = (&barrier, &door, folder.path().join("beside"));
            scope.spawn(move || {
                (1..=6).for_each(|number| step(rt, Some(rank), number, 0..UNITS));
                risen(rt);
                assert!(rt.grown().unwrap().up > 0, "nothing moved up");
                barrier.wait();
                let control = (rank == 0).then(|| door.save(rt, &target));
                step(rt, Some(rank), 7, 0..UNITS);
                linger();
                let waits = unmade(rt);
                barrier.wait();
                if let Some(control) = control {
                    door.open();
                    ended(&control);
                }
                step(rt, Some(rank), 8, 0..UNITS);
                rt.settle_all(&mut never).unwrap();
                let up = rt.grown().unwrap().up > 0;
                barrier.wait();
                assert!(waits, "rank {rank} updates what was not read");
                assert!(up, "they have not stayed up");
            });
        }
    });
    assert!(files(&folder.path().join("beside")) == files(&folder.path().join("alone")));
}

/// Two ranks that have taken a step more than a save holds, which stands at the door.
fn held(policy: &str, target: &Path) -> (Vec<Runtime>, Door, Arc<Control>) {
    let (all, door) = (together_by(policy, 2), Door::default());
    let one = |number| {
        scope(|scope| {
            for (rank, rt) in all.iter().enumerate() {
                scope.spawn(move || take(rt, Some(rank), number, Between::Nothing, false));
            }
        });
    };
    one(1);
    let control = door.save(&all[0], target);
    one(2);
    linger();
    (all, door, control)
}

#[test]
fn who_waits_for_a_save_of_another_rank_can_be_interrupted_and_goes_on() {
    let folder = folder();
    let (all, door, control) = held(POLICY, &folder.path().join("saved"));
    for interrupted in [
        all[1].settle(UnitId(0), 0, &mut || true),
        all[1].preserve(UnitId(UNITS - 1), &mut || true),
        all[1].settle_all(&mut || true),
    ] {
        assert_eq!(interrupted.unwrap_err().code(), Code::Interrupted);
    }
    assert!(all.iter().all(unmade));
    door.open();
    all[1].preserve(UnitId(UNITS - 1), &mut never).unwrap();
    assert!(contents(&all[0]) == contents(&all[1]));
    ended(&control);
}

#[test]
fn a_save_that_is_given_up_or_fails_lets_the_others_go_on() {
    let alone = open(POLICY, None).unwrap();
    for number in 1..=3 {
        take(&alone, None, number, Between::Nothing, false);
    }
    let expected = contents(&alone);
    for fails in [false, true] {
        let folder = folder();
        let target = folder.path().join("saved");
        let (all, door, control) = held(POLICY, &target);
        if fails {
            std::fs::create_dir_all(target.join("in the way")).unwrap();
        } else {
            control.cancel();
        }
        door.open();
        scope(|scope| {
            for (rank, rt) in all.iter().enumerate() {
                scope.spawn(move || take(rt, Some(rank), 3, Between::Nothing, false));
            }
        });
        assert!(all.iter().all(|rt| contents(rt) == expected), "fails: {fails}");
        let error = control.wait(&mut never).unwrap_err();
        assert_eq!(error.code() == Code::CheckpointCancelled, !fails, "{error}");
    }
}

#[test]
fn who_waits_for_a_save_learns_that_the_rank_that_saves_has_failed_or_closed() {
    let folder = folder();
    let (all, door, control) = held(POLICY, &folder.path().join("failed"));
    all[0].give_up("a wire broke.", false).unwrap();
    let error = all[1].settle_all(&mut never).unwrap_err();
    assert!(error.code() == Code::PeerLost && error.message().contains("a wire broke."), "{error}");
    door.open();
    assert!(control.wait(&mut never).is_err());
    let (mut all, door, _) = held(POLICY, &folder.path().join("closed"));
    door.open();
    let other = all.pop().unwrap();
    all[0].close();
    // What it had taken part in is made.
    other.settle_all(&mut never).unwrap();
}

#[test]
fn what_another_rank_loads_waits_for_a_save() {
    let folder = folder();
    let all = together_by(POLICY, 2);
    let door = Door::default();
    scope(|scope| {
        for (rank, rt) in all.iter().enumerate() {
            scope.spawn(move || take(rt, Some(rank), 1, Between::Nothing, false));
        }
    });
    all.iter().for_each(|rt| rt.settle_all(&mut never).unwrap());
    ended(&save(&all[0], &folder.path().join("before"), Box::new(|| Ok(()))));
    let control = door.save(&all[0], &folder.path().join("beside"));
    let early = AtomicBool::new(true);
    scope(|scope| {
        scope.spawn(|| {
            super::states_tests::load(&all[1], 0.5);
            assert!(!early.load(Ordering::Acquire), "it was written before it was read");
        });
        linger();
        early.store(false, Ordering::Release);
        door.open();
    });
    ended(&control);
    assert!(files(&folder.path().join("beside")) == files(&folder.path().join("before")));
}
