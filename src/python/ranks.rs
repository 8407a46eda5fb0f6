//! Several ranks that train one model, as the wrapper sees them.
#![expect(unsafe_code, reason = "passes raw addresses of tensors to the runtime")]

use std::path::{Path, PathBuf};

use pyo3::{prelude::*, types::PyBytes};

use super::{
    arguments::{known, mean_parts},
    engine::Engine,
    failures::{check, guarded},
    records::MeanPart,
};
use funicular::{
    error::{Error, Result},
    quantities::UnitId,
    runtime::{
        Runtime,
        measure::{stats::Cause, trace_merge},
    },
};

/// The number of the file that the ranks share; it stays the engine's.
#[pyfunction]
pub(super) fn shared_fd(py: Python<'_>, engine: &Engine) -> PyResult<i32> {
    engine.call(py, |rt, _| rt.shared_file())
}

/// The policy with concrete budgets, for the other ranks.
#[pyfunction]
pub(super) fn resolved_policy(py: Python<'_>, engine: &Engine) -> PyResult<String> {
    engine.call(py, |rt, _| rt.concrete_policy())
}

/// A digest of what all ranks have alike.
#[pyfunction]
pub(super) fn plan_hash(py: Python<'_>, engine: &Engine) -> PyResult<u64> {
    engine.call(py, |rt, _| rt.plan_digest())
}

/// (section, first element, elements) of a unit that belong to a rank, of trained sections.
#[pyfunction]
pub(super) fn owned(py: Python<'_>, engine: &Engine, unit: u32, rank: usize) -> PyResult<Vec<(usize, u64, u64)>> {
    engine.call(py, |rt, _| {
        let ranges = rt.owned(known(rt, unit)?, rank)?;
        Ok(ranges.into_iter().map(|(section, range)| (section, range.start, range.end - range.start)).collect())
    })
}

/// Posts which gradients of a unit a backward gave, one byte for each parameter.
#[pyfunction]
pub(super) fn post_gradients(
    py: Python<'_>,
    engine: &Engine,
    unit: u32,
    backward: u64,
    present: &[u8],
) -> PyResult<()> {
    engine.call(py, |rt, _| rt.post_gradients(known(rt, unit)?, backward, present))
}

/// What all ranks posted for that backward; none until all have.
#[pyfunction]
pub(super) fn posted_gradients<'py>(
    py: Python<'py>,
    engine: &Engine,
    unit: u32,
    backward: u64,
) -> PyResult<Option<Vec<Bound<'py, PyBytes>>>> {
    let notes = engine.call(py, |rt, _| rt.posted_gradients(known(rt, unit)?, backward))?;
    Ok(notes.map(|notes| bytes(py, &notes)))
}

/// The same, and waits for it.
#[pyfunction]
pub(super) fn wait_posted<'py>(
    py: Python<'py>,
    engine: &Engine,
    unit: u32,
    backward: u64,
) -> PyResult<Vec<Bound<'py, PyBytes>>> {
    let notes = engine.call(py, |rt, i| rt.await_gradients(known(rt, unit)?, backward, i))?;
    Ok(bytes(py, &notes))
}

/// Where a rank writes its trace, if all together are to be at `path`.
#[pyfunction]
pub(super) fn trace_of_rank(path: &str, rank: usize) -> String {
    trace_merge::path_of_rank(Path::new(path), rank).to_string_lossy().into_owned()
}

/// Writes the traces of all ranks, which lie beside `path`, as one to `path`; returns the number of events.
#[pyfunction]
pub(super) fn merge_traces(py: Python<'_>, path: PathBuf, ranks: usize) -> PyResult<usize> {
    let files: Vec<PathBuf> = (0..ranks).map(|rank| trace_merge::path_of_rank(&path, rank)).collect();
    let merged = py.detach(|| guarded(|| trace_merge::merge(&files, &path)));
    check(py, merged.map(|(_, events)| events))
}

fn bytes<'py>(py: Python<'py>, notes: &[Vec<u8>]) -> Vec<Bound<'py, PyBytes>> {
    notes.iter().map(|note| PyBytes::new(py, note)).collect()
}

/// Makes the mean over so many ranks of each part of a gradient, in the order of `stream`.
#[pyfunction]
pub(super) fn mean_of_ranks(
    py: Python<'_>,
    engine: &Engine,
    parts: Vec<MeanPart>,
    ranks: usize,
    stream: u64,
) -> PyResult<()> {
    engine.call(py, |rt, _| {
        let parts = mean_parts(&parts, ranks)?;
        // SAFETY: the wrapper passes addresses and sizes of live tensors; torch reuses their memory only in the order of this stream.
        unsafe { rt.mean_of_ranks(&parts, ranks, stream) }
    })
}

/// This rank's slices of a unit's gradients are on their way down.
#[pyfunction]
pub(super) fn gradients_sent(py: Python<'_>, engine: &Engine, unit: u32, backward: u64) -> PyResult<()> {
    engine.call(py, |rt, _| rt.gradients_sent(known(rt, unit)?, backward))
}

/// Waits until the slices of all ranks have landed, of what was sent for that backward.
#[pyfunction]
pub(super) fn wait_gradients_landed(py: Python<'_>, engine: &Engine, backward: u64) -> PyResult<()> {
    engine.call(py, |rt, i| rt.await_landed(backward, i))
}

/// Has an exchange, which comes next on this stream, begin when the devices of all ranks have come to it.
#[pyfunction]
pub(super) fn meet_on_devices(py: Python<'_>, engine: &Engine, stream: u64, waits: bool) -> PyResult<()> {
    engine.call(py, |rt, _| rt.meet_on_devices(stream, waits))
}

/// From here on the program waits for other ranks, by `cause`; returns the time.
#[pyfunction]
pub(super) fn begin_wait(
    py: Python<'_>,
    engine: &Engine,
    stream: u64,
    cause: &str,
    unit: Option<u32>,
) -> PyResult<u64> {
    engine.call(py, |rt, _| {
        let (cause, unit) = wait(rt, cause, unit)?;
        rt.begin_wait(stream, cause, unit)
    })
}

/// That wait, which began then, is over; so many bytes came and went in it.
#[pyfunction]
pub(super) fn end_wait(
    py: Python<'_>,
    engine: &Engine,
    stream: u64,
    cause: &str,
    unit: Option<u32>,
    since: u64,
    nbytes: u64,
) -> PyResult<()> {
    engine.call(py, |rt, _| rt.end_wait(stream, wait(rt, cause, unit)?, since, nbytes))
}

fn wait(rt: &Runtime, cause: &str, unit: Option<u32>) -> Result<(Cause, Option<UnitId>)> {
    let found = Cause::ALL.into_iter().skip(Cause::ALONE).find(|one| one.name() == cause);
    let found = found.ok_or_else(|| Error::argument(format!("ranks do not wait for '{cause}'.")))?;
    Ok((found, unit.map(|unit| known(rt, unit)).transpose()?))
}

/// Says that this rank is at its step after so many backwards; the number of a later one that it has to join, if there is one.
#[pyfunction]
pub(super) fn at_step(py: Python<'_>, engine: &Engine, backward: u64) -> PyResult<Option<u64>> {
    engine.call(py, |rt, i| rt.at_step(backward, i))
}

/// Waits until all ranks have come to this place. `open`: those that have closed their models count as here.
#[pyfunction]
#[pyo3(signature = (engine, what, open = false))]
pub(super) fn meet(py: Python<'_>, engine: &Engine, what: &str, open: bool) -> PyResult<()> {
    engine.call(py, |rt, i| rt.meet(what, open, i))
}

/// Raises the error of a rank that was killed or has failed; of one that has closed its model only where a connection was `cut`.
#[pyfunction]
pub(super) fn check_peers(py: Python<'_>, engine: &Engine, cut: bool) -> PyResult<()> {
    engine.call(py, |rt, _| rt.look_at_ranks(cut))
}

/// Whether the runtime has failed, of which the program may not have been told yet.
#[pyfunction]
pub(super) fn has_failed(py: Python<'_>, engine: &Engine) -> PyResult<bool> {
    engine.call(py, |rt, _| rt.has_failed())
}

/// Raises if a rank that is to come to this place, outside of the model, waits for this rank in a call of the model.
#[pyfunction]
pub(super) fn refuse_call_elsewhere(py: Python<'_>, engine: &Engine, rank: usize, place: &str) -> PyResult<()> {
    engine.call(py, |rt, _| rt.refuse_call_elsewhere(rank, place))
}

/// Counts a model among those that this process trains with other ranks.
#[pyfunction]
pub(super) fn enlist(py: Python<'_>, engine: &Engine) -> PyResult<()> {
    engine.call(py, |rt, _| rt.enlist())
}

/// Ends this rank's model by an error that the others are told. `backward`: because a backward failed amid the exchange of its gradients.
#[pyfunction]
#[pyo3(signature = (engine, text, backward = false))]
pub(super) fn fail_rank(py: Python<'_>, engine: &Engine, text: &str, backward: bool) -> PyResult<()> {
    engine.call(py, |rt, _| rt.give_up(text, backward))
}

/// Tells the other ranks where this one is.
#[pyfunction]
pub(super) fn tell_ranks(py: Python<'_>, engine: &Engine, text: &str) -> PyResult<()> {
    engine.call(py, |rt, _| rt.tell(text))
}
