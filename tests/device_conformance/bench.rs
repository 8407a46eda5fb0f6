//! A device with registered host memory, and what the tests do with both.
#![expect(unsafe_code, reason = "copies between raw device addresses")]

use std::{sync::Arc, time::Duration};

use funicular::{
    device::{Device, FrameSpan, Frames, StreamRef},
    memory::HostRegion,
    quantities::ByteCount,
};

/// Long enough that only a hang reaches it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) const UP: StreamRef = StreamRef::Up;
pub(crate) const DOWN: StreamRef = StreamRef::Down;
pub(crate) const USER: StreamRef = StreamRef::Compute(0);

/// A device with registered host memory to copy from and to.
pub(crate) struct Bench {
    pub(crate) device: Arc<dyn Device>,
    pub(crate) region: Arc<HostRegion>,
}

impl Bench {
    pub(crate) fn new(device: Arc<dyn Device>, bytes: u64) -> Self {
        let region = HostRegion::new(ByteCount(bytes), "a test").expect("maps");
        device.register(&region).expect("registers");
        Self { device, region }
    }

    pub(crate) fn frames(&self, ring: u32, chunk_bytes: u64, spans: &[(u32, u32)]) -> Arc<dyn Frames> {
        let spans: Vec<_> = spans.iter().map(|&(first_chunk, chunks)| FrameSpan { first_chunk, chunks }).collect();
        self.device.create_frames(ring, chunk_bytes, &spans).expect("frames")
    }

    pub(crate) fn at(&self, offset: usize) -> u64 {
        assert!(offset <= self.region.len());
        self.region.as_ptr() as u64 + offset as u64
    }

    pub(crate) fn set(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.region.len());
        // SAFETY: inside the region; the tests wait for copies before they touch its bytes.
        unsafe { self.region.as_ptr().add(offset).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    pub(crate) fn get(&self, offset: usize, len: usize) -> Vec<u8> {
        assert!(offset + len <= self.region.len());
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(self.region.as_ptr().add(offset), len) }.to_vec()
    }

    pub(crate) fn copy(&self, stream: StreamRef, dst: u64, src: u64, len: usize) {
        // SAFETY: the tests copy inside frames and the region, which outlive the copies.
        unsafe { self.device.copy(stream, dst, src, len) }.expect("enqueued");
    }

    pub(crate) fn fill(&self, stream: StreamRef, dst: u64, byte: u8, len: usize) {
        // SAFETY: as above.
        unsafe { self.device.fill(stream, dst, byte, len) }.expect("enqueued");
    }

    pub(crate) fn finish(&self, stream: StreamRef) {
        let gate = self.device.record(stream).expect("recorded");
        assert!(self.device.block(gate, PATIENCE).expect("works"), "{stream:?} hangs");
    }

    /// `after` waits for all of `before`.
    pub(crate) fn order(&self, before: StreamRef, after: StreamRef) {
        let gate = self.device.record(before).expect("recorded");
        self.device.wait(after, gate).expect("waits");
    }

    /// Reads device memory back, through the end of the region.
    pub(crate) fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let scratch = self.region.len() - len;
        self.copy(DOWN, self.at(scratch), address, len);
        self.finish(DOWN);
        self.get(scratch, len)
    }
}

/// Bytes that differ everywhere and by seed.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

/// Smallest size of a chunk that holds `bytes`.
pub(crate) fn round_to(bytes: usize, granularity: u64) -> usize {
    bytes.next_multiple_of(granularity as usize)
}
