//! Which of several ranks a runtime is.

use std::os::fd::RawFd;

/// One of several ranks of a host that train one model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RankSpec {
    /// Its number.
    pub rank: usize,
    /// How many there are, at least two.
    pub size: usize,
    /// The number of the file that rank 0 has made, in this process; none on rank 0.
    pub file: Option<RawFd>,
    /// Whether memory that stays free on its device takes optimizer states; none: as the policy says, whose budgets are concrete on all ranks but
    /// the first.
    pub grows: Option<bool>,
}

impl RankSpec {
    /// More would need more than the machine has.
    pub const MOST: usize = 1024;

    /// Whether it makes what the others adopt.
    pub(crate) fn leads(&self) -> bool {
        self.rank == 0
    }
}
