//! The mean over ranks of parts of gradients: summed in fp32 ascending by rank, divided by the number of all ranks, rounded once (docs/arithmetic.md).
#![expect(unsafe_code, reason = "makes slices of raw pointers")]

use std::slice::{from_raw_parts, from_raw_parts_mut};

use crate::{
    dtype::DType,
    error::{Code, Error, Result},
    optim::{
        half::{bf16_to_f32, canonical, f16_to_f32, f32_to_bf16, f32_to_f16},
        isa::{FloatMode, Isa, per_isa},
    },
};

/// Elements that are summed at a time; their sums stay in the nearest cache.
const CHUNK: usize = 1024;

/// A part of a gradient that one rank sums, and the pieces of it that ranks have. All are aligned to their elements.
#[derive(Clone, Copy, Debug)]
pub struct MeanPart {
    /// Where the mean goes; disjoint from all pieces.
    pub out: *mut u8,
    /// The piece of the rank that sums; null if it has none.
    pub own: *const u8,
    /// Pieces of other ranks, ascending by rank: the first one.
    pub others: *const u8,
    /// Bytes from each of them to the next.
    pub stride: usize,
    /// How many there are.
    pub count: usize,
    /// How many of them are of lower ranks than the own one.
    pub before: usize,
    /// Elements.
    pub len: usize,
    /// Their type.
    pub dtype: DType,
}

// SAFETY: a part holds only addresses and numbers; the caller of `mean` vouches for access to the bytes.
unsafe impl Send for MeanPart {}
// SAFETY: as above.
unsafe impl Sync for MeanPart {}

impl MeanPart {
    /// How many ranks have a piece.
    pub fn pieces(&self) -> usize {
        self.count + usize::from(!self.own.is_null())
    }

    /// The pieces, ascending by rank.
    fn each(&self) -> impl Iterator<Item = *const u8> {
        let Self { own, others, stride, count, before, .. } = *self;
        let other = move |i: usize| others.wrapping_add(i * stride);
        let own = (!own.is_null()).then_some(own);
        (0..before).map(other).chain(own).chain((before..count).map(other))
    }

    /// Whether all addresses are multiples of so many bytes.
    #[cfg(feature = "cuda")]
    pub(crate) fn aligned_to(&self, bytes: usize) -> bool {
        let stride = if self.count > 1 { self.stride } else { 0 };
        let others = if self.count > 0 { self.others as usize } else { 0 };
        (self.out as usize | self.own as usize | others | stride).is_multiple_of(bytes)
    }

    /// Fails for a part that has no mean.
    ///
    /// # Errors
    /// `FN-E112` for a type without values, `FN-E108` without a piece.
    pub(crate) fn check(&self) -> Result<()> {
        if !self.dtype.trainable() {
            let text = format!("A mean of {}-byte elements of unknown type was asked for.", self.dtype.size());
            return Err(Error::new(Code::UnsupportedParam, text).action("Leave out gradients of this type."));
        }
        if self.pieces() == 0 || self.before > self.count {
            let text = format!("a part with {} pieces, {} of them before the own one.", self.pieces(), self.before);
            return Err(Error::argument(text));
        }
        Ok(())
    }
}

/// Makes the mean of each part over so many ranks, on this thread.
///
/// # Errors
/// `FN-E112` for a type without values, `FN-E108` for a part without a piece; no part is written then.
///
/// # Safety
/// Each piece is valid for reading, and each `out` for writing, `len` elements of `dtype`. No other code writes the former or accesses the latter
/// during the call.
pub unsafe fn mean(parts: &[MeanPart], ranks: usize) -> Result<()> {
    // SAFETY: the same contract.
    unsafe { mean_with(Isa::best(), parts, ranks) }
}

/// # Safety
/// As for [`mean`].
unsafe fn mean_with(isa: Isa, parts: &[MeanPart], ranks: usize) -> Result<()> {
    parts.iter().try_for_each(MeanPart::check)?;
    let _mode = FloatMode::ieee();
    #[expect(clippy::cast_precision_loss, reason = "as torch divides: the number of ranks in fp32")]
    let ranks = ranks as f32;
    for part in parts {
        for start in (0..part.len).step_by(CHUNK) {
            // SAFETY: the caller's contract; `start` is less than `len`.
            unsafe { chunk(isa, part, start, ranks) };
        }
    }
    Ok(())
}

/// # Safety
/// As for [`mean`], for the elements from `start` on, which is less than `len`.
unsafe fn chunk(isa: Isa, part: &MeanPart, start: usize, ranks: f32) {
    let (count, at) = (CHUNK.min(part.len - start), start * part.dtype.size());
    let mut sums = [0.0_f32; CHUNK];
    let sums = &mut sums[..count];
    for (i, piece) in part.each().map(|piece| piece.wrapping_add(at)).enumerate() {
        // SAFETY: the caller vouches for `len` elements of each piece, of which these are a part.
        unsafe {
            match part.dtype {
                DType::F32 => add_f32(isa, sums, from_raw_parts(piece.cast(), count), i == 0),
                DType::Bf16 => add_bf16(isa, sums, from_raw_parts(piece.cast(), count), i == 0),
                DType::F16 => add_f16(isa, sums, from_raw_parts(piece.cast(), count), i == 0),
                DType::Opaque { .. } => {}
            }
        }
    }
    let out = part.out.wrapping_add(at);
    // SAFETY: as above; no other code accesses `out`.
    unsafe {
        match part.dtype {
            DType::F32 => divide_f32(isa, from_raw_parts_mut(out.cast(), count), sums, ranks),
            DType::Bf16 => divide_bf16(isa, from_raw_parts_mut(out.cast(), count), sums, ranks),
            DType::F16 => divide_f16(isa, from_raw_parts_mut(out.cast(), count), sums, ranks),
            DType::Opaque { .. } => {}
        }
    }
}

per_isa! {
    fn add_f32(sums: &mut [f32], piece: &[f32], first: bool) = add_f32_body;
}
per_isa! {
    fn add_bf16(sums: &mut [f32], piece: &[u16], first: bool) = add_bf16_body;
}
per_isa! {
    fn add_f16(sums: &mut [f32], piece: &[u16], first: bool) = add_f16_body;
}
per_isa! {
    fn divide_f32(out: &mut [f32], sums: &[f32], ranks: f32) = divide_f32_body;
}
per_isa! {
    fn divide_bf16(out: &mut [u16], sums: &[f32], ranks: f32) = divide_bf16_body;
}
per_isa! {
    fn divide_f16(out: &mut [u16], sums: &[f32], ranks: f32) = divide_f16_body;
}

/// The first piece is taken as it is: added to zero, a zero would lose its sign.
#[inline(always)]
fn add_body<T: Copy>(sums: &mut [f32], piece: &[T], first: bool, value: impl Fn(T) -> f32) {
    if first {
        sums.iter_mut().zip(piece).for_each(|(sum, x)| *sum = value(*x));
    } else {
        sums.iter_mut().zip(piece).for_each(|(sum, x)| *sum += value(*x));
    }
}

#[inline(always)]
fn add_f32_body(sums: &mut [f32], piece: &[f32], first: bool) {
    add_body(sums, piece, first, |x| x);
}

#[inline(always)]
fn add_bf16_body(sums: &mut [f32], piece: &[u16], first: bool) {
    add_body(sums, piece, first, bf16_to_f32);
}

#[inline(always)]
fn add_f16_body(sums: &mut [f32], piece: &[u16], first: bool) {
    add_body(sums, piece, first, f16_to_f32);
}

#[inline(always)]
fn divide_body<T>(out: &mut [T], sums: &[f32], ranks: f32, round: impl Fn(f32) -> T) {
    out.iter_mut().zip(sums).for_each(|(out, sum)| *out = round(*sum / ranks));
}

#[inline(always)]
fn divide_f32_body(out: &mut [f32], sums: &[f32], ranks: f32) {
    divide_body(out, sums, ranks, canonical);
}

#[inline(always)]
fn divide_bf16_body(out: &mut [u16], sums: &[f32], ranks: f32) {
    divide_body(out, sums, ranks, f32_to_bf16);
}

#[inline(always)]
fn divide_f16_body(out: &mut [u16], sums: &[f32], ranks: f32) {
    divide_body(out, sums, ranks, f32_to_f16);
}

#[cfg(test)]
#[path = "mean_tests.rs"]
mod tests;
