//! States in free memory of the device: what moved, and what torch's allocator calls when it finds no memory.
//!
//! The two exported functions make a pool of torch's (`torch.cuda.MemPool`) whose only block is no memory at all: torch frees it when it
//! has everything given back that can be, before it tries once more and before it raises an out-of-memory error. Then states move
//! down. They take neither the GIL nor a lock of torch's, and are called with both held.
#![expect(unsafe_code, reason = "exports functions that torch calls with raw addresses")]

use std::{
    ffi::{c_int, c_void},
    panic::catch_unwind,
    sync::atomic::{AtomicU64, Ordering},
};

use pyo3::{prelude::*, types::PyDict};

use super::engine::Engine;
use funicular::runtime::give_all;

/// Blocks that torch has freed.
static FREED: AtomicU64 = AtomicU64::new(0);

/// Gives an address that stands for a block; nothing lies there for torch to use.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn funicular_stand_in(_size: isize, _device: c_int, _stream: *mut c_void) -> *mut c_void {
    Box::into_raw(Box::new(0_u64)).cast()
}

/// Torch gives the block back: it has no memory, or the program empties its cache.
///
/// # Safety
/// `block` is from [`funicular_stand_in`], and is given back once.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn funicular_give_back(
    block: *mut c_void,
    _size: isize,
    device: c_int,
    _stream: *mut c_void,
) {
    // SAFETY: the caller's contract.
    drop(unsafe { Box::from_raw(block.cast::<u64>()) });
    FREED.fetch_add(1, Ordering::AcqRel);
    // A panic was told by its hook; the states are where they were.
    let _ = catch_unwind(|| u32::try_from(device).map(give_all));
}

/// How many blocks torch has given back so far.
#[pyfunction]
pub(crate) fn blocks_given_back() -> u64 {
    FREED.load(Ordering::Acquire)
}

/// True if states may move up: `budget.hbm` is auto, and there are any that could.
#[pyfunction]
pub(crate) fn may_grow(py: Python<'_>, engine: &Engine) -> PyResult<bool> {
    engine.call(py, |rt, _| rt.may_grow())
}

/// Has states move up from now on, or moves all of them down.
#[pyfunction]
pub(crate) fn let_grow(py: Python<'_>, engine: &Engine, on: bool) -> PyResult<()> {
    engine.call(py, |rt, _| rt.let_grow(on))
}

/// Has the memory of the host device be so large, and so much of it be others': for tests.
#[pyfunction]
pub(crate) fn make_memory_up(py: Python<'_>, engine: &Engine, capacity: u64, others: u64) -> PyResult<()> {
    engine.call(py, |rt, _| rt.make_memory_up(capacity, others))
}

/// Moves all states down, as torch's allocator has it done.
#[pyfunction]
pub(crate) fn give_memory_back(py: Python<'_>, engine: &Engine) -> PyResult<()> {
    engine.call(py, |rt, _| rt.give_memory_back())
}

/// What moved: bytes up now, at most, and all together up and down; the margin; times without memory; of the last moves those after
/// the one of a number.
#[pyfunction]
#[pyo3(signature = (engine, since = 0))]
pub(crate) fn grown<'py>(py: Python<'py>, engine: &Engine, since: u64) -> PyResult<Bound<'py, PyDict>> {
    let (record, margin, moves) = engine.call(py, |rt, _| {
        let (record, layout) = (rt.grown()?, rt.layout()?);
        let moved = record.moves.iter().filter(|m| m.number > since);
        let moves = moved.map(|m| (m.number, m.step, layout.unit(m.unit).name.clone(), m.bytes, m.why.name()));
        Ok((record.clone(), rt.growth_margin()?, moves.collect::<Vec<_>>()))
    })?;
    let out = PyDict::new(py);
    out.set_item("taken", record.taken)?;
    out.set_item("peak", record.peak)?;
    out.set_item("up", record.up)?;
    out.set_item("down", record.down)?;
    out.set_item("refused", record.refused)?;
    out.set_item("margin", margin)?;
    out.set_item("moves", moves)?;
    Ok(out)
}
