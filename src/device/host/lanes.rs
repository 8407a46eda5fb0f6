//! Lanes of the host device: a worker thread each, which copies to memory of its own and back as a device would.
//!
//! They are slower than the pool that updates in place; they are there so that sharing an update is tested without a GPU.
#![expect(unsafe_code, reason = "copies between addresses that the caller vouched for")]

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

use super::streams::copy_here;
use crate::{
    device::lanes::{Lanes, Launch, Staged},
    dtype::StateKind,
    error::{Code, Error, Result},
    memory::HostRegion,
    optim::{Hyper, Span, Target, adamw},
    quantities::ByteCount,
};

/// Launches that one lane holds before the caller has to wait for room.
const CAPACITY: usize = 4;

struct State {
    queue: Vec<(Staged, Hyper)>,
    /// The first of the queue is at work.
    running: bool,
    closing: bool,
    failure: Option<Error>,
}

struct Lane {
    state: Mutex<State>,
    changed: Condvar,
    staging: Arc<HostRegion>,
}

/// The lanes of one host device.
pub(super) struct HostLanes {
    lanes: Vec<Arc<Lane>>,
    workers: Vec<JoinHandle<()>>,
}

impl HostLanes {
    pub(super) fn new(count: usize, bytes_each: u64) -> Result<Self> {
        let mut lanes = Self { lanes: Vec::with_capacity(count), workers: Vec::with_capacity(count) };
        for number in 0..count {
            let state = State { queue: Vec::with_capacity(CAPACITY), running: false, closing: false, failure: None };
            let lane = Arc::new(Lane {
                state: Mutex::new(state),
                changed: Condvar::new(),
                staging: HostRegion::new(ByteCount(bytes_each), "updates on the device")?,
            });
            lanes.lanes.push(Arc::clone(&lane));
            let worker = crate::os_error::start_thread(&format!("funicular-lane-{number}"), move || lane.serve());
            let worker = worker.map_err(|e| crate::os_error::no_thread(&format!("lane {number}"), &e, ""))?;
            lanes.workers.push(worker);
        }
        Ok(lanes)
    }
}

impl Lanes for HostLanes {
    fn count(&self) -> usize {
        self.lanes.len()
    }

    unsafe fn launch(&self, lane: usize, work: &Launch<'_>) -> Result<()> {
        let lane = &*self.lanes[lane];
        let staged = Staged::new(work, lane.staging.as_ptr() as u64, lane.staging.len() as u64)?;
        let mut state = lane.state.lock();
        while state.queue.len() == CAPACITY && state.failure.is_none() {
            lane.changed.wait(&mut state);
        }
        if let Some(error) = &state.failure {
            return Err(error.clone());
        }
        state.queue.push((staged, *work.hyper));
        lane.changed.notify_all();
        Ok(())
    }

    unsafe fn copy(&self, lane: usize, dst: u64, src: u64, len: usize) -> Result<()> {
        while !self.block(lane, Duration::MAX)? {}
        // SAFETY: the caller's contract.
        unsafe { copy_here(dst, src, len) };
        Ok(())
    }

    fn block(&self, lane: usize, timeout: Duration) -> Result<bool> {
        let lane = &*self.lanes[lane];
        let deadline = Instant::now().checked_add(timeout);
        let mut state = lane.state.lock();
        loop {
            if let Some(error) = &state.failure {
                return Err(error.clone());
            }
            if state.queue.is_empty() {
                return Ok(true);
            }
            match deadline {
                None => lane.changed.wait(&mut state),
                Some(at) if Instant::now() >= at => return Ok(false),
                Some(at) => drop(lane.changed.wait_until(&mut state, at)),
            }
        }
    }
}

impl Lane {
    fn serve(&self) {
        while let Some((staged, hyper)) = self.next() {
            // SAFETY: the caller of `launch` vouched for its addresses; the staging memory is this lane's alone.
            let outcome = catch_unwind(AssertUnwindSafe(|| unsafe { run(&staged, &hyper) }));
            let outcome = outcome.unwrap_or_else(|_| {
                Err(Error::new(Code::Panicked, "a thread that updates for the device panicked; its message is above."))
            });
            let mut state = self.state.lock();
            if let Err(error) = outcome {
                state.failure = Some(error);
                state.queue.clear();
            }
            drop(state);
            self.changed.notify_all();
        }
    }

    /// Ends the launch taken last and takes the next one; none at the end.
    fn next(&self) -> Option<(Staged, Hyper)> {
        let mut state = self.state.lock();
        if state.running && !state.queue.is_empty() {
            state.queue.remove(0);
        }
        state.running = false;
        self.changed.notify_all();
        loop {
            if let Some(&first) = state.queue.first() {
                state.running = true;
                return Some(first);
            }
            if state.closing {
                return None;
            }
            self.changed.wait(&mut state);
        }
    }
}

/// # Safety
/// As for [`Lanes::launch`], and no other thread uses the staging memory.
unsafe fn run(staged: &Staged, hyper: &Hyper) -> Result<()> {
    for copy in staged.up {
        // SAFETY: the caller's contract.
        unsafe { copy_here(copy.dst, copy.src, copy.len) };
    }
    let (from, to) = (&staged.span, &staged.to);
    let arrays = [
        (StateKind::Param, from.param as u64, to.param as u64),
        (StateKind::Master, from.master as u64, to.master as u64),
        (StateKind::ExpAvg, from.exp_avg as u64, to.exp_avg as u64),
        (StateKind::ExpAvgSq, from.exp_avg_sq as u64, to.exp_avg_sq as u64),
    ];
    for (kind, old, new) in arrays.into_iter().filter(|(_, old, new)| old != new) {
        // SAFETY: the caller's contract: both are valid, and disjoint as they are not the same.
        unsafe { copy_here(new, old, from.len * kind.element_size(from.dtype)) };
    }
    let Target { param, master, exp_avg, exp_avg_sq, second } = *to;
    // SAFETY: the arrays are filled: the lane's by the copies up, the others by those above.
    unsafe { adamw(&Span { param, master, exp_avg, exp_avg_sq, ..*from }, hyper) }?;
    if !second.is_null() {
        // SAFETY: as above.
        unsafe { copy_here(second as u64, param as u64, from.len * from.dtype.size()) };
    }
    for copy in staged.down {
        // SAFETY: the caller's contract.
        unsafe { copy_here(copy.dst, copy.src, copy.len) };
    }
    Ok(())
}

impl Drop for HostLanes {
    fn drop(&mut self) {
        for lane in &self.lanes {
            lane.state.lock().closing = true;
            lane.changed.notify_all();
        }
        for worker in self.workers.drain(..) {
            // The worker caught its own panic and recorded it as the failure.
            let _ = worker.join();
        }
    }
}
