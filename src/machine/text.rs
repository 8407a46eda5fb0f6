//! One file of the kernel.

use std::{fs, path::Path};

/// The text of a file of the kernel, trimmed; empty if it cannot be read.
pub(crate) fn text(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}
