//! What `"auto"` becomes in the section `budget`, on a machine of given limits.

use super::{Auto, Policy};
use crate::{machine::HostLimits, quantities::ByteCount};

/// Host memory for the runtime: what the policy gives, or what is available less the reserve.
pub fn resolve_host_budget(limits: &HostLimits, policy: &Policy) -> ByteCount {
    policy.budget.host.or(ByteCount(limits.available().0.saturating_sub(resolve_reserve(limits, policy).0)))
}

/// Host memory left to others: what the policy gives, or 8 % of what is available, at least 512 MiB (but no more than
/// half), at most 16 GiB: on large machines others do not need in proportion.
pub fn resolve_reserve(limits: &HostLimits, policy: &Policy) -> ByteCount {
    let available = limits.available().0;
    let share = (available / 100 * 8).min(ByteCount::gib(16).0).max(ByteCount::mib(512).0.min(available / 2));
    policy.budget.reserve.or(ByteCount(share))
}

/// Threads of the CPU optimizer: what the policy gives, or the CPUs this process may use.
pub fn resolve_threads(limits: &HostLimits, policy: &Policy) -> u32 {
    match policy.budget.threads {
        Auto::Set(threads) => threads,
        Auto::Auto => limits.cpus,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::limits;

    const GIB: u64 = 1 << 30;

    #[test]
    fn auto_leaves_a_reserve() {
        let auto = Policy::default();
        for (available, reserve) in
            [(50 * GIB, 4 * GIB), (10 * GIB, GIB / 10 * 8), (GIB, GIB / 2), (1000 * GIB, 16 * GIB)]
        {
            let limits = limits(available, None);
            let budget = resolve_host_budget(&limits, &auto);
            assert!(resolve_reserve(&limits, &auto).0.abs_diff(reserve) < 1024, "{available}");
            assert_eq!(budget.0 + resolve_reserve(&limits, &auto).0, available);
        }
        assert_eq!(resolve_host_budget(&limits(0, None), &auto), ByteCount(0));
        let mut given = Policy::default();
        given.budget.reserve = Auto::Set(ByteCount::gib(1));
        assert_eq!(resolve_host_budget(&limits(50 * GIB, Some(4 * GIB)), &given), ByteCount::gib(3));
        given.budget.host = Auto::Set(ByteCount::gib(9));
        assert_eq!(resolve_host_budget(&limits(50 * GIB, Some(4 * GIB)), &given), ByteCount::gib(9));
        assert_eq!(resolve_threads(&limits(GIB, None), &given), 6);
        given.budget.threads = Auto::Set(2);
        assert_eq!(resolve_threads(&limits(GIB, None), &given), 2);
    }
}
