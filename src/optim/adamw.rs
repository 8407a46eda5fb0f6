//! The AdamW update of spans of host memory.
//!
//! A span is updated in place, one element at a time in the order that docs/arithmetic.md writes down:
//! ```text
//! g = f32(clip == 1 ? grad : round(f32(grad) * clip)) * grad_factor
//! w = w * decay
//! m = (lerp_from_grad ? g : m) + (g - m) * lerp_coeff
//! v = v * beta2 + (g * one_minus_beta2) * g
//! w = w - (m * step_size) / (sqrt(v) / bias_correction2_sqrt + eps)
//! ```
//! Every operation rounds once to fp32; none is fused.
#![expect(unsafe_code, reason = "makes slices of the raw pointers of a span")]

use std::{
    ptr::NonNull,
    slice::{from_raw_parts, from_raw_parts_mut},
};

use crate::{
    dtype::{DType, StateKind},
    error::{Code, Error, Result},
    optim::{
        Hyper, PIECE, Pool,
        half::{bf16_to_f32, canonical, f16_to_f32, f32_to_bf16, f32_to_f16, join_master, split_master},
        isa::{FloatMode, Isa, per_isa, prefetch},
    },
};

/// `len` elements of one parameter and everything that belongs to them. The five arrays are disjoint; each is aligned
/// to its element, better to 64 bytes.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// The parameter, of type `dtype`.
    pub param: *mut u8,
    /// Its gradient, of type `dtype`.
    pub grad: *const u8,
    /// `i16` rest for bf16, `f32` value for fp16, null for fp32.
    pub master: *mut u8,
    /// First moment.
    pub exp_avg: *mut f32,
    /// Second moment.
    pub exp_avg_sq: *mut f32,
    /// Elements.
    pub len: usize,
    /// Type of the parameter and its gradient.
    pub dtype: DType,
    /// The parameter was edited since the last step: start from it, without what the master holds beyond it.
    pub reset_master: bool,
}

/// A span and the scalars of its step.
#[derive(Clone, Copy, Debug)]
pub struct Update {
    /// What to update.
    pub span: Span,
    /// The scalars of its step.
    pub hyper: Hyper,
}

// SAFETY: an update holds only addresses and numbers; the caller of `adamw` vouches for exclusive access to the bytes.
unsafe impl Send for Update {}
// SAFETY: as above.
unsafe impl Sync for Update {}

/// One thread's view of a span, by type.
enum Arrays<'a> {
    F32(&'a mut [f32], &'a [f32], &'a mut [()]),
    Bf16(&'a mut [u16], &'a [u16], &'a mut [i16]),
    F16(&'a mut [u16], &'a [u16], &'a mut [f32]),
}

impl Span {
    /// The elements from `start` on, `len` of them at most.
    pub(crate) fn piece(&self, start: usize, len: usize) -> Self {
        debug_assert!(start <= self.len);
        let master_size = StateKind::Master.element_size(self.dtype);
        Self {
            param: self.param.wrapping_add(start * self.dtype.size()),
            grad: self.grad.wrapping_add(start * self.dtype.size()),
            master: self.master.wrapping_add(start * master_size),
            exp_avg: self.exp_avg.wrapping_add(start),
            exp_avg_sq: self.exp_avg_sq.wrapping_add(start),
            len: len.min(self.len - start),
            ..*self
        }
    }

    /// Bytes that the update of a portion reads and writes.
    pub(crate) fn traffic(&self, portion: Portion) -> u64 {
        let of = |kind: StateKind| {
            let passes = usize::from(portion.reads(kind)) + usize::from(portion.stores(kind));
            passes * kind.element_size(self.dtype)
        };
        (self.len * StateKind::ALL.into_iter().map(of).sum::<usize>()) as u64
    }

    fn pieces(&self) -> usize {
        self.len.div_ceil(PIECE)
    }

    /// # Safety
    /// As for [`adamw`], for the lifetime `'a`.
    unsafe fn arrays<'a>(&self) -> Option<Arrays<'a>> {
        let Self { param, grad, master, len, .. } = *self;
        debug_assert!((param as usize).is_multiple_of(self.dtype.size()), "the parameter is not aligned");
        debug_assert!((grad as usize).is_multiple_of(self.dtype.size()), "the gradient is not aligned");
        // SAFETY: the caller vouches for `len` elements at each address, aligned, disjoint and exclusive.
        unsafe {
            Some(match self.dtype {
                DType::F32 => Arrays::F32(
                    from_raw_parts_mut(param.cast(), len),
                    from_raw_parts(grad.cast(), len),
                    from_raw_parts_mut(NonNull::dangling().as_ptr(), len),
                ),
                DType::Bf16 => Arrays::Bf16(
                    from_raw_parts_mut(param.cast(), len),
                    from_raw_parts(grad.cast(), len),
                    from_raw_parts_mut(master.cast(), len),
                ),
                DType::F16 => Arrays::F16(
                    from_raw_parts_mut(param.cast(), len),
                    from_raw_parts(grad.cast(), len),
                    from_raw_parts_mut(master.cast(), len),
                ),
                DType::Opaque { .. } => return None,
            })
        }
    }
}

/// The error for a type that AdamW has no kernel for.
pub(crate) fn unsupported(dtype: DType) -> Error {
    let size = dtype.size();
    Error::new(Code::UnsupportedParam, format!("a parameter of {size}-byte elements of unknown type has no AdamW."))
        .action("Freeze it with requires_grad_(False).")
}

/// Updates a span on this thread, with the fastest instruction set.
///
/// # Errors
/// `FN-E112` for a type that is not trainable; nothing was touched.
///
/// # Safety
/// Each pointer of the span is valid for `len` elements of its type, aligned to it, and (but for `grad`, which other
/// code may read) free of other access during the call; the arrays are disjoint.
pub unsafe fn adamw(span: &Span, hyper: &Hyper) -> Result<()> {
    // SAFETY: the same contract.
    unsafe { adamw_with(Isa::best(), span, hyper) }
}

/// [`adamw`] with an instruction set of the caller's choice.
///
/// # Errors
/// As for [`adamw`].
///
/// # Safety
/// As for [`adamw`].
pub unsafe fn adamw_with(isa: Isa, span: &Span, hyper: &Hyper) -> Result<()> {
    if span.len == 0 {
        return Ok(());
    }
    let _mode = FloatMode::ieee();
    // SAFETY: the caller's contract; the slices do not outlive this call.
    let (arrays, m, v) = unsafe {
        let m = from_raw_parts_mut(span.exp_avg, span.len);
        let v = from_raw_parts_mut(span.exp_avg_sq, span.len);
        (span.arrays().ok_or_else(|| unsupported(span.dtype))?, m, v)
    };
    match arrays {
        Arrays::F32(param, grad, none) => step_f32(isa, param, grad, none, m, v, *hyper),
        Arrays::Bf16(param, grad, low) => {
            if span.reset_master {
                low.fill(0);
            }
            step_bf16(isa, param, grad, low, m, v, *hyper);
        }
        Arrays::F16(param, grad, master) => {
            if span.reset_master {
                widen_f16(isa, master, param);
            }
            step_f16(isa, param, grad, master, m, v, *hyper);
        }
    }
    Ok(())
}

/// Updates spans on the threads of `pool`, cut into pieces of [`PIECE`] elements. The calling thread sleeps meanwhile.
///
/// # Errors
/// `FN-E112` for a type that is not trainable; nothing was touched. Those of [`Pool::run`].
///
/// # Safety
/// As for [`adamw`], for all spans together.
pub unsafe fn adamw_parallel(pool: &Pool, updates: &[Update]) -> Result<()> {
    if let Some(update) = updates.iter().find(|update| !update.span.dtype.trainable()) {
        return Err(unsupported(update.span.dtype));
    }
    let pieces = updates.iter().map(|update| update.span.pieces()).sum();
    pool.run(pieces, &|mut index| {
        for Update { span, hyper } in updates {
            if let Some(rest) = index.checked_sub(span.pieces()) {
                index = rest;
                continue;
            }
            // SAFETY: the caller's contract; every index is one piece, and pieces are disjoint.
            // The only error, a type without a kernel, was ruled out above.
            let _ = unsafe { adamw(&span.piece(index * PIECE, PIECE), hyper) };
            return;
        }
    })
}

per_isa! {
    fn step_f32(param: &mut [f32], grad: &[f32], none: &mut [()], m: &mut [f32], v: &mut [f32], h: Hyper)
        = step_all::<F32>;
}
per_isa! {
    fn step_bf16(param: &mut [u16], grad: &[u16], low: &mut [i16], m: &mut [f32], v: &mut [f32], h: Hyper)
        = step_all::<Bf16>;
}
per_isa! {
    fn step_f16(param: &mut [u16], grad: &[u16], master: &mut [f32], m: &mut [f32], v: &mut [f32], h: Hyper)
        = step_all::<F16>;
}
per_isa! {
    fn widen_f16(master: &mut [f32], param: &[u16]) = widen_f16_body;
}

/// How a type holds its weight.
trait Weight {
    type Param: Copy;
    /// What the master keeps beyond the parameter.
    type Master: Copy;
    /// Whether a chunk is updated in copies of its arrays, which the compiler keeps in registers: 1.8 in place of 1.35 Gparam/s for
    /// bf16 on two Zen 5 cores. The conversions of fp16 need the registers themselves: 0.7 in place of 1.1.
    const IN_REGISTERS: bool;
    /// Whether to prefetch. The processor's own prefetchers follow four streams of fp32 better without: 1.86 in place of 1.21 Gparam/s
    /// on a Zen 5 core, 2.1 in place of 1.8 on two.
    const PREFETCHED: bool;
    fn value(x: Self::Param) -> f32;
    /// The element of this type that is nearest to a value.
    fn round(x: f32) -> Self::Param;
    fn join(param: Self::Param, master: Self::Master) -> f32;
    /// The master of a parameter that was edited.
    fn fresh(param: Self::Param) -> Self::Master;
    /// Splits a weight, whose NaNs are canonical, into the parameter and its master.
    fn split(w: f32) -> (Self::Param, Self::Master);
}

struct F32;
struct Bf16;
struct F16;

impl Weight for F32 {
    type Param = f32;
    type Master = ();
    const IN_REGISTERS: bool = true;
    const PREFETCHED: bool = false;
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x
    }
    #[inline(always)]
    fn round(x: f32) -> f32 {
        x
    }
    #[inline(always)]
    fn join(param: f32, (): ()) -> f32 {
        param
    }
    #[inline(always)]
    fn fresh(_: f32) {}
    #[inline(always)]
    fn split(w: f32) -> (f32, ()) {
        (w, ())
    }
}

impl Weight for Bf16 {
    type Param = u16;
    type Master = i16;
    const IN_REGISTERS: bool = true;
    const PREFETCHED: bool = true;
    #[inline(always)]
    fn value(x: u16) -> f32 {
        bf16_to_f32(x)
    }
    #[inline(always)]
    fn round(x: f32) -> u16 {
        f32_to_bf16(x)
    }
    #[inline(always)]
    fn join(param: u16, low: i16) -> f32 {
        join_master(param, low)
    }
    #[inline(always)]
    fn fresh(_: u16) -> i16 {
        0
    }
    #[inline(always)]
    fn split(w: f32) -> (u16, i16) {
        split_master(w)
    }
}

impl Weight for F16 {
    type Param = u16;
    type Master = f32;
    const IN_REGISTERS: bool = false;
    const PREFETCHED: bool = true;
    #[inline(always)]
    fn value(x: u16) -> f32 {
        f16_to_f32(x)
    }
    #[inline(always)]
    fn round(x: f32) -> u16 {
        f32_to_f16(x)
    }
    #[inline(always)]
    fn join(_: u16, master: f32) -> f32 {
        master
    }
    #[inline(always)]
    fn fresh(param: u16) -> f32 {
        f16_to_f32(param)
    }
    #[inline(always)]
    fn split(w: f32) -> (u16, f32) {
        (f32_to_f16(w), w)
    }
}

/// The order of operations; `w`, `m` and `v` come back with canonical NaNs.
#[inline(always)]
fn step_one(w: f32, g: f32, m: &mut f32, v: &mut f32, h: &Hyper) -> f32 {
    let w = w * h.decay;
    moments_one(g, m, v, h);
    let denom = v.sqrt() / h.bias_correction2_sqrt + h.eps;
    canonical(w - (*m * h.step_size) / denom)
}

/// Its part that makes the moments.
#[inline(always)]
fn moments_one(g: f32, m: &mut f32, v: &mut f32, h: &Hyper) {
    let g = g * h.grad_factor;
    let base = if h.lerp_from_grad != 0 { g } else { *m };
    *m = canonical(base + (g - *m) * h.lerp_coeff);
    *v = canonical(*v * h.beta2 + (g * h.one_minus_beta2) * g);
}

#[inline(always)]
fn step_few<W: Weight>(
    param: &mut [W::Param],
    grad: &[W::Param],
    master: &mut [W::Master],
    m: &mut [f32],
    v: &mut [f32],
    h: &Hyper,
) {
    // Decided outside the loops: each then vectorises, and the usual one, without clipping, costs no more.
    if h.clip.to_bits() == 1.0_f32.to_bits() {
        each::<W>(param, grad, master, m, v, h, W::value);
    } else {
        each::<W>(param, grad, master, m, v, h, |g| clipped::<W>(g, h));
    }
}

#[inline(always)]
fn clipped<W: Weight>(g: W::Param, h: &Hyper) -> f32 {
    W::value(W::round(W::value(g) * h.clip))
}

/// [`step_few`] of the moments alone. The gradients are widened first: in one loop with the rest, clipped ones are not vectorized.
#[inline(always)]
fn moments_few<W: Weight, const N: usize>(grad: &[W::Param; N], m: &mut [f32; N], v: &mut [f32; N], h: &Hyper) {
    let grad =
        if h.clip.to_bits() == 1.0_f32.to_bits() { grad.map(W::value) } else { grad.map(|g| clipped::<W>(g, h)) };
    for ((g, m), v) in grad.iter().zip(m).zip(v) {
        moments_one(*g, m, v, h);
    }
}

#[inline(always)]
fn each<W: Weight>(
    param: &mut [W::Param],
    grad: &[W::Param],
    master: &mut [W::Master],
    m: &mut [f32],
    v: &mut [f32],
    h: &Hyper,
    gradient: impl Fn(W::Param) -> f32,
) {
    for ((((param, grad), master), m), v) in param.iter_mut().zip(grad).zip(master).zip(m).zip(v) {
        let w = step_one(W::join(*param, *master), gradient(*grad), m, v, h);
        (*param, *master) = W::split(w);
    }
}

/// Elements between two rounds of prefetching: whole cache lines of every array.
const BLOCK: usize = 64;
/// How many elements ahead to prefetch, where there are five streams, some of them narrow.
const AHEAD: usize = 512;

#[inline(always)]
fn step_all<W: Weight>(
    param: &mut [W::Param],
    grad: &[W::Param],
    master: &mut [W::Master],
    m: &mut [f32],
    v: &mut [f32],
    h: Hyper,
) {
    let (params, param) = param.as_chunks_mut::<BLOCK>();
    let (grads, grad) = grad.as_chunks::<BLOCK>();
    let (masters, master) = master.as_chunks_mut::<BLOCK>();
    let (ms, m) = m.as_chunks_mut::<BLOCK>();
    let (vs, v) = v.as_chunks_mut::<BLOCK>();
    for ((((param, grad), master), m), v) in params.iter_mut().zip(grads).zip(masters).zip(ms).zip(vs) {
        prefetch_next::<W>(param, grad, master, m, v);
        if W::IN_REGISTERS {
            let (mut new_param, mut new_master, mut new_m, mut new_v) = (*param, *master, *m, *v);
            step_few::<W>(&mut new_param, grad, &mut new_master, &mut new_m, &mut new_v, &h);
            (*param, *master, *m, *v) = (new_param, new_master, new_m, new_v);
        } else {
            step_few::<W>(param, grad, master, m, v, &h);
        }
    }
    step_few::<W>(param, grad, master, m, v, &h);
}

/// Prefetches what a later chunk will need, where that helps.
#[inline(always)]
fn prefetch_next<W: Weight>(param: &[W::Param], grad: &[W::Param], master: &[W::Master], m: &[f32], v: &[f32]) {
    if W::PREFETCHED {
        prefetch_after(param);
        prefetch_after(grad);
        prefetch_after(master);
        prefetch_after(m);
        prefetch_after(v);
    }
}

/// Prefetches what lies [`AHEAD`] elements after `chunk`, be it inside the array or not.
#[inline(always)]
fn prefetch_after<T>(chunk: &[T]) {
    let start = chunk.as_ptr().wrapping_add(AHEAD).cast::<u8>();
    for line in 0..BLOCK * size_of::<T>() / 64 {
        prefetch(start.wrapping_add(line * 64));
    }
}

#[inline(always)]
fn widen_f16_body(master: &mut [f32], param: &[u16]) {
    for (master, param) in master.iter_mut().zip(param) {
        *master = f16_to_f32(*param);
    }
}

#[path = "into.rs"]
mod into;
#[path = "portions.rs"]
mod portions;
#[cfg(test)]
#[path = "adamw_tests.rs"]
mod tests;

pub use into::{Target, adamw_into_parallel, adamw_into_with};
pub use portions::{Portion, adamw_portion_with};
