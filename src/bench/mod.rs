//! The bandwidth benchmark: every hop that training uses, alone and together, on the runtime's own engines.
//!
//! B1: a figure is a median of rounds, and the rounds of all hops are interleaved, so that a slow minute slows all.
//! B2: the limit of a pipeline was measured in the same run. B3: a figure that could be a cache's is not given.
//! B4: nothing is concluded from figures that other load or their own spread makes doubtful. B5: files are made by [`disk`] only, have no name, and are gone with the process.

mod clock;
pub mod disk;
pub mod fio;
pub mod gpu;
mod html;
mod kernels;
pub mod link;
mod look;
mod measure;
pub mod memory;
mod outputs;
mod peers;
pub mod pipeline;
mod plan;
mod quiet;
pub mod report;
mod setup;
pub mod stats;
mod sweeps;
mod table;
mod together;
mod trust;
mod verdict;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

pub use html::page;
pub use look::Look;
pub use outputs::{Outputs, csv, json, profile};
pub use peers::{Crew, Place};
pub use plan::run;
pub use table::text;
pub use together::follow;

use crate::{
    bench::stats::Round,
    device::DeviceChoice,
    error::{Code, Error, Result},
    io::EngineChoice,
    quantities::ByteCount,
};

/// What to measure, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// The paths; none leaves out everything that needs a disk.
    pub paths: Vec<PathBuf>,
    /// The device.
    pub device: DeviceChoice,
    /// The I/O engine.
    pub engine: EngineChoice,
    /// Bytes of the file on each path.
    pub file: ByteCount,
    /// Whether the file may become smaller where the disk is slow.
    pub file_limited: bool,
    /// Bytes of one read or write.
    pub block: ByteCount,
    /// Reads and writes in flight per path.
    pub depth: u32,
    /// Threads of the processor's hops; none: all that the process may use.
    pub threads: Option<u32>,
    /// Rounds per hop.
    pub rounds: u32,
    /// How long all rounds of all hops take together.
    pub time: Duration,
    /// By when everything is to be over: on a slow disk there are fewer rounds and points.
    pub limit: Duration,
    /// How long one point of a sweep takes; zero leaves the sweeps out.
    pub point: Duration,
    /// Few points per sweep.
    pub quick: bool,
    /// Run fio beside the NVMe hops.
    pub check: bool,
    /// Give a verdict although the figures are not to be relied on.
    pub force: bool,
    /// How many processes of this host measure at once.
    pub ranks: u32,
}

impl Options {
    /// Under two minutes, or under twenty seconds.
    pub fn new(paths: Vec<PathBuf>, quick: bool) -> Self {
        let nvme = crate::policy::Policy::default().nvme;
        let (file, rounds, time, point, limit) =
            if quick { (512, 9, 8_500, 60, 18) } else { (2048, 15, 56_000, 250, 108) };
        Self {
            paths,
            device: DeviceChoice::Auto,
            engine: EngineChoice::Auto,
            file: ByteCount::mib(file),
            file_limited: true,
            block: nvme.block,
            depth: nvme.queue_depth.or(32),
            threads: None,
            rounds,
            time: Duration::from_millis(time),
            limit: Duration::from_secs(limit),
            point: Duration::from_millis(point),
            quick,
            check: false,
            force: false,
            ranks: 1,
        }
    }
}

/// Where the benchmark says how far it is.
pub trait Progress {
    /// `done` of all the work (0 to 1) is done; `what` comes next.
    fn at(&mut self, done: f64, what: &str);
}

/// A request to stop, set by a signal.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(pub Arc<AtomicBool>);

impl Interrupt {
    /// `FN-E106` once it is set.
    ///
    /// # Errors
    /// That one.
    pub fn check(&self) -> Result<()> {
        if self.0.load(Ordering::Relaxed) {
            return Err(Error::new(Code::Interrupted, "the benchmark was interrupted; what it made is removed."));
        }
        Ok(())
    }
}

/// Something that can be done for a while.
pub(crate) trait Exercise {
    /// Does it for about `time`, and says what was done.
    fn round(&mut self, time: Duration) -> Result<Round>;
}
