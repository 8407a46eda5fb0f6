//! What both I/O engines promise, one body for both. io_uring is skipped, and that is said, only where the kernel
//! refuses it.
#![expect(unsafe_code, reason = "restricts test threads with seccomp and capset")]
#![expect(clippy::unwrap_used, clippy::print_stderr, reason = "tests")]

use std::{
    fs::OpenOptions,
    os::unix::fs::{FileExt, OpenOptionsExt},
    sync::Arc,
    time::Duration,
};

use crossbeam::channel::{Receiver, unbounded};
use funicular::{
    Code,
    io::{
        DirectIo, Direction, EngineChoice, EngineKind, EngineOptions, Fault, Faults, FileId, IoCompletion, IoEngine,
        IoFile, IoPart, IoRequest, Rule, open_engine, probe_directory, scratch_file,
    },
    memory::{SlotLease, SlotPool},
    quantities::ByteCount,
};
use proptest::prelude::*;
use tempfile::TempDir;

const PAGE: usize = 4096;
/// No completion of these tests takes this long; waiting for one that never comes ends.
const PATIENCE: Duration = Duration::from_secs(60);

struct Rig {
    engine: Option<Box<dyn IoEngine>>,
    done: Receiver<IoCompletion>,
    pool: SlotPool,
    faults: Arc<Faults>,
    notes: Vec<String>,
    dir: TempDir,
}

fn disk() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// An engine over `files` files of `file_len` bytes and a pool of 4 slots of `slot_len` bytes.
fn rig(choice: EngineChoice, direct: bool, files: usize, file_len: u64, slot_len: u64, depth: u32) -> Option<Rig> {
    let dir = disk();
    let pool = SlotPool::new(4, ByteCount(slot_len), "a test").unwrap();
    let faults = Arc::new(Faults::default());
    let files = (0..files).map(|n| {
        let path = dir.path().join(format!("file{n}"));
        let flags = if direct { libc::O_DIRECT } else { 0 };
        let file = OpenOptions::new().read(true).write(true).create(true).custom_flags(flags).open(&path).unwrap();
        file.set_len(file_len).unwrap();
        IoFile::new(file, path.to_string_lossy(), direct)
    });
    let options =
        EngineOptions { choice, queue_depth: depth, block: 2 * PAGE, threads: 4, faults: Arc::clone(&faults) };
    let (sender, done) = unbounded();
    match open_engine(&options, files.collect(), &[Arc::clone(pool.region())], move |c| drop(sender.send(c))) {
        Ok(opened) => Some(Rig { engine: Some(opened.engine), done, pool, faults, notes: opened.notes, dir }),
        Err(e) if e.code() == Code::EngineUnavailable => {
            eprintln!("skipped: {e}");
            None
        }
        Err(e) => panic!("{e}"),
    }
}

impl Rig {
    fn submit(&self, ticket: u64, lease: SlotLease, parts: Vec<IoPart>) {
        self.engine.as_ref().unwrap().submit(IoRequest { ticket, lease, parts }).unwrap();
    }

    fn wait(&self) -> IoCompletion {
        self.done.recv_timeout(PATIENCE).expect("a completion")
    }

    fn run(&self, lease: SlotLease, parts: Vec<IoPart>) -> IoCompletion {
        self.submit(7, lease, parts);
        self.wait()
    }

    fn contents(&self, file: usize) -> Vec<u8> {
        std::fs::read(self.dir.path().join(format!("file{file}"))).unwrap()
    }
}

/// Runs `body` over both engines, direct and buffered.
fn over_all(files: usize, file_len: u64, slot_len: u64, depth: u32, body: impl Fn(&mut Rig, bool)) {
    let probe = probe_directory(disk().path(), DirectIo::Preferred).unwrap();
    for choice in [EngineChoice::IoUring, EngineChoice::Threads] {
        for direct in [true, false] {
            if direct && !probe.direct {
                eprintln!("skipped: no direct I/O in {}", env!("CARGO_TARGET_TMPDIR"));
                continue;
            }
            if let Some(mut rig) = rig(choice, direct, files, file_len, slot_len, depth) {
                body(&mut rig, direct);
            }
        }
    }
}

fn part(direction: Direction, file: u32, offset: usize, start: usize, len: usize) -> IoPart {
    IoPart { direction, file: FileId(file), offset: offset as u64, start, len }
}

fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| ((i * 31) ^ (i >> 8) ^ (seed * 97)) as u8).collect()
}

#[derive(Clone, Debug)]
struct Wish {
    write: bool,
    file: u32,
    page: usize,
    pages: usize,
}

fn wishes() -> impl Strategy<Value = Vec<Vec<Wish>>> {
    let wish = (any::<bool>(), 0u32..2, 0usize..32, 0usize..7).prop_map(|(write, file, page, pages)| Wish {
        write,
        file,
        page,
        pages: pages.min(32 - page),
    });
    prop::collection::vec(prop::collection::vec(wish, 0..10), 1..6)
}

#[test]
fn random_requests_do_what_a_model_does() {
    over_all(2, 32 * PAGE as u64, 32 * PAGE as u64, 5, |rig, _| {
        let model = std::cell::RefCell::new(vec![vec![0u8; 32 * PAGE]; 2]);
        let seed = std::cell::Cell::new(0);
        let config = ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() };
        let mut runner = proptest::test_runner::TestRunner::new(config);
        let body = |(requests, short): (Vec<Vec<Wish>>, Option<(u64, usize)>)| {
            let mut model = model.borrow_mut();
            for wishes in requests {
                rig.faults.clear();
                if let Some((first, keep)) = short {
                    for direction in [Direction::Read, Direction::Write] {
                        rig.faults.add(Rule { direction, first, times: 2, fault: Fault::Short(keep) });
                    }
                }
                // Parts of a request are concurrent, so they must not overlap: a wish that does is dropped.
                let mut parts: Vec<IoPart> = Vec::new();
                let mut start = 0;
                for wish in wishes {
                    let (offset, len) = (wish.page * PAGE, wish.pages * PAGE);
                    let clash = parts.iter().any(|p| {
                        p.file.0 == wish.file
                            && (p.offset as usize) < offset + len
                            && offset < p.offset as usize + p.len
                    });
                    if !clash && start + len <= 32 * PAGE {
                        let direction = if wish.write { Direction::Write } else { Direction::Read };
                        parts.push(part(direction, wish.file, offset, start, len));
                        start += len;
                    }
                }
                seed.set(seed.get() + 1);
                let mut lease = rig.pool.lease().unwrap();
                let bytes = pattern(seed.get(), lease.len());
                lease.bytes().copy_from_slice(&bytes);
                let mut done = rig.run(lease, parts.clone());
                prop_assert!(done.result.is_ok(), "{:?}", done.result);
                prop_assert_eq!((done.ticket, &done.parts), (7, &parts));
                let mut expected = bytes.clone();
                for p in &parts {
                    let at = p.offset as usize;
                    let (file, slot) = (at..at + p.len, p.start..p.start + p.len);
                    match p.direction {
                        Direction::Write => model[p.file.index()][file].copy_from_slice(&bytes[slot]),
                        Direction::Read => expected[slot].copy_from_slice(&model[p.file.index()][file]),
                    }
                }
                prop_assert!(done.lease.bytes() == &expected[..], "the slot differs");
            }
            prop_assert!(rig.contents(0) == model[0] && rig.contents(1) == model[1], "a file differs");
            Ok(())
        };
        let short = prop::option::of((1u64..4, 1usize..3 * PAGE));
        runner.run(&(wishes(), short), body).unwrap();
        assert_eq!(rig.pool.free(), 4);
    });
}

#[test]
fn many_requests_from_several_threads_complete_exactly_once() {
    over_all(1, 64 * 8 * PAGE as u64, 8 * PAGE as u64, 4, |rig, _| {
        let rig: &Rig = rig;
        std::thread::scope(|scope| {
            for thread in 0..4 {
                scope.spawn(move || {
                    for n in (thread..64).step_by(4) {
                        let mut lease = loop {
                            if let Some(lease) = rig.pool.lease() {
                                break lease;
                            }
                            std::thread::yield_now();
                        };
                        lease.bytes().copy_from_slice(&pattern(n, 8 * PAGE));
                        // Back to front, and in odd pieces.
                        let parts = [(5, 3), (0, 1), (1, 4)].map(|(p, n_pages)| {
                            part(Direction::Write, 0, (n * 8 + p) * PAGE, p * PAGE, n_pages * PAGE)
                        });
                        rig.submit(n as u64, lease, parts.to_vec());
                    }
                });
            }
            let mut seen = [0; 64];
            for _ in 0..64 {
                let done = rig.wait();
                done.result.unwrap();
                seen[done.ticket as usize] += 1;
            }
            assert_eq!(seen, [1; 64]);
        });
        assert!(rig.done.try_recv().is_err());
        let contents = rig.contents(0);
        for n in 0..64 {
            assert!(contents[n * 8 * PAGE..(n + 1) * 8 * PAGE] == pattern(n, 8 * PAGE), "request {n}");
        }
    });
}

#[test]
fn reading_past_the_end_is_a_named_error() {
    over_all(2, 10_000, 8 * PAGE as u64, 4, |rig, _| {
        for (offset, len) in [(0, 4 * PAGE), (2 * PAGE, PAGE), (4 * PAGE, PAGE)] {
            let done = rig.run(rig.pool.lease().unwrap(), vec![part(Direction::Read, 1, offset, 0, len)]);
            let e = done.result.expect_err("past the end");
            assert_eq!((e.code(), e.os_error()), (Code::IoFailed, Some(libc::EIO)));
            let text = e.to_string();
            assert!(text.contains("reading") && text.contains("file1") && text.contains("only"), "{text}");
        }
        rig.run(rig.pool.lease().unwrap(), vec![part(Direction::Read, 1, 0, 0, 2 * PAGE)]).result.unwrap();
    });
}

#[test]
fn a_passing_error_of_the_disk_is_survived_and_a_lasting_one_named() {
    over_all(1, 64 * PAGE as u64, 16 * PAGE as u64, 4, |rig, _| {
        for direction in [Direction::Write, Direction::Read] {
            let parts = || vec![part(direction, 0, 0, 0, 6 * PAGE), part(direction, 0, 8 * PAGE, 8 * PAGE, 4 * PAGE)];
            let full = |rig: &Rig| {
                let mut lease = rig.pool.lease().unwrap();
                lease.bytes().copy_from_slice(&pattern(3, 16 * PAGE));
                lease
            };
            for errno in [libc::EIO, libc::EINTR, libc::EAGAIN] {
                rig.faults.add(Rule { direction, first: 2, times: 1, fault: Fault::Errno(errno) });
                let mut done = rig.run(full(rig), parts());
                done.result.unwrap();
                assert!(done.lease.bytes()[..6 * PAGE] == pattern(3, 16 * PAGE)[..6 * PAGE]);
                rig.faults.clear();
            }
            for (errno, words) in [(libc::EIO, "smartctl"), (libc::ENOSPC, "Free space"), (libc::EBADF, "dmesg")] {
                rig.faults.add(Rule { direction, first: 1, times: u64::MAX, fault: Fault::Errno(errno) });
                let done = rig.run(full(rig), parts());
                let e = done.result.expect_err("fails always");
                assert_eq!((e.code(), e.os_error()), (Code::IoFailed, Some(errno)));
                let text = e.to_string();
                assert!(text.contains("8192 bytes at offset") && text.contains("file0"), "{text}");
                assert!(text.contains(words) && !text.contains("Unknown error"), "{text}");
                assert!(text.contains(if direction == Direction::Read { "reading" } else { "writing" }), "{text}");
                assert_eq!(done.parts, parts());
                rig.faults.clear();
            }
            rig.run(full(rig), parts()).result.unwrap();
        }
        assert_eq!(rig.pool.free(), 4);
    });
}

#[test]
fn a_failed_request_keeps_its_lease_until_its_last_block_has_ended() {
    over_all(1, 4 * PAGE as u64, 4 * PAGE as u64, 2, |rig, _| {
        let mut lease = rig.pool.lease().unwrap();
        lease.bytes().fill(0x11);
        let mut lease = rig.run(lease, vec![part(Direction::Write, 0, 0, 0, 4 * PAGE)]).lease;
        lease.bytes().fill(0);
        let delay = Fault::Delay(Duration::from_millis(100));
        rig.faults.add(Rule { direction: Direction::Read, first: 1, times: 1, fault: delay });
        rig.faults.add(Rule { direction: Direction::Read, first: 2, times: 1, fault: Fault::Errno(libc::ENODEV) });
        let mut done = rig.run(lease, vec![part(Direction::Read, 0, 0, 0, 4 * PAGE)]);
        assert_eq!(done.result.expect_err("the second block fails").os_error(), Some(libc::ENODEV));
        // With threads either block may be the first one to ask for its fault.
        let arrived = done.lease.bytes().iter().filter(|&&b| b == 0x11).count();
        assert_eq!(arrived, 2 * PAGE, "the delayed block had to end first");
    });
}

#[test]
fn injected_faults_change_what_they_say() {
    over_all(1, 4 * PAGE as u64, 4 * PAGE as u64, 1, |rig, _| {
        let whole = |direction| vec![part(direction, 0, 0, 0, 4 * PAGE)];
        let mut lease = rig.pool.lease().unwrap();
        lease.bytes().fill(0x11);
        lease = rig.run(lease, whole(Direction::Write)).lease;
        rig.faults.add(Rule { direction: Direction::Read, first: 2, times: 1, fault: Fault::FlipBit });
        let mut done = rig.run(lease, whole(Direction::Read));
        done.result.unwrap();
        let wrong: Vec<usize> = (0..4 * PAGE).filter(|&i| done.lease.bytes()[i] != 0x11).collect();
        assert_eq!(wrong, [2 * PAGE]);
        rig.faults.clear();

        done.lease.bytes().fill(0x22);
        rig.faults.add(Rule { direction: Direction::Write, first: 1, times: 1, fault: Fault::Lost });
        let done = rig.run(done.lease, whole(Direction::Write));
        done.result.unwrap();
        let contents = rig.contents(0);
        assert!(contents[..2 * PAGE].iter().all(|&b| b == 0x11) && contents[2 * PAGE..].iter().all(|&b| b == 0x22));
    });
}

#[test]
fn dropping_an_engine_waits_for_what_is_in_flight() {
    over_all(1, 16 * PAGE as u64, 4 * PAGE as u64, 2, |rig, _| {
        let delay = Fault::Delay(Duration::from_millis(50));
        rig.faults.add(Rule { direction: Direction::Write, first: 1, times: u64::MAX, fault: delay });
        for n in 0..4 {
            let mut lease = rig.pool.lease().unwrap();
            lease.bytes().fill(n as u8 + 1);
            rig.submit(n as u64, lease, vec![part(Direction::Write, 0, n * 4 * PAGE, 0, 4 * PAGE)]);
        }
        assert_eq!(rig.pool.free(), 0);
        rig.engine = None;
        let done: Vec<IoCompletion> = rig.done.try_iter().collect();
        assert_eq!(done.len(), 4, "every lease is back when the drop returns");
        let contents = rig.contents(0);
        let mut cancelled = 0;
        for c in done {
            let at = c.ticket as usize * 4 * PAGE;
            match c.result {
                Ok(()) => assert!(contents[at..at + 4 * PAGE].iter().all(|&b| b == c.ticket as u8 + 1)),
                Err(e) => {
                    assert_eq!(e.code(), Code::Closed);
                    cancelled += 1;
                }
            }
        }
        assert!(cancelled > 0, "the queue holds two blocks, so some request was not begun");
        assert_eq!(rig.pool.free(), 4);
    });
}

#[test]
fn what_does_not_fit_is_refused_and_comes_back() {
    over_all(1, 64 * PAGE as u64, 4 * PAGE as u64, 4, |rig, direct| {
        let mut wrong = vec![
            (part(Direction::Read, 0, 0, PAGE, 4 * PAGE), "outside the slot"),
            (part(Direction::Read, 0, 0, usize::MAX, 2), "outside the slot"),
            (part(Direction::Read, 3, 0, 0, PAGE), "no such file"),
            (part(Direction::Write, 0, i64::MAX as usize, 0, PAGE), "beyond what a file can hold"),
        ];
        if direct {
            wrong.push((part(Direction::Read, 0, 512, 0, PAGE), "not aligned"));
            wrong.push((part(Direction::Read, 0, 0, 512, PAGE), "not aligned"));
            wrong.push((part(Direction::Read, 0, 0, 0, 512), "not aligned"));
        }
        for (part, words) in wrong {
            let request = IoRequest { ticket: 1, lease: rig.pool.lease().unwrap(), parts: vec![part] };
            let rejected = rig.engine.as_ref().unwrap().submit(request).expect_err("does not fit");
            assert_eq!(rejected.request.parts, [part]);
            assert!(rejected.error.to_string().contains(words), "{}", rejected.error);
        }
        assert!(rig.done.try_recv().is_err());
        if !direct {
            let parts = vec![part(Direction::Write, 0, 7, 3, 10_001)];
            rig.run(rig.pool.lease().unwrap(), parts).result.unwrap();
        }
    });
}

#[test]
fn a_sink_that_panics_stops_the_engine_without_a_hang() {
    for choice in [EngineChoice::IoUring, EngineChoice::Threads] {
        let pool = SlotPool::new(1, ByteCount(4096), "a test").unwrap();
        let options = EngineOptions { choice, ..EngineOptions::default() };
        let (sender, done) = unbounded();
        let sink = move |_| {
            sender.send(()).unwrap();
            panic!("on purpose");
        };
        let Ok(opened) = open_engine(&options, Vec::new(), &[], sink) else { continue };
        let request = |lease| IoRequest { ticket: 0, lease, parts: Vec::new() };
        opened.engine.submit(request(pool.lease().unwrap())).unwrap();
        done.recv_timeout(PATIENCE).unwrap();
        let rejected = loop {
            // The lease is free again only after the panic.
            if let Some(lease) = pool.lease()
                && let Err(rejected) = opened.engine.submit(request(lease))
            {
                break rejected;
            }
            std::thread::yield_now();
        };
        assert_eq!(rejected.error.code(), Code::Panicked);
    }
}

/// From now on the system call `number` fails with `errno` in this thread and those it starts, if its argument
/// `argument` has one of the bits `mask`.
fn forbid(number: libc::c_long, errno: i32, condition: Option<(u32, u32)>) {
    let statement = |code: u32, k: u32, jt: u8, jf: u8| libc::sock_filter { code: code as u16, jt, jf, k };
    let (load, jump, jump_set, ret) = (0x20, 0x15, 0x45, 0x06);
    let mut filter = vec![statement(load, 0, 0, 0)];
    match condition {
        None => filter.push(statement(jump, number as u32, 0, 1)),
        Some((argument, mask)) => filter.extend([
            statement(jump, number as u32, 0, 3),
            statement(load, 16 + 8 * argument, 0, 0),
            statement(jump_set, mask, 0, 1),
        ]),
    }
    filter.push(statement(ret, libc::SECCOMP_RET_ERRNO | errno as u32, 0, 0));
    filter.push(statement(ret, libc::SECCOMP_RET_ALLOW, 0, 0));
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: a valid program that lives during the call; it concerns this thread only.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program), 0);
    }
}

fn in_a_thread(body: impl FnOnce() + Send + 'static) {
    if let Err(panic) = std::thread::spawn(body).join() {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn blocked_io_uring_falls_back_with_a_note_or_is_an_error() {
    for (errno, words) in [(libc::EPERM, "seccomp"), (libc::ENOSYS, "no io_uring"), (libc::ENOMEM, "RLIMIT_MEMLOCK")] {
        in_a_thread(move || {
            forbid(libc::SYS_io_uring_setup, errno, None);
            let rig = rig(EngineChoice::Auto, false, 1, 4096, 4096, 4).unwrap();
            assert_eq!(rig.engine.as_ref().unwrap().kind(), EngineKind::Threads);
            assert!(rig.notes[0].starts_with("FN-W601 io_uring unavailable"), "{:?}", rig.notes);
            assert!(rig.notes[0].contains(words), "{:?}", rig.notes);
            rig.run(rig.pool.lease().unwrap(), vec![part(Direction::Read, 0, 0, 0, 4096)]).result.unwrap();
            let options = EngineOptions { choice: EngineChoice::IoUring, ..EngineOptions::default() };
            let e = open_engine(&options, Vec::new(), &[], drop).expect_err("blocked");
            assert_eq!((e.code(), e.os_error()), (Code::EngineUnavailable, Some(errno)));
            assert!(e.to_string().contains(words), "{e}");
        });
    }
    in_a_thread(|| {
        // Set-up works, operations do not.
        forbid(libc::SYS_io_uring_enter, libc::EPERM, None);
        let rig = rig(EngineChoice::Auto, false, 1, 4096, 4096, 4).unwrap();
        assert_eq!(rig.engine.as_ref().unwrap().kind(), EngineKind::Threads);
    });
}

#[test]
fn direct_io_that_only_opens_is_not_taken_for_working() {
    for call in [libc::SYS_openat, libc::SYS_open] {
        in_a_thread(move || {
            let argument = if call == libc::SYS_openat { 2 } else { 1 };
            forbid(call, libc::EINVAL, Some((argument, libc::O_DIRECT as u32)));
            let dir = disk();
            let probe = probe_directory(dir.path(), DirectIo::Preferred).unwrap();
            // std opens with openat on every Linux; the other call is there in case that changes.
            if call == libc::SYS_openat {
                assert!(!probe.direct);
                assert!(probe.notes[0].starts_with("FN-W604"), "{:?}", probe.notes);
                let e = probe_directory(dir.path(), DirectIo::Required).expect_err("refused");
                assert_eq!((e.code(), e.os_error()), (Code::NoDirectIo, Some(libc::EINVAL)));
            }
        });
    }
}

#[test]
fn a_scratch_file_has_no_name_even_without_o_tmpfile() {
    in_a_thread(|| {
        let tmpfile_only = libc::O_TMPFILE & !libc::O_DIRECTORY;
        for forbidden in [false, true] {
            if forbidden {
                forbid(libc::SYS_openat, libc::EOPNOTSUPP, Some((2, tmpfile_only as u32)));
            }
            let dir = disk();
            let file = scratch_file(dir.path(), false).unwrap();
            file.write_all_at(b"data", 0).unwrap();
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        }
    });
}

#[test]
fn a_small_limit_of_locked_memory_is_a_note_not_a_failure() {
    in_a_thread(|| {
        drop_capability_to_lock();
        let limit = soft_memlock();
        if limit > 1 << 30 {
            eprintln!("skipped: {limit} bytes may be locked here");
            return;
        }
        let dir = disk();
        let path = dir.path().join("file");
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        file.write_all_at(&pattern(1, 4 * PAGE), 0).unwrap();
        let small = SlotPool::new(1, ByteCount(4 * PAGE as u64), "a test").unwrap();
        let large = SlotPool::new(1, ByteCount(limit + (8 << 20)), "a test").unwrap();
        let (sender, done) = unbounded();
        let options = EngineOptions { choice: EngineChoice::IoUring, ..EngineOptions::default() };
        let files = vec![IoFile::new(file, "file", false)];
        let regions = [Arc::clone(small.region()), Arc::clone(large.region())];
        let opened = match open_engine(&options, files, &regions, move |c: IoCompletion| drop(sender.send(c))) {
            Ok(opened) => opened,
            Err(e) => return eprintln!("skipped: {e}"),
        };
        assert!(opened.notes[0].starts_with("FN-I602"), "{:?}", opened.notes);
        for pool in [&small, &large] {
            let lease = pool.lease().unwrap();
            let parts = vec![part(Direction::Read, 0, 0, 0, 4 * PAGE)];
            opened.engine.submit(IoRequest { ticket: 0, lease, parts }).unwrap();
            let mut done = done.recv_timeout(PATIENCE).unwrap();
            done.result.unwrap();
            assert!(done.lease.bytes()[..4 * PAGE] == pattern(1, 4 * PAGE));
        }
    });
}

fn soft_memlock() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: room for the result.
    assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) }, 0);
    limit.rlim_cur
}

/// Takes CAP_IPC_LOCK from this thread: with it, limits do not count.
fn drop_capability_to_lock() {
    let header = [0x2008_0522u32, 0];
    let mut data = [0u32; 6];
    // SAFETY: header and data have the layout of version 3 of the interface; only this thread changes.
    unsafe {
        assert_eq!(libc::syscall(libc::SYS_capget, header.as_ptr(), data.as_mut_ptr()), 0);
        data[0] &= !(1 << 14);
        assert_eq!(libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()), 0);
    }
}
