//! Models that only Python can build, for `funicular plan`.

use pyo3::prelude::*;

use super::{arguments::unit_specs, records::Param};
use funicular::{
    error::{Code, Error, Result},
    plan::{PlannedUnit, Unpaged},
};

/// (name, parameters, whether its backward reads them)
type UnitTuple = (String, Vec<Param>, bool);
/// (parameters that are not paged, of them trained, what they are)
type UnpagedTuple = (u64, u64, String);

/// Asks `funicular.planning.units`.
pub(super) fn load(source: &str, patterns: &[String], dtype: Option<&str>) -> Result<(Vec<PlannedUnit>, Unpaged)> {
    Python::attach(|py| {
        let found: PyResult<(Vec<UnitTuple>, UnpagedTuple)> = py
            .import("funicular.planning")
            .and_then(|module| module.getattr("units")?.call1((source, patterns.to_vec(), dtype)))
            .and_then(|found| found.extract());
        let (units, (params, trained, text)) = found.map_err(|e| failed(py, source, &e))?;
        let (specs, backward): (Vec<_>, Vec<_>) = units.into_iter().map(|(n, p, b)| ((n, p), b)).unzip();
        let specs = unit_specs(specs)?;
        let units = specs.into_iter().zip(backward).map(|(spec, backward)| PlannedUnit { spec, backward }).collect();
        Ok((units, Unpaged { params, trained, text }))
    })
}

fn failed(py: Python<'_>, source: &str, e: &PyErr) -> Error {
    let kind = e.get_type(py).name().map_or_else(|_| "Exception".to_owned(), |n| n.to_string());
    let text = e.value(py).to_string();
    // Those of transformers have several lines.
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let text = text.trim_end_matches('.');
    match std::path::Path::new(source).is_dir() {
        true => Error::new(Code::PlannedModel, format!("{source}: {text}.")).action(
            "Or build the model with a function (file.py:function), or give --params and --layers.",
        ),
        false => Error::new(Code::PlannedModel, format!("{source}: {kind}: {text}.")).action(
            "Name a function that takes no arguments, needs no weights (it runs under torch.device(\"meta\")) and returns \
             a torch.nn.Module: module:function or file.py:function.",
        ),
    }
}
