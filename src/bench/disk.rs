//! The NVMe hops: reads, writes and both at once, of one block after the other, on one path or striped over all.
//!
//! K1: only files that this module made are touched; they have no name, so they are gone with the process.
//! K2: every byte that is read was written before, so that no read is answered from a hole.
//! K3: without direct I/O there is no figure: it would be the page cache's.

use std::{
    fs::File,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use crossbeam::channel::{Receiver, bounded};

use crate::{
    bench::{
        Exercise, Interrupt,
        clock::Clock,
        stats::{Round, as_f64},
    },
    doctor::drive::{self, Drive},
    error::{Code, Error, Result},
    io::{
        DirectIo, Direction, EngineChoice, EngineKind, EngineOptions, FileId, IoCompletion, IoEngine, IoFile, IoPart,
        IoRequest, OpenedEngine, allocate, device_number, disk_full, free_bytes, open_engine, probe_directory,
        scratch_file,
    },
    memory::{HostRegion, SlotLease, SlotPool},
    quantities::ByteCount,
    store::RunDir,
};

/// How long the disk may be silent before the benchmark gives up.
const PATIENCE: Duration = Duration::from_secs(120);
/// Free space that is left to others.
const SPARE: u64 = 256 << 20;
/// Bytes of one write while the files are filled.
const FILL: usize = 4 << 20;

/// A path under test.
#[derive(Debug)]
pub struct DiskPath {
    /// The directory that was given.
    pub dir: PathBuf,
    /// What it lies on.
    pub drive: Drive,
    /// Whether direct I/O works there; if not, why no figure is given.
    pub direct: std::result::Result<(), String>,
    file: File,
    _run_dir: RunDir,
}

/// The files of all paths, of the same size, each filled once.
#[derive(Debug)]
pub struct Disk {
    /// The paths, in the order given.
    pub paths: Vec<DiskPath>,
    /// Bytes of each file.
    pub file_bytes: u64,
}

impl Disk {
    /// Makes a file of `file_bytes` on each path. The notes are lines for the user.
    ///
    /// # Errors
    /// `FN-E603`, `FN-E604` for a path that is no disk or cannot be used, `FN-E605` without the space.
    pub fn open(dirs: &[PathBuf], file_bytes: u64) -> Result<(Self, Vec<String>)> {
        let (mut paths, mut notes) = (Vec::new(), Vec::new());
        let mut needs: Vec<(u64, &Path, u64)> = Vec::new();
        for dir in dirs {
            let probe = probe_directory(dir, DirectIo::Preferred)?;
            let device = device_number(dir)?;
            match needs.iter_mut().find(|(known, ..)| *known == device) {
                Some((_, first, need)) => {
                    notes.push(format!(
                        "FN-W606 {} and {} are on the same file system: two paths there are no faster than one.",
                        first.display(),
                        dir.display()
                    ));
                    *need += file_bytes;
                }
                None => needs.push((device, dir, file_bytes)),
            }
            let (run_dir, swept) = RunDir::create(dir, probe.file_system)?;
            notes.extend(swept);
            let drive = drive::of(dir);
            let direct = if !drive.in_memory.is_empty() {
                Err(format!("not measured: the figure would be memory's, since {}.", drive.in_memory))
            } else if probe.direct {
                notes.extend(probe.notes);
                Ok(())
            } else {
                let why = probe.notes.last().cloned().unwrap_or_default();
                Err(format!("not measured: through the page cache the figure would be memory's. {why}"))
            };
            let file = scratch_file(run_dir.path(), probe.direct)?;
            paths.push(DiskPath { dir: dir.clone(), drive, direct, file, _run_dir: run_dir });
        }
        for (_, dir, need) in needs {
            let free = free_bytes(dir)?;
            if need + SPARE > free {
                return Err(disk_full(dir, need + SPARE, free).action("Free some space, or give a smaller --size."));
            }
        }
        for path in paths.iter().filter(|path| path.direct.is_ok()) {
            allocate(&path.file, file_bytes, &path.dir)?;
        }
        Ok((Self { paths, file_bytes }, notes))
    }

    /// Writes every byte of every file that is measured, block by block over the files. When `limit` is over, and each
    /// file has `least` bytes, the files are what was written by then. The notes are lines for the user.
    ///
    /// # Errors
    /// Those of the engine; `FN-E106` when interrupted.
    pub fn fill(
        &mut self,
        limit: Option<Duration>,
        least: u64,
        interrupt: &Interrupt,
        mut progress: impl FnMut(f64),
    ) -> Result<Vec<String>> {
        let pool = SlotPool::new(8, ByteCount(FILL as u64), "filling the benchmark's files")?;
        let which: Vec<usize> = (0..self.paths.len()).filter(|&n| self.paths[n].direct.is_ok()).collect();
        if which.is_empty() {
            return Ok(Vec::new());
        }
        let lane = self.lane(&which, EngineChoice::Auto, 1 << 20, 32, &[Arc::clone(pool.region())])?;
        let (files, begun) = (which.len() as u64, Instant::now());
        let mut slots: Vec<_> =
            std::iter::from_fn(|| pool.lease()).map(|lease| (lease, Vec::with_capacity(1))).collect();
        slots.iter_mut().for_each(|(lease, _)| fill_with_numbers(lease.bytes()));
        let (mut next, mut in_flight) = (0, 0);
        loop {
            interrupt.check()?;
            let (file, offset) = (next % files, next / files * FILL as u64);
            progress(as_f64(offset) / as_f64(self.file_bytes));
            let in_time = limit.is_none_or(|limit| begun.elapsed() < limit);
            if file == 0 && offset < self.file_bytes && offset >= least && !in_time {
                let note = format!(
                    "The files have {} in place of {}: more could not be written in {:.0} s.",
                    ByteCount(offset),
                    ByteCount(self.file_bytes),
                    begun.elapsed().as_secs_f64()
                );
                self.file_bytes = offset;
                while in_flight > 0 {
                    lane.wait()?;
                    in_flight -= 1;
                }
                return Ok(vec![note]);
            }
            if offset < self.file_bytes
                && let Some((lease, parts)) = slots.pop()
            {
                // The last block of each file is short.
                let len = (FILL as u64).min(self.file_bytes - offset) as usize;
                let file = FileId(u32::try_from(file).unwrap_or(0));
                lane.submit(lease, parts, IoPart { direction: Direction::Write, file, offset, start: 0, len })?;
                next += 1;
                in_flight += 1;
                continue;
            }
            if in_flight == 0 {
                return Ok(Vec::new());
            }
            let done = lane.wait()?;
            slots.push((done.lease, done.parts));
            in_flight -= 1;
        }
    }

    /// An engine over the files of some paths. `regions` is where its leases will lie.
    ///
    /// # Errors
    /// `FN-E601` when the engine that was asked for does not work here.
    pub fn lane(
        &self,
        which: &[usize],
        choice: EngineChoice,
        block: usize,
        depth: u32,
        regions: &[Arc<HostRegion>],
    ) -> Result<Lane> {
        let files = which.iter().map(|&n| {
            let path = &self.paths[n];
            let file = path.file.try_clone().map_err(|e| crate::io::unusable(&path.dir, &e))?;
            Ok(IoFile::new(file, format!("the benchmark's file in {}", path.dir.display()), true))
        });
        let files: Vec<IoFile> = files.collect::<Result<_>>()?;
        let count = files.len() as u64;
        let options = EngineOptions { choice, queue_depth: depth, block, ..EngineOptions::default() };
        // As many as ever are in flight; a full channel would hold the engine's thread.
        let (sender, done) = bounded(4096);
        let OpenedEngine { engine, notes } = open_engine(&options, files, regions, move |c| drop(sender.send(c)))?;
        Ok(Lane { engine, done, files: count, file_bytes: self.file_bytes, notes })
    }

    /// Names of the files of some paths as another process of this user can open them.
    pub fn links(&self, which: &[usize]) -> Vec<String> {
        let pid = std::process::id();
        which.iter().map(|&n| format!("/proc/{pid}/fd/{}", self.paths[n].file.as_raw_fd())).collect()
    }
}

/// An engine and its completions.
pub struct Lane {
    engine: Box<dyn IoEngine>,
    done: Receiver<IoCompletion>,
    files: u64,
    file_bytes: u64,
    /// What the engine has to say.
    pub notes: Vec<String>,
}

impl Lane {
    /// The engine's name.
    pub fn engine(&self) -> &'static str {
        self.engine.kind().name()
    }

    /// Whether the engine registered the memory of its leases.
    pub fn has_registered_buffers(&self) -> bool {
        self.engine.kind() == EngineKind::IoUring && !self.notes.iter().any(|note| note.contains("FN-I602"))
    }

    /// Hands over one transfer.
    ///
    /// # Errors
    /// Those of [`IoEngine::submit`].
    pub fn submit(&self, lease: SlotLease, mut parts: Vec<IoPart>, part: IoPart) -> Result<()> {
        parts.clear();
        parts.push(part);
        self.engine.submit(IoRequest { ticket: 0, lease, parts }).map_err(|rejected| rejected.error)
    }

    /// The next transfer that ended.
    ///
    /// # Errors
    /// Its own error; `FN-E102` if none ended for two minutes.
    pub fn wait(&self) -> Result<IoCompletion> {
        let done = self.done.recv_timeout(PATIENCE).map_err(|_| {
            Error::new(Code::Stuck, "no read or write of the benchmark's files ended for two minutes.")
                .action("See dmesg for what the drive says.")
        })?;
        match done.result {
            Ok(()) => Ok(done),
            Err(error) => Err(error),
        }
    }

    /// The next transfer that ended, if there is one now.
    ///
    /// # Errors
    /// Its own error.
    pub fn poll(&self) -> Result<Option<IoCompletion>> {
        if self.done.is_empty() { Ok(None) } else { self.wait().map(Some) }
    }

    /// The place of block `number` of `len` bytes: round-robin over the files, and from the start again at their end.
    pub fn part(&self, direction: Direction, number: u64, len: usize) -> IoPart {
        let blocks = (self.file_bytes / len as u64).max(1);
        let file = FileId((number % self.files) as u32);
        IoPart { direction, file, offset: number / self.files % blocks * len as u64, start: 0, len }
    }
}

/// What a hop does with the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mix {
    /// Only reads.
    Read,
    /// Only writes.
    Write,
    /// As many of each; reads run half a file ahead of writes.
    Both,
}

impl Mix {
    /// Name of the hop.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "nvme_read",
            Self::Write => "nvme_write",
            Self::Both => "nvme_read_write",
        }
    }

    /// What fio calls it.
    pub const fn fio(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Both => "rw",
        }
    }
}

/// `depth` blocks in flight, always: as many again wait in the engine, so that its thread begins the next one by itself,
/// as with the requests of a unit, which are many blocks long. With none there each block waited for two threads to wake up.
pub struct DiskHop {
    lane: Rc<Lane>,
    pool: SlotPool,
    mix: Mix,
    block: usize,
    depth: usize,
    /// Reads and writes, in this order: submitted so far, and not ended yet.
    submitted: [u64; 2],
    in_flight: [usize; 2],
}

impl DiskHop {
    /// Blocks of `block` bytes in slots of `pool`, which lie in a region that `lane` was given and are twice `depth`, the
    /// depth of `lane`, where memory allows.
    pub fn new(lane: Rc<Lane>, pool: SlotPool, mix: Mix, block: usize, depth: usize) -> Self {
        Self { lane, pool, mix, block, depth, submitted: [0; 2], in_flight: [0; 2] }
    }

    /// Whether the next block is written. With both, half of the blocks in flight are reads; a direction that is faster
    /// gets a few blocks ahead, and no further: a step reads as much as it writes.
    fn writes_next(&self) -> bool {
        match self.mix {
            Mix::Read => false,
            Mix::Write => true,
            Mix::Both => {
                let [read, written] = self.submitted;
                let ahead = (self.depth as u64 / 4).max(1);
                let fewer = self.in_flight[1] < self.in_flight[0];
                if fewer { written < read + ahead } else { read >= written + ahead }
            }
        }
    }

    fn submit(&mut self, lease: SlotLease, parts: Vec<IoPart>) -> Result<()> {
        let writes = self.writes_next();
        let half = self.lane.files * (self.lane.file_bytes / self.block as u64 / 2);
        let ahead = if self.mix == Mix::Both && writes { half } else { 0 };
        let direction = if writes { Direction::Write } else { Direction::Read };
        let part = self.lane.part(direction, ahead + self.submitted[usize::from(writes)], self.block);
        self.lane.submit(lease, parts, part)?;
        self.submitted[usize::from(writes)] += 1;
        self.in_flight[usize::from(writes)] += 1;
        Ok(())
    }
}

impl Exercise for DiskHop {
    /// The clock starts when as many blocks have ended as are in flight, and stops after a multiple of as many.
    fn round(&mut self, time: Duration) -> Result<Round> {
        self.in_flight = [0; 2];
        while self.in_flight[0] + self.in_flight[1] < 2 * self.depth
            && let Some(lease) = self.pool.lease()
        {
            self.submit(lease, Vec::with_capacity(1))?;
        }
        let lap = self.depth.min(self.in_flight[0] + self.in_flight[1]);
        let mut clock = Clock::new(lap, time).in_laps(lap);
        while self.in_flight != [0; 2] {
            let done = self.lane.wait()?;
            let wrote = done.parts.first().is_some_and(|part| part.direction == Direction::Write);
            self.in_flight[usize::from(wrote)] -= 1;
            if clock.ended(self.block as u64, 0, done.nanos) {
                self.submit(done.lease, done.parts)?;
            }
        }
        Ok(clock.round)
    }
}

/// Fills memory with fp32 numbers between 0.5 and 1 that no drive can compress away, and that AdamW takes as states.
/// They repeat only after more bytes than a drive looks at together.
pub(super) fn fill_with_numbers(bytes: &mut [u8]) {
    let (first, rest) = bytes.split_at_mut(bytes.len().min(FILL));
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for word in first.chunks_exact_mut(4) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let bits = 0x3f00_0000 | (state >> 41) as u32;
        word.copy_from_slice(&bits.to_ne_bytes());
    }
    rest.chunks_mut(FILL).for_each(|part| part.copy_from_slice(&first[..part.len()]));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_writes_keep_step_and_the_slower_one_stays_busy() {
        let dir = tempfile::tempdir_in(".").expect("a directory");
        let Ok((disk, _)) = Disk::open(&[dir.path().to_path_buf()], 16 << 20) else { return };
        let pool = SlotPool::new(8, ByteCount(4096), "a test").expect("maps");
        let lane = disk.lane(&[0], EngineChoice::Threads, 4096, 8, &[]).expect("an engine");
        let mut hop = DiskHop::new(Rc::new(lane), pool, Mix::Both, 4096, 8);
        let mut step = |ends: Option<usize>| {
            if let Some(ends) = ends {
                hop.in_flight[ends] -= 1;
            }
            let writes = usize::from(hop.writes_next());
            hop.submitted[writes] += 1;
            hop.in_flight[writes] += 1;
            (hop.submitted, hop.in_flight)
        };
        assert_eq!((0..8).map(|_| step(None)).last(), Some(([4, 4], [4, 4])));
        // Writes end at once, reads do not: two writes get ahead, then more and more of those in flight are reads.
        let after: Vec<_> = (0..5).map(|_| step(Some(1)).1).collect();
        assert_eq!(after, [[4, 4], [4, 4], [5, 3], [5, 3], [6, 2]]);
        // A read ends: now there may be a write.
        assert_eq!(step(Some(0)), ([6, 8], [5, 3]));
    }

    #[test]
    fn numbers_are_ordinary_and_do_not_repeat() {
        let mut bytes = vec![0; 4096];
        fill_with_numbers(&mut bytes);
        let words: Vec<f32> = bytes.chunks_exact(4).map(|w| f32::from_ne_bytes([w[0], w[1], w[2], w[3]])).collect();
        assert!(words.iter().all(|x| (0.5..1.0).contains(x)));
        assert_ne!(words[..512], words[512..]);
    }
}
