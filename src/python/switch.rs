//! A descriptor without Python code. torch looks `__torch_function__` up in C++ and drops what the lookup raises: a Ctrl-C that
//! struck in a `__get__` of Python would be lost.

use pyo3::{prelude::*, types::PyString};

/// Gives `inside` to the threads whose number (`threading.get_ident`) is in the container that the instance has as `attribute`,
/// and to lookups on the class; `outside` to all others, and to lookups on the class by code of the file `asks`: there torch asks
/// whether arguments of this class have an override at all, once one of them has said so.
#[pyclass(frozen, module = "funicular._core")]
pub(super) struct ThreadSwitch {
    attribute: Py<PyString>,
    inside: Py<PyAny>,
    outside: Py<PyAny>,
    asks: Py<PyString>,
    get_ident: Py<PyAny>,
    get_frame: Py<PyAny>,
}

#[pymethods]
impl ThreadSwitch {
    #[new]
    fn new(
        py: Python<'_>,
        attribute: Py<PyString>,
        inside: Py<PyAny>,
        outside: Py<PyAny>,
        asks: Py<PyString>,
    ) -> PyResult<Self> {
        let get_ident = py.import("_thread")?.getattr("get_ident")?.unbind();
        let get_frame = py.import("sys")?.getattr("_getframe")?.unbind();
        Ok(Self { attribute, inside, outside, asks, get_ident, get_frame })
    }

    fn __get__(
        &self,
        py: Python<'_>,
        instance: &Bound<'_, PyAny>,
        _owner: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Py<PyAny>> {
        if instance.is_none() {
            let caller = self.get_frame.bind(py).call0()?.getattr("f_code")?.getattr("co_filename")?;
            return Ok(if caller.eq(&self.asks)? { &self.outside } else { &self.inside }.clone_ref(py));
        }
        let threads = instance.getattr(self.attribute.bind(py))?;
        let within = threads.contains(self.get_ident.bind(py).call0()?)?;
        Ok(if within { &self.inside } else { &self.outside }.clone_ref(py))
    }
}
