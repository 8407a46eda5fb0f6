//! A descriptor without Python code. torch looks `__torch_function__` up in C++ and drops what the lookup raises: a Ctrl-C that
//! struck in a `__get__` of Python would be lost.

use pyo3::{prelude::*, types::PyString};

/// Gives `inside` to the threads whose number (`threading.get_ident`) is in the container that the instance has as `attribute`,
/// and to lookups on the class; `outside` to all others.
#[pyclass(frozen, module = "funicular._core")]
pub(super) struct ThreadSwitch {
    attribute: Py<PyString>,
    inside: Py<PyAny>,
    outside: Py<PyAny>,
    get_ident: Py<PyAny>,
}

#[pymethods]
impl ThreadSwitch {
    #[new]
    fn new(py: Python<'_>, attribute: Py<PyString>, inside: Py<PyAny>, outside: Py<PyAny>) -> PyResult<Self> {
        let get_ident = py.import("_thread")?.getattr("get_ident")?.unbind();
        Ok(Self { attribute, inside, outside, get_ident })
    }

    fn __get__(
        &self,
        py: Python<'_>,
        instance: &Bound<'_, PyAny>,
        _owner: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Py<PyAny>> {
        if instance.is_none() {
            return Ok(self.inside.clone_ref(py));
        }
        let threads = instance.getattr(self.attribute.bind(py))?;
        let within = threads.contains(self.get_ident.bind(py).call0()?)?;
        Ok(if within { &self.inside } else { &self.outside }.clone_ref(py))
    }
}
