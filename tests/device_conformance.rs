//! One body of expectations, run over every device there is.
//!
//! Without a CUDA driver the CUDA half is absent; the test `cuda_is_tested_or_said_to_be_skipped` says so.
//! `FUNICULAR_REQUIRE_CUDA=1` makes that a failure. The binary runs on its own: it reads no files of the source tree.
#![expect(unsafe_code, reason = "copies between raw device addresses")]

use std::{
    sync::{
        Arc, Barrier,
        atomic::{AtomicU8, Ordering},
    },
    thread,
    time::Duration,
};

use funicular::{
    device::{self, Device, DeviceChoice, DeviceKind, FrameSpan, Frames, Gate, HostDevice, Role, StreamRef},
    error::Code,
    memory::HostRegion,
    units::ByteCount,
};
use proptest::prelude::*;

/// Long enough that only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(120);

const UP: StreamRef = StreamRef::Up;
const DOWN: StreamRef = StreamRef::Down;
const USER: StreamRef = StreamRef::Compute(0);

fn cuda_present() -> bool {
    #[cfg(feature = "cuda")]
    let present = device::cuda::count().expect("the driver starts") > 0;
    #[cfg(not(feature = "cuda"))]
    let present = false;
    present
}

/// Runs `body` on every device of this machine.
fn on_every_device(body: impl Fn(Arc<dyn Device>)) {
    body(device::open(DeviceChoice::Host).expect("the host device opens"));
    if cuda_present() {
        body(device::open(DeviceChoice::Cuda(0)).expect("the CUDA device opens"));
    }
}

#[test]
#[expect(clippy::print_stderr, reason = "says what was not tested")]
fn cuda_is_tested_or_said_to_be_skipped() {
    if cuda_present() {
        let device = device::open(DeviceChoice::Auto).expect("opens");
        assert_eq!(device.kind(), DeviceKind::Cuda(0), "Auto takes the GPU");
        #[cfg(feature = "cuda")]
        eprintln!("cuda: tested on {:?}", device::cuda::device_info(0).expect("described"));
        return;
    }
    assert!(std::env::var_os("FUNICULAR_REQUIRE_CUDA").is_none(), "FUNICULAR_REQUIRE_CUDA is set and there is no GPU");
    assert_eq!(device::open(DeviceChoice::Auto).expect("opens").kind(), DeviceKind::Host);
    eprintln!("cuda: skipped, no driver");
}

#[test]
fn a_missing_cuda_device_is_a_named_error() {
    let e = device::open(DeviceChoice::Cuda(1000)).err().expect("no such device");
    assert_eq!(e.code(), Code::NoCuda, "{e}");
}

/// A device with registered host memory to copy from and to.
struct Bench {
    device: Arc<dyn Device>,
    region: Arc<HostRegion>,
}

impl Bench {
    fn new(device: Arc<dyn Device>, bytes: u64) -> Self {
        let region = HostRegion::new(ByteCount(bytes), "a test").expect("maps");
        device.register(&region).expect("registers");
        Self { device, region }
    }

    fn frames(&self, ring: u32, chunk_bytes: u64, spans: &[(u32, u32)]) -> Arc<dyn Frames> {
        let spans: Vec<_> = spans.iter().map(|&(first_chunk, chunks)| FrameSpan { first_chunk, chunks }).collect();
        self.device.create_frames(ring, chunk_bytes, &spans).expect("frames")
    }

    fn at(&self, offset: usize) -> u64 {
        assert!(offset <= self.region.len());
        self.region.as_ptr() as u64 + offset as u64
    }

    fn set(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.region.len());
        // SAFETY: inside the region; the tests wait for copies before they touch its bytes.
        unsafe { self.region.as_ptr().add(offset).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    fn get(&self, offset: usize, len: usize) -> Vec<u8> {
        assert!(offset + len <= self.region.len());
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(self.region.as_ptr().add(offset), len) }.to_vec()
    }

    fn copy(&self, stream: StreamRef, dst: u64, src: u64, len: usize) {
        // SAFETY: the tests copy inside frames and the region, which outlive the copies.
        unsafe { self.device.copy(stream, dst, src, len) }.expect("enqueued");
    }

    fn fill(&self, stream: StreamRef, dst: u64, byte: u8, len: usize) {
        // SAFETY: as above.
        unsafe { self.device.fill(stream, dst, byte, len) }.expect("enqueued");
    }

    fn finish(&self, stream: StreamRef) {
        let gate = self.device.record(stream).expect("recorded");
        assert!(self.device.block(gate, PATIENCE).expect("works"), "{stream:?} hangs");
    }

    /// `after` waits for all of `before`.
    fn order(&self, before: StreamRef, after: StreamRef) {
        let gate = self.device.record(before).expect("recorded");
        self.device.wait(after, gate).expect("waits");
    }

    /// Reads device memory back, through the end of the region.
    fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let scratch = self.region.len() - len;
        self.copy(DOWN, self.at(scratch), address, len);
        self.finish(DOWN);
        self.get(scratch, len)
    }
}

/// Bytes that differ everywhere and by seed.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

#[test]
fn units_alias_the_ring_and_keep_their_addresses() {
    on_every_device(|device| {
        let chunk = device.granularity() as usize;
        let bench = Bench::new(device, 8 * chunk as u64);
        // Units 0 and 2 are the same memory, unit 1 lies behind them, unit 3 lies over the end of one and all of the other.
        let frames = bench.frames(4, chunk as u64, &[(0, 2), (2, 2), (0, 2), (1, 3)]);
        let addresses: Vec<_> = (0..4).map(|unit| frames.address(unit)).collect();
        for (a, pair) in addresses.iter().zip(addresses.iter().skip(1)) {
            assert_ne!(a, pair, "units have addresses of their own");
        }
        for round in 0..3 {
            let (first, second) = (pattern(round, 2 * chunk), pattern(round + 100, 2 * chunk));
            bench.set(0, &first);
            bench.set(2 * chunk, &second);
            bench.copy(UP, frames.address(0), bench.at(0), 2 * chunk);
            bench.copy(UP, frames.address(1), bench.at(2 * chunk), 2 * chunk);
            bench.order(UP, DOWN);
            assert!(bench.read(frames.address(2), 2 * chunk) == first, "alias of unit 0");
            assert!(bench.read(frames.address(1), 2 * chunk) == second, "unit 1 is apart");
            let both: Vec<u8> = first.iter().chain(&second).copied().skip(chunk).collect();
            assert!(bench.read(frames.address(3), 3 * chunk) == both, "unit 3 sees both");
            bench.copy(UP, frames.address(2), bench.at(2 * chunk), chunk);
            bench.order(UP, DOWN);
            assert!(bench.read(frames.address(0), chunk) == second[..chunk], "and the other way round");
            assert_eq!(addresses, (0..4).map(|unit| frames.address(unit)).collect::<Vec<_>>());
        }
    });
}

#[test]
fn spans_wrap_around_the_end_of_the_ring() {
    on_every_device(|device| {
        let chunk = 3 * device.granularity() as usize;
        let bench = Bench::new(device, 10 * chunk as u64);
        let frames = bench.frames(3, chunk as u64, &[(2, 3), (0, 3), (1, 1)]);
        let bytes = pattern(7, 3 * chunk);
        bench.set(0, &bytes);
        bench.copy(UP, frames.address(0), bench.at(0), 3 * chunk);
        bench.order(UP, DOWN);
        let straight: Vec<u8> = [&bytes[chunk..], &bytes[..chunk]].concat();
        assert!(bench.read(frames.address(1), 3 * chunk) == straight);
        assert!(bench.read(frames.address(2), chunk) == bytes[2 * chunk..]);
    });
}

#[test]
fn many_units_share_a_small_ring() {
    on_every_device(|device| {
        let chunk = device.granularity() as usize;
        let bench = Bench::new(device, 8 * chunk as u64);
        let spans: Vec<_> = (0..200).map(|unit| (unit % 4, 1 + unit % 3)).collect();
        let frames = bench.frames(4, chunk as u64, &spans);
        for (unit, &(first, chunks)) in spans.iter().enumerate() {
            let bytes = pattern(unit as u64, 64);
            bench.set(0, &bytes);
            let last = (chunks as usize - 1) * chunk;
            bench.copy(UP, frames.address(unit) + last as u64, bench.at(0), 64);
            bench.order(UP, DOWN);
            let twin = (0..unit).rev().find(|&other| spans[other].0 == (first + chunks - 1) % 4);
            if let Some(twin) = twin {
                assert!(bench.read(frames.address(twin), 64) == bytes, "unit {unit} through unit {twin}");
            }
        }
    });
}

#[test]
fn a_ring_that_cannot_hold_a_unit_is_refused() {
    on_every_device(|device| {
        let span = FrameSpan { first_chunk: 0, chunks: 4 };
        let e = device.create_frames(3, device.granularity(), &[span]).err().expect("too small");
        assert_eq!(e.code(), Code::HbmBudget, "{e}");
    });
}

#[test]
fn more_memory_than_there_is_is_a_named_error() {
    if cuda_present() {
        let device = device::open(DeviceChoice::Cuda(0)).expect("opens");
        let span = FrameSpan { first_chunk: 0, chunks: 1 };
        let e = device.create_frames(1, 1 << 50, &[span]).err().expect("no device has a petabyte");
        assert_eq!(e.code(), Code::HbmBudget, "{e}");
        // The device still works.
        let bench = Bench::new(device, 1 << 20);
        let frames = bench.frames(1, bench.device.granularity(), &[(0, 1)]);
        bench.fill(DOWN, frames.address(0), 9, 100);
        assert_eq!(bench.read(frames.address(0), 100), [9; 100]);
    }
}

#[test]
fn odd_sizes_and_alignments_arrive_exactly() {
    const WINDOW: usize = 4224;
    on_every_device(|device| {
        let chunk = device.granularity();
        let bench = Bench::new(device, 1 << 20);
        let frames = bench.frames(3, chunk, &[(1, 3)]);
        // Across the border of two chunks.
        let window = frames.address(0) + chunk - 64;
        for (i, len) in [0, 1, 3, 7, 63, 65, 511, 4095].into_iter().enumerate() {
            for shift in [0, 1, 2, 5, 13] {
                let bytes = pattern(i as u64 * 31 + shift as u64, len);
                bench.set(3 + shift, &bytes);
                bench.fill(UP, window, 0xEE, WINDOW);
                bench.copy(UP, window + 24 + shift as u64, bench.at(3 + shift), len);
                bench.order(UP, DOWN);
                let mut expected = vec![0xEE; WINDOW];
                expected[24 + shift..24 + shift + len].copy_from_slice(&bytes);
                assert!(bench.read(window, WINDOW) == expected, "{len} bytes shifted by {shift}");
            }
        }
    });
}

#[test]
fn poison_fills_exactly_its_range() {
    on_every_device(|device| {
        let chunk = device.granularity() as usize;
        let bench = Bench::new(device, 4 * chunk as u64);
        let frames = bench.frames(2, chunk as u64, &[(0, 2)]);
        let bytes = pattern(3, 2 * chunk);
        bench.set(0, &bytes);
        for stream in [UP, DOWN, USER] {
            bench.copy(UP, frames.address(0), bench.at(0), 2 * chunk);
            bench.order(UP, stream);
            bench.fill(stream, frames.address(0) + 101, 0xDB, chunk);
            bench.order(stream, DOWN);
            let mut expected = bytes.clone();
            expected[101..101 + chunk].fill(0xDB);
            assert!(bench.read(frames.address(0), 2 * chunk) == expected, "{stream:?}");
        }
    });
}

#[test]
fn gates_order_the_streams() {
    on_every_device(|device| {
        let chunk = device.granularity();
        let len = round_to(1 << 20, chunk);
        let bench = Bench::new(device, 16 * len as u64);
        let frames = bench.frames(1, len as u64, &[(0, 1), (0, 1)]);
        // Unit after unit through one frame: up, the user's stream, down, and the frame again. Nothing is waited for
        // on the host, so only gates keep the bytes apart.
        let units = 7;
        for unit in 0..units {
            bench.set(unit * len, &pattern(unit as u64, len));
        }
        for unit in 0..units {
            let address = frames.address(unit % 2);
            bench.copy(UP, address, bench.at(unit * len), len);
            bench.order(UP, USER);
            bench.fill(USER, address + 17, unit as u8, 4096);
            bench.order(USER, DOWN);
            bench.copy(DOWN, bench.at((units + unit) * len), address, len);
            bench.order(DOWN, UP);
        }
        bench.finish(DOWN);
        for unit in 0..units {
            let mut expected = pattern(unit as u64, len);
            expected[17..17 + 4096].fill(unit as u8);
            assert!(bench.get((units + unit) * len, len) == expected, "unit {unit}");
        }
    });
}

fn round_to(bytes: usize, granularity: u64) -> usize {
    bytes.next_multiple_of(granularity as usize)
}

/// A host device whose down stream is held up for `millis`; the gate opens behind that.
fn held_down(millis: u64) -> (Bench, Gate) {
    let device = HostDevice::with_caps(None, Some(1e6)).expect("starts");
    let bench = Bench::new(Arc::new(device), 1 << 22);
    bench.copy(DOWN, bench.at(1 << 21), bench.at(0), millis as usize * 1000);
    let gate = bench.device.record(DOWN).expect("recorded");
    (bench, gate)
}

#[test]
fn a_gate_is_closed_while_its_stream_is_busy() {
    let (bench, gate) = held_down(2000);
    assert!(!bench.device.passed(gate).expect("works"));
    assert!(!bench.device.block(gate, Duration::from_millis(5)).expect("works"), "the time was over");
    assert!(!bench.device.block(gate, Duration::ZERO).expect("works"));
    // What waits for it is closed too, on the stream and on the thread that computes.
    bench.device.wait(UP, gate).expect("enqueued");
    let behind = bench.device.record(UP).expect("recorded");
    assert!(!bench.device.passed(behind).expect("works"));
    bench.device.wait(USER, gate).expect("waits");
    assert!(bench.device.passed(gate).expect("works"), "the user's stream went on before the gate");
    assert!(bench.device.block(behind, PATIENCE).expect("works"));
    assert!(bench.device.block(gate, Duration::MAX).expect("works"), "no limit is not an error");
}

#[test]
fn block_ends_and_gates_stay_open_on_every_device() {
    on_every_device(|device| {
        let bench = Bench::new(device, 1 << 26);
        let frames = bench.frames(1, round_to(1 << 25, bench.device.granularity()) as u64, &[(0, 1)]);
        for _ in 0..8 {
            bench.copy(UP, frames.address(0), bench.at(0), 1 << 25);
        }
        let gate = bench.device.record(UP).expect("recorded");
        let early = bench.device.block(gate, Duration::ZERO).expect("works");
        let passed = bench.device.passed(gate).expect("works");
        assert!(passed >= early, "a gate closed again");
        assert!(bench.device.block(gate, PATIENCE).expect("works"));
        assert!(bench.device.passed(gate).expect("works"));
        assert!(bench.device.passed(Gate::OPEN).expect("works"));
        for role in [Role::Up, Role::Down] {
            assert!(bench.device.passed(Gate { role, seq: 0 }).expect("works"));
        }
    });
}

#[test]
fn a_gate_never_recorded_is_an_error_and_no_hang() {
    on_every_device(|device| {
        let last = device.record(UP).expect("recorded");
        let never = Gate { role: Role::Up, seq: last.seq + 1 };
        assert_eq!(device.passed(never).expect_err("unknown").code(), Code::Stuck);
        assert_eq!(device.block(never, PATIENCE).expect_err("unknown").code(), Code::Stuck);
        for stream in [UP, DOWN, USER] {
            assert_eq!(device.wait(stream, never).expect_err("unknown").code(), Code::Stuck);
        }
    });
}

#[test]
fn numbers_grow_and_thousands_of_gates_stay_answerable() {
    on_every_device(|device| {
        let bench = Bench::new(device, 1 << 20);
        for stream in [UP, DOWN, USER] {
            let gates: Vec<_> = (0..10_000)
                .map(|_| {
                    bench.copy(stream, bench.at(1 << 16), bench.at(0), 64);
                    bench.device.record(stream).expect("recorded")
                })
                .collect();
            if stream != USER {
                assert!(gates.is_sorted_by_key(|gate| gate.seq) && gates[0].seq < gates[9_999].seq);
            }
            // The oldest first: its event has been used again since.
            for gate in [gates[0], gates[1], gates[5_000], gates[9_999]] {
                for other in [UP, DOWN, USER] {
                    bench.device.wait(other, gate).expect("waits");
                }
                assert!(bench.device.block(gate, PATIENCE).expect("works"));
            }
            bench.finish(stream);
            for gate in gates {
                assert!(bench.device.passed(gate).expect("works"));
            }
        }
    });
}

/// Streams of a user's own, as torch makes them: they wait for nothing but what they are told to.
#[cfg(feature = "cuda")]
fn user_streams(count: usize) -> Vec<StreamRef> {
    use cudarc::driver::sys;
    let (mut before, mut context, mut device) = (std::ptr::null_mut(), std::ptr::null_mut(), 0);
    let make = |_| {
        let mut stream = std::ptr::null_mut();
        // SAFETY: writes one handle; the context is current.
        let made = unsafe { sys::cuStreamCreate(&raw mut stream, 1) };
        assert_eq!(made, sys::CUresult::CUDA_SUCCESS);
        StreamRef::Compute(stream.expose_provenance() as u64)
    };
    // SAFETY: the calls write one handle each. The context stays retained: the process ends soon.
    unsafe {
        assert_eq!(sys::cuCtxGetCurrent(&raw mut before), sys::CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuDeviceGet(&raw mut device, 0), sys::CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuDevicePrimaryCtxRetain(&raw mut context, device), sys::CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuCtxSetCurrent(context), sys::CUresult::CUDA_SUCCESS);
    }
    let streams = (0..count).map(make).collect();
    // SAFETY: what was current before.
    let restored = unsafe { sys::cuCtxSetCurrent(before) };
    assert_eq!(restored, sys::CUresult::CUDA_SUCCESS);
    streams
}

/// The event of a gate is used again by a gate of another, idle stream: that must not open the first one.
#[cfg(feature = "cuda")]
#[test]
fn a_gate_of_one_user_stream_is_not_opened_by_another() {
    const LEN: usize = 16 << 20;
    if !cuda_present() {
        return;
    }
    let device = device::open(DeviceChoice::Cuda(0)).expect("opens");
    let streams = user_streams(2);
    let (busy, idle) = (streams[0], streams[1]);
    let bench = Bench::new(device, 4 * LEN as u64);
    let frames = bench.frames(1, LEN as u64, &[(0, 1)]);
    let bytes = pattern(8, LEN);
    bench.set(0, &bytes);
    for use_passed in [false, true] {
        bench.fill(UP, frames.address(0), 0, LEN);
        bench.set(LEN, &vec![0; 2 * LEN]);
        bench.order(UP, busy);
        for _ in 0..64 {
            bench.copy(busy, bench.at(LEN), frames.address(0), LEN);
        }
        bench.copy(busy, frames.address(0), bench.at(0), LEN);
        bench.copy(busy, bench.at(LEN), frames.address(0), LEN);
        let gate = bench.device.record(busy).expect("recorded");
        for _ in 0..4096 {
            bench.device.record(idle).expect("recorded");
        }
        if use_passed {
            assert!(bench.device.block(gate, PATIENCE).expect("works"));
            assert!(bench.get(LEN, LEN) == bytes, "the gate opened too early");
        } else {
            bench.device.wait(DOWN, gate).expect("waits");
            bench.copy(DOWN, bench.at(2 * LEN), frames.address(0), LEN);
            bench.finish(DOWN);
            assert!(bench.get(2 * LEN, LEN) == bytes, "the wait ended too early");
        }
        bench.finish(busy);
    }
}

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
            if frames_first {
                drop(frames);
                drop(bench);
            } else {
                drop(bench);
                drop(frames);
            }
            // SAFETY: the copies are done, or this test fails; the region is alive.
            let arrived = unsafe { std::slice::from_raw_parts(region.as_ptr().add(len), len) };
            assert!(arrived == bytes, "what was enqueued was done");
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

#[test]
fn a_full_queue_makes_the_caller_wait_and_not_fail() {
    static LAST: AtomicU8 = AtomicU8::new(0);
    let (bench, gate) = held_down(100);
    // Up is held by Down, and more is enqueued than any queue holds.
    bench.device.wait(UP, gate).expect("enqueued");
    for i in 0..10_000 {
        bench.fill(UP, bench.at(0), (i % 251) as u8, 1);
        LAST.store((i % 251) as u8, Ordering::Relaxed);
    }
    bench.finish(UP);
    assert_eq!(bench.get(0, 1), [LAST.load(Ordering::Relaxed)]);
}

/// One step of a random program over a ring of 4 chunks.
#[derive(Clone, Debug)]
enum Step {
    Upload { unit: usize, at: usize, from: usize, len: usize },
    Download { unit: usize, at: usize, to: usize, len: usize },
    Fill { unit: usize, at: usize, byte: u8, len: usize },
}

const SPANS: [(u32, u32); 5] = [(0, 2), (2, 2), (3, 2), (1, 4), (2, 1)];
const HOST_HALF: usize = 64 << 10;

fn step() -> impl Strategy<Value = Step> {
    let place = (0..SPANS.len(), any::<usize>(), 0..HOST_HALF, 0..20_000usize);
    prop_oneof![
        place.clone().prop_map(|(unit, at, from, len)| Step::Upload { unit, at, from, len }),
        place.clone().prop_map(|(unit, at, to, len)| Step::Download { unit, at, to, len }),
        (place, any::<u8>()).prop_map(|((unit, at, _, len), byte)| Step::Fill { unit, at, byte, len }),
    ]
}

/// Runs the steps on the device, ordered by gates alone, and on plain memory.
fn run_against_model(bench: &Bench, steps: &[Step]) {
    let chunk = bench.device.granularity() as usize;
    let frames = bench.frames(4, chunk as u64, &SPANS);
    let sources = pattern(11, HOST_HALF);
    bench.set(0, &sources);
    bench.set(HOST_HALF, &vec![0; HOST_HALF]);
    bench.fill(UP, frames.address(3), 0, 4 * chunk);
    let (mut ring, mut arrived) = (vec![0u8; 4 * chunk], vec![0u8; HOST_HALF]);
    let place = |unit: usize, at: usize, byte: usize| (SPANS[unit].0 as usize * chunk + at + byte) % (4 * chunk);
    for step in steps {
        match *step {
            Step::Upload { unit, at, from, len } => {
                let (at, len) = clip(unit, at, len.min(HOST_HALF - from), chunk);
                bench.order(DOWN, UP);
                bench.copy(UP, frames.address(unit) + at as u64, bench.at(from), len);
                (0..len).for_each(|i| ring[place(unit, at, i)] = sources[from + i]);
            }
            Step::Download { unit, at, to, len } => {
                let (at, len) = clip(unit, at, len.min(HOST_HALF - to), chunk);
                bench.order(UP, DOWN);
                bench.copy(DOWN, bench.at(HOST_HALF + to), frames.address(unit) + at as u64, len);
                (0..len).for_each(|i| arrived[to + i] = ring[place(unit, at, i)]);
            }
            Step::Fill { unit, at, byte, len } => {
                let (at, len) = clip(unit, at, len, chunk);
                bench.order(DOWN, UP);
                bench.fill(UP, frames.address(unit) + at as u64, byte, len);
                (0..len).for_each(|i| ring[place(unit, at, i)] = byte);
            }
        }
    }
    bench.order(UP, DOWN);
    bench.finish(DOWN);
    assert!(bench.get(HOST_HALF, HOST_HALF) == arrived, "what was downloaded");
    // Unit 3 starts at chunk 1 and goes around the whole ring.
    ring.rotate_left(chunk);
    assert!(bench.read(frames.address(3), 4 * chunk) == ring, "what is in the ring");
}

/// A place and length that the unit has; every other place lies shortly before a border of chunks.
fn clip(unit: usize, at: usize, len: usize, chunk: usize) -> (usize, usize) {
    let chunks = SPANS[unit].1 as usize;
    let at = if at.is_multiple_of(2) { at % (chunks * chunk) } else { (1 + at % chunks) * chunk - (1 + at % 4000) };
    (at, len.min(chunks * chunk - at))
}

#[test]
fn random_programs_match_plain_memory() {
    on_every_device(|device| {
        let chunk = device.granularity();
        let bench = Bench::new(device, 2 * HOST_HALF as u64 + 4 * chunk);
        let config = ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() };
        proptest!(config, |(steps in prop::collection::vec(step(), 1..60))| {
            run_against_model(&bench, &steps);
        });
    });
}
