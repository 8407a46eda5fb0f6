//! The checks of kernel, processor and memory.

use std::path::Path;

use crate::{
    doctor::Check,
    machine::{HostLimits, allowed_cpus, cpu_list, may_lock_anything, online_cpus, text},
    quantities::ByteCount,
};

/// Below this, registered buffers and locked rings do not fit.
const SMALL_MEMLOCK: ByteCount = ByteCount::mib(64);
/// Below this, there is no room for the runtime's own buffers.
const SMALL_MEMORY: ByteCount = ByteCount::gib(2);

pub(super) fn checks() -> Vec<Check> {
    let mut checks = vec![kernel(&text("/proc/sys/kernel/osrelease"))];
    match HostLimits::read() {
        Ok(limits) => checks.extend(limited(&limits)),
        Err(e) => checks.push(Check::failed("memory", &e)),
    }
    checks.push(huge_pages(&text("/sys/kernel/mm/transparent_hugepage/enabled")));
    checks.push(numa(&text("/sys/devices/system/node/online")));
    checks
}

fn kernel(release: &str) -> Check {
    let mut numbers = release.split(['.', '-']).map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= (5, 6) {
        return Check::okay("kernel", release);
    }
    Check::warn("kernel", format!("{release}: too old for io_uring"), "Use Linux 5.6 or later; 6.1 is better.")
}

fn limited(limits: &HostLimits) -> Vec<Check> {
    let memory = format!("{}, {} available", limits.mem_total, limits.available());
    let cgroup = match &limits.cgroup {
        None => Check::okay("cgroup memory", "no limit"),
        Some(group) => {
            let found = format!("limit {} ({}), {} left", group.limit, group.path.display(), group.headroom);
            let raise = "Raise it: docker run --memory, MemoryMax= of the unit, or resources.limits.memory of the pod.";
            if group.headroom < SMALL_MEMORY {
                Check::warn("cgroup memory", found, raise)
            } else {
                Check::okay("cgroup memory", found)
            }
        }
    };
    let memory = if limits.available() < SMALL_MEMORY {
        Check::warn("memory", memory, "End other processes, or raise the container's limit: at least 2 GiB are needed.")
    } else {
        Check::okay("memory", memory)
    };
    vec![
        cpus(limits.cpus, online_cpus()),
        threads(limits.cpus, &allowed_cpus(), &openmp()),
        memory,
        cgroup,
        memlock(limits.memlock, may_lock_anything()),
    ]
}

fn cpus(usable: u32, online: u32) -> Check {
    let found = format!("{usable} of {online} (affinity mask and cgroup quota)");
    if usable > 1 {
        return Check::okay("CPUs", found);
    }
    Check::warn("CPUs", found, "Give it more (docker run --cpus, taskset): AdamW, copies and I/O share this one.")
}

/// What the process may run on, and whether torch's threads are limited apart from that.
fn threads(usable: u32, allowed: &[u32], openmp: &str) -> Check {
    let affinity = format!("AdamW uses {usable}; allowed CPUs: {}", ranges(allowed));
    match openmp.trim().parse::<u32>() {
        Ok(torch) if torch < usable => Check::warn(
            "threads",
            format!("{affinity}; OMP_NUM_THREADS={torch} holds torch's own to fewer"),
            format!("Unset OMP_NUM_THREADS, or set it to {usable}, where the model computes on the processor."),
        ),
        _ => Check::okay("threads", affinity),
    }
}

fn openmp() -> String {
    std::env::var("OMP_NUM_THREADS").unwrap_or_default()
}

/// `0-3,8`: the opposite of [`cpu_list`].
fn ranges(cpus: &[u32]) -> String {
    let mut parts: Vec<(u32, u32)> = Vec::new();
    for &cpu in cpus {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 == cpu => *last = cpu,
            _ => parts.push((cpu, cpu)),
        }
    }
    let text = |&(first, last): &(u32, u32)| if first == last { first.to_string() } else { format!("{first}-{last}") };
    parts.iter().map(text).collect::<Vec<_>>().join(",")
}

fn memlock(limit: Option<ByteCount>, privileged: bool) -> Check {
    match limit {
        None => Check::okay("memlock", "unlimited"),
        Some(limit) if privileged => Check::okay("memlock", format!("{limit}, not applied: CAP_IPC_LOCK")),
        Some(limit) if limit >= SMALL_MEMLOCK => Check::okay("memlock", limit.to_string()),
        Some(limit) => Check::warn(
            "memlock",
            format!("{limit}: I/O buffers cannot be registered, which is a little slower"),
            "ulimit -l unlimited, docker run --ulimit memlock=-1, or LimitMEMLOCK=infinity in the unit.",
        ),
    }
}

fn huge_pages(enabled: &str) -> Check {
    let chosen = enabled.split(['[', ']']).nth(1).unwrap_or("not known");
    if matches!(chosen, "always" | "madvise") {
        return Check::okay("huge pages", chosen);
    }
    Check::warn(
        "huge pages",
        format!("transparent huge pages: {chosen}"),
        "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled as root: page-locking and I/O of 4 KiB pages is slower.",
    )
}

fn numa(online: &str) -> Check {
    let nodes = cpu_list(online).len();
    let found = match nodes {
        0 => "not known".to_owned(),
        1 => "1 node".to_owned(),
        n => {
            let of = |node: &u32| text(Path::new("/sys/devices/system/node").join(format!("node{node}/cpulist")));
            let cpus: Vec<String> = cpu_list(online).iter().map(|node| format!("{node}: CPUs {}", of(node))).collect();
            format!("{n} nodes ({})", cpus.join("; "))
        }
    };
    Check::okay("NUMA", found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn texts_of_the_kernel_become_checks() {
        assert_eq!(cpu_list("0-3,8,10-11"), [0, 1, 2, 3, 8, 10, 11]);
        assert_eq!(cpu_list(""), [0_u32; 0]);
        assert_eq!(kernel("6.1.0-18-amd64").status, Status::Okay);
        assert_eq!(kernel("5.4.0").status, Status::Warn);
        assert_eq!(huge_pages("always [madvise] never").found, "madvise");
        assert_eq!(huge_pages("always madvise [never]").status, Status::Warn);
        assert_eq!(cpus(1, 64).status, Status::Warn);
        assert_eq!(ranges(&cpu_list("0-3,8,10-11")), "0-3,8,10-11");
        assert_eq!(threads(4, &[0, 1, 2, 3], "").found, "AdamW uses 4; allowed CPUs: 0-3");
        assert_eq!(threads(4, &[0, 1, 2, 3], "1").status, Status::Warn);
        assert_eq!(threads(4, &[0, 1, 2, 3], "8,2").status, Status::Okay);
    }

    #[test]
    fn a_small_limit_of_locked_memory_is_a_warning_unless_it_does_not_apply() {
        let small = Some(ByteCount::kib(64));
        assert_eq!(memlock(small, false).status, Status::Warn);
        assert_eq!(memlock(small, true).status, Status::Okay);
        assert_eq!(memlock(None, false).status, Status::Okay);
        assert_eq!(memlock(Some(ByteCount::gib(1)), false).status, Status::Okay);
    }
}
