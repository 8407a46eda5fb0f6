//! Digests of memory that the wrapper owns, to find edits that left no other trace.
#![expect(unsafe_code, reason = "reads tensors by their addresses")]

use pyo3::prelude::*;

use twox_hash::XxHash3_64;

use super::{arguments, failures::check};

/// XXH3-64 of `len` bytes of host memory at `address`.
#[pyfunction]
pub(super) fn digest(py: Python<'_>, address: usize, len: usize) -> PyResult<u64> {
    if len == 0 {
        return Ok(XxHash3_64::oneshot(&[]));
    }
    check(py, arguments::address(address as u64, len as u64))?;
    // SAFETY: the wrapper passes the address and size of a live tensor in host memory. Others may write there meanwhile, as
    // they may to any tensor: the digest is then that of neither state, and is only ever compared.
    let bytes = unsafe { std::slice::from_raw_parts(address as *const u8, len) };
    Ok(py.detach(|| XxHash3_64::oneshot(bytes)))
}
