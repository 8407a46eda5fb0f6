//! Marks of the host device: the time at which the calling thread, or a copy stream's worker, came to them.

use std::time::Instant;

use parking_lot::Mutex;

use crate::device::marks::{Elapsed, MARKS, Mark};

/// The ring, by slot: when it was passed, in nanoseconds since `epoch`.
struct Ring {
    last: u64,
    passed: Box<[Option<i64>]>,
}

/// All marks of the device.
pub(super) struct Marks {
    epoch: Instant,
    ring: Mutex<Ring>,
}

impl Marks {
    pub(super) fn new() -> Self {
        let passed = vec![None; MARKS as usize].into_boxed_slice();
        Self { epoch: Instant::now(), ring: Mutex::new(Ring { last: 0, passed }) }
    }

    /// Makes the next mark, which no stream has passed yet.
    pub(super) fn make(&self) -> Mark {
        let mut ring = self.ring.lock();
        ring.last += 1;
        let mark = Mark::new(ring.last);
        ring.passed[mark.slot()] = None;
        mark
    }

    /// Notes that the calling thread has come to the mark, and when.
    pub(super) fn pass(&self, mark: Mark) {
        let mut ring = self.ring.lock();
        if mark.kept(ring.last) {
            ring.passed[mark.slot()] = i64::try_from(self.epoch.elapsed().as_nanos()).ok();
        }
    }

    pub(super) fn elapsed(&self, from: Mark, to: Mark) -> Elapsed {
        let ring = self.ring.lock();
        if !from.kept(ring.last) || !to.kept(ring.last) {
            return Elapsed::Lost;
        }
        match (ring.passed[from.slot()], ring.passed[to.slot()]) {
            (Some(from), Some(to)) => Elapsed::Nanos(to - from),
            _ => Elapsed::Pending,
        }
    }
}
