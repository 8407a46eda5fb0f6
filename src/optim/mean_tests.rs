#![expect(unsafe_code, reason = "calls the sum over buffers of its own")]

use ::half::{bf16, f16};

use super::*;

const DTYPES: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];
/// Zeros of both signs, denormals, the largest finite values, infinities and NaNs, as bits of fp32.
const SPECIALS: [u32; 12] = [
    0,
    0x8000_0000,
    1,
    0x8000_0001,
    0x0080_0000,
    0x3380_0000,
    0x477f_e000,
    0x7f7f_ffff,
    0xff7f_ffff,
    0x7f80_0000,
    0xff80_0000,
    0xffa1_2345,
];

/// What the crate `half` and one element at a time make of it; any NaN is the canonical one.
fn by_the_text(pieces: &[Option<u32>], ranks: usize, dtype: DType) -> u32 {
    let value = |x: u32| match dtype {
        DType::Bf16 => bf16::from_bits(x as u16).to_f32_const(),
        DType::F16 => f16::from_bits(x as u16).to_f32_const(),
        _ => f32::from_bits(x),
    };
    let sum = pieces.iter().flatten().map(|x| value(*x)).reduce(|sum, x| sum + x).expect("a piece");
    let mean = sum / ranks as f32;
    match dtype {
        DType::Bf16 if mean.is_nan() => 0x7fc0,
        DType::F16 if mean.is_nan() => 0x7e00,
        _ if mean.is_nan() => 0x7fc0_0000,
        DType::Bf16 => bf16::from_f32_const(mean).to_bits().into(),
        DType::F16 => f16::from_f32_const(mean).to_bits().into(),
        _ => mean.to_bits(),
    }
}

/// Elements as bits of their type: ordinary ones of all sizes, and every third a special one or, in fp16, near the largest.
fn elements(seed: usize, len: usize, dtype: DType) -> Vec<u32> {
    let mut state = (seed as u32).wrapping_mul(2_654_435_761) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state
    };
    let of = |bits: u32| match dtype {
        DType::Bf16 => bits >> 16,
        DType::F16 => f16::from_f32_const(f32::from_bits(bits)).to_bits().into(),
        _ => bits,
    };
    let ordinary = |bits: u32| (bits & 0x83ff_ffff) + 0x3c00_0000;
    (0..len)
        .map(|i| match (i % 6, dtype) {
            (0, _) => of(SPECIALS[next() as usize % SPECIALS.len()]),
            (3, DType::F16) => 0x7b00 + next() % 0x100,
            (3, _) => of(next()),
            _ => of(ordinary(next())),
        })
        .collect()
}

/// Memory of one type that begins anywhere at an element.
struct Memory {
    words: Vec<u64>,
    dtype: DType,
}

impl Memory {
    fn new(elements: usize, dtype: DType) -> Self {
        Self { words: vec![u64::MAX; (elements * dtype.size()).div_ceil(8)], dtype }
    }

    fn at(&mut self, element: usize) -> *mut u8 {
        self.words.as_mut_ptr().cast::<u8>().wrapping_add(element * self.dtype.size())
    }

    fn set(&mut self, from: usize, elements: &[u32]) {
        for (i, x) in elements.iter().enumerate() {
            match self.dtype.size() {
                2 => bytemuck::cast_slice_mut::<_, u16>(&mut self.words)[from + i] = *x as u16,
                _ => bytemuck::cast_slice_mut::<_, u32>(&mut self.words)[from + i] = *x,
            }
        }
    }

    fn get(&self, element: usize) -> u32 {
        match self.dtype.size() {
            2 => bytemuck::cast_slice::<_, u16>(&self.words)[element].into(),
            _ => bytemuck::cast_slice::<_, u32>(&self.words)[element],
        }
    }
}

/// One part of one gradient: which rank sums it, and what each rank has of it.
struct Case {
    dtype: DType,
    rank: usize,
    pieces: Vec<Option<Vec<u32>>>,
    len: usize,
    /// Elements before each piece.
    shift: usize,
}

impl Case {
    fn new(dtype: DType, rank: usize, has: &[bool], len: usize, shift: usize) -> Self {
        let pieces = has.iter().enumerate().map(|(r, has)| has.then(|| elements(17 * r + len, len, dtype))).collect();
        Self { dtype, rank, pieces, len, shift }
    }

    fn check(&self, isa: Isa) {
        let (ranks, len, shift) = (self.pieces.len(), self.len, self.shift);
        let stride = len + shift;
        let mut others = Memory::new(shift + stride * ranks, self.dtype);
        let mut own = Memory::new(shift + len, self.dtype);
        let mut out = Memory::new(shift + len + 1, self.dtype);
        let mut part = MeanPart {
            out: out.at(shift),
            own: std::ptr::null(),
            others: others.at(shift),
            stride: stride * self.dtype.size(),
            count: 0,
            before: 0,
            len,
            dtype: self.dtype,
        };
        for (rank, piece) in self.pieces.iter().enumerate().filter_map(|(rank, p)| Some((rank, p.as_ref()?))) {
            if rank == self.rank {
                own.set(shift, piece);
                part.own = own.at(shift);
            } else {
                others.set(shift + part.count * stride, piece);
                part.count += 1;
                part.before += usize::from(rank < self.rank);
            }
        }
        // SAFETY: the part lies in buffers of this function.
        unsafe { mean_with(isa, &[part], ranks) }.expect("a part");
        for i in 0..len {
            let of_ranks: Vec<_> = self.pieces.iter().map(|piece| piece.as_ref().map(|piece| piece[i])).collect();
            let expected = by_the_text(&of_ranks, ranks, self.dtype);
            let found = out.get(shift + i);
            assert_eq!(found, expected, "{:?} {} {of_ranks:08x?} of {ranks}", self.dtype, isa.name());
        }
        let blank = Memory::new(1, self.dtype).get(0);
        assert!((0..shift).chain([shift + len]).all(|i| out.get(i) == blank), "nothing else is written");
    }
}

#[test]
fn the_mean_has_the_bits_of_the_text_on_every_isa() {
    for isa in Isa::available() {
        for dtype in DTYPES {
            for ranks in [1, 2, 3, 8] {
                for (len, shift) in [(1, 0), (7, 1), (64, 0), (CHUNK, 3), (CHUNK + 1, 1), (2 * CHUNK + 333, 0)] {
                    let all = vec![true; ranks];
                    Case::new(dtype, ranks / 2, &all, len, shift).check(isa);
                    for missing in 0..ranks.min(3) {
                        let mut has = all.clone();
                        has[missing] = false;
                        if ranks > 1 {
                            Case::new(dtype, ranks / 2, &has, len, shift).check(isa);
                        }
                    }
                    let only = |rank: usize| (0..ranks).map(|r| r == rank).collect::<Vec<_>>();
                    Case::new(dtype, 0, &only(0), len, shift).check(isa);
                    Case::new(dtype, 0, &only(ranks - 1), len, shift).check(isa);
                }
            }
        }
    }
}

#[test]
fn sums_are_rounded_once_and_divided_by_all() {
    let whole = |dtype, pieces: &[Option<u32>]| {
        let pieces = pieces.iter().map(|p| p.map(|x| vec![x])).collect();
        Case { dtype, rank: 1, pieces, len: 1, shift: 0 }.check(Isa::best());
    };
    // 60000 three times: the sum is beyond fp16, the mean is not. Then the largest twice of one rank: infinity.
    whole(DType::F16, &[Some(0x7b53), Some(0x7b53), Some(0x7b53)]);
    assert_eq!(by_the_text(&[Some(0x7b53), Some(0x7b53), Some(0x7b53)], 3, DType::F16), 0x7b53);
    assert_eq!(by_the_text(&[Some(0x7bff), Some(0x7bff)], 1, DType::F16), 0x7c00);
    // A third is no product with the reciprocal.
    let differs = (1..1000_u32).find(|&x| x as f32 / 3.0 != x as f32 * (1.0 / 3.0)).expect("one");
    whole(DType::F32, &[Some((differs as f32).to_bits()), None, None]);
    whole(DType::F32, &[Some(0x8000_0000), None, None]);
    whole(DType::F32, &[Some(1), Some(2), None]);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn the_mode_of_the_caller_changes_nothing() {
    crate::optim::isa::tests::in_a_hostile_mode(|| {
        let (mut own, mut out) = ([3_u32, 0x0080_0001], [0_u32; 2]);
        let part = MeanPart {
            out: out.as_mut_ptr().cast(),
            own: own.as_mut_ptr().cast(),
            others: std::ptr::null(),
            stride: 0,
            count: 0,
            before: 0,
            len: 2,
            dtype: DType::F32,
        };
        // SAFETY: the part lies in buffers of this function.
        unsafe { mean(&[part], 2) }.expect("a part");
        assert_eq!(out, [2, 0x0040_0000], "denormals, and ties to even");
    });
}

#[test]
fn parts_without_a_mean_are_refused_before_any_is_written() {
    let (piece, mut out) = (1.0_f32, 7.0_f32);
    let good = MeanPart {
        out: (&raw mut out).cast(),
        own: (&raw const piece).cast(),
        others: std::ptr::null(),
        stride: 0,
        count: 0,
        before: 0,
        len: 1,
        dtype: DType::F32,
    };
    let bad = [
        (MeanPart { dtype: DType::Opaque { size: 1 }, ..good }, Code::UnsupportedParam),
        (MeanPart { own: std::ptr::null(), ..good }, Code::Argument),
        (MeanPart { before: 1, ..good }, Code::Argument),
    ];
    for (bad, code) in bad {
        // SAFETY: refused before anything is touched.
        let refused = unsafe { mean(&[good, bad], 2) }.expect_err("refused");
        assert_eq!(refused.code(), code, "{refused}");
        assert_eq!(out.to_bits(), 7.0_f32.to_bits());
    }
}
