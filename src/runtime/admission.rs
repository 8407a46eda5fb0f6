//! Whether a plan may begin: it fits the budgets, the machine, its cgroup, and what other runs here are going to take.
//!
//! A plan's memory is taken page by page, so a run that has just begun is not visible in the machine's free memory. Each
//! run therefore leaves a note, locked as long as it lives, that says how much it is going to take.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::Write,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use crate::{
    error::{Code, Error, Result},
    io::random,
    model::Layout,
    runtime::config::Config,
    schedule::{Placement, advice},
    units::ByteCount,
};

/// Where notes lie: in memory, gone with the machine, shared by the containers that share this folder.
const FOLDER: &str = "/dev/shm";

/// This run's note, and what others said.
#[derive(Debug)]
pub(crate) struct Running {
    note: Option<(PathBuf, File)>,
    others: Vec<Other>,
    mine: u64,
    available: u64,
    /// What had to live one tier lower than asked.
    demoted: Option<String>,
}

/// Another run on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Other {
    pid: u32,
    /// Host memory in its plan.
    planned: u64,
    /// Of which it is yet to take so much.
    coming: u64,
}

/// Places a model and admits the plan, before anything is allocated. `freed` bytes of this process will be given back as the model
/// moves in.
///
/// # Errors
/// `FN-E20x` with the numbers and the ways out.
pub(crate) fn admit(
    layout: &Layout,
    config: &Config,
    granularity: u64,
    on_host: bool,
    freed: ByteCount,
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
        advice::with_ways(error.because(&why), None, &ways(), Some(config.machine.way_out(need)))
    })?;
    let frames = if on_host && config.budgets.hbm.is_some() { plan.hbm_bytes } else { 0 };
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
        let last = format!("{smaller} {}", config.machine.way_out(ByteCount(need + coming)));
        return Err(advice::with_ways(error, None, &ways, Some(last)));
    }
    Ok((plan, running))
}

fn short(need: u64, available: u64) -> Error {
    let (need, available) = (ByteCount(need), ByteCount(available));
    Error::new(Code::HostBudget, format!("host memory: the plan needs {need}, of {available} that are available."))
}

impl Running {
    /// Leaves this run's note in `folder`, and reads those of others. Without such a folder nobody knows of anybody.
    fn begin(folder: &Path, mine: u64, available: u64, freed: u64) -> Self {
        let uid = user();
        let folder = folder.join(format!("funicular-{uid}"));
        let _ = fs::DirBuilder::new().mode(0o700).create(&folder);
        let others = others(&folder);
        let before = resident(std::process::id()).saturating_sub(freed);
        let note = leave(&folder, mine, before).ok();
        Self { note, others, mine, available, demoted: None }
    }

    /// What was demoted, and a line where the plans of all runs are more than there is.
    pub(crate) fn notes(&self) -> Vec<String> {
        let planned: u64 = self.others.iter().map(|o| o.planned).sum();
        let taken: u64 = self.others.iter().map(|o| o.planned - o.coming).sum();
        if self.others.is_empty() || self.mine + planned <= (self.available + taken) / 100 * 90 {
            return self.demoted.iter().cloned().collect();
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

impl Drop for Running {
    fn drop(&mut self) {
        if let Some((path, _)) = &self.note {
            // The lock goes with the file; a note that stays is known to be stale by it.
            let _ = fs::remove_file(path);
        }
    }
}

fn user() -> u32 {
    fs::metadata("/proc/self").map_or(0, |m| m.uid())
}

fn leave(folder: &Path, mine: u64, before: u64) -> std::io::Result<(PathBuf, File)> {
    let path = folder.join(format!("{}-{:016x}", std::process::id(), random()));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
    file.try_lock().map_err(std::io::Error::from)?;
    writeln!(file, "{mine} {before}")?;
    Ok((path, file))
}

/// The runs that are alive, by process; those of this one are among them. Stale notes are removed.
fn others(folder: &Path) -> Vec<Other> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let read = |path: PathBuf| -> Option<(u32, u64, u64)> {
        let pid = path.file_name()?.to_str()?.split('-').next()?.parse().ok()?;
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(&path).ok()?;
        if file.try_lock().is_ok() {
            let _ = fs::remove_file(&path);
            return None;
        }
        let text = fs::read_to_string(&path).ok()?;
        let (planned, before) = text.trim().split_once(' ')?;
        Some((pid, planned.parse().ok()?, before.parse().ok()?))
    };
    // What a process planned in all, and what it had before the first of its plans.
    let mut runs: BTreeMap<u32, (u64, u64)> = BTreeMap::new();
    for (pid, planned, before) in entries.flatten().filter_map(|e| read(e.path())) {
        let run = runs.entry(pid).or_insert((0, before));
        *run = (run.0 + planned, run.1.min(before));
    }
    let other = |(pid, (planned, before)): (u32, (u64, u64))| {
        let taken = resident(pid).saturating_sub(before);
        Other { pid, planned, coming: planned.saturating_sub(taken) }
    };
    runs.into_iter().map(other).collect()
}

/// Memory that a process has now.
fn resident(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    let pages: u64 = text.split(' ').nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
    pages * 4096
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_know_of_each_other_while_they_live() {
        let dir = tempfile::tempdir().expect("a folder");
        let folder = dir.path().join(format!("funicular-{}", user()));
        let first = Running::begin(dir.path(), 1 << 40, 1 << 41, 0);
        assert!(first.others.is_empty() && first.note.is_some());
        let mine = others(&folder);
        assert!(mine.len() == 1 && mine[0].pid == std::process::id(), "a second model counts the first: {mine:?}");
        // The note of a process that is alive (the parent of this one) and one of a process that is dead.
        let theirs = folder.join(format!("{}-00", std::os::unix::process::parent_id()));
        let locked = File::create(&theirs).expect("creates");
        locked.try_lock().expect("locks");
        fs::write(&theirs, "1099511627776 0\n").expect("writes");
        fs::write(folder.join("1-00"), "5 0\n").expect("writes");
        let second = Running::begin(dir.path(), 1 << 40, 1 << 40, 0);
        assert_eq!(second.others.len(), 2);
        assert!(
            second.others.iter().all(|o| o.coming > 1 << 39) && second.notes()[0].contains("FN-W208"),
            "{second:?}"
        );
        assert!(!folder.join("1-00").exists(), "the dead leave nothing behind");
        let path = second.note.as_ref().map(|(p, _)| p.clone()).expect("a note");
        drop(second);
        assert!(!path.exists());
    }
}
