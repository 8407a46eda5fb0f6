//! What a run will grow to where `budget.hbm` is auto: memory that stays free takes optimizer states.

use std::fmt;

use serde::Serialize;

use crate::{
    quantities::ByteCount,
    schedule::growth::{self, Candidate},
};

/// The expectation.
#[derive(Clone, Debug, Serialize)]
pub struct Grows {
    /// Units whose states move up.
    pub units: usize,
    /// Bytes that they take.
    pub bytes: u64,
    /// Units whose states could.
    pub of: usize,
    /// What stays free then.
    pub free: u64,
    /// Whether activations are left out, as nothing is known of them.
    pub at_most: bool,
}

/// How far states of these units move up, on a GPU of `gpu` bytes of which the run has `hbm` from the start, beside so many bytes of
/// activations. None where there is no GPU, or nothing could move.
#[must_use]
pub fn expect(order: &[Candidate], gpu: Option<ByteCount>, hbm: u64, activations: Option<u64>) -> Option<Grows> {
    let gpu = gpu.filter(|_| !order.is_empty())?.0;
    let free = gpu.saturating_sub(hbm + activations.unwrap_or(0));
    let (units, bytes) = growth::reach(order, free, gpu);
    Some(Grows { units, bytes, of: order.len(), free: free - bytes, at_most: activations.is_none() })
}

impl fmt::Display for Grows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (units, of) = (self.units, self.of);
        if units == 0 {
            return write!(f, "budget.hbm is auto, but no memory stays free for optimizer states of further units.");
        }
        let most = if self.at_most { " at most, less what activations take" } else { "" };
        write!(
            f,
            "budget.hbm is auto: after a few steps it grows by {}{most}, for the optimizer states of {units} of {of} units, and leaves {} free.",
            ByteCount(self.bytes),
            ByteCount(self.free)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantities::UnitId;

    #[test]
    fn it_says_how_far_and_what_that_depends_on() {
        let gib = |n: u64| n << 30;
        let order: Vec<Candidate> = (0..40).map(|u| Candidate { unit: UnitId(u), bytes: gib(1) }).collect();
        let on = |activations| expect(&order, Some(ByteCount(gib(80))), gib(32), activations).expect("something");
        assert_eq!((on(None).units, on(None).free), (40, gib(8)));
        assert_eq!((on(Some(gib(10))).units, on(Some(gib(10))).free), (30, gib(8)));
        assert!(on(None).to_string().contains("at most") && !on(Some(0)).to_string().contains("at most"));
        assert_eq!(on(Some(gib(45))).units, 0);
        assert!(on(Some(gib(45))).to_string().contains("no memory stays free"));
        assert!(expect(&order, None, 0, None).is_none() && expect(&[], Some(ByteCount(1)), 0, None).is_none());
    }
}
