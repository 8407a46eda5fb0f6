//! Saving: the state of the step at which it was asked for, read straight from the tiers while training goes on.
#![expect(unsafe_code, reason = "copies out of homes, and out of memory of the caller")]

use std::{collections::HashSet, sync::Arc};

use crate::{
    checkpoint::{Control, FrameBudget, GRAIN, Request, Save, SaveSource, master},
    device::{Gate, StreamRef},
    dtype::{DType, StateKind},
    error::{Code, Error, Result},
    io::{Direction, EngineOptions},
    quantities::UnitId,
    runtime::{
        handle::Runtime,
        saving::{
            budget::frame_budget,
            copy_on_update::{Next, PLAIN, group_of},
            read_ahead::ReadAhead,
        },
        shared::{Shared, closed::closed, settle::Until, waits::Interrupted},
    },
};

/// Between two looks at whether a save is still wanted.
const LOOK: std::time::Duration = std::time::Duration::from_millis(100);
/// Elements are widened through this many bytes.
const SCRATCH: usize = 64 << 10;

/// Where bytes lie.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    /// In the runtime, wherever it keeps them.
    Unit {
        /// The unit.
        unit: UnitId,
        /// Its section.
        section: usize,
        /// First element in the section.
        start: u64,
        /// Which state.
        kind: StateKind,
    },
    /// At an address that the caller keeps valid until the save has read it.
    Memory {
        /// First byte.
        address: u64,
        /// Whether it is memory of the device.
        on_device: bool,
    },
}

/// A tensor's bytes.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// The bytes, or a 16-bit parameter's.
    pub place: Place,
    /// Set where the fp32 master of a parameter of this type is wanted: with what it has beyond the parameter, or none
    /// where that is nothing.
    pub master: Option<(DType, Option<Place>)>,
}

/// Asked when all [`Place::Memory`] was read: whether any of it was changed meanwhile.
pub type Unchanged = Box<dyn Fn() -> Result<()> + Send>;

impl Source {
    fn group(&self) -> u32 {
        match self.place {
            Place::Unit { unit, .. } => group_of(unit),
            Place::Memory { .. } => PLAIN,
        }
    }
}

impl Runtime {
    /// Begins a save of the state as it is now, the updates submitted so far included. Waits for an earlier save first.
    ///
    /// # Errors
    /// `FN-E401` to `FN-E403`, `FN-E408`, `FN-E409`, with nothing begun; an interruption. What happens later is in
    /// the control.
    ///
    /// # Safety
    /// Addresses among the sources must stay valid until the save has ended.
    pub unsafe fn save(
        &self,
        mut request: Request,
        sources: Vec<Source>,
        unchanged: Unchanged,
        stream: u64,
        interrupted: Interrupted<'_>,
    ) -> Result<Arc<Control>> {
        self.shared()?.saves.wait(interrupted)?;
        let shared = self.shared.as_ref().ok_or_else(closed)?;
        shared.saves.stop();
        for (tensor, source) in request.tensors.iter_mut().zip(&sources) {
            tensor.group = source.group();
        }
        let (chunks, kept) = shared.chunks_kept();
        let budget = shared.frame_budget(kept)?;
        let memory = budget.bytes() + kept;
        begin(shared, request, sources, unchanged, (budget, chunks), memory, stream).inspect_err(|_| {
            shared.end_reads();
            shared.stats.returned(memory);
        })
    }

    /// Waits until the save under way has read a unit, whose last update it may wait for; at once if there is none.
    ///
    /// # Errors
    /// An interruption.
    pub fn preserve(&self, unit: UnitId, interrupted: Interrupted<'_>) -> Result<()> {
        self.shared()?.await_read(unit, interrupted)
    }

    /// Waits for the end of the save under way.
    ///
    /// # Errors
    /// An interruption.
    pub fn saved(&self, interrupted: Interrupted<'_>) -> Result<()> {
        self.shared()?.saves.wait(interrupted)
    }
}

/// Lays the checkpoint out, marks what must be read before it is overwritten, and starts the thread that reads it.
fn begin(
    shared: &Arc<Shared>,
    request: Request,
    sources: Vec<Source>,
    unchanged: Unchanged,
    (budget, chunks): (FrameBudget, u64),
    memory: u64,
    stream: u64,
) -> Result<Arc<Control>> {
    let save = Save::new(request)?;
    let control = Arc::new(Control::default());
    // Masters are put together from two places, chunk by chunk as they are wanted.
    let in_order = chunks > 0 && sources.iter().all(|source| source.master.is_none());
    let ahead = if in_order { Some(ReadAhead::new(shared, chunks, &control)?) } else { None };
    let saved: HashSet<u32> = sources.iter().map(Source::group).collect();
    let (homes, after): (Vec<Gate>, Gate) = {
        let mut inner = shared.lock()?;
        let after = shared.device.record(StreamRef::Compute(stream))?;
        let updating = |u| Until::Whole.pending(&inner.machine, u);
        let units = shared.layout.ids().map(|u| (saved.contains(&group_of(u)), updating(u)));
        shared.saves.begin(std::iter::once((saved.contains(&PLAIN), false)).chain(units));
        let units = || shared.layout.ids().filter(|u| saved.contains(&group_of(*u)));
        shared.begin_reads(units());
        shared.bring_home(&mut inner, units())?;
        (inner.gates.iter().map(|g| g.home).collect(), after)
    };
    let (worker, watched) = (Arc::clone(shared), Arc::clone(&control));
    let work = move || {
        let run = || {
            let chunks = Vec::new();
            let control = &*watched;
            let snapshot = &mut Snapshot { shared: &worker, control, sources, homes, after, unchanged, ahead, chunks };
            save.run(snapshot, &budget, &watched)
        };
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
        worker.end_reads();
        worker.stats.returned(memory);
        watched.ended(outcome.unwrap_or_else(|_| Err(Error::new(Code::Panicked, "a save panicked."))));
    };
    let failed = |e| crate::os_error::no_thread("a save", &e, "");
    let thread = crate::os_error::start_thread("funicular-save", work).map_err(failed)?;
    shared.saves.keep(&control, thread);
    Ok(control)
}

/// Saves what is in the caller's memory, without a runtime.
///
/// # Errors
/// As [`Runtime::save`].
///
/// # Safety
/// As [`Runtime::save`].
pub unsafe fn save_plain(request: Request, sources: Vec<Source>, unchanged: Unchanged) -> Result<Arc<Control>> {
    let budget = frame_budget(u64::MAX, &(EngineOptions::default(), true))?;
    let save = Save::new(request)?;
    let control = Arc::new(Control::default());
    let watched = Arc::clone(&control);
    let work = move || {
        let run = || save.run(&mut Plain { sources, unchanged, read: false }, &budget, &watched);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
        watched.ended(outcome.unwrap_or_else(|_| Err(Error::new(Code::Panicked, "a save panicked."))));
    };
    let failed = |e| crate::os_error::no_thread("a save", &e, "");
    crate::os_error::start_thread("funicular-save", work).map_err(failed)?;
    Ok(control)
}

struct Plain {
    sources: Vec<Source>,
    unchanged: Unchanged,
    read: bool,
}

impl SaveSource for Plain {
    fn next(&mut self, control: &Control) -> Result<Option<u32>> {
        control.check()?;
        Ok(if std::mem::replace(&mut self.read, true) { None } else { Some(PLAIN) })
    }

    fn fetch(&mut self, tensor: usize, at: u64, out: &mut [u8]) -> Result<()> {
        fetch(&self.sources[tensor], at, out, &mut |place, at, out| match place {
            Place::Memory { address, .. } => {
                // SAFETY: the caller of `save_plain` vouches for the address; `out` is a frame.
                unsafe { std::ptr::copy_nonoverlapping((address + at) as *const u8, out.as_mut_ptr(), out.len()) };
                Ok(())
            }
            Place::Unit { .. } => Err(Error::new(Code::Stale, "there is no runtime to save from.")),
        })
    }

    fn grain(&self, _tensor: usize) -> usize {
        GRAIN
    }

    fn copied(&mut self, _group: u32) -> Result<()> {
        (self.unchanged)()
    }
}

/// Reads bytes of a place, from an offset on.
type ReadPlace<'a> = dyn FnMut(Place, u64, &mut [u8]) -> Result<()> + 'a;

/// Bytes of a source from a place's bytes.
fn fetch(source: &Source, at: u64, out: &mut [u8], read: &mut ReadPlace<'_>) -> Result<()> {
    let Some((dtype, rest)) = source.master else { return read(source.place, at, out) };
    let rest_size = StateKind::Master.element_size(dtype);
    let (mut params, mut rests) = (vec![0; SCRATCH], vec![0; SCRATCH / 2 * rest_size]);
    for (i, piece) in out.chunks_mut(SCRATCH / 2 * 4).enumerate() {
        let (first, n) = (at / 4 + (i * SCRATCH / 2) as u64, piece.len() / 4);
        let params = &mut params[..n * 2];
        read(source.place, first * 2, params)?;
        let rest = match rest {
            None => None,
            Some(place) => {
                let rests = &mut rests[..n * rest_size];
                read(place, first * rest_size as u64, rests)?;
                Some(&*rests)
            }
        };
        master(dtype, params, rest, piece);
    }
    Ok(())
}

/// A chunk of a segment on NVMe, kept because the next bytes asked for begin in it.
struct KeptChunk {
    segment: usize,
    start: u64,
    bytes: Vec<u8>,
}

/// The segment in which a place of the runtime lies, if that is on NVMe, and its first byte there.
fn on_disk(shared: &Shared, place: Place) -> Option<(usize, u64)> {
    let Place::Unit { unit, section, start, kind } = place else { return None };
    let segment = shared.disk.as_ref()?.map.segment(unit, section, kind)?;
    let packed = &shared.layout.unit(unit).sections[section];
    Some((segment, start * kind.element_size(packed.dtype) as u64))
}

/// Waits for a gate, for as long as the save is wanted.
fn block(shared: &Shared, gate: Gate, control: &Control) -> Result<()> {
    while !shared.device.block(gate, LOOK)? {
        control.check()?;
    }
    Ok(())
}

/// What ended a wait of a save that was given up is that it was given up.
fn given_up(control: &Control, error: Error) -> Error {
    if error.code() == Code::Interrupted { control.check().err().unwrap_or(error) } else { error }
}

struct Snapshot<'a> {
    shared: &'a Shared,
    control: &'a Control,
    sources: Vec<Source>,
    /// What was still being written to the homes when the save began.
    homes: Vec<Gate>,
    after: Gate,
    unchanged: Unchanged,
    ahead: Option<ReadAhead>,
    chunks: Vec<KeptChunk>,
}

impl Snapshot<'_> {
    fn read(
        (shared, control): (&Shared, &Control),
        chunks: &mut Vec<KeptChunk>,
        place: Place,
        at: u64,
        out: &mut [u8],
    ) -> Result<()> {
        let (unit, section, start, kind) = match place {
            Place::Unit { unit, section, start, kind } => (unit, section, start, kind),
            Place::Memory { address, on_device: false } => {
                // SAFETY: the caller of `save` vouches for the address; `out` is a frame.
                unsafe { std::ptr::copy_nonoverlapping((address + at) as *const u8, out.as_mut_ptr(), out.len()) };
                return Ok(());
            }
            Place::Memory { address, on_device: true } => {
                // What is on the stream already may wait for anything, and the save be given up meanwhile.
                block(shared, shared.device.record(StreamRef::Down)?, control)?;
                // SAFETY: as above; the copy is waited for in every case: the frame is the device's until then.
                unsafe { shared.device.copy(StreamRef::Down, out.as_mut_ptr() as u64, address + at, out.len())? };
                let gate = shared.device.record(StreamRef::Down)?;
                while !shared.device.block(gate, LOOK)? {}
                return control.check();
            }
        };
        if let Some((segment, first)) = on_disk(shared, place) {
            let read = Self::read_segment((shared, control), chunks, segment, first + at, out);
            return read.map_err(|e| given_up(control, e));
        }
        let packed = &shared.layout.unit(unit).sections[section];
        let first = start * kind.element_size(packed.dtype) as u64 + at;
        let home = shared.homes.address(unit, section, packed.offset, kind);
        if home == 0 {
            let text = format!("'{}' has no {}.", shared.layout.unit(unit).name, kind.name());
            return Err(Error::new(Code::Stale, text));
        }
        // SAFETY: the range lies in the state's home; no thread writes it before the save has read the unit.
        unsafe { std::ptr::copy_nonoverlapping((home + first) as *const u8, out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    /// Bytes of a segment on NVMe; the last chunk is kept, since that is where the next read begins.
    fn read_segment(
        (shared, control): (&Shared, &Control),
        chunks: &mut Vec<KeptChunk>,
        segment: usize,
        first: u64,
        out: &mut [u8],
    ) -> Result<()> {
        let mut done = 0;
        if let Some(kept) = chunks.iter().find(|c| c.segment == segment)
            && (kept.start..kept.start + kept.bytes.len() as u64).contains(&first)
        {
            let from = (first - kept.start) as usize;
            done = out.len().min(kept.bytes.len() - from);
            out[..done].copy_from_slice(&kept.bytes[from..from + done]);
        }
        if done == out.len() {
            return Ok(());
        }
        let (first, out) = (first + done as u64, &mut out[done..]);
        let end = first + out.len() as u64;
        let mut last = KeptChunk { segment, start: 0, bytes: Vec::new() };
        if let Some(at) = chunks.iter().position(|c| c.segment == segment) {
            last.bytes = chunks.swap_remove(at).bytes;
        } else if chunks.len() > 1 {
            last.bytes = chunks.remove(0).bytes;
        }
        last.bytes.clear();
        let (disk, stop) = (shared.disk()?, &mut || control.check().is_err());
        shared.segment_io(disk, segment, first..end, Direction::Read, stop, &mut |piece, at| {
            let (from, to) = (first.max(at as u64), end.min((at + piece.len()) as u64));
            let inside = (from as usize - at)..(to as usize - at);
            out[(from - first) as usize..(to - first) as usize].copy_from_slice(&piece[inside]);
            if (at + piece.len()) as u64 > end {
                last.start = at as u64;
                last.bytes.clear();
                last.bytes.extend_from_slice(piece);
            }
        })?;
        chunks.push(last);
        Ok(())
    }
}

impl Shared {
    /// Waits until what was updated of a unit is on NVMe. Its next update may be queued, or wait for this save.
    fn wait_written(&self, unit: UnitId, interrupted: &mut dyn FnMut() -> bool) -> Result<()> {
        let what = || format!("writes of '{}'", self.layout.unit(unit).name);
        self.wait(self.lock()?, &what, interrupted, |i| Ok((!i.machine.writing(unit)).then_some(())))
    }
}

impl SaveSource for Snapshot<'_> {
    fn next(&mut self, control: &Control) -> Result<Option<u32>> {
        let group = loop {
            control.check()?;
            drop(self.shared.lock()?);
            match self.shared.saves.next() {
                Next::Group(group) => break group,
                Next::Later => {}
                Next::Nothing => return Ok(None),
            }
        };
        if group == PLAIN {
            block(self.shared, self.after, control)?;
            return Ok(Some(group));
        }
        let unit = UnitId(group - 1);
        block(self.shared, self.homes[unit.index()], control)?;
        let written = self.shared.wait_written(unit, &mut || control.check().is_err());
        written.map_err(|e| given_up(control, e))?;
        let current = self.shared.states_current(unit, &mut || control.check().is_err());
        current.map_err(|e| given_up(control, e))?;
        self.chunks.clear();
        Ok(Some(group))
    }

    fn expect(&mut self, tensors: &mut dyn Iterator<Item = (usize, u64)>) -> Result<()> {
        let Some(ahead) = &mut self.ahead else { return Ok(()) };
        for (tensor, bytes) in tensors {
            if let Some((segment, first)) = on_disk(self.shared, self.sources[tensor].place) {
                ahead.ask(segment, first..first + bytes)?;
            }
        }
        Ok(())
    }

    fn fetch(&mut self, tensor: usize, at: u64, out: &mut [u8]) -> Result<()> {
        let Self { shared, control, sources, chunks, ahead, .. } = self;
        let source = &sources[tensor];
        match (ahead, on_disk(shared, source.place)) {
            (Some(ahead), Some((segment, first))) => ahead.read(segment, first + at, out)?,
            _ => fetch(source, at, out, &mut |place, at, out| Self::read((shared, control), chunks, place, at, out))?,
        }
        // A thread that waits for an update, which waits for this save, sees that something moves.
        shared.inner.lock().events += 1;
        Ok(())
    }

    fn grain(&self, tensor: usize) -> usize {
        let place = self.sources[tensor].place;
        let on_device = matches!(place, Place::Memory { on_device: true, .. });
        // A disk, or a device, is asked for as much as there is room for; what is in memory is summed piece by piece.
        if on_device || (self.ahead.is_none() && on_disk(self.shared, place).is_some()) { usize::MAX } else { GRAIN }
    }

    fn copied(&mut self, group: u32) -> Result<()> {
        if group == PLAIN {
            (self.unchanged)()?;
        }
        self.shared.end_read(group);
        Ok(())
    }
}
