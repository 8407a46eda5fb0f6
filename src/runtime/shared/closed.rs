//! The errors of calls that come too late, or from another process.

use crate::error::{Code, Error, Result};

/// Fails in a process that was forked from the one of this number.
///
/// # Errors
/// `FN-E103`.
pub fn check_process(pid: u32) -> Result<()> {
    if std::process::id() == pid {
        return Ok(());
    }
    Err(Error::new(Code::Forked, "the model was offloaded by the parent of this process.")
        .action("Use the model in the process that offloaded it; in a child, load a copy."))
}

/// The error of a call after the end.
pub fn closed() -> Error {
    Error::new(Code::Closed, "the runtime is closed.").action("Offload the model again.")
}
