//! Exit codes. 0 is "yes" and 1 the answer "no".

/// There is no answer: an error, or wrong arguments, for which clap ends with the same.
pub(super) const COULD_NOT_TELL: u8 = 2;
/// A benchmark whose figures were to be saved and are not to be relied on.
pub(super) const IN_DOUBT: i32 = 3;
/// A run that was interrupted, as shells have it.
pub(super) const INTERRUPTED: i32 = 130;
