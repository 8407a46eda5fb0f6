//! A Chrome/Perfetto trace of chosen steps: one track per link and stream, counters for occupancy.

use std::{
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Instant,
};

use parking_lot::Mutex;

pub(crate) use super::trace_file::check;
use super::trace_file::{self, CAPACITY, Event, OfRank, STEPS, Source};
use crate::{
    device::{Device, Elapsed, Mark},
    error::{Code, Error, Result},
    runtime::ranks::spec::RankSpec,
};

/// How the device's clock relates to the trace's: a time on it is that of the base plus what elapsed since then.
#[derive(Debug)]
struct Clock {
    base: Mark,
    /// The base's time, by the trace's clock as far as known.
    at: i64,
    /// That of the first base, with which the trace begins.
    began: i64,
    /// What has to be added: no mark is seen before it is passed, so the earliest sight of all is the nearest to the truth.
    late: Option<i64>,
    /// Where the step under way began; none if that is not known.
    step: Option<i64>,
}

/// What was collected.
#[derive(Debug, Default)]
struct Events {
    kept: Vec<Event>,
    /// How many came when there was no room any more.
    left_out: u64,
}

/// Collects events while it is on.
#[derive(Debug)]
pub struct Trace {
    epoch: Instant,
    on: AtomicBool,
    events: Mutex<Events>,
    clock: Mutex<Clock>,
    /// How many were written.
    written: AtomicU64,
}

impl Default for Trace {
    fn default() -> Self {
        let clock = Clock { base: Mark::LOST, at: 0, began: 0, late: None, step: None };
        let (on, events, clock) = (AtomicBool::new(false), Mutex::default(), Mutex::new(clock));
        Self { epoch: Instant::now(), on, events, clock, written: AtomicU64::new(0) }
    }
}

impl Clock {
    /// A mark's time; none while it or the base is still to come, or lost.
    fn time(&self, device: &dyn Device, mark: Mark) -> Result<Option<i64>> {
        match device.elapsed(self.base, mark)? {
            Elapsed::Nanos(nanos) => Ok(Some(self.at + nanos)),
            Elapsed::Pending | Elapsed::Lost => Ok(None),
        }
    }
}

impl Trace {
    /// Nanoseconds since the runtime started.
    pub fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// True while it collects.
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Starts or stops collecting. Times of the device count from the mark that `base` gives; what ended before it is not kept.
    ///
    /// # Errors
    /// `FN-E002` when the driver fails.
    pub fn set(&self, on: bool, device: &dyn Device, base: impl FnOnce() -> Result<Mark>) -> Result<()> {
        if on && !self.is_on() {
            self.events.lock().kept.reserve(CAPACITY);
            let mut clock = self.clock.lock();
            clock.base = base()?;
            clock.at = self.now().cast_signed();
            (clock.began, clock.step) = (clock.at, Some(clock.at));
            clock.late = (device.elapsed(clock.base, clock.base)? == Elapsed::Nanos(0)).then_some(0);
        }
        self.on.store(on, Ordering::Relaxed);
        Ok(())
    }

    /// Notes that a mark has been passed by now.
    ///
    /// # Errors
    /// `FN-E002` when the driver fails.
    pub fn saw(&self, device: &dyn Device, mark: Mark) -> Result<()> {
        if self.is_on() {
            let now = self.now().cast_signed();
            let mut clock = self.clock.lock();
            if let Some(time) = clock.time(device, mark)? {
                clock.late = Some(clock.late.map_or(now - time, |late| late.min(now - time)));
            }
        }
        Ok(())
    }

    /// Counts times of the device from a later mark, before the present one is too old.
    ///
    /// # Errors
    /// `FN-E002` when the driver fails.
    pub fn rebase(&self, device: &dyn Device, mark: Mark) -> Result<()> {
        if self.is_on() {
            let mut clock = self.clock.lock();
            if let Some(time) = clock.time(device, mark)? {
                (clock.base, clock.at) = (mark, time);
            }
        }
        Ok(())
    }

    /// Notes that step `number` ended at a mark that has been passed.
    ///
    /// # Errors
    /// `FN-E002` when the driver fails.
    pub fn step_ended(&self, device: &dyn Device, number: u64, end: Mark) -> Result<()> {
        if !self.is_on() {
            return Ok(());
        }
        let (began, ended, start) = {
            let mut clock = self.clock.lock();
            let ended = clock.time(device, end)?;
            (clock.began, ended, std::mem::replace(&mut clock.step, ended))
        };
        // A step before the trace may be seen to end while it is on.
        if let (Some(start), Some(ended)) = (start, ended)
            && ended > began
        {
            let nanos = u64::try_from(ended - start).unwrap_or(0);
            self.push(Event { track: STEPS, name: "step", value: number, start, nanos, bytes: 0, on_device: true });
        }
        Ok(())
    }

    /// Notes a span from `start` (of [`Trace::now`]) to now.
    pub fn span(&self, track: &'static str, name: &'static str, unit: u64, start: u64, bytes: u64) {
        if self.is_on() {
            let nanos = self.now().saturating_sub(start);
            let start = start.cast_signed();
            self.push(Event { track, name, value: unit, start, nanos, bytes, on_device: false });
        }
    }

    /// Notes a span of a stream between two marks that have been passed, as far as it lies after the beginning of the trace.
    ///
    /// # Errors
    /// `FN-E002` when the driver fails.
    pub fn device_span(
        &self,
        device: &dyn Device,
        track: &'static str,
        name: &'static str,
        unit: u64,
        marks: (Mark, Mark),
        bytes: u64,
    ) -> Result<()> {
        if !self.is_on() {
            return Ok(());
        }
        let (start, began) = {
            let clock = self.clock.lock();
            (clock.time(device, marks.0)?, clock.began)
        };
        if let (Some(start), Elapsed::Nanos(nanos)) = (start, device.elapsed(marks.0, marks.1)?)
            && start + nanos > began
        {
            let nanos = u64::try_from(start + nanos - start.max(began)).unwrap_or(0);
            let start = start.max(began);
            self.push(Event { track, name, value: unit, start, nanos, bytes, on_device: true });
        }
        Ok(())
    }

    /// Notes a span from and until times of [`Trace::now`].
    pub fn span_until(&self, track: &'static str, name: &'static str, unit: u64, time: (u64, u64), bytes: u64) {
        if self.on.load(Ordering::Relaxed) {
            let nanos = time.1.saturating_sub(time.0);
            self.push(Event { track, name, value: unit, start: time.0.cast_signed(), nanos, bytes, on_device: false });
        }
    }

    /// Notes a counter's value.
    pub fn counter(&self, name: &'static str, value: u64) {
        if self.is_on() {
            let start = self.now().cast_signed();
            self.push(Event { track: "counters", name, value, start, nanos: u64::MAX, bytes: 0, on_device: false });
        }
    }

    fn push(&self, event: Event) {
        let mut events = self.events.lock();
        if events.kept.len() < CAPACITY {
            events.kept.push(event);
        } else {
            events.left_out += 1;
        }
    }

    /// The zero of its times, by the host's monotonic clock: that of [`Instant`], too.
    fn began(&self) -> u64 {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let nanos = i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec);
        u64::try_from(nanos).unwrap_or(0).saturating_sub(self.now())
    }

    /// Writes what was collected as Chrome trace JSON and forgets it; returns the number of events. `of_rank`: which of several ranks, and what
    /// tells their run from others.
    ///
    /// # Errors
    /// `FN-E301` with the file and the reason; `FN-E606` if there is a file that funicular did not write.
    pub fn write(
        &self,
        path: &Path,
        of_rank: Option<(RankSpec, u64)>,
        unit_name: &dyn Fn(u64) -> String,
    ) -> Result<usize> {
        let Events { kept, left_out } = std::mem::take(&mut *self.events.lock());
        let late = self.clock.lock().late.unwrap_or(0);
        let part = self.written.fetch_add(1, Ordering::Relaxed);
        let of = |(RankSpec { rank, size: ranks, .. }, run)| OfRank { rank, ranks, run, part, began_ns: self.began() };
        let source = Source { late, left_out, of: of_rank.map(of) };
        check(path)?;
        trace_file::write(path, &kept, &source, unit_name).map_err(|e| {
            Error::new(Code::IoFailed, format!("the trace '{}' could not be written: {e}.", path.display()))
                .errno(e.raw_os_error().unwrap_or(0))
                .action("Name a writable file in log.trace.")
        })?;
        Ok(kept.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{HostDevice, StreamRef};

    const USER: StreamRef = StreamRef::Compute(0);

    fn written(trace: &Trace) -> Vec<serde_json::Value> {
        let file = tempfile::NamedTempFile::new().expect("file");
        trace.write(file.path(), None, &|u| format!("u{u}")).expect("writes");
        let text = std::fs::read_to_string(file.path()).expect("reads");
        let json: serde_json::Value = serde_json::from_str(&text).expect("parses");
        json["traceEvents"].as_array().expect("a list").iter().filter(|e| e["ph"] != "M").cloned().collect()
    }

    #[test]
    fn writes_json_that_parses() {
        let (trace, device) = (Trace::default(), HostDevice::new().expect("starts"));
        trace.span("up", "page in", 1, 0, 10);
        trace.set(true, &device, || device.mark(USER)).expect("works");
        trace.span("up", "page in", 2, trace.now(), 20);
        trace.counter("host", 7);
        let events = written(&trace);
        assert_eq!(events.len(), 2, "what came before `set` is not kept");
        assert_eq!(events[0]["name"], "page in u2");
    }

    #[test]
    fn a_step_is_a_slice_from_the_end_of_the_one_before() {
        let (trace, device) = (Trace::default(), HostDevice::new().expect("starts"));
        let before = device.mark(USER).expect("made");
        trace.set(true, &device, || device.mark(USER)).expect("works");
        trace.step_ended(&device, 2, before).expect("works");
        for number in 3..5 {
            let end = device.mark(USER).expect("made");
            trace.step_ended(&device, number, end).expect("works");
        }
        let events = written(&trace);
        let names: Vec<_> = events.iter().map(|e| e["name"].as_str().expect("a name")).collect();
        assert_eq!(names, ["step 3", "step 4"], "step 2 was over");
        let ends = |e: &serde_json::Value| e["ts"].as_f64().expect("a time") + e["dur"].as_f64().expect("a time");
        assert!((ends(&events[0]) - events[1]["ts"].as_f64().expect("a time")).abs() < 2e-3, "{events:?}");
    }

    #[test]
    fn begins_with_its_base_wherever_the_device_is() {
        let (trace, device) = (Trace::default(), HostDevice::new().expect("starts"));
        let marks: Vec<Mark> = (0..3).map(|_| device.mark(USER).expect("made")).collect();
        trace.set(true, &device, || Ok(marks[1])).expect("works");
        // The end of what came before is learned when the trace is on already.
        for pair in marks.windows(2) {
            trace.device_span(&device, "compute", "forward", 3, (pair[0], pair[1]), 0).expect("works");
        }
        assert_eq!(written(&trace).len(), 1);
    }

    #[test]
    fn times_of_the_device_lie_among_those_of_the_host() {
        let (trace, device) = (Trace::default(), HostDevice::new().expect("starts"));
        // The base is a mark of a stream that comes to it later, and is not known to have.
        trace.set(true, &device, || device.mark(StreamRef::Down)).expect("works");
        device.drain();
        std::thread::sleep(std::time::Duration::from_millis(20));
        let before = trace.now();
        let marks = (device.mark(USER).expect("made"), device.mark(USER).expect("made"));
        trace.saw(&device, marks.1).expect("works");
        trace.device_span(&device, "compute", "forward", 3, marks, 0).expect("works");
        let after = trace.now();
        trace.rebase(&device, marks.1).expect("works");
        trace.device_span(&device, "compute", "backward", 3, marks, 0).expect("works");
        let events = written(&trace);
        for event in &events {
            let ts = event["ts"].as_f64().expect("a number") * 1e3;
            assert!(before as f64 <= ts && ts <= after as f64, "{before} {ts} {after}");
        }
        assert_eq!(events.len(), 2);
    }
}
