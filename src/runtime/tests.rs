//! What a runtime does when the disk is late or fails, on the host device with a store of its own.
#![expect(unsafe_code, reason = "hands buffers of its own to the runtime")]
#![expect(clippy::unwrap_used, reason = "tests")]

use std::{thread::sleep, time::Duration};

use super::*;
use crate::{
    device::{self, StreamRef},
    dtype::DType,
    error::Code,
    model::{ParamSpec, UnitSpec},
    optim::{AdamWOptions, Hyper},
    runtime::{
        measure::{
            stats::{Cause, Link},
            step_time,
        },
        setup::start,
    },
    schedule::LaneUse,
};

const ELEMS: u64 = 1024;

fn never() -> bool {
    false
}

fn runtime(dir: &tempfile::TempDir, params: &str, faults: &str) -> Runtime {
    let param = |unit: u32| ParamSpec { name: format!("{unit}.w"), numel: ELEMS, dtype: DType::F32, trainable: true };
    let units: Vec<UnitSpec> =
        (0..3).map(|unit| UnitSpec { name: format!("unit {unit}"), params: vec![param(unit)] }).collect();
    let policy = format!(
        r#"{{"device": "host", "budget": {{"host": "64MiB", "hbm": "16KiB"}}, "params": {{"tier": "{params}"}},
            "optimizer": {{"tier": "nvme"}}, "nvme": {{"paths": [{:?}], "engine": "threads"}}, "debug": {{"faults": "{faults}"}}}}"#,
        dir.path()
    );
    Runtime::open(Layout::new(&units).unwrap(), &Policy::from_json_str(&policy, "test").unwrap(), ByteCount(0), None)
        .unwrap()
}

#[test]
fn without_a_compiler_the_processor_updates_alone_and_says_so() {
    let unit = UnitSpec {
        name: "unit".to_owned(),
        params: vec![ParamSpec { name: "w".to_owned(), numel: ELEMS, dtype: DType::F32, trainable: true }],
    };
    let policy =
        r#"{"device": "host", "budget": {"host": "64MiB"}, "params": {"tier": "host"}, "optimizer": {"where": "gpu"}}"#;
    let policy = Policy::from_json_str(policy, "test").unwrap();
    let rt = Runtime::open(Layout::new(&[unit]).unwrap(), &policy, ByteCount(0), None).unwrap();
    let planned = rt.shared().unwrap().placement.clone();
    assert!(planned.lane_elems > 0 && planned.lane_bytes > 0);
    let open = |wish, code| {
        let (mut plan, mut notes) = (planned.clone(), Vec::new());
        let create = |_: usize, _: u64| Err(Error::new(code, "libnvrtc is not to be found."));
        start::open_share(create, (UpdateOn::Both, wish), &mut plan, &mut notes)
            .map(|share| (share.uses_lanes(), plan, notes))
    };
    let (shares, plan, notes) = open(LaneUse::IfRoom, Code::NoCompiler).unwrap();
    assert!(!shares, "there are no lanes to share with");
    assert_eq!((plan.lane_elems, plan.lane_bytes), (0, 0));
    assert_eq!(plan.hbm_bytes, planned.hbm_bytes - planned.lane_bytes);
    assert_eq!(notes, ["FN-W210 the GPU takes no part in updates: libnvrtc is not to be found."]);
    assert_eq!(open(LaneUse::Always, Code::NoCompiler).unwrap_err().code(), Code::NoCompiler);
    assert_eq!(open(LaneUse::IfRoom, Code::Stale).unwrap_err().code(), Code::Stale);
}

fn disk() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR").to_owned() + "/target").unwrap()
}

fn state(rt: &Runtime, unit: u32, values: &mut [f32], direction: Direction) -> Result<()> {
    let place = (UnitId(unit), 0, StateKind::ExpAvg);
    // SAFETY: the slice has `ELEMS` elements of four bytes.
    unsafe { rt.state_io(place, 0..ELEMS, values.as_mut_ptr().cast(), direction, &mut never) }
}

fn whole(unit: u32) -> UnitUpdate {
    let span = JobSpan { section: 0, start: 0, len: ELEMS, hyper: 0, reset_master: true };
    UnitUpdate { unit: UnitId(unit), spans: vec![span], speculated: false }
}

fn step(rt: &Runtime, updates: &[UnitUpdate], wait: bool, interrupted: Interrupted<'_>) -> Result<()> {
    // SAFETY: there are no residents.
    unsafe { rt.update(updates, &[hyper()], &[], 0, wait, interrupted) }
}

fn hyper() -> StepHyper {
    let hyper = Hyper::new(
        &AdamWOptions { lr: 0.1, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.0, maximize: false },
        1,
        1.0,
    );
    StepHyper { hyper, clip: None }
}

#[test]
fn an_answer_that_comes_too_late_is_not_the_next_one_s() {
    let dir = disk();
    let rt = runtime(&dir, "host", "read:delay=2500ms@1");
    let mut ones = vec![1.0; ELEMS as usize];
    let mut twos = vec![2.0; ELEMS as usize];
    state(&rt, 0, &mut ones, Direction::Write).unwrap();
    state(&rt, 1, &mut twos, Direction::Write).unwrap();
    let mut got = vec![0.0; ELEMS as usize];
    assert_eq!(state(&rt, 0, &mut got, Direction::Read).unwrap_err().code(), Code::Stuck);
    // Its slot is still the disk's.
    assert_eq!(state(&rt, 1, &mut got, Direction::Read).unwrap_err().code(), Code::Stuck);
    sleep(Duration::from_millis(2500));
    for (unit, value) in [(1, 2.0), (0, 1.0)] {
        state(&rt, unit, &mut got, Direction::Read).unwrap();
        assert!(got.iter().all(|&v| v.to_bits() == f32::to_bits(value)), "unit {unit}: {}", got[0]);
    }
}

#[test]
fn an_interrupted_step_is_submitted_whole_or_not_at_all() {
    let dir = disk();
    let rt = runtime(&dir, "host", "read:delay=400ms@1x4");
    let mut ones = vec![1.0; ELEMS as usize];
    state(&rt, 2, &mut ones, Direction::Write).unwrap();
    let written = || {
        // Writes trail the update.
        rt.settle_all(&mut never).unwrap();
        sleep(Duration::from_millis(200));
        rt.stats().unwrap().flow(Link::NvmeWrite).bytes
    };
    let before = written();
    step(&rt, &[whole(2)], false, &mut never).unwrap();
    // The third is still being updated: the wait for it is interrupted.
    let all = [whole(0), whole(1), whole(2)];
    let error = step(&rt, &all, false, &mut || true).unwrap_err();
    assert_eq!(error.code(), Code::Interrupted);
    assert_eq!(rt.stats().unwrap().steps(), 1);
    let one_unit = written() - before;
    assert!(one_unit > 0);
    step(&rt, &all, true, &mut never).unwrap();
    assert_eq!(rt.stats().unwrap().steps(), 2);
    assert_eq!(written() - before, 4 * one_unit, "units of the interrupted step were updated");
}

#[test]
fn homes_in_host_memory_can_be_read_after_a_failure_that_was_seen() {
    let dir = disk();
    let rt = runtime(&dir, "host", "write:eio@1x1000000");
    step(&rt, &[whole(0)], false, &mut never).unwrap();
    sleep(Duration::from_millis(300));
    step(&rt, &[whole(1)], false, &mut never).map_err(|e| rt.failure_seen(&e)).unwrap_err();
    assert!(rt.failed().unwrap());
    for unit in 0..3 {
        rt.settle(UnitId(unit), 0, &mut never).unwrap();
        rt.release(UnitId(unit), 0, &mut never).unwrap();
    }
    assert!(rt.open_window(UnitId(0), Phase::Forward, 0, &mut never).is_err());
}

#[test]
fn nothing_old_is_shown_before_the_failure_is() {
    let dir = disk();
    let rt = runtime(&dir, "host", "read:eio@1x1000000");
    let mut ones = vec![1.0; ELEMS as usize];
    state(&rt, 0, &mut ones, Direction::Write).unwrap();
    step(&rt, &[whole(0)], false, &mut never).unwrap();
    let error = rt.settle(UnitId(0), 0, &mut never).unwrap_err();
    assert_eq!(error.code(), Code::IoFailed);
    rt.failure_seen(&error);
    rt.settle(UnitId(0), 0, &mut never).unwrap();
}

#[test]
fn on_disk_stays_on_disk_after_a_failure() {
    let dir = disk();
    let rt = runtime(&dir, "nvme", "read:eio@1x1000000");
    rt.blank_shadow(UnitId(0)).unwrap();
    rt.store_shadow(UnitId(0), 0, &mut never).unwrap();
    rt.discard_shadow(UnitId(0)).unwrap();
    step(&rt, &[whole(0)], false, &mut never).unwrap();
    let error = rt.settle(UnitId(0), 0, &mut never).unwrap_err();
    rt.failure_seen(&error);
    assert!(rt.settle(UnitId(0), 0, &mut never).is_err());
    assert!(rt.fault_in(UnitId(0), 0, &mut never).is_err());
}

#[test]
fn memory_for_stray_reads_is_what_the_budget_leaves() {
    let dir = disk();
    let rt = runtime(&dir, "host", "");
    let left = rt.limit(Tier::Host).unwrap().unwrap() - rt.used(Tier::Host).unwrap().0;
    rt.lend(left).unwrap();
    let refused = rt.lend(1).unwrap_err();
    assert_eq!(refused.code(), Code::ReadBudget);
    rt.returned(left).unwrap();
    rt.lend(1).unwrap();
    assert_eq!(rt.used(Tier::Host).unwrap().1, rt.limit(Tier::Host).unwrap().unwrap());
}

#[test]
fn what_is_on_its_way_home_when_the_runtime_fails_gets_there() {
    let param = |unit: u32| ParamSpec { name: format!("{unit}.w"), numel: ELEMS, dtype: DType::F32, trainable: true };
    let units: Vec<UnitSpec> =
        (0..3).map(|unit| UnitSpec { name: format!("unit {unit}"), params: vec![param(unit)] }).collect();
    let policy = r#"{"device": "host", "budget": {"host": "64MiB", "hbm": "16KiB"}, "optimizer": {"spare": "1MiB"},
        "debug": {"faults": "home:delay=200ms"}}"#;
    let policy = Policy::from_json_str(policy, "test").unwrap();
    let rt = Runtime::open(Layout::new(&units).unwrap(), &policy, ByteCount(0), None).unwrap();
    let shared = rt.shared().unwrap();
    // SAFETY: the gradients of the unit, which no other thread touches yet.
    let fill = |unit| unsafe {
        std::slice::from_raw_parts_mut(shared.homes.unit(unit).grads as *mut f32, ELEMS as usize).fill(1.0);
    };
    // SAFETY: the unit's home, once it is settled.
    let first = |unit| unsafe { *(shared.homes.unit(unit).params as *const f32) };
    let speculated: Vec<UnitUpdate> = (0..3).map(|unit| UnitUpdate { speculated: true, ..whole(unit) }).collect();
    for update in &speculated {
        fill(update.unit);
        assert!(rt.update_speculatively(update, &[hyper()], 0).unwrap());
    }
    sleep(Duration::from_millis(100));
    step(&rt, &speculated, false, &mut never).unwrap();
    // Its new parameters are in its frames long before they are home.
    assert!(rt.open_window(UnitId(2), Phase::Forward, 0, &mut never).unwrap());
    // SAFETY: the window is open, and on this device its copy is awaited.
    let in_frames = unsafe { *(shared.frames.address(2) as *const f32) };
    assert!((in_frames + 0.1).abs() < 1e-3, "{in_frames}");
    let pending = |unit| shared.inner.lock().machine.update_pending(unit);
    assert_eq!((first(UnitId(2)), pending(UnitId(2))), (0.0, true));
    shared.fail(Error::new(Code::Stuck, "a test."));
    rt.failure_seen(&rt.settle(UnitId(2), 0, &mut never).unwrap_err());
    for unit in (0..3).map(UnitId) {
        rt.settle(unit, 0, &mut never).unwrap();
        assert_eq!(first(unit).to_bits(), in_frames.to_bits());
    }
}

/// Two steps with `between` in the second; what the second one took.
fn second_step(rt: &Runtime, between: impl FnOnce()) -> step_time::Times {
    step(rt, &[], false, &mut never).unwrap();
    between();
    step(rt, &[], false, &mut never).unwrap();
    rt.times().unwrap()
}

fn accounted(step: &step_time::StepTime) -> u64 {
    step.compute + step.stalls.iter().sum::<u64>()
}

#[test]
fn a_step_whose_marks_are_lost_does_not_add_up_and_says_so() {
    let dir = disk();
    let rt = runtime(&dir, "host", "");
    let nap = Duration::from_millis(20);
    let good = second_step(&rt, || sleep(nap));
    assert_eq!((good.steps, good.lost), (1, 0));
    assert!(good.last.compute >= nap.as_nanos() as u64, "{good:?}");
    assert!(accounted(&good.last).abs_diff(good.last.wall) * 50 <= good.last.wall, "{good:?}");
    let bad = second_step(&rt, || {
        sleep(nap);
        for _ in 0..device::MARKS {
            rt.device().unwrap().mark(StreamRef::Compute(0)).unwrap();
        }
    });
    assert_eq!((bad.steps, bad.lost), (3, 1));
    assert!(accounted(&bad.last) * 2 < bad.last.wall, "{bad:?}");
    // The next one does again.
    let good = second_step(&rt, || sleep(nap));
    assert!(accounted(&good.last).abs_diff(good.last.wall) * 50 <= good.last.wall, "{good:?}");
    assert_eq!(good.lost, 1);
}

#[test]
fn a_wait_counts_for_what_it_waits_for_as_that_changes() {
    let dir = disk();
    // A page-in behind an update: the update is late, then its bytes are on their way to the disk, then on their way back.
    let rt = runtime(&dir, "nvme", "update:delay=30ms,write:delay=30ms@1x1000000,read:delay=30ms@1x1000000");
    let wait = || {
        step(&rt, &[whole(0)], false, &mut never).unwrap();
        assert!(rt.open_window(UnitId(0), Phase::Forward, 0, &mut never).unwrap());
        rt.release(UnitId(0), 0, &mut never).unwrap();
        step(&rt, &[], true, &mut never).unwrap();
        rt.times().unwrap().last
    };
    wait();
    let last = wait();
    let least = |cause: Cause| assert!(last.stalls[cause as usize] >= 25_000_000, "{cause:?}: {last:?}");
    [Cause::Update, Cause::NvmeWrite, Cause::NvmeRead].into_iter().for_each(least);
    assert_eq!(last.stalls[Cause::Grads as usize], 0);
    assert!(accounted(&last).abs_diff(last.wall) * 50 <= last.wall, "{last:?}");
}
