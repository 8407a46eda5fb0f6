//! Whether a plan may begin: it fits the budgets, the machine, its cgroup, and what other runs here are going to take.
//!
//! A plan's memory is taken page by page, so a run that has just begun is not visible in the machine's free memory. Each
//! run therefore leaves a note, locked as long as it lives, that says how much it is going to take.

use std::path::Path;

use crate::{
    error::{Code, Error, Result},
    model::Layout,
    quantities::ByteCount,
    runtime::{
        ranks::{shelf, spec::RankSpec},
        setup::{
            config::Config,
            running_notes::{Folder, Note, Other},
        },
    },
    schedule::{Placement, advice},
};

/// Where notes lie: in memory, gone with the machine, shared by the containers that share this folder.
const FOLDER: &str = "/dev/shm";

/// This run's note, and what others said.
#[derive(Debug)]
pub(crate) struct Running {
    /// Removed as it is dropped.
    _note: Option<Note>,
    others: Vec<Other>,
    mine: u64,
    available: u64,
    /// What had to live one tier lower than asked.
    demoted: Option<String>,
    /// Why there are no notes.
    unknown: Option<String>,
}

/// Places a model and admits the plan, before anything is allocated. `freed` bytes of this process will be given back as the model
/// moves in. Of several `ranks` the first one answers for all memory of the host.
///
/// # Errors
/// `FN-E20x` with the numbers and the ways out.
pub(crate) fn admit(
    layout: &Layout,
    config: &Config,
    granularity: u64,
    on_host: bool,
    freed: ByteCount,
    ranks: Option<RankSpec>,
) -> Result<(Placement, Running)> {
    let limits = config.limits(granularity);
    let ways = || advice::ways(layout, &config.tiers, &config.budgets, &limits);
    let placed = advice::place_or_demote(layout, &config.tiers, &config.budgets, &limits, config.demote);
    let (plan, demoted) = placed.map_err(|error| {
        let need = error.needs().unwrap_or_default();
        if error.code() != Code::HostBudget {
            return error;
        }
        if !config.host_is_auto {
            return advice::with_ways(error, Some(need), &ways(), None);
        }
        let why = format!("It is auto: {}, less budget.reserve.", config.machine.describe());
        // Of what is added, the reserve takes its share: 8 % unless it is set.
        let short = need.0.saturating_sub(config.budgets.host.0);
        let way_out = config.machine.way_out(ByteCount(short + short / 11));
        advice::with_ways(error.because(&why), None, &ways(), Some(way_out))
    })?;
    let mut frames = if on_host && config.budgets.hbm.is_some() { plan.hbm_bytes } else { 0 };
    if let Some(spec) = ranks {
        shelf::check(layout, &plan)?;
        if !spec.leads() {
            return Ok((plan, Running { demoted, ..Running::alone(0, 0) }));
        }
        // Each rank has frames of its own, all else is there once.
        frames += if on_host { plan.hbm_bytes * (spec.size as u64 - 1) } else { 0 };
    }
    let need = plan.host_bytes + plan.widest_on_nvme(layout) + frames;
    let mut running = Running::begin(Path::new(FOLDER), need, config.machine.available().0, freed.0);
    running.demoted = demoted;
    let coming: u64 = running.others.iter().map(|o| o.coming).sum();
    if need + coming > running.available {
        let mut error =
            config.machine.admit("the plan", ByteCount(need)).err().unwrap_or_else(|| short(need, running.available));
        error = error.needing(ByteCount(need + coming));
        if coming > 0 {
            error = error.because(&running.describe());
        }
        let mut ways = ways();
        ways.retain(|w| w.host.0 + frames + coming <= running.available);
        let smaller =
            if frames > 0 { "lower budget.hbm, which is host memory here, or" } else { "lower budget.host, or" };
        let last = format!("{smaller} {}", config.machine.way_out(ByteCount(need + coming - running.available)));
        return Err(advice::with_ways(error, None, &ways, Some(last)));
    }
    Ok((plan, running))
}

fn short(need: u64, available: u64) -> Error {
    let (need, available) = (ByteCount(need), ByteCount(available));
    Error::new(Code::HostBudget, format!("host memory: the plan needs {need}, of {available} that are available."))
}

impl Running {
    /// Leaves this run's note in `folder`, and reads those of others. Without such a folder runs do not know of each other.
    fn begin(folder: &Path, mine: u64, available: u64, freed: u64) -> Self {
        let alone = Self::alone(mine, available);
        match Folder::open(folder) {
            Ok(Some(folder)) => {
                let others = folder.others();
                Self { others, _note: folder.leave(mine, freed), ..alone }
            }
            Ok(None) => alone,
            Err(reason) => Self { unknown: Some(format!("FN-W211 {reason}")), ..alone },
        }
    }

    /// A run that knows of no other.
    fn alone(mine: u64, available: u64) -> Self {
        Self { _note: None, others: Vec::new(), mine, available, demoted: None, unknown: None }
    }

    /// What was demoted, and a line where the plans of all runs are more than there is.
    pub(crate) fn notes(&self) -> Vec<String> {
        let planned: u64 = self.others.iter().map(|o| o.planned).sum();
        let taken: u64 = self.others.iter().map(|o| o.planned - o.coming).sum();
        if self.others.is_empty() || self.mine + planned <= (self.available + taken) / 100 * 90 {
            return self.demoted.iter().chain(&self.unknown).cloned().collect();
        }
        let shared = format!(
            "FN-W208 {} Together with this run's {} that is nearly all there is.",
            self.describe(),
            ByteCount(self.mine)
        );
        self.demoted.iter().cloned().chain([shared]).collect()
    }

    fn describe(&self) -> String {
        let one = |o: &Other| {
            format!(
                "process {} has planned {} and is yet to take {} of it",
                o.pid,
                ByteCount(o.planned),
                ByteCount(o.coming)
            )
        };
        let all: Vec<String> = self.others.iter().map(one).collect();
        format!("Other runs share this memory: {}.", all.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_told_of_others_and_of_a_folder_that_is_not_its_own() {
        let dir = tempfile::tempdir().expect("a folder");
        let first = Running::begin(dir.path(), 1 << 40, 1 << 41, 0);
        assert!(first.others.is_empty() && first._note.is_some() && first.notes().is_empty());
        let second = Running::begin(dir.path(), 1 << 40, 1 << 40, 0);
        assert!(second.others.len() == 1 && second.notes()[0].contains("FN-W208"), "{second:?}");
        drop((first, second));
        let mine = std::fs::read_dir(dir.path()).expect("lists").flatten().next().expect("one").path();
        std::fs::remove_dir(&mine).expect("empty");
        std::fs::write(&mine, "").expect("writes");
        let third = Running::begin(dir.path(), 1 << 40, 1 << 41, 0);
        assert!(third._note.is_none() && third.notes()[0].contains("FN-W211"), "{third:?}");
    }
}
