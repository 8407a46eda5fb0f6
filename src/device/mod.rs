//! The compute device behind one small trait: permanent addresses over aliased frames, copy streams, gates.
//!
//! D1: an address handed out by [`Frames::address`] is valid until the frames are dropped.
//! D2: copies on one stream run in the order in which they were enqueued.
//! D3: nothing is enqueued that waits for something not yet enqueued; a gate never recorded is an error.
//! D4: frames and registered regions go away only after the copy streams are empty, and words at which streams meet after these are past them.

#[cfg(feature = "cuda")]
pub mod cuda;
pub mod host;
mod lanes;
mod marks;
mod open;

use std::{sync::Arc, time::Duration};

#[cfg(feature = "cuda")]
pub use cuda::CudaDevice;
pub use host::HostDevice;
pub use lanes::{Lanes, Launch};
pub use marks::{Elapsed, MARKS, Mark};
pub use open::open;

pub use crate::model::{FrameSpan, staging_bytes};

use crate::{
    error::{Code, Error, Result},
    memory::HostRegion,
    optim::{Hyper, MeanPart, Span},
    quantities::ByteCount,
};

/// Which kind of device, as messages and statistics call it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// The processor itself: frames in shared memory, streams are worker threads.
    Host,
    /// A CUDA device of this ordinal.
    Cuda(u32),
}

/// Which device to open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first CUDA device if there is one, else the processor.
    #[default]
    Auto,
    /// The processor.
    Host,
    /// The CUDA device of this ordinal.
    Cuda(u32),
}

/// A stream of the runtime's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Host to device.
    Up,
    /// Device to host.
    Down,
    /// The stream the user computes on.
    Compute,
}

/// A stream to enqueue on: one of the two copy streams, or the user's, by its raw handle (0: the default stream).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamRef {
    /// Host to device.
    Up,
    /// Device to host.
    Down,
    /// The user's stream.
    Compute(u64),
}

impl StreamRef {
    /// Its role.
    pub const fn role(self) -> Role {
        match self {
            Self::Up => Role::Up,
            Self::Down => Role::Down,
            Self::Compute(_) => Role::Compute,
        }
    }
}

/// "Everything enqueued before this on that stream is done." Numbers of one role only grow; `seq` 0 has always passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gate {
    /// The role of the stream it was recorded on.
    pub role: Role,
    /// Its place in the sequence of that role.
    pub seq: u64,
}

impl Gate {
    /// A gate that has always been open.
    pub const OPEN: Self = Self { role: Role::Compute, seq: 0 };
}

/// As much as any wait of [`Device::meet`] is for. Devices compare cyclically, by the sign of the difference: to one that waits for a small number
/// the largest of 64 bits is less.
pub const PAST_ALL: u64 = i64::MAX.unsigned_abs();

/// Address ranges mapped once onto a ring of physical chunks.
pub trait Frames: Send + Sync {
    /// The permanent device address of unit number `unit` (the index into the spans given at creation); of no use where the
    /// span is empty.
    fn address(&self, unit: usize) -> u64;
}

/// What a compute device can do for the runtime.
///
/// Calls that take a stream only enqueue; they wait for the device only when a queue of thousands of operations is full.
/// On the host device [`StreamRef::Compute`] is the calling thread: what is asked of it is done when the call returns.
pub trait Device: Send + Sync {
    /// Which device this is.
    fn kind(&self) -> DeviceKind;

    /// Memory free on the device; none where the compute tier is host memory.
    ///
    /// # Errors
    /// `FN-E002` when the driver fails.
    fn free_memory(&self) -> Result<Option<ByteCount>>;

    /// Smallest size of a chunk in bytes; a power of two.
    fn granularity(&self) -> u64;

    /// Reserves one address range per span and maps it onto a ring of `ring_chunks` chunks of `chunk_bytes` each.
    ///
    /// # Errors
    /// `FN-E201` when a span is larger than the ring or the device has not that much memory, `FN-E002` when the driver
    /// fails, `FN-E204` from the host.
    ///
    /// # Panics
    /// If `chunk_bytes` is no multiple of the granularity, or a span that is not empty starts outside the ring.
    fn create_frames(&self, ring_chunks: u32, chunk_bytes: u64, spans: &[FrameSpan]) -> Result<Arc<dyn Frames>>;

    /// Makes a host region usable by the copy streams and readable by kernels at its own address. The device keeps the
    /// region alive and registered until the device is dropped.
    ///
    /// # Errors
    /// `FN-E002` when the driver refuses to page-lock it.
    fn register(&self, region: &Arc<HostRegion>) -> Result<()>;

    /// Makes `len` bytes of mapped, accessible host memory at `address` readable by kernels, until [`Device::hide`].
    /// Slow; not for the data path.
    ///
    /// # Errors
    /// `FN-E002` when the driver refuses.
    ///
    /// # Safety
    /// The range must stay mapped until it is hidden.
    #[expect(unsafe_code, reason = "the caller vouches for raw addresses")]
    unsafe fn expose(&self, address: u64, len: usize) -> Result<()>;

    /// Ends [`Device::expose`]; waits for the device.
    ///
    /// # Errors
    /// `FN-E002` when the driver refuses.
    fn hide(&self, address: u64) -> Result<()>;

    /// Enqueues a copy of `len` bytes between device addresses, registered regions, or both.
    ///
    /// # Safety
    /// Both ranges must stay valid, and free of conflicting access, until a gate recorded after this has passed.
    #[expect(unsafe_code, reason = "the caller vouches for raw addresses")]
    unsafe fn copy(&self, stream: StreamRef, dst: u64, src: u64, len: usize) -> Result<()>;

    /// Enqueues filling `len` bytes at a device address with `byte` (poison for released frames).
    ///
    /// # Safety
    /// As for [`Device::copy`].
    #[expect(unsafe_code, reason = "the caller vouches for raw addresses")]
    unsafe fn fill(&self, stream: StreamRef, dst: u64, byte: u8, len: usize) -> Result<()>;

    /// Gets ready for [`Device::adamw`]: what has to be compiled or loaded is, once.
    ///
    /// # Errors
    /// `FN-E003` when that is not possible.
    fn prepare_updates(&self) -> Result<()>;

    /// Enqueues the AdamW update of a span of this device's memory, or of memory it can reach; the bits are the same on every device.
    ///
    /// # Errors
    /// `FN-E112` for a type that is not trainable, those of [`Device::prepare_updates`].
    ///
    /// # Safety
    /// As for [`crate::optim::adamw`], until a gate recorded after this has passed.
    #[expect(unsafe_code, reason = "the caller vouches for raw addresses")]
    unsafe fn adamw(&self, stream: StreamRef, span: &Span, hyper: &Hyper) -> Result<()>;

    /// Gets ready for [`Device::mean`], as [`Device::prepare_updates`] does for updates.
    ///
    /// # Errors
    /// `FN-E003` when that is not possible.
    fn prepare_means(&self) -> Result<()>;

    /// Enqueues the mean of each part over so many ranks on the user's stream of this handle, in as few launches as there can be; the bits are the
    /// same on every device.
    ///
    /// # Errors
    /// Those of [`crate::optim::mean`], and of [`Device::prepare_means`].
    ///
    /// # Safety
    /// As for [`crate::optim::mean`], until a gate recorded after this has passed.
    #[expect(unsafe_code, reason = "the caller vouches for raw addresses")]
    unsafe fn mean(&self, stream: u64, parts: &[MeanPart], ranks: usize) -> Result<()>;

    /// Makes lanes, each with staging memory for [`staging_bytes`] of as many elements as one launch may have. The device keeps
    /// nothing of them.
    ///
    /// # Errors
    /// Those of [`Device::prepare_updates`], `FN-E201` when the device has not that much memory, `FN-E002` when the driver fails,
    /// `FN-E107` and `FN-E204` from the host.
    fn create_lanes(&self, count: usize, bytes_each: u64) -> Result<Arc<dyn Lanes>>;

    /// Records a gate on a stream. Gates of `Compute` may be recorded on different streams of the user.
    fn record(&self, stream: StreamRef) -> Result<Gate>;

    /// Makes later work on `stream` wait for `gate`. On the host device waiting on `Compute` blocks the caller.
    ///
    /// # Errors
    /// `FN-E102` for a gate that was never recorded; here and in [`Device::passed`] and [`Device::block`].
    fn wait(&self, stream: StreamRef, gate: Gate) -> Result<()>;

    /// True if the gate has passed.
    fn passed(&self, gate: Gate) -> Result<bool>;

    /// Blocks the calling thread until the gate has passed or the time is over; true if it has passed.
    fn block(&self, gate: Gate, timeout: Duration) -> Result<bool>;

    /// Makes a mark on a stream: its time is that at which everything enqueued before it is done. Costs a microsecond, waits for
    /// nothing.
    ///
    /// # Errors
    /// `FN-E002` when the driver fails.
    fn mark(&self, stream: StreamRef) -> Result<Mark>;

    /// The time from one mark to another, on the clock of the device.
    ///
    /// # Errors
    /// `FN-E002` when the driver fails.
    fn elapsed(&self, from: Mark, to: Mark) -> Result<Elapsed>;

    /// Enqueues storing `value` at `mine`, once all that was enqueued before is done, and then waiting until there is as much at each of
    /// `others`. Each is a word of 8 bytes in a registered region that only counts up, to [`PAST_ALL`] at most. False, and nothing is enqueued,
    /// where streams cannot wait for memory.
    ///
    /// # Errors
    /// `FN-E002` when the driver fails.
    ///
    /// # Safety
    /// The words stay valid until a gate recorded after this has passed.
    #[expect(unsafe_code, reason = "the caller vouches for raw addresses")]
    unsafe fn meet(&self, stream: StreamRef, value: u64, mine: u64, others: &[u64]) -> Result<bool>;

    /// Waits until both copy streams are empty.
    fn drain(&self);
}

/// What every device demands of a ring before it maps it.
fn check_ring(granularity: u64, ring_chunks: u32, chunk_bytes: u64, spans: &[FrameSpan]) -> Result<()> {
    assert!(chunk_bytes > 0 && chunk_bytes.is_multiple_of(granularity), "chunks of {chunk_bytes} bytes");
    for (unit, span) in spans.iter().enumerate() {
        if span.chunks > ring_chunks {
            let message = format!("unit {unit} needs {} chunks, the ring of frames has {ring_chunks}.", span.chunks);
            return Err(Error::new(Code::HbmBudget, message).action("Raise budget.hbm."));
        }
        let placed = span.chunks == 0 || span.first_chunk < ring_chunks;
        assert!(placed, "unit {unit} is placed at {span:?}");
    }
    Ok(())
}

/// A wait for this gate would never end.
fn unrecorded(gate: Gate, recorded: u64) -> Error {
    let message = format!("{:?} gate {} was never recorded; the last one is {recorded}.", gate.role, gate.seq);
    Error::new(Code::Stuck, message).action("This is a bug of funicular; please report it.")
}
