//! What a runtime has counted, read without the GIL and handed over as a dictionary.

use pyo3::{prelude::*, types::PyDict};

use funicular::{
    error::Result,
    quantities::Tier,
    runtime::{
        Runtime,
        measure::{
            stats::{Cause, FlowTotals, Link},
            step_time::{StepTime, Times},
        },
    },
    schedule::machine::Prefetches,
};

const TIERS: [Tier; 3] = [Tier::Hbm, Tier::Host, Tier::Nvme];

/// Everything counted so far.
pub(super) struct Figures {
    /// Other ranks train with this one.
    ranked: bool,
    times: Times,
    links: [FlowTotals; Link::ALL.len()],
    stalls: [u64; Cause::ALL.len()],
    /// Limit, use and peak by tier.
    budgets: [(Option<u64>, u64, u64); TIERS.len()],
    prefetches: Prefetches,
    steps: u64,
    home_uses: u64,
    ahead: (u64, u64, u64),
    updated: (u64, u64),
    engine: Option<&'static str>,
    threads: usize,
}

impl Figures {
    /// Reads them; waits a moment for the figures of the last step.
    ///
    /// # Errors
    /// A failure of the device, or when closed.
    pub(super) fn of(rt: &Runtime) -> Result<Self> {
        // First: it brings the stalls up to date.
        let times = rt.times()?;
        let stats = rt.stats()?;
        let mut budgets = [(None, 0, 0); TIERS.len()];
        for (budget, tier) in budgets.iter_mut().zip(TIERS) {
            let (used, peak) = rt.used(tier)?;
            *budget = (rt.limit(tier)?, used, peak);
        }
        Ok(Self {
            ranked: rt.rank()?.is_some(),
            times,
            links: Link::ALL.map(|link| stats.flow(link)),
            stalls: Cause::ALL.map(|cause| stats.stall(cause)),
            budgets,
            prefetches: rt.prefetches()?,
            steps: stats.steps(),
            home_uses: stats.home_uses(),
            ahead: stats.speculations(),
            updated: stats.updates(),
            engine: rt.engine_name()?,
            threads: rt.pool_threads()?,
        })
    }

    /// The dictionary that `funicular.stats` reads.
    ///
    /// # Errors
    /// When Python has no memory.
    pub(super) fn into_dict(self, py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
        let out = PyDict::new(py);
        let links = PyDict::new(py);
        let known = if self.ranked { (Link::ALL.len(), Cause::ALL.len()) } else { (Link::ALONE, Cause::ALONE) };
        for (link, flow) in Link::ALL.into_iter().zip(&self.links).take(known.0) {
            links.set_item(link.name(), (flow.bytes, flow.busy_nanos))?;
        }
        let stalls = PyDict::new(py);
        for (cause, nanos) in Cause::ALL.into_iter().zip(self.stalls).take(known.1) {
            stalls.set_item(cause.name(), nanos)?;
        }
        let budgets = PyDict::new(py);
        for (tier, budget) in TIERS.into_iter().zip(self.budgets) {
            budgets.set_item(tier.name(), budget)?;
        }
        let (times, p) = (self.times, self.prefetches);
        out.set_item("links", links)?;
        out.set_item("stalls", stalls)?;
        out.set_item("budgets", budgets)?;
        out.set_item("timed", (times.steps, times.lost))?;
        out.set_item("time", step_time(&times.total, known))?;
        out.set_item("last", step_time(&times.last, known))?;
        out.set_item("steps", self.steps)?;
        out.set_item("home_uses", self.home_uses)?;
        out.set_item("ahead", self.ahead)?;
        out.set_item("updated", self.updated)?;
        out.set_item("prefetch", (p.hits, p.late, p.demand, p.wasted, p.conflicts))?;
        out.set_item("engine", self.engine)?;
        out.set_item("threads", self.threads)?;
        Ok(out)
    }
}

/// Wall, compute, stalls by cause, busy time by link, of so many of them.
fn step_time(time: &StepTime, (links, causes): (usize, usize)) -> (u64, u64, Vec<u64>, Vec<u64>) {
    (time.wall, time.compute, time.stalls[..causes].to_vec(), time.busy[..links].to_vec())
}
