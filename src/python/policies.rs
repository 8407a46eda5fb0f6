//! Policies as JSON between Python and the core: read strictly.

use pyo3::prelude::*;

use super::failures::check;
use funicular::{
    error::{Code, Error, Result},
    policy::{Pattern, Policy, parse_size, schema},
};

/// Reads a policy: `form` is "file", "name" (a preset, else a file), "json" or "preset". Environment variables and overrides come on top.
/// Returns resolved JSON.
#[pyfunction]
pub(crate) fn resolve_policy(
    py: Python<'_>,
    source: &str,
    form: &str,
    environment: Vec<(String, String)>,
    overrides: Vec<(String, String)>,
) -> PyResult<String> {
    let resolved = || -> Result<String> {
        let read = match form {
            "file" => Policy::from_file(source)?,
            "name" => Policy::named(source)?,
            "json" => Policy::from_json_str(source, "policy")?,
            "preset" => Policy::preset(source)?,
            _ => return Err(Error::argument(format!("there is no policy form '{form}'."))),
        };
        let mut policy = read.with_env(environment)?;
        for (key, value) in overrides {
            policy.set(&key, &value)?;
        }
        policy.check_consistent()?;
        Ok(json(&policy))
    };
    // A file may lie on a disk that is slow to answer.
    check(py, py.detach(resolved))
}

/// For each name, whether one of the patterns matches the whole of it.
#[pyfunction]
pub(crate) fn match_names(py: Python<'_>, patterns: Vec<String>, names: Vec<String>) -> PyResult<Vec<bool>> {
    let read = |text: &String| Pattern::new(text).map_err(|why| Error::new(Code::PolicyValue, format!("{why}.")));
    let patterns = check(py, patterns.iter().map(read).collect::<Result<Vec<_>>>())?;
    Ok(names.iter().map(|name| patterns.iter().any(|p| p.matches(name))).collect())
}

/// The bytes of a size as a policy writes it, such as "4GiB".
#[pyfunction]
pub(crate) fn size_in_bytes(py: Python<'_>, size: &str) -> PyResult<u64> {
    check(py, parse_size(size).map(|size| size.0).map_err(|why| Error::new(Code::PolicyValue, format!("{why}."))))
}

/// The JSON Schema of policies.
#[pyfunction]
pub(crate) fn policy_schema() -> String {
    schema::json_schema().to_string()
}

fn json(policy: &Policy) -> String {
    serde_json::to_string(policy).unwrap_or_default()
}
