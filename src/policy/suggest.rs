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

/// What other programs call the words of a policy. A word may have several meanings; the one that is allowed is meant.
const MEANT: &[(&[&str], &[&str])] = &[
    (&["cpu", "ram", "dram", "memory", "mem", "system", "pinned", "offload"], &["host"]),
    (&["gpu", "vram", "nvidia", "hbm"], &["cuda", "hbm", "gpu"]),
    (&["disk", "ssd", "drive", "file", "storage", "swap"], &["nvme"]),
    (&["host"], &["cpu"]),
    (&["cuda"], &["gpu", "hbm"]),
    (&["none", "default"], &["auto", "off", "keep"]),
    (&["bf16", "torch.bfloat16"], &["bfloat16"]),
    (&["fp16", "half", "torch.float16"], &["float16"]),
    (&["fp32", "float", "torch.float32"], &["float32"]),
    (&["uring", "aio", "libaio"], &["io_uring"]),
];

/// The candidate that a word of other programs means, else the nearest.
pub(crate) fn meant<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let candidates: Vec<&str> = candidates.into_iter().collect();
    let lower = word.trim().to_ascii_lowercase();
    let mut meanings = MEANT.iter().filter(|(words, _)| words.contains(&lower.as_str())).flat_map(|(_, meant)| *meant);
    let other = meanings.find_map(|meant| candidates.iter().copied().find(|c| c == meant));
    other.or_else(|| nearest(word, candidates))
}

/// ` (did you mean 'x'?)`, or nothing.
pub(crate) fn did_you_mean<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> String {
    meant(word, candidates).map_or_else(String::new, |c| format!(" (did you mean '{c}'?)"))
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
    fn words_of_other_programs_are_understood() {
        let tiers = ["auto", "hbm", "host", "nvme"];
        for (word, right) in [("cpu", "host"), ("GPU", "hbm"), ("disk", "nvme"), ("ram", "host"), ("hots", "host")] {
            assert_eq!(meant(word, tiers), Some(right), "{word}");
        }
        assert_eq!(meant("gpu", ["auto", "host", "cuda"]), Some("cuda"));
        assert_eq!(meant("cuda", ["auto", "cpu", "gpu"]), Some("gpu"));
        assert_eq!(meant("gpu", ["auto", "host", "nvme"]), None);
        assert_eq!(meant("bf16", ["keep", "bfloat16"]), Some("bfloat16"));
    }

    #[test]
    fn does_not_guess_wildly() {
        assert_eq!(nearest("momentum", ["tier", "where"]), None);
        assert_eq!(nearest("a", ["b"]), None);
        assert_eq!(nearest("", ["b"]), None);
    }
}
