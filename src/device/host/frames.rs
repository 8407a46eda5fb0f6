//! Frames of the host device: many address ranges mapped onto one file in memory.
//!
//! F1: a range is mapped once, shared, and stays until the frames are dropped.
//! F2: behind every unit lies an inaccessible page, so an overrun faults instead of hitting its neighbour.
#![expect(unsafe_code, reason = "maps shared memory at addresses of its own choice")]

use std::{
    fs::File,
    io::Error as OsError,
    os::fd::{AsRawFd, FromRawFd},
    ptr::NonNull,
    sync::Arc,
};

use super::streams::Streams;
use crate::{
    device::{FrameSpan, Frames},
    error::{Code, Error, Result},
    memory::{NotForked, page_size},
    quantities::ByteCount,
};

/// One reservation that holds every unit's range.
pub(super) struct HostFrames {
    base: NonNull<u8>,
    len: usize,
    /// A child would share the bytes with its parent, and see them change.
    not_forked: Option<NotForked>,
    addresses: Box<[u64]>,
    /// Copies under way may still touch the frames.
    streams: Arc<Streams>,
}

// SAFETY: the frames only own the mappings; who may touch which bytes is decided by the runtime's gates.
unsafe impl Send for HostFrames {}
// SAFETY: as above; nothing is changed after creation.
unsafe impl Sync for HostFrames {}

/// The spans fit the ring; see [`crate::device::check_ring`].
pub(super) fn create(
    streams: Arc<Streams>,
    ring_chunks: u32,
    chunk_bytes: u64,
    spans: &[FrameSpan],
) -> Result<HostFrames> {
    let ring_bytes = u64::from(ring_chunks) * chunk_bytes;
    let ring = ring_file(ring_bytes)?;
    let page = page_size() as u64;
    let mapped: u64 = spans.iter().map(|span| u64::from(span.chunks) * chunk_bytes + page).sum();
    let len = mapped.max(page) as usize;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a fresh reservation; no existing memory is touched.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0) };
    if base == libc::MAP_FAILED {
        return Err(refused("reserve addresses for", ByteCount(mapped), &OsError::last_os_error()));
    }
    let base = NonNull::new(base.cast::<u8>())
        .ok_or_else(|| refused("reserve addresses for", ByteCount(mapped), &OsError::last_os_error()))?;
    let mut frames = HostFrames { base, len, not_forked: None, addresses: Box::default(), streams };
    let mut addresses = Vec::with_capacity(spans.len());
    let mut at = 0;
    for span in spans {
        addresses.push(frames.base.as_ptr().expose_provenance() as u64 + at);
        let before_end = span.chunks.min(ring_chunks.saturating_sub(span.first_chunk));
        let (first, rest) = (u64::from(before_end) * chunk_bytes, u64::from(span.chunks - before_end) * chunk_bytes);
        frames.map(&ring, at, u64::from(span.first_chunk) * chunk_bytes, first)?;
        frames.map(&ring, at + first, 0, rest)?;
        at += first + rest + page;
    }
    // After the last mapping: a fork would copy a range that is mapped later.
    frames.not_forked = Some(NotForked::new(frames.base.as_ptr(), len));
    frames.addresses = addresses.into_boxed_slice();
    Ok(frames)
}

/// The physical ring: a file in memory, whose pages are taken at first touch.
fn ring_file(bytes: u64) -> Result<File> {
    // SAFETY: the name is a C string; the call touches no memory of ours.
    let fd = unsafe { libc::memfd_create(c"funicular-frames".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(refused("create", ByteCount(bytes), &OsError::last_os_error()));
    }
    // SAFETY: the descriptor was just created and has no other owner.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes).map_err(|e| refused("size", ByteCount(bytes), &e))?;
    Ok(file)
}

fn refused(what: &str, bytes: ByteCount, cause: &OsError) -> Error {
    let errno = cause.raw_os_error().unwrap_or(0);
    let memory = "Lower budget.hbm, or raise the container's or user's memory limit (ulimit -v).";
    let action = match errno {
        libc::ENOMEM => memory.to_owned(),
        // The limit is on open files or the size of a file, not on memory.
        other => crate::os_error::advice(other, std::path::Path::new("/")).unwrap_or_else(|| memory.to_owned()),
    };
    Error::new(Code::HostAlloc, format!("the system refused to {what} {bytes} of frames of the host device: {cause}."))
        .errno(errno)
        .action(action)
}

impl HostFrames {
    /// Maps `bytes` of the ring from `offset` on at `at` bytes into the reservation.
    fn map(&self, ring: &File, at: u64, offset: u64, bytes: u64) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        // SAFETY: `create` sized the reservation to hold `at + bytes`.
        let place = unsafe { self.base.as_ptr().add(at as usize) };
        // SAFETY: replaces pages of our own reservation, which are not in use yet.
        let got = unsafe {
            let offset = offset as libc::off_t;
            libc::mmap(place.cast(), bytes as usize, protection, flags, ring.as_raw_fd(), offset)
        };
        if got == libc::MAP_FAILED { Err(refused("map", ByteCount(bytes), &OsError::last_os_error())) } else { Ok(()) }
    }
}

impl Frames for HostFrames {
    fn address(&self, unit: usize) -> u64 {
        self.addresses[unit]
    }
}

impl Drop for HostFrames {
    fn drop(&mut self) {
        if self.not_forked.as_ref().is_some_and(|range| !range.is_ours()) {
            return; // mapped by the parent: in this process the addresses stay reserved
        }
        self.streams.drain();
        // SAFETY: exactly the reservation made in `create`; the copy streams are empty and the owner gave the frames up.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}
