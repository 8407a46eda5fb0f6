//! Lanes of the compute device: how many, and what their staging memory takes.

use crate::{
    model::{Layout, PIECE, staging_bytes},
    quantities::round_up,
};

/// One copies up, one down, and one is ready.
pub const COUNT: u64 = 3;
/// Elements of a group: a millisecond on a link of 50 GB/s, long enough for its full speed.
const MOST: u64 = 2 << 20;

/// Elements of a group: no more than the largest unit has for each lane. None where nothing is trained.
pub(super) fn elems(layout: &Layout) -> u64 {
    let trained =
        |unit: &crate::model::Unit| unit.sections.iter().filter(|s| s.trainable).map(|s| s.elems).sum::<u64>();
    let largest = layout.units.iter().map(trained).max().unwrap_or(0);
    round_up(largest.div_ceil(COUNT).min(MOST), PIECE as u64)
}

/// Bytes of one lane.
pub(super) fn bytes_each(elems: u64, granularity: u64) -> u64 {
    round_up(staging_bytes(elems), granularity)
}
