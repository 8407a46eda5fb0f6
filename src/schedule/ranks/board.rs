//! The words by which the ranks of one host tell each other what they do: where each of them is, and who writes it.
//!
//! W1: a word has one writer, the rank that it belongs to; those of the head are written once, by rank 0, before any other rank looks. The word
//! at which devices wait for each other is an exception (`src/runtime/ranks/devices.rs`): a rank that ends lets go of those of all. W2: who loads
//! a word sees all that its writer had stored before it stored that value, in words and in the memory of the model.

/// Words that all ranks see.
pub trait Words {
    /// The value of a word, with all that its writer stored before it (W2).
    fn load(&self, at: usize) -> u64;
    /// Stores a word of this rank's, after all that it stored before.
    fn store(&self, at: usize, value: u64);
}

/// Words of the head: what file this is, and what all ranks must have alike. The first one is the bell of [`crate::memory::SharedWords`].
pub(crate) const MAGIC: usize = 1;
pub(crate) const RANKS: usize = 2;
pub(crate) const IDENTITY: usize = 3;
pub(crate) const FREE: usize = 4;
pub(crate) const ALIKE: usize = 8;
const HEAD: usize = 16;

/// Words of a rank.
pub(super) const PID: usize = 0;
pub(super) const STARTED: usize = 1;
pub(super) const STATE: usize = 2;
pub(super) const ARRIVED: usize = 3;
pub(super) const PASSED: usize = 4;
pub(super) const BACKWARD: usize = 5;
pub(super) const WAITS: usize = 6;
pub(super) const WAITS_AT: usize = 7;
pub(super) const STEPS: usize = 8;
pub(super) const QUIET: usize = 24;
pub(super) const MEETINGS: usize = 32;
pub(super) const TEXT: usize = 40;
/// In a line of its own: devices look at it while they wait.
pub(crate) const AT_EXCHANGE: usize = 112;
const OF_RANK: usize = 128;

/// Words of a rank for one unit, before its notes on gradients.
pub(super) const PUBLISHED: usize = 0;
pub(super) const POSTS: usize = 1;
pub(super) const SEEN: usize = 2;
pub(super) const LANDED: usize = 3;
pub(super) const NUMBERS: usize = 4;
pub(super) const MADE: usize = 6;
pub(super) const WANTS: usize = 7;
pub(super) const HOME: usize = 8;
pub(super) const READS: usize = 9;
const OF_UNIT: usize = 10;

/// Bytes of a text that a rank shows.
pub const TEXT_BYTES: usize = 512;

/// Where the words are.
#[derive(Clone, Debug)]
pub struct Board {
    ranks: usize,
    /// Per unit: the first word of rank 0, the words of each rank, and the parameters.
    units: Vec<(usize, usize, usize)>,
    words: usize,
}

impl Board {
    /// A board for so many ranks, and units with so many parameters each.
    pub fn new(ranks: usize, parameters: impl Iterator<Item = usize>) -> Self {
        let mut words = Self::head(ranks);
        let units = parameters
            .map(|count| {
                let each = (OF_UNIT + 2 * count.div_ceil(8)).next_multiple_of(8);
                let at = words;
                words += each * ranks;
                (at, each, count)
            })
            .collect();
        Self { ranks, units, words }
    }

    /// Words before those of units: all boards of so many ranks have them in the same places.
    pub fn head(ranks: usize) -> usize {
        HEAD + ranks * OF_RANK
    }

    /// All words.
    pub fn words(&self) -> usize {
        self.words
    }

    /// Ranks.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// Units.
    pub fn units(&self) -> usize {
        self.units.len()
    }

    /// Parameters of a unit.
    pub(super) fn parameters(&self, unit: usize) -> usize {
        self.units[unit].2
    }

    /// A word of a rank.
    pub(crate) fn of_rank(rank: usize, word: usize) -> usize {
        HEAD + rank * OF_RANK + word
    }

    /// A word of a rank for a unit.
    pub(super) fn of_unit(&self, rank: usize, unit: usize, word: usize) -> usize {
        let (at, each, _) = self.units[unit];
        at + rank * each + word
    }

    /// The first word of a rank's note on a unit's gradients, of its posts with even or with odd numbers.
    pub(super) fn note(&self, rank: usize, unit: usize, post: u64) -> usize {
        let words = self.parameters(unit).div_ceil(8);
        self.of_unit(rank, unit, OF_UNIT + if post.is_multiple_of(2) { 0 } else { words })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_word_has_two_meanings() {
        for ranks in [1, 2, 5] {
            let counts = [0, 1, 8, 9, 130];
            let board = Board::new(ranks, counts.into_iter());
            let mut seen = vec![false; board.words()];
            let mut take = |at: usize| assert!(!std::mem::replace(&mut seen[at], true), "word {at}");
            [0, MAGIC, RANKS, IDENTITY, FREE].into_iter().chain(ALIKE..HEAD).for_each(&mut take);
            for rank in 0..ranks {
                let line = |at, parts: usize| at..=at + 2 * parts;
                let single = [PID, STARTED, STATE, ARRIVED, PASSED, BACKWARD, WAITS, WAITS_AT, AT_EXCHANGE];
                let lines = line(STEPS, 5).chain(line(QUIET, 1)).chain(line(MEETINGS, 1));
                let text = TEXT..TEXT + 2 + TEXT_BYTES / 8;
                single.into_iter().chain(lines).chain(text).for_each(|word| {
                    assert!(word < OF_RANK);
                    take(Board::of_rank(rank, word));
                });
                for (unit, count) in counts.iter().enumerate() {
                    let single = [PUBLISHED, POSTS, SEEN, LANDED, NUMBERS, NUMBERS + 1, MADE, WANTS, HOME, READS];
                    single.into_iter().for_each(|word| take(board.of_unit(rank, unit, word)));
                    let words = count.div_ceil(8);
                    let notes = [0, 1].map(|post| board.note(rank, unit, post));
                    notes.into_iter().flat_map(|at| at..at + words).for_each(&mut take);
                }
            }
        }
    }
}
