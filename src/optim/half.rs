//! Sixteen-bit types by bits, free of branches so that loops over them vectorise, and the split of an fp32 master.

/// The NaN that is stored, as fp32 bits.
const NAN: u32 = 0x7fc0_0000;

/// `x` with any NaN replaced by the canonical one.
#[inline(always)]
pub(super) fn canonical(x: f32) -> f32 {
    if x.is_nan() { f32::from_bits(NAN) } else { x }
}

/// The value of a bfloat16.
#[inline(always)]
pub(super) fn bf16_to_f32(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

/// Rounds to a bfloat16, ties to even, as torch does.
#[inline(always)]
pub(super) fn f32_to_bf16(x: f32) -> u16 {
    let bits = canonical(x).to_bits();
    (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// Cuts an fp32 value into its high half, rounded half up, and the signed rest; NaNs are made canonical.
#[inline(always)]
pub fn split_master(x: f32) -> (u16, i16) {
    let bits = canonical(x).to_bits();
    let high = bits.wrapping_add(0x8000) >> 16;
    // The rest is `bits - (high << 16)`, whose low 16 bits are those of `bits`.
    (high as u16, bits as i16)
}

/// What [`split_master`] cut, bit for bit.
#[inline(always)]
pub fn join_master(high: u16, low: i16) -> f32 {
    f32::from_bits((u32::from(high) << 16).wrapping_add(i32::from(low) as u32))
}

/// The value of an IEEE half. Exact, in any floating-point mode.
#[inline(always)]
pub fn f16_to_f32(x: u16) -> f32 {
    let magnitude = u32::from(x & 0x7fff) << 13;
    let sign = u32::from(x & 0x8000) << 16;
    let normal = magnitude + (112 << 23);
    let special = magnitude + (224 << 23);
    let subnormal = (f32::from_bits(magnitude + (113 << 23)) - f32::from_bits(113 << 23)).to_bits();
    let value = if magnitude >= 0x7c00 << 13 {
        special
    } else if magnitude < 0x0400 << 13 {
        subnormal
    } else {
        normal
    };
    f32::from_bits(value | sign)
}

/// Rounds to an IEEE half, ties to even, as F16C and torch do; NaNs become `0x7e00`.
#[inline(always)]
pub fn f32_to_f16(x: f32) -> u16 {
    let bits = x.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    let sign = (bits >> 16) & 0x8000;
    let odd = (magnitude >> 13) & 1;
    let normal = magnitude.wrapping_sub(112 << 23).wrapping_add(0xfff + odd) >> 13;
    // Adding one half moves the subnormal's last bit to the last bit of the sum, which rounds it.
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5_f32.to_bits());
    let value = if magnitude >= 143 << 23 {
        0x7c00
    } else if magnitude < 113 << 23 {
        subnormal
    } else {
        normal
    };
    if magnitude > 0x7f80_0000 { 0x7e00 } else { (value | sign) as u16 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_split_restores(bits: u32) {
        let x = f32::from_bits(bits);
        let (high, low) = split_master(x);
        let expected = if x.is_nan() { NAN } else { bits };
        assert_eq!(join_master(high, low).to_bits(), expected, "{bits:#010x}");
        if !x.is_nan() {
            let up = (u64::from(bits) + 0x8000) >> 16;
            assert_eq!(u64::from(high), up, "{bits:#010x} does not round half up");
        }
    }

    #[test]
    fn the_split_restores_every_pattern() {
        // All patterns in release, where it takes seconds; else every high half with the low halves around its edges.
        if cfg!(debug_assertions) {
            for high in 0..=0xffff_u32 {
                for low in [0, 1, 2, 0x7ffe, 0x7fff, 0x8000, 0x8001, 0xfffe, 0xffff] {
                    assert_split_restores(high << 16 | low);
                }
            }
        } else {
            (0..=u32::MAX).for_each(assert_split_restores);
        }
    }

    #[test]
    fn every_half_converts_as_the_half_crate_does() {
        for x in 0..=u16::MAX {
            let ours = f16_to_f32(x);
            let theirs = ::half::f16::from_bits(x).to_f32_const();
            assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()), "{x:#06x}");
            if !ours.is_nan() {
                assert_eq!(f32_to_f16(ours), x);
            }
        }
    }

    #[test]
    fn rounding_to_half_agrees_around_every_tie() {
        for x in 0..0x7c00_u16 {
            let (low, high) = (f16_to_f32(x), f16_to_f32(x + 1).min(65536.0));
            let tie = ((f64::from(low) + f64::from(high)) / 2.0) as f32;
            for bits in [tie.to_bits().saturating_sub(1), tie.to_bits(), tie.to_bits() + 1, low.to_bits() + 1] {
                for x in [f32::from_bits(bits), -f32::from_bits(bits)] {
                    assert_eq!(f32_to_f16(x), ::half::f16::from_f32_const(x).to_bits(), "{x:e}");
                }
            }
        }
        for x in [f32::MAX, f32::INFINITY, 65519.99, 65520.0, 1e-10, f32::from_bits(1), 0.0] {
            assert_eq!(f32_to_f16(-x), ::half::f16::from_f32_const(-x).to_bits(), "{x:e}");
        }
        assert_eq!(f32_to_f16(f32::from_bits(0xffff_ffff)), 0x7e00);
    }
}
