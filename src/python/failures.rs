//! Errors of the core as exceptions of `funicular.errors`, and interruptible waits.

use pyo3::{prelude::*, types::PyTuple};

use funicular::error::{Code, Error, Family, Result};

/// The exception of an error's family, with its code and message.
pub(crate) fn raise(py: Python<'_>, error: &Error) -> PyErr {
    let class = match error.code().family() {
        Family::Usage => "UsageError",
        Family::Budget => "BudgetError",
        Family::Storage => "StorageError",
        Family::Runtime => "RuntimeFailure",
    };
    let made = py.import("funicular.errors").and_then(|m| m.getattr(class)).and_then(|class| {
        let args = PyTuple::new(
            py,
            [error.code().as_str().into_pyobject(py)?.into_any(), error.to_string().into_pyobject(py)?.into_any()],
        )?;
        let instance = class.call1(args)?;
        instance.setattr("errno", error.os_error())?;
        Ok(instance)
    });
    match made {
        Ok(instance) => PyErr::from_value(instance),
        Err(e) => e,
    }
}

/// Runs `f` without the GIL; it may wait, asking its argument whether a signal ends the wait.
pub(crate) fn waiting<R: Send>(
    py: Python<'_>,
    f: impl FnOnce(&mut dyn FnMut() -> bool) -> Result<R> + Send,
) -> PyResult<R> {
    let mut signal: Option<PyErr> = None;
    let result = py.detach(|| {
        f(&mut || {
            Python::attach(|py| match py.check_signals() {
                Ok(()) => false,
                Err(e) => {
                    signal = Some(e);
                    true
                }
            })
        })
    });
    match (result, signal) {
        (_, Some(signal)) => Err(signal),
        (Ok(value), None) => Ok(value),
        (Err(error), None) => Err(raise(py, &error)),
    }
}

/// Runs `f`; a panic in it becomes an error, so that no exception of another kind crosses the border.
pub(crate) fn guarded<R>(f: impl FnOnce() -> Result<R>) -> Result<R> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(f))
        .unwrap_or_else(|_| Err(Error::new(Code::Panicked, "a call of the core panicked; its message is above.")))
}

/// A result of the core as one of Python.
pub(crate) fn check<R>(py: Python<'_>, result: Result<R>) -> PyResult<R> {
    result.map_err(|e| raise(py, &e))
}
