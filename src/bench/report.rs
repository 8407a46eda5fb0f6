//! What the benchmark found, in the form that every output is made of.

use serde::Serialize;

use crate::{
    bench::stats::{Round, as_f64, fraction, median_rate, percentile, rates, spread},
    doctor::facts::Machine,
};

/// What every file of the benchmark contains near its beginning, so that it may be replaced by the next run.
pub const MARK: &str = "funicular bench";

/// What sets the limit of a hop that fio ran beside.
pub(super) const FIO: &str = "fio";

/// Which part of the machine a hop exercises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Group {
    /// Disks.
    Nvme,
    /// Host to device and back.
    Link,
    /// Host memory and processor.
    Host,
    /// Several at once.
    Pipeline,
}

/// What was measured of a hop. Rates are in bytes per second.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// Median of the rounds.
    pub bytes_per_second: f64,
    /// The slowest round.
    pub low: f64,
    /// The fastest round.
    pub high: f64,
    /// How far another run's median may lie from this one, as a part of it; see [`spread`].
    pub spread: f64,
    /// Each round, in the order of time.
    pub rates: Vec<f64>,
    /// Bytes moved in all rounds.
    pub bytes: u64,
    /// Median time of a block or piece from submission to completion, in microseconds.
    pub p50_us: f64,
    /// Its 99th percentile.
    pub p99_us: f64,
    /// Parameters updated per second, where a hop updates any.
    pub params_per_second: Option<f64>,
    /// What copies carried meanwhile, in bytes per second, where they ran beside a hop.
    pub copied_per_second: Option<f64>,
    /// Bytes per second of each rank, where several measured at once.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub per_rank: Vec<f64>,
}

impl Figure {
    /// Of some rounds; none if nothing was moved.
    pub fn of(rounds: &[Round]) -> Option<Self> {
        let all = rates(rounds, |round| round.bytes);
        let median = median_rate(&all)?;
        let micros = |part| percentile(rounds, part).map_or(0.0, |nanos| as_f64(nanos) / 1e3);
        Some(Self {
            bytes_per_second: median,
            low: all.iter().copied().filter(|&rate| rate > 0.0).fold(f64::INFINITY, f64::min),
            high: all.iter().copied().fold(0.0, f64::max),
            spread: spread(&all),
            bytes: rounds.iter().map(|round| round.bytes).sum(),
            p50_us: micros(0.5),
            p99_us: micros(0.99),
            params_per_second: median_rate(&rates(rounds, |round| round.params)),
            copied_per_second: median_rate(&rates(rounds, |round| round.copied)),
            per_rank: (0..rounds.iter().map(|round| round.each.len()).min().unwrap_or(0))
                .map(|rank| {
                    median_rate(&rounds.iter().map(|round| round.each[rank]).collect::<Vec<_>>()).unwrap_or(0.0)
                })
                .collect(),
            rates: all,
        })
    }
}

/// What a hop cannot be faster than.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Limit {
    /// What sets it: a hop of this report, `fio`, or the link's line rate.
    pub by: String,
    /// In the hop's own bytes per second.
    pub bytes_per_second: f64,
    /// The hop's rate as a part of it: the median over rounds that ran side by side, where there are such.
    pub fraction: f64,
}

/// A part of a limit above this cannot be: the limit was measured too low.
const MOST: f64 = 1.25;

impl Limit {
    /// Whether the hop was so much faster than its limit that one of them was mis-measured. fio is no limit, but another program.
    pub fn is_exceeded(&self) -> bool {
        self.fraction > MOST && self.by != FIO
    }
}

/// One hop or pipeline.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Hop {
    /// Its name.
    pub name: String,
    /// A path, `striped`, a device, or a number of threads.
    pub place: String,
    /// What it exercises.
    pub group: Group,
    /// What was measured.
    pub figure: Option<Figure>,
    /// Why nothing was measured.
    pub skipped: Option<String>,
    /// Bytes of one block or piece.
    pub block: Option<u64>,
    /// Blocks or pieces in flight.
    pub depth: Option<u64>,
    /// The I/O engine.
    pub engine: Option<String>,
    /// Whether around the page cache.
    pub direct: Option<bool>,
    /// Bytes per second that the PCIe link underneath could carry, as negotiated.
    pub line_rate: Option<f64>,
    /// Its limit, if one is known.
    pub limit: Option<Limit>,
    /// The equivalent fio command.
    pub fio: Option<String>,
    /// fio's bytes per second, run beside it.
    pub fio_bytes_per_second: Option<f64>,
    /// The same of each round.
    pub fio_rates: Vec<f64>,
}

impl Hop {
    /// Its rate, or 0.
    pub fn rate(&self) -> f64 {
        self.figure.as_ref().map_or(0.0, |figure| figure.bytes_per_second)
    }

    /// The rates of its rounds, times `factor`.
    pub fn rates(&self, factor: f64) -> Vec<f64> {
        self.figure.iter().flat_map(|figure| &figure.rates).map(|rate| rate * factor).collect()
    }

    /// Sets the limit to `limits` by `by`, unless a lower one stands already or nothing was measured. `limits` are one
    /// number, or one per round.
    pub fn limited(&mut self, by: impl Into<String>, limits: &[f64]) {
        let Some(figure) = &self.figure else { return };
        let (Some(rate), Some(fraction)) = (median_rate(limits), fraction(&figure.rates, limits)) else { return };
        if self.limit.as_ref().is_none_or(|limit| rate < limit.bytes_per_second) {
            self.limit = Some(Limit { by: by.into(), bytes_per_second: rate, fraction });
        }
    }
}

/// A curve of a sweep.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Series {
    /// What it is called, such as `depth 32`.
    pub label: String,
    /// x (a block in bytes, or threads) and bytes per second.
    pub points: Vec<(u64, f64)>,
}

/// Curves with one meaning of x.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Sweep {
    /// The hop.
    pub name: String,
    /// `block` or `threads`.
    pub over: &'static str,
    /// The curves.
    pub series: Vec<Series>,
}

/// A part of a machine that a training step loads, and how long it needs for one parameter.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Load {
    /// The hop that was measured.
    pub hop: String,
    /// Bytes per parameter and step.
    pub bytes: u64,
    /// Parameters per second that it can serve.
    pub params_per_second: f64,
}

/// Everything.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// [`MARK`].
    pub made_by: &'static str,
    /// Version of this program.
    pub version: &'static str,
    /// When, in UTC.
    pub date: String,
    /// Where.
    pub machine: Machine,
    /// How many ranks measured at once, where there were several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ranks: Option<u32>,
    /// How many CPUs others kept busy meanwhile, on average.
    pub others_cpus: f64,
    /// Hops and pipelines.
    pub hops: Vec<Hop>,
    /// Sweeps.
    pub sweeps: Vec<Sweep>,
    /// What binds training, slowest first: with states on NVMe.
    pub with_nvme: Vec<Load>,
    /// The same with states in host memory.
    pub in_memory: Vec<Load>,
    /// Why the figures are not to be relied on; none if they are.
    pub doubts: Vec<String>,
    /// In words; none where there are doubts, unless it was asked for all the same.
    pub verdict: Vec<String>,
    /// What the user should know besides.
    pub notes: Vec<String>,
}

impl Report {
    /// True if no hop has a figure.
    pub fn is_empty(&self) -> bool {
        self.hops.iter().all(|hop| hop.figure.is_none())
    }

    /// The hop of a name over all paths, or the only one.
    pub fn hop(&self, name: &str) -> Option<&Hop> {
        find(&self.hops, name)
    }
}

/// What stands above the doubts about these hops.
pub(super) fn doubted(hops: &[Hop]) -> &'static str {
    match hops.iter().any(|hop| hop.figure.is_some()) {
        true => "These figures are not to be relied on:",
        false => "Nothing was measured:",
    }
}

impl Figure {
    /// The spread, in percent; nothing that one round could say.
    pub(super) fn spread_shown(&self) -> String {
        if self.rates.len() < 2 { "-".to_owned() } else { format!("{:.0} %", self.spread * 100.0) }
    }
}

/// The hop of a name that was measured; with several the last, which is the one over all paths, or from pinned memory.
pub fn find<'a>(hops: &'a [Hop], name: &str) -> Option<&'a Hop> {
    hops.iter().rev().find(|hop| hop.name == name && hop.figure.is_some())
}

/// The fastest hop of a name.
pub fn fastest<'a>(hops: &'a [Hop], name: &str) -> Option<&'a Hop> {
    hops.iter().filter(|hop| hop.name == name && hop.figure.is_some()).max_by(|a, b| a.rate().total_cmp(&b.rate()))
}
