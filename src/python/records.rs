//! What the wrapper hands over in one piece: frozen records with named fields, one constructor argument each. They only carry: what
//! takes them checks their numbers (`arguments`, `checkpoints`).

use std::{
    hash::{Hash, Hasher},
    path::PathBuf,
};

use pyo3::prelude::*;

/// A parameter, as the layout needs to know it.
#[pyclass(frozen, get_all, new = "from_fields", from_py_object, module = "funicular._core")]
#[derive(Clone)]
pub(crate) struct Param {
    pub(super) name: String,
    /// Elements.
    pub(super) len: u64,
    /// Their format, by torch's name.
    pub(super) dtype: String,
    /// Bytes of one.
    pub(super) itemsize: u8,
    /// Whether it is trained.
    pub(super) trained: bool,
}

/// Elements of a section that are updated with the same hyperparameters.
#[pyclass(frozen, get_all, new = "from_fields", from_py_object, module = "funicular._core")]
#[derive(Clone, Copy)]
pub(crate) struct Span {
    pub(super) section: usize,
    /// First element.
    pub(super) start: u64,
    /// Elements.
    pub(super) len: u64,
    /// Which hyperparameters of the step.
    pub(super) hyper: usize,
    /// Whether the master starts anew from the weight.
    pub(super) reset_master: bool,
}

/// Hyperparameters; equal ones are equal keys.
#[pyclass(frozen, get_all, eq, hash, new = "from_fields", from_py_object, module = "funicular._core")]
#[derive(Clone, Copy)]
pub(crate) struct Hyper {
    pub(super) lr: f64,
    pub(super) beta1: f64,
    pub(super) beta2: f64,
    pub(super) eps: f64,
    pub(super) weight_decay: f64,
    /// The step that is taken, from 1.
    pub(super) step: u64,
    pub(super) maximize: bool,
    /// Slot of the factor that clipping found.
    pub(super) slot: Option<u32>,
}

impl Hyper {
    fn bits(&self) -> ([u64; 6], bool, Option<u32>) {
        let floats = [self.lr, self.beta1, self.beta2, self.eps, self.weight_decay].map(f64::to_bits);
        let [lr, beta1, beta2, eps, weight_decay] = floats;
        ([lr, beta1, beta2, eps, weight_decay, self.step], self.maximize, self.slot)
    }
}

impl PartialEq for Hyper {
    fn eq(&self, other: &Self) -> bool {
        self.bits() == other.bits()
    }
}

impl Hash for Hyper {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.bits().hash(state);
    }
}

/// An update of a unit.
#[pyclass(frozen, get_all, new = "from_fields", from_py_object, module = "funicular._core")]
#[derive(Clone)]
pub(crate) struct UnitUpdate {
    pub(super) unit: u32,
    pub(super) spans: Vec<Span>,
    /// Whether everything is untouched that a speculative update of the unit began from.
    pub(super) untouched: bool,
}

/// An update of a parameter that is not paged: addresses on the device.
#[pyclass(frozen, get_all, new = "from_fields", from_py_object, module = "funicular._core")]
#[derive(Clone)]
pub(crate) struct ResidentUpdate {
    pub(super) param: u64,
    pub(super) grad: u64,
    /// 0 for fp32 parameters, which have none.
    pub(super) master: u64,
    pub(super) exp_avg: u64,
    pub(super) exp_avg_sq: u64,
    /// Elements.
    pub(super) len: usize,
    /// Their format, by torch's name.
    pub(super) dtype: String,
    /// Which hyperparameters of the step.
    pub(super) hyper: usize,
    /// Whether the master starts anew from the weight.
    pub(super) reset_master: bool,
}

/// A part of a gradient that this rank sums: addresses on the device.
#[pyclass(frozen, get_all, new = "from_fields", from_py_object, module = "funicular._core")]
#[derive(Clone)]
pub(crate) struct MeanPart {
    /// Where the mean goes.
    pub(super) out: u64,
    /// This rank's piece; 0 if it has none.
    pub(super) own: u64,
    /// The first of other ranks' pieces, ascending by rank.
    pub(super) others: u64,
    /// Bytes from each of them to the next.
    pub(super) stride: u64,
    /// How many there are.
    pub(super) count: usize,
    /// Of them, of lower ranks than this one.
    pub(super) before: usize,
    /// Elements.
    pub(super) len: u64,
    /// Their format, by torch's name.
    pub(super) dtype: String,
}

/// One of several ranks that train one model.
#[pyclass(frozen, get_all, new = "from_fields", from_py_object, module = "funicular._core")]
#[derive(Clone, Copy)]
pub(crate) struct Ranks {
    pub(super) rank: usize,
    pub(super) size: usize,
    /// The file that rank 0 shares, in this process; none on rank 0.
    pub(super) fd: Option<i32>,
    /// Whether memory that stays free on its device takes optimizer states; none: as the policy says.
    pub(super) grows: Option<bool>,
}

/// Elements of a state in a unit.
#[pyclass(frozen, get_all, new = "from_fields", from_py_object, module = "funicular._core")]
#[derive(Clone)]
pub(crate) struct UnitPlace {
    /// As wide as Python's numbers of this kind: one that no unit has is told by name.
    pub(super) unit: u64,
    pub(super) section: usize,
    /// First element.
    pub(super) start: u64,
    pub(super) state: String,
}

/// Elements of a tensor that the wrapper keeps alive.
#[pyclass(frozen, get_all, new = "from_fields", from_py_object, module = "funicular._core")]
#[derive(Clone, Copy)]
pub(crate) struct MemoryPlace {
    pub(super) address: u64,
    pub(super) on_device: bool,
}

/// Where the elements of a tensor are that is saved.
#[derive(Clone, FromPyObject, IntoPyObject)]
pub(crate) enum SavedPlace {
    Unit(UnitPlace),
    Memory(MemoryPlace),
}

/// A tensor that is saved.
#[pyclass(frozen, get_all, new = "from_fields", from_py_object, module = "funicular._core")]
#[derive(Clone)]
pub(crate) struct SavedTensor {
    pub(super) name: String,
    /// Its format in the file, by the name of safetensors.
    pub(super) stored: String,
    pub(super) shape: Vec<usize>,
    /// Whether it is one of the optimizer's.
    pub(super) optimizer: bool,
    pub(super) place: SavedPlace,
    /// Of a 16-bit parameter whose fp32 master is saved in its place: its format, by torch's name.
    pub(super) half: Option<String>,
    /// What that master has beyond the parameter; none where that is nothing.
    pub(super) rest: Option<SavedPlace>,
}

/// What is saved, and where.
#[pyclass(frozen, get_all, new = "from_fields", from_py_object, module = "funicular._core")]
#[derive(Clone)]
pub(crate) struct SaveRequest {
    pub(super) path: PathBuf,
    /// Whether an earlier checkpoint there is replaced.
    pub(super) overwrite: bool,
    /// How many checkpoints of this series are kept.
    pub(super) keep: Option<usize>,
    pub(super) tensors: Vec<SavedTensor>,
    /// Other names of tensors: (name, name of the tensor).
    pub(super) aliases: Vec<(String, String)>,
    /// Small files: name and contents.
    pub(super) files: Vec<(String, Vec<u8>)>,
    /// What the wrapper stores, as JSON.
    pub(super) training: String,
    /// Bytes of a file of tensors, at most.
    pub(super) shard: u64,
}

/// Elements of a state that are loaded.
#[pyclass(frozen, get_all, new = "from_fields", from_py_object, module = "funicular._core")]
#[derive(Clone)]
pub(crate) struct RestoredState {
    pub(super) place: UnitPlace,
    /// Elements.
    pub(super) len: u64,
    /// Whether the tensor is one of the optimizer's.
    pub(super) optimizer: bool,
    /// Its name; none for zeros.
    pub(super) tensor: Option<String>,
    /// Whether the tensor is an fp32 master, of which the state is a part.
    pub(super) from_master: bool,
}

/// A buffer of the host that a tensor of a file is read into.
#[pyclass(frozen, get_all, new = "from_fields", from_py_object, module = "funicular._core")]
#[derive(Clone)]
pub(crate) struct ReadBuffer {
    pub(super) address: u64,
    pub(super) bytes: u64,
    /// The format wanted, by the name of safetensors.
    pub(super) stored: String,
    /// Whether the tensor is one of the optimizer's.
    pub(super) optimizer: bool,
    pub(super) name: String,
    /// Of an fp32 master: whether the 16-bit `param` of it is wanted, or what the `master` has beyond that.
    pub(super) half: Option<String>,
}

/// Adds the classes to the module.
///
/// # Errors
/// When Python has no memory.
pub(super) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Param>()?;
    m.add_class::<Span>()?;
    m.add_class::<Hyper>()?;
    m.add_class::<UnitUpdate>()?;
    m.add_class::<ResidentUpdate>()?;
    m.add_class::<MeanPart>()?;
    m.add_class::<Ranks>()?;
    m.add_class::<UnitPlace>()?;
    m.add_class::<MemoryPlace>()?;
    m.add_class::<SavedTensor>()?;
    m.add_class::<SaveRequest>()?;
    m.add_class::<RestoredState>()?;
    m.add_class::<ReadBuffer>()
}
