//! From the element types of a file to those of a parameter, and back. Bytes are little-endian, at any alignment.

use half::{bf16, f16};
use safetensors::Dtype;

use crate::{
    dtype::DType,
    optim::{join_master, split_master},
};

/// What becomes of the elements of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conversion {
    /// Nothing.
    Same,
    /// An fp32 master becomes the bf16 parameter that its update would have stored.
    High,
    /// An fp32 master becomes what it has beyond the bf16 parameter.
    Low,
    /// A floating-point value is rounded to nearest even, as torch's `copy_` does.
    Round {
        /// Type in the file.
        from: Dtype,
        /// Type wanted.
        to: Dtype,
    },
}

impl Conversion {
    /// Bytes of an element before and after; for what stays the same, of `size` bytes.
    pub fn sizes(self, size: usize) -> (usize, usize) {
        match self {
            Self::Same => (size, size),
            Self::High | Self::Low => (4, 2),
            Self::Round { from, to } => (from.bitsize() / 8, to.bitsize() / 8),
        }
    }

    /// From one type to another by rounding; none where torch would have to do it.
    pub fn between(from: Dtype, to: Dtype) -> Option<Self> {
        let float = |d| matches!(d, Dtype::F32 | Dtype::F16 | Dtype::BF16);
        match from == to {
            true => Some(Self::Same),
            false if float(from) && float(to) => Some(Self::Round { from, to }),
            false => None,
        }
    }

    /// Converts whole elements.
    ///
    /// # Panics
    /// If the lengths do not fit together.
    pub fn apply(self, from: &[u8], to: &mut [u8]) {
        match self {
            Self::Same => to.copy_from_slice(from),
            Self::High => each(from, to, |x: [u8; 4]| split_master(f32::from_le_bytes(x)).0.to_le_bytes()),
            Self::Low => each(from, to, |x: [u8; 4]| split_master(f32::from_le_bytes(x)).1.to_le_bytes()),
            Self::Round { from: a, to: b } => round(a, b, from, to),
        }
    }
}

fn each<const N: usize, const M: usize>(from: &[u8], to: &mut [u8], f: impl Fn([u8; N]) -> [u8; M]) {
    let (from, _) = from.as_chunks::<N>();
    let (to, _) = to.as_chunks_mut::<M>();
    assert_eq!(from.len(), to.len(), "elements in and out");
    for (x, y) in from.iter().zip(to) {
        *y = f(*x);
    }
}

fn round(from: Dtype, to: Dtype, x: &[u8], y: &mut [u8]) {
    let to_bf16 = |v: f32| bf16::from_f32(v).to_le_bytes();
    let to_f16 = |v: f32| f16::from_f32(v).to_le_bytes();
    let of_bf16 = |v| bf16::from_le_bytes(v).to_f32();
    let of_f16 = |v| f16::from_le_bytes(v).to_f32();
    match (from, to) {
        (Dtype::F32, Dtype::BF16) => each(x, y, |v| to_bf16(f32::from_le_bytes(v))),
        (Dtype::F32, _) => each(x, y, |v| to_f16(f32::from_le_bytes(v))),
        (Dtype::BF16, Dtype::F32) => each(x, y, |v| of_bf16(v).to_le_bytes()),
        (Dtype::BF16, _) => each(x, y, |v| to_f16(of_bf16(v))),
        (_, Dtype::F32) => each(x, y, |v| of_f16(v).to_le_bytes()),
        (_, _) => each(x, y, |v| to_bf16(of_f16(v))),
    }
}

/// A 16-bit parameter and what its master has beyond it, as the fp32 master; without a rest, as its value in fp32.
pub fn master(dtype: DType, param: &[u8], rest: Option<&[u8]>, out: &mut [u8]) {
    match (dtype, rest) {
        (DType::F16, Some(rest)) => out.copy_from_slice(rest),
        (DType::F16, None) => round(Dtype::F16, Dtype::F32, param, out),
        (_, None) => round(Dtype::BF16, Dtype::F32, param, out),
        (_, Some(rest)) => {
            let (high, low) = (param.as_chunks::<2>().0, rest.as_chunks::<2>().0);
            for ((h, l), y) in high.iter().zip(low).zip(out.as_chunks_mut::<4>().0) {
                *y = join_master(u16::from_le_bytes(*h), i16::from_le_bytes(*l)).to_le_bytes();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_master_survives_the_trip() {
        for x in [0.0_f32, -1.5, 3.1e-39, 1.0 / 3.0, f32::MAX, -7.25e20] {
            let bytes = x.to_le_bytes();
            let (mut high, mut low, mut back) = ([0; 2], [0; 2], [0; 4]);
            Conversion::High.apply(&bytes, &mut high);
            Conversion::Low.apply(&bytes, &mut low);
            master(DType::Bf16, &high, Some(&low), &mut back);
            assert_eq!(back, bytes, "{x}");
        }
    }

    #[test]
    fn rounding_is_to_even_and_widening_exact() {
        let tie = f32::from_bits(0x3f80_8000);
        let mut out = [0; 2];
        Conversion::Round { from: Dtype::F32, to: Dtype::BF16 }.apply(&tie.to_le_bytes(), &mut out);
        assert_eq!(u16::from_le_bytes(out), 0x3f80, "to even, where the master's half goes up");
        let mut wide = [0; 4];
        master(DType::F16, &f16::from_f32(0.1).to_le_bytes(), None, &mut wide);
        assert_eq!(f32::from_le_bytes(wide), f16::from_f32(0.1).to_f32());
        assert_eq!(Conversion::between(Dtype::I64, Dtype::F32), None);
    }
}
