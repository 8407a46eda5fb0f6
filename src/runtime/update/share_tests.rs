//! Every element once, by the processor or by a lane; the bits of one update in place; errors and panics leave nothing under way.
#![expect(unsafe_code, reason = "updates arrays of its own")]

use std::{
    collections::BTreeMap,
    sync::{Mutex, atomic::AtomicUsize},
    thread,
    time::Instant,
};

use super::*;
use crate::{
    device::{Device, HostDevice, staging_bytes},
    dtype::{DType, StateKind},
    optim::AdamWOptions,
};

fn hyper(step: u64) -> Hyper {
    Hyper::new(&AdamWOptions { weight_decay: 0.1, ..AdamWOptions::default() }, step, 0.5)
}

/// Spans whose addresses are not looked at.
fn parts_of(lens: &[usize]) -> Share {
    let mut share = Share::new(None, UpdateOn::Cpu);
    let none = std::ptr::null_mut::<u8>();
    for &len in lens {
        let span = Span {
            param: none,
            grad: none,
            master: none,
            exp_avg: none.cast(),
            exp_avg_sq: none.cast(),
            len,
            dtype: DType::F32,
            reset_master: false,
        };
        share.add(span, hyper(1), None, Portion::Whole).expect("trainable");
    }
    share
}

/// Claims everything from several threads; the pieces that each side took.
fn claimed(share: &Share, split: UpdateOn, group: u32) -> [Vec<u32>; 2] {
    let claims = Claims::new(share.pieces, split);
    let taken = [Mutex::new(Vec::new()), Mutex::new(Vec::new())];
    thread::scope(|scope| {
        for worker in 0..4 {
            let (claims, taken, parts) = (&claims, &taken, &share.parts);
            scope.spawn(move || {
                let start = |back: u32| parts[holder(parts, back - 1)].first.max(back.saturating_sub(group));
                while let Some(pieces) =
                    if worker % 2 == 0 { claims.first().map(|p| p..p + 1) } else { claims.last(start) }
                {
                    assert!(pieces.len() <= group.max(1) as usize);
                    assert_eq!(holder(parts, pieces.start), holder(parts, pieces.end - 1), "of one part");
                    taken[worker % 2].lock().expect("no panic").extend(pieces);
                }
            });
        }
    });
    taken.map(|side| side.into_inner().expect("no panic"))
}

#[test]
fn every_piece_is_claimed_once() {
    for lens in [vec![1], vec![0, 5 * PIECE + 1, 0, PIECE, 7], vec![1000; 50], vec![400 * PIECE - 1], vec![]] {
        let share = parts_of(&lens);
        for split in [UpdateOn::Cpu, UpdateOn::Gpu, UpdateOn::Both, UpdateOn::Halves] {
            for group in [1, 3, 64] {
                let [processor, lanes] = claimed(&share, split, group);
                let mut all: Vec<u32> = processor.iter().chain(&lanes).copied().collect();
                all.sort_unstable();
                assert!(all.into_iter().eq(0..share.pieces), "{lens:?}, {split:?}, groups of {group}");
                let half = share.pieces as usize / 2;
                match split {
                    UpdateOn::Cpu => assert!(lanes.is_empty()),
                    UpdateOn::Gpu => assert!(processor.is_empty()),
                    UpdateOn::Halves => assert_eq!(processor.len(), half),
                    UpdateOn::Both => {}
                }
            }
        }
    }
}

#[test]
fn pieces_cover_their_spans() {
    let lens = [5 * PIECE + 1, 1, PIECE, 3 * PIECE - 1];
    let share = parts_of(&lens);
    let mut seen = BTreeMap::new();
    for group in [1, 2] {
        for first in (0..share.pieces).step_by(group) {
            let last = (first + group as u32).min(share.pieces);
            if holder(&share.parts, first) == holder(&share.parts, last - 1) {
                let (part, span, _) = cut(&share.parts, first..last);
                *seen.entry((group, part.first)).or_insert(0) += span.len;
            }
        }
    }
    let whole: Vec<usize> = share.parts.iter().map(|part| seen[&(1, part.first)]).collect();
    assert_eq!(whole, lens);
}

/// Buffers of one span, and of a second place for its results.
struct Arrays {
    dtype: DType,
    len: usize,
    bytes: [Vec<u64>; 9],
}

impl Arrays {
    fn new(dtype: DType, len: usize) -> Self {
        let kinds = [StateKind::Param, StateKind::Grad, StateKind::Master, StateKind::ExpAvg, StateKind::ExpAvgSq];
        let mut word = 0x9E37_79B9_7F4A_7C15_u64 ^ len as u64;
        let mut array = |kind: StateKind| -> Vec<u64> {
            let words = (len * kind.element_size(dtype)).div_ceil(8);
            let next = |_| {
                word ^= word << 13;
                word ^= word >> 7;
                word ^= word << 17;
                // No sign and no exponent of all ones, in any type: ordinary numbers.
                word & 0x3fff_3fff_3fff_3fff
            };
            (0..words).map(next).collect()
        };
        let first = kinds.map(&mut array);
        let [p, _, r, m, v] = first.each_ref().map(|a| vec![0; a.len()]);
        let [param, grad, master, exp_avg, exp_avg_sq] = first;
        Self { dtype, len, bytes: [param, grad, master, exp_avg, exp_avg_sq, p, r, m, v] }
    }

    fn span(&mut self) -> Span {
        let [param, grad, master, exp_avg, exp_avg_sq, ..] = &mut self.bytes;
        Span {
            param: param.as_mut_ptr().cast(),
            grad: grad.as_ptr().cast(),
            master: master.as_mut_ptr().cast(),
            exp_avg: exp_avg.as_mut_ptr().cast(),
            exp_avg_sq: exp_avg_sq.as_mut_ptr().cast(),
            len: self.len,
            dtype: self.dtype,
            reset_master: self.len.is_multiple_of(2),
        }
    }

    fn target(&mut self) -> Target {
        let [.., param, master, exp_avg, exp_avg_sq] = &mut self.bytes;
        Target {
            param: param.as_mut_ptr().cast(),
            master: master.as_mut_ptr().cast(),
            exp_avg: exp_avg.as_mut_ptr().cast(),
            exp_avg_sq: exp_avg_sq.as_mut_ptr().cast(),
            second: std::ptr::null_mut(),
        }
    }
}

const LENS: [(DType, usize); 5] = [
    (DType::Bf16, 9 * PIECE + 77),
    (DType::F32, 1),
    (DType::F32, 5 * PIECE),
    (DType::F16, 2 * PIECE + 1),
    (DType::Bf16, PIECE - 1),
];

fn host_lanes(elems: u64) -> Arc<dyn Lanes> {
    HostDevice::new().expect("starts").create_lanes(3, staging_bytes(elems)).expect("starts")
}

fn clock() -> impl Fn() -> u64 + Sync {
    let epoch = Instant::now();
    move || epoch.elapsed().as_nanos() as u64
}

/// Runs a portion of the spans of `LENS` in place or aside; the elements that each side did.
fn run_portion(
    share: &mut Share,
    pool: &Pool,
    arrays: &mut [Arrays],
    (aside, portion): (bool, Portion),
) -> Result<[Work; 2]> {
    share.clear();
    for (step, array) in arrays.iter_mut().enumerate() {
        let to = aside.then(|| array.target());
        share.add(array.span(), hyper(step as u64 + 1), to, portion)?;
    }
    assert_eq!(share.portion(), portion);
    // SAFETY: the arrays are the test's own and outlive the run.
    unsafe { share.run(pool, &clock(), &|| Ok(false)) }
}

/// Runs all of them.
fn run(share: &mut Share, pool: &Pool, arrays: &mut [Arrays], aside: bool) -> Result<[Work; 2]> {
    run_portion(share, pool, arrays, (aside, Portion::Whole))
}

#[test]
fn two_passes_have_the_bits_of_one_wherever_they_are_made() {
    let pool = Pool::new(Some(2)).expect("threads");
    let elems = 2 * PIECE as u64;
    let mut share = Share::new(Some((host_lanes(elems), elems)), UpdateOn::Both);
    let fresh = || LENS.map(|(dtype, len)| Arrays::new(dtype, len));
    let mut expected = fresh();
    share.set_update_on(UpdateOn::Cpu);
    run(&mut share, &pool, &mut expected, false).expect("works");
    for (first, second) in [(Portion::Weights, Portion::Moments), (Portion::Param, Portion::States)] {
        for split in [UpdateOn::Cpu, UpdateOn::Gpu, UpdateOn::Halves, UpdateOn::Both] {
            assert!(share.set_update_on(split));
            let aside = first == Portion::Param;
            let mut arrays = fresh();
            run_portion(&mut share, &pool, &mut arrays, (aside, first)).expect("works");
            let moments = |a: &Arrays| a.bytes[3..5].to_vec();
            assert!(arrays.iter().zip(&fresh()).all(|(a, b)| moments(a) == moments(b)), "{first:?} leaves the moments");
            let [_, lanes] = run_portion(&mut share, &pool, &mut arrays, (false, second)).expect("works");
            assert!(lanes.elems > 0 || matches!(split, UpdateOn::Cpu | UpdateOn::Both));
            for (n, (a, b)) in expected.iter().zip(&arrays).enumerate() {
                // Behind the last element the other place holds what it held.
                let param = |words: &[u64]| bytemuck::cast_slice::<u64, u8>(words)[..a.len * a.dtype.size()].to_vec();
                let same = param(&a.bytes[0]) == param(&b.bytes[if aside { 5 } else { 0 }]);
                assert!(same && a.bytes[1..5] == b.bytes[1..5], "span {n}, {first:?}, {split:?}");
            }
        }
    }
}

#[test]
fn the_bits_do_not_depend_on_who_updates() {
    let pool = Pool::new(Some(2)).expect("threads");
    let elems = 2 * PIECE as u64;
    let mut share = Share::new(Some((host_lanes(elems), elems)), UpdateOn::Both);
    let all: u64 = LENS.iter().map(|(_, len)| *len as u64).sum();
    let fresh = || LENS.map(|(dtype, len)| Arrays::new(dtype, len));
    for aside in [false, true] {
        let mut expected = fresh();
        for (step, array) in expected.iter_mut().enumerate() {
            let (span, to) = (array.span(), array.target());
            // SAFETY: the arrays are the test's own.
            let done = unsafe {
                if aside {
                    adamw_into_with(Isa::best(), &span, &to, &hyper(step as u64 + 1))
                } else {
                    adamw(&span, &hyper(step as u64 + 1))
                }
            };
            done.expect("trainable");
        }
        for split in [UpdateOn::Cpu, UpdateOn::Gpu, UpdateOn::Halves, UpdateOn::Both] {
            assert!(share.set_update_on(split));
            for round in 0..4 {
                let mut arrays = fresh();
                let [processor, lanes] = run(&mut share, &pool, &mut arrays, aside).expect("works");
                assert_eq!(processor.elems + lanes.elems, all, "{split:?}");
                match split {
                    UpdateOn::Cpu => assert_eq!(lanes, Work::default()),
                    UpdateOn::Gpu => assert_eq!(processor.elems, 0),
                    UpdateOn::Halves => assert!(processor.elems > 0 && lanes.elems > 0),
                    UpdateOn::Both => {}
                }
                for (n, (a, b)) in expected.iter().zip(&arrays).enumerate() {
                    assert!(a.bytes == b.bytes, "span {n}, {split:?}, aside {aside}, round {round}");
                }
            }
        }
    }
}

#[test]
fn lanes_alone_update_what_the_processor_does_not_reach() {
    let pool = Pool::new(Some(2)).expect("threads");
    let elems = 2 * PIECE as u64;
    let mut share = Share::new(Some((host_lanes(elems), elems)), UpdateOn::Cpu);
    let mut array = Arrays::new(DType::Bf16, 9 * PIECE + 77);
    let mut lanes_with = |above: bool| {
        share.clear();
        share.add(array.span(), hyper(1), None, Portion::Whole).expect("trainable");
        share.lanes_alone(above);
        // SAFETY: the array is the test's own and outlives the run.
        let [processor, lanes] = unsafe { share.run(&pool, &clock(), &|| Ok(true)) }.expect("works");
        (processor.elems, lanes.elems, lanes.bytes)
    };
    let all = 9 * PIECE as u64 + 77;
    assert_eq!(lanes_with(true), (0, all, 6 * all), "6 bytes of a bf16 parameter cross the link");
    assert_eq!(lanes_with(false), (all, 0, 0), "the next set is as any other");
    assert!(share.pace.flight.to_bits() == Pace::default().flight.to_bits(), "nothing is learned of other groups");
}

#[test]
fn lanes_leave_the_link_to_a_unit_on_its_way_up() {
    let pool = Pool::new(Some(2)).expect("threads");
    let elems = 2 * PIECE as u64;
    let mut share = Share::new(Some((host_lanes(elems), elems)), UpdateOn::Both);
    let mut array = Arrays::new(DType::F32, 64 * PIECE);
    let mut lanes_with = |paging: bool| {
        share.pace.ran(1_000_000, 1_000_000_000);
        share.pace.flight = 1.0; // a group is always worth it
        share.clear();
        share.add(array.span(), hyper(1), None, Portion::Whole).expect("trainable");
        // SAFETY: the array is the test's own and outlives the run.
        let [processor, lanes] = unsafe { share.run(&pool, &clock(), &|| Ok(paging)) }.expect("works");
        assert_eq!(processor.elems + lanes.elems, 64 * PIECE as u64);
        lanes.elems
    };
    assert!((0..100).any(|_| lanes_with(false) > 0), "lanes take their part of a free link");
    assert!((0..10).all(|_| lanes_with(true) == 0));
}

#[test]
fn nothing_is_added_without_a_kernel_and_nothing_is_nothing() {
    let mut share = Share::new(None, UpdateOn::Gpu);
    let mut array = Arrays::new(DType::F32, 8);
    let opaque = Span { dtype: DType::Opaque { size: 4 }, ..array.span() };
    assert_eq!(
        share.add(opaque, hyper(1), None, Portion::Whole).expect_err("no kernel").code(),
        Code::UnsupportedParam
    );
    assert!(!share.set_update_on(UpdateOn::Gpu) && !share.uses_lanes());
    let pool = Pool::new(Some(1)).expect("threads");
    // SAFETY: there is nothing in the set.
    let done = unsafe { share.run(&pool, &clock(), &|| Ok(false)) }.expect("works");
    assert_eq!(done.map(|work| (work.elems, work.bytes)), [(0, 0); 2]);
}

#[test]
fn lanes_take_what_pays_and_are_tried_again() {
    let mut pace = Pace::default();
    assert!(!pace.worth_it(u64::MAX), "nothing is known of the processor");
    // Four bytes a nanosecond; a group of two milliseconds is worth it for more than eight million.
    pace.ran(40_000_000, 10_000_000);
    assert!(!pace.worth_it(7_900_000) && pace.worth_it(8_100_000));
    (0..100).for_each(|_| pace.flew(1_000_000));
    assert!(!pace.worth_it(3_900_000) && pace.worth_it(4_100_000));
    pace.flew(800_000_000);
    assert!(!pace.worth_it(64 << 20), "a group was slow");
    (0..200).for_each(|_| pace.declined());
    assert!(pace.worth_it(64 << 20));
    (0..1000).for_each(|_| pace.ran(8_000_000, 1_000_000));
    let rate = pace.bytes / pace.nanos;
    assert!((7.9..8.1).contains(&rate), "what was long ago does not count: {rate}");
}

/// Lanes that fail or panic at one of their launches, and tell whether any is in flight.
struct Failing {
    inner: Arc<dyn Lanes>,
    at: usize,
    panics: bool,
    launches: AtomicUsize,
    flying: Mutex<[bool; 3]>,
}

impl Lanes for Failing {
    fn count(&self) -> usize {
        self.inner.count()
    }

    unsafe fn launch(&self, lane: usize, work: &Launch<'_>) -> Result<()> {
        if self.launches.fetch_add(1, Ordering::Relaxed) == self.at {
            assert!(!self.panics, "as asked");
            return Err(Error::new(Code::Cuda, "as asked."));
        }
        self.flying.lock().expect("no panic")[lane] = true;
        // SAFETY: passed on.
        unsafe { self.inner.launch(lane, work) }
    }

    unsafe fn copy(&self, lane: usize, dst: u64, src: u64, len: usize) -> Result<()> {
        // SAFETY: passed on.
        unsafe { self.inner.copy(lane, dst, src, len) }
    }

    fn block(&self, lane: usize, timeout: Duration) -> Result<bool> {
        let done = self.inner.block(lane, timeout)?;
        self.flying.lock().expect("no panic")[lane] &= !done;
        Ok(done)
    }
}

#[test]
fn a_failure_leaves_nothing_under_way() {
    let pool = Pool::new(Some(2)).expect("threads");
    let elems = PIECE as u64;
    for (at, panics) in [(0, false), (4, false), (0, true), (4, true)] {
        let inner = host_lanes(elems);
        let failing =
            Arc::new(Failing { inner, at, panics, launches: AtomicUsize::new(0), flying: Mutex::new([false; 3]) });
        let lanes: Arc<dyn Lanes> = Arc::<Failing>::clone(&failing);
        let mut share = Share::new(Some((lanes, elems)), UpdateOn::Gpu);
        let mut arrays = LENS.map(|(dtype, len)| Arrays::new(dtype, len));
        let error = run(&mut share, &pool, &mut arrays, false).expect_err("fails");
        assert_eq!(error.code(), if panics { Code::Panicked } else { Code::Cuda }, "{error}");
        assert_eq!(*failing.flying.lock().expect("no panic"), [false; 3]);
        // The share itself is whole: what failed is the device.
        let [_, lanes] = run(&mut share, &pool, &mut arrays, false).expect("works");
        assert_eq!(lanes.elems, LENS.iter().map(|(_, len)| *len as u64).sum::<u64>());
    }
}
