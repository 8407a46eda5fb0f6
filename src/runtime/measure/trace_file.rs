//! A trace as a file: Chrome trace JSON, as Perfetto's and other viewers load it.

use std::{
    io::{Read, Write},
    path::Path,
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::{Code, Error, Result};

/// Events kept at most; beyond, the trace says how many it left out.
pub(super) const CAPACITY: usize = 200_000;
/// The track of the steps: a slice from the end of the step before to its own end.
pub(super) const STEPS: &str = "steps";

/// How a trace begins, by which it is known as ours; and as versions before this one began it.
const OURS: &str = r#"{"displayTimeUnit":"ms","otherData":{"made_by":"funicular""#;
const HEAD_BEFORE: &str = r#"{"displayTimeUnit":"ms","traceEvents":["#;
/// The first line of a trace that is of no one rank.
pub(super) const HEAD: &str = r#"{"displayTimeUnit":"ms","otherData":{"made_by":"funicular"},"traceEvents":["#;
/// The last line.
pub(super) const END: &str = "]}";
/// Numbers between the processes of two ranks: those of their threads lie between.
const PER_RANK: usize = 10_000;

/// Whose trace it is, where several ranks write one each; on its first line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct OfRank {
    /// Its number, and how many there are.
    pub(super) rank: usize,
    pub(super) ranks: usize,
    /// What tells this run from others, and which of its traces it is.
    pub(super) run: u64,
    pub(super) part: u64,
    /// The zero of its times, by the host's monotonic clock.
    pub(super) began_ns: u64,
}

/// What is known of a trace besides its events.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Source {
    /// What times of the device lie late.
    pub(super) late: i64,
    /// Events that had no room.
    pub(super) left_out: u64,
    pub(super) of: Option<OfRank>,
}

impl Source {
    /// The number of the process that viewers show.
    fn process(&self) -> usize {
        1 + self.of.map_or(0, |of| of.rank * PER_RANK)
    }

    /// The first thread's number: viewers take 0 for the system's idle thread, and that of the process for its main thread.
    fn first_thread(&self) -> usize {
        self.process() + 1
    }

    fn head(&self) -> std::io::Result<String> {
        let Some(of) = self.of else { return Ok(HEAD.to_owned()) };
        let of = serde_json::to_string(&of)?;
        Ok(format!("{OURS},{},\"traceEvents\":[", of.trim_start_matches('{')))
    }
}

/// Whether a trace can be written there, without touching what is there.
///
/// # Errors
/// `FN-E606` for a file that is not a trace of ours, and where none can be written.
pub(crate) fn check(path: &Path) -> Result<()> {
    let refused = |why: String| {
        let text = format!("the trace '{}': {why}.", path.display());
        Err(Error::new(Code::OutputFile, text).action("Name another file in log.trace, or remove that one."))
    };
    match path.metadata() {
        Ok(found) if !found.is_file() => return refused("it is not a regular file".into()),
        Ok(_) => {}
        // A link that leads nowhere, or a folder that is not there, is told by the attempt.
        Err(_) => {
            let tried = std::fs::OpenOptions::new().write(true).create_new(true).open(path);
            return match tried.and_then(|_| std::fs::remove_file(path)) {
                Ok(()) => Ok(()),
                Err(e) => refused(format!("it cannot be written: {e}")),
            };
        }
    }
    let mut head = Vec::new();
    let read = std::fs::OpenOptions::new().read(true).write(true).open(path);
    match read.and_then(|file| file.take(HEAD.len() as u64).read_to_end(&mut head)) {
        Err(e) => refused(format!("it cannot be written: {e}")),
        Ok(_) if head.is_empty() || head.starts_with(OURS.as_bytes()) || head.starts_with(HEAD_BEFORE.as_bytes()) => {
            Ok(())
        }
        Ok(_) => refused("it exists, and is not a trace that funicular wrote".into()),
    }
}

/// One finished span or counter value.
#[derive(Clone, Copy, Debug)]
pub(super) struct Event {
    pub(super) track: &'static str,
    pub(super) name: &'static str,
    /// Unit, number of the step, or a counter's value.
    pub(super) value: u64,
    pub(super) start: i64,
    /// `u64::MAX` marks a counter.
    pub(super) nanos: u64,
    pub(super) bytes: u64,
    /// `start` is a time of the device's clock.
    pub(super) on_device: bool,
}

impl Event {
    fn is_counter(&self) -> bool {
        self.nanos == u64::MAX
    }

    /// Its time by the trace's clock, where times of the device lie `late`.
    fn placed(&self, late: i64) -> Placed<'_> {
        let start = self.start + if self.on_device { late } else { 0 };
        let nanos = if self.is_counter() { 0 } else { self.nanos.cast_signed() };
        Placed { event: self, start: start.max(0), end: (start + nanos).max(0) }
    }
}

/// An event and its time.
struct Placed<'a> {
    event: &'a Event,
    start: i64,
    end: i64,
}

impl Placed<'_> {
    fn counter(&self, process: usize) -> Value {
        let Event { name, value, .. } = self.event;
        json!({"ph": "C", "pid": process, "name": name, "ts": micros(self.start), "args": {"bytes": value}})
    }

    fn slice(&self, (process, thread): (usize, usize), of: &str) -> Value {
        let Event { track, name, bytes, .. } = self.event;
        #[expect(clippy::cast_precision_loss, reason = "microseconds in a trace")]
        let dur = (self.end - self.start) as f64 / 1e3;
        json!({"ph": "X", "pid": process, "tid": thread, "ts": micros(self.start), "dur": dur,
            "name": format!("{name} {of}").trim_end(), "cat": track, "args": {"bytes": bytes}})
    }
}

/// A time in a trace. Viewers multiply it in floating point and drop what is left of a nanosecond: half of one more makes sure that
/// they get the right one. One too little would let a slice begin before the end of the slice before it.
pub(super) fn micros(nanos: i64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "microseconds in a trace")]
    let exact = nanos as f64;
    (exact + 0.5) / 1e3
}

/// The steps, then the other tracks in the order of their first slices; of each the time at which each of its lanes is free again.
struct Tracks(Vec<(&'static str, Vec<i64>)>);

impl Tracks {
    /// The track and lane of a slice that begins no earlier than those before. Viewers drop a slice that overlaps another one of its
    /// thread in part, so what is in flight at the same time lies in lanes, each a thread: the first one that is free.
    fn place(&mut self, slice: &Placed<'_>) -> (usize, usize) {
        let known = self.0.iter().position(|(track, _)| *track == slice.event.track);
        let track = known.unwrap_or_else(|| {
            self.0.push((slice.event.track, Vec::new()));
            self.0.len() - 1
        });
        let lanes = &mut self.0[track].1;
        let lane = lanes.iter().position(|&free| free <= slice.start).unwrap_or_else(|| {
            lanes.push(0);
            lanes.len() - 1
        });
        lanes[lane] = slice.end;
        (track, lane)
    }

    /// The number of a lane among all threads of the process: those of a track follow each other.
    fn thread(&self, (track, lane): (usize, usize)) -> usize {
        self.0[..track].iter().map(|(_, lanes)| lanes.len()).sum::<usize>() + lane
    }

    /// Names and order of the threads.
    fn names(&self, source: &Source) -> Vec<Value> {
        let process = source.process();
        let lanes = self.0.iter().enumerate().flat_map(|(n, (track, lanes))| {
            (0..lanes.len()).map(move |lane| {
                let name = if lane == 0 { (*track).to_owned() } else { format!("{track} {}", lane + 1) };
                (source.first_thread() + self.thread((n, lane)), name)
            })
        });
        let lines = lanes.flat_map(|(thread, name)| {
            let about =
                |what: &str, args: Value| json!({"ph": "M", "pid": process, "tid": thread, "name": what, "args": args});
            [about("thread_name", json!({"name": name})), about("thread_sort_index", json!({"sort_index": thread}))]
        });
        lines.collect()
    }
}

/// Writes events, a line each.
pub(super) fn write(
    path: &Path,
    events: &[Event],
    source: &Source,
    unit_name: &dyn Fn(u64) -> String,
) -> std::io::Result<()> {
    let process = source.process();
    let mut placed: Vec<Placed<'_>> = events.iter().map(|event| event.placed(source.late)).collect();
    placed.sort_by_key(|event| event.start);
    let mut tracks = Tracks(vec![(STEPS, Vec::new())]);
    let lanes: Vec<Option<(usize, usize)>> =
        placed.iter().map(|e| (!e.event.is_counter()).then(|| tracks.place(e))).collect();
    let mut out = std::io::BufWriter::new(std::fs::File::create(path)?);
    writeln!(out, "{}", source.head()?)?;
    for (e, lane) in placed.iter().zip(lanes) {
        let of = |e: &Event| if e.track == STEPS { e.value.to_string() } else { unit_name(e.value) };
        let thread = |lane| (process, source.first_thread() + tracks.thread(lane));
        let line = lane.map_or_else(|| e.counter(process), |lane| e.slice(thread(lane), &of(e.event)));
        writeln!(out, "{line},")?;
    }
    for line in tracks.names(source) {
        writeln!(out, "{line},")?;
    }
    if source.left_out > 0 {
        let ts = micros(placed.last().map_or(0, |e| e.start));
        let name = format!("{} events were left out: a trace holds {CAPACITY}. Trace fewer steps.", source.left_out);
        let thread = source.first_thread();
        writeln!(out, "{},", json!({"ph": "i", "s": "g", "pid": process, "tid": thread, "ts": ts, "name": name}))?;
    }
    let about = |what: &str, args: Value| json!({"ph": "M", "pid": process, "name": what, "args": args});
    if let Some(of) = source.of {
        writeln!(out, "{},", about("process_sort_index", json!({"sort_index": of.rank})))?;
    }
    let name = source.of.map_or_else(|| "funicular".to_owned(), |of| format!("funicular, rank {}", of.rank));
    write!(out, "{}\n{END}\n", about("process_name", json!({"name": name})))?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::{measure::trace::Trace, ranks::spec::RankSpec};

    fn span(track: &'static str, start: i64, nanos: u64) -> Event {
        Event { track, name: "params", value: 1, start, nanos, bytes: 1, on_device: false }
    }

    fn written(events: &[Event], left_out: u64) -> Vec<Value> {
        let file = tempfile::NamedTempFile::new().expect("file");
        let source = Source { left_out, ..Source::default() };
        write(file.path(), events, &source, &|u| format!("u{u}")).expect("writes");
        let json: Value = serde_json::from_slice(&std::fs::read(file.path()).expect("reads")).expect("parses");
        json["traceEvents"].as_array().expect("a list").clone()
    }

    /// Threads and times of all slices as Perfetto computes them: nanoseconds from the product, the rest dropped.
    fn seen(events: &[Value]) -> Vec<(u64, i64, i64)> {
        let slices = events.iter().filter(|e| e["ph"] == "X");
        let nanos = |e: &Value, key: &str| (e[key].as_f64().expect("a number") * 1000.0) as i64;
        slices.map(|e| (e["tid"].as_u64().expect("a thread"), nanos(e, "ts"), nanos(e, "dur"))).collect()
    }

    #[test]
    fn no_two_slices_of_a_thread_overlap() {
        // In flight together, in turns, and end to end at times that are no floating-point numbers.
        let mut events: Vec<Event> = (0..40).map(|n| span("nvme read", n * 1_001, 8_000)).collect();
        events.extend((0..3000).map(|n| span("compute", 2_001 * n + 1, 2_001)));
        events.push(span("nvme write", 5, 0));
        let events = written(&events, 0);
        let mut seen = seen(&events);
        seen.sort_unstable();
        for pair in seen.windows(2) {
            let ((thread, start, nanos), (next, then, _)) = (pair[0], pair[1]);
            assert!(thread != next || start + nanos <= then, "{pair:?}");
        }
        assert_eq!(seen.len(), 3041, "none is lost");
        let names: Vec<_> = events.iter().filter(|e| e["name"] == "thread_name").collect();
        let of = |track: &str| {
            names.iter().filter(|e| e["args"]["name"].as_str().expect("a name").starts_with(track)).count()
        };
        assert_eq!((of("nvme read"), of("compute"), of("nvme write")), (8, 1, 1), "{names:?}");
        assert!(names.iter().any(|e| e["args"]["name"] == "nvme read 8"));
    }

    #[test]
    fn what_had_no_room_is_told() {
        let told = |left_out| written(&[span("up", 0, 5)], left_out).into_iter().find(|e| e["ph"] == "i");
        assert_eq!(told(0), None);
        assert!(told(12).expect("told")["name"].as_str().expect("text").starts_with("12 events were left out"));
    }

    #[test]
    fn a_file_of_somebody_else_is_not_replaced() {
        let folder = tempfile::tempdir().expect("folder");
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("thesis"), "text").expect("writes");
        std::fs::write(at("empty"), "").expect("writes");
        check(&at("new")).expect("there is nothing");
        check(&at("empty")).expect("nothing is lost");
        Trace::default().write(&at("trace"), None, &|_| String::new()).expect("writes");
        let of = Some((RankSpec { rank: 1, size: 2, file: None, grows: None }, 7));
        Trace::default().write(&at("trace"), of, &|_| String::new()).expect("its own");
        Trace::default().write(&at("trace"), None, &|_| String::new()).expect("that of a rank");
        for wrong in [at("thesis"), folder.path().to_path_buf(), at("none/at/all")] {
            assert_eq!(check(&wrong).expect_err("refused").code(), Code::OutputFile, "{}", wrong.display());
            Trace::default().write(&wrong, None, &|_| String::new()).expect_err("refused");
        }
        assert_eq!(std::fs::read_to_string(at("thesis")).expect("reads"), "text");
        assert!(!at("new").exists(), "a look leaves nothing");
    }
}
