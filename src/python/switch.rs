//! Descriptors without Python code. torch looks `__torch_function__` up in C++ and drops what the lookup raises: a Ctrl-C that
//! struck in a `__get__` of Python would be lost.

use pyo3::{
    prelude::*,
    types::{PyDict, PyString, PyTuple},
};

/// torch's functions that ask whether a tensor has an override.
const QUESTIONS: [&str; 3] = ["has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"];
/// The function that code calls which asks in order to hand its work to the override.
const DISPATCH: &str = "handle_torch_function";

/// Tells code that only asks whether a tensor has an override, to choose between two ways of its own, from code that
/// runs an operation.
struct Asked {
    get_frame: Py<PyAny>,
    questions: [Py<PyString>; 3],
    dispatch: Py<PyString>,
    /// From a code object to the offsets of its calls of `QUESTIONS`.
    calls_in: Py<PyAny>,
    /// Results of `calls_in` by the address of the code object, with the object, so that no other gets its address.
    known: Py<PyDict>,
}

impl Asked {
    fn new(py: Python<'_>, calls_in: Py<PyAny>) -> PyResult<Self> {
        Ok(Self {
            get_frame: py.import("sys")?.getattr("_getframe")?.unbind(),
            questions: QUESTIONS.map(|name| PyString::intern(py, name).unbind()),
            dispatch: PyString::intern(py, DISPATCH).unbind(),
            calls_in,
            known: PyDict::new(py).unbind(),
        })
    }

    fn frame<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.get_frame.bind(py).call0()
    }

    /// Whether the frame is at a call of one of `QUESTIONS`.
    fn asks(&self, frame: &Bound<'_, PyAny>) -> PyResult<bool> {
        let py = frame.py();
        let code = frame.getattr("f_code")?;
        let names = code.getattr("co_names")?;
        let names = names.cast::<PyTuple>()?;
        // Names of code are interned: the same text is the same object.
        if names.iter().any(|name| name.is(&self.dispatch)) || !names.iter().any(|name| self.is_question(&name)) {
            return Ok(false);
        }
        let known = self.known.bind(py);
        let key = code.as_ptr() as usize;
        let entry = match known.get_item(key)? {
            Some(entry) => entry,
            None => {
                let entry = (&code, self.calls_in.bind(py).call1((&code,))?).into_pyobject(py)?.into_any();
                known.set_item(key, &entry)?;
                entry
            }
        };
        entry.get_item(1)?.contains(frame.getattr("f_lasti")?)
    }

    fn is_question(&self, name: &Bound<'_, PyAny>) -> bool {
        self.questions.iter().any(|question| name.is(question))
    }
}

/// Gives `inside` to the threads that are inside, to code that only asks whether there is an override, and to lookups on the class;
/// `outside` to all others, and to lookups on the class by code of the file `asks`: there torch asks whether arguments of this class
/// have an override at all, once one of them has said so.
///
/// The instance has a dictionary as `attribute`, from the number of each thread that is inside (`threading.get_ident`) to 0, or to -1 -
/// the number of the backward in which it is inside. What `task` returns is the number of the backward that the thread is in.
#[pyclass(frozen, module = "funicular._core")]
pub(super) struct ThreadSwitch {
    attribute: Py<PyString>,
    inside: Py<PyAny>,
    outside: Py<PyAny>,
    asks: Py<PyString>,
    asked: Asked,
    get_ident: Py<PyAny>,
    task: Py<PyAny>,
}

impl ThreadSwitch {
    fn lets_in(&self, threads: &Bound<'_, PyDict>) -> PyResult<bool> {
        let py = threads.py();
        let Some(by) = threads.get_item(self.get_ident.bind(py).call0()?)? else { return Ok(false) };
        let by: i64 = by.extract()?;
        Ok(by == 0 || by == -1 - self.task.bind(py).call0()?.extract::<i64>()?)
    }
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
        calls_in: Py<PyAny>,
        task: Py<PyAny>,
    ) -> PyResult<Self> {
        let get_ident = py.import("_thread")?.getattr("get_ident")?.unbind();
        Ok(Self { attribute, inside, outside, asks, asked: Asked::new(py, calls_in)?, get_ident, task })
    }

    fn __get__(
        &self,
        py: Python<'_>,
        instance: &Bound<'_, PyAny>,
        _owner: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Py<PyAny>> {
        if instance.is_none() {
            let caller = self.asked.frame(py)?.getattr("f_code")?.getattr("co_filename")?;
            return Ok(if caller.eq(&self.asks)? { &self.outside } else { &self.inside }.clone_ref(py));
        }
        let threads = instance.getattr(self.attribute.bind(py))?;
        let within = self.lets_in(threads.cast()?)? || self.asked.asks(&self.asked.frame(py)?)?;
        Ok(if within { &self.inside } else { &self.outside }.clone_ref(py))
    }
}

/// What a subclass of `classmethod` has as `__get__`: gives `silent` to code that only asks whether an instance has an override,
/// and the function bound to the class to all others.
#[pyclass(frozen, module = "funicular._core")]
pub(super) struct BoundUnlessAsked {
    function: Py<PyAny>,
    silent: Py<PyAny>,
    asked: Asked,
    bind: Py<PyAny>,
}

#[pymethods]
impl BoundUnlessAsked {
    #[new]
    fn new(py: Python<'_>, function: Py<PyAny>, silent: Py<PyAny>, calls_in: Py<PyAny>) -> PyResult<Self> {
        let bind = py.import("types")?.getattr("MethodType")?.unbind();
        Ok(Self { function, silent, asked: Asked::new(py, calls_in)?, bind })
    }

    fn __call__(
        &self,
        py: Python<'_>,
        _descriptor: &Bound<'_, PyAny>,
        instance: &Bound<'_, PyAny>,
        owner: &Bound<'_, PyAny>,
    ) -> PyResult<Py<PyAny>> {
        if !instance.is_none() && self.asked.asks(&self.asked.frame(py)?)? {
            return Ok(self.silent.clone_ref(py));
        }
        Ok(self.bind.bind(py).call1((&self.function, owner))?.unbind())
    }
}
