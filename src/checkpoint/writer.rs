//! Writes files at any offsets in any order, by direct I/O, through a few frames.
//!
//! W1: no more memory than the frames, and a block per seam between pieces written out of order. W2: after `finish` every
//! byte is durable.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    time::Duration,
};

use crossbeam::channel::{Receiver, RecvTimeoutError, unbounded};

use crate::{
    checkpoint::{
        control::Control,
        edges::Edges,
        refused::{as_write_error, unwritable},
    },
    error::{Code, Error, Result},
    io::{
        ALIGNMENT, Direction, EngineOptions, FileId, IoCompletion, IoEngine, IoFile, IoPart, IoRequest, OpenedEngine,
        allocate, open_engine, takes_direct,
    },
    memory::{SlotLease, SlotPool},
    quantities::{ByteCount, round_up},
};

const BLOCK: u64 = ALIGNMENT as u64;

/// How a writer or a reader works: its I/O engine, and the memory that it may take.
#[derive(Clone, Debug)]
pub struct FrameBudget {
    /// The I/O engine.
    pub engine: EngineOptions,
    /// Whether to go around the page cache where that works.
    pub direct: bool,
    /// Frames.
    pub frames: u32,
    /// Bytes of a frame, a multiple of 4096.
    pub frame: u64,
}

impl FrameBudget {
    /// Bytes of all frames.
    pub fn bytes(&self) -> u64 {
        u64::from(self.frames) * self.frame
    }
}

struct Target {
    file: File,
    bytes: u64,
    label: String,
}

/// What is being filled: bytes `start..end` of a frame, which begins at byte `base` of a file.
struct Filling {
    lease: SlotLease,
    file: u32,
    base: u64,
    start: usize,
    end: usize,
}

/// The writer.
pub struct Writer<'a> {
    // Dropped first: nothing is in flight when the frames go.
    engine: Box<dyn IoEngine>,
    done: Receiver<IoCompletion>,
    pool: SlotPool,
    files: Vec<Target>,
    filling: Option<Filling>,
    next: (u32, u64),
    edges: Edges,
    in_flight: u32,
    control: &'a Control,
}

impl<'a> Writer<'a> {
    /// Makes the files, of full size, in `dir`.
    ///
    /// # Errors
    /// `FN-E401` without room, `FN-E403` when the system refuses, `FN-E409` without memory.
    pub fn create(dir: &Path, files: &[(&str, u64)], budget: &FrameBudget, control: &'a Control) -> Result<Self> {
        let direct = budget.direct && takes_direct(dir);
        let mut targets = Vec::with_capacity(files.len());
        let mut opened = Vec::with_capacity(files.len());
        for &(name, bytes) in files {
            let path = dir.join(name);
            let flags = if direct { libc::O_DIRECT } else { 0 };
            let open = || OpenOptions::new().write(true).create_new(true).custom_flags(flags).open(&path);
            let file = open().map_err(|e| unwritable(&path, &e))?;
            allocate(&file, round_up(bytes, BLOCK), dir).map_err(|e| as_write_error(&path, &e))?;
            let label = path.display().to_string();
            opened.push(IoFile::new(file.try_clone().map_err(|e| unwritable(&path, &e))?, label.as_str(), direct));
            targets.push(Target { file, bytes, label });
        }
        let pool = frames(budget)?;
        let (sender, done) = unbounded();
        let sink = move |completion| {
            // The receiver is gone only after the writer gave up.
            let _ = sender.send(completion);
        };
        let OpenedEngine { engine, .. } = open_engine(&budget.engine, opened, &[pool.region().clone()], sink)?;
        let (filling, edges) = (None, Edges::default());
        Ok(Self { engine, done, pool, files: targets, filling, next: (0, 0), edges, in_flight: 0, control })
    }

    /// What is given next goes to this place.
    ///
    /// # Errors
    /// Those of a write begun earlier.
    pub fn seek(&mut self, file: u32, offset: u64) -> Result<()> {
        if self.next != (file, offset) {
            self.flush()?;
            self.next = (file, offset);
        }
        Ok(())
    }

    /// Memory for the next bytes, not empty before the end of the file.
    ///
    /// # Errors
    /// Those of a write begun earlier; `FN-E412` once an end was asked for.
    pub fn room(&mut self) -> Result<&mut [u8]> {
        if self.filling.as_ref().is_some_and(|w| w.end == w.lease.len()) {
            self.flush()?;
        }
        let (file, offset) = self.next;
        if self.filling.is_none() {
            let base = offset / BLOCK * BLOCK;
            let start = (offset - base) as usize;
            self.filling = Some(Filling { lease: self.frame()?, file, base, start, end: start });
        }
        let left = (self.files[file as usize].bytes - offset) as usize;
        let lost = || Error::new(Code::Stale, "a checkpoint's frame is lost.");
        let filling = self.filling.as_mut().ok_or_else(lost)?;
        let (end, most) = (filling.end, filling.lease.len().min(filling.end + left));
        Ok(&mut filling.lease.bytes()[end..most])
    }

    /// So many bytes of [`Self::room`] were filled.
    pub fn advance(&mut self, bytes: usize) {
        if let Some(filling) = &mut self.filling {
            filling.end += bytes;
        }
        self.next.1 += bytes as u64;
        self.control.moved(bytes as u64);
    }

    /// Writes some bytes at the place at hand.
    ///
    /// # Errors
    /// As [`Self::room`].
    pub fn put(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let room = self.room()?;
            let n = room.len().min(bytes.len());
            room[..n].copy_from_slice(&bytes[..n]);
            self.advance(n);
            bytes = &bytes[n..];
        }
        Ok(())
    }

    /// Hands the frame at hand to the engine: whole blocks of it, and what completes a seam.
    fn flush(&mut self) -> Result<()> {
        let Some(Filling { mut lease, file, base, start, end }) = self.filling.take() else { return Ok(()) };
        let file_bytes = self.files[file as usize].bytes;
        let needed = |block: usize| BLOCK.min(file_bytes - (base + block as u64 * BLOCK)) as usize;
        let (mut from, mut to) = (start.div_ceil(ALIGNMENT), end / ALIGNMENT);
        let frame = lease.bytes();
        let mut seams = [start / ALIGNMENT, end / ALIGNMENT].to_vec();
        seams.dedup();
        for block in seams {
            let at = block * ALIGNMENT;
            let (first, last) = (start.max(at), end.min(at + ALIGNMENT));
            if first >= last || last - first == ALIGNMENT {
                continue;
            }
            let number = base / BLOCK + block as u64;
            let whole = self.edges.add(file, number, first - at, &frame[first..last], needed(block));
            if let Some(whole) = whole {
                frame[at..at + ALIGNMENT].copy_from_slice(&*whole);
                from = from.min(block);
                to = to.max(block + 1);
            }
        }
        if from >= to {
            return Ok(());
        }
        let part = IoPart {
            direction: Direction::Write,
            file: FileId(file),
            offset: base + (from * ALIGNMENT) as u64,
            start: from * ALIGNMENT,
            len: (to - from) * ALIGNMENT,
        };
        let request = IoRequest { ticket: 0, lease, parts: vec![part] };
        self.engine.submit(request).map_err(|rejected| rejected.error)?;
        self.in_flight += 1;
        Ok(())
    }

    fn frame(&mut self) -> Result<SlotLease> {
        loop {
            self.control.check()?;
            if let Some(lease) = self.pool.lease() {
                return Ok(lease);
            }
            self.wait_one()?;
        }
    }

    /// Waits for the end of one write.
    fn wait_one(&mut self) -> Result<()> {
        let done = next_done(&self.done, self.control)?;
        self.in_flight -= 1;
        let path = self.files.first().map_or(Path::new(""), |target| Path::new(&target.label));
        done.result.map_err(|e| as_write_error(path, &e))
    }

    /// Writes what is left and makes everything durable.
    ///
    /// # Errors
    /// `FN-E401`, `FN-E403`.
    pub fn finish(mut self) -> Result<()> {
        self.flush()?;
        while self.in_flight > 0 {
            self.wait_one()?;
        }
        if self.edges.len() > 0 {
            return Err(Error::new(Code::Stale, "parts of a checkpoint were never given to its writer."));
        }
        for Target { file, bytes, label } in &self.files {
            self.control.check()?;
            file.set_len(*bytes).and_then(|()| file.sync_all()).map_err(|e| unwritable(Path::new(label), &e))?;
        }
        Ok(())
    }
}

/// The frames that a budget allows.
pub(super) fn frames(budget: &FrameBudget) -> Result<SlotPool> {
    SlotPool::new(budget.frames, ByteCount(budget.frame), "checkpoints")
}

/// The next completion, as long as no end was asked for.
pub(super) fn next_done(done: &Receiver<IoCompletion>, control: &Control) -> Result<IoCompletion> {
    loop {
        match done.recv_timeout(Duration::from_millis(50)) {
            Ok(completion) => return Ok(completion),
            Err(RecvTimeoutError::Timeout) => control.check()?,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::new(Code::Panicked, "the I/O engine of a checkpoint is gone."));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn budget(direct: bool) -> FrameBudget {
        FrameBudget { engine: EngineOptions::default(), direct, frames: 2, frame: 3 * BLOCK }
    }

    fn byte(file: usize, at: usize) -> u8 {
        (at.wrapping_mul(31) ^ (at >> 8) ^ (file * 77)) as u8
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn pieces_in_any_order_make_the_files(
            cuts in prop::collection::vec(1usize..30_000, 1..8),
            seed in any::<u64>(),
            direct in any::<bool>(),
        ) {
            let dir = tempfile::tempdir_in(".").expect("a directory");
            let total: usize = cuts.iter().sum();
            let mut pieces = Vec::new();
            for file in 0..2usize {
                let mut at = 0;
                for &n in &cuts {
                    pieces.push((file, at, n));
                    at += n;
                }
            }
            // A cheap shuffle.
            pieces.sort_by_key(|&(f, at, _)| (f as u64 * 31 + at as u64 * 17).wrapping_mul(seed | 1) >> 7);
            let control = Control::default();
            let files = [("a", total as u64), ("b", total as u64)];
            let mut writer = Writer::create(dir.path(), &files, &budget(direct), &control).expect("makes");
            for (file, at, n) in pieces {
                writer.seek(file as u32, at as u64).expect("seeks");
                let bytes: Vec<u8> = (at..at + n).map(|i| byte(file, i)).collect();
                writer.put(&bytes).expect("writes");
            }
            writer.finish().expect("ends");
            for (file, (name, bytes)) in files.iter().enumerate() {
                let read = std::fs::read(dir.path().join(name)).expect("reads");
                prop_assert_eq!(read.len() as u64, *bytes);
                prop_assert!(read.iter().enumerate().all(|(i, &b)| b == byte(file, i)));
            }
        }
    }

    #[test]
    fn what_was_never_given_is_noticed() {
        let dir = tempfile::tempdir_in(".").expect("a directory");
        let control = Control::default();
        let mut writer = Writer::create(dir.path(), &[("a", 10_000)], &budget(true), &control).expect("makes");
        writer.put(&[1; 100]).expect("writes");
        assert_eq!(writer.finish().expect_err("a hole").code(), Code::Stale);
    }

    #[test]
    fn a_failed_write_is_named() {
        let dir = tempfile::tempdir_in(".").expect("a directory");
        let control = Control::default();
        for (rule, code) in [("write:eio@1x100", Code::CheckpointWrite), ("write:enospc@1", Code::CheckpointSpace)] {
            let faults = std::sync::Arc::new(crate::io::Faults::parse(rule).expect("a rule"));
            let budget = FrameBudget { engine: EngineOptions { faults, ..EngineOptions::default() }, ..budget(true) };
            let mut writer = Writer::create(dir.path(), &[(rule, 100_000)], &budget, &control).expect("makes");
            let error = writer.put(&vec![0; 100_000]).and_then(|()| writer.finish()).expect_err("fails");
            assert_eq!(error.code(), code, "{error}");
            assert!(error.to_string().contains(rule), "{error}");
        }
    }
}
