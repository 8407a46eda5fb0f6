//! Sums of squares in fp64, in one order of summation for any number of threads and any processor.
//!
//! The elements are cut into blocks of [`NORM_BLOCK`]. In a block, element `j` is added to sum `j % NORM_SUMS` in
//! ascending order, and the sums are summed by halving (sum `i` takes sum `i + 16`, then `i + 8`, ..). The blocks'
//! sums are summed the same way: block `b` to sum `b % NORM_SUMS`, then by halving. The square of an fp32 value is
//! exact in fp64 and cannot overflow, so the sum is finite exactly where every element is.
#![expect(unsafe_code, reason = "makes slices of raw pointers")]

use std::slice::from_raw_parts;

use crate::{
    dtype::DType,
    error::{Code, Error, Result},
    optim::{
        Pool,
        half::{bf16_to_f32, f16_to_f32},
        isa::{FloatMode, Isa, per_isa},
    },
};

/// Elements per partial sum.
pub const NORM_BLOCK: usize = 8192;
/// Interleaved sums in a block.
pub const NORM_SUMS: usize = 32;
/// Blocks per task of a parallel sum.
const BLOCKS_PER_TASK: usize = 16;

type Sums = [f64; NORM_SUMS];

/// Partial sums that [`norm_sq_parallel`] needs room for.
pub const fn norm_blocks(len: usize) -> usize {
    len.div_ceil(NORM_BLOCK)
}

/// Sum of the squares of `len` elements, on this thread. Not finite exactly where some element is not.
///
/// # Errors
/// `FN-E112` for a type without values.
///
/// # Safety
/// `data` is valid for reading `len` elements of `dtype`, aligned to them, and not written during the call.
pub unsafe fn norm_sq(data: *const u8, len: usize, dtype: DType) -> Result<f64> {
    // SAFETY: the same contract.
    unsafe { norm_sq_with(Isa::best(), data, len, dtype) }
}

/// [`norm_sq`] with an instruction set of the caller's choice.
///
/// # Errors
/// As for [`norm_sq`].
///
/// # Safety
/// As for [`norm_sq`].
pub unsafe fn norm_sq_with(isa: Isa, data: *const u8, len: usize, dtype: DType) -> Result<f64> {
    check(dtype)?;
    let _mode = FloatMode::ieee();
    let mut sums = [0.0; NORM_SUMS];
    for block in 0..norm_blocks(len) {
        // SAFETY: the caller's contract.
        sums[block % NORM_SUMS] += unsafe { block_sum(isa, data, len, dtype, block) };
    }
    Ok(halve(sums))
}

/// [`norm_sq`] on the threads of `pool`: the same bits. `partials` is scratch.
///
/// # Errors
/// `FN-E112` for a type without values; those of [`Pool::run`].
///
/// # Panics
/// If `partials` is shorter than [`norm_blocks`] says.
///
/// # Safety
/// As for [`norm_sq`].
pub unsafe fn norm_sq_parallel(
    pool: &Pool,
    data: *const u8,
    len: usize,
    dtype: DType,
    partials: &mut [f64],
) -> Result<f64> {
    check(dtype)?;
    let blocks = norm_blocks(len);
    let shared = Shared { data, partials: partials[..blocks].as_mut_ptr() };
    let isa = Isa::best();
    pool.run(blocks.div_ceil(BLOCKS_PER_TASK), &|task| {
        let shared = &shared;
        let _mode = FloatMode::ieee();
        for block in task * BLOCKS_PER_TASK..blocks.min((task + 1) * BLOCKS_PER_TASK) {
            // SAFETY: the caller's contract for `data`; `block` < `blocks`, and each block belongs to one task.
            unsafe { shared.partials.add(block).write(block_sum(isa, shared.data, len, dtype, block)) };
        }
    })?;
    let _mode = FloatMode::ieee();
    let mut sums = [0.0; NORM_SUMS];
    for (block, partial) in partials[..blocks].iter().enumerate() {
        sums[block % NORM_SUMS] += partial;
    }
    Ok(halve(sums))
}

/// Pointers that tasks share; see the uses.
struct Shared {
    data: *const u8,
    partials: *mut f64,
}

// SAFETY: `data` is only read, and tasks write different elements of `partials`.
unsafe impl Sync for Shared {}

fn check(dtype: DType) -> Result<()> {
    if dtype.trainable() {
        return Ok(());
    }
    Err(Error::new(
        Code::UnsupportedParam,
        format!("A norm of {}-byte elements of unknown type was asked for.", dtype.size()),
    )
    .action("Leave out gradients of this type."))
}

/// # Safety
/// As for [`norm_sq`].
unsafe fn block_sum(isa: Isa, data: *const u8, len: usize, dtype: DType, block: usize) -> f64 {
    let start = block * NORM_BLOCK;
    let count = NORM_BLOCK.min(len - start);
    let at = data.wrapping_add(start * dtype.size());
    // SAFETY: the caller vouches for `len` elements, of which these are a part.
    let sums = unsafe {
        match dtype {
            DType::F32 => sums_f32(isa, from_raw_parts(at.cast(), count)),
            DType::Bf16 => sums_bf16(isa, from_raw_parts(at.cast(), count)),
            DType::F16 => sums_f16(isa, from_raw_parts(at.cast(), count)),
            DType::Opaque { .. } => return f64::NAN,
        }
    };
    halve(sums)
}

fn halve(mut sums: Sums) -> f64 {
    let mut width = NORM_SUMS / 2;
    while width > 0 {
        for i in 0..width {
            sums[i] += sums[i + width];
        }
        width /= 2;
    }
    sums[0]
}

per_isa! {
    fn sums_f32(block: &[f32]) -> Sums = sums_f32_body;
}
per_isa! {
    fn sums_bf16(block: &[u16]) -> Sums = sums_bf16_body;
}
per_isa! {
    fn sums_f16(block: &[u16]) -> Sums = sums_f16_body;
}

#[inline(always)]
fn sums_body<T: Copy>(block: &[T], value: impl Fn(T) -> f32) -> Sums {
    let mut sums = [0.0; NORM_SUMS];
    let (rows, rest) = block.as_chunks::<NORM_SUMS>();
    for row in rows {
        for (sum, x) in sums.iter_mut().zip(row) {
            let x = f64::from(value(*x));
            *sum += x * x;
        }
    }
    for (sum, x) in sums.iter_mut().zip(rest) {
        let x = f64::from(value(*x));
        *sum += x * x;
    }
    sums
}

#[inline(always)]
fn sums_f32_body(block: &[f32]) -> Sums {
    sums_body(block, |x| x)
}

#[inline(always)]
fn sums_bf16_body(block: &[u16]) -> Sums {
    sums_body(block, bf16_to_f32)
}

#[inline(always)]
fn sums_f16_body(block: &[u16]) -> Sums {
    sums_body(block, f16_to_f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(len: usize) -> Vec<f32> {
        let mut state = 12345_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f64::from(state >> 8) / f64::from(1 << 24) - 0.5
        };
        (0..len).map(|_| (next() * 10_f64.powf(next() * 20.0)) as f32).collect()
    }

    /// The order of summation as the module's text says it, element by element.
    fn by_the_text(x: &[f32]) -> f64 {
        let mut total = [0.0; NORM_SUMS];
        for (b, block) in x.chunks(NORM_BLOCK).enumerate() {
            let mut sums = [0.0; NORM_SUMS];
            for (j, x) in block.iter().enumerate() {
                sums[j % NORM_SUMS] += f64::from(*x) * f64::from(*x);
            }
            total[b % NORM_SUMS] += halve(sums);
        }
        halve(total)
    }

    #[test]
    fn every_isa_and_thread_count_gives_the_same_bits() {
        for len in [0, 1, 31, 33, NORM_BLOCK, NORM_BLOCK + 7, 70 * NORM_BLOCK + 1001] {
            let x = values(len);
            let expected = by_the_text(&x).to_bits();
            let data = x.as_ptr().cast();
            for isa in Isa::available() {
                // SAFETY: `x` outlives the call and is not written meanwhile.
                let sum = unsafe { norm_sq_with(isa, data, len, DType::F32) }.expect("fp32");
                assert_eq!(sum.to_bits(), expected, "{} of {len}", isa.name());
            }
            for threads in [1, 2, 5] {
                let pool = Pool::new(Some(threads)).expect("threads");
                let mut partials = vec![f64::NAN; norm_blocks(len)];
                // SAFETY: as above.
                let sum = unsafe { norm_sq_parallel(&pool, data, len, DType::F32, &mut partials) }.expect("fp32");
                assert_eq!(sum.to_bits(), expected, "{threads} threads, {len}");
            }
        }
    }

    #[test]
    fn sixteen_bit_types_sum_their_values() {
        let x = values(9000);
        for dtype in [DType::Bf16, DType::F16] {
            let (narrow, value): (Vec<u16>, fn(u16) -> f32) = if dtype == DType::Bf16 {
                (x.iter().map(|x| crate::optim::split_master(*x).0).collect(), bf16_to_f32)
            } else {
                (x.iter().map(|x| crate::optim::f32_to_f16(x.clamp(-1e4, 1e4))).collect(), f16_to_f32)
            };
            let wide: Vec<f32> = narrow.iter().map(|x| value(*x)).collect();
            for isa in Isa::available() {
                // SAFETY: `narrow` outlives the call and is not written meanwhile.
                let sum = unsafe { norm_sq_with(isa, narrow.as_ptr().cast(), narrow.len(), dtype) }.expect("trainable");
                assert_eq!(sum.to_bits(), by_the_text(&wide).to_bits(), "{dtype:?} {}", isa.name());
            }
        }
    }

    #[test]
    fn is_finite_exactly_where_all_elements_are() {
        let sum = |x: &[f32]| {
            // SAFETY: `x` is borrowed.
            unsafe { norm_sq(x.as_ptr().cast(), x.len(), DType::F32) }.expect("fp32")
        };
        let mut x = vec![f32::MAX; 20_000];
        assert!(sum(&x).is_finite());
        for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            for at in [0, 8191, 19_999] {
                let kept = std::mem::replace(&mut x[at], bad);
                assert!(!sum(&x).is_finite());
                x[at] = kept;
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn subnormals_count_in_any_mode() {
        let x = [f32::from_bits(1); 3];
        let sum = crate::optim::isa::tests::in_a_hostile_mode(|| {
            // SAFETY: `x` outlives the call and is not written meanwhile.
            unsafe { norm_sq(x.as_ptr().cast(), x.len(), DType::F32) }
        });
        assert_eq!(sum.expect("fp32"), 3.0 * 2_f64.powi(-298));
    }
}
