//! Words at the head of memory that processes share, and the bell that wakes who waits for one of them.
#![expect(unsafe_code, reason = "looks at mapped memory as atomic words")]

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use rustix::thread::futex::{self, Flags, Timespec};

use super::HostRegion;

/// Words in a region. The first one is the bell.
#[derive(Debug)]
pub struct SharedWords {
    region: Arc<HostRegion>,
}

impl SharedWords {
    /// The words of a region, which nothing else looks at.
    pub fn new(region: Arc<HostRegion>) -> Self {
        Self { region }
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at < self.region.len() / 8, "word {at} outside the region");
        // SAFETY: inside the region, aligned as it is, and looked at by atomic operations alone, in every process.
        unsafe { &*self.region.as_ptr().cast::<AtomicU64>().add(at) }
    }

    /// Where a word is, for a device that stores and loads it as a whole.
    pub fn address(&self, at: usize) -> u64 {
        std::ptr::from_ref(self.word(at)).addr() as u64
    }

    /// Their memory, for a device to register.
    pub fn region(&self) -> &Arc<HostRegion> {
        &self.region
    }

    /// The value of a word, with all that its writer did before it stored that.
    pub fn load(&self, at: usize) -> u64 {
        self.word(at).load(Ordering::Acquire)
    }

    /// Stores a word, after all that this thread did before.
    pub fn store(&self, at: usize, value: u64) {
        self.word(at).store(value, Ordering::Release);
    }

    fn bell(&self) -> &AtomicU32 {
        // SAFETY: the first half of the first word, which only this function looks at.
        unsafe { &*self.region.as_ptr().cast::<AtomicU32>() }
    }

    /// Wakes all who wait in [`Self::wait`], in every process.
    pub fn ring(&self) {
        self.bell().fetch_add(1, Ordering::AcqRel);
        // Nothing depends on it: who waits looks again by itself.
        let _ = futex::wake(self.bell(), Flags::empty(), u32::MAX >> 1);
    }

    /// How often the bell was rung: read before a look at other words, and given to [`Self::wait`].
    pub fn rung(&self) -> u32 {
        self.bell().load(Ordering::Acquire)
    }

    /// Waits until the bell has been rung since `rung`, or the time is over.
    pub fn wait(&self, rung: u32, time: Duration) {
        let time = Timespec { tv_sec: time.as_secs().cast_signed(), tv_nsec: time.subsec_nanos().into() };
        // Awake for any reason, the caller looks again.
        let _ = futex::wait(self.bell(), Flags::empty(), rung, Some(&time));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::{memory::SharedFile, quantities::ByteCount};

    #[test]
    fn a_bell_wakes_who_waits_at_another_mapping() {
        let file = SharedFile::create(4096).expect("makes");
        let words = || SharedWords::new(HostRegion::of_file(&file, 0, ByteCount(4096), "a test").expect("maps"));
        let (mine, theirs) = (words(), words());
        let long = Duration::from_secs(20);
        let began = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut rung = theirs.rung();
                while theirs.load(3) == 0 {
                    theirs.wait(rung, long);
                    rung = theirs.rung();
                }
                theirs.store(4, theirs.load(3) + 1);
                theirs.ring();
            });
            mine.store(3, 5);
            mine.ring();
            let mut rung = mine.rung();
            while mine.load(4) == 0 {
                mine.wait(rung, long);
                rung = mine.rung();
            }
        });
        assert!(mine.load(4) == 6 && began.elapsed() < long, "no thread waited until the time was over");
        mine.wait(mine.rung().wrapping_sub(1), long);
        mine.wait(mine.rung(), Duration::from_millis(1));
    }
}
