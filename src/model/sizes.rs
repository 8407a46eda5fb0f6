//! Sizes that the planner and those who carry a plan out agree on.

/// Elements per task of a parallel update: long enough for the prefetchers, short enough to balance the threads, and a
/// multiple of the elements of a cache line, so that threads share none where the arrays start on one.
pub const PIECE: usize = 32 * 1024;

/// The widest element with all that belongs to it: fp32 with gradient and moments, or fp16 with its master too.
const BYTES_PER_ELEM: u64 = 16;

/// Bytes of staging memory that `elems` elements of any type take; `elems` is a multiple of 128.
pub const fn staging_bytes(elems: u64) -> u64 {
    elems * BYTES_PER_ELEM
}

/// A unit's place in the ring of frames, in chunks; it may wrap around the end. No chunks: it has no frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameSpan {
    /// First chunk of the ring.
    pub first_chunk: u32,
    /// How many chunks.
    pub chunks: u32,
}
