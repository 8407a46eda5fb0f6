//! The traces of several ranks, each a file of its own, as one: a process for each rank, by one clock.
//!
//! All ranks are of one host, whose monotonic clock has one zero: a file says when its own times begin by it. Files are read line by line.

use std::{
    fs::File,
    io::{BufRead, BufReader, BufWriter, Lines, Write},
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::Value;

use super::trace_file::{END, HEAD, OfRank, check, micros};
use crate::{
    error::{Code, Error, Result},
    policy::open_regular,
};

/// What a trace of one rank begins with.
#[derive(Deserialize)]
struct Head {
    #[serde(rename = "otherData")]
    of: OfRank,
}

/// A rank's file, behind its first line.
struct Part {
    path: PathBuf,
    of: OfRank,
    lines: Lines<BufReader<File>>,
}

/// Where a rank writes its trace, if all together are to be at `path`: `trace.rank0.json` beside `trace.json`.
#[must_use]
pub fn path_of_rank(path: &Path, rank: usize) -> PathBuf {
    let extension = path.extension().map_or_else(String::new, |e| format!(".{}", e.to_string_lossy()));
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{stem}.rank{rank}{extension}"))
}

/// Writes the traces of all ranks as one to `target`; returns the number of ranks and of events.
///
/// # Errors
/// `FN-E607` for files that are not the traces of all ranks of the same steps, whole; `FN-E606` and `FN-E301` for the target.
pub fn merge(files: &[PathBuf], target: &Path) -> Result<(usize, usize)> {
    let mut parts = files.iter().map(|path| Part::open(path)).collect::<Result<Vec<_>>>()?;
    parts.sort_by_key(|part| part.of.rank);
    refuse_others(&parts)?;
    check(target)?;
    let first = parts.iter().map(|part| part.of.began_ns).min().unwrap_or(0);
    let unfinished = target.with_added_extension("part");
    let made = write(parts, first, &unfinished, target);
    if made.is_err() {
        // What could not be finished is of no use; that it cannot be removed either is no news.
        let _ = std::fs::remove_file(&unfinished);
    }
    made.map(|events| (files.len(), events))
}

/// Refuses what are not all ranks of one run, each once, for the same steps.
fn refuse_others(parts: &[Part]) -> Result<()> {
    let Some(first) = parts.first() else { return Err(Error::argument("there is no trace to merge.")) };
    let name = |part: &Part| part.path.display().to_string();
    for (rank, part) in parts.iter().enumerate() {
        if (part.of.run, part.of.ranks) != (first.of.run, first.of.ranks) {
            return Err(wrong(&part.path, &format!("it is of another run than '{}'", name(first))));
        }
        if part.of.part != first.of.part {
            return Err(wrong(&part.path, &format!("it is of other steps than '{}'", name(first))));
        }
        if part.of.rank != rank {
            break;
        }
    }
    let missing: Vec<String> =
        (0..first.of.ranks).filter(|r| parts.iter().all(|p| p.of.rank != *r)).map(|r| r.to_string()).collect();
    if !missing.is_empty() {
        let text = format!("of {} ranks the trace of {} is missing", first.of.ranks, missing.join(", "));
        return Err(wrong(&first.path, &text));
    }
    match parts.windows(2).find(|pair| pair[0].of.rank == pair[1].of.rank) {
        Some(pair) => {
            Err(wrong(&pair[1].path, &format!("it is of rank {}, as is '{}'", pair[1].of.rank, name(&pair[0]))))
        }
        None => Ok(()),
    }
}

fn write(parts: Vec<Part>, first: u64, unfinished: &Path, target: &Path) -> Result<usize> {
    let failed = |e: std::io::Error| {
        Error::new(Code::IoFailed, format!("the trace '{}' could not be written: {e}.", target.display()))
            .errno(e.raw_os_error().unwrap_or(0))
            .action("Name a writable file.")
    };
    let mut out = BufWriter::new(File::create(unfinished).map_err(failed)?);
    write!(out, "{HEAD}").map_err(failed)?;
    let mut events = 0;
    for mut part in parts {
        let later = i64::try_from(part.of.began_ns - first).unwrap_or(0);
        while let Some(event) = part.event(later)? {
            let comma = if events == 0 { "" } else { "," };
            write!(out, "{comma}\n{event}").map_err(failed)?;
            events += 1;
        }
    }
    writeln!(out, "\n{END}").and_then(|()| out.flush()).map_err(failed)?;
    std::fs::rename(unfinished, target).map_err(failed)?;
    Ok(events)
}

fn wrong(path: &Path, why: &str) -> Error {
    Error::new(Code::RankTraces, format!("'{}': {why}.", path.display()))
        .action("Give the files of all ranks that one run wrote for the same steps, such as trace.rank0.json and trace.rank1.json.")
}

impl Part {
    fn open(path: &Path) -> Result<Self> {
        let unreadable = |e: std::io::Error| wrong(path, &format!("it cannot be read: {e}")).errno(e.raw_os_error());
        let mut lines = BufReader::new(open_regular(path).map_err(unreadable)?).lines();
        let head = lines.next().transpose().map_err(unreadable)?.unwrap_or_default();
        let head: Head = serde_json::from_str(&format!("{head}{END}"))
            .map_err(|_| wrong(path, "it is not a trace of one of several ranks"))?;
        Ok(Self { path: path.to_path_buf(), of: head.of, lines })
    }

    /// The next event, as a line, so many nanoseconds later.
    fn event(&mut self, later: i64) -> Result<Option<Value>> {
        let cut_off = || wrong(&self.path, "it ends amid an event, or is still being written");
        let line = self.lines.next().and_then(std::result::Result::ok).ok_or_else(cut_off)?;
        if line == END {
            return Ok(None);
        }
        let mut event: Value = serde_json::from_str(line.trim_end_matches(',')).map_err(|_| cut_off())?;
        if let Some(ts) = event.get("ts").and_then(Value::as_f64) {
            #[expect(clippy::cast_possible_truncation, reason = "nanoseconds of a trace")]
            let nanos = (ts * 1e3) as i64;
            event["ts"] = micros(nanos + later).into();
        }
        Ok(Some(event))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::measure::trace_file::{Event, Source, write as write_one};

    /// The trace of a rank, whose one slice begins 5 ns after its zero.
    fn traced(folder: &Path, name: &str, of: OfRank) -> PathBuf {
        let path = folder.join(name);
        let event =
            Event { track: "compute", name: "forward", value: 1, start: 5, nanos: 7, bytes: 0, on_device: false };
        let source = Source { late: 0, left_out: 0, of: Some(of) };
        write_one(&path, &[event], &source, &|u| format!("u{u}")).expect("writes");
        path
    }

    fn of(rank: usize, began_ns: u64) -> OfRank {
        OfRank { rank, ranks: 2, run: 77, part: 1, began_ns }
    }

    #[test]
    fn one_process_a_rank_by_one_clock() {
        let dir = tempfile::tempdir().expect("a folder");
        // Of a host that has been up for a hundred days.
        let up = 8_640_000_000_000_000;
        let files = [traced(dir.path(), "a", of(1, up + 1_001)), traced(dir.path(), "b", of(0, up))];
        let target = dir.path().join("all");
        let (ranks, events) = merge(&files, &target).expect("merges");
        let all: Value = serde_json::from_slice(&std::fs::read(&target).expect("reads")).expect("parses");
        let list = all["traceEvents"].as_array().expect("a list");
        assert_eq!((ranks, events), (2, list.len()));
        let slices: Vec<_> = list.iter().filter(|e| e["ph"] == "X").collect();
        let nanos = |e: &Value| (e["ts"].as_f64().expect("a number") * 1e3) as i64;
        assert_eq!(slices.iter().map(|e| nanos(e)).collect::<Vec<_>>(), [5, 1_006]);
        assert!(slices[0]["pid"] != slices[1]["pid"] && slices[0]["tid"] != slices[1]["tid"]);
        let named: Vec<_> = list.iter().filter(|e| e["name"] == "process_name").map(|e| &e["args"]["name"]).collect();
        assert_eq!(named, ["funicular, rank 0", "funicular, rank 1"]);
        check(&target).expect("it may be replaced");
        merge(&files, &target).expect("again");
        assert_eq!(std::fs::read_dir(dir.path()).expect("a folder").count(), 3, "nothing else is left");
    }

    #[test]
    fn what_are_not_the_traces_of_all_ranks_is_refused() {
        let dir = tempfile::tempdir().expect("a folder");
        let target = dir.path().join("all");
        let first = traced(dir.path(), "first", of(0, 3));
        let refused = |other: PathBuf, part: &str| {
            let error = merge(&[first.clone(), other], &target).expect_err(part);
            assert!(error.code() == Code::RankTraces && error.message().contains(part), "{error}");
            assert!(!target.exists());
        };
        refused(traced(dir.path(), "run", OfRank { run: 78, ..of(1, 3) }), "of another run");
        refused(traced(dir.path(), "steps", OfRank { part: 2, ..of(1, 3) }), "of other steps");
        refused(traced(dir.path(), "same", of(0, 3)), "trace of 1 is missing");
        refused(dir.path().join("none"), "cannot be read");
        let whole = std::fs::read(traced(dir.path(), "whole", of(1, 3))).expect("reads");
        std::fs::write(dir.path().join("cut"), &whole[..whole.len() - 20]).expect("writes");
        refused(dir.path().join("cut"), "ends amid an event");
        std::fs::write(dir.path().join("other"), format!("{HEAD}\n{END}\n")).expect("writes");
        refused(dir.path().join("other"), "not a trace of one of several ranks");
        assert!(!dir.path().join("all.part").exists());
        let error = merge(std::slice::from_ref(&first), &target).expect_err("one is missing");
        assert!(error.message().contains("trace of 1 is missing"), "{error}");
        let thesis = dir.path().join("thesis");
        std::fs::write(&thesis, "text").expect("writes");
        let second = traced(dir.path(), "second", of(1, 3));
        assert_eq!(merge(&[first, second], &thesis).expect_err("not ours").code(), Code::OutputFile);
    }

    #[test]
    fn each_rank_has_a_file() {
        for (all, own) in
            [("a/trace.json", "a/trace.rank1.json"), ("trace", "trace.rank1"), ("/t.x.json", "/t.x.rank1.json")]
        {
            assert_eq!(path_of_rank(Path::new(all), 1), Path::new(own));
        }
    }
}
