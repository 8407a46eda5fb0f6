//! Reads segments on NVMe ahead of a save, on a thread of its own, so that the disk reads while the save sums and writes.
//!
//! A1: chunks come in the order in which they were asked for. A2: no more memory than the chunks given to [`ReadAhead::new`].

use std::{ops::Range, sync::Arc, thread::JoinHandle, time::Duration};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, unbounded};

use crate::{
    checkpoint::Control,
    error::{Code, Error, Result},
    io::Direction,
    runtime::{core::Shared, files::Map},
};

/// Chunks of a segment.
struct Run {
    segment: usize,
    chunks: Range<u32>,
}

struct Chunk {
    segment: usize,
    start: u64,
    bytes: Vec<u8>,
}

impl Chunk {
    fn holds(&self, segment: usize, at: u64) -> bool {
        self.segment == segment && (self.start..self.start + self.bytes.len() as u64).contains(&at)
    }
}

/// The reader of one save.
pub(super) struct ReadAhead {
    shared: Arc<Shared>,
    control: Arc<Control>,
    runs: Option<Sender<Run>>,
    ready: Receiver<Result<Chunk>>,
    free: Sender<Vec<u8>>,
    /// The chunk at hand: the next bytes may begin in it too.
    at: Option<Chunk>,
    asked: Option<(usize, u32)>,
    thread: Option<JoinHandle<()>>,
}

impl ReadAhead {
    /// Starts the thread, with so many chunks of memory.
    ///
    /// # Errors
    /// `FN-E107` without a thread.
    pub(super) fn new(shared: &Arc<Shared>, chunks: u64, control: &Arc<Control>) -> Result<Self> {
        let (runs, asked) = unbounded();
        let (done, ready) = unbounded();
        let (free, empty) = unbounded();
        let size = shared.disk()?.store.chunk_bytes() as usize;
        for _ in 0..chunks {
            // Both ends are here.
            let _ = free.send(Vec::with_capacity(size));
        }
        let worker = (Arc::clone(shared), Arc::clone(control));
        let work = move || {
            for run in asked {
                if !read_run(&worker.0, &worker.1, &run, &empty, &done) {
                    return;
                }
            }
        };
        let failed = |e| Error::new(Code::NoThread, format!("a save's thread could not be started: {e}."));
        let thread = std::thread::Builder::new().name("funicular-ahead".into()).spawn(work).map_err(failed)?;
        let (shared, control) = (Arc::clone(shared), Arc::clone(control));
        Ok(Self { shared, control, runs: Some(runs), ready, free, at: None, asked: None, thread: Some(thread) })
    }

    /// These bytes will be read next, after those asked for before.
    ///
    /// # Errors
    /// `FN-E103` without a disk.
    pub(super) fn ask(&mut self, segment: usize, bytes: Range<u64>) -> Result<()> {
        let mut chunks = Map::store_chunks(&self.shared.disk()?.store, bytes);
        // A chunk in which one tensor ends and the next begins is at hand still.
        if self.asked == Some((segment, chunks.start)) {
            chunks.start += 1;
        }
        if let (false, Some(runs)) = (chunks.is_empty(), &self.runs) {
            self.asked = Some((segment, chunks.end - 1));
            // A reader that has ended says why in `ready`.
            let _ = runs.send(Run { segment, chunks });
        }
        Ok(())
    }

    /// The next bytes of those that were asked for.
    ///
    /// # Errors
    /// From the disk, `FN-E412` once an end was asked for.
    pub(super) fn read(&mut self, segment: usize, first: u64, out: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < out.len() {
            let at = first + done as u64;
            if !self.at.as_ref().is_some_and(|chunk| chunk.holds(segment, at)) {
                if let Some(Chunk { bytes, .. }) = self.at.take() {
                    let _ = self.free.send(bytes);
                }
                self.at = Some(self.next()?);
            }
            let order = || Error::new(Code::Stale, "a save reads in another order than it said.");
            let chunk = self.at.as_ref().filter(|chunk| chunk.holds(segment, at)).ok_or_else(order)?;
            let from = (at - chunk.start) as usize;
            let n = (chunk.bytes.len() - from).min(out.len() - done);
            out[done..done + n].copy_from_slice(&chunk.bytes[from..from + n]);
            done += n;
        }
        Ok(())
    }

    fn next(&self) -> Result<Chunk> {
        loop {
            match self.ready.recv_timeout(Duration::from_millis(50)) {
                Ok(chunk) => return chunk,
                Err(RecvTimeoutError::Timeout) => self.control.check()?,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::new(Code::Panicked, "the reader of a save is gone."));
                }
            }
        }
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        // Without runs, without memory and without a listener it ends.
        self.runs = None;
        (self.ready, self.free) = (unbounded().1, unbounded().0);
        if let Some(thread) = self.thread.take() {
            // A panic was met as a reader that is gone.
            let _ = thread.join();
        }
    }
}

/// Reads a run, as many chunks at a time as there is memory for; false if nobody wants more.
fn read_run(
    shared: &Shared,
    control: &Control,
    run: &Run,
    empty: &Receiver<Vec<u8>>,
    done: &Sender<Result<Chunk>>,
) -> bool {
    let Ok(disk) = shared.disk() else { return false };
    let size = disk.store.chunk_bytes();
    let at_once = Shared::chunks_at_once(disk);
    let mut next = run.chunks.start;
    while next < run.chunks.end {
        // Waits here, where nothing is locked.
        let Ok(first) = empty.recv() else { return false };
        let mut room = vec![first];
        while room.len() < at_once.min((run.chunks.end - next) as usize)
            && let Ok(more) = empty.try_recv()
        {
            room.push(more);
        }
        let end = next + room.len() as u32;
        let bytes = u64::from(next) * size..u64::from(end) * size;
        let mut read = Vec::with_capacity(room.len());
        let stop = &mut || control.check().is_err();
        let result = shared.segment_io(disk, run.segment, bytes, Direction::Read, stop, &mut |piece, at| {
            let mut bytes = room.pop().unwrap_or_default();
            bytes.clear();
            bytes.extend_from_slice(piece);
            read.push(Chunk { segment: run.segment, start: at as u64, bytes });
        });
        if let Err(error) = result {
            let _ = done.send(Err(error));
            return false;
        }
        if read.into_iter().any(|chunk| done.send(Ok(chunk)).is_err()) {
            return false;
        }
        next = end;
    }
    true
}
