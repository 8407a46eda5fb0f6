//! Host memory as the wrapper asks about it: the heap, and what forked children get.

use pyo3::prelude::*;

use funicular::memory;

/// Gives free memory of the heap back to the system.
#[pyfunction]
pub(super) fn trim(py: Python<'_>) {
    py.detach(memory::trim);
}

/// Has the fork that is about to begin copy these ranges (address, bytes); `forked` ends it.
#[pyfunction]
pub(super) fn keep_for_child(ranges: Vec<(usize, usize)>) {
    // Python's own lock keeps these two from running at once.
    memory::keep(&ranges);
}

/// The fork is over, in the parent.
#[pyfunction]
pub(super) fn forked() {
    memory::forked();
}
