//! What the kernel says about a process: its memory, and how much it may lock.

use std::fs;

use super::text;

/// Memory that a process has now.
pub(crate) fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib: u64 = line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0);
    kib << 10
}

/// When a process began, in ticks since the machine did; none if it has ended, also while its parent has yet to hear of it. With the number
/// it tells a process from any other.
pub(crate) fn began(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may have anything in it.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    fields.nth(18)?.parse().ok().filter(|_| !matches!(state, "Z" | "X" | "x"))
}

/// Whether this process may lock as much memory as it likes.
pub(crate) fn may_lock_anything() -> bool {
    has_ipc_lock(&text("/proc/self/status"))
}

/// Whether the text of a file `status` shows the capability for locking memory.
fn has_ipc_lock(status: &str) -> bool {
    const CAP_IPC_LOCK: u64 = 1 << 14;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).is_some_and(|caps| caps & CAP_IPC_LOCK != 0)
}

/// How much this thread may lock: everything with the capability for it, else the soft RLIMIT_MEMLOCK less what the
/// process has locked.
pub(crate) fn lockable_bytes() -> u64 {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    if has_ipc_lock(&status) {
        return u64::MAX;
    }
    let limits = fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let soft = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max locked memory"))
        .and_then(|rest| rest.split_whitespace().next())
        .map_or(0, |soft| if soft == "unlimited" { u64::MAX } else { soft.parse().unwrap_or(0) });
    let kib = |name: &str| {
        field(name).and_then(|v| v.split_whitespace().next()).and_then(|v| v.parse::<u64>().ok()).unwrap_or(0)
    };
    soft.saturating_sub((kib("VmLck:") + kib("VmPin:")) << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_memory_and_a_dead_one_has_none() {
        assert!(resident(std::process::id()) > 0);
        assert_eq!(resident(u32::MAX), 0);
    }

    #[test]
    fn a_process_is_known_by_when_it_began() {
        let mine = began(std::process::id());
        assert!(mine.is_some() && mine == began(std::process::id()) && began(u32::MAX).is_none());
        let mut child = std::process::Command::new("sleep").arg("100").spawn().expect("starts");
        assert!(began(child.id()).is_some_and(|then| Some(then) >= mine));
        child.kill().expect("kills");
        // Not waited for yet: its number is still taken.
        while began(child.id()).is_some() {
            std::thread::yield_now();
        }
        child.wait().expect("ends");
    }

    #[test]
    fn the_capability_for_locking_is_one_bit() {
        assert!(has_ipc_lock("Name:\tx\nCapEff:\t0000000000004000\n"));
        assert!(!has_ipc_lock("CapEff:\tffffffffffffbfff\n") && !has_ipc_lock(""));
    }
}
