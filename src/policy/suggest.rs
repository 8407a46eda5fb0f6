//! "Did you mean": the nearest word by edit distance.

/// The candidate nearest to `word`, if it is near enough to be a slip of the hand. Case, `-` and `_` do not count.
pub(crate) fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = fold(word);
    let limit = (word.len() / 3).clamp(1, 16);
    candidates
        .into_iter()
        .map(|c| (c, fold(c)))
        // A word of another length is as far away at least; a word of a megabyte is not compared at all.
        .filter(|(_, folded)| folded.len().abs_diff(word.len()) <= limit)
        .map(|(c, folded)| (distance(&word, &folded), c))
        .filter(|&(d, c)| d <= limit && d < c.chars().count())
        .min_by_key(|&(d, _)| d)
        .map(|(_, c)| c)
}

/// ` (did you mean 'x'?)`, or nothing.
pub(crate) fn did_you_mean<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> String {
    nearest(word, candidates).map_or_else(String::new, |c| format!(" (did you mean '{c}'?)"))
}

fn fold(word: &str) -> Vec<char> {
    word.chars().filter(|c| !matches!(c, '-' | '_')).flat_map(char::to_lowercase).collect()
}

/// Insertions, deletions, substitutions and swaps of neighbours (optimal string alignment).
fn distance(a: &[char], b: &[char]) -> usize {
    let mut before: Vec<usize> = vec![0; b.len() + 1];
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i; b.len() + 1];
        for j in 1..=b.len() {
            let swap = usize::from(a[i - 1] != b[j - 1]);
            row[j] = (last[j] + 1).min(row[j - 1] + 1).min(last[j - 1] + swap);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                row[j] = row[j].min(before[j - 2] + 1);
            }
        }
        before = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_slips() {
        let keys = ["tier", "where", "queue_depth", "io_uring"];
        assert_eq!(nearest("teir", keys), Some("tier"));
        assert_eq!(nearest("queue-depht", keys), Some("queue_depth"));
        assert_eq!(nearest("iouring", keys), Some("io_uring"));
        assert_eq!(nearest("TIER", keys), Some("tier"));
    }

    #[test]
    fn does_not_guess_wildly() {
        assert_eq!(nearest("momentum", ["tier", "where"]), None);
        assert_eq!(nearest("a", ["b"]), None);
        assert_eq!(nearest("", ["b"]), None);
    }
}
