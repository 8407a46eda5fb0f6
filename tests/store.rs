//! Segments on real files: round trips, corruption, limits, and what remains when a process is killed.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use crossbeam::channel::{Receiver, unbounded};
use funicular::{
    Code,
    io::{DirectIo, Direction, EngineChoice, EngineOptions, Fault, IoCompletion, IoRequest, Rule, free_bytes},
    memory::{HostRegion, SharedFile, SharedWords, SlotLease, SlotPool},
    quantities::ByteCount,
    store::{Common, OpenedStore, SegmentSpec, Store, StoreSpec},
};
use tempfile::TempDir;

const CHUNK: u64 = 16 << 10;
const PATIENCE: Duration = Duration::from_secs(60);

fn disk() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn spec(paths: &[&Path], sizes: &[u64]) -> StoreSpec {
    StoreSpec {
        paths: paths.iter().map(PathBuf::from).collect(),
        chunk_bytes: CHUNK,
        segments: sizes
            .iter()
            .enumerate()
            .map(|(n, &bytes)| SegmentSpec { label: format!("layers.{n} exp_avg"), bytes })
            .collect(),
        checksums: true,
        direct: DirectIo::Preferred,
        engine: EngineOptions { choice: EngineChoice::Auto, ..EngineOptions::default() },
        budget: None,
        common: None,
    }
}

struct Rig {
    store: Store,
    notes: Vec<String>,
    pool: SlotPool,
    done: Receiver<IoCompletion>,
}

fn open(spec: StoreSpec) -> Result<Rig, funicular::Error> {
    let pool = SlotPool::new(2, ByteCount(256 << 10), "a test").unwrap();
    let (sender, done) = unbounded();
    let OpenedStore { store, notes } =
        Store::open(spec, &[Arc::clone(pool.region())], move |completion| drop(sender.send(completion)))?;
    Ok(Rig { store, notes, pool, done })
}

impl Rig {
    fn transfer(&self, segment: usize, direction: Direction, lease: SlotLease) -> IoCompletion {
        let mut parts = Vec::new();
        let chunks = 0..self.store.segment_chunks(segment);
        self.store.parts(segment, chunks, direction, 0, &mut parts);
        self.store.submit(IoRequest { ticket: segment as u64, lease, parts }).unwrap();
        self.done.recv_timeout(PATIENCE).unwrap()
    }

    fn write(&self, segment: usize, bytes: &[u8]) {
        let mut lease = self.pool.lease().unwrap();
        lease.bytes()[..bytes.len()].copy_from_slice(bytes);
        for (n, chunk) in bytes.chunks(CHUNK as usize).enumerate() {
            self.store.seal(segment, n as u32, chunk);
        }
        self.transfer(segment, Direction::Write, lease).result.unwrap();
    }

    /// The segment's bytes, and what verification said.
    fn read(&self, segment: usize, len: usize) -> (Vec<u8>, Result<(), funicular::Error>) {
        let mut lease = self.pool.lease().unwrap();
        lease.bytes().fill(0xee);
        let mut done = self.transfer(segment, Direction::Read, lease);
        done.result.unwrap();
        let bytes = done.lease.bytes()[..len].to_vec();
        let verified =
            bytes.chunks(CHUNK as usize).enumerate().try_for_each(|(n, c)| self.store.verify(segment, n as u32, c));
        (bytes, verified)
    }
}

fn pattern(seed: usize, len: u64) -> Vec<u8> {
    (0..len as usize).map(|i| ((i * 31) ^ (i >> 8) ^ (seed * 97 + 1)) as u8).collect()
}

#[test]
fn segments_of_odd_sizes_come_back_over_several_paths() {
    for choice in [EngineChoice::Auto, EngineChoice::Threads] {
        for direct in [DirectIo::Preferred, DirectIo::Off] {
            let (a, b) = (disk(), disk());
            let sizes = [0, 1, 4096, CHUNK, CHUNK + 1, 5 * CHUNK + 777, 3];
            let mut spec = spec(&[a.path(), b.path()], &sizes);
            (spec.direct, spec.engine.choice) = (direct, choice);
            let rig = open(spec).unwrap();
            assert!(rig.notes.iter().any(|n| n.starts_with("FN-W606")), "same file system: {:?}", rig.notes);
            assert_eq!(rig.store.segment_chunks(5), 6);
            assert!(!rig.store.written(5, 0));
            for (segment, &size) in sizes.iter().enumerate() {
                let (bytes, verified) = rig.read(segment, size as usize);
                verified.unwrap();
                assert!(bytes.iter().all(|&b| b == 0), "never written: zeros");
            }
            for generation in 0..2 {
                for (segment, &size) in sizes.iter().enumerate() {
                    rig.write(segment, &pattern(segment + 10 * generation, size));
                }
                for (segment, &size) in sizes.iter().enumerate().rev() {
                    let (bytes, verified) = rig.read(segment, size as usize);
                    verified.unwrap();
                    assert!(bytes == pattern(segment + 10 * generation, size), "segment {segment}");
                }
            }
            assert!(rig.store.written(5, 5));
            drop(rig);
            assert_eq!(std::fs::read_dir(a.path()).unwrap().count(), 0, "nothing remains");
        }
    }
}

#[test]
fn a_flipped_bit_and_a_lost_write_are_found() {
    let dir = disk();
    let spec = spec(&[dir.path()], &[3 * CHUNK, CHUNK]);
    let faults = Arc::clone(&spec.engine.faults);
    let rig = open(spec).unwrap();
    rig.write(0, &pattern(1, 3 * CHUNK));
    rig.write(1, &pattern(2, CHUNK));
    faults.add(Rule { direction: Direction::Read, first: 1, times: 1, fault: Fault::FlipBit });
    let e = rig.read(0, 3 * CHUNK as usize).1.expect_err("corrupted");
    assert_eq!(e.code(), Code::Corrupted);
    let text = e.to_string();
    assert!(text.contains("layers.0 exp_avg, chunk") && text.contains("funicular-"), "{text}");
    rig.read(0, 3 * CHUNK as usize).1.unwrap();

    faults.clear();
    faults.add(Rule { direction: Direction::Write, first: 1, times: 1, fault: Fault::Lost });
    rig.write(1, &pattern(3, CHUNK));
    assert_eq!(rig.read(1, CHUNK as usize).1.expect_err("stale").code(), Code::Corrupted);
}

#[test]
fn what_one_process_has_written_another_reads_and_checks() {
    for direct in [DirectIo::Preferred, DirectIo::Off] {
        let (a, b) = (disk(), disk());
        let sizes = [3 * CHUNK, CHUNK + 7];
        let bytes = StoreSpec::common_words(2, CHUNK, sizes.into_iter()) as u64 * 8;
        let file = SharedFile::create(bytes.next_multiple_of(1 << 16)).unwrap();
        let words = || SharedWords::new(HostRegion::of_file(&file, 0, ByteCount(bytes), "a test").unwrap());
        let with = |maker, sizes: &[u64]| {
            let common = Some(Common::new(words(), maker));
            open(StoreSpec { direct, common, ..spec(&[a.path(), b.path()], sizes) })
        };
        let me = std::process::id();
        let (first, second) = (with(None, &sizes).unwrap(), with(Some(me), &sizes).unwrap());
        assert_eq!(std::fs::read_dir(a.path()).unwrap().count(), 1, "one directory, of who has made the files");
        assert!(!second.store.written(0, 0));
        first.write(0, &pattern(1, sizes[0]));
        second.write(1, &pattern(2, sizes[1]));
        for rig in [&first, &second] {
            for (segment, &size) in sizes.iter().enumerate() {
                assert!(rig.store.written(segment, 0));
                let (bytes, verified) = rig.read(segment, size as usize);
                verified.unwrap();
                assert!(bytes == pattern(segment + 1, size));
            }
        }
        // Bytes that another has not written are found, as its own are.
        second.store.seal(0, 1, &pattern(9, CHUNK));
        assert_eq!(first.read(0, sizes[0] as usize).1.expect_err("another sum").code(), Code::Corrupted);
        let larger = with(Some(me), &[sizes[0], 9 * CHUNK]).err().unwrap();
        assert!(larger.code() == Code::PathUnusable && larger.to_string().contains("smaller than planned"), "{larger}");
        // What the one has open outlives the other.
        drop(first);
        assert!(second.read(1, sizes[1] as usize).0 == pattern(2, sizes[1]));
        assert_eq!(std::fs::read_dir(a.path()).unwrap().count(), 0, "nothing remains");
    }
}

#[test]
fn limits_are_named_with_their_numbers() {
    let dir = disk();
    let mut small = spec(&[dir.path()], &[10 * CHUNK]);
    small.budget = Some(ByteCount(10 * CHUNK - 1));
    let e = open(small).err().unwrap();
    assert_eq!(e.code(), Code::NvmeBudget);
    assert!(e.to_string().contains("160.0 KiB"), "{e}");
    let mut enough = spec(&[dir.path()], &[10 * CHUNK]);
    enough.budget = Some(ByteCount(10 * CHUNK));
    open(enough).unwrap();

    // Two paths on one file system that holds either half but not both.
    let other = disk();
    let free = free_bytes(dir.path()).unwrap();
    let mut huge = spec(&[dir.path(), other.path()], &[free / 5 * 8]);
    huge.chunk_bytes = 1 << 30;
    let e = open(huge).err().unwrap();
    assert_eq!(e.code(), Code::DiskFull, "{e}");
    assert!(e.to_string().contains("need") && e.to_string().contains("free"), "{e}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing remains");

    assert_eq!(open(spec(&[], &[1])).err().unwrap().code(), Code::PolicyValue);
    assert_eq!(open(spec(&[&dir.path().join("no")], &[1])).err().unwrap().code(), Code::PathUnusable);
    let mut odd = spec(&[dir.path()], &[1]);
    odd.chunk_bytes = 5000;
    assert_eq!(open(odd).err().unwrap().code(), Code::PolicyValue);
}

const RESERVED: u64 = 6 << 30;

/// Not a test: the process that is killed below.
#[test]
#[ignore = "run by killed_process_leaves_no_data"]
#[expect(clippy::print_stdout, reason = "tells its parent that it is ready")]
fn child() {
    let Some(dir) = std::env::var_os("FUNICULAR_TEST_DIR") else { return };
    let mut spec = spec(&[Path::new(&dir)], &[64 << 10, RESERVED]);
    spec.chunk_bytes = 1 << 20;
    let rig = open(spec).unwrap();
    let mut lease = rig.pool.lease().unwrap();
    lease.bytes().fill(1);
    rig.transfer(0, Direction::Write, lease).result.unwrap();
    println!("\nready");
    std::thread::sleep(PATIENCE);
}

#[test]
fn killed_process_leaves_no_data() {
    let dir = disk();
    let free = || free_bytes(dir.path()).unwrap();
    if free() < 4 * RESERVED {
        return;
    }
    let before = free();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--ignored", "--nocapture"])
        .env("FUNICULAR_TEST_DIR", dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line == "ready"), "the child failed");
    let during = free();
    child.kill().unwrap();
    child.wait().unwrap();
    // Others use this disk too, hence the halves.
    assert!(before - during > RESERVED / 2, "{before} -> {during}");
    let deadline = Instant::now() + PATIENCE;
    while free() < during + RESERVED / 2 {
        assert!(Instant::now() < deadline, "the space of the dead process does not come back");
        std::thread::sleep(Duration::from_millis(20));
    }
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().flatten().collect();
    assert_eq!(left.len(), 1);
    let names: Vec<_> = std::fs::read_dir(left[0].path()).unwrap().flatten().map(|e| e.file_name()).collect();
    assert_eq!(names, ["owner"]);

    let rig = open(spec(&[dir.path()], &[CHUNK])).unwrap();
    assert!(!left[0].path().exists());
    assert!(rig.notes.iter().any(|note| note.starts_with("FN-I605")), "{:?}", rig.notes);
}
