//! Saving and loading, as the wrapper calls them. Types are those of safetensors.
#![expect(unsafe_code, reason = "passes raw addresses of tensors to the runtime")]

use std::{path::PathBuf, sync::Arc};

use pyo3::prelude::*;
use serde_json::value::RawValue;

use super::{
    arguments::{address, dtype, elements, kind, known},
    engine::Engine,
    failures::{check, guarded, waiting},
    records::{ReadBuffer, RestoredState, SaveRequest, SavedPlace, SavedTensor},
};
use funicular::{
    checkpoint::{self, Contents, Control, Dtype, Found, FrameBudget, Request, TensorSpec},
    dtype::StateKind,
    error::{Code, Error, Result},
    io::EngineOptions,
    memory::set_aside,
    quantities::UnitId,
    runtime::{Buffer, Item, Place, Runtime, Source, Unchanged, check_process, read_buffers, save_plain},
};

fn stored(name: &str) -> Result<Dtype> {
    serde_json::from_value(name.into()).map_err(|_| {
        Error::new(Code::CheckpointValue, format!("safetensors has no type '{name}'."))
            .action("Leave that tensor out of the model's state, or convert it.")
    })
}

fn state(name: &str) -> Result<StateKind> {
    if name == StateKind::Param.name() { Ok(StateKind::Param) } else { kind(name) }
}

fn unit_id(unit: u64) -> Result<UnitId> {
    u32::try_from(unit).map(UnitId).map_err(|_| Error::argument(format!("there is no unit {unit}.")))
}

fn place(given: &SavedPlace) -> Result<Place> {
    Ok(match given {
        SavedPlace::Memory(at) => Place::Memory { address: at.address, on_device: at.on_device },
        SavedPlace::Unit(at) => {
            Place::Unit { unit: unit_id(at.unit)?, section: at.section, start: at.start, kind: state(&at.state)? }
        }
    })
}

fn check_sources(rt: Option<&Runtime>, request: &Request, sources: &[Source]) -> Result<()> {
    request.tensors.iter().zip(sources).try_for_each(|(spec, source)| check_source(rt, spec, source))
}

/// Checks that a tensor's elements are where it says.
fn check_source(rt: Option<&Runtime>, spec: &TensorSpec, source: &Source) -> Result<()> {
    let many = || Error::argument(format!("'{}' has more elements than there can be.", spec.name));
    let len = spec.shape.iter().try_fold(1_u64, |n, &d| n.checked_mul(d as u64)).ok_or_else(many)?;
    // As in the file, but for masters: those are put together from two places.
    let size = source.master.is_none().then(|| spec.dtype.bitsize() / 8);
    check_place(rt, &spec.name, source.place, len, size)?;
    if let Some((_, Some(rest))) = source.master {
        check_place(rt, &spec.name, rest, len, None)?;
    }
    Ok(())
}

fn check_place(rt: Option<&Runtime>, name: &str, place: Place, len: u64, size: Option<usize>) -> Result<()> {
    let (unit, section, start, kind) = match place {
        Place::Memory { address: at, .. } => return address(at, len).map(drop),
        Place::Unit { unit, section, start, kind } => (unit, section, start, kind),
    };
    let rt = rt.ok_or_else(|| Error::argument(format!("'{name}' is in a runtime, and there is none.")))?;
    let packed = rt.layout()?.unit(known(rt, unit.0)?);
    elements(packed, section, start, len)?;
    let Some(found) = packed.sections.get(section).filter(|_| len > 0) else { return Ok(()) };
    let bytes = if kind == StateKind::Param || found.trainable { kind.element_size(found.dtype) } else { 0 };
    if bytes == 0 || size.is_some_and(|size| size != bytes) {
        let text = format!("'{name}': {} of '{}' has elements of {bytes} bytes.", kind.name(), packed.name);
        return Err(Error::argument(text));
    }
    Ok(())
}

fn tensor(given: SavedTensor) -> Result<(TensorSpec, Source)> {
    let rest = given.rest.as_ref().map(place).transpose()?;
    let source = Source { place: place(&given.place)?, master: given.half.map(|half| (dtype(&half, 2), rest)) };
    let dtype = stored(&given.stored)?;
    let spec = TensorSpec { name: given.name, dtype, shape: given.shape, group: 0, optimizer: given.optimizer };
    Ok((spec, source))
}

/// A save under way.
#[pyclass(frozen, module = "funicular._core")]
pub(crate) struct Save {
    control: Arc<Control>,
    pid: u32,
}

#[pymethods]
impl Save {
    /// Waits for the end, so many seconds at most; returns notes for the user, or none if the save goes on.
    fn wait(&self, py: Python<'_>, seconds: f64) -> PyResult<Option<Vec<String>>> {
        let seconds = if seconds.is_nan() { 0.0 } else { seconds.clamp(0.0, 1e9) };
        let end = std::time::Instant::now() + std::time::Duration::from_secs_f64(seconds);
        waiting(py, |i| {
            check_process(self.pid)?;
            let mut late = false;
            let ended = self.control.wait(&mut || {
                late = std::time::Instant::now() >= end;
                late || i()
            });
            match ended {
                Err(_) if late => Ok(None),
                other => other.map(Some),
            }
        })
    }

    /// Whether it has ended, well or not; never in a forked child, which knows nothing of it.
    fn done(&self) -> bool {
        check_process(self.pid).is_ok() && self.control.outcome().is_some()
    }

    /// Bytes done, and bytes in all.
    fn progress(&self) -> (u64, u64) {
        self.control.progress()
    }

    /// Gives it up; nothing of it is kept.
    fn cancel(&self) {
        self.control.cancel();
    }
}

/// A directory of safetensors, opened.
#[pyclass(frozen, module = "funicular._core")]
pub(crate) struct Checkpoint {
    contents: Contents,
}

#[pymethods]
impl Checkpoint {
    /// `own`: it must be a checkpoint of this project.
    #[new]
    fn new(py: Python<'_>, path: PathBuf, own: bool) -> PyResult<Self> {
        let opened = py.detach(|| if own { Contents::checkpoint(&path) } else { Contents::open(&path) });
        Ok(Self { contents: check(py, opened)? })
    }

    /// (name, type, shape) of the model's tensors, or of the optimizer's.
    fn tensors(&self, optimizer: bool) -> Vec<(String, String, Vec<usize>)> {
        let set = if optimizer { &self.contents.optimizer } else { &self.contents.model };
        set.values().map(|f| (f.name.clone(), f.dtype.to_string(), f.shape.clone())).collect()
    }

    /// What the wrapper stored, as JSON; none if it is not a checkpoint of this project.
    fn training(&self) -> Option<String> {
        self.contents.manifest.as_ref().map(|m| m.training.get().to_owned())
    }

    /// Reads everything and compares it with the checksums; of several ranks each reads its part.
    #[pyo3(signature = (rank = 0, ranks = 1))]
    fn verify(&self, py: Python<'_>, rank: u64, ranks: u64) -> PyResult<()> {
        let control = Control::default();
        let budget = FrameBudget { engine: EngineOptions::default(), direct: true, frames: 4, frame: 8 << 20 };
        waiting(py, |i| {
            funicular::runtime::aside(&control, i, || {
                let all: Vec<&Found> = self.contents.model.values().chain(self.contents.optimizer.values()).collect();
                let mine = part_of(in_file_order(all), rank, ranks);
                let wrong = checkpoint::verify(&self.contents, mine, &budget, &control)?;
                wrong.into_iter().next().map_or(Ok(()), Err)
            })
        })
    }

    /// Fills buffers of the host.
    fn read(&self, py: Python<'_>, buffers: Vec<ReadBuffer>) -> PyResult<()> {
        let given: Result<Vec<Buffer>> = buffers
            .into_iter()
            .map(|ReadBuffer { address, bytes, stored: to, optimizer, name, half }| {
                let master = half.map(|half| state(&half)).transpose()?;
                Ok(Buffer { address, bytes, dtype: stored(&to)?, optimizer, tensor: name, master })
            })
            .collect();
        let given = check(py, given)?;
        let control = Control::default();
        waiting(py, |i| {
            given.iter().try_for_each(|b| address(b.address, b.bytes).map(drop))?;
            // SAFETY: the wrapper passes addresses and sizes of live tensors of its own.
            unsafe { read_buffers(&self.contents, &given, &control, i) }
        })
    }
}

/// In the order in which a disk reads best.
fn in_file_order(mut tensors: Vec<&Found>) -> Vec<&Found> {
    tensors.sort_by_key(|f| (f.file, f.start));
    tensors
}

/// The tensors that one of several ranks reads, of about as many bytes as the others' each.
fn part_of(tensors: Vec<&Found>, rank: u64, ranks: u64) -> Vec<&Found> {
    let total: u64 = tensors.iter().map(|f| f.end - f.start).sum();
    let mut before = 0;
    let mine = |f: &&Found| {
        let owner = u128::from(before) * u128::from(ranks) / u128::from(total.max(1));
        before += f.end - f.start;
        owner.min(u128::from(ranks.max(1) - 1)) == u128::from(rank)
    };
    tensors.into_iter().filter(mine).collect()
}

fn request(given: SaveRequest) -> Result<(Request, Vec<Source>)> {
    let SaveRequest { path: target, overwrite, keep, tensors, aliases, files, training, shard } = given;
    let (mut specs, mut sources) = (Vec::with_capacity(tensors.len()), Vec::with_capacity(tensors.len()));
    for given in tensors {
        let (spec, source) = tensor(given)?;
        specs.push(spec);
        sources.push(source);
    }
    let training = RawValue::from_string(training)
        .map_err(|e| Error::new(Code::CheckpointValue, format!("what describes the training is no JSON: {e}.")))?;
    let request = Request { target, overwrite, keep, tensors: specs, aliases, files, training, shard };
    Ok((request, sources))
}

/// Begins a save. `changed` gives the name of a tensor of `engine`'s caller that was changed before it was read.
#[pyfunction]
pub(crate) fn save(
    py: Python<'_>,
    engine: Option<&Engine>,
    request: SaveRequest,
    changed: Py<PyAny>,
    stream: u64,
) -> PyResult<Save> {
    check(py, set_aside())?;
    let (request, sources) = check(py, self::request(request))?;
    let unchanged: Unchanged = Box::new(move || {
        let found = Python::try_attach(|py| changed.call0(py)?.extract::<Option<String>>(py)).unwrap_or(Ok(None));
        match found {
            Ok(None) => Ok(()),
            Ok(Some(name)) => {
                Err(Error::new(Code::CheckpointChanged, format!("'{name}' was changed before it was saved."))
                    .action("Edit it after the save has ended, or save with wait=True."))
            }
            Err(e) => Err(Error::new(Code::Panicked, format!("looking for changed tensors failed: {e}."))),
        }
    });
    let control = match engine {
        Some(engine) => engine.call(py, |rt, i| {
            check_sources(Some(rt), &request, &sources)?;
            // SAFETY: the wrapper keeps the tensors until the save has ended.
            unsafe { rt.save(request, sources, unchanged, stream, i) }
        }),
        None => waiting(py, |_| {
            check_sources(None, &request, &sources)?;
            // SAFETY: as above.
            guarded(|| unsafe { save_plain(request, sources, unchanged) })
        }),
    }?;
    Ok(Save { control, pid: std::process::id() })
}

/// Loads states of units from a checkpoint; their updates are over and their windows closed.
#[pyfunction]
pub(crate) fn restore(
    py: Python<'_>,
    engine: &Engine,
    checkpoint: &Checkpoint,
    items: Vec<RestoredState>,
    stream: u64,
    told: Option<Py<PyAny>>,
) -> PyResult<()> {
    check(py, set_aside())?;
    let given: Result<Vec<Item>> = items
        .into_iter()
        .map(|RestoredState { place: at, len, optimizer, tensor, from_master: master }| {
            let (unit, section, start, kind) = (unit_id(at.unit)?, at.section, at.start, state(&at.state)?);
            Ok(Item { unit, section, kind, start, len, optimizer, tensor, master })
        })
        .collect();
    let given = check(py, given)?;
    let control = Control::default();
    let tell = |control: &Control| {
        if let Some(told) = &told {
            // The caller's display of progress may fail; loading goes on.
            let _ = Python::attach(|py| told.call1(py, (control.progress().0,)).map(|_| ()));
        }
    };
    engine.call(py, |rt, i| {
        rt.restore(&checkpoint.contents, given, &control, stream, &mut || {
            tell(&control);
            i()
        })
    })
}

/// Waits until the save under way, if there is one, has read a unit.
#[pyfunction]
pub(crate) fn preserve(py: Python<'_>, engine: &Engine, unit: u32) -> PyResult<()> {
    engine.call(py, |rt, i| rt.preserve(known(rt, unit)?, i))
}

/// Waits for the end of the save under way, if there is one.
#[pyfunction]
pub(crate) fn saved(py: Python<'_>, engine: &Engine) -> PyResult<()> {
    engine.call(py, |rt, i| rt.saved(i))
}
