//! Where each chunk lies. Pure arithmetic, done once.

use crate::{io::ALIGNMENT, quantities::round_up};

/// A chunk's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) file: u32,
    pub(super) offset: u64,
}

#[derive(Clone, Copy, Debug)]
struct Segment {
    bytes: u64,
    first: usize,
    chunks: u32,
}

/// Segments cut into chunks, chunks dealt round-robin to files, packed one after the other in each file.
#[derive(Debug)]
pub(super) struct Layout {
    chunk_bytes: u64,
    segments: Vec<Segment>,
    extents: Vec<Extent>,
    file_bytes: Vec<u64>,
}

impl Layout {
    pub(super) fn new(sizes: &[u64], chunk_bytes: u64, files: usize) -> Self {
        let mut layout =
            Self { chunk_bytes, segments: Vec::new(), extents: Vec::new(), file_bytes: vec![0; files.max(1)] };
        for &bytes in sizes {
            let chunks = u32::try_from(bytes.div_ceil(chunk_bytes)).unwrap_or(u32::MAX);
            layout.segments.push(Segment { bytes, first: layout.extents.len(), chunks });
            for chunk in 0..chunks {
                let file = layout.extents.len() % layout.file_bytes.len();
                let len = chunk_bytes.min(bytes - u64::from(chunk) * chunk_bytes);
                layout.extents.push(Extent { file: file as u32, offset: layout.file_bytes[file] });
                layout.file_bytes[file] += round_up(len, ALIGNMENT as u64);
            }
        }
        layout
    }

    pub(super) fn chunks(&self, segment: usize) -> u32 {
        self.segments[segment].chunks
    }

    pub(super) fn chunk_len(&self, segment: usize, chunk: u32) -> u64 {
        let segment = self.segments[segment];
        assert!(chunk < segment.chunks, "no such chunk");
        self.chunk_bytes.min(segment.bytes - u64::from(chunk) * self.chunk_bytes)
    }

    /// Bytes of a full chunk.
    pub(super) fn chunk_bytes(&self) -> u64 {
        self.chunk_bytes
    }

    /// Number of a chunk among all chunks.
    pub(super) fn chunk_index(&self, segment: usize, chunk: u32) -> usize {
        assert!(chunk < self.segments[segment].chunks, "no such chunk");
        self.segments[segment].first + chunk as usize
    }

    pub(super) fn extent(&self, segment: usize, chunk: u32) -> Extent {
        self.extents[self.chunk_index(segment, chunk)]
    }

    pub(super) fn chunk_count(&self) -> usize {
        self.extents.len()
    }

    /// Size of each file.
    pub(super) fn file_bytes(&self) -> &[u64] {
        &self.file_bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn chunks_cover_segments_and_never_overlap(
            sizes in prop::collection::vec(0u64..100_000, 0..12),
            chunk in 1u64..6,
            files in 1usize..4,
        ) {
            let chunk_bytes = chunk * 4096;
            let layout = Layout::new(&sizes, chunk_bytes, files);
            let mut taken: Vec<Vec<(u64, u64)>> = vec![Vec::new(); files];
            for (segment, &size) in sizes.iter().enumerate() {
                let lens: Vec<u64> = (0..layout.chunks(segment)).map(|c| layout.chunk_len(segment, c)).collect();
                prop_assert_eq!(lens.iter().sum::<u64>(), size);
                prop_assert!(lens.iter().rev().skip(1).all(|&len| len == chunk_bytes));
                for (chunk, len) in lens.iter().enumerate() {
                    let extent = layout.extent(segment, chunk as u32);
                    prop_assert_eq!(extent.offset % 4096, 0);
                    taken[extent.file as usize].push((extent.offset, extent.offset + round_up(*len, 4096)));
                }
            }
            for (file, mut ranges) in taken.into_iter().enumerate() {
                ranges.sort_unstable();
                prop_assert!(ranges.windows(2).all(|pair| pair[0].1 == pair[1].0));
                prop_assert_eq!(ranges.last().map_or(0, |last| last.1), layout.file_bytes()[file]);
            }
            let counts: Vec<usize> = (0..files)
                .map(|f| (0..sizes.len())
                    .flat_map(|s| (0..layout.chunks(s)).map(move |c| (s, c)))
                    .filter(|&(s, c)| layout.extent(s, c).file as usize == f).count())
                .collect();
            prop_assert!(counts.iter().max().unwrap_or(&0) - counts.iter().min().unwrap_or(&0) <= 1);
        }
    }
}
