//! Lanes of a CUDA device: a stream, an event and one chunk of device memory each.
#![expect(unsafe_code, reason = "calls into the CUDA driver")]

use std::{
    ffi::c_uint,
    ptr,
    sync::Arc,
    time::{Duration, Instant},
};

use cudarc::driver::sys::{CUevent, CUevent_flags, CUstream, CUstream_flags};

use super::{
    frames::CudaFrames,
    kernels::Kernels,
    streams::{self, Streams},
};
use crate::{
    device::{
        FrameSpan, Frames,
        lanes::{Copy, Lanes, Launch, Staged},
    },
    error::Result,
    optim::Hyper,
};

struct Lane {
    /// Null before it is made.
    stream: CUstream,
    /// Recorded behind each launch; null before it is made.
    ended: CUevent,
}

/// The lanes of one CUDA device. What is recorded here exists, so a half-made one drops cleanly.
pub(super) struct CudaLanes {
    streams: Arc<Streams>,
    kernels: Arc<Kernels>,
    staging: CudaFrames,
    bytes_each: u64,
    lanes: Vec<Lane>,
}

// SAFETY: streams and events may be used from any thread; the handles are never changed after creation.
unsafe impl Send for CudaLanes {}
// SAFETY: as above.
unsafe impl Sync for CudaLanes {}

impl CudaLanes {
    /// `bytes_each` is a multiple of the granularity of frames.
    pub(super) fn create(streams: Arc<Streams>, kernels: Arc<Kernels>, count: usize, bytes_each: u64) -> Result<Self> {
        let chunks = u32::try_from(count).unwrap_or(u32::MAX);
        let spans: Vec<FrameSpan> = (0..chunks).map(|first_chunk| FrameSpan { first_chunk, chunks: 1 }).collect();
        let staging = CudaFrames::create(Arc::clone(&streams), chunks, bytes_each, &spans)?;
        let mut lanes = Self { streams, kernels, staging, bytes_each, lanes: Vec::with_capacity(count) };
        for _ in 0..count {
            lanes.make()?;
        }
        Ok(lanes)
    }

    /// Of the highest priority: its kernels take microseconds, and the copies behind them should not wait for one of the user's.
    fn make(&mut self) -> Result<()> {
        let context = &*self.streams.context;
        let _entered = context.enter()?;
        let priority = context.first_priority()?;
        let flags =
            (CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint, CUevent_flags::CU_EVENT_DISABLE_TIMING as c_uint);
        let mut lane = Lane { stream: ptr::null_mut(), ended: ptr::null_mut() };
        // SAFETY: writes one handle, which `drop` destroys.
        let made = unsafe { context.driver.cuStreamCreateWithPriority(&raw mut lane.stream, flags.0, priority) };
        let made = context.check(made).and_then(|()| {
            // SAFETY: as above.
            context.check(unsafe { context.driver.cuEventCreate(&raw mut lane.ended, flags.1) })
        });
        self.lanes.push(lane);
        made
    }

    /// # Safety
    /// As for [`Lanes::launch`]; the context is entered.
    unsafe fn enqueue(&self, stream: CUstream, staged: &Staged, hyper: &Hyper) -> Result<()> {
        let context = &*self.streams.context;
        let copy = |copy: Copy| {
            if copy.len == 0 {
                return Ok(());
            }
            // SAFETY: the caller vouches for the host's range; the other one lies in the lane's memory; the stream is alive.
            context.check(unsafe { context.driver.cuMemcpyAsync(copy.dst, copy.src, copy.len, stream) })
        };
        staged.up.into_iter().try_for_each(copy)?;
        // SAFETY: what lies in the lane's memory only this stream touches; the caller vouches for the rest.
        unsafe { self.kernels.adamw(stream, &staged.span, &staged.to, hyper) }?;
        staged.down.into_iter().try_for_each(copy)
    }
}

impl Lanes for CudaLanes {
    fn count(&self) -> usize {
        self.lanes.len()
    }

    unsafe fn launch(&self, lane: usize, work: &Launch<'_>) -> Result<()> {
        let staged = Staged::new(work, self.staging.address(lane), self.bytes_each)?;
        let lane = &self.lanes[lane];
        let context = &*self.streams.context;
        let _entered = context.enter()?;
        // SAFETY: the caller's contract.
        let enqueued = unsafe { self.enqueue(lane.stream, &staged, work.hyper) };
        // Record also after a failure, so that `block` waits for what was enqueued before it.
        // SAFETY: both handles are alive.
        let recorded = context.check(unsafe { context.driver.cuEventRecord(lane.ended, lane.stream) });
        enqueued.and(recorded)
    }

    unsafe fn copy(&self, lane: usize, dst: u64, src: u64, len: usize) -> Result<()> {
        let lane = &self.lanes[lane];
        let context = &*self.streams.context;
        let _entered = context.enter()?;
        // SAFETY: the caller vouches for both ranges; the stream is alive.
        let enqueued = context.check(unsafe { context.driver.cuMemcpyAsync(dst, src, len, lane.stream) });
        // SAFETY: as in `launch`.
        let recorded = context.check(unsafe { context.driver.cuEventRecord(lane.ended, lane.stream) });
        enqueued.and(recorded)
    }

    fn block(&self, lane: usize, timeout: Duration) -> Result<bool> {
        let context = &*self.streams.context;
        // A time beyond the clock's range is no limit.
        streams::block(Instant::now().checked_add(timeout), || {
            let _entered = context.enter()?;
            // SAFETY: the event is alive; one that was never recorded is done.
            unsafe { context.done(self.lanes[lane].ended) }
        })
    }
}

impl Drop for CudaLanes {
    fn drop(&mut self) {
        let context = &*self.streams.context;
        let Ok(_entered) = context.enter() else { return };
        for lane in &self.lanes {
            // SAFETY: exactly what this value made, and no other code can name it; waited for, then destroyed. `drop` cannot return
            // a failure; the context remembers those that matter.
            unsafe {
                if !lane.stream.is_null() {
                    let _ = context.check(context.driver.cuStreamSynchronize(lane.stream));
                    let _ = context.check(context.driver.cuStreamDestroy_v2(lane.stream));
                }
                if !lane.ended.is_null() {
                    let _ = context.check(context.driver.cuEventDestroy_v2(lane.ended));
                }
            }
        }
    }
}
