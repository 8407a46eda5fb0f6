//! Actions that must run to their end, whatever signal handlers raise in their midst.

use pyo3::prelude::*;

/// So many signals in a row amid one action are none: it fails by itself.
const MOST: u32 = 1000;

/// Calls `action`, which can be run again, until it has returned; what was raised in its midst first is raised then. The loop is not
/// Python's: there is no point between two of its rounds at which a signal handler could run.
///
/// # Errors
/// The first exception; at the end of a thousand failed rounds, with the action not done.
#[pyfunction]
pub(super) fn complete(action: &Bound<'_, PyAny>) -> PyResult<()> {
    let mut struck = None;
    for _ in 0..MOST {
        match action.call0() {
            Ok(_) => break,
            Err(error) => {
                struck.get_or_insert(error);
            }
        }
    }
    struck.map_or(Ok(()), Err)
}
