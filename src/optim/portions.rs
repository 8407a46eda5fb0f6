//! The AdamW update of a span in two passes: first what the next forward needs, later the rest. Together they leave the bits of one
//! pass: both compute the whole update from the same old values, and each stores its own arrays.
#![expect(unsafe_code, reason = "reads and stores through the raw pointers of a span")]

use super::{
    AHEAD, BLOCK, Bf16, F16, F32, Span, Weight,
    into::{Target, fence, stream},
    moments_few, step_few, unsupported,
};
use crate::{
    dtype::{DType, StateKind},
    error::Result,
    optim::{
        Hyper,
        isa::{FloatMode, Isa, per_isa, prefetch},
    },
};

/// Which arrays an update stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Portion {
    /// All of them.
    Whole,
    /// First pass where the old parameter is not kept: the parameter and its master. It makes all that a weight is.
    Weights,
    /// The pass after [`Portion::Weights`]: both moments. The parameter and its master are not looked at.
    Moments,
    /// First pass where the old parameter is kept: the parameter alone, into another place.
    Param,
    /// The pass after [`Portion::Param`]: the master and both moments, from the old parameter.
    States,
}

impl Portion {
    /// Whether an update of this portion reads a kind.
    pub(crate) fn reads(self, kind: StateKind) -> bool {
        self != Self::Moments || !matches!(kind, StateKind::Param | StateKind::Master)
    }

    /// Whether an update is complete with it.
    pub(crate) fn completes(self) -> bool {
        !matches!(self, Self::Weights | Self::Param)
    }

    /// Whether it stores a kind.
    pub(crate) fn stores(self, kind: StateKind) -> bool {
        match kind {
            StateKind::Param => matches!(self, Self::Whole | Self::Weights | Self::Param),
            StateKind::Grad => false,
            StateKind::Master => matches!(self, Self::Whole | Self::Weights | Self::States),
            StateKind::ExpAvg | StateKind::ExpAvgSq => matches!(self, Self::Whole | Self::Moments | Self::States),
        }
    }
}

/// Calls the kernel of a portion.
macro_rules! by_portion {
    ($isa:ident, $span:ident, $portion:ident, $to:ident, $h:ident, $weights:ident, $moments:ident, $param:ident, $states:ident) => {
        match $portion {
            Portion::Weights => $weights($isa, Arrays::of($span, $to), *$h),
            Portion::Moments => $moments($isa, Arrays::of($span, $to), *$h),
            Portion::Param => $param($isa, Arrays::of($span, $to), *$h),
            Portion::States => $states($isa, Arrays::of($span, $to), *$h),
            Portion::Whole => unreachable!("the whole is another kernel's"),
        }
    };
}

/// Updates a portion of a span, other than the whole, with an instruction set of the caller's choice. What the portion stores goes to `to`;
/// of that the arrays of [`Portion::Param`] and any others may be those of the span, or lie elsewhere.
///
/// # Errors
/// As for [`super::adamw`].
///
/// # Safety
/// Each pointer of the span is valid for `len` elements of its type and aligned to it, and no other code writes it during the call; so are
/// those of `to` that the portion stores into, which no other code accesses. An array of `to` is the same array of the span, or disjoint
/// from all of them; otherwise all arrays are disjoint.
pub unsafe fn adamw_portion_with(isa: Isa, span: &Span, portion: Portion, to: &Target, hyper: &Hyper) -> Result<()> {
    if span.len == 0 {
        return Ok(());
    }
    let _mode = FloatMode::ieee();
    match span.dtype {
        DType::F32 => by_portion!(isa, span, portion, to, hyper, weights_f32, moments_f32, param_f32, states_f32),
        DType::Bf16 => by_portion!(isa, span, portion, to, hyper, weights_bf16, moments_bf16, param_bf16, states_bf16),
        DType::F16 => by_portion!(isa, span, portion, to, hyper, weights_f16, moments_f16, param_f16, states_f16),
        DType::Opaque { .. } => return Err(unsupported(span.dtype)),
    }
    Ok(())
}

/// The arrays of one thread's piece, by type.
struct Arrays<W: Weight> {
    param: *const W::Param,
    grad: *const W::Param,
    master: *const W::Master,
    m: *const f32,
    v: *const f32,
    to_param: *mut W::Param,
    to_master: *mut W::Master,
    to_m: *mut f32,
    to_v: *mut f32,
    len: usize,
    reset: bool,
}

impl<W: Weight> Arrays<W> {
    fn of(span: &Span, to: &Target) -> Self {
        // Arrays of no bytes have no address.
        let none = size_of::<W::Master>() == 0;
        let master = |at: *mut u8| if none { std::ptr::dangling_mut() } else { at.cast() };
        Self {
            param: span.param.cast(),
            grad: span.grad.cast(),
            master: master(span.master),
            m: span.exp_avg,
            v: span.exp_avg_sq,
            to_param: to.param.cast(),
            to_master: master(to.master),
            to_m: to.exp_avg,
            to_v: to.exp_avg_sq,
            len: span.len,
            reset: span.reset_master,
        }
    }
}

const WEIGHTS: u8 = 0;
const MOMENTS: u8 = 1;
const PARAM: u8 = 2;
const STATES: u8 = 3;

macro_rules! kernels {
    ($weight:ident, $weights:ident, $moments:ident, $param:ident, $states:ident) => {
        per_isa! { fn $weights(arrays: Arrays<$weight>, h: Hyper) = all::<$weight, WEIGHTS>; }
        per_isa! { fn $moments(arrays: Arrays<$weight>, h: Hyper) = all::<$weight, MOMENTS>; }
        per_isa! { fn $param(arrays: Arrays<$weight>, h: Hyper) = all::<$weight, PARAM>; }
        per_isa! { fn $states(arrays: Arrays<$weight>, h: Hyper) = all::<$weight, STATES>; }
    };
}

kernels!(F32, weights_f32, moments_f32, param_f32, states_f32);
kernels!(Bf16, weights_bf16, moments_bf16, param_bf16, states_bf16);
kernels!(F16, weights_f16, moments_f16, param_f16, states_f16);

/// Only [`adamw_portion_with`] calls it, whose contract is that of the arrays.
#[inline(always)]
fn all<W: Weight, const PORTION: u8>(arrays: Arrays<W>, h: Hyper) {
    let whole = arrays.len - arrays.len % BLOCK;
    for at in (0..whole).step_by(BLOCK) {
        // SAFETY: inside the arrays.
        unsafe { chunk::<W, PORTION, BLOCK>(&arrays, at, &h) };
    }
    for at in whole..arrays.len {
        // SAFETY: as above.
        unsafe { chunk::<W, PORTION, 1>(&arrays, at, &h) };
    }
    fence();
}

/// # Safety
/// The arrays are those of [`adamw_portion_with`], and hold `N` elements from `at` on.
#[inline(always)]
unsafe fn chunk<W: Weight, const PORTION: u8, const N: usize>(arrays: &Arrays<W>, at: usize, h: &Hyper) {
    // SAFETY: the caller's contract, for all that is read and stored here.
    unsafe {
        let grad = read::<W, _, N>(arrays.grad, at);
        let (mut m, mut v) = (read::<W, _, N>(arrays.m, at), read::<W, _, N>(arrays.v, at));
        if PORTION == MOMENTS {
            moments_few::<W, N>(&grad, &mut m, &mut v, h);
        } else {
            let mut param = read::<W, _, N>(arrays.param, at);
            let old = read::<W, _, N>(arrays.master, at);
            let mut master = if arrays.reset { param.map(W::fresh) } else { old };
            step_few::<W>(&mut param, &grad, &mut master, &mut m, &mut v, h);
            if PORTION == WEIGHTS || PORTION == PARAM {
                store(arrays.param, arrays.to_param, at, param);
            }
            if PORTION != PARAM {
                store(arrays.master, arrays.to_master, at, master);
            }
        }
        if PORTION == MOMENTS || PORTION == STATES {
            store(arrays.m, arrays.to_m, at, m);
            store(arrays.v, arrays.to_v, at, v);
        }
    }
}

/// Stores `N` elements: past the caches, where their place is not the one that they were read from.
///
/// # Safety
/// The place holds `N` elements from `at` on, which nothing else accesses.
#[inline(always)]
unsafe fn store<T: Copy, const N: usize>(from: *const T, to: *mut T, at: usize, values: [T; N]) {
    // SAFETY: the caller's contract; an array has the alignment of its elements.
    unsafe {
        let place = to.add(at).cast::<[T; N]>();
        if std::ptr::eq(from, to) { place.write(values) } else { stream(&mut *place, &values) }
    }
}

/// Reads `N` elements, and prefetches those of a later chunk, be they inside the array or not, where that helps.
///
/// # Safety
/// The array holds `N` elements from `at` on.
#[inline(always)]
unsafe fn read<W: Weight, T: Copy, const N: usize>(array: *const T, at: usize) -> [T; N] {
    if W::PREFETCHED && N == BLOCK {
        let start = array.wrapping_add(at + AHEAD).cast::<u8>();
        (0..size_of::<[T; N]>() / 64).for_each(|line| prefetch(start.wrapping_add(line * 64)));
    }
    // SAFETY: the caller's contract; an array has the alignment of its elements.
    unsafe { array.add(at).cast::<[T; N]>().read() }
}
