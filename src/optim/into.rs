//! The AdamW update of a span out of place: the old values stay, so that an update may run before it is known to be wanted.
//!
//! What is written is not read again soon: it goes past the caches, which spares reading the lines first.
#![expect(unsafe_code, reason = "makes slices of the raw pointers of a span; stores past the caches")]

use std::slice::{from_raw_parts, from_raw_parts_mut};

use super::{BLOCK, Bf16, F16, F32, PIECE, Span, Update, Weight, prefetch_next, step_few, unsupported};
use crate::{
    dtype::{DType, StateKind},
    error::Result,
    optim::{
        Hyper, Pool,
        isa::{FloatMode, Isa, per_isa},
    },
};

/// Where the new values of a span go; the types are those of [`Span`], the arrays disjoint from it and from each other, but that the parameter
/// may be the span's own, in its first place or the second. Lanes of a device take any of the others in place, too.
#[derive(Clone, Copy, Debug)]
#[repr(C)] // as `Target` of kernels/adamw.cu
pub struct Target {
    /// The parameter.
    pub param: *mut u8,
    /// What the master keeps beyond it; null for fp32.
    pub master: *mut u8,
    /// First moment.
    pub exp_avg: *mut f32,
    /// Second moment.
    pub exp_avg_sq: *mut f32,
    /// A second place of the parameter, which lanes of a device fill too; null for none.
    pub second: *mut u8,
}

// SAFETY: only addresses; the caller of `adamw_into` vouches for exclusive access to the bytes.
unsafe impl Send for Target {}
// SAFETY: as above.
unsafe impl Sync for Target {}

impl Target {
    /// The arrays of the span itself.
    pub fn in_place(span: &Span) -> Self {
        let Span { param, master, exp_avg, exp_avg_sq, .. } = *span;
        Self { param, master, exp_avg, exp_avg_sq, second: std::ptr::null_mut() }
    }

    /// The places of the elements from `start` on.
    pub(crate) fn from(&self, start: usize, dtype: DType) -> Self {
        Self {
            param: self.param.wrapping_add(start * dtype.size()),
            master: self.master.wrapping_add(start * StateKind::Master.element_size(dtype)),
            exp_avg: self.exp_avg.wrapping_add(start),
            exp_avg_sq: self.exp_avg_sq.wrapping_add(start),
            second: if self.second.is_null() { self.second } else { self.second.wrapping_add(start * dtype.size()) },
        }
    }
}

/// The old values of one thread's piece.
struct Old<'a, W: Weight> {
    param: &'a [W::Param],
    grad: &'a [W::Param],
    master: &'a [W::Master],
    m: &'a [f32],
    v: &'a [f32],
    reset_master: bool,
}

/// The places of its new ones.
struct New<'a, W: Weight> {
    param: &'a mut [W::Param],
    master: &'a mut [W::Master],
    m: &'a mut [f32],
    v: &'a mut [f32],
}

/// Elements whose old parameters are kept beside the new ones where these take their place.
const KEPT: usize = 4096;

/// Updates a span into `to` with an instruction set of the caller's choice; the span itself is only read, but for a parameter that is also the
/// target's.
///
/// # Errors
/// As for [`super::adamw`].
///
/// # Safety
/// The span's pointers are valid for reading `len` elements, those of `to` for writing them; all arrays are aligned to their
/// elements and disjoint, but that `to.param` may be `span.param`, which is valid for both then. During the call no other code writes the span's
/// arrays or accesses those of `to`.
pub unsafe fn adamw_into_with(isa: Isa, span: &Span, to: &Target, hyper: &Hyper) -> Result<()> {
    if to.param != span.param {
        // SAFETY: the caller's contract; the arrays are disjoint.
        return unsafe { adamw_apart(isa, span, to, hyper) };
    }
    if !span.dtype.trainable() {
        return Err(unsupported(span.dtype));
    }
    let mut kept = [0_u64; KEPT / 2];
    for start in (0..span.len).step_by(KEPT) {
        let piece = span.piece(start, KEPT);
        let param = kept.as_mut_ptr().cast::<u8>();
        // SAFETY: the caller's contract; the copy has room for that many elements of at most four bytes, as trained ones are, and is disjoint
        // from all else.
        unsafe {
            std::ptr::copy_nonoverlapping(piece.param, param, piece.len * span.dtype.size());
            adamw_apart(isa, &Span { param, ..piece }, &to.from(start, span.dtype), hyper)?;
        }
    }
    Ok(())
}

/// # Safety
/// As for [`adamw_into_with`], with arrays that are all disjoint.
unsafe fn adamw_apart(isa: Isa, span: &Span, to: &Target, hyper: &Hyper) -> Result<()> {
    if span.len == 0 {
        return Ok(());
    }
    let _mode = FloatMode::ieee();
    // SAFETY: the caller's contract, for each type.
    unsafe {
        match span.dtype {
            DType::F32 => into_f32(isa, old(span), new(span.len, to), *hyper),
            DType::Bf16 => into_bf16(isa, old(span), new(span.len, to), *hyper),
            DType::F16 => into_f16(isa, old(span), new(span.len, to), *hyper),
            DType::Opaque { .. } => return Err(unsupported(span.dtype)),
        }
    }
    Ok(())
}

/// Updates spans into their targets on the threads of `pool`, as [`super::adamw_parallel`] does in place.
///
/// # Errors
/// As for [`super::adamw_parallel`].
///
/// # Safety
/// As for [`adamw_into_with`], for all spans together.
pub unsafe fn adamw_into_parallel(pool: &Pool, updates: &[(Update, Target)]) -> Result<()> {
    if let Some((update, _)) = updates.iter().find(|(update, _)| !update.span.dtype.trainable()) {
        return Err(unsupported(update.span.dtype));
    }
    let pieces = updates.iter().map(|(update, _)| update.span.pieces()).sum();
    pool.run(pieces, &|mut index| {
        for (Update { span, hyper }, to) in updates {
            if let Some(rest) = index.checked_sub(span.pieces()) {
                index = rest;
                continue;
            }
            let start = index * PIECE;
            // SAFETY: the caller's contract; every index is one piece, and pieces are disjoint. The only error, a type without a
            // kernel, was ruled out above.
            let _ =
                unsafe { adamw_into_with(Isa::best(), &span.piece(start, PIECE), &to.from(start, span.dtype), hyper) };
            return;
        }
    })
}

/// # Safety
/// As for [`adamw_into_with`], where `W` is the span's type; for the lifetime `'a`.
unsafe fn old<'a, W: Weight>(span: &Span) -> Old<'a, W> {
    let n = span.len;
    // Arrays of no bytes have no address.
    let master = if size_of::<W::Master>() == 0 { std::ptr::dangling_mut() } else { span.master.cast() };
    // SAFETY: the caller's contract.
    unsafe {
        Old {
            param: from_raw_parts(span.param.cast(), n),
            grad: from_raw_parts(span.grad.cast(), n),
            master: from_raw_parts(master, n),
            m: from_raw_parts(span.exp_avg, n),
            v: from_raw_parts(span.exp_avg_sq, n),
            reset_master: span.reset_master,
        }
    }
}

/// # Safety
/// As for [`adamw_into_with`], for the lifetime `'a`.
unsafe fn new<'a, W: Weight>(n: usize, to: &Target) -> New<'a, W> {
    let master = if size_of::<W::Master>() == 0 { std::ptr::dangling_mut() } else { to.master.cast() };
    // SAFETY: the caller's contract.
    unsafe {
        New {
            param: from_raw_parts_mut(to.param.cast(), n),
            master: from_raw_parts_mut(master, n),
            m: from_raw_parts_mut(to.exp_avg, n),
            v: from_raw_parts_mut(to.exp_avg_sq, n),
        }
    }
}

per_isa! {
    fn into_f32(old: Old<'_, F32>, new: New<'_, F32>, h: Hyper) = into_all::<F32>;
}
per_isa! {
    fn into_bf16(old: Old<'_, Bf16>, new: New<'_, Bf16>, h: Hyper) = into_all::<Bf16>;
}
per_isa! {
    fn into_f16(old: Old<'_, F16>, new: New<'_, F16>, h: Hyper) = into_all::<F16>;
}

#[inline(always)]
fn into_all<W: Weight>(old: Old<'_, W>, new: New<'_, W>, h: Hyper) {
    // Whole arrays at compile time: element by element, each copy would end in a loop without vectors.
    let (params, param) = old.param.as_chunks::<BLOCK>();
    let (grads, grad) = old.grad.as_chunks::<BLOCK>();
    let (masters, master) = old.master.as_chunks::<BLOCK>();
    let (ms, m) = old.m.as_chunks::<BLOCK>();
    let (vs, v) = old.v.as_chunks::<BLOCK>();
    let (new_params, new_param) = new.param.as_chunks_mut::<BLOCK>();
    let (new_masters, new_master) = new.master.as_chunks_mut::<BLOCK>();
    let (new_ms, new_m) = new.m.as_chunks_mut::<BLOCK>();
    let (new_vs, new_v) = new.v.as_chunks_mut::<BLOCK>();
    let from = params.iter().zip(grads).zip(masters).zip(ms).zip(vs);
    let to = new_params.iter_mut().zip(new_masters).zip(new_ms).zip(new_vs);
    for (((((old_param, grad), old_master), old_m), old_v), (((to_param, to_master), to_m), to_v)) in from.zip(to) {
        prefetch_next::<W>(old_param, grad, old_master, old_m, old_v);
        let (mut param, mut m, mut v) = (*old_param, *old_m, *old_v);
        let mut master = if old.reset_master { param.map(W::fresh) } else { *old_master };
        step_few::<W>(&mut param, grad, &mut master, &mut m, &mut v, &h);
        stream(to_param, &param);
        stream(to_master, &master);
        stream(to_m, &m);
        stream(to_v, &v);
    }
    new_param.copy_from_slice(param);
    new_m.copy_from_slice(m);
    new_v.copy_from_slice(v);
    for ((to, &param), &master) in new_master.iter_mut().zip(param).zip(master) {
        *to = if old.reset_master { W::fresh(param) } else { master };
    }
    step_few::<W>(new_param, grad, new_master, new_m, new_v, &h);
    fence();
}

/// Copies a chunk past the caches where its place is aligned for that.
#[inline(always)]
pub(super) fn stream<T: Copy, const N: usize>(to: &mut [T; N], from: &[T; N]) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
        let at = to.as_mut_ptr().cast::<__m128i>();
        if N == BLOCK && at.is_aligned() {
            let source = from.as_ptr().cast::<__m128i>();
            for i in 0..size_of_val(from) / size_of::<__m128i>() {
                // SAFETY: SSE2 is part of x86-64; both hold BLOCK elements, a whole number of vectors, and the target is aligned.
                unsafe { _mm_stream_si128(at.add(i), _mm_loadu_si128(source.add(i))) };
            }
            return;
        }
    }
    *to = *from;
}

/// Orders the streamed stores before the later store that announces them.
#[inline(always)]
pub(super) fn fence() {
    // SAFETY: SSE is part of x86-64.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}
