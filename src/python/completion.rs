//! Actions that must run to their end although signal handlers may raise exceptions in their midst.

use pyo3::prelude::*;

/// After so many failures in a row the cause is no signal: the action itself fails.
const MOST: u32 = 1000;

/// Calls `action`, which can be run again, until it has returned; then raises the first exception that interrupted it. The loop is
/// not Python's: there is no point between two of its rounds at which a signal handler could run.
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
