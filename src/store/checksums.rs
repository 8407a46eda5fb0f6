//! One checksum per chunk: XXH3-64, in a table of fixed size that several threads may use at once, or several processes.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
};

use twox_hash::XxHash3_64;

use crate::memory::SharedWords;

/// The entry of a chunk that was never sealed; a sum that happens to be 0 is stored as 1.
const UNSEALED: u64 = 0;

/// The table. Without checksums it only remembers which chunks were sealed.
#[derive(Debug)]
pub(super) struct Checksums {
    sums: Sums,
    enabled: bool,
}

/// Where the table is.
#[derive(Debug)]
enum Sums {
    Own(Box<[AtomicU64]>),
    /// From this word on, one after the other.
    Shared(SharedWords, usize),
}

impl Sums {
    fn load(&self, chunk: usize) -> u64 {
        match self {
            Self::Own(sums) => sums[chunk].load(Ordering::Acquire),
            Self::Shared(words, first) => words.load(first + chunk),
        }
    }

    fn store(&self, chunk: usize, sum: u64) {
        match self {
            Self::Own(sums) => sums[chunk].store(sum, Ordering::Release),
            Self::Shared(words, first) => words.store(first + chunk, sum),
        }
    }
}

/// Why bytes are not those that were sealed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Mismatch {
    Sum { expected: u64, actual: u64 },
    NotZero { at: usize },
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sum { expected, actual } => {
                write!(f, "the checksum of what was written is {expected:016x}, of what was read {actual:016x}")
            }
            Self::NotZero { at } => write!(f, "never written, but byte {at} is not zero"),
        }
    }
}

impl Checksums {
    pub(super) fn new(chunks: usize, enabled: bool) -> Self {
        Self { sums: Sums::Own((0..chunks).map(|_| AtomicU64::new(UNSEALED)).collect()), enabled }
    }

    /// The table in words that several processes have, of which nothing else looks at those from `first` on: all zero to begin with.
    pub(super) fn shared(words: SharedWords, first: usize, enabled: bool) -> Self {
        Self { sums: Sums::Shared(words, first), enabled }
    }

    pub(super) fn seal(&self, chunk: usize, bytes: &[u8]) {
        let sum = if self.enabled { sum(bytes) } else { 1 };
        self.sums.store(chunk, sum);
    }

    pub(super) fn is_sealed(&self, chunk: usize) -> bool {
        self.sums.load(chunk) != UNSEALED
    }

    pub(super) fn verify(&self, chunk: usize, bytes: &[u8]) -> Result<(), Mismatch> {
        if !self.enabled {
            return Ok(());
        }
        match self.sums.load(chunk) {
            UNSEALED => bytes.iter().position(|&byte| byte != 0).map_or(Ok(()), |at| Err(Mismatch::NotZero { at })),
            expected => {
                let actual = sum(bytes);
                if actual == expected { Ok(()) } else { Err(Mismatch::Sum { expected, actual }) }
            }
        }
    }
}

fn sum(bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot(bytes).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_flipped_bit_is_found() {
        let table = Checksums::new(2, true);
        let mut bytes = vec![3u8; 5000];
        assert!(!table.is_sealed(1));
        table.seal(1, &bytes);
        assert!(table.is_sealed(1) && !table.is_sealed(0));
        assert_eq!(table.verify(1, &bytes), Ok(()));
        bytes[4999] ^= 0x80;
        assert!(matches!(table.verify(1, &bytes), Err(Mismatch::Sum { .. })));
        assert_eq!(table.verify(0, &bytes), Err(Mismatch::NotZero { at: 0 }));
        assert_eq!(table.verify(0, &[0; 100]), Ok(()));
    }

    #[test]
    fn without_checksums_only_sealing_is_remembered() {
        let table = Checksums::new(1, false);
        table.seal(0, b"a");
        assert!(table.is_sealed(0));
        assert_eq!(table.verify(0, b"b"), Ok(()));
    }
}
