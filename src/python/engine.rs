//! `Engine`: one model's runtime, as the wrapper calls it. Units and streams are numbers; sizes are bytes.
//!
//! E1: every call of the runtime goes through [`Engine::call`], without the GIL, so that the threads it waits for can run
//! Python.
//! E2: `slot` is locked to copy or take the handle in it, never during a call. `close` empties it, ends the waits of the calls under
//! way, and the last of them ends the runtime. E3: numbers from Python are checked before they become indices.
#![expect(unsafe_code, reason = "passes raw addresses of tensors to the runtime")]

use std::{
    cell::Cell,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use pyo3::{prelude::*, types::PyDict};

use super::{
    arguments::{
        PlaceTuple, address, elements, kind, known, phase, rank_spec, resident_update, split, step_hypers, unit_specs,
        unit_update,
    },
    dlpack,
    failures::{check, guarded, raise, waiting},
    figures::Figures,
    records::{Hyper, Param, Ranks, ResidentUpdate, UnitUpdate},
};
use funicular::{
    device::DeviceKind,
    error::{Code, Error, Result},
    io::Direction,
    memory::set_aside,
    model::Layout,
    policy::Policy,
    quantities::ByteCount,
    runtime::{Interrupted, Runtime, check_process, closed, shares_processor},
};

thread_local! {
    /// Calls of runtimes under way in this thread: a signal handler may make one within another.
    static CALLS: Cell<u32> = const { Cell::new(0) };
}

/// One offloaded model.
#[pyclass(frozen, module = "funicular._core")]
pub struct Engine {
    slot: Mutex<Option<Arc<Runtime>>>,
    /// Calls that have not returned to Python.
    inside: AtomicU32,
    pid: u32,
}

/// How often [`Engine::close`] looks whether calls under way have ended, and (`SLICE`) at signals.
const LOOK: Duration = Duration::from_micros(200);
const SLICE: Duration = Duration::from_millis(50);

/// Counts a call until it is dropped.
struct Call;

impl Call {
    fn begin() -> Self {
        CALLS.set(CALLS.get() + 1);
        Self
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        CALLS.set(CALLS.get() - 1);
    }
}

/// Counts a call until it is dropped, with the GIL held again.
struct Inside<'a>(&'a AtomicU32);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Drop for Engine {
    /// Python drops it with the GIL held, which a save that ends here may need: release the GIL.
    fn drop(&mut self) {
        if let Some(runtime) = self.slot.get_mut().take() {
            // If Python has ended, the closure and its runtime are dropped without being called.
            Python::try_attach(move |py| py.detach(move || drop(runtime)));
        }
    }
}

impl Engine {
    /// Calls the runtime without the GIL; the second argument tells a wait whether a signal ends it.
    pub(super) fn call<R: Send>(
        &self,
        py: Python<'_>,
        f: impl FnOnce(&Runtime, Interrupted<'_>) -> Result<R> + Send,
    ) -> PyResult<R> {
        // Refuse before the GIL is released: a thread that calls a closed engine must not be without it when the
        // interpreter ends.
        if self.slot.try_lock().is_some_and(|slot| slot.is_none()) {
            return Err(raise(py, &closed()));
        }
        self.inside.fetch_add(1, Ordering::AcqRel);
        let _inside = Inside(&self.inside);
        waiting(py, |interrupted| {
            // Before the lock: in a forked child a thread of the parent may hold it for ever.
            check_process(self.pid)?;
            // If there is no address space left, the call is tried all the same.
            let _ = set_aside();
            let runtime = self.slot.lock().clone().ok_or_else(closed)?;
            let _call = Call::begin();
            guarded(|| f(&runtime, interrupted)).inspect_err(|error| {
                if error.code() == Code::Panicked {
                    // What the call changed is half done.
                    runtime.fail(error.clone());
                }
                runtime.failure_seen(error);
            })
        })
    }
}

#[pymethods]
impl Engine {
    /// Plans and starts. `units` is a list of (name, parameters); `policy` is resolved JSON; `freed` bytes of host memory are
    /// given back as the model moves in. `ranks`: which of several it is.
    #[new]
    #[pyo3(signature = (units, policy, freed = 0, ranks = None))]
    fn new(
        py: Python<'_>,
        units: Vec<(String, Vec<Param>)>,
        policy: &str,
        freed: u64,
        ranks: Option<Ranks>,
    ) -> PyResult<Self> {
        let opened = py.detach(|| {
            guarded(|| {
                set_aside()?;
                let layout = Layout::new(&unit_specs(units)?)?;
                Runtime::open(layout, &Policy::from_json_str(policy, "policy")?, ByteCount(freed), rank_spec(ranks)?)
            })
        });
        let slot = Mutex::new(Some(Arc::new(check(py, opened)?)));
        Ok(Self { slot, inside: AtomicU32::new(0), pid: std::process::id() })
    }

    /// "host" or "cuda:N".
    fn device(&self, py: Python<'_>) -> PyResult<String> {
        let kind = self.call(py, |rt, _| Ok(rt.device()?.kind()))?;
        Ok(match kind {
            DeviceKind::Host => "host".into(),
            DeviceKind::Cuda(n) => format!("cuda:{n}"),
        })
    }

    /// True where updates and compute share a processor.
    fn shares_processor(&self, py: Python<'_>) -> PyResult<bool> {
        self.call(py, |rt, _| Ok(shares_processor(rt.device()?.kind())))
    }

    /// Places of a unit's parameters, in the order given.
    fn places(&self, py: Python<'_>, unit: u32) -> PyResult<Vec<PlaceTuple>> {
        self.call(py, |rt, _| {
            let packed = rt.layout()?.unit(known(rt, unit)?);
            Ok(packed
                .params
                .iter()
                .map(|p| {
                    let s = &packed.sections[p.section];
                    (p.section, p.start, p.numel, s.offset + p.start * s.dtype.size() as u64)
                })
                .collect())
        })
    }

    /// (parameter tier, optimizer tier, gradient tier) of a unit.
    fn homes(&self, py: Python<'_>, unit: u32) -> PyResult<(&'static str, &'static str, &'static str)> {
        self.call(py, |rt, _| {
            let homes = rt.placement()?.homes[known(rt, unit)?.index()];
            Ok((homes.params.name(), homes.optimizer.name(), homes.grads.name()))
        })
    }

    /// True if the unit has a spare copy of its states, so that its update may begin before the step.
    fn has_spare_copy(&self, py: Python<'_>, unit: u32) -> PyResult<bool> {
        self.call(py, |rt, _| Ok(rt.placement()?.spare[known(rt, unit)?.index()]))
    }

    /// Other units whose frames overlap this unit's.
    fn neighbours(&self, py: Python<'_>, unit: u32) -> PyResult<Vec<u32>> {
        self.call(py, |rt, _| {
            let id = known(rt, unit)?;
            let plan = rt.placement()?;
            let others = rt.layout()?.ids().filter(|&v| v != id && plan.share_frames(id, v));
            Ok(others.map(|v| v.0).collect())
        })
    }

    /// DLPack capsule over the unit's frames, or `part` (offset, bytes) of them, on the device.
    #[pyo3(signature = (unit, part = None))]
    fn frame_buffer(&self, py: Python<'_>, unit: u32, part: Option<(u64, u64)>) -> PyResult<Py<PyAny>> {
        self.buffer(py, unit, "frame", true, part)
    }

    /// DLPack capsule over the unit's home, or `part` of it, as memory of the device or of the host.
    #[pyo3(signature = (unit, on_device, part = None))]
    fn home_buffer(&self, py: Python<'_>, unit: u32, on_device: bool, part: Option<(u64, u64)>) -> PyResult<Py<PyAny>> {
        self.buffer(py, unit, "home", on_device, part)
    }

    /// DLPack capsule over the unit's gradients, or `part` of them.
    #[pyo3(signature = (unit, part = None))]
    fn grad_buffer(&self, py: Python<'_>, unit: u32, part: Option<(u64, u64)>) -> PyResult<Py<PyAny>> {
        self.buffer(py, unit, "grad", true, part)
    }

    /// DLPack capsule over page-locked host memory for activations: `wanted` bytes, or from `least` on what is left.
    fn activation_buffer(&self, py: Python<'_>, least: u64, wanted: u64) -> PyResult<Py<PyAny>> {
        let (region, device) =
            self.call(py, |rt, _| Ok((rt.activation_region(least, wanted)?, Arc::clone(rt.device()?))))?;
        let (address, len) = (region.as_ptr() as u64, region.len() as u64);
        dlpack::capsule(py, address, len, DeviceKind::Host, Box::new((region, device)))
    }

    /// Opens a window; false: use the home. `None` as the phase: fills the frames of a window anew.
    fn open(&self, py: Python<'_>, unit: u32, in_phase: Option<u8>, stream: u64) -> PyResult<bool> {
        self.call(py, |rt, i| rt.open_window(known(rt, unit)?, in_phase.map(phase).transpose()?, stream, i))
    }

    /// Ends a window.
    fn release(&self, py: Python<'_>, unit: u32, stream: u64) -> PyResult<()> {
        self.call(py, |rt, i| rt.release(known(rt, unit)?, stream, i))
    }

    /// The home was edited by work on `stream`.
    fn invalidate(&self, py: Python<'_>, unit: u32, stream: u64) -> PyResult<()> {
        self.call(py, |rt, _| rt.invalidate(known(rt, unit)?, stream))
    }

    /// The frames were edited: bring them home.
    fn write_back(&self, py: Python<'_>, unit: u32, stream: u64) -> PyResult<()> {
        self.call(py, |rt, i| rt.write_back(known(rt, unit)?, stream, i))
    }

    /// Copies a gradient down; returns a number for `landed`. `keep`: other gradients of the unit have to stay as they are.
    #[pyo3(signature = (unit, offset, src, len, stream, keep = true))]
    fn gradient(
        &self,
        py: Python<'_>,
        unit: u32,
        offset: u64,
        src: u64,
        len: u64,
        stream: u64,
        keep: bool,
    ) -> PyResult<u64> {
        self.call(py, |rt, i| {
            let (unit, src) = (known(rt, unit)?, address(src, len)?);
            // SAFETY: the wrapper passes a live tensor's address and size, and keeps it until the copy has landed.
            unsafe { rt.gradient(unit, (offset, keep), src, len, stream, i) }
        })
    }

    /// True if that gradient copy is over.
    fn landed(&self, py: Python<'_>, seq: u64) -> PyResult<bool> {
        self.call(py, |rt, _| rt.landed(seq))
    }

    /// Makes `stream` wait for that gradient copy.
    fn wait_landed(&self, py: Python<'_>, seq: u64, stream: u64) -> PyResult<()> {
        self.call(py, |rt, i| rt.wait_landed(seq, stream, i))
    }

    /// Makes `stream` wait for all gradient copies.
    fn wait_gradients(&self, py: Python<'_>, stream: u64) -> PyResult<()> {
        self.call(py, |rt, i| rt.wait_gradients(stream, i))
    }

    /// Starts an optimizer step.
    fn update(
        &self,
        py: Python<'_>,
        updates: Vec<UnitUpdate>,
        hypers: Vec<Hyper>,
        residents: Vec<ResidentUpdate>,
        stream: u64,
        wait: bool,
    ) -> PyResult<()> {
        self.call(py, |rt, i| {
            let hypers = step_hypers(&hypers)?;
            let updates = updates.iter().map(|u| unit_update(rt, u, hypers.len())).collect::<Result<Vec<_>>>()?;
            if !updates.is_sorted_by(|a, b| a.unit < b.unit) {
                return Err(Error::argument("the units of a step are not in order, once each."));
            }
            let residents = residents.iter().map(|r| resident_update(r, &hypers)).collect::<Result<Vec<_>>>()?;
            // SAFETY: the wrapper passes addresses of live, dense tensors on the device; torch reuses their memory only in the order
            // of this stream.
            unsafe { rt.update(&updates, &hypers, &residents, stream, wait, i) }
        })
    }

    /// Begins a speculative update: a unit's next one, before its step. True if it was begun.
    fn speculate(&self, py: Python<'_>, update: UnitUpdate, hypers: Vec<Hyper>, stream: u64) -> PyResult<bool> {
        self.call(py, |rt, _| {
            let hypers = step_hypers(&hypers)?;
            rt.update_speculatively(&unit_update(rt, &update, hypers.len())?, &hypers, stream)
        })
    }

    /// Drops the unit's speculative update, if there is one.
    fn drop_speculation(&self, py: Python<'_>, unit: u32) -> PyResult<()> {
        self.call(py, |rt, _| rt.drop_speculation(known(rt, unit)?))
    }

    /// Brings a factor of gradients (an fp32 value on the device) down; returns its slot.
    fn factor(&self, py: Python<'_>, src: u64, stream: u64) -> PyResult<u32> {
        self.call(py, |rt, _| {
            let src = address(src, 4)?;
            // SAFETY: the wrapper passes a live tensor's address; torch reuses its memory only in the order of this stream.
            unsafe { rt.factor(src, stream) }
        })
    }

    /// Optimizer steps submitted so far.
    fn steps(&self, py: Python<'_>) -> PyResult<u64> {
        self.call(py, |rt, _| Ok(rt.stats()?.steps()))
    }

    /// True once the runtime has failed and the caller has been told.
    fn failed(&self, py: Python<'_>) -> PyResult<bool> {
        self.call(py, |rt, _| rt.failed())
    }

    /// Waits until the unit's home is current.
    fn settle(&self, py: Python<'_>, unit: u32, stream: u64) -> PyResult<()> {
        self.call(py, |rt, i| rt.settle(known(rt, unit)?, stream, i))
    }

    /// True until the unit's last update is made as a whole.
    fn update_unmade(&self, py: Python<'_>, unit: u32) -> PyResult<bool> {
        self.call(py, |rt, _| rt.update_unmade(known(rt, unit)?))
    }

    /// Waits until the unit's last update is made; its home may be older.
    fn settle_update(&self, py: Python<'_>, unit: u32, stream: u64) -> PyResult<()> {
        self.call(py, |rt, i| rt.settle_update(known(rt, unit)?, stream, i))
    }

    /// Waits until no update is under way and all homes are current.
    fn settle_all(&self, py: Python<'_>) -> PyResult<()> {
        self.call(py, |rt, i| rt.settle_all(i))
    }

    /// Reads NVMe-resident parameters into their shadow.
    fn fault_in(&self, py: Python<'_>, unit: u32, stream: u64) -> PyResult<()> {
        self.call(py, |rt, i| rt.fault_in(known(rt, unit)?, stream, i))
    }

    /// If the unit was brought because something touched it: digests of its parameters as they were brought, once.
    fn adopt_fault(&self, py: Python<'_>, unit: u32) -> PyResult<Option<Vec<u64>>> {
        self.call(py, |rt, _| rt.adopt_fault(known(rt, unit)?))
    }

    /// Makes the shadow writable for its first contents.
    fn blank_shadow(&self, py: Python<'_>, unit: u32) -> PyResult<()> {
        self.call(py, |rt, _| rt.blank_shadow(known(rt, unit)?))
    }

    /// Stores the shadow.
    fn store_shadow(&self, py: Python<'_>, unit: u32, stream: u64) -> PyResult<()> {
        self.call(py, |rt, i| rt.store_shadow(known(rt, unit)?, stream, i))
    }

    /// Reads a filled shadow anew: its unit was updated while tensors looked at it.
    fn refresh_shadow(&self, py: Python<'_>, unit: u32, stream: u64) -> PyResult<()> {
        self.call(py, |rt, i| rt.refresh_shadow(known(rt, unit)?, stream, i))
    }

    /// Counts bytes of the caller's memory that hold what was read.
    fn lend(&self, py: Python<'_>, bytes: u64) -> PyResult<()> {
        self.call(py, |rt, _| rt.lend(bytes))
    }

    /// The caller dropped bytes that it had counted by `lend`.
    fn returned(&self, py: Python<'_>, bytes: u64) -> PyResult<()> {
        self.call(py, |rt, _| rt.returned(bytes))
    }

    /// Gives the shadow's memory back.
    fn discard_shadow(&self, py: Python<'_>, unit: u32) -> PyResult<()> {
        self.call(py, |rt, _| rt.discard_shadow(known(rt, unit)?))
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
        self.state(py, (unit, section, state), (start, len), dst, Direction::Read)
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
        self.state(py, (unit, section, state), (start, len), src, Direction::Write)
    }

    /// Chooses what makes updates from now on: `processor`, `lanes`, `rates` or `halves`; false where there are no lanes. For
    /// measurements and tests: the bits do not depend on it.
    fn split_updates(&self, py: Python<'_>, split: &str) -> PyResult<bool> {
        self.call(py, |rt, _| rt.set_update_on(self::split(split)?))
    }

    /// Everything counted so far.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        self.call(py, |rt, _| Figures::of(rt))?.into_dict(py)
    }

    /// Starts or stops collecting a trace.
    fn trace(&self, py: Python<'_>, on: bool) -> PyResult<()> {
        self.call(py, |rt, _| rt.set_trace(on))
    }

    /// Writes the trace collected so far; returns the number of events.
    fn write_trace(&self, py: Python<'_>, path: &str) -> PyResult<usize> {
        self.call(py, |rt, i| rt.write_trace(std::path::Path::new(path), i))
    }

    /// Things worth knowing about how it was set up.
    fn notes(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        self.call(py, |rt, _| Ok(rt.notes().to_vec()))
    }

    /// Ends everything and gives memory and disk space back. Calls under way in other threads fail with `FN-E104`, and are waited
    /// for; called within a call of this thread, as by a signal handler, it leaves the end of the runtime to that call.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        if check_process(self.pid).is_err() {
            return Ok(());
        }
        waiting(py, |interrupted| {
            let Some(runtime) = self.slot.lock().take() else { return Ok(()) };
            runtime.shut();
            // The last holder of the runtime ends it.
            drop(runtime);
            let mut waited = Duration::ZERO;
            while CALLS.get() == 0 && self.inside.load(Ordering::Acquire) > 0 {
                std::thread::sleep(LOOK);
                waited += LOOK;
                if waited >= SLICE {
                    waited = Duration::ZERO;
                    if interrupted() {
                        return Err(Error::new(
                            Code::Interrupted,
                            "interrupted while waiting for other threads' calls.",
                        ));
                    }
                }
            }
            Ok(())
        })
    }
}

impl Engine {
    fn state(
        &self,
        py: Python<'_>,
        (unit, section, state): (u32, usize, &str),
        (start, len): (u64, u64),
        at: u64,
        direction: Direction,
    ) -> PyResult<()> {
        self.call(py, |rt, i| {
            let (id, state, at) = (known(rt, unit)?, kind(state)?, address(at, len)?);
            let elems = elements(rt.layout()?.unit(id), section, start, len)?;
            // SAFETY: the wrapper passes the address of a live host tensor of that many elements.
            unsafe { rt.state_io((id, section, state), elems, at as *mut u8, direction, i) }
        })
    }
}
