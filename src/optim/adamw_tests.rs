#![expect(unsafe_code, reason = "calls the kernels over buffers of its own")]

use super::*;
use crate::optim::AdamWOptions;

/// The buffers of one span, all as bits so that they compare exactly.
#[derive(Clone, Debug, PartialEq)]
struct Buffers {
    dtype: DType,
    param: Vec<u32>,
    grad: Vec<u32>,
    master: Vec<u32>,
    exp_avg: Vec<u32>,
    exp_avg_sq: Vec<u32>,
    len: usize,
}

const SPECIALS: [u32; 22] = [
    0,
    0x8000_0000,
    1,
    0x8000_0001,
    0x007f_ffff,
    0x0080_0000,
    0x3380_0000,
    0x3f80_0000,
    0xbf80_0000,
    0x3f80_8000,
    0x3f7f_8000,
    0x4780_0000,
    0x477f_efff,
    0x1e3c_e508,
    0x5f80_0000,
    0x7f7f_ffff,
    0xff7f_ffff,
    0x7f7f_8000,
    0x7f80_0000,
    0xff80_0000,
    0x7fc0_0000,
    0xffa1_2345,
];

struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }

    /// Usually a number of ordinary size, now and then a special one or any pattern at all.
    fn value(&mut self) -> u32 {
        let bits = self.next();
        match bits % 8 {
            0 => SPECIALS[self.next() as usize % SPECIALS.len()],
            1 => self.next(),
            _ => (bits & 0x807f_ffff) | ((self.next() % 40 + 100) << 23),
        }
    }
}

impl Buffers {
    fn random(dtype: DType, len: usize, seed: u64) -> Self {
        let mut random = Random(seed);
        let words = |bytes: usize, random: &mut Random| {
            (0..(len * bytes).div_ceil(4)).map(|_| random.value()).collect::<Vec<u32>>()
        };
        let master = crate::dtype::StateKind::Master.element_size(dtype);
        let param = words(dtype.size(), &mut random);
        let grad = words(dtype.size(), &mut random);
        let master = words(master, &mut random);
        let exp_avg = words(4, &mut random);
        let mut exp_avg_sq = words(4, &mut random);
        // The second moment is never negative, but for what a NaN or an edited checkpoint makes of it.
        exp_avg_sq.iter_mut().step_by(3).for_each(|v| *v &= 0x7fff_ffff);
        Self { dtype, param, grad, master, exp_avg, exp_avg_sq, len }
    }

    fn span(&mut self) -> Span {
        Span {
            param: self.param.as_mut_ptr().cast(),
            grad: self.grad.as_ptr().cast(),
            master: self.master.as_mut_ptr().cast(),
            exp_avg: self.exp_avg.as_mut_ptr().cast(),
            exp_avg_sq: self.exp_avg_sq.as_mut_ptr().cast(),
            len: self.len,
            dtype: self.dtype,
            reset_master: false,
        }
    }
}

const DTYPES: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];

fn hypers() -> Vec<Hyper> {
    let base = AdamWOptions { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, maximize: false };
    vec![
        Hyper::new(&base, 1, 1.0),
        Hyper::new(&AdamWOptions { maximize: true, beta1: 0.0, ..base }, 7, 0.37),
        Hyper::new(&AdamWOptions { weight_decay: 0.0, eps: 0.0, beta1: 0.5, beta2: 0.0, ..base }, 1000, 1.0 / 65536.0),
        Hyper::new(&AdamWOptions { lr: 0.0, ..base }, 3, 1e30),
    ]
}

#[test]
fn every_isa_gives_the_same_bits() {
    for dtype in DTYPES {
        for (case, hyper) in hypers().iter().enumerate() {
            for len in [1, 15, 64, 1000, 20_011] {
                let start = Buffers::random(dtype, len, (case * 100_000 + len) as u64);
                let results: Vec<_> = Isa::available()
                    .map(|isa| {
                        let mut buffers = start.clone();
                        // SAFETY: the buffers are this test's own, of the lengths that the span says.
                        unsafe { adamw_with(isa, &buffers.span(), hyper) }.expect("trainable");
                        (isa, buffers)
                    })
                    .collect();
                for (isa, result) in &results {
                    assert!(*result == results[0].1, "{dtype:?} {} {case} {len}", isa.name());
                    assert!(*result != start, "nothing was updated");
                }
            }
        }
    }
}

#[test]
fn two_passes_leave_the_bits_of_one() {
    use portions::{Portion, adamw_portion_with};
    let clipped = Hyper { clip: 0.3, ..hypers()[0] };
    for dtype in DTYPES {
        for (case, hyper) in hypers().iter().chain([&clipped]).enumerate() {
            for (len, reset_master) in [1, 63, 64, 1000, 20_011].into_iter().zip([false, true].into_iter().cycle()) {
                let start = Buffers::random(dtype, len, (case * 90_000 + len) as u64);
                let mut whole = start.clone();
                // SAFETY: the buffers are this test's own, of the lengths that the span says.
                unsafe { adamw(&Span { reset_master, ..whole.span() }, hyper) }.expect("trainable");
                for isa in Isa::available() {
                    let (mut in_place, mut beside) = (start.clone(), start.clone());
                    let mut other = start.param.clone();
                    let pass = |buffers: &mut Buffers, portion, to: Option<Target>| {
                        let span = Span { reset_master, ..buffers.span() };
                        let to = to.unwrap_or_else(|| Target::in_place(&span));
                        // SAFETY: as above.
                        unsafe { adamw_portion_with(isa, &span, portion, &to, hyper) }.expect("trainable");
                    };
                    pass(&mut in_place, Portion::Weights, None);
                    assert!(in_place.param == whole.param && in_place.master == whole.master, "{dtype:?} {case} {len}");
                    assert!(in_place.exp_avg == start.exp_avg && in_place.exp_avg_sq == start.exp_avg_sq);
                    pass(&mut in_place, Portion::Moments, None);
                    assert!(in_place == whole, "{dtype:?} {} {case} {len}: in place", isa.name());

                    // The parameter in its place, all else in another one.
                    let (mut mixed, mut apart) = (start.clone(), start.clone());
                    let to = Target { param: mixed.span().param, ..Target::in_place(&apart.span()) };
                    pass(&mut mixed, Portion::Weights, Some(to));
                    pass(&mut mixed, Portion::Moments, Some(to));
                    assert!(mixed.param == whole.param, "{dtype:?} {} {case} {len}: mixed", isa.name());
                    assert!(mixed.master == start.master && mixed.exp_avg == start.exp_avg, "the old states stay");
                    apart.param.clone_from(&whole.param);
                    assert!(apart == whole, "{dtype:?} {} {case} {len}: states apart", isa.name());

                    let to = Target { param: other.as_mut_ptr().cast(), ..Target::in_place(&beside.span()) };
                    pass(&mut beside, Portion::Param, Some(to));
                    assert!(beside == start && other == whole.param, "{dtype:?} {} {case} {len}: beside", isa.name());
                    pass(&mut beside, Portion::States, None);
                    assert!(beside.param == start.param, "the old parameter is only read");
                    beside.param = other;
                    assert!(beside == whole, "{dtype:?} {} {case} {len}: states", isa.name());
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn the_callers_floating_point_mode_does_not_change_the_bits() {
    for dtype in DTYPES {
        let mut usual = Buffers::random(dtype, 5000, 8);
        let mut hostile = usual.clone();
        let (usual_span, hostile_span, hyper) = (usual.span(), hostile.span(), hypers()[0]);
        // SAFETY: the buffers are this test's own.
        unsafe { adamw(&usual_span, &hyper) }.expect("trainable");
        // SAFETY: as above.
        crate::optim::isa::tests::in_a_hostile_mode(|| unsafe { adamw(&hostile_span, &hyper) }).expect("trainable");
        assert!(usual == hostile, "{dtype:?}");
    }
}

#[test]
fn threads_and_pieces_do_not_change_the_bits() {
    let pool = Pool::new(Some(3)).expect("threads");
    for dtype in DTYPES {
        let lens = [3 * PIECE + 17, 5, 0, PIECE];
        let mut alone: Vec<_> = lens.iter().map(|len| Buffers::random(dtype, *len, *len as u64)).collect();
        let mut together = alone.clone();
        let hypers = hypers();
        for (buffers, hyper) in alone.iter_mut().zip(&hypers) {
            // SAFETY: the buffers are this test's own.
            unsafe { adamw(&buffers.span(), hyper) }.expect("trainable");
        }
        let updates: Vec<_> = together
            .iter_mut()
            .zip(&hypers)
            .map(|(buffers, hyper)| Update { span: buffers.span(), hyper: *hyper })
            .collect();
        // SAFETY: as above; the spans are of different buffers.
        unsafe { adamw_parallel(&pool, &updates) }.expect("trainable");
        assert!(alone == together, "{dtype:?}");
    }
}

/// The update as the module's text states it, in fp64 with a rounding after each operation: exact for fp32 operands,
/// but for subnormal quotients.
fn by_the_text(w: f32, g: f32, m: &mut f32, v: &mut f32, h: &Hyper) -> f32 {
    let r = |x: f64| x as f32;
    let mul = |a: f32, b: f32| r(f64::from(a) * f64::from(b));
    let add = |a: f32, b: f32| r(f64::from(a) + f64::from(b));
    let div = |a: f32, b: f32| r(f64::from(a) / f64::from(b));
    let g = mul(g, h.grad_factor);
    let w = mul(w, h.decay);
    let delta = mul(add(g, -*m), h.lerp_coeff);
    *m = add(if h.lerp_from_grad == 1 { g } else { *m }, delta);
    *v = add(mul(*v, h.beta2), mul(mul(g, h.one_minus_beta2), g));
    let denom = add(div(r(f64::from(*v).sqrt()), h.bias_correction2_sqrt), h.eps);
    add(w, -div(mul(*m, h.step_size), denom))
}

#[test]
fn follows_the_written_order() {
    let mut random = Random(5);
    let mut normal = || f32::from_bits((random.next() & 0x807f_ffff) | ((random.next() % 12 + 116) << 23));
    for hyper in hypers() {
        for _ in 0..20_000 {
            let (mut w, g, mut m, mut v) = (normal(), normal(), normal(), normal().abs());
            let (mut m2, mut v2) = (m, v);
            let expected = by_the_text(w, g, &mut m2, &mut v2, &hyper);
            step_f32(
                Isa::best(),
                std::slice::from_mut(&mut w),
                &[g],
                &mut [()],
                std::slice::from_mut(&mut m),
                std::slice::from_mut(&mut v),
                hyper,
            );
            assert_eq!([w, m, v].map(f32::to_bits), [expected, m2, v2].map(f32::to_bits));
        }
    }
}

#[test]
fn a_reset_starts_from_the_parameter_alone() {
    let hyper = hypers()[0];
    for dtype in [DType::Bf16, DType::F16] {
        let mut edited = Buffers::random(dtype, 999, 1);
        let mut fresh = edited.clone();
        let mut stale = edited.clone();
        if dtype == DType::Bf16 {
            fresh.master.fill(0);
        } else {
            let param: &[u16] = bytemuck::cast_slice(&fresh.param);
            fresh.master = param[..999].iter().map(|x| f16_to_f32(*x).to_bits()).collect();
        }
        let span = Span { reset_master: true, ..edited.span() };
        // SAFETY: the buffers are this test's own.
        unsafe {
            adamw(&span, &hyper).expect("trainable");
            adamw(&fresh.span(), &hyper).expect("trainable");
            adamw(&stale.span(), &hyper).expect("trainable");
        }
        // An odd number of 16-bit elements leaves half a word that no update may touch.
        let low = |b: &Buffers| bytemuck::cast_slice::<u32, u8>(&b.master)[..999 * 2].to_vec();
        assert!(low(&edited) == low(&fresh) && edited.param == fresh.param, "{dtype:?}");
        assert!(low(&stale) != low(&fresh), "{dtype:?}: the master does not matter");
    }
}

#[test]
fn opaque_elements_are_refused() {
    let mut buffers = Buffers::random(DType::F32, 4, 1);
    let before = buffers.clone();
    let span = Span { dtype: DType::Opaque { size: 4 }, ..buffers.span() };
    // SAFETY: the buffers are this test's own.
    let e = unsafe { adamw(&span, &hypers()[0]) }.expect_err("refused");
    assert_eq!(e.code(), Code::UnsupportedParam);
    let pool = Pool::new(Some(1)).expect("threads");
    // SAFETY: as above.
    let e = unsafe { adamw_parallel(&pool, &[Update { span, hyper: hypers()[0] }]) }.expect_err("refused");
    assert_eq!(e.code(), Code::UnsupportedParam);
    assert!(buffers == before);
}
