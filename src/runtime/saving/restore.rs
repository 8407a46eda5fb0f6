//! Loading: from files through frames into the tiers, wherever states live now.
#![expect(unsafe_code, reason = "fills homes, and memory of the caller")]

use std::{
    ops::Range,
    sync::atomic::{AtomicBool, Ordering},
};

use crate::{
    checkpoint::{Contents, Control, Conversion, Dtype, Found, FrameBudget, TensorReader},
    device::StreamRef,
    dtype::{DType, StateKind},
    error::{Code, Error, Result},
    io::{Direction, EngineOptions},
    model::Section,
    quantities::UnitId,
    runtime::{
        disk::{files::Disk, map::Map},
        handle::Runtime,
        measure::stats::Cause,
        saving::write_behind::WriteBehind,
        shared::{Shared, settle::Until, waits::Interrupted},
    },
};

/// Elements written at a time where what is around them is kept.
const PIECE_ELEMS: u64 = 1 << 16;
/// Bytes of memory that are asked for at a time.
const POPULATED: u64 = 2 << 20;

/// Elements of a state, and the tensor that they are loaded from; zeros without one.
#[derive(Clone, Debug)]
pub struct Item {
    /// The unit.
    pub unit: UnitId,
    /// Its section.
    pub section: usize,
    /// Which state.
    pub kind: StateKind,
    /// First element in the section.
    pub start: u64,
    /// Elements.
    pub len: u64,
    /// Whether the tensor is one of the optimizer's.
    pub optimizer: bool,
    /// Its name.
    pub tensor: Option<String>,
    /// Whether an fp32 tensor is the master of a 16-bit parameter, to be cut as an update would.
    pub master: bool,
}

/// Memory of the caller, and the tensor that it is filled from.
#[derive(Clone, Debug)]
pub struct Buffer {
    /// First byte.
    pub address: u64,
    /// Bytes.
    pub bytes: u64,
    /// Element type wanted.
    pub dtype: Dtype,
    /// Whether the tensor is one of the optimizer's.
    pub optimizer: bool,
    /// Its name.
    pub tensor: String,
    /// Whether it is what an fp32 master has beyond its parameter that is wanted, or the parameter itself.
    pub master: Option<StateKind>,
}

/// One thing to be filled, with everything about it decided.
struct Fill<'a> {
    item: Item,
    found: Option<&'a Found>,
    conversion: Conversion,
}

/// A load, and the memory that it may take: frames of its reader, chunks on their way to NVMe.
struct Work<'a> {
    contents: &'a Contents,
    fills: &'a [Fill<'a>],
    budget: &'a FrameBudget,
    chunks: u64,
    control: &'a Control,
}

impl Runtime {
    /// Loads states, after the work on `stream`; the units' windows are closed. `control` has the progress.
    ///
    /// # Errors
    /// `FN-E407` before anything is touched; later `FN-E406`, the runtime's first failure, or an interruption: then some
    /// of the states are loaded and some are not.
    pub fn restore(
        &self,
        contents: &Contents,
        items: Vec<Item>,
        control: &Control,
        stream: u64,
        interrupted: Interrupted<'_>,
    ) -> Result<()> {
        let shared = self.shared()?;
        let fills = fills(shared, contents, items)?;
        let units: std::collections::BTreeSet<UnitId> = fills.iter().map(|f| f.item.unit).collect();
        for &unit in &units {
            shared.await_update(unit, Some(stream), Until::Whole, interrupted)?;
            shared.await_read(unit, interrupted)?;
            shared.drop_speculation(unit);
            shared.states_home(unit, interrupted)?;
        }
        // Kernels may still read a home, and copies up and down may be on their way.
        for on in [StreamRef::Compute(stream), StreamRef::Down, StreamRef::Up] {
            let gate = shared.device.record(on)?;
            shared.block_gate(Some(stream), gate, Cause::Copy, interrupted)?;
        }
        let (chunks, kept) = shared.chunks_kept();
        let budget = shared.frame_budget(kept)?;
        let work = Work { contents, fills: &fills, budget: &budget, chunks, control };
        let result = aside(control, interrupted, || shared.fill(&work));
        shared.stats.returned(budget.bytes() + kept);
        result
    }
}

/// Fills the caller's memory from a checkpoint.
///
/// # Errors
/// As [`Runtime::restore`].
///
/// # Safety
/// The buffers must be valid for writing.
pub unsafe fn read_buffers(
    contents: &Contents,
    buffers: &[Buffer],
    control: &Control,
    interrupted: Interrupted<'_>,
) -> Result<()> {
    let budget = FrameBudget { engine: EngineOptions::default(), direct: true, frames: 4, frame: 8 << 20 };
    let mut work = Vec::new();
    for buffer in buffers {
        let found = find(contents, &buffer.tensor, buffer.optimizer)?;
        let conversion = match buffer.master {
            Some(kind) => cut(kind, found.dtype, buffer.dtype),
            None => Conversion::between(found.dtype, buffer.dtype),
        };
        let elements = (found.end - found.start) / (found.dtype.bitsize() as u64 / 8).max(1);
        let conversion = conversion.filter(|_| elements * (buffer.dtype.bitsize() as u64 / 8) == buffer.bytes);
        let conversion = conversion.ok_or_else(|| mismatch(found, &format!("{}", buffer.dtype)))?;
        // A tensor without elements has no address.
        if buffer.bytes > 0 {
            work.push((buffer, found, conversion));
        }
    }
    aside(control, interrupted, || {
        let tensors = work.iter().map(|(_, found, _)| *found).collect();
        let mut reader = TensorReader::open(contents, tensors, &budget, control)?;
        for (buffer, _, conversion) in &work {
            let out = match buffer.bytes {
                // A tensor without elements has no address.
                0 => &mut [][..],
                // SAFETY: the caller vouches for the buffer.
                bytes => unsafe { std::slice::from_raw_parts_mut(buffer.address as *mut u8, bytes as usize) },
            };
            reader.read(*conversion, out)?;
            reader.advance();
        }
        Ok(())
    })
}

/// Runs `work` on a thread of its own, so that the caller can be interrupted: it then cancels the work through `control`, and waits for its end.
///
/// # Errors
/// What `work` fails with; `FN-E106`.
pub fn aside(control: &Control, interrupted: Interrupted<'_>, work: impl FnOnce() -> Result<()> + Send) -> Result<()> {
    std::thread::scope(|scope| {
        let work = || {
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            let done = done.unwrap_or_else(|_| Err(Error::new(Code::Panicked, "a load panicked.")));
            control.ended(done.map(|()| Vec::new()));
        };
        let started = std::thread::Builder::new().name("funicular-load".into()).spawn_scoped(scope, work);
        started.map_err(|e| crate::os_error::no_thread("a load", &e, ""))?;
        let ended = control.wait(interrupted);
        if ended.is_err() {
            control.cancel();
        }
        ended.map(|_| ())
    })
}

fn find<'a>(contents: &'a Contents, name: &str, optimizer: bool) -> Result<&'a Found> {
    let set = if optimizer { &contents.optimizer } else { &contents.model };
    set.get(name).ok_or_else(|| {
        Error::new(Code::CheckpointMismatch, format!("{}: there is no '{name}'.", contents.path.display()))
            .action("Load a checkpoint of this model.")
    })
}

fn mismatch(found: &Found, wanted: &str) -> Error {
    let text = format!("'{}' is {} {:?}, which cannot become {wanted}.", found.name, found.dtype, found.shape);
    Error::new(Code::CheckpointMismatch, text).action("Load a checkpoint of this model.")
}

/// How an fp32 master becomes a parameter, or what it has beyond one.
fn cut(kind: StateKind, from: Dtype, to: Dtype) -> Option<Conversion> {
    match (kind, from, to) {
        (_, from, to) if from == to => Some(Conversion::Same),
        (StateKind::Param, Dtype::F32, Dtype::BF16) => Some(Conversion::High),
        (StateKind::Master, Dtype::F32, Dtype::I16) => Some(Conversion::Low),
        _ => Conversion::between(from, to),
    }
}

/// The type in a file of a state of a parameter.
fn stored(kind: StateKind, dtype: DType) -> Option<Dtype> {
    match (kind, dtype) {
        (StateKind::Param | StateKind::Grad, DType::F32) => Some(Dtype::F32),
        (StateKind::Param | StateKind::Grad, DType::Bf16) => Some(Dtype::BF16),
        (StateKind::Param | StateKind::Grad, DType::F16) => Some(Dtype::F16),
        (StateKind::Param | StateKind::Grad, DType::Opaque { .. }) => None,
        (StateKind::Master, DType::Bf16) => Some(Dtype::I16),
        _ => Some(Dtype::F32),
    }
}

fn fills<'a>(shared: &Shared, contents: &'a Contents, mut items: Vec<Item>) -> Result<Vec<Fill<'a>>> {
    items.retain(|i| i.len > 0);
    items.sort_by_key(|i| (i.unit, i.section, i.kind, i.start));
    items.into_iter().map(|item| fill_of(shared, contents, item)).collect()
}

fn fill_of<'a>(shared: &Shared, contents: &'a Contents, item: Item) -> Result<Fill<'a>> {
    let outside = || Error::argument(format!("{} has no such elements.", item.unit));
    let unit = shared.layout.units.get(item.unit.index()).ok_or_else(outside)?;
    let within = |s: &&Section| item.start.checked_add(item.len).is_some_and(|end| end <= s.elems);
    let section = unit.sections.get(item.section).filter(within).ok_or_else(outside)?;
    if section.bytes(item.kind) == 0 {
        return Err(Error::argument(format!("'{}' has no {}.", unit.name, item.kind.name())));
    }
    let Some(name) = &item.tensor else { return Ok(Fill { item, found: None, conversion: Conversion::Same }) };
    let found = find(contents, name, item.optimizer)?;
    let size = item.kind.element_size(section.dtype) as u64;
    let bytes = found.end - found.start;
    let conversion = match stored(item.kind, section.dtype) {
        // What is only bytes here was compared by the wrapper, which knows the type.
        None => Some(Conversion::Same).filter(|_| bytes == item.len * size),
        Some(to) => if item.master { cut(item.kind, found.dtype, to) } else { Conversion::between(found.dtype, to) }
            .filter(|c| bytes * c.sizes(size as usize).1 as u64 == item.len * size * c.sizes(size as usize).0 as u64),
    };
    let wanted = format!("{} elements of {:?} of '{}'", item.len, section.dtype, unit.name);
    let conversion = conversion.ok_or_else(|| mismatch(found, &wanted))?;
    Ok(Fill { item, found: Some(found), conversion })
}

impl Shared {
    fn fill(&self, work: &Work<'_>) -> Result<()> {
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // Without it the memory comes as it is written.
            let ahead = std::thread::Builder::new().name("funicular-load-2".into());
            let _ = ahead.spawn_scoped(scope, || self.populate(work.fills, &over));
            let filled = self.fill_all(work);
            over.store(true, Ordering::Relaxed);
            filled
        })
    }

    /// Goes ahead of [`Self::fill_all`], so that it meets memory that is there.
    fn populate(&self, fills: &[Fill<'_>], over: &AtomicBool) {
        for Fill { item, .. } in fills {
            let packed = &self.layout.unit(item.unit).sections[item.section];
            let size = item.kind.element_size(packed.dtype) as u64;
            let (start, end) = (item.start * size, (item.start + item.len) * size);
            for at in (start..end).step_by(POPULATED as usize) {
                if over.load(Ordering::Relaxed) {
                    return;
                }
                let bytes = at..end.min(at + POPULATED);
                self.homes.populate(item.unit, item.section, packed.offset, item.kind, bytes);
            }
        }
    }

    fn fill_all(&self, &Work { contents, fills, budget, chunks, control }: &Work<'_>) -> Result<()> {
        let tensors = fills.iter().filter_map(|f| f.found).collect();
        let mut reader = TensorReader::open(contents, tensors, budget, control)?;
        let writer = self.disk.as_ref().map(|disk| WriteBehind::new(self, disk, chunks, control));
        let mut writer = writer.transpose()?;
        for segment in fills.chunk_by(|a, b| key(a) == key(b)) {
            let (unit, _, kind) = key(&segment[0]);
            self.settle_disk(unit, &mut || control.check().is_err())?;
            if kind != StateKind::Param {
                self.fill_segment(segment, &mut reader, writer.as_mut(), control)?;
                continue;
            }
            self.event(|m, _| m.begin_write(unit))?;
            let what = || format!("a read of '{}'", self.layout.unit(unit).name);
            let quiet = self.wait(self.lock()?, &what, &mut || control.check().is_err(), |i| {
                Ok((!i.machine.reading(unit)).then_some(()))
            });
            let filled = quiet.and_then(|()| self.fill_segment(segment, &mut reader, writer.as_mut(), control));
            // Before any thread reads them again.
            let filled = filled.and(writer.as_mut().map_or(Ok(()), WriteBehind::finish));
            self.event(|m, out| {
                // A copy out of the home that was enqueued before is of no use.
                m.invalidate(unit);
                m.end_write(unit, out);
            })?;
            filled?;
        }
        writer.as_mut().map_or(Ok(()), WriteBehind::finish)
    }

    /// Fills one state of one section; what goes to NVMe may still be on its way.
    fn fill_segment(
        &self,
        fills: &[Fill<'_>],
        reader: &mut TensorReader<'_>,
        writer: Option<&mut WriteBehind<'_>>,
        control: &Control,
    ) -> Result<()> {
        let Item { unit, section, kind, .. } = fills[0].item;
        let packed = &self.layout.unit(unit).sections[section];
        let size = kind.element_size(packed.dtype);
        let on_disk = self.disk.as_ref().and_then(|d| Some((d, d.map.segment(unit, section, kind)?)));
        let (Some((disk, segment)), Some(writer)) = (on_disk, writer) else {
            let home = self.homes.address(unit, section, packed.offset, kind);
            for fill in fills {
                control.check()?;
                let (start, len) = (fill.item.start as usize * size, fill.item.len as usize * size);
                // SAFETY: `fill_of` found the elements in the section; its home is settled, and nothing reads it now.
                let out = unsafe { std::slice::from_raw_parts_mut((home as usize + start) as *mut u8, len) };
                fill.read(reader, out)?;
                fill.over(reader);
            }
            return Ok(());
        };
        let covered = fills.iter().map(|f| f.item.len).sum::<u64>();
        let places = self.layout.unit(unit).params.iter().filter(|p| p.section == section);
        if covered < places.map(|p| p.numel).sum() {
            return self.fill_around((disk, segment), fills, size, reader, control);
        }
        let (mut next, store) = (0, &disk.store);
        for chunk in Map::store_chunks(store, 0..packed.bytes(kind)) {
            let mut lease = writer.chunk()?;
            let piece = &mut lease.bytes()[..store.chunk_len(segment, chunk) as usize];
            fill_piece(fills, &mut next, size, piece, chunk as usize * store.chunk_bytes() as usize, reader)?;
            writer.write(segment, chunk, lease)?;
        }
        Ok(())
    }

    /// Fills part of a segment on NVMe, and keeps the rest: another optimizer's states, parameters of other strides.
    fn fill_around(
        &self,
        (disk, segment): (&Disk, usize),
        fills: &[Fill<'_>],
        size: usize,
        reader: &mut TensorReader<'_>,
        control: &Control,
    ) -> Result<()> {
        let mut buffer = vec![0; PIECE_ELEMS as usize * size];
        for fill in fills {
            let Item { start, len, .. } = fill.item;
            for first in (start..start + len).step_by(PIECE_ELEMS as usize) {
                let range = first as usize * size..(first + PIECE_ELEMS).min(start + len) as usize * size;
                let bytes = &mut buffer[..range.len()];
                fill.read(reader, bytes)?;
                let (address, stop) = (bytes.as_mut_ptr(), &mut || control.check().is_err());
                // SAFETY: the buffer holds exactly these bytes.
                unsafe { self.bytes_io(disk, segment, range, address, Direction::Write, stop)? };
            }
            fill.over(reader);
        }
        Ok(())
    }
}

/// What is filled in one go.
fn key(fill: &Fill<'_>) -> (UnitId, usize, StateKind) {
    (fill.item.unit, fill.item.section, fill.item.kind)
}

/// Fills the bytes of a segment that begin at `at`: what belongs to no item is zero. Pieces come in order; `next` is the
/// first item that is not over.
fn fill_piece(
    fills: &[Fill<'_>],
    next: &mut usize,
    size: usize,
    piece: &mut [u8],
    at: usize,
    reader: &mut TensorReader<'_>,
) -> Result<()> {
    let end = at + piece.len();
    let mut filled = at;
    while let Some(fill) = fills.get(*next) {
        let Range { start, end: stop } =
            fill.item.start as usize * size..(fill.item.start + fill.item.len) as usize * size;
        if start >= end {
            break;
        }
        let (from, to) = (start.max(at), stop.min(end));
        piece[filled - at..from - at].fill(0);
        fill.read(reader, &mut piece[from - at..to - at])?;
        filled = to;
        if stop > end {
            break;
        }
        fill.over(reader);
        *next += 1;
    }
    piece[filled - at..].fill(0);
    Ok(())
}

impl Fill<'_> {
    fn read(&self, reader: &mut TensorReader<'_>, out: &mut [u8]) -> Result<()> {
        if self.found.is_some() {
            return reader.read(self.conversion, out);
        }
        out.fill(0);
        Ok(())
    }

    /// All of it was filled.
    fn over(&self, reader: &mut TensorReader<'_>) {
        if self.found.is_some() {
            reader.advance();
        }
    }
}
