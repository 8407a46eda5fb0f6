//! The intervals of the compute stream: the training thread begins them with marks, the thread that learns of a step's end reads the marks.

use std::time::Duration;

use crate::{
    device::{DeviceKind, Elapsed, Gate, MARKS, Mark, StreamRef},
    error::{Code, Error, Result},
    quantities::UnitId,
    runtime::{
        handle::Runtime,
        measure::{
            stats::{Cause, Link},
            step_time::{Interval, LastWindow, Times},
        },
        paging::landing::Ended,
        shared::{
            Shared,
            waits::{Interrupted, SLICE},
        },
    },
    schedule::Phase,
};

/// How long a caller that asks for the figures waits for the thread that reads the marks.
const PATIENCE: Duration = Duration::from_secs(1);
/// The trace's track of the stream that computes.
const TRACK: &str = "compute";

/// A wait of the training thread, until this is dropped.
pub(crate) struct Pause<'a> {
    shared: &'a Shared,
    stream: Option<u64>,
    cause: Cause,
    start: u64,
}

impl Pause<'_> {
    /// The wait goes on for another cause.
    pub(crate) fn change_cause(&mut self, cause: Cause) {
        if self.cause != cause {
            self.note();
            self.cause = cause;
            self.shared.begin_interval(self.stream, Some(cause), false);
        }
    }

    fn note(&mut self) {
        self.shared.trace.span("training thread", self.cause.name(), u64::MAX, self.start, 0);
        self.start = self.shared.trace.now();
    }
}

impl Drop for Pause<'_> {
    fn drop(&mut self) {
        self.note();
        self.shared.begin_interval(self.stream, None, false);
    }
}

impl Shared {
    /// The training thread waits from here on, and with it the compute stream once it has done what is enqueued. Without a stream
    /// (a read outside of steps) this counts only on the host device, whose stream is the caller.
    pub(crate) fn pause(&self, stream: Option<u64>, cause: Cause) -> Pause<'_> {
        self.begin_interval(stream, Some(cause), false);
        Pause { shared: self, stream, cause, start: self.trace.now() }
    }

    /// The compute stream itself waits for a gate.
    pub(crate) fn wait_in_order(&self, stream: u64, gate: Gate, cause: Cause) -> Result<()> {
        self.begin_interval(Some(stream), Some(cause), false);
        let waits = self.device.wait(StreamRef::Compute(stream), gate);
        self.begin_interval(Some(stream), None, false);
        waits
    }

    /// What comes on the compute stream belongs to this window.
    pub(crate) fn entered(&self, unit: UnitId, phase: Phase, stream: u64) {
        let phase = match phase {
            Phase::Forward => "forward",
            Phase::Backward => "backward",
            Phase::Eval => "eval",
        };
        self.begin_first_step(stream);
        self.step_times.state.lock().window = LastWindow { unit: u64::from(unit.0), phase };
        if self.trace.is_on() {
            self.begin_interval(Some(stream), None, false);
        }
    }

    /// The first step begins, if it has not.
    fn begin_first_step(&self, stream: u64) {
        let mut state = self.step_times.state.lock();
        if state.intervals.is_empty() {
            let (mark, window) = (self.mark(StreamRef::Compute(stream)), state.window);
            state.intervals.push_back(Interval { mark, cause: None, window, ends_step: false });
            state.before = (self.trace.now(), self.busy());
        }
    }

    /// A mark, or a lost one: a failure of the device is reported where something depends on it.
    pub(crate) fn mark(&self, stream: StreamRef) -> Mark {
        self.device.mark(stream).unwrap_or(Mark::LOST)
    }

    /// From here on the compute stream waits for other ranks, or for bytes of them. `unit`: what for; none for all.
    pub(crate) fn begin_wait(&self, stream: u64, cause: Cause, unit: Option<UnitId>) -> u64 {
        let unit = unit.map_or(u64::MAX, |unit| u64::from(unit.0));
        self.begin_interval_of(Some(stream), Some(cause), false, Some(LastWindow { unit, phase: cause.wait() }));
        self.trace.now()
    }

    /// That wait, which began then, is over. `bytes`: what went over the exchange meanwhile.
    pub(crate) fn end_wait(&self, stream: u64, (cause, unit): (Cause, Option<UnitId>), since: u64, bytes: u64) {
        self.begin_interval(Some(stream), None, false);
        let unit = unit.map_or(u64::MAX, |unit| u64::from(unit.0));
        self.trace.span("training thread", cause.name(), unit, since, bytes);
        if cause == Cause::Exchange {
            self.stats.moved(Link::Exchange, bytes, 0);
        }
    }

    /// From here on the compute stream computes, or waits for a cause.
    fn begin_interval(&self, stream: Option<u64>, cause: Option<Cause>, ends_step: bool) {
        self.begin_interval_of(stream, cause, ends_step, None);
    }

    /// The same, for something else than the last window.
    fn begin_interval_of(&self, stream: Option<u64>, cause: Option<Cause>, ends_step: bool, of: Option<LastWindow>) {
        let stream = match (stream, self.device.kind()) {
            (Some(stream), _) => stream,
            (None, DeviceKind::Host) => 0,
            (None, DeviceKind::Cuda(_)) => return,
        };
        let mut state = self.step_times.state.lock();
        if state.intervals.is_empty() {
            return;
        }
        if state.intervals.len() > MARKS as usize {
            // The device has given up the mark of the oldest one, too.
            state.advance(None);
        }
        let (mark, window) = (self.mark(StreamRef::Compute(stream)), of.unwrap_or(state.window));
        state.intervals.push_back(Interval { mark, cause, window, ends_step });
    }

    fn busy(&self) -> [u64; Link::ALL.len()] {
        Link::ALL.map(|link| self.stats.flow(link).busy_nanos)
    }

    /// An optimizer step has been enqueued.
    pub(crate) fn end_step(&self, stream: u64) -> Result<()> {
        self.begin_first_step(stream);
        self.begin_interval(Some(stream), None, true);
        // Where the caller computes, the step is over now.
        let at = (self.device.kind() == DeviceKind::Host).then(|| self.trace.now());
        let gate = self.device.record(StreamRef::Compute(stream))?;
        let mut state = self.step_times.state.lock();
        state.enqueued += 1;
        state.gate = gate;
        drop(state);
        self.send(&self.to_down, Ended::Step { gate, at })
    }

    /// The end of a step was seen.
    pub(crate) fn step_ended(&self, at: Option<u64>) -> Result<()> {
        let now = at.unwrap_or_else(|| self.trace.now());
        self.read_intervals()?;
        let mut state = self.step_times.state.lock();
        state.seen += 1;
        state.ends.push_back((now, self.busy()));
        state.complete();
        drop(state);
        self.step_times.changed.notify_all();
        Ok(())
    }

    /// Reads the marks that have been passed.
    fn read_intervals(&self) -> Result<()> {
        loop {
            let mut state = self.step_times.state.lock();
            let (Some(&interval), Some(&next)) = (state.intervals.front(), state.intervals.get(1)) else {
                return Ok(());
            };
            let nanos = match self.device.elapsed(interval.mark, next.mark)? {
                Elapsed::Pending => return Ok(()),
                Elapsed::Lost => None,
                // Marks of two streams of the user may lie the other way round.
                Elapsed::Nanos(nanos) => Some(u64::try_from(nanos).unwrap_or(0)),
            };
            state.advance(nanos);
            let step = state.over;
            drop(state);
            if let (Some(cause), Some(nanos)) = (interval.cause, nanos) {
                self.stats.stalled(cause, nanos);
                if cause == Cause::Exchange {
                    self.stats.moved(Link::Exchange, 0, nanos);
                }
            }
            let name = interval.cause.map_or(interval.window.phase, Cause::wait);
            self.trace.device_span(&*self.device, TRACK, name, interval.window.unit, (interval.mark, next.mark), 0)?;
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
        let last = self.step_times.state.lock().intervals.back().map(|interval| interval.mark);
        match last {
            Some(mark) if self.device.elapsed(mark, mark)? == Elapsed::Pending => Ok(mark),
            _ => self.device.mark(StreamRef::Down),
        }
    }

    /// Waits until the figures of the last step are complete, or until the thread that completes them has taken too long.
    fn caught_up(&self) {
        let mut state = self.step_times.state.lock();
        while state.seen < state.enqueued {
            if state.wait_for(&self.step_times.changed, PATIENCE).timed_out() {
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
        let gate = shared.step_times.state.lock().gate;
        if shared.device.passed(gate)? {
            shared.caught_up();
        }
        shared.read_intervals()?;
        let times = shared.step_times.state.lock().times;
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
        let gate = shared.step_times.state.lock().gate;
        while !shared.device.block(gate, SLICE)? {
            if interrupted() {
                return Err(Error::new(Code::Interrupted, "interrupted while waiting for the end of a traced step."));
            }
        }
        shared.caught_up();
        let units = &shared.layout.units;
        let name =
            |u: u64| usize::try_from(u).ok().and_then(|i| units.get(i)).map_or(String::new(), |u| u.name.clone());
        let of_rank = shared.ranks.as_ref().map(|ranks| (ranks.spec, ranks.posts().identity()));
        shared.trace.write(path, of_rank, &name)
    }
}
