//! AdamW against the bits that python/funicular/reference.py gives (tests/data/make_adamw_golden.py).
#![expect(unsafe_code, reason = "hands buffers to the kernels by pointer")]

use funicular::{
    dtype::{DType, StateKind},
    optim::{AdamWOptions, Hyper, Isa, Span, Target, adamw_into_with, adamw_with, norm_sq_with},
};

const DTYPES: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];
/// The order of the arrays in the file; the gradient comes before.
const STATE: [StateKind; 4] = [StateKind::Param, StateKind::Master, StateKind::ExpAvg, StateKind::ExpAvgSq];

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> &'a [u8] {
        let (head, tail) = self.0.split_at(len);
        self.0 = tail;
        head
    }
    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take(4).try_into().expect("four"))
    }
    fn f64(&mut self) -> f64 {
        f64::from_le_bytes(self.take(8).try_into().expect("eight"))
    }
    /// An array in memory aligned for any element.
    fn array(&mut self, len: usize) -> Vec<u64> {
        let mut words = vec![0_u64; len.div_ceil(8)];
        bytemuck::cast_slice_mut(&mut words)[..len].copy_from_slice(self.take(len));
        words
    }
}

struct Case {
    dtype: DType,
    len: usize,
    reset_master: bool,
    hyper: Hyper,
    norm_sq: f64,
    grad: Vec<u64>,
    before: [Vec<u64>; 4],
    after: [Vec<u64>; 4],
}

fn read_case(file: &mut Reader<'_>) -> Case {
    let dtype = DTYPES[file.u32() as usize];
    let len = file.u32() as usize;
    let step = file.u32();
    let flags = file.u32();
    let [lr, beta1, beta2, eps, weight_decay, grad_scale, clip, norm_sq] = std::array::from_fn(|_| file.f64());
    let options = AdamWOptions { lr, beta1, beta2, eps, weight_decay, maximize: flags & 1 == 1 };
    Case {
        dtype,
        len,
        reset_master: flags & 2 == 2,
        #[expect(clippy::cast_possible_truncation, reason = "the one rounding to fp32")]
        hyper: Hyper { clip: clip as f32, ..Hyper::new(&options, u64::from(step), grad_scale) },
        norm_sq,
        grad: file.array(len * dtype.size()),
        before: STATE.map(|kind| file.array(len * kind.element_size(dtype))),
        after: STATE.map(|kind| file.array(len * kind.element_size(dtype))),
    }
}

#[test]
fn every_isa_gives_the_bits_of_the_python_reference() {
    let mut file = Reader(include_bytes!("data/adamw_golden.bin"));
    assert_eq!(file.take(8), b"FNADAMW1");
    let count = file.u32();
    assert!(count > 0);
    for index in 0..count {
        let case = read_case(&mut file);
        for isa in Isa::available() {
            let mut state = case.before.clone();
            let [param, master, exp_avg, exp_avg_sq] = state.each_mut().map(|words| words.as_mut_ptr());
            let span = Span {
                param: param.cast(),
                grad: case.grad.as_ptr().cast(),
                master: master.cast(),
                exp_avg: exp_avg.cast(),
                exp_avg_sq: exp_avg_sq.cast(),
                len: case.len,
                dtype: case.dtype,
                reset_master: case.reset_master,
            };
            // SAFETY: the buffers are this test's own and hold `len` elements each.
            let norm = unsafe { norm_sq_with(isa, span.grad, case.len, case.dtype) }.expect("trainable");
            assert!(norm.to_bits() == case.norm_sq.to_bits() || (norm.is_nan() && case.norm_sq.is_nan()));
            let mut into = state.clone();
            let [param, master, exp_avg, exp_avg_sq] = into.each_mut().map(|words| words.as_mut_ptr());
            let target = Target {
                param: param.cast(),
                master: master.cast(),
                exp_avg: exp_avg.cast(),
                exp_avg_sq: exp_avg_sq.cast(),
                second: std::ptr::null_mut(),
            };
            // SAFETY: as above.
            unsafe { adamw_into_with(isa, &span, &target, &case.hyper) }.expect("trainable");
            assert!(state == case.before, "case {index}: the source was touched");
            assert!(into == case.after, "case {index} {:?} {}: out of place", case.dtype, isa.name());
            // Parameters in place, their states elsewhere.
            let mut beside = state[0].clone();
            let own = beside.as_mut_ptr().cast();
            // SAFETY: as above.
            unsafe {
                adamw_into_with(isa, &Span { param: own, ..span }, &Target { param: own, ..target }, &case.hyper)
            }
            .expect("trainable");
            assert!(beside == case.after[0] && into == case.after, "case {index} {:?}: beside", case.dtype);
            // SAFETY: as above.
            unsafe { adamw_with(isa, &span, &case.hyper) }.expect("trainable");
            for (kind, (ours, theirs)) in STATE.iter().zip(state.iter().zip(&case.after)) {
                assert_eq!(ours, theirs, "case {index} {:?} {} {}", case.dtype, kind.name(), isa.name());
            }
            assert!(state != case.before, "case {index}: nothing was updated");
        }
    }
    assert!(file.0.is_empty(), "bytes are left over");
}
