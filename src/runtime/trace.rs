//! A Chrome/Perfetto trace of chosen steps: one track per link and stream, counters for occupancy.

use std::{
    io::Write,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use parking_lot::Mutex;

use crate::error::{Code, Error, Result};

/// Events kept at most; beyond, the trace says how many it left out.
const CAPACITY: usize = 200_000;

/// One finished span or counter value.
#[derive(Clone, Copy, Debug)]
struct Event {
    track: &'static str,
    name: &'static str,
    /// Unit, or a counter's value.
    value: u64,
    start: u64,
    /// `u64::MAX` marks a counter.
    nanos: u64,
    bytes: u64,
}

/// Collects events while it is on.
#[derive(Debug)]
pub struct Trace {
    epoch: Instant,
    on: AtomicBool,
    events: Mutex<Vec<Event>>,
}

impl Default for Trace {
    fn default() -> Self {
        Self { epoch: Instant::now(), on: AtomicBool::new(false), events: Mutex::new(Vec::new()) }
    }
}

impl Trace {
    /// Nanoseconds since the runtime started.
    pub fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Starts or stops collecting.
    pub fn set(&self, on: bool) {
        if on {
            self.events.lock().reserve(CAPACITY);
        }
        self.on.store(on, Ordering::Relaxed);
    }

    /// Notes a span from `start` (of [`Trace::now`]) to now.
    pub fn span(&self, track: &'static str, name: &'static str, unit: u64, start: u64, bytes: u64) {
        if self.on.load(Ordering::Relaxed) {
            let nanos = self.now().saturating_sub(start);
            self.push(Event { track, name, value: unit, start, nanos, bytes });
        }
    }

    /// Notes a span from and until times of [`Trace::now`].
    pub fn span_until(&self, track: &'static str, name: &'static str, unit: u64, time: (u64, u64), bytes: u64) {
        if self.on.load(Ordering::Relaxed) {
            let nanos = time.1.saturating_sub(time.0);
            self.push(Event { track, name, value: unit, start: time.0, nanos, bytes });
        }
    }

    /// Notes a counter's value.
    pub fn counter(&self, name: &'static str, value: u64) {
        if self.on.load(Ordering::Relaxed) {
            self.push(Event { track: "counters", name, value, start: self.now(), nanos: u64::MAX, bytes: 0 });
        }
    }

    fn push(&self, event: Event) {
        let mut events = self.events.lock();
        if events.len() < CAPACITY {
            events.push(event);
        }
    }

    /// Writes what was collected as Chrome trace JSON and forgets it.
    ///
    /// # Errors
    /// `FN-E301` with the file and the reason.
    pub fn write(&self, path: &Path, unit_name: &dyn Fn(u64) -> String) -> Result<usize> {
        let failed = |e: std::io::Error| {
            Error::new(Code::IoFailed, format!("the trace '{}' could not be written: {e}.", path.display()))
                .errno(e.raw_os_error().unwrap_or(0))
                .action("Name a writable file in log.trace.")
        };
        let events = std::mem::take(&mut *self.events.lock());
        let mut tracks: Vec<&str> = Vec::new();
        let mut out = std::io::BufWriter::new(std::fs::File::create(path).map_err(failed)?);
        out.write_all(b"{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n").map_err(failed)?;
        for e in &events {
            let tid = tracks.iter().position(|t| *t == e.track).unwrap_or_else(|| {
                tracks.push(e.track);
                tracks.len() - 1
            });
            #[expect(clippy::cast_precision_loss, reason = "microseconds in a trace")]
            let ts = e.start as f64 / 1e3;
            let line = if e.nanos == u64::MAX {
                serde_json::json!({"ph": "C", "pid": 1, "name": e.name, "ts": ts, "args": {"bytes": e.value}})
            } else {
                #[expect(clippy::cast_precision_loss, reason = "microseconds in a trace")]
                let dur = e.nanos as f64 / 1e3;
                serde_json::json!({"ph": "X", "pid": 1, "tid": tid, "ts": ts, "dur": dur,
                    "name": format!("{} {}", e.name, unit_name(e.value)), "cat": e.track, "args": {"bytes": e.bytes}})
            };
            writeln!(out, "{line},").map_err(failed)?;
        }
        for (tid, track) in tracks.iter().enumerate() {
            let line =
                serde_json::json!({"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": track}});
            writeln!(out, "{line},").map_err(failed)?;
        }
        let end = serde_json::json!({"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "funicular"}});
        write!(out, "{end}\n]}}\n").map_err(failed)?;
        out.flush().map_err(failed)?;
        Ok(events.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_json_that_parses() {
        let trace = Trace::default();
        trace.span("up", "page in", 1, 0, 10);
        trace.set(true);
        trace.span("up", "page in", 2, trace.now(), 20);
        trace.counter("host", 7);
        let file = tempfile::NamedTempFile::new().expect("file");
        assert_eq!(
            trace.write(file.path(), &|u| format!("u{u}")).expect("writes"),
            2,
            "what came before `set` is not kept"
        );
        let text = std::fs::read_to_string(file.path()).expect("reads");
        let json: serde_json::Value = serde_json::from_str(&text).expect("parses");
        assert_eq!(json["traceEvents"][0]["name"], "page in u2");
    }
}
