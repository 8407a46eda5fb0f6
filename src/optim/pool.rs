//! The threads that updates and other host-wide work run on.
//!
//! P1: a run ends only when every started task has ended, so tasks may borrow from the caller. P2: a panic in a task
//! is an error of the run, and the threads live on. P3: a run allocates nothing. P4: idle threads sleep.
#![expect(unsafe_code, reason = "lends a borrowed closure to threads that outlive the borrow; P1 makes it sound")]

use std::{
    any::Any,
    cell::Cell,
    num::NonZeroUsize,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

use crossbeam::utils::CachePadded;
use parking_lot::{Condvar, Mutex};

use crate::{
    error::{Code, Error, Result},
    optim::isa::FloatMode,
    os_error,
};

thread_local! {
    /// True while this thread runs a task of some pool.
    static IN_TASK: Cell<bool> = const { Cell::new(false) };
}

/// A fixed set of threads, named `funicular-pool-N`. One run at a time; further callers wait their turn.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Held by the caller whose run is under way.
    turn: Mutex<()>,
    /// The process that has the threads.
    pid: u32,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Notified when there is a run, or when the pool closes.
    work: Condvar,
    /// Notified when the last thread has left a run.
    done: Condvar,
    /// The next task to claim; the number of tasks or more once all are claimed.
    next: CachePadded<AtomicUsize>,
}

#[derive(Debug, Default)]
struct State {
    run: Option<Run>,
    /// Counts jobs, so that a thread enters each once.
    number: u64,
    /// Threads inside the run.
    active: usize,
    /// Message of the first panic.
    panic: Option<String>,
    closing: bool,
}

#[derive(Clone, Copy, Debug)]
struct Run {
    task: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

// SAFETY: the closure is `Sync`, and P1 keeps it alive while a thread can reach it.
unsafe impl Send for Run {}

/// What the calling thread does during a run, besides waiting for its end.
type Beside<'a> = Option<&'a mut dyn FnMut()>;

/// Runs it; the error is the message of a panic.
fn do_beside(beside: Beside<'_>) -> std::result::Result<(), String> {
    beside.map_or(Ok(()), |work| catch_unwind(AssertUnwindSafe(work)).map_err(|p| said(p.as_ref())))
}

impl Pool {
    /// `threads` threads, or one for each processor that the affinity mask and the cgroup's CPU quota allow.
    ///
    /// # Errors
    /// [`Code::NoThread`] when the system refuses a thread.
    pub fn new(threads: Option<usize>) -> Result<Self> {
        let count = threads.unwrap_or_else(Self::default_threads).max(1);
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            work: Condvar::new(),
            done: Condvar::new(),
            next: CachePadded::new(AtomicUsize::new(0)),
        });
        // Built up in place: if a spawn fails, dropping the pool joins those that started.
        let mut pool =
            Self { shared, threads: Vec::with_capacity(count), turn: Mutex::new(()), pid: std::process::id() };
        for index in 0..count {
            let shared = Arc::clone(&pool.shared);
            let thread = os_error::start_thread(&format!("funicular-pool-{index}"), move || shared.serve());
            pool.threads.push(thread.map_err(|e| {
                let purpose = format!("the optimizer's pool ({index} of {count} are there)");
                os_error::no_thread(&purpose, &e, "lower budget.threads")
            })?);
        }
        Ok(pool)
    }

    /// Processors that the affinity mask and the cgroup's CPU quota (v1 or v2) allow; at least 1.
    pub fn default_threads() -> usize {
        std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
    }

    /// Its number of threads.
    pub fn threads(&self) -> usize {
        self.threads.len()
    }

    /// Runs `task(0)` to `task(tasks - 1)` on the pool's threads, in any order, and waits for them. A single task, or a
    /// run from inside a task, runs on the calling thread.
    ///
    /// # Errors
    /// `FN-E105` when a task panicked: tasks not started by then are skipped. `FN-E103` in a forked child.
    pub fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) -> Result<()> {
        self.run_all(tasks, task, None)
    }

    /// [`Self::run`], while the calling thread does something else, once; waits for both. Every task runs on the pool's threads.
    ///
    /// # Errors
    /// As for [`Self::run`], also when `beside` panicked.
    pub fn run_beside(&self, tasks: usize, task: &(dyn Fn(usize) + Sync), beside: &mut dyn FnMut()) -> Result<()> {
        self.run_all(tasks, task, Some(beside))
    }

    fn run_all(&self, tasks: usize, task: &(dyn Fn(usize) + Sync), beside: Beside<'_>) -> Result<()> {
        if self.pid != std::process::id() {
            return Err(Error::new(Code::Forked, "the optimizer's threads exist in the parent process only.")
                .action("Start worker processes by spawn, or build the optimizer in the child."));
        }
        // Inside a task, `turn` may be held by the run that the task belongs to: waiting for it would never end.
        if tasks == 0 || (tasks == 1 && beside.is_none()) || IN_TASK.get() {
            run_here(tasks, task)?;
            return do_beside(beside).map_err(|what| panicked(&what));
        }
        let turn = self.turn.lock();
        // SAFETY: only the lifetime changes. `finish` below returns after the last thread left the run, and no thread
        // can enter it later, because `finish` also takes it out of the state.
        let task = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const (dyn Fn(usize) + Sync + 'static)>(task)
        };
        self.shared.start(Run { task, tasks });
        // `do_beside` catches a panic: the pool's threads may still use what the caller has lent.
        let beside = do_beside(beside);
        let panic = self.shared.finish(tasks);
        drop(turn);
        panic.map_or(beside, Err).map_err(|what| panicked(&what))
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if self.pid != std::process::id() {
            // The threads exist in the parent process only; there is nothing here to join or detach.
            self.threads.drain(..).for_each(std::mem::forget);
            return;
        }
        self.shared.state.lock().closing = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // A thread catches its tasks' panics, so there is no error to look at.
            drop(thread.join());
        }
    }
}

impl Shared {
    /// The loop of a pool thread.
    fn serve(&self) {
        // A new thread inherits the mode of the thread that made the pool.
        FloatMode::ieee().keep();
        let mut last = 0;
        loop {
            let run = {
                let mut state = self.state.lock();
                loop {
                    if state.closing {
                        return;
                    }
                    match state.run {
                        Some(run) if state.number != last => {
                            last = state.number;
                            state.active += 1;
                            break run;
                        }
                        _ => self.work.wait(&mut state),
                    }
                }
            };
            self.work_on(run);
            let mut state = self.state.lock();
            state.active -= 1;
            if state.active == 0 {
                self.done.notify_all();
            }
        }
    }

    fn start(&self, run: Run) {
        let mut state = self.state.lock();
        self.next.store(0, Ordering::Relaxed);
        state.number += 1;
        state.panic = None;
        state.run = Some(run);
        drop(state);
        self.work.notify_all();
    }

    /// Claims and runs tasks until none is left.
    fn work_on(&self, run: Run) {
        // SAFETY: P1, see `run_all`.
        let task = unsafe { &*run.task };
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= run.tasks {
                return;
            }
            if let Err(what) = catch(|| task(index)) {
                self.state.lock().panic.get_or_insert(what);
                self.next.store(run.tasks, Ordering::Relaxed);
            }
        }
    }

    /// Waits for the end of the run and removes it; returns the message of its first panic.
    fn finish(&self, tasks: usize) -> Option<String> {
        let mut state = self.state.lock();
        // The last thread that leaves the run notifies `done`; a thread leaves when no task is left to claim.
        while state.active > 0 || self.next.load(Ordering::Relaxed) < tasks {
            self.done.wait(&mut state);
        }
        state.run = None;
        state.panic.take()
    }
}

fn run_here(tasks: usize, task: &(dyn Fn(usize) + Sync)) -> Result<()> {
    for index in 0..tasks {
        catch(|| task(index)).map_err(|what| panicked(&what))?;
    }
    Ok(())
}

/// Runs a task; returns the message if it panics.
fn catch(task: impl FnOnce()) -> std::result::Result<(), String> {
    let outer = IN_TASK.replace(true);
    // No code reads what a panicked task left half done: its run fails.
    let result = catch_unwind(AssertUnwindSafe(task));
    IN_TASK.set(outer);
    result.map_err(|payload| said(payload.as_ref()))
}

fn said(payload: &(dyn Any + Send)) -> String {
    payload
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned())
}

fn panicked(what: &str) -> Error {
    Error::new(Code::Panicked, format!("a task on the optimizer's threads panicked: {what}."))
        .action("Please report it with the traceback.")
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    fn counts(pool: &Pool, tasks: usize) -> Vec<usize> {
        let counts: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
        let task = |i: usize| {
            counts[i].fetch_add(1, Ordering::Relaxed);
        };
        pool.run(tasks, &task).expect("no panic");
        counts.into_iter().map(AtomicUsize::into_inner).collect()
    }

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 7] {
            let pool = Pool::new(Some(threads)).expect("threads");
            assert_eq!(pool.threads(), threads);
            for round in 0..300 {
                let tasks = round % 37;
                assert_eq!(counts(&pool, tasks), vec![1; tasks]);
            }
        }
    }

    #[test]
    fn a_panic_is_an_error_and_the_pool_lives_on() {
        let pool = Pool::new(Some(2)).expect("threads");
        for _ in 0..20 {
            for tasks in [1, 50] {
                let e = pool.run(tasks, &|i| assert!(i != tasks - 1, "task {i} is unwell")).expect_err("panicked");
                assert_eq!(e.code(), Code::Panicked);
                assert!(e.to_string().contains("is unwell"), "{e}");
                assert_eq!(counts(&pool, 9), vec![1; 9]);
            }
        }
    }

    #[test]
    fn a_run_ends_after_its_last_task_has_ended() {
        let pool = Pool::new(Some(3)).expect("threads");
        let ended = AtomicUsize::new(0);
        let task = |i: usize| {
            std::thread::sleep(std::time::Duration::from_millis(5 * i as u64));
            ended.fetch_add(1, Ordering::Relaxed);
        };
        pool.run(3, &task).expect("no panic");
        assert_eq!(ended.into_inner(), 3);
    }

    #[test]
    fn the_caller_may_do_something_else_meanwhile() {
        for threads in [1, 3] {
            let pool = Pool::new(Some(threads)).expect("threads");
            for tasks in [0, 1, 2, 50] {
                let (done, mut beside) = (AtomicUsize::new(0), 0);
                let caller = std::thread::current().id();
                let task = |_| {
                    assert_ne!(std::thread::current().id(), caller);
                    done.fetch_add(1, Ordering::Relaxed);
                };
                pool.run_beside(tasks, &task, &mut || beside += 1).expect("no panic");
                assert_eq!((done.into_inner(), beside), (tasks, 1));
                let e = pool.run_beside(tasks, &|_| (), &mut || panic!("beside")).expect_err("panicked");
                assert_eq!(e.code(), Code::Panicked);
                assert_eq!(counts(&pool, 9), vec![1; 9]);
            }
        }
    }

    #[test]
    fn a_panic_skips_what_has_not_started() {
        let pool = Pool::new(Some(2)).expect("threads");
        let started = AtomicUsize::new(0);
        let e = pool.run(2000, &|i| {
            started.fetch_add(1, Ordering::Relaxed);
            assert!(i != 0, "the first");
            std::thread::sleep(std::time::Duration::from_millis(1));
        });
        assert_eq!(e.expect_err("panicked").code(), Code::Panicked);
        assert!(started.into_inner() < 2000);
    }

    #[test]
    fn callers_from_several_threads_take_turns() {
        let pool = Pool::new(Some(2)).expect("threads");
        let inside = AtomicUsize::new(0);
        let total = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let mine = AtomicUsize::new(0);
                        pool.run(5, &|_| {
                            assert!(inside.fetch_add(1, Ordering::SeqCst) < 2);
                            mine.fetch_add(1, Ordering::SeqCst);
                            total.fetch_add(1, Ordering::SeqCst);
                            inside.fetch_sub(1, Ordering::SeqCst);
                        })
                        .expect("no panic");
                        assert_eq!(mine.into_inner(), 5);
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 4000);
    }

    #[test]
    fn a_run_inside_a_task_does_not_wait_for_itself() {
        let pool = Pool::new(Some(2)).expect("threads");
        let total = AtomicUsize::new(0);
        pool.run(4, &|_| {
            pool.run(3, &|_| {
                total.fetch_add(1, Ordering::Relaxed);
            })
            .expect("no panic");
        })
        .expect("no panic");
        assert_eq!(total.into_inner(), 12);
    }

    #[test]
    fn a_forked_child_gets_an_error_not_a_hang() {
        let pool = Pool::new(Some(2)).expect("threads");
        // SAFETY: the child calls nothing that another thread of the parent could hold a lock for, and leaves by _exit.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let refused = pool.run_all(2, &|_| (), None).is_err_and(|e| e.code() == Code::Forked);
            drop(pool);
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { libc::_exit(i32::from(!refused)) };
        }
        let mut status = -1;
        // SAFETY: waits for the child made above.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn threads_do_not_inherit_a_hostile_floating_point_mode() {
        let pool = crate::optim::isa::tests::in_a_hostile_mode(|| Pool::new(Some(2))).expect("threads");
        let sums = [AtomicU64::new(0), AtomicU64::new(0)];
        pool.run(2, &|i| {
            let tiny = std::hint::black_box(f32::from_bits(3));
            sums[i].store(u64::from((tiny + tiny).to_bits()), Ordering::Relaxed);
        })
        .expect("no panic");
        assert_eq!(sums.map(AtomicU64::into_inner), [6, 6]);
    }
}
