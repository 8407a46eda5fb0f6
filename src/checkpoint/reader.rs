//! Reads ranges of files in a given order, ahead of the caller, through a few frames.

use std::{
    collections::VecDeque,
    fs::OpenOptions,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
};

use crossbeam::channel::{Receiver, unbounded};

use crate::{
    checkpoint::{
        control::Control,
        folder::Opened,
        refused::reading,
        writer::{FrameBudget, frames, next_done},
    },
    error::{Code, Error, Result},
    io::{
        ALIGNMENT, Direction, FileId, IoCompletion, IoEngine, IoFile, IoPart, IoRequest, OpenedEngine, open_engine,
        reads_direct,
    },
    memory::{SlotLease, SlotPool},
};

const BLOCK: u64 = ALIGNMENT as u64;

/// A range of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Index of the file.
    pub file: u32,
    /// First byte.
    pub start: u64,
    /// The byte after the last.
    pub end: u64,
}

/// A range whose read was begun.
struct Begun {
    range: Range,
    /// None while it is being read.
    lease: Option<SlotLease>,
}

/// Bytes of ranges, one after the other.
pub struct Reader<'a> {
    // Dropped first: nothing is in flight when the frames go.
    engine: Box<dyn IoEngine>,
    done: Receiver<IoCompletion>,
    pool: SlotPool,
    /// The same files through the page cache, for the blocks in which they end, and their sizes.
    files: Vec<(&'a Opened, u64)>,
    ranges: VecDeque<Range>,
    ahead: VecDeque<Begun>,
    first: u64,
    /// Bytes taken of the first one.
    used: u64,
    control: &'a Control,
}

impl<'a> Reader<'a> {
    /// Opens the files and begins to read.
    ///
    /// # Errors
    /// `FN-E404` for a file that cannot be opened, `FN-E409` without memory.
    pub fn open(files: &'a [Opened], ranges: Vec<Range>, budget: &FrameBudget, control: &'a Control) -> Result<Self> {
        let direct = budget.direct && files.iter().all(|f| reads_direct(&f.again()));
        let mut plain = Vec::with_capacity(files.len());
        let mut opened = Vec::with_capacity(files.len());
        for file in files {
            // Open the file that was checked, not its name: another process may have replaced the checkpoint.
            let open = || match direct {
                true => OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(file.again()),
                false => file.file.try_clone(),
            };
            let bytes = file.bytes().map_err(|e| unreadable(&file.path, &e))?;
            let handle = open().map_err(|e| unreadable(&file.path, &e))?;
            opened.push(IoFile::new(handle, file.path.display().to_string(), direct));
            plain.push((file, bytes));
        }
        let pool = frames(budget)?;
        let (sender, done) = unbounded();
        let sink = move |completion| {
            // The receiver is gone only after the reader gave up.
            let _ = sender.send(completion);
        };
        let OpenedEngine { engine, .. } = open_engine(&budget.engine, opened, &[pool.region().clone()], sink)?;
        let ranges = merged(ranges);
        let (ahead, first, used) = (VecDeque::new(), 0, 0);
        let mut reader = Self { engine, done, pool, files: plain, ranges, ahead, first, used, control };
        reader.fetch()?;
        Ok(reader)
    }

    /// The next bytes, at least one and at most `most`; empty only at the very end.
    ///
    /// # Errors
    /// `FN-E406` when the disk fails or a file is shorter than it should be; `FN-E412`.
    pub fn take(&mut self, most: usize) -> Result<&[u8]> {
        if self.ahead.front().is_some_and(|w| self.used == w.range.end - w.range.start) {
            self.ahead.pop_front();
            self.first += 1;
            self.used = 0;
            self.fetch()?;
        }
        let Some(range) = self.ahead.front().map(|w| w.range) else { return Ok(&[]) };
        while self.ahead.front().is_some_and(|w| w.lease.is_none()) {
            self.wait_one()?;
        }
        let n = (range.end - range.start - self.used).min(most as u64) as usize;
        let from = (range.start % BLOCK + self.used) as usize;
        self.used += n as u64;
        self.control.moved(n as u64);
        let lease = self.ahead.front_mut().and_then(|w| w.lease.as_mut());
        Ok(lease.map_or(&[], |lease| &lease.bytes()[from..from + n]))
    }

    /// Begins as many reads as there are frames.
    fn fetch(&mut self) -> Result<()> {
        while let Some(&Range { file, start, end }) = self.ranges.front() {
            let Some(mut lease) = self.pool.lease() else { return Ok(()) };
            let base = start / BLOCK * BLOCK;
            let stop = end.min(base + lease.len() as u64);
            let (Opened { file: plain, path }, bytes) = self.files[file as usize];
            if stop > bytes {
                let text = format!("{} ends at byte {bytes}, not at {end} or later.", path.display());
                return Err(damaged(text));
            }
            // Direct reads are of whole blocks; what is left of a file after the last is read through the page cache.
            let whole = stop.next_multiple_of(BLOCK).min(bytes / BLOCK * BLOCK).max(base);
            if whole < stop {
                let tail = &mut lease.bytes()[(whole - base) as usize..(stop - base) as usize];
                plain.read_exact_at(tail, whole).map_err(|e| unreadable(path, &e))?;
            }
            let range = Range { file, start, end: stop };
            match self.ranges.front_mut() {
                Some(front) if stop < end => front.start = stop,
                _ => drop(self.ranges.pop_front()),
            }
            let len = (whole - base) as usize;
            if len == 0 {
                self.ahead.push_back(Begun { range, lease: Some(lease) });
                continue;
            }
            let part = IoPart { direction: Direction::Read, file: FileId(file), offset: base, start: 0, len };
            let ticket = self.first + self.ahead.len() as u64;
            let request = IoRequest { ticket, lease, parts: vec![part] };
            self.engine.submit(request).map_err(|rejected| rejected.error)?;
            self.ahead.push_back(Begun { range, lease: None });
        }
        Ok(())
    }

    fn wait_one(&mut self) -> Result<()> {
        let done = next_done(&self.done, self.control)?;
        done.result.map_err(|e| damaged(e.message().to_owned()).errno(e.os_error().unwrap_or(0)))?;
        let index = (done.ticket - self.first) as usize;
        if let Some(begun) = self.ahead.get_mut(index) {
            begun.lease = Some(done.lease);
        }
        Ok(())
    }
}

/// Ranges that continue each other as one, without empty ones.
fn merged(ranges: Vec<Range>) -> VecDeque<Range> {
    let mut out: VecDeque<Range> = VecDeque::new();
    for range in ranges.into_iter().filter(|r| r.start < r.end) {
        match out.back_mut() {
            Some(last) if (last.file, last.end) == (range.file, range.start) => last.end = range.end,
            _ => out.push_back(range),
        }
    }
    out
}

/// `FN-E406` with its cause.
pub(super) fn damaged(text: impl Into<String>) -> Error {
    Error::new(Code::CheckpointDamaged, text.into())
        .action("Load another checkpoint; `funicular checkpoint verify` says which are whole.")
}

fn unreadable(path: &Path, e: &std::io::Error) -> Error {
    let code = match e.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE) => Code::CheckpointMissing,
        _ => Code::CheckpointDamaged,
    };
    Error::new(code, format!("{}: {e}.", path.display()))
        .errno(e.raw_os_error().unwrap_or(0))
        .action(reading(e, "Check the disk; load another checkpoint."))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::io::EngineOptions;

    fn budget(direct: bool) -> FrameBudget {
        FrameBudget { engine: EngineOptions::default(), direct, frames: 2, frame: 3 * BLOCK }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn gives_exactly_the_ranges(
            size in 1u64..60_000,
            cuts in prop::collection::vec((0u64..60_000, 0u64..20_000, 0u32..2), 1..8),
            most in 1usize..9000,
            direct in any::<bool>(),
        ) {
            let dir = tempfile::tempdir_in(".").expect("a directory");
            let content: Vec<u8> = (0..size).map(|i| ((i * 31) ^ (i >> 8)) as u8).collect();
            let paths = [dir.path().join("a"), dir.path().join("b")];
            for path in &paths {
                std::fs::write(path, &content).expect("writes");
            }
            let files = paths.each_ref().map(|path| Opened::by_path(path).expect("opens"));
            let ranges: Vec<Range> = cuts
                .iter()
                .map(|&(start, len, file)| Range { file, start: start.min(size), end: (start + len).min(size) })
                .map(|r| Range { end: r.end.max(r.start), ..r })
                .collect();
            let expected: Vec<u8> =
                ranges.iter().flat_map(|r| content[r.start as usize..r.end as usize].iter().copied()).collect();
            let control = Control::default();
            let mut reader = Reader::open(&files, ranges, &budget(direct), &control).expect("opens");
            let mut found = Vec::new();
            loop {
                let bytes = reader.take(most).expect("reads");
                if bytes.is_empty() {
                    break;
                }
                prop_assert!(bytes.len() <= most);
                found.extend_from_slice(bytes);
            }
            prop_assert!(found == expected);
        }
    }

    #[test]
    fn a_file_that_became_shorter_is_damage() {
        let dir = tempfile::tempdir_in(".").expect("a directory");
        let path = dir.path().join("a");
        std::fs::write(&path, [0; 5000]).expect("writes");
        let control = Control::default();
        let range = Range { file: 0, start: 0, end: 6000 };
        let files = [Opened::by_path(&path).expect("opens")];
        let error = Reader::open(&files, vec![range], &budget(true), &control).err().expect("too short");
        assert_eq!(error.code(), Code::CheckpointDamaged);
    }
}
