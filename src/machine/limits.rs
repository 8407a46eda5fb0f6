//! What the machine and the cgroup allow this process.
//!
//! L1: the memory a process may use is the least over the machine and every cgroup from its own up to the root.
//! L2: file cache that the kernel can give back counts as free.

use std::path::Path;

use super::cgroups::{CgroupLimit, Cgroups};
use crate::{
    error::{Code, Error, Result},
    os_error,
    quantities::ByteCount,
};

/// What this process may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostLimits {
    /// Memory of the machine (`MemTotal`).
    pub mem_total: ByteCount,
    /// Memory that can be had without swapping (`MemAvailable`).
    pub mem_available: ByteCount,
    /// The tightest memory cgroup, if one limits at all.
    pub cgroup: Option<CgroupLimit>,
    /// CPUs: the affinity mask, less what a cgroup quota takes away.
    pub cpus: u32,
    /// How much may be locked by `mlock` and io_uring (`RLIMIT_MEMLOCK`); `None`: no limit.
    pub memlock: Option<ByteCount>,
}

impl HostLimits {
    /// Asks the kernel through `/proc` and `/sys/fs/cgroup`.
    ///
    /// # Errors
    /// `FN-E202` if `/proc/meminfo` cannot be read.
    pub fn read() -> Result<Self> {
        Self::read_under(Path::new("/"))
    }

    /// As [`HostLimits::read`], for a tree below `root`.
    pub(crate) fn read_under(root: &Path) -> Result<Self> {
        let text = |path: &str| std::fs::read_to_string(root.join(path)).unwrap_or_default();
        let unknown = |why: &str, errno: i32| {
            let what = format!("/proc/meminfo cannot be read{why}, so the free host memory is not known.");
            let action = os_error::advice(errno, root).unwrap_or_else(|| "Set budget.host.".to_owned());
            Error::new(Code::HostBudget, what).errno(errno).action(action)
        };
        let meminfo = std::fs::read_to_string(root.join("proc/meminfo"))
            .map_err(|e| unknown(&format!(" ({e})"), e.raw_os_error().unwrap_or(0)))?;
        let (mem_total, mem_available) = parse_meminfo(&meminfo).ok_or_else(|| unknown("", 0))?;
        let groups = Cgroups::parse(&text("proc/self/cgroup"), &text("proc/self/mountinfo"), root);
        let affinity = parse_cpus_allowed(&text("proc/self/status")).unwrap_or_else(|| {
            std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX))
        });
        Ok(Self {
            mem_total,
            mem_available,
            cgroup: groups.memory(),
            cpus: groups.cpu_quota().map_or(affinity, |quota| quota.min(affinity)).max(1),
            memlock: parse_memlock(&text("proc/self/limits")),
        })
    }

    /// These limits as they will be once `freed` bytes of memory have been given back.
    #[must_use]
    pub fn after(mut self, freed: ByteCount) -> Self {
        self.mem_available.0 += freed.0;
        if let Some(cgroup) = &mut self.cgroup {
            cgroup.headroom.0 += freed.0;
        }
        self
    }

    /// What may be allocated now.
    pub fn available(&self) -> ByteCount {
        self.cgroup.as_ref().map_or(self.mem_available, |c| c.headroom.min(self.mem_available))
    }

    /// Refuses to need more than is there, before anything is allocated.
    ///
    /// # Errors
    /// `FN-E202` with the numbers and the ways out. `what` names the need, such as "the plan".
    pub fn admit(&self, what: &str, need: ByteCount) -> Result<()> {
        if need <= self.available() {
            return Ok(());
        }
        let limit = self.describe();
        Err(Error::new(Code::HostBudget, format!("host memory: {what} needs {need}, but {limit}.")).needing(need).action(
            "Lower budget.host, or move states to disk (optimizer.tier = \"nvme\", params.tier = \"nvme\"), or raise the limit.",
        ))
    }

    /// Refuses a budget that is larger than what there is: a machine that does not have so much at all, or not now.
    ///
    /// # Errors
    /// `FN-E202` with both numbers.
    pub fn admit_budget(&self, budget: ByteCount) -> Result<()> {
        if budget <= self.available() {
            return Ok(());
        }
        let whole = self.cgroup.as_ref().map_or(self.mem_total, |c| c.limit.min(self.mem_total));
        let than = if budget > whole { "the whole machine may give" } else { "is free now" };
        let what = format!("budget.host = {budget} is more than {than}: {}.", self.describe());
        Err(Error::new(Code::HostBudget, what).needing(budget).action(format!(
            "Set budget.host to {} at most, or \"auto\", or raise the limit.",
            rounded_down(self.available())
        )))
    }

    /// What bounds [`HostLimits::available`], in words.
    pub fn describe(&self) -> String {
        match &self.cgroup {
            Some(c) if c.headroom < self.mem_available => format!(
                "this cgroup allows {} more (limit {} at {}; the machine has {} available)",
                c.headroom,
                c.limit,
                c.path.display(),
                self.mem_available
            ),
            _ => format!("the machine has {} available (of {})", self.mem_available, self.mem_total),
        }
    }

    /// Which limit to raise by `more` bytes where nothing else helps.
    pub fn way_out(&self, more: ByteCount) -> String {
        match &self.cgroup {
            Some(c) if c.headroom < self.mem_available => {
                format!("raise the limit at {} by {more}", c.path.display())
            }
            _ => format!("give the machine {more} more memory"),
        }
    }
}

/// A size that is shown with one decimal of a GiB, and is not more once it is shown.
fn rounded_down(size: ByteCount) -> ByteCount {
    const TENTH: u64 = (1 << 30) / 10;
    if size < ByteCount::gib(1) { size } else { ByteCount(size.0 / TENTH * TENTH) }
}

/// `MemTotal` and `MemAvailable` of `/proc/meminfo`.
fn parse_meminfo(text: &str) -> Option<(ByteCount, ByteCount)> {
    let kib = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().strip_suffix("kB")?.trim().parse().ok().map(ByteCount::kib)
    };
    Some((kib("MemTotal")?, kib("MemAvailable")?))
}

/// How many CPUs `Cpus_allowed_list` of `/proc/self/status` names: the affinity mask.
fn parse_cpus_allowed(text: &str) -> Option<u32> {
    let list = text.lines().find_map(|l| l.strip_prefix("Cpus_allowed_list:"))?.trim();
    list.split(',').try_fold(0_u32, |sum, range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        sum.checked_add(last.checked_sub(first)?.checked_add(1)?)
    })
}

/// The soft limit of `Max locked memory` in `/proc/self/limits`; `None`: no limit is known.
fn parse_memlock(text: &str) -> Option<ByteCount> {
    let line = text.lines().find_map(|l| l.strip_prefix("Max locked memory"))?;
    line.split_whitespace().next()?.parse().ok().map(ByteCount)
}

/// A machine for tests: so much memory available, of twice as much in all, and so much headroom in its cgroup if it is in one.
#[cfg(test)]
pub(crate) fn limits(available: u64, headroom: Option<u64>) -> HostLimits {
    HostLimits {
        mem_total: ByteCount(available * 2),
        mem_available: ByteCount(available),
        cgroup: headroom.map(|h| CgroupLimit {
            path: "/sys/fs/cgroup/job".into(),
            limit: ByteCount(h + (1 << 30)),
            headroom: ByteCount(h),
        }),
        cpus: 6,
        memlock: None,
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// A tree with these files; `/proc/meminfo` and `/proc/self/status` included.
    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let base = [
            ("proc/meminfo", "MemTotal:       24684092 kB\nMemFree:  1 kB\nMemAvailable:   20971520 kB\n"),
            ("proc/self/status", "Name:\tx\nCpus_allowed:\tff\nCpus_allowed_list:\t0-3,8,10-11\n"),
        ];
        for (path, text) in base.iter().chain(files) {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        dir
    }

    const V2: &str = "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
    const V1: &str = "33 25 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      34 25 0:30 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n";

    #[test]
    fn reads_the_kernels_texts() {
        assert_eq!(
            parse_meminfo("MemTotal: 8 kB\nMemAvailable:   4 kB\n"),
            Some((ByteCount::kib(8), ByteCount::kib(4)))
        );
        assert_eq!(parse_meminfo("MemTotal: 8 kB\n"), None);
        assert_eq!(parse_cpus_allowed("Cpus_allowed_list:\t0-3,8,10-11\n"), Some(7));
        assert_eq!(parse_cpus_allowed("Cpus_allowed_list:\t5-3\n"), None);
        let limits = "Limit  Soft Limit  Hard Limit  Units\nMax locked memory         8388608              unlimited            bytes\n";
        assert_eq!(parse_memlock(limits), Some(ByteCount::mib(8)));
        assert_eq!(parse_memlock("Max locked memory         unlimited            unlimited            bytes\n"), None);
    }

    #[test]
    fn version_2_takes_the_tightest_level_and_counts_cache_as_free() {
        let dir = tree(&[
            ("proc/self/cgroup", "0::/user/job/step\n"),
            ("proc/self/mountinfo", V2),
            ("proc/self/limits", "Max locked memory         65536                65536                bytes\n"),
            ("sys/fs/cgroup/user/job/step/memory.max", "max\n"),
            ("sys/fs/cgroup/user/job/step/cpu.max", "max 100000\n"),
            ("sys/fs/cgroup/user/job/memory.max", "4294967296\n"),
            ("sys/fs/cgroup/user/job/memory.current", "3221225472\n"),
            ("sys/fs/cgroup/user/job/memory.stat", "anon 1\ninactive_file 1073741824\nactive_file 1073741824\n"),
            ("sys/fs/cgroup/user/job/cpu.max", "250000 100000\n"),
            ("sys/fs/cgroup/user/memory.max", "8589934592\n"),
            ("sys/fs/cgroup/user/memory.current", "3221225472\n"),
        ]);
        let limits = HostLimits::read_under(dir.path()).unwrap();
        let cgroup = limits.cgroup.clone().unwrap();
        assert!(cgroup.path.ends_with("user/job"));
        assert_eq!((cgroup.limit, cgroup.headroom), (ByteCount::gib(4), ByteCount::gib(3)));
        assert_eq!((limits.available(), limits.cpus), (ByteCount::gib(3), 3));
        assert_eq!(limits.memlock, Some(ByteCount::kib(64)));
    }

    #[test]
    fn version_1_is_read_too() {
        let dir = tree(&[
            ("proc/self/cgroup", "4:memory:/job\n3:cpu,cpuacct:/job\n0::/\n"),
            ("proc/self/mountinfo", V1),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/job/memory.limit_in_bytes", "2147483648\n"),
            ("sys/fs/cgroup/memory/job/memory.usage_in_bytes", "1073741824\n"),
            ("sys/fs/cgroup/memory/job/memory.stat", "inactive_file 1\ntotal_inactive_file 536870912\n"),
            ("sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us", "100000\n"),
            ("sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us", "100000\n"),
        ]);
        let limits = HostLimits::read_under(dir.path()).unwrap();
        assert_eq!(limits.available(), ByteCount::mib(1536));
        assert_eq!(limits.cpus, 1);
    }

    #[test]
    fn a_container_sees_a_part_of_the_hierarchy() {
        let part = "33 25 0:29 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n";
        let file = [("sys/fs/cgroup/memory/memory.limit_in_bytes", "1073741824\n")];
        for path in ["4:memory:/docker/abc\n", "4:memory:/docker/other\n", "4:memory:/../x\n"] {
            let dir = tree(&[("proc/self/cgroup", path), ("proc/self/mountinfo", part), file[0]]);
            let limits = HostLimits::read_under(dir.path()).unwrap();
            assert_eq!(limits.available(), ByteCount::gib(1), "{path}");
        }
    }

    #[test]
    fn without_cgroups_the_machine_decides() {
        let limits = HostLimits::read_under(tree(&[]).path()).unwrap();
        assert_eq!((limits.available(), limits.cgroup, limits.cpus), (ByteCount::gib(20), None, 7));
        let error = HostLimits::read_under(tempfile::tempdir().unwrap().path()).unwrap_err();
        assert_eq!(error.code(), Code::HostBudget);
    }

    #[test]
    fn this_machine_can_be_read() {
        let limits = HostLimits::read().unwrap();
        assert!(limits.mem_available > ByteCount(0) && limits.mem_available <= limits.mem_total);
        assert!(limits.cpus >= 1);
    }

    #[test]
    fn a_budget_larger_than_the_machine_is_called_so() {
        let limits = limits(20 * GIB, Some(4 * GIB));
        limits.admit_budget(ByteCount::gib(4)).unwrap();
        for (budget, part) in [(64, "more than the whole machine may give: this cgroup"), (5, "more than is free now")]
        {
            let error = limits.admit_budget(ByteCount::gib(budget)).unwrap_err();
            assert_eq!(error.code(), Code::HostBudget);
            assert!(error.to_string().contains(part) && error.to_string().contains("4.0 GiB at most"), "{error}");
            assert!(!error.to_string().contains("needs"), "{error}");
        }
    }

    #[test]
    fn too_much_is_refused_with_the_numbers() {
        let limits = limits(20 * GIB, Some(4 * GIB));
        limits.admit("the plan", ByteCount::gib(4)).unwrap();
        let error = limits.admit("the plan", ByteCount::gib(6)).unwrap_err();
        assert_eq!(error.code(), Code::HostBudget);
        for part in [
            "the plan needs 6.0 GiB",
            "allows 4.0 GiB",
            "limit 5.0 GiB at /sys/fs/cgroup/job",
            "20.0 GiB available",
            "Lower budget.host",
        ] {
            assert!(error.to_string().contains(part), "{error}");
        }
    }
}
