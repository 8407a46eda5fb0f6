//! `Engine`: one model's runtime, as the wrapper calls it. Units and streams are numbers; sizes are bytes.
#![expect(unsafe_code, reason = "passes raw addresses of tensors to the runtime")]

use std::sync::Arc;

use parking_lot::RwLock;
use pyo3::{prelude::*, types::PyDict};

use super::{
    arguments::{
        HyperTuple, ParamTuple, PlaceTuple, ResidentTuple, UpdateTuple, kind, phase, resident_update, step_hyper,
        unit_specs, unit_update,
    },
    dlpack,
    failures::{check, raise, waiting},
};
use crate::{
    device::DeviceKind,
    error::{Code, Error, Result},
    io::Direction,
    model::Layout,
    optim::Update,
    policy::Policy,
    runtime::{
        Runtime, Sharing, StepHyper, UnitUpdate, shares_processor,
        split::StepTime,
        stats::{Cause, Link},
    },
    units::{ByteCount, Tier, UnitId},
};

/// One offloaded model.
#[pyclass(frozen, module = "funicular._core")]
pub struct Engine {
    runtime: RwLock<Option<Runtime>>,
}

impl Engine {
    pub(super) fn with<R>(&self, f: impl FnOnce(&Runtime) -> Result<R>) -> Result<R> {
        match &*self.runtime.read() {
            Some(runtime) => f(runtime).inspect_err(|error| runtime.told(error)),
            None => Err(Error::new(Code::Closed, "the runtime is closed.").action("Offload the model again.")),
        }
    }

    fn buffer(&self, py: Python<'_>, unit: u32, which: &str, on_device: bool) -> PyResult<Py<PyAny>> {
        let made = self.with(|rt| {
            let id = known(rt, unit)?;
            let kind = rt.device()?.kind();
            let packed = rt.layout()?.unit(id);
            let home = rt.homes()?.unit(id);
            let device = Arc::clone(rt.device()?);
            let (address, len, owner): (u64, u64, Box<dyn std::any::Any + Send + Sync>) = match which {
                "frame" => {
                    let frames = Arc::clone(rt.frames()?);
                    (frames.address(id.index()), packed.param_bytes(), Box::new((frames, device)))
                }
                "home" => match &home.shadow {
                    Some(shadow) => (home.params, packed.param_bytes(), Box::new((Arc::clone(shadow), device))),
                    None => (home.params, packed.param_bytes(), Box::new((Arc::clone(&rt.homes()?.params), device))),
                },
                _ => (home.grads, packed.grad_bytes(), Box::new((Arc::clone(&rt.homes()?.grads), device))),
            };
            Ok((address, len, if on_device { kind } else { DeviceKind::Host }, owner))
        });
        let (address, len, kind, owner) = check(py, made)?;
        dlpack::capsule(py, address, len, kind, owner)
    }
}

pub(super) fn known(rt: &Runtime, unit: u32) -> Result<UnitId> {
    let id = UnitId(unit);
    if id.index() < rt.layout()?.units.len() {
        return Ok(id);
    }
    Err(Error::new(Code::Stale, format!("there is no unit {unit}.")))
}

#[pymethods]
impl Engine {
    /// Plans and starts. `units` is a list of (name, parameters); `policy` is resolved JSON; `freed` bytes of host memory are
    /// given back as the model moves in.
    #[new]
    #[pyo3(signature = (units, policy, freed = 0))]
    fn new(py: Python<'_>, units: Vec<(String, Vec<ParamTuple>)>, policy: &str, freed: u64) -> PyResult<Self> {
        let specs = unit_specs(units);
        let opened = py.detach(|| {
            let layout = Layout::new(&specs)?;
            Runtime::open(layout, &Policy::from_json_str(policy, "policy")?, ByteCount(freed))
        });
        Ok(Self { runtime: RwLock::new(Some(check(py, opened)?)) })
    }

    /// "host" or "cuda:N".
    fn device(&self, py: Python<'_>) -> PyResult<String> {
        let kind = check(py, self.with(|rt| Ok(rt.device()?.kind())))?;
        Ok(match kind {
            DeviceKind::Host => "host".into(),
            DeviceKind::Cuda(n) => format!("cuda:{n}"),
        })
    }

    /// True where updates and compute share a processor.
    fn shares_processor(&self, py: Python<'_>) -> PyResult<bool> {
        check(py, self.with(|rt| Ok(shares_processor(rt.device()?.kind()))))
    }

    /// Places of a unit's parameters, in the order given.
    fn places(&self, py: Python<'_>, unit: u32) -> PyResult<Vec<PlaceTuple>> {
        check(
            py,
            self.with(|rt| {
                let packed = rt.layout()?.unit(known(rt, unit)?);
                Ok(packed
                    .params
                    .iter()
                    .map(|p| {
                        let s = &packed.sections[p.section];
                        (p.section, p.start, p.numel, s.offset + p.start * s.dtype.size() as u64)
                    })
                    .collect())
            }),
        )
    }

    /// (parameter tier, optimizer tier) of a unit.
    fn homes(&self, py: Python<'_>, unit: u32) -> PyResult<(&'static str, &'static str)> {
        check(
            py,
            self.with(|rt| {
                let homes = rt.placement()?.homes[known(rt, unit)?.index()];
                Ok((homes.params.name(), homes.optimizer.name()))
            }),
        )
    }

    /// True if the unit's update may begin before the step.
    fn spare(&self, py: Python<'_>, unit: u32) -> PyResult<bool> {
        check(py, self.with(|rt| Ok(rt.placement()?.spare[known(rt, unit)?.index()])))
    }

    /// Other units whose frames overlap this unit's.
    fn neighbours(&self, py: Python<'_>, unit: u32) -> PyResult<Vec<u32>> {
        check(
            py,
            self.with(|rt| {
                let id = known(rt, unit)?;
                let plan = rt.placement()?;
                let others = rt.layout()?.ids().filter(|&v| v != id && plan.share_frames(id, v));
                Ok(others.map(|v| v.0).collect())
            }),
        )
    }

    /// DLPack capsule over the unit's frames, on the device.
    fn frame_buffer(&self, py: Python<'_>, unit: u32) -> PyResult<Py<PyAny>> {
        self.buffer(py, unit, "frame", true)
    }

    /// DLPack capsule over the unit's home, as memory of the device or of the host.
    fn home_buffer(&self, py: Python<'_>, unit: u32, on_device: bool) -> PyResult<Py<PyAny>> {
        self.buffer(py, unit, "home", on_device)
    }

    /// DLPack capsule over the unit's gradients.
    fn grad_buffer(&self, py: Python<'_>, unit: u32) -> PyResult<Py<PyAny>> {
        self.buffer(py, unit, "grad", true)
    }

    /// DLPack capsule over page-locked host memory for activations: `wanted` bytes, or from `least` on what is left.
    fn activation_buffer(&self, py: Python<'_>, least: u64, wanted: u64) -> PyResult<Py<PyAny>> {
        let made = py.detach(|| self.with(|rt| Ok((rt.activation_region(least, wanted)?, Arc::clone(rt.device()?)))));
        let (region, device) = check(py, made)?;
        let (address, len) = (region.as_ptr() as u64, region.len() as u64);
        dlpack::capsule(py, address, len, DeviceKind::Host, Box::new((region, device)))
    }

    /// Opens a window; false: use the home.
    fn open(&self, py: Python<'_>, unit: u32, in_phase: u8, stream: u64) -> PyResult<bool> {
        waiting(py, |i| self.with(|rt| rt.open_window(UnitId(unit), phase(in_phase), stream, i)))
    }

    /// Ends a window.
    fn release(&self, py: Python<'_>, unit: u32, stream: u64) -> PyResult<()> {
        check(py, self.with(|rt| rt.release(UnitId(unit), stream)))
    }

    /// The home was edited by work on `stream`.
    fn invalidate(&self, py: Python<'_>, unit: u32, stream: u64) -> PyResult<()> {
        check(py, self.with(|rt| rt.invalidate(UnitId(unit), stream)))
    }

    /// The frames were edited: bring them home.
    fn write_back(&self, py: Python<'_>, unit: u32, stream: u64) -> PyResult<()> {
        waiting(py, |i| self.with(|rt| rt.write_back(UnitId(unit), stream, i)))
    }

    /// Copies a gradient down; returns a number for `landed`.
    fn gradient(&self, py: Python<'_>, unit: u32, offset: u64, src: u64, len: u64, stream: u64) -> PyResult<u64> {
        // SAFETY: the wrapper passes a live tensor's address and size, and keeps it until the copy has landed.
        waiting(py, |i| self.with(|rt| unsafe { rt.gradient(UnitId(unit), offset, src, len, stream, i) }))
    }

    /// True if that gradient copy is over.
    fn landed(&self, py: Python<'_>, seq: u64) -> PyResult<bool> {
        check(py, self.with(|rt| rt.landed(seq)))
    }

    /// Makes `stream` wait for that gradient copy.
    fn wait_landed(&self, py: Python<'_>, seq: u64, stream: u64) -> PyResult<()> {
        waiting(py, |i| self.with(|rt| rt.wait_landed(seq, stream, i)))
    }

    /// Makes `stream` wait for all gradient copies.
    fn wait_gradients(&self, py: Python<'_>, stream: u64) -> PyResult<()> {
        waiting(py, |i| self.with(|rt| rt.wait_gradients(stream, i)))
    }

    /// Starts an optimizer step.
    fn update(
        &self,
        py: Python<'_>,
        updates: Vec<UpdateTuple>,
        hypers: Vec<HyperTuple>,
        residents: Vec<ResidentTuple>,
        stream: u64,
        wait: bool,
    ) -> PyResult<()> {
        let hypers: Vec<StepHyper> = hypers.into_iter().map(step_hyper).collect();
        let updates: Vec<UnitUpdate> = updates.into_iter().map(unit_update).collect();
        let residents: Vec<Update> = residents.into_iter().map(|r| resident_update(r, &hypers)).collect();
        // SAFETY: the wrapper passes addresses of live, dense tensors on the device; torch reuses their memory only in the order of
        // this stream.
        waiting(py, |i| self.with(|rt| unsafe { rt.update(&updates, &hypers, &residents, stream, wait, i) }))
    }

    /// Begins a unit's update before its step; true if it was begun.
    fn update_ahead(
        &self,
        py: Python<'_>,
        update: UpdateTuple,
        hypers: Vec<HyperTuple>,
        stream: u64,
    ) -> PyResult<bool> {
        let hypers: Vec<StepHyper> = hypers.into_iter().map(step_hyper).collect();
        check(py, self.with(|rt| rt.update_ahead(&unit_update(update), &hypers, stream)))
    }

    /// Drops what was begun.
    fn drop_ahead(&self, py: Python<'_>, unit: u32) -> PyResult<()> {
        check(py, self.with(|rt| rt.drop_ahead(UnitId(unit))))
    }

    /// Brings a factor of gradients (an fp32 value on the device) down; returns its slot.
    fn factor(&self, py: Python<'_>, src: u64, stream: u64) -> PyResult<u32> {
        // SAFETY: the wrapper passes a live tensor's address; torch reuses its memory only in the order of this stream.
        check(py, self.with(|rt| unsafe { rt.factor(src, stream) }))
    }

    /// Optimizer steps submitted so far.
    fn steps(&self, py: Python<'_>) -> PyResult<u64> {
        check(py, self.with(|rt| Ok(rt.stats()?.steps())))
    }

    /// True once the runtime has failed and the caller has been told.
    fn failed(&self, py: Python<'_>) -> PyResult<bool> {
        check(py, self.with(|rt| rt.failed()))
    }

    /// Waits until the unit's home is current.
    fn settle(&self, py: Python<'_>, unit: u32, stream: u64) -> PyResult<()> {
        waiting(py, |i| self.with(|rt| rt.settle(UnitId(unit), stream, i)))
    }

    /// Waits until the unit's last update is made; its home may be older.
    fn settle_update(&self, py: Python<'_>, unit: u32, stream: u64) -> PyResult<()> {
        waiting(py, |i| self.with(|rt| rt.settle_update(UnitId(unit), stream, i)))
    }

    /// Waits until no update is under way and all homes are current.
    fn settle_all(&self, py: Python<'_>) -> PyResult<()> {
        waiting(py, |i| self.with(|rt| rt.settle_all(i)))
    }

    /// True while the unit's update is under way.
    fn update_pending(&self, py: Python<'_>, unit: u32) -> PyResult<bool> {
        check(py, self.with(|rt| rt.update_pending(UnitId(unit))))
    }

    /// Reads NVMe-resident parameters into their shadow.
    fn fault_in(&self, py: Python<'_>, unit: u32, stream: u64) -> PyResult<()> {
        waiting(py, |i| self.with(|rt| rt.fault_in(UnitId(unit), stream, i)))
    }

    /// Makes the shadow writable for its first contents.
    fn blank_shadow(&self, py: Python<'_>, unit: u32) -> PyResult<()> {
        check(py, self.with(|rt| rt.blank_shadow(UnitId(unit))))
    }

    /// Stores the shadow.
    fn store_shadow(&self, py: Python<'_>, unit: u32, stream: u64) -> PyResult<()> {
        waiting(py, |i| self.with(|rt| rt.store_shadow(UnitId(unit), stream, i)))
    }

    /// Reads a filled shadow anew: its unit was updated while somebody looked at it.
    fn refresh_shadow(&self, py: Python<'_>, unit: u32, stream: u64) -> PyResult<()> {
        waiting(py, |i| self.with(|rt| rt.refresh_shadow(UnitId(unit), stream, i)))
    }

    /// Counts bytes of the caller's memory that hold what was read.
    fn lend(&self, py: Python<'_>, bytes: u64) -> PyResult<()> {
        check(py, self.with(|rt| rt.lend(bytes)))
    }

    /// The caller dropped them.
    fn returned(&self, py: Python<'_>, bytes: u64) -> PyResult<()> {
        check(py, self.with(|rt| rt.returned(bytes)))
    }

    /// Gives the shadow's memory back.
    fn discard_shadow(&self, py: Python<'_>, unit: u32) -> PyResult<()> {
        check(py, self.with(|rt| rt.discard_shadow(UnitId(unit))))
    }

    /// Copies a state ("master", "exp_avg", "exp_avg_sq") into host memory at `dst`.
    fn read_state(
        &self,
        py: Python<'_>,
        unit: u32,
        section: usize,
        state: &str,
        start: u64,
        len: u64,
        dst: u64,
    ) -> PyResult<()> {
        self.state(py, (unit, section, state), start..start + len, dst, Direction::Read)
    }

    /// Copies a state from host memory at `src`.
    fn write_state(
        &self,
        py: Python<'_>,
        unit: u32,
        section: usize,
        state: &str,
        start: u64,
        len: u64,
        src: u64,
    ) -> PyResult<()> {
        self.state(py, (unit, section, state), start..start + len, src, Direction::Write)
    }

    /// Says who updates from now on: `processor`, `lanes`, `rates` or `halves`; false where there are no lanes. For measurements
    /// and tests: the bits do not depend on it.
    fn split_updates(&self, py: Python<'_>, split: &str) -> PyResult<bool> {
        let split = match split {
            "processor" => Sharing::Processor,
            "lanes" => Sharing::Lanes,
            "rates" => Sharing::Rates,
            "halves" => Sharing::Halves,
            other => return Err(pyo3::exceptions::PyValueError::new_err(format!("unknown split '{other}'"))),
        };
        check(py, py.detach(|| self.with(|rt| rt.split_updates(split))))
    }

    /// Everything counted so far.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let out = PyDict::new(py);
        let filled: PyResult<()> = match &*self.runtime.read() {
            Some(rt) => fill_stats(py, rt, &out),
            None => Err(raise(py, &Error::new(Code::Closed, "the runtime is closed."))),
        };
        filled?;
        Ok(out)
    }

    /// Starts or stops collecting a trace.
    fn trace(&self, py: Python<'_>, on: bool) -> PyResult<()> {
        check(py, self.with(|rt| rt.set_trace(on)))
    }

    /// Writes the trace collected so far; returns the number of events.
    fn write_trace(&self, py: Python<'_>, path: &str) -> PyResult<usize> {
        waiting(py, |i| self.with(|rt| rt.write_trace(std::path::Path::new(path), i)))
    }

    /// Things worth knowing about how it was set up.
    fn notes(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        check(py, self.with(|rt| Ok(rt.notes().to_vec())))
    }

    /// Ends everything and gives memory and disk space back.
    fn close(&self, py: Python<'_>) {
        let runtime = self.runtime.write().take();
        py.detach(|| drop(runtime));
    }
}

impl Engine {
    fn state(
        &self,
        py: Python<'_>,
        place: (u32, usize, &str),
        elems: std::ops::Range<u64>,
        address: u64,
        direction: Direction,
    ) -> PyResult<()> {
        let (unit, section, state) = place;
        let state = check(py, kind(state))?;
        waiting(py, |i| {
            self.with(|rt| {
                let id = known(rt, unit)?;
                let limit = rt.layout()?.unit(id).sections.get(section).map_or(0, |s| s.elems);
                if elems.end > limit {
                    return Err(Error::new(Code::Stale, format!("section {section} of unit {unit} ends at {limit}.")));
                }
                // SAFETY: the wrapper passes the address of a live host tensor of that many elements.
                unsafe { rt.state_io((id, section, state), elems, address as *mut u8, direction, i) }
            })
        })
    }
}

/// Wall, compute, stalls by cause, busy time by link.
fn step_time(time: &StepTime) -> (u64, u64, [u64; Cause::ALL.len()], [u64; Link::ALL.len()]) {
    (time.wall, time.compute, time.stalls, time.busy)
}

fn fill_stats(py: Python<'_>, rt: &Runtime, out: &Bound<'_, PyDict>) -> PyResult<()> {
    // First: it brings the stalls up to date.
    let times = check(py, py.detach(|| rt.times()))?;
    let stats = check(py, rt.stats())?;
    let links = PyDict::new(py);
    for link in Link::ALL {
        let flow = stats.flow(link);
        links.set_item(link.name(), (flow.bytes, flow.busy_nanos))?;
    }
    let stalls = PyDict::new(py);
    for cause in Cause::ALL {
        stalls.set_item(cause.name(), stats.stall(cause))?;
    }
    let budgets = PyDict::new(py);
    for tier in [Tier::Hbm, Tier::Host, Tier::Nvme] {
        let (used, peak) = check(py, rt.used(tier))?;
        budgets.set_item(tier.name(), (check(py, rt.limit(tier))?, used, peak))?;
    }
    let p = check(py, rt.prefetches())?;
    out.set_item("links", links)?;
    out.set_item("stalls", stalls)?;
    out.set_item("budgets", budgets)?;
    out.set_item("timed", (times.steps, times.lost))?;
    out.set_item("time", step_time(&times.total))?;
    out.set_item("last", step_time(&times.last))?;
    out.set_item("steps", stats.steps())?;
    out.set_item("home_uses", stats.home_uses())?;
    out.set_item("ahead", stats.guesses())?;
    out.set_item("updated", stats.updates())?;
    out.set_item("prefetch", (p.hits, p.late, p.demand, p.wasted, p.conflicts))?;
    out.set_item("engine", check(py, rt.engine_name())?)?;
    out.set_item("threads", check(py, rt.pool_threads())?)?;
    Ok(())
}
