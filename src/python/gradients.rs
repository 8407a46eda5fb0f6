//! Gradients that are added to, and those that live on NVMe, as the wrapper sees them.
#![expect(unsafe_code, reason = "passes a raw address of a tensor to the runtime")]

use pyo3::prelude::*;

use super::{
    arguments::{address, known},
    engine::Engine,
};

/// Has the gradients that backward has made written to NVMe, without waiting for it.
#[pyfunction]
pub(super) fn flush_gradients(py: Python<'_>, engine: &Engine) -> PyResult<()> {
    engine.call(py, |rt, _| rt.flush_gradients())
}

/// Makes sure that a unit's gradients are in memory.
#[pyfunction]
pub(super) fn bring_gradients(py: Python<'_>, engine: &Engine, unit: u32, stream: u64) -> PyResult<()> {
    engine.call(py, |rt, i| rt.bring_gradients(known(rt, unit)?, stream, i))
}

/// Gives the memory of a unit's gradients back; stored on NVMe before if they are `wanted`.
#[pyfunction]
pub(super) fn give_gradients(py: Python<'_>, engine: &Engine, unit: u32, wanted: bool, stream: u64) -> PyResult<()> {
    engine.call(py, |rt, i| rt.give_gradients(known(rt, unit)?, wanted, stream, i))
}

/// Units whose gradients live on NVMe and are in memory now.
#[pyfunction]
pub(super) fn gradients_in_memory(py: Python<'_>, engine: &Engine) -> PyResult<Vec<u32>> {
    engine.call(py, |rt, _| Ok(rt.gradients_in_memory()?.into_iter().map(|unit| unit.0).collect()))
}

/// Copies a gradient to `dst` on the device, in the order of `stream`, to be added to; false if it is in memory.
#[pyfunction]
pub(super) fn lift_gradient(
    py: Python<'_>,
    engine: &Engine,
    unit: u32,
    offset: u64,
    dst: u64,
    len: u64,
    stream: u64,
) -> PyResult<bool> {
    engine.call(py, |rt, i| {
        let (unit, dst) = (known(rt, unit)?, address(dst, len)?);
        // SAFETY: the wrapper passes a live tensor's address and size; torch reuses its memory only in the order of this stream.
        unsafe { rt.lift_gradient(unit, offset, (dst, len), stream, i) }
    })
}

/// Has a unit's gradients read, if there is room, because they will soon be added to.
#[pyfunction]
pub(super) fn expect_gradients(py: Python<'_>, engine: &Engine, unit: u32) -> PyResult<()> {
    engine.call(py, |rt, _| rt.expect_gradients(known(rt, unit)?))
}

/// Whether gradients that a backward adds to are to be brought up for it.
#[pyfunction]
pub(super) fn brings_sums_up(py: Python<'_>, engine: &Engine) -> PyResult<bool> {
    engine.call(py, |rt, _| rt.brings_sums_up())
}

/// Copies a gradient of the unit's segment up to `dst` on the device; returns a number for `wait_up`.
#[pyfunction]
pub(super) fn gradient_up(
    py: Python<'_>,
    engine: &Engine,
    unit: u32,
    offset: u64,
    dst: u64,
    len: u64,
    stream: u64,
) -> PyResult<u64> {
    engine.call(py, |rt, _| {
        let (unit, dst) = (known(rt, unit)?, address(dst, len)?);
        // SAFETY: the wrapper passes a live tensor's address and size, and leaves it alone until `stream` has waited for the copy.
        unsafe { rt.gradient_up(unit, offset, dst, len, stream) }
    })
}

/// Makes `stream` wait for that copy up, or for all.
#[pyfunction]
pub(super) fn wait_up(py: Python<'_>, engine: &Engine, seq: Option<u64>, stream: u64) -> PyResult<()> {
    engine.call(py, |rt, i| rt.wait_up(seq, stream, i))
}
