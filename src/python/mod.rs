//! The Python extension module `funicular._core`: thin, no logic. Everything that can wait releases the GIL.

mod dlpack;
mod engine;
mod failures;
mod policies;

use pyo3::prelude::*;

/// The native core of funicular.
#[pymodule]
fn _core(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<engine::Engine>()?;
    m.add_function(wrap_pyfunction!(policies::resolve_policy, m)?)?;
    m.add_function(wrap_pyfunction!(policies::policy_schema, m)?)?;
    m.add_function(wrap_pyfunction!(policies::error_codes, m)?)?;
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    Ok(())
}
