//! Marks of a CUDA device: a ring of events that keep the time at which the GPU came to them.
#![expect(unsafe_code, reason = "calls into the CUDA driver")]

use std::{ptr, sync::Arc};

use cudarc::driver::sys::{CUevent, CUevent_flags, CUstream, CUstreamCaptureMode, CUstreamCaptureStatus};
use parking_lot::Mutex;

use super::driver::{Context, code};
use crate::{
    device::marks::{Elapsed, MARKS, Mark},
    error::Result,
};

/// All marks of the device.
pub(super) struct Marks {
    context: Arc<Context>,
    events: Vec<CUevent>,
    /// The newest mark. Held while an event is recorded or read, so that none is taken for another.
    last: Mutex<u64>,
}

// SAFETY: events may be used from any thread; the handles are never changed after creation.
unsafe impl Send for Marks {}
// SAFETY: as above.
unsafe impl Sync for Marks {}

impl Marks {
    pub(super) fn new(context: Arc<Context>) -> Result<Self> {
        let mut marks = Self { context, events: Vec::with_capacity(MARKS as usize), last: Mutex::new(0) };
        let context = Arc::clone(&marks.context);
        let _entered = context.enter()?;
        while marks.events.len() < MARKS as usize {
            let (mut event, flags) = (ptr::null_mut(), CUevent_flags::CU_EVENT_DEFAULT as std::ffi::c_uint);
            // SAFETY: writes one handle, which `drop` destroys.
            context.check(unsafe { context.driver.cuEventCreate(&raw mut event, flags) })?;
            marks.events.push(event);
        }
        Ok(marks)
    }

    /// Makes a mark on a stream; none on one whose work is being captured, where an event has no time.
    pub(super) fn make(&self, stream: CUstream) -> Result<Mark> {
        let context = &*self.context;
        let _entered = context.enter()?;
        let mut status = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE as std::ffi::c_int;
        // SAFETY: writes one integer; the stream is alive.
        context.check(unsafe { context.driver.cuStreamIsCapturing(stream, &raw mut status) })?;
        if status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE as std::ffi::c_int {
            return Ok(Mark::LOST);
        }
        let mut last = self.last.lock();
        let mark = Mark::new(*last + 1);
        // The slot's older mark is given up, also if this fails.
        *last += 1;
        // SAFETY: both handles are alive.
        context.check(unsafe { context.driver.cuEventRecord(self.events[mark.slot()], stream) })?;
        Ok(mark)
    }

    pub(super) fn elapsed(&self, from: Mark, to: Mark) -> Result<Elapsed> {
        let context = &*self.context;
        let _entered = context.enter()?;
        let last = self.last.lock();
        if !from.kept(*last) || !to.kept(*last) {
            return Ok(Elapsed::Lost);
        }
        let (from, to) = (self.events[from.slot()], self.events[to.slot()]);
        let mut millis = 0.0;
        // This query must not disturb a graph that the user captures on another thread.
        let mut mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: swaps the thread's mode with `mode`, here and back below.
        context.check(unsafe { context.driver.cuThreadExchangeStreamCaptureMode(&raw mut mode) })?;
        // SAFETY: both events are alive and were recorded, or the answer is an error; writes one number.
        let done = unsafe { context.driver.cuEventElapsedTime(&raw mut millis, from, to) };
        // SAFETY: as above.
        context.check(unsafe { context.driver.cuThreadExchangeStreamCaptureMode(&raw mut mode) })?;
        drop(last);
        match done {
            Err(failure) if failure.code == code::NOT_READY => Ok(Elapsed::Pending),
            // The record failed, or torch began a capture between the look and the record.
            Err(failure) if matches!(failure.code, code::INVALID_HANDLE | code::CAPTURED_EVENT) => Ok(Elapsed::Lost),
            other => {
                context.check(other)?;
                #[expect(clippy::cast_possible_truncation, reason = "nanoseconds of a float of milliseconds")]
                Ok(Elapsed::Nanos((f64::from(millis) * 1e6) as i64))
            }
        }
    }
}

impl Drop for Marks {
    fn drop(&mut self) {
        let context = &*self.context;
        let Ok(_entered) = context.enter() else { return };
        for &event in &self.events {
            // SAFETY: made in `new`, and no other code can name it. `drop` cannot return a failure.
            let _ = context.check(unsafe { context.driver.cuEventDestroy_v2(event) });
        }
    }
}
