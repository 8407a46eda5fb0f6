//! Which elements of a section a rank updates.

use std::ops::Range;

/// Ranges begin at multiples of this many elements of their section at least: no block of a norm has two owners.
pub const OWNED_BLOCK: u64 = 8192;

/// The elements of a section of `elems`, cut in blocks of `block`, that belong to `rank` of `size`: contiguous parts of nearly the same
/// length, each element in one of them. A part of a small section is empty.
///
/// # Panics
/// If there is no such rank.
pub fn owned(elems: u64, block: u64, rank: usize, size: usize) -> Range<u64> {
    assert!(rank < size, "rank {rank} of {size}");
    let blocks = u128::from(elems.div_ceil(block));
    #[expect(clippy::cast_possible_truncation, reason = "no more than there are blocks")]
    let edge = |rank: usize| ((blocks * rank as u128 / size as u128) as u64 * block).min(elems);
    edge(rank)..edge(rank + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn every_element_has_one_owner_and_no_block_two(elems in 0_u64..3_000_000, size in 1_usize..9, wider in 0..7) {
            let block = OWNED_BLOCK << wider;
            let parts: Vec<_> = (0..size).map(|rank| owned(elems, block, rank, size)).collect();
            let mut at = 0;
            for part in &parts {
                proptest::prop_assert_eq!(part.start, at);
                proptest::prop_assert!(part.start.is_multiple_of(block) || part.is_empty());
                at = part.end;
            }
            proptest::prop_assert_eq!(at, elems);
            let longest = parts.iter().map(|part| part.end - part.start).max().unwrap_or(0);
            proptest::prop_assert!(longest <= elems / size as u64 + 2 * block);
        }
    }
}
