//! Blocks at the seams of what is written out of order: kept until all of their bytes are there.

use std::collections::HashMap;

use crate::io::ALIGNMENT;

/// A block's bytes.
pub(super) type Block = [u8; ALIGNMENT];

/// Blocks of which some bytes are missing, by file and number.
#[derive(Debug, Default)]
pub(super) struct Edges(HashMap<(u32, u64), (Box<Block>, usize)>);

impl Edges {
    /// Adds bytes `at..` of a block of which `needed` bytes exist; the whole block if it is complete now.
    pub(super) fn add(&mut self, file: u32, block: u64, at: usize, bytes: &[u8], needed: usize) -> Option<Box<Block>> {
        let (kept, have) = self.0.entry((file, block)).or_insert_with(|| (Box::new([0; ALIGNMENT]), 0));
        kept[at..at + bytes.len()].copy_from_slice(bytes);
        *have += bytes.len();
        if *have < needed {
            return None;
        }
        self.0.remove(&(file, block)).map(|(kept, _)| kept)
    }

    /// Blocks that are not complete.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_comes_back_when_it_is_complete() {
        let mut edges = Edges::default();
        assert!(edges.add(0, 7, 4000, &[2; 96], ALIGNMENT).is_none());
        assert!(edges.add(1, 7, 0, &[9; 100], ALIGNMENT).is_none());
        let block = edges.add(0, 7, 0, &[1; 4000], ALIGNMENT).expect("complete");
        assert!(block[..4000].iter().all(|&b| b == 1) && block[4000..].iter().all(|&b| b == 2));
        assert_eq!(edges.len(), 1);
        assert!(edges.add(1, 7, 100, &[9; 20], 120).is_some(), "the last block of a file may be short");
    }
}
