//! The cgroups of this process, of both versions: limits of memory and of processor time.

use std::path::{Path, PathBuf};

use crate::quantities::ByteCount;

/// A cgroup with a memory limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupLimit {
    /// Its directory.
    pub path: PathBuf,
    /// The limit.
    pub limit: ByteCount,
    /// The limit less what is used and cannot be given back.
    pub headroom: ByteCount,
}

/// A limit in a cgroup file: `max` (v2) and numbers near the end of the range (v1) mean none.
fn parse_cgroup_limit(text: &str) -> Option<ByteCount> {
    text.trim().parse().ok().filter(|&n: &u64| n < 1 << 60).map(ByteCount)
}

/// File cache in `memory.stat` that the kernel can give back. `prefix` is `total_` for v1, where plain names leave
/// out the children.
fn parse_reclaimable(text: &str, prefix: &str) -> ByteCount {
    let of = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(prefix)?.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|n| n.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    ByteCount(of("inactive_file").saturating_add(of("active_file")))
}

/// CPUs of a quota, rounded up: `quota` and `period` as in `cpu.max` (v2) or the two v1 files.
fn parse_cpu_quota(quota: &str, period: &str) -> Option<u32> {
    let (quota, period): (u64, u64) = (quota.trim().parse().ok()?, period.trim().parse().ok()?);
    (quota > 0 && period > 0).then(|| u32::try_from(quota.div_ceil(period)).unwrap_or(u32::MAX))
}

/// A directory of a cgroup hierarchy and where that hierarchy is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Level {
    mount: PathBuf,
    group: PathBuf,
}

impl Level {
    /// The group and its parents, up to the mount.
    fn upward(&self) -> impl Iterator<Item = &Path> {
        self.group.ancestors().take_while(|path| path.starts_with(&self.mount))
    }
}

/// Where this process is in the hierarchies that matter.
#[derive(Debug, Default)]
pub(super) struct Cgroups {
    unified: Option<Level>,
    memory: Option<Level>,
    cpu: Option<Level>,
}

impl Cgroups {
    /// From `/proc/self/cgroup` and `/proc/self/mountinfo`.
    pub(super) fn parse(cgroup: &str, mountinfo: &str, root: &Path) -> Self {
        let mut found = Self::default();
        for line in cgroup.lines() {
            let mut parts = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
            let place = |fs, controller| place(mountinfo, fs, controller, path, root);
            if controllers.is_empty() {
                found.unified = place("cgroup2", "");
            }
            for controller in controllers.split(',') {
                match controller {
                    "memory" => found.memory = place("cgroup", "memory"),
                    "cpu" => found.cpu = place("cgroup", "cpu"),
                    _ => {}
                }
            }
        }
        found
    }

    /// The group with the least headroom.
    pub(super) fn memory(&self) -> Option<CgroupLimit> {
        let read = |place: &Option<Level>, files: [&str; 2], prefix: &str| {
            let dirs = place.iter().flat_map(Level::upward);
            let of = |dir: &Path| {
                let text = |file: &str| std::fs::read_to_string(dir.join(file)).unwrap_or_default();
                let limit = parse_cgroup_limit(&text(files[0]))?;
                let used = text(files[1]).trim().parse::<u64>().unwrap_or(0);
                let pinned = used.saturating_sub(parse_reclaimable(&text("memory.stat"), prefix).0);
                let headroom = ByteCount(limit.0.saturating_sub(pinned));
                Some(CgroupLimit { path: dir.to_path_buf(), limit, headroom })
            };
            dirs.filter_map(of).min_by_key(|c| c.headroom)
        };
        let two = read(&self.unified, ["memory.max", "memory.current"], "");
        let one = read(&self.memory, ["memory.limit_in_bytes", "memory.usage_in_bytes"], "total_");
        two.into_iter().chain(one).min_by_key(|c| c.headroom)
    }

    /// The least CPU quota.
    pub(super) fn cpu_quota(&self) -> Option<u32> {
        let text = |dir: &Path, file: &str| std::fs::read_to_string(dir.join(file)).unwrap_or_default();
        let two = self.unified.iter().flat_map(Level::upward).filter_map(|dir| {
            let max = text(dir, "cpu.max");
            let (quota, period) = max.split_once(' ')?;
            parse_cpu_quota(quota, period)
        });
        let one = self
            .cpu
            .iter()
            .flat_map(Level::upward)
            .filter_map(|dir| parse_cpu_quota(&text(dir, "cpu.cfs_quota_us"), &text(dir, "cpu.cfs_period_us")));
        two.chain(one).min()
    }
}

/// The mount of a hierarchy and the directory of `path` in it. A container may see only a part of the hierarchy: the
/// mount's own root is then a prefix of the path, or, from within a namespace, the path leads nowhere and the mount is
/// as near as one gets.
fn place(mountinfo: &str, fs: &str, controller: &str, path: &str, root: &Path) -> Option<Level> {
    let (seen, mount) = mountinfo.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(3);
        let (seen, mount) = (left.next()?, left.next()?);
        let mut right = right.split(' ');
        let options = (right.next()? == fs).then(|| right.nth(1))?.unwrap_or_default();
        (controller.is_empty() || options.split(',').any(|o| o == controller)).then_some((seen, mount))
    })?;
    let mount = root.join(mount.trim_start_matches('/'));
    let inside = Path::new(path).strip_prefix(seen).unwrap_or(Path::new(path));
    let inside = inside.strip_prefix("/").unwrap_or(inside);
    let group = mount.join(inside);
    let reachable = !path.contains("..") && group.is_dir();
    Some(Level { group: if reachable { group } else { mount.clone() }, mount })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_and_quotas_are_read() {
        assert_eq!(parse_cgroup_limit("max\n"), None);
        assert_eq!(parse_cgroup_limit("9223372036854771712\n"), None);
        assert_eq!(parse_cgroup_limit("4294967296\n"), Some(ByteCount::gib(4)));
        assert_eq!(parse_cpu_quota("150000", "100000"), Some(2));
        assert_eq!(parse_cpu_quota("max", "100000"), None);
        assert_eq!(parse_cpu_quota("-1", "100000"), None);
        let stat = "anon 5\ninactive_file 10\nactive_file 7\ntotal_inactive_file 100\ntotal_active_file 70\n";
        assert_eq!(parse_reclaimable(stat, ""), ByteCount(17));
        assert_eq!(parse_reclaimable(stat, "total_"), ByteCount(170));
    }
}
