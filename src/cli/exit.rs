//! Exit codes. 0 is "yes" and 1 the answer "no".

/// There is no answer: an error, or wrong arguments, for which clap ends with the same.
pub(super) const COULD_NOT_TELL: u8 = 2;
/// A benchmark whose figures were to be saved and are not to be relied on.
pub(super) const IN_DOUBT: i32 = 3;
/// A run that was interrupted, as shells have it.
pub(super) const INTERRUPTED: i32 = 130;

/// The exit code of a benchmark that came to its end.
pub(super) const fn of_bench(empty: bool, not_saved: bool) -> i32 {
    if empty || not_saved { IN_DOUBT } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_benchmark_without_figures_is_in_doubt() {
        let codes = [(false, false), (false, true), (true, false), (true, true)].map(|(e, n)| of_bench(e, n));
        assert_eq!(codes, [0, IN_DOUBT, IN_DOUBT, IN_DOUBT]);
    }
}
