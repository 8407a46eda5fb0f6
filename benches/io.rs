//! Bandwidth of the I/O engines. `cargo bench --bench io` runs criterion on a small file;
//! `cargo bench --bench io -- --compare [DIR] [GiB] [ROUNDS]` prints GB/s of both engines next to fio on the same file
//! system, with interleaved runs and medians, because other users of the disk make noise.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark")]

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use criterion::{Criterion, Throughput};
use crossbeam::channel::{Receiver, bounded};
use funicular::{
    io::{
        DirectIo, Direction, EngineChoice, EngineOptions, FileId, IoCompletion, IoEngine, IoFile, IoPart, IoRequest,
        allocate, open_engine, probe_directory, scratch_file,
    },
    memory::{SlotLease, SlotPool},
    quantities::ByteCount,
};

const SLOT: usize = 16 << 20;
const SLOTS: u32 = 4;

struct Bench {
    engine: Box<dyn IoEngine>,
    done: Receiver<IoCompletion>,
    slots: Vec<(SlotLease, Vec<IoPart>)>,
    len: u64,
}

impl Bench {
    /// An engine over one file of `len` bytes, every byte of it written once.
    fn new(dir: &Path, choice: EngineChoice, len: u64) -> Option<Self> {
        let pool = SlotPool::new(SLOTS, ByteCount(SLOT as u64), "the benchmark").unwrap();
        pool.region().touch(0, pool.region().len());
        let direct = probe_directory(dir, DirectIo::Preferred).unwrap().direct;
        let file = scratch_file(dir, direct).unwrap();
        allocate(&file, len, dir).unwrap();
        let (sender, done) = bounded(SLOTS as usize);
        let options = EngineOptions { choice, ..EngineOptions::default() };
        let files = vec![IoFile::new(file, "the benchmark's file", direct)];
        let regions = [Arc::clone(pool.region())];
        let engine = open_engine(&options, files, &regions, move |c| drop(sender.send(c))).ok()?.engine;
        let slots = (0..SLOTS)
            .map(|n| {
                let mut lease = pool.lease().unwrap();
                lease
                    .bytes()
                    .iter_mut()
                    .enumerate()
                    .for_each(|(i, b)| *b = (i * 31 + n as usize) as u8 ^ (i >> 9) as u8);
                (lease, Vec::with_capacity(1))
            })
            .collect();
        let mut this = Self { engine, done, slots, len };
        this.pass(Direction::Write);
        Some(this)
    }

    /// Transfers the whole file once.
    fn pass(&mut self, direction: Direction) -> Duration {
        let start = Instant::now();
        let mut in_flight = 0;
        for offset in (0..self.len).step_by(SLOT) {
            let (lease, mut parts) = self.slots.pop().unwrap_or_else(|| {
                in_flight -= 1;
                finish(&self.done)
            });
            let len = SLOT.min((self.len - offset) as usize);
            parts.clear();
            parts.push(IoPart { direction, file: FileId(0), offset, start: 0, len });
            self.engine.submit(IoRequest { ticket: offset, lease, parts }).unwrap();
            in_flight += 1;
        }
        for _ in 0..in_flight {
            let slot = finish(&self.done);
            self.slots.push(slot);
        }
        start.elapsed()
    }
}

fn finish(done: &Receiver<IoCompletion>) -> (SlotLease, Vec<IoPart>) {
    let done = done.recv().unwrap();
    done.result.unwrap();
    (done.lease, done.parts)
}

fn criterion_groups(dir: &Path) {
    let mut criterion = Criterion::default().configure_from_args();
    let len = 64 << 20;
    for (name, choice) in [("io_uring", EngineChoice::IoUring), ("threads", EngineChoice::Threads)] {
        let Some(mut bench) = Bench::new(dir, choice, len) else { continue };
        let mut group = criterion.benchmark_group(name);
        group.throughput(Throughput::Bytes(len)).sample_size(20).measurement_time(Duration::from_secs(3));
        group.bench_function("read", |b| b.iter(|| bench.pass(Direction::Read)));
        group.bench_function("write", |b| b.iter(|| bench.pass(Direction::Write)));
        group.finish();
    }
    criterion.final_summary();
}

/// GB/s of one pass of fio over its file, which it keeps between calls. Its buffers lie on huge pages as ours do: a
/// request of 4 KiB pages has more segments than many (virtual) disks take at once, and is much slower.
fn fio(file: &Path, direction: Direction, len: u64) -> Option<f64> {
    let (rw, field) = match direction {
        Direction::Read => ("read", 6),
        Direction::Write => ("write", 47),
    };
    let output = Command::new("fio")
        .env("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
        .args(["--name=peer", "--ioengine=io_uring", "--direct=1", "--bs=1M", "--iodepth=32", "--minimal"])
        .args(["--invalidate=1", "--overwrite=1", "--end_fsync=0"])
        .arg(format!("--filename={}", file.display()))
        .arg(format!("--rw={rw}"))
        .arg(format!("--size={len}"))
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let kib: f64 = text.lines().last()?.split(';').nth(field)?.parse().ok()?;
    Some(kib * 1024.0 / 1e9)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn compare(dir: &Path, gib: u64, rounds: usize) {
    let len = gib << 30;
    let engines = [("io_uring", EngineChoice::IoUring), ("threads", EngineChoice::Threads)];
    let mut benches: Vec<_> = engines
        .into_iter()
        .filter_map(|(name, choice)| Some((name, Bench::new(dir, choice, len)?, [Vec::new(), Vec::new()])))
        .collect();
    let own = tempfile::tempdir_in(dir).unwrap();
    let file = own.path().join("fio");
    let _ = fio(&file, Direction::Write, len);
    let mut peer = [Vec::new(), Vec::new()];
    for _ in 0..rounds {
        for (d, direction) in [Direction::Read, Direction::Write].into_iter().enumerate() {
            for (_, bench, results) in &mut benches {
                results[d].push(len as f64 / bench.pass(direction).as_secs_f64() / 1e9);
                peer[d].extend(fio(&file, direction, len));
            }
        }
    }
    println!("{gib} GiB in {}, medians of {rounds} rounds, GB/s", dir.display());
    let peer = peer.map(|mut values| (median(&mut values), values));
    for (d, name) in ["read", "write"].into_iter().enumerate() {
        println!("fio       {name:5} {:6.2}  {:.2?}", peer[d].0, peer[d].1);
        for (engine, _, results) in &mut benches {
            let ours = median(&mut results[d]);
            println!("{engine:9} {name:5} {ours:6.2}  {:.3} of fio  {:.2?}", ours / peer[d].0, results[d]);
        }
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    if arguments.first().is_some_and(|a| a == "--compare") {
        let number = |n: usize, otherwise| arguments.get(n).and_then(|a| a.parse().ok()).unwrap_or(otherwise);
        compare(
            &arguments.get(1).map_or_else(|| PathBuf::from("."), PathBuf::from),
            number(2, 1),
            number(3, 7) as usize,
        );
    } else {
        criterion_groups(Path::new("."));
    }
}
