//! Segments on files: which chunk of which segment lies where, and whether what is read is what was written.
//!
//! S1: a segment is cut into chunks, and chunks go round-robin over the paths; the layout never changes.
//! S2: a chunk is sealed (its checksum stored) before it is written, so that a lost or torn write is found by `verify`.
//! S3: a chunk never written reads as zeros.
//! S4: all space is reserved at the start and has no name: it is free again when the process is gone, however it went.
//! S5: of processes that have one store in common each writes chunks that are its own, or all while the others wait for it; what one has
//! written another reads when it was told that the write has ended.

mod checksums;
mod common;
mod layout;
mod owner;
mod room;
mod run_dir;

use std::{ops::Range, path::PathBuf, sync::Arc};

pub use common::Common;
pub use owner::{Owner, PrivateName};
pub use run_dir::RunDir;

use crate::{
    error::{Code, Error, Result},
    io::{
        ALIGNMENT, DirectIo, Direction, EngineOptions, FileId, IoCompletion, IoEngine, IoPart, IoRequest, OpenedEngine,
        Rejected, open_engine,
    },
    memory::HostRegion,
    quantities::{ByteCount, round_up},
    store::{
        checksums::Checksums,
        layout::Layout,
        room::{StorePath, make_room},
    },
};

/// A segment to make room for.
#[derive(Clone, Debug)]
pub struct SegmentSpec {
    /// What messages call it: `layers.7 exp_avg`.
    pub label: String,
    /// Bytes; 0 is allowed.
    pub bytes: u64,
}

/// What a store shall hold, and where.
#[derive(Debug)]
pub struct StoreSpec {
    /// Directories, at least one, best each on a drive of its own.
    pub paths: Vec<PathBuf>,
    /// Bytes of one chunk, a positive multiple of 4096.
    pub chunk_bytes: u64,
    /// The segments; their indices are the numbers used later.
    pub segments: Vec<SegmentSpec>,
    /// Whether chunks get checksums.
    pub checksums: bool,
    /// Whether to go around the page cache.
    pub direct: DirectIo,
    /// The engine.
    pub engine: EngineOptions,
    /// The most bytes that may be used on all paths together.
    pub budget: Option<ByteCount>,
    /// Where other processes have the same store.
    pub common: Option<Common>,
}

impl StoreSpec {
    /// Words that processes need to have such a store in common.
    pub fn common_words(paths: usize, chunk_bytes: u64, segments: impl Iterator<Item = u64>) -> usize {
        common::words(paths, Layout::new(&segments.collect::<Vec<_>>(), chunk_bytes, paths).chunk_count())
    }
}

/// A store at work, and what its user should know.
#[derive(Debug)]
pub struct OpenedStore {
    /// The store.
    pub store: Store,
    /// Fallbacks, left-overs removed, paths that share a drive; each a full line with its code.
    pub notes: Vec<String>,
}

/// Segments on one or more paths.
pub struct Store {
    // Dropped first: nothing is in flight when the files go.
    engine: Box<dyn IoEngine>,
    layout: Layout,
    labels: Vec<String>,
    checksums: Checksums,
    paths: Vec<StorePath>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let paths: Vec<_> = self.paths.iter().map(|path| &path.label).collect();
        f.debug_struct("Store").field("engine", &self.engine.kind()).field("paths", &paths).finish_non_exhaustive()
    }
}

impl Store {
    /// Makes room for the segments and starts the engine. `regions` and `sink` are those of [`open_engine`].
    ///
    /// # Errors
    /// `FN-E203` more than the budget; `FN-E605` not enough space; `FN-E603`, `FN-E604` a path that is no disk or cannot
    /// be used; `FN-E602`, `FN-E601` direct I/O or an engine that is required and does not work; `FN-E503` a chunk size
    /// that is no multiple of 4096, or no path.
    pub fn open(
        spec: StoreSpec,
        regions: &[Arc<HostRegion>],
        sink: impl Fn(IoCompletion) + Send + Sync + 'static,
    ) -> Result<OpenedStore> {
        let StoreSpec { paths, chunk_bytes, segments, checksums, direct, engine, budget, common } = spec;
        if paths.is_empty() {
            return Err(
                Error::new(Code::PolicyValue, "nvme.paths is empty.").action("Name a directory on a local drive.")
            );
        }
        if chunk_bytes == 0 || !chunk_bytes.is_multiple_of(ALIGNMENT as u64) {
            let message = format!("a chunk of {chunk_bytes} bytes is not a positive multiple of 4096.");
            return Err(Error::new(Code::PolicyValue, message).action("Choose one between 1 MiB and 64 MiB."));
        }
        let sizes: Vec<u64> = segments.iter().map(|segment| segment.bytes).collect();
        let layout = Layout::new(&sizes, chunk_bytes, paths.len());
        let need = layout.file_bytes().iter().sum();
        if let Some(budget) = budget
            && need > budget.0
        {
            let message = format!("{} segments need {} on NVMe, the budget is {budget}.", sizes.len(), ByteCount(need));
            return Err(Error::new(Code::NvmeBudget, message).action("Raise budget.nvme, or keep more in host memory."));
        }
        let (paths, files, mut notes) = match common.as_ref().and_then(Common::made_by) {
            None => make_room(paths, direct, layout.file_bytes())?,
            Some(maker) => maker.files(&paths, layout.file_bytes())?,
        };
        if let Some(common) = &common {
            common.show(&files);
        }
        let OpenedEngine { engine, notes: engine_notes } = open_engine(&engine, files, regions, sink)?;
        notes.extend(engine_notes);
        let checksums = match common {
            None => Checksums::new(layout.chunk_count(), checksums),
            Some(common) => common.checksums(paths.len(), checksums),
        };
        let labels = segments.into_iter().map(|segment| segment.label).collect();
        Ok(OpenedStore { store: Self { engine, layout, labels, checksums, paths }, notes })
    }

    /// The engine that serves the store.
    pub fn engine(&self) -> &dyn IoEngine {
        &*self.engine
    }

    /// Hands a request to the engine.
    ///
    /// # Errors
    /// Those of [`IoEngine::submit`].
    pub fn submit(&self, request: IoRequest) -> std::result::Result<(), Rejected> {
        self.engine.submit(request)
    }

    /// Bytes reserved on all paths together.
    pub fn reserved(&self) -> ByteCount {
        ByteCount(self.layout.file_bytes().iter().sum())
    }

    /// Bytes of a chunk that is not the last of its segment.
    pub fn chunk_bytes(&self) -> u64 {
        self.layout.chunk_bytes()
    }

    /// How many chunks a segment has.
    pub fn segment_chunks(&self, segment: usize) -> u32 {
        self.layout.chunks(segment)
    }

    /// Bytes of a segment's chunk `chunk`, without padding: all but the last are full.
    pub fn chunk_len(&self, segment: usize, chunk: u32) -> u64 {
        self.layout.chunk_len(segment, chunk)
    }

    /// Appends the transfers of some chunks of a segment, which lie one after the other in the lease from `lease_start`
    /// on. Lengths are rounded up to 4096; the padding is transferred too. Returns the bytes taken up in the lease.
    ///
    /// # Panics
    /// If the segment has no such chunks.
    pub fn parts(
        &self,
        segment: usize,
        chunks: Range<u32>,
        direction: Direction,
        lease_start: usize,
        parts: &mut Vec<IoPart>,
    ) -> usize {
        let mut start = lease_start;
        for chunk in chunks {
            let extent = self.layout.extent(segment, chunk);
            let len = round_up(self.layout.chunk_len(segment, chunk), ALIGNMENT as u64) as usize;
            parts.push(IoPart { direction, file: FileId(extent.file), offset: extent.offset, start, len });
            start += len;
        }
        start - lease_start
    }

    /// Notes what is about to be written to a chunk: `bytes` are its [`Self::chunk_len`] bytes.
    ///
    /// # Panics
    /// If the length is another.
    pub fn seal(&self, segment: usize, chunk: u32, bytes: &[u8]) {
        assert_eq!(bytes.len() as u64, self.chunk_len(segment, chunk), "a chunk is sealed as a whole");
        self.checksums.seal(self.layout.chunk_index(segment, chunk), bytes);
    }

    /// Compares what was read from a chunk with what was sealed; a chunk never sealed has to be zeros.
    ///
    /// # Errors
    /// `FN-E302` when it differs.
    ///
    /// # Panics
    /// If `bytes` has another length than the chunk.
    pub fn verify(&self, segment: usize, chunk: u32, bytes: &[u8]) -> Result<()> {
        assert_eq!(bytes.len() as u64, self.chunk_len(segment, chunk), "a chunk is verified as a whole");
        let Err(mismatch) = self.checksums.verify(self.layout.chunk_index(segment, chunk), bytes) else {
            return Ok(());
        };
        let extent = self.layout.extent(segment, chunk);
        let message = format!(
            "{}, chunk {chunk}, {} bytes at offset {} of {}: {mismatch}.",
            self.labels[segment],
            bytes.len(),
            extent.offset,
            self.paths[extent.file as usize].label,
        );
        Err(Error::new(Code::Corrupted, message)
            .action("The drive, its link or this machine's memory corrupts data: see dmesg and `smartctl -a`."))
    }

    /// Whether a chunk was ever sealed. One that was not needs no read: it is zeros.
    pub fn written(&self, segment: usize, chunk: u32) -> bool {
        self.checksums.is_sealed(self.layout.chunk_index(segment, chunk))
    }
}
