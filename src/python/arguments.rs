//! What the wrapper passes, and what it becomes.

use crate::{
    dtype::{DType, StateKind},
    error::{Code, Error, Result},
    model::{ParamSpec, UnitSpec},
    optim::{AdamWOptions, Hyper, Span, Update},
    runtime::{JobSpan, StepHyper, UnitUpdate},
    schedule::Phase,
    units::UnitId,
};

/// (name, elements, dtype, bytes per element, trainable)
pub(super) type ParamTuple = (String, u64, String, u8, bool);
/// (section, first element, elements, which hyperparameters, master starts anew)
pub(super) type SpanTuple = (usize, u64, u64, usize, bool);
/// (lr, beta1, beta2, eps, weight decay, step, maximize, slot of the factor that clipping found)
pub(super) type HyperTuple = (f64, f64, f64, f64, f64, u64, bool, Option<u32>);
/// (addresses of parameter, gradient, master, exp_avg, exp_avg_sq; elements, dtype, which hyperparameters, master starts anew)
/// (unit, spans, whether what an update ahead began from is untouched)
pub(super) type UpdateTuple = (u32, Vec<SpanTuple>, bool);
pub(super) type ResidentTuple = (u64, u64, u64, u64, u64, usize, String, usize, bool);
/// (section, first element, elements, byte offset in the parameter segment)
pub(super) type PlaceTuple = (usize, u64, u64, u64);

pub(super) fn dtype(name: &str, size: u8) -> DType {
    match name {
        "float32" => DType::F32,
        "bfloat16" => DType::Bf16,
        "float16" => DType::F16,
        _ => DType::Opaque { size },
    }
}

pub(super) fn unit_specs(units: Vec<(String, Vec<ParamTuple>)>) -> Vec<UnitSpec> {
    let param =
        |(name, numel, d, size, trainable): ParamTuple| ParamSpec { name, numel, dtype: dtype(&d, size), trainable };
    let unit =
        |(name, params): (String, Vec<ParamTuple>)| UnitSpec { name, params: params.into_iter().map(param).collect() };
    units.into_iter().map(unit).collect()
}

pub(super) fn unit_update((unit, spans, guessed): UpdateTuple) -> UnitUpdate {
    let span = |(section, start, len, hyper, reset_master)| JobSpan { section, start, len, hyper, reset_master };
    UnitUpdate { unit: UnitId(unit), spans: spans.into_iter().map(span).collect(), guessed }
}

pub(super) fn step_hyper((lr, beta1, beta2, eps, weight_decay, step, maximize, clip): HyperTuple) -> StepHyper {
    let options = AdamWOptions { lr, beta1, beta2, eps, weight_decay, maximize };
    StepHyper { hyper: Hyper::new(&options, step, 1.0), clip }
}

pub(super) fn kind(name: &str) -> Result<StateKind> {
    StateKind::OPTIMIZER
        .into_iter()
        .find(|k| k.name() == name)
        .ok_or_else(|| Error::new(Code::OptimizerOption, format!("there is no state '{name}'.")))
}

pub(super) fn phase(n: u8) -> Phase {
    match n {
        0 => Phase::Forward,
        1 => Phase::Backward,
        _ => Phase::Eval,
    }
}

pub(super) fn resident_update(
    (param, grad, master, exp_avg, exp_avg_sq, len, kind, hyper, reset_master): ResidentTuple,
    hypers: &[StepHyper],
) -> Update {
    let span = Span {
        param: param as *mut u8,
        grad: grad as *const u8,
        master: master as *mut u8,
        exp_avg: exp_avg as *mut f32,
        exp_avg_sq: exp_avg_sq as *mut f32,
        len,
        dtype: dtype(&kind, 0),
        reset_master,
    };
    Update { span, hyper: hypers[hyper].hyper }
}
