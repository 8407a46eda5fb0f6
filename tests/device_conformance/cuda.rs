//! What only a GPU can show. Every test here returns at once without one; `main.rs` says so.
#![expect(unsafe_code, reason = "makes streams through the driver")]

use cudarc::driver::sys;
use funicular::{
    device::{self, DeviceChoice, FrameSpan, StreamRef},
    error::Code,
};

use crate::{
    bench::{Bench, DOWN, PATIENCE, UP, pattern},
    cuda_present,
};

#[test]
fn more_memory_than_there_is_is_a_named_error() {
    if cuda_present() {
        let total = device::cuda::device_info(0).expect("described").total.0;
        let device = device::open(DeviceChoice::Cuda(0)).expect("opens");
        let span = FrameSpan { first_chunk: 0, chunks: 1 };
        let e = device.create_frames(1, 2 * total.next_power_of_two(), &[span]).err().expect("more than all");
        assert_eq!(e.code(), Code::HbmBudget, "{e}");
        // The device still works.
        let bench = Bench::new(device, 1 << 20);
        let frames = bench.frames(1, bench.device.granularity(), &[(0, 1)]);
        bench.fill(DOWN, frames.address(0), 9, 100);
        assert_eq!(bench.read(frames.address(0), 100), [9; 100]);
    }
}

/// Streams of a user's own, as torch makes them: they wait for nothing but what they are told to.
fn user_streams(count: usize) -> Vec<StreamRef> {
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
    for case in ["wait", "block", "later gate passed"] {
        bench.fill(UP, frames.address(0), 0, LEN);
        bench.set(LEN, &vec![0; 2 * LEN]);
        bench.order(UP, busy);
        for _ in 0..64 {
            bench.copy(busy, bench.at(LEN), frames.address(0), LEN);
        }
        bench.copy(busy, frames.address(0), bench.at(0), LEN);
        bench.copy(busy, bench.at(LEN), frames.address(0), LEN);
        let gate = bench.device.record(busy).expect("recorded");
        if case == "later gate passed" {
            bench.finish(idle);
        } else {
            // The last of these uses the event of `gate`.
            for _ in 0..4096 {
                bench.device.record(idle).expect("recorded");
            }
        }
        if case == "wait" {
            bench.device.wait(DOWN, gate).expect("waits");
            bench.copy(DOWN, bench.at(2 * LEN), frames.address(0), LEN);
            bench.finish(DOWN);
            assert!(bench.get(2 * LEN, LEN) == bytes, "the wait ended too early");
        } else {
            assert!(bench.device.block(gate, PATIENCE).expect("works"));
            assert!(bench.get(LEN, LEN) == bytes, "{case}: the gate opened too early");
        }
        bench.finish(busy);
    }
}

/// A stream waits for a word without a kernel, and stores its own when it comes there. No other stream stores the word that it waits for: a call of
/// another test that waits for the whole device would keep that from being enqueued.
#[test]
fn a_stream_meets_others_at_words_in_host_memory() {
    if !cuda_present() {
        return;
    }
    let device = device::open(DeviceChoice::Cuda(0)).expect("opens");
    let stream = user_streams(1)[0];
    let bench = Bench::new(device, 1 << 20);
    for value in 1_u64..20 {
        // SAFETY: words of the region, which outlives the stream's work: it is waited for below.
        if !unsafe { bench.device.meet(stream, value, bench.at(0), &[bench.at(64)]) }.expect("enqueued") {
            return; // the driver has no such waits
        }
        let gate = bench.device.record(stream).expect("recorded");
        let soon = std::time::Duration::from_millis(if value == 1 { 200 } else { 1 });
        assert!(!bench.device.block(gate, soon).expect("works"), "it has not waited");
        // More than is waited for will do.
        bench.set(64, &(value + value % 2).to_le_bytes());
        assert!(bench.device.block(gate, PATIENCE).expect("works"), "it waits for what has come");
        assert_eq!(bench.get(0, 8), value.to_le_bytes());
        bench.set(64, &value.to_le_bytes());
    }
    // SAFETY: as above.
    assert!(unsafe { bench.device.meet(stream, 20, bench.at(0), &[bench.at(64)]) }.expect("enqueued"));
    let gate = bench.device.record(stream).expect("recorded");
    bench.set(64, &device::PAST_ALL.to_le_bytes());
    assert!(bench.device.block(gate, PATIENCE).expect("works"), "that is past all");
}
