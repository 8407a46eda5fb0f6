//! Which pieces of a set of updates are still to be had.

use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

use crate::runtime::update::update_on::UpdateOn;

/// Which pieces are still to be had: from `front` to `back`, both in one word.
pub(super) struct Claims {
    left: AtomicU64,
    /// The processor takes none from here on.
    pub(super) processors: u32,
    /// Lanes take none before this.
    lanes: u32,
}

impl Claims {
    pub(super) fn new(pieces: u32, update_on: UpdateOn) -> Self {
        let (processors, lanes) = match update_on {
            UpdateOn::Cpu => (pieces, pieces),
            UpdateOn::Gpu => (0, 0),
            UpdateOn::Both => (pieces, 0),
            UpdateOn::Halves => (pieces / 2, pieces / 2),
        };
        Self { left: AtomicU64::new(Self::pack(0, pieces)), processors, lanes }
    }

    fn pack(front: u32, back: u32) -> u64 {
        u64::from(front) << 32 | u64::from(back)
    }

    #[expect(clippy::cast_possible_truncation, reason = "the two halves of a word")]
    fn unpack(word: u64) -> (u32, u32) {
        ((word >> 32) as u32, word as u32)
    }

    pub(super) fn left(&self) -> u32 {
        let (front, back) = Self::unpack(self.left.load(Ordering::Relaxed));
        back - front
    }

    /// Claims the first piece for the processor.
    pub(super) fn first(&self) -> Option<u32> {
        let claim = |word| {
            let (front, back) = Self::unpack(word);
            (front < back.min(self.processors)).then(|| Self::pack(front + 1, back))
        };
        let before = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, claim);
        before.ok().map(|word| Self::unpack(word).0)
    }

    /// Claims the last pieces for a lane, from the one that `start` says for an end, or from the first that is left.
    pub(super) fn last(&self, start: impl Fn(u32) -> u32) -> Option<Range<u32>> {
        let of = |word| {
            let (front, back) = Self::unpack(word);
            let least = front.max(self.lanes);
            (least < back).then(|| (front, start(back).max(least)..back))
        };
        let claim = |word| of(word).map(|(front, pieces)| Self::pack(front, pieces.start));
        let before = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, claim);
        before.ok().and_then(of).map(|(_, pieces)| pieces)
    }
}
