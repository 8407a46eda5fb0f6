//! The ways to use host memory that its bandwidth is measured with, and the bytes that each really moves.
//!
//! One of them is no bound: which is fastest depends on how well a processor's prefetchers follow the streams. And only
//! what certainly moves is counted: an ordinary store to a line that is not in the cache makes some processors read the
//! line first and others not, so there is none here.
#![expect(unsafe_code, reason = "stores around the cache, which only intrinsics do")]

use crate::optim::{Isa, per_isa, prefetch};

/// A way to use memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kernel {
    /// `a = b + s * c` in fp64, with stores around the cache: 24 bytes.
    Triad,
    /// What AdamW does to memory, with next to no arithmetic: four arrays changed in place, a fifth read, 26 bytes.
    InPlace,
    /// The same, with the next lines asked for ahead, as AdamW does.
    InPlaceAhead,
}

impl Kernel {
    /// Bytes that one element moves.
    pub(super) const fn bytes(self) -> u64 {
        match self {
            Self::Triad => 24,
            Self::InPlace | Self::InPlaceAhead => 26,
        }
    }
}

/// The five arrays of AdamW in bf16, of the same length.
pub(super) struct Five<'a> {
    pub(super) param: &'a mut [u16],
    pub(super) low: &'a mut [u16],
    pub(super) m: &'a mut [u32],
    pub(super) v: &'a mut [u32],
    pub(super) grad: &'a [u16],
}

/// Changes the lower bits of four arrays by those of the fifth: numbers stay ordinary numbers.
pub(super) fn in_place(kernel: Kernel, isa: Isa, five: &mut Five<'_>) {
    let Five { param, low, m, v, grad } = five;
    if kernel == Kernel::InPlaceAhead {
        five_ahead(isa, param, low, m, v, grad);
    } else {
        five_plain(isa, param, low, m, v, grad);
    }
}

per_isa! {
    fn five_plain(param: &mut [u16], low: &mut [u16], m: &mut [u32], v: &mut [u32], grad: &[u16]) = five_few;
}
per_isa! {
    fn five_ahead(param: &mut [u16], low: &mut [u16], m: &mut [u32], v: &mut [u32], grad: &[u16]) = five_chunks;
}

/// Elements between two rounds of prefetching, and how far ahead: those of AdamW.
const CHUNK: usize = 64;
const AHEAD: usize = 512;

#[inline(always)]
fn ahead<T>(chunk: &[T; CHUNK]) {
    let start = chunk.as_ptr().wrapping_add(AHEAD).cast::<u8>();
    for line in 0..size_of_val(chunk) / 64 {
        prefetch(start.wrapping_add(line * 64));
    }
}

fn triad_few(a: &mut [f64], b: &[f64], c: &[f64], scale: f64) {
    for ((a, b), c) in a.iter_mut().zip(b).zip(c) {
        *a = *b + scale * *c;
    }
}

/// `a = b + scale * c` over pieces of the same length. Where there are no stores around the cache, with ordinary ones.
pub(super) fn triad(a: &mut [f64], b: &[f64], c: &[f64], scale: f64) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_mm_add_pd, _mm_loadu_pd, _mm_mul_pd, _mm_set1_pd, _mm_sfence, _mm_stream_pd};
        let head = a.as_ptr().align_offset(16).min(a.len());
        let (a_head, a) = a.split_at_mut(head);
        let ((b_head, b), (c_head, c)) = (b.split_at(head), c.split_at(head));
        triad_few(a_head, b_head, c_head, scale);
        let ((a, a_rest), (b, b_rest), (c, c_rest)) = (a.as_chunks_mut::<8>(), b.as_chunks::<8>(), c.as_chunks::<8>());
        for ((a, b), c) in a.iter_mut().zip(b).zip(c) {
            for at in [0, 2, 4, 6] {
                // SAFETY: SSE2 is part of every x86-64; two elements at `at` < 7 of arrays of eight, and those of `a`
                // begin at a multiple of 16.
                unsafe {
                    let sum = _mm_add_pd(
                        _mm_loadu_pd(b.as_ptr().add(at)),
                        _mm_mul_pd(_mm_set1_pd(scale), _mm_loadu_pd(c.as_ptr().add(at))),
                    );
                    _mm_stream_pd(a.as_mut_ptr().add(at), sum);
                }
            }
        }
        triad_few(a_rest, b_rest, c_rest, scale);
        // SAFETY: SSE is part of every x86-64.
        unsafe { _mm_sfence() };
    }
    #[cfg(not(target_arch = "x86_64"))]
    triad_few(a, b, c, scale);
}

#[inline(always)]
fn five_few(param: &mut [u16], low: &mut [u16], m: &mut [u32], v: &mut [u32], grad: &[u16]) {
    for ((((param, low), m), v), grad) in param.iter_mut().zip(low).zip(m).zip(v).zip(grad) {
        *param ^= *grad & 1;
        *low ^= *grad;
        *m ^= u32::from(*grad);
        *v ^= u32::from(*grad);
    }
}

#[inline(always)]
fn five_chunks(param: &mut [u16], low: &mut [u16], m: &mut [u32], v: &mut [u32], grad: &[u16]) {
    let (params, param) = param.as_chunks_mut::<CHUNK>();
    let (lows, low) = low.as_chunks_mut::<CHUNK>();
    let (ms, m) = m.as_chunks_mut::<CHUNK>();
    let (vs, v) = v.as_chunks_mut::<CHUNK>();
    let (grads, grad) = grad.as_chunks::<CHUNK>();
    for ((((param, low), m), v), grad) in params.iter_mut().zip(lows).zip(ms).zip(vs).zip(grads) {
        ahead(param);
        ahead(low);
        ahead(m);
        ahead(v);
        ahead(grad);
        five_few(param, low, m, v, grad);
    }
    five_few(param, low, m, v, grad);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_triad_is_one_wherever_its_arrays_begin() {
        let of = |from: u32, len: u32| (from..from + len).map(f64::from).collect::<Vec<f64>>();
        let (b, c) = (of(1, 1003), of(77, 1003));
        let expected: Vec<f64> = b.iter().zip(&c).map(|(b, c)| b + 0.5 * c).collect();
        for skip in [0, 1] {
            let mut a = vec![0.0; 1003];
            triad(&mut a[skip..], &b[skip..], &c[skip..], 0.5);
            assert_eq!(a[skip..], expected[skip..]);
        }
    }

    #[test]
    fn what_is_changed_in_place_comes_back_the_second_time() {
        let grad: Vec<u16> = (0..1003).map(|n| n * 7).collect();
        for kernel in [Kernel::InPlace, Kernel::InPlaceAhead] {
            let (mut param, mut low) = (vec![0x3f80_u16; 1003], vec![5_u16; 1003]);
            let (mut m, mut v) = (vec![0x3f00_0000_u32; 1003], vec![0x3f00_0000_u32; 1003]);
            for times in 1..=2 {
                let five = &mut Five { param: &mut param, low: &mut low, m: &mut m, v: &mut v, grad: &grad };
                in_place(kernel, Isa::best(), five);
                let changed = times == 1;
                assert_eq!(param[1001] != 0x3f80, changed, "{kernel:?}");
                assert_eq!(low[1001] != 5, changed);
                assert_eq!((m[1002] != 0x3f00_0000, v[1002] != 0x3f00_0000), (changed, changed));
                assert!(v.iter().all(|&bits| (0.5..1.0).contains(&f32::from_bits(bits))));
            }
        }
    }
}
