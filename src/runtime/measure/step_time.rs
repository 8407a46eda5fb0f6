//! Each step's time, split into compute and stalls by cause, as the compute stream saw it.
//!
//! T1: the stream's time is one sequence of turns; a turn lasts from its mark to the next one's and counts for one thing. T2: marks
//! are read by the thread that learns of a step's end, and by whoever asks; the thread that trains never waits for them. T3: the
//! wall's time comes from the host's clock alone: read where the step ends, on a GPU where the host sees that it has ended.

use std::{collections::VecDeque, time::Duration};

use parking_lot::{Condvar, Mutex};

use crate::{
    device::{DeviceKind, Elapsed, Gate, MARKS, Mark, StreamRef},
    error::{Code, Error, Result},
    runtime::{
        Interrupted, Runtime,
        disk::threads::Ended,
        measure::stats::{Cause, Link},
        shared::{SLICE, Shared},
    },
    schedule::Phase,
    units::UnitId,
};

/// Steps that may be over before all of their figures are known.
const STEPS: usize = 64;
/// A reader waits at most so long for the thread that reads the marks.
const PATIENCE: Duration = Duration::from_secs(1);
/// The trace's track of the stream that computes.
const TRACK: &str = "compute";

/// What the time of a step, or of several, went to, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepTime {
    /// From the end of the step before to its own end, by the host's clock.
    pub wall: u64,
    /// What the compute stream did not wait, by the device's clock.
    pub compute: u64,
    /// What it waited, by cause, by the device's clock.
    pub stalls: [u64; Cause::ALL.len()],
    /// What each link was busy meanwhile.
    pub busy: [u64; Link::ALL.len()],
}

impl StepTime {
    fn add(&mut self, other: &Self) {
        let sum = |a: &mut [u64], b: &[u64]| a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        self.wall += other.wall;
        self.compute += other.compute;
        sum(&mut self.stalls, &other.stalls);
        sum(&mut self.busy, &other.busy);
    }
}

/// The steps measured so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Times {
    /// The last one.
    pub last: StepTime,
    /// All together, without the first, which learns the order, unless it is the only one.
    pub total: StepTime,
    /// How many are in `total`.
    pub steps: u64,
    /// Times that are missing: marks too old when they were read, or never made.
    pub lost: u64,
}

/// What the compute stream does from a mark on.
#[derive(Clone, Copy, Debug)]
struct Turn {
    mark: Mark,
    /// `None`: it computes.
    cause: Option<Cause>,
    window: Window,
    ends_step: bool,
}

/// The window opened last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Window {
    unit: u64,
    phase: &'static str,
}

#[derive(Debug)]
struct State {
    /// Those whose end was not read yet; the first is what came last of those that were.
    turns: VecDeque<Turn>,
    window: Window,
    /// The step under way, as far as read.
    step: StepTime,
    /// Steps whose turns were read, and what the wall's clock and the links said at the ends of steps.
    read: VecDeque<StepTime>,
    ends: VecDeque<(u64, [u64; Link::ALL.len()])>,
    before: (u64, [u64; Link::ALL.len()]),
    /// The first step is the only one in `times`.
    first: bool,
    times: Times,
    /// Steps whose ends were enqueued, were seen, and were read.
    enqueued: u64,
    seen: u64,
    over: u64,
    gate: Gate,
}

/// The time of the compute stream.
#[derive(Debug)]
pub(crate) struct Split {
    state: Mutex<State>,
    changed: Condvar,
}

impl Default for Split {
    fn default() -> Self {
        let state = State {
            turns: VecDeque::with_capacity(MARKS as usize + 1),
            window: Window { unit: u64::MAX, phase: "compute" },
            step: StepTime::default(),
            read: VecDeque::with_capacity(STEPS),
            ends: VecDeque::with_capacity(STEPS),
            before: Default::default(),
            first: true,
            times: Times::default(),
            enqueued: 0,
            seen: 0,
            over: 0,
            gate: Gate::OPEN,
        };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }
}

impl State {
    /// Ends the first turn, which took so long; `None` if nobody knows.
    fn advance(&mut self, nanos: Option<u64>) {
        let Some(turn) = self.turns.pop_front() else { return };
        match (nanos, turn.cause) {
            (None, _) => self.times.lost += 1,
            (Some(nanos), None) => self.step.compute += nanos,
            (Some(nanos), Some(cause)) => self.step.stalls[cause as usize] += nanos,
        }
        if self.turns.front().is_some_and(|next| next.ends_step) {
            self.read.push_back(std::mem::take(&mut self.step));
            self.over += 1;
            self.complete();
        }
    }

    /// Puts together what is known of ended steps from both sides.
    fn complete(&mut self) {
        while !self.read.is_empty() && !self.ends.is_empty() {
            let (Some(mut step), Some((wall, busy))) = (self.read.pop_front(), self.ends.pop_front()) else { return };
            step.wall = wall.saturating_sub(self.before.0);
            for (link, now) in busy.iter().enumerate() {
                step.busy[link] = now.saturating_sub(self.before.1[link]);
            }
            self.before = (wall, busy);
            if self.times.steps == 1 && self.first {
                (self.times.total, self.times.steps, self.first) = (StepTime::default(), 0, false);
            }
            self.times.last = step;
            self.times.total.add(&step);
            self.times.steps += 1;
        }
    }
}

/// A wait of the training thread, until this is dropped.
pub(crate) struct Pause<'a> {
    shared: &'a Shared,
    stream: Option<u64>,
    cause: Cause,
    start: u64,
}

impl Pause<'_> {
    /// It goes on for another reason.
    pub(crate) fn turn(&mut self, cause: Cause) {
        if self.cause != cause {
            self.tell();
            self.cause = cause;
            self.shared.turn(self.stream, Some(cause), false);
        }
    }

    fn tell(&mut self) {
        self.shared.trace.span("training thread", self.cause.name(), u64::MAX, self.start, 0);
        self.start = self.shared.trace.now();
    }
}

impl Drop for Pause<'_> {
    fn drop(&mut self) {
        self.tell();
        self.shared.turn(self.stream, None, false);
    }
}

impl Shared {
    /// The training thread waits from here on, and with it the compute stream once it has done what is enqueued. Without a stream
    /// (a read outside of steps) only the host device, whose stream is the caller, takes notice.
    pub(crate) fn pause(&self, stream: Option<u64>, cause: Cause) -> Pause<'_> {
        self.turn(stream, Some(cause), false);
        Pause { shared: self, stream, cause, start: self.trace.now() }
    }

    /// The compute stream itself waits for a gate.
    pub(crate) fn wait_in_order(&self, stream: u64, gate: Gate, cause: Cause) -> Result<()> {
        self.turn(Some(stream), Some(cause), false);
        let waits = self.device.wait(StreamRef::Compute(stream), gate);
        self.turn(Some(stream), None, false);
        waits
    }

    /// What comes on the compute stream belongs to this window.
    pub(crate) fn entered(&self, unit: UnitId, phase: Phase, stream: u64) {
        let phase = match phase {
            Phase::Forward => "forward",
            Phase::Backward => "backward",
            Phase::Eval => "eval",
        };
        self.begin(stream);
        self.split.state.lock().window = Window { unit: u64::from(unit.0), phase };
        if self.trace.is_on() {
            self.turn(Some(stream), None, false);
        }
    }

    /// The first step begins, if it has not.
    fn begin(&self, stream: u64) {
        let mut state = self.split.state.lock();
        if state.turns.is_empty() {
            let (mark, window) = (self.mark(StreamRef::Compute(stream)), state.window);
            state.turns.push_back(Turn { mark, cause: None, window, ends_step: false });
            state.before = (self.trace.now(), self.busy());
        }
    }

    /// A mark; a failure of the device is told where something depends on it.
    pub(crate) fn mark(&self, stream: StreamRef) -> Mark {
        self.device.mark(stream).unwrap_or(Mark::LOST)
    }

    fn turn(&self, stream: Option<u64>, cause: Option<Cause>, ends_step: bool) {
        let stream = match (stream, self.device.kind()) {
            (Some(stream), _) => stream,
            (None, DeviceKind::Host) => 0,
            (None, DeviceKind::Cuda(_)) => return,
        };
        let mut state = self.split.state.lock();
        if state.turns.is_empty() {
            return;
        }
        if state.turns.len() > MARKS as usize {
            // Its mark has been given up too.
            state.advance(None);
        }
        let (mark, window) = (self.mark(StreamRef::Compute(stream)), state.window);
        state.turns.push_back(Turn { mark, cause, window, ends_step });
    }

    fn busy(&self) -> [u64; Link::ALL.len()] {
        Link::ALL.map(|link| self.stats.flow(link).busy_nanos)
    }

    /// An optimizer step has been enqueued.
    pub(crate) fn end_step(&self, stream: u64) -> Result<()> {
        self.begin(stream);
        self.turn(Some(stream), None, true);
        // Where the caller computes, the step is over now.
        let at = (self.device.kind() == DeviceKind::Host).then(|| self.trace.now());
        let gate = self.device.record(StreamRef::Compute(stream))?;
        let mut state = self.split.state.lock();
        state.enqueued += 1;
        state.gate = gate;
        drop(state);
        self.send(&self.to_down, Ended::Step { gate, at })
    }

    /// The end of a step was seen.
    pub(crate) fn step_ended(&self, at: Option<u64>) -> Result<()> {
        let now = at.unwrap_or_else(|| self.trace.now());
        self.read_turns()?;
        let mut state = self.split.state.lock();
        state.seen += 1;
        state.ends.push_back((now, self.busy()));
        state.complete();
        drop(state);
        self.split.changed.notify_all();
        Ok(())
    }

    /// Reads the marks that have been passed.
    fn read_turns(&self) -> Result<()> {
        loop {
            let mut state = self.split.state.lock();
            let (Some(&turn), Some(&next)) = (state.turns.front(), state.turns.get(1)) else { return Ok(()) };
            let nanos = match self.device.elapsed(turn.mark, next.mark)? {
                Elapsed::Pending => return Ok(()),
                Elapsed::Lost => None,
                // Marks of two streams of the user may lie the other way round.
                Elapsed::Nanos(nanos) => Some(u64::try_from(nanos).unwrap_or(0)),
            };
            state.advance(nanos);
            let step = state.over;
            drop(state);
            if let (Some(cause), Some(nanos)) = (turn.cause, nanos) {
                self.stats.stalled(cause, nanos);
            }
            let name = turn.cause.map_or(turn.window.phase, Cause::wait);
            self.trace.device_span(&*self.device, TRACK, name, turn.window.unit, (turn.mark, next.mark), 0)?;
            if next.ends_step {
                self.trace.step_ended(&*self.device, step, next.mark)?;
                self.trace.rebase(&*self.device, next.mark)?;
            }
        }
    }

    /// A mark at which a trace may begin: where the program runs ahead of the device, the last one that it has yet to come to, so
    /// that nothing enqueued before counts; else a new one.
    fn present(&self) -> Result<Mark> {
        if self.device.kind() == DeviceKind::Host {
            return self.device.mark(StreamRef::Compute(0));
        }
        let last = self.split.state.lock().turns.back().map(|turn| turn.mark);
        match last {
            Some(mark) if self.device.elapsed(mark, mark)? == Elapsed::Pending => Ok(mark),
            _ => self.device.mark(StreamRef::Down),
        }
    }

    /// Waits until the figures of the last step are complete, for as long as the thread that makes them so may take.
    fn caught_up(&self) {
        let mut state = self.split.state.lock();
        while state.seen < state.enqueued {
            if self.split.changed.wait_for(&mut state, PATIENCE).timed_out() {
                return;
            }
        }
    }
}

impl Runtime {
    /// What the steps' time went to, and how much was lost. Steps that the device has not ended are not in it.
    ///
    /// # Errors
    /// A failure of the device, or when closed.
    pub fn times(&self) -> Result<Times> {
        let shared = self.shared()?;
        let gate = shared.split.state.lock().gate;
        if shared.device.passed(gate)? {
            shared.caught_up();
        }
        shared.read_turns()?;
        let times = shared.split.state.lock().times;
        Ok(Times { lost: times.lost + shared.stats.lost(), ..times })
    }

    /// Starts or stops collecting a trace.
    ///
    /// # Errors
    /// A failure of the device, or when closed.
    pub fn set_trace(&self, on: bool) -> Result<()> {
        let shared = self.shared()?;
        shared.trace.set(on, &*shared.device, || shared.present())
    }

    /// Writes the trace once the device has ended the last step; returns the number of events.
    ///
    /// # Errors
    /// `FN-E301` with the file and the reason, a failure of the device, or an interruption.
    pub fn write_trace(&self, path: &std::path::Path, interrupted: Interrupted<'_>) -> Result<usize> {
        let shared = self.shared()?;
        let gate = shared.split.state.lock().gate;
        while !shared.device.block(gate, SLICE)? {
            if interrupted() {
                return Err(Error::new(Code::Interrupted, "interrupted while waiting for the end of a traced step."));
            }
        }
        shared.caught_up();
        let units = &shared.layout.units;
        let name =
            |u: u64| usize::try_from(u).ok().and_then(|i| units.get(i)).map_or(String::new(), |u| u.name.clone());
        shared.trace.write(path, &name)
    }
}
