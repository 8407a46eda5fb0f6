//! Moves bytes between host slots and files, many at a time, without ever making the caller wait for a disk.
//!
//! I1: the engine owns the lease of a request until no part of it is in flight; then it comes back, error or not.
//! I2: a request completes exactly once. Success means that every byte of every part was transferred.
//! I3: dropping an engine first lets what is in flight finish; what was not begun comes back as `FN-E104`.
//! I4: an error names the file, the place, the direction and the system's error number.
//! I5: in steady state nothing is allocated: the parts' vector travels with the request and comes back.

mod fault;
mod file;
mod probe;
mod requests;
mod threads;
mod transfer;
mod uring;

use std::sync::Arc;

pub use fault::{Fault, Faults, Rule};
pub use file::{
    DirectIo, DirectoryProbe, FileSystem, IoFile, allocate, device_number, free_bytes, probe_directory, reads_direct,
    reopened_file, scratch_file, takes_direct,
};
pub(crate) use file::{disk_full, random, unusable};
pub use probe::{OpenedEngine, open_engine};

use crate::{error::Error, memory::SlotLease};

/// What direct I/O needs of offsets, lengths and addresses, everywhere in this crate.
pub const ALIGNMENT: usize = 4096;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// File to host slot.
    Read,
    /// Host slot to file.
    Write,
}

/// Index of a file in the list given to [`open_engine`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId(pub u32);

impl FileId {
    /// As an index into the list of files.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// One contiguous transfer within a request. For a file opened for direct I/O all three numbers are multiples of 4096.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoPart {
    /// Read or write.
    pub direction: Direction,
    /// The file.
    pub file: FileId,
    /// Byte offset in the file.
    pub offset: u64,
    /// Byte offset in the lease.
    pub start: usize,
    /// Bytes.
    pub len: usize,
}

/// Several transfers into or out of one slot, in no particular order. The lease comes back with the completion.
#[derive(Debug)]
pub struct IoRequest {
    /// The caller's name for it.
    pub ticket: u64,
    /// The memory; the engine's until completion.
    pub lease: SlotLease,
    /// What to transfer. Returned with the completion so that the caller can reuse the vector.
    pub parts: Vec<IoPart>,
}

/// A finished request.
#[derive(Debug)]
pub struct IoCompletion {
    /// The caller's name for it.
    pub ticket: u64,
    /// The memory, the caller's again. After a failed read its contents are unspecified.
    pub lease: SlotLease,
    /// The parts as they were given.
    pub parts: Vec<IoPart>,
    /// Whether every byte was transferred.
    pub result: Result<(), Error>,
    /// Nanoseconds from the beginning of its first block to its completion; how long it waited for a place in the queue is not in it.
    pub nanos: u64,
}

/// A request that was not accepted; nothing of it was begun.
#[derive(Debug)]
pub struct Rejected {
    /// The request as it was given.
    pub request: IoRequest,
    /// Why.
    pub error: Error,
}

/// Which engine is at work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineKind {
    /// Linux io_uring, one thread.
    IoUring,
    /// A pool of threads that read and write.
    Threads,
}

impl EngineKind {
    /// The name used in policies, messages and statistics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::IoUring => "io_uring",
            Self::Threads => "threads",
        }
    }
}

/// Which engine is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// io_uring if it works here, else threads.
    #[default]
    Auto,
    /// io_uring or an error.
    IoUring,
    /// Threads.
    Threads,
}

/// How an engine is set up.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Which engine.
    pub choice: EngineChoice,
    /// Blocks in flight at once, 1 to 4096.
    pub queue_depth: u32,
    /// Parts are split into blocks of this many bytes (rounded up to 4096) to fill the queue.
    pub block: usize,
    /// Threads of the engine `threads`; at most `queue_depth` are started.
    pub threads: u32,
    /// Faults to inject; off unless a rule is added.
    pub faults: Arc<Faults>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            choice: EngineChoice::Auto,
            queue_depth: 32,
            block: 1 << 20,
            threads: 16,
            faults: Arc::new(Faults::default()),
        }
    }
}

/// Where completions go: called on a thread of the engine (also while the engine is being dropped), so it must be
/// quick, must not wait for the engine, and must not panic.
pub type Sink = Arc<dyn Fn(IoCompletion) + Send + Sync>;

/// A machine that carries out requests.
pub trait IoEngine: Send + Sync {
    /// Hands a request over; returns at once, without waiting for the disk. Callable from any thread.
    ///
    /// # Errors
    /// The request comes back if its parts do not fit the lease, the files or the alignment (`FN-E301`), or if the
    /// engine has stopped (`FN-E104`).
    fn submit(&self, request: IoRequest) -> Result<(), Rejected>;

    /// Which engine this is.
    fn kind(&self) -> EngineKind;
}
