//! What the wrapper passes, and what it becomes. Every number is checked here, before it becomes an index, a size or an address:
//! what is out of range is `FN-E108`, and the runtime goes on. Addresses cannot be checked beyond being there.

use std::ops::Range;

use super::records;
use funicular::{
    dtype::{DType, StateKind},
    error::{Code, Error, Result},
    model::{ParamSpec, Unit, UnitSpec},
    optim::{AdamWOptions, Hyper, MeanPart, Span, Update},
    quantities::UnitId,
    runtime::{JobSpan, RankSpec, Runtime, StepHyper, UnitUpdate, UpdateOn},
    schedule::Phase,
};

/// (section, first element, elements, byte offset in the parameter segment)
pub(super) type PlaceTuple = (usize, u64, u64, u64);

/// No model has more elements.
const MOST_ELEMENTS: u64 = 1 << 48;

/// What the wrapper says of its rank, checked.
pub(super) fn rank_spec(ranks: Option<records::Ranks>) -> Result<Option<RankSpec>> {
    let Some(records::Ranks { rank, size, fd: file, grows }) = ranks else { return Ok(None) };
    if !(2..=RankSpec::MOST).contains(&size) || rank >= size || (rank == 0) != file.is_none() {
        return Err(Error::argument(format!("rank {rank} of {size} cannot share file {file:?}.")));
    }
    Ok(Some(RankSpec { rank, size, file, grows }))
}

/// The unit of that number.
pub(super) fn known(rt: &Runtime, unit: u32) -> Result<UnitId> {
    let (id, units) = (UnitId(unit), rt.layout()?.units.len());
    if id.index() < units {
        return Ok(id);
    }
    Err(Error::argument(format!("there is no unit {unit}; the model has {units}.")))
}

/// The address of something of `len` bytes or elements.
pub(super) fn address(address: u64, len: u64) -> Result<u64> {
    if len > 0 && address == 0 {
        return Err(Error::argument(format!("there is nothing at address 0 for {len} bytes or elements.")));
    }
    Ok(address)
}

/// Elements of a section.
pub(super) fn elements(unit: &Unit, section: usize, start: u64, len: u64) -> Result<Range<u64>> {
    let limit = unit.sections.get(section).map_or(0, |s| s.elems);
    match start.checked_add(len) {
        Some(end) if end <= limit => Ok(start..end),
        _ => {
            let text = format!("'{}', section {section}: {len} elements from {start} on end after {limit}.", unit.name);
            Err(Error::argument(text))
        }
    }
}

pub(super) fn dtype(name: &str, size: u8) -> DType {
    match name {
        "float32" => DType::F32,
        "bfloat16" => DType::Bf16,
        "float16" => DType::F16,
        _ => DType::Opaque { size },
    }
}

pub(super) fn unit_specs(units: Vec<(String, Vec<records::Param>)>) -> Result<Vec<UnitSpec>> {
    let mut elements: u64 = 0;
    let mut param = |records::Param { name, len: numel, dtype: d, itemsize, trained: trainable }: records::Param| {
        elements = elements.saturating_add(numel);
        if elements > MOST_ELEMENTS {
            return Err(Error::new(Code::UnsupportedParam, format!("'{name}' is too large to be addressed.")));
        }
        let dtype = dtype(&d, itemsize);
        if dtype.size() == 0 {
            return Err(Error::argument(format!("'{name}': elements of {d} have no size.")));
        }
        Ok(ParamSpec { name, numel, dtype, trainable })
    };
    let unit = |(name, params): (String, Vec<records::Param>)| {
        Ok(UnitSpec { name, params: params.into_iter().map(&mut param).collect::<Result<_>>()? })
    };
    units.into_iter().map(unit).collect()
}

/// An update of trained elements of one unit, in order and once each.
pub(super) fn unit_update(rt: &Runtime, update: &records::UnitUpdate, hypers: usize) -> Result<UnitUpdate> {
    let id = known(rt, update.unit)?;
    let packed = rt.layout()?.unit(id);
    let mut after = (0, 0);
    let mut span = |&records::Span { section, start, len, hyper, reset_master }: &records::Span| {
        let elems = elements(packed, section, start, len)?;
        if !packed.sections[section].trainable {
            return Err(Error::argument(format!("'{}', section {section} is not trained.", packed.name)));
        }
        if hyper >= hypers {
            return Err(Error::argument(format!("there are no hyperparameters {hyper}; the step has {hypers}.")));
        }
        if (section, start) < after {
            return Err(Error::argument(format!("'{}': elements of a step are not in order, once each.", packed.name)));
        }
        after = (section, elems.end);
        Ok(JobSpan { section, start, len, hyper, reset_master })
    };
    let spans = update.spans.iter().map(&mut span).collect::<Result<Vec<_>>>()?;
    if spans.is_empty() {
        return Err(Error::argument(format!("a step of '{}' has no elements.", packed.name)));
    }
    Ok(UnitUpdate { unit: id, spans, speculated: update.untouched })
}

pub(super) fn step_hypers(given: &[records::Hyper]) -> Result<Vec<StepHyper>> {
    given.iter().map(step_hyper).collect()
}

fn step_hyper(given: &records::Hyper) -> Result<StepHyper> {
    let &records::Hyper { lr, beta1, beta2, eps, weight_decay, step, maximize, slot: clip } = given;
    if step == 0 {
        return Err(Error::argument("steps count from 1."));
    }
    if clip.is_some_and(|slot| slot >= StepHyper::SLOTS) {
        return Err(Error::argument(format!("there is no slot {} of a factor.", clip.unwrap_or(0))));
    }
    let options = AdamWOptions { lr, beta1, beta2, eps, weight_decay, maximize };
    Ok(StepHyper { hyper: Hyper::new(&options, step, 1.0), clip })
}

/// Parts of gradients whose means over so many ranks are to be made.
pub(super) fn mean_parts(given: &[records::MeanPart], ranks: usize) -> Result<Vec<MeanPart>> {
    if !(1..=RankSpec::MOST).contains(&ranks) {
        return Err(Error::argument(format!("there is no mean over {ranks} ranks.")));
    }
    given.iter().map(|part| mean_part(part, ranks)).collect()
}

fn mean_part(given: &records::MeanPart, ranks: usize) -> Result<MeanPart> {
    let &records::MeanPart { out, own, others, stride, count, before, len, .. } = given;
    let dtype = dtype(&given.dtype, 0);
    if !dtype.trainable() {
        return Err(Error::argument(format!("there is no mean of {}.", given.dtype)));
    }
    let pieces = count.saturating_add(usize::from(own != 0));
    if !(1..=ranks).contains(&pieces) || before > count {
        let text = format!("{pieces} pieces, {before} of them before the own one, cannot be of {ranks} ranks.");
        return Err(Error::argument(text));
    }
    if len > MOST_ELEMENTS {
        return Err(Error::argument(format!("there are no pieces of {len} elements.")));
    }
    let size = dtype.size() as u64;
    let bytes = len * size;
    let apart = if count > 1 { stride } else { bytes };
    if !(bytes..=MOST_ELEMENTS * size).contains(&apart) || !apart.is_multiple_of(size) {
        let text = format!("pieces of {len} elements of {size} bytes cannot lie {stride} bytes apart.");
        return Err(Error::argument(text));
    }
    for (at, bytes) in [(out, bytes), (own, if own == 0 { 0 } else { bytes }), (others, count as u64 * apart)] {
        if address(at, bytes)?.checked_add(bytes).is_none() || !at.is_multiple_of(size) {
            return Err(Error::argument(format!("there are no elements of {size} bytes at address {at:#x}.")));
        }
    }
    Ok(MeanPart {
        out: out as *mut u8,
        own: own as *const u8,
        others: others as *const u8,
        stride: stride as usize,
        count,
        before,
        len: len as usize,
        dtype,
    })
}

pub(super) fn kind(name: &str) -> Result<StateKind> {
    StateKind::OPTIMIZER
        .into_iter()
        .find(|k| k.name() == name)
        .ok_or_else(|| Error::argument(format!("there is no state '{name}'.")))
}

/// Numbers of the phases in calls of the wrapper.
pub(super) const FORWARD: u8 = 0;
pub(super) const BACKWARD: u8 = 1;
pub(super) const EVAL: u8 = 2;

pub(super) fn phase(n: u8) -> Result<Phase> {
    match n {
        FORWARD => Ok(Phase::Forward),
        BACKWARD => Ok(Phase::Backward),
        EVAL => Ok(Phase::Eval),
        _ => Err(Error::argument(format!("there is no phase {n}."))),
    }
}

pub(super) fn split(name: &str) -> Result<UpdateOn> {
    match name {
        "processor" => Ok(UpdateOn::Cpu),
        "lanes" => Ok(UpdateOn::Gpu),
        "rates" => Ok(UpdateOn::Both),
        "halves" => Ok(UpdateOn::Halves),
        other => Err(Error::argument(format!("there is no split '{other}'."))),
    }
}

pub(super) fn resident_update(given: &records::ResidentUpdate, hypers: &[StepHyper]) -> Result<Update> {
    let (dtype, len) = (dtype(&given.dtype, 0), given.len);
    if !dtype.trainable() {
        return Err(Error::argument(format!("there is no update of {}.", given.dtype)));
    }
    let Some(found) = hypers.get(given.hyper) else {
        let text = format!("there are no hyperparameters {}; the step has {}.", given.hyper, hypers.len());
        return Err(Error::argument(text));
    };
    for at in [given.param, given.grad, given.exp_avg, given.exp_avg_sq] {
        address(at, len as u64)?;
    }
    if StateKind::Master.element_size(dtype) > 0 {
        address(given.master, len as u64)?;
    }
    let span = Span {
        param: given.param as *mut u8,
        grad: given.grad as *const u8,
        master: given.master as *mut u8,
        exp_avg: given.exp_avg as *mut f32,
        exp_avg_sq: given.exp_avg_sq as *mut f32,
        len,
        dtype,
        reset_master: given.reset_master,
    };
    Ok(Update { span, hyper: found.hyper })
}
