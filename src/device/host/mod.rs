//! The processor as a compute device: what the mechanisms are tested on, and what trains where there is no GPU.
//!
//! Owns the two worker threads and the registered regions. The user's stream is the calling thread itself: a gate
//! recorded on it has passed, waiting on it blocks, copying on it copies at once.
#![expect(unsafe_code, reason = "implements the unsafe calls of the trait")]

mod frames;
mod lanes;
mod marks;
mod streams;

use std::{
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use self::{
    lanes::HostLanes,
    streams::{Op, Streams},
};
use crate::{
    device::{Device, DeviceKind, Elapsed, FrameSpan, Frames, Gate, Lanes, Mark, Role, StreamRef, check_ring},
    error::Result,
    memory::{HostRegion, page_size},
    optim::{self, Hyper, MeanPart, Span},
    quantities::ByteCount,
};

/// The processor and its memory.
pub struct HostDevice {
    streams: Arc<Streams>,
    workers: Vec<JoinHandle<()>>,
    regions: Mutex<Vec<Arc<HostRegion>>>,
}

impl HostDevice {
    /// A device whose copies run as fast as memory allows.
    ///
    /// # Errors
    /// `FN-E204` when the system refuses a thread.
    pub fn new() -> Result<Self> {
        Self::with_caps(None, None)
    }

    /// A device whose copy streams move at most so many bytes per second, to provoke stalls.
    ///
    /// # Errors
    /// `FN-E204` when the system refuses a thread.
    pub fn with_caps(up: Option<f64>, down: Option<f64>) -> Result<Self> {
        let streams = Streams::new(up, down);
        let mut device = Self { streams, workers: Vec::with_capacity(2), regions: Mutex::default() };
        for role in [Role::Up, Role::Down] {
            let worker = device.streams.start(role)?;
            device.workers.extend(worker);
        }
        Ok(device)
    }
}

impl Device for HostDevice {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Host
    }

    fn free_memory(&self) -> Result<Option<ByteCount>> {
        Ok(None)
    }

    fn granularity(&self) -> u64 {
        page_size() as u64
    }

    fn create_frames(&self, ring_chunks: u32, chunk_bytes: u64, spans: &[FrameSpan]) -> Result<Arc<dyn Frames>> {
        check_ring(self.granularity(), ring_chunks, chunk_bytes, spans)?;
        Ok(Arc::new(frames::create(Arc::clone(&self.streams), ring_chunks, chunk_bytes, spans)?))
    }

    fn register(&self, region: &Arc<HostRegion>) -> Result<()> {
        self.regions.lock().push(Arc::clone(region));
        self.streams.check()
    }

    unsafe fn expose(&self, _address: u64, _len: usize) -> Result<()> {
        Ok(())
    }

    fn hide(&self, _address: u64) -> Result<()> {
        Ok(())
    }

    unsafe fn copy(&self, stream: StreamRef, dst: u64, src: u64, len: usize) -> Result<()> {
        match stream.role() {
            Role::Compute => {
                self.streams.check()?;
                // SAFETY: the caller vouches for both ranges.
                unsafe { streams::copy_here(dst, src, len) };
                Ok(())
            }
            role => self.streams.push(role, Op::Copy { dst, src, len }),
        }
    }

    unsafe fn fill(&self, stream: StreamRef, dst: u64, byte: u8, len: usize) -> Result<()> {
        match stream.role() {
            Role::Compute => {
                self.streams.check()?;
                // SAFETY: the caller vouches for the range.
                unsafe { streams::fill(dst, byte, len) };
                Ok(())
            }
            role => self.streams.push(role, Op::Fill { dst, byte, len }),
        }
    }

    fn prepare_updates(&self) -> Result<()> {
        Ok(())
    }

    unsafe fn adamw(&self, stream: StreamRef, span: &Span, hyper: &Hyper) -> Result<()> {
        match stream.role() {
            Role::Compute => {
                self.streams.check()?;
                // SAFETY: the caller's contract.
                unsafe { optim::adamw(span, hyper) }
            }
            _ if !span.dtype.trainable() => Err(optim::unsupported(span.dtype)),
            role => self.streams.push(role, Op::AdamW(*span, *hyper)),
        }
    }

    fn prepare_means(&self) -> Result<()> {
        Ok(())
    }

    unsafe fn mean(&self, _stream: u64, parts: &[MeanPart], ranks: usize) -> Result<()> {
        self.streams.check()?;
        // SAFETY: the caller's contract.
        unsafe { optim::mean(parts, ranks) }
    }

    fn create_lanes(&self, count: usize, bytes_each: u64) -> Result<Arc<dyn Lanes>> {
        Ok(Arc::new(HostLanes::new(count, bytes_each)?))
    }

    fn record(&self, stream: StreamRef) -> Result<Gate> {
        self.streams.record(stream.role())
    }

    fn wait(&self, stream: StreamRef, gate: Gate) -> Result<()> {
        if self.streams.passed(gate)? || gate.role == stream.role() {
            return Ok(());
        }
        match stream.role() {
            Role::Compute => self.streams.block(gate, None).map(drop),
            role => self.streams.push(role, Op::Wait(gate)),
        }
    }

    fn passed(&self, gate: Gate) -> Result<bool> {
        self.streams.passed(gate)
    }

    fn block(&self, gate: Gate, timeout: Duration) -> Result<bool> {
        // A time beyond the clock's range is no limit.
        self.streams.block(gate, Instant::now().checked_add(timeout))
    }

    fn mark(&self, stream: StreamRef) -> Result<Mark> {
        self.streams.mark(stream.role())
    }

    fn elapsed(&self, from: Mark, to: Mark) -> Result<Elapsed> {
        Ok(self.streams.marks.elapsed(from, to))
    }

    unsafe fn meet(&self, _stream: StreamRef, _value: u64, _mine: u64, _others: &[u64]) -> Result<bool> {
        Ok(false) // the user's stream is the calling thread
    }

    fn drain(&self) {
        self.streams.drain();
    }
}

impl Drop for HostDevice {
    fn drop(&mut self) {
        self.streams.close();
        for worker in self.workers.drain(..) {
            // The worker caught its own panic and recorded it as the failure.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    /// Waits for a failure without a clock in the assertion: the stream that fails has nothing else to do.
    fn failure(device: &HostDevice, gate: Gate) -> Code {
        device.block(gate, Duration::from_secs(60)).expect_err("the worker panicked").code()
    }

    #[test]
    fn a_panic_in_a_worker_surfaces_at_every_call_and_ends_every_wait() {
        let device = HostDevice::new().expect("starts");
        device.streams.push(Role::Up, Op::Panic).expect("enqueued");
        let gate = Gate { role: Role::Up, seq: 1 };
        // The worker may be faster: then the record already says so.
        if let Ok(recorded) = device.record(StreamRef::Up) {
            assert_eq!(recorded, gate);
            assert_eq!(failure(&device, gate), Code::Panicked);
        }
        for e in [
            device.wait(StreamRef::Down, gate).expect_err("failed"),
            device.wait(StreamRef::Compute(0), gate).expect_err("failed"),
            device.record(StreamRef::Down).expect_err("failed"),
            device.record(StreamRef::Compute(0)).expect_err("failed"),
            device.passed(Gate::OPEN).expect_err("failed"),
        ] {
            assert_eq!(e.code(), Code::Panicked);
        }
        device.drain();
    }

    #[test]
    fn a_panic_wakes_a_stream_that_waits_for_the_dead_one() {
        let device = HostDevice::with_caps(Some(1e6), None).expect("starts");
        let region = HostRegion::new(crate::quantities::ByteCount(200_000), "a test").expect("maps");
        let (src, dst) = (region.as_ptr() as u64, region.as_ptr() as u64 + 100_000);
        // SAFETY: both halves lie in the region, which outlives the device's work by `drop` order.
        unsafe { device.copy(StreamRef::Up, dst, src, 100_000).expect("enqueued") };
        device.streams.push(Role::Up, Op::Panic).expect("enqueued");
        // The copy holds the stream for 100 ms, so these are enqueued before the panic.
        let gate = device.record(StreamRef::Up).expect("enqueued");
        device.wait(StreamRef::Down, gate).expect("enqueued");
        let behind = device.record(StreamRef::Down).expect("enqueued");
        assert_eq!(failure(&device, behind), Code::Panicked);
        drop(device);
    }

    #[test]
    fn frames_outlive_their_device() {
        let device = HostDevice::new().expect("starts");
        let frames = device.create_frames(2, 4096, &[FrameSpan { first_chunk: 1, chunks: 2 }]).expect("maps");
        drop(device);
        assert_ne!(frames.address(0), 0);
        drop(frames);
    }
}
