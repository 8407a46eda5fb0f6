//! AdamW and the norm over spans much larger than the cache, in bytes of DRAM traffic per second.
//!
//! `cargo bench --bench adamw` for everything; benches/adamw_vs_torch.py compares with torch's fused AdamW.
//! Environment: `ADAMW_MI` elements in Mi (64), `ADAMW_THREADS` (all processors), `ADAMW_LINE=1`: instead of criterion,
//! answer each line `<dtype>` on stdin with the seconds of one parallel step, for interleaved comparisons; `into <dtype>` is out of place, and
//! `weights`, `moments`, `param` and `states` are the passes of an update that makes its weights first, `param` out of place. `ADAMW_CLIP=1`
//! multiplies gradients by a factor, as clipping does.
#![expect(unsafe_code, reason = "cuts raw buffers out of a host region")]
#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "a program, not a library")]

use std::{io::BufRead, sync::Arc, time::Instant};

use criterion::{Criterion, Throughput};
use funicular::{
    dtype::{DType, StateKind},
    memory::HostRegion,
    optim::{
        AdamWOptions, Hyper, Isa, PIECE, Pool, Portion, Span, Target, Update, adamw_into_parallel, adamw_parallel,
        adamw_portion_with, adamw_with, norm_blocks, norm_sq_parallel,
    },
    quantities::ByteCount,
};

const KINDS: [StateKind; 5] =
    [StateKind::Param, StateKind::Grad, StateKind::Master, StateKind::ExpAvg, StateKind::ExpAvgSq];
const DTYPES: [(&str, DType); 3] = [("bf16", DType::Bf16), ("f16", DType::F16), ("f32", DType::F32)];

fn setting(name: &str, default: usize) -> usize {
    std::env::var(name).ok().map_or(default, |text| text.parse().unwrap())
}

/// Bytes between the arrays: at distances of 256 MiB some processors' memory is half as fast, which no model's arrays are apart.
const GAP: usize = 8192 + 256;

/// Buffers on huge pages, filled with numbers of ordinary size.
fn buffers(dtype: DType, len: usize) -> (Arc<HostRegion>, Span) {
    let size: usize = KINDS.iter().map(|kind| kind.element_size(dtype)).sum();
    let region = HostRegion::new(ByteCount((size * len + KINDS.len() * GAP) as u64), "the bench").unwrap();
    let mut offset = 0;
    let [param, grad, master, exp_avg, exp_avg_sq] = KINDS.map(|kind| {
        let bytes = kind.element_size(dtype) * len;
        // SAFETY: inside the region, which no other code has.
        let array = unsafe { std::slice::from_raw_parts_mut(region.as_ptr().add(offset), bytes) };
        // 0x3c00_3c00 and the like: about 0.01 in fp32 and bf16, 1 in fp16.
        array.iter_mut().enumerate().for_each(|(i, byte)| *byte = [(i >> 2) as u8, 0x3c][i % 2]);
        offset += bytes + GAP;
        array.as_mut_ptr()
    });
    let (exp_avg, exp_avg_sq) = (exp_avg.cast(), exp_avg_sq.cast());
    (region, Span { param, grad, master, exp_avg, exp_avg_sq, len, dtype, reset_master: false })
}

/// Bytes read and written per element: the gradient is only read.
fn traffic(dtype: DType) -> usize {
    KINDS.iter().map(|kind| kind.element_size(dtype) * 2).sum::<usize>() - dtype.size()
}

fn hyper() -> Hyper {
    let clip = if setting("ADAMW_CLIP", 0) == 1 { 0.77 } else { 1.0 };
    Hyper { clip, ..Hyper::new(&AdamWOptions::default(), 10, 1.0) }
}

fn step(pool: &Pool, span: Span) {
    // SAFETY: the span's buffers live in a region that this bench owns.
    unsafe { adamw_parallel(pool, &[Update { span, hyper: hyper() }]) }.unwrap();
}

/// Out of place: `spare` has room for any type.
fn step_into(pool: &Pool, span: Span, spare: &Span) {
    let to = Target::in_place(spare);
    // SAFETY: as in `step`; the target's buffers are another region's.
    unsafe { adamw_into_parallel(pool, &[(Update { span, hyper: hyper() }, to)]) }.unwrap();
}

/// One pass of an update in two.
fn step_portion(pool: &Pool, span: Span, spare: &Span, portion: Portion) {
    let hyper = hyper();
    let (dtype, len) = (span.dtype, span.len);
    let to = if portion == Portion::Param { spare.param } else { span.param } as usize;
    let [param, grad, master, exp_avg, exp_avg_sq] =
        [span.param, span.grad.cast_mut(), span.master, span.exp_avg.cast(), span.exp_avg_sq.cast()]
            .map(|at| at as usize);
    let task = |index: usize| {
        let start = index * PIECE;
        let (at, of_master) = (start * dtype.size(), start * StateKind::Master.element_size(dtype));
        let piece = Span {
            param: (param + at) as *mut u8,
            grad: (grad + at) as *const u8,
            master: (master + of_master) as *mut u8,
            exp_avg: (exp_avg + 4 * start) as *mut f32,
            exp_avg_sq: (exp_avg_sq + 4 * start) as *mut f32,
            len: PIECE.min(len - start),
            ..span_of(dtype)
        };
        let to = Target { param: (to + at) as *mut u8, ..Target::in_place(&piece) };
        // SAFETY: as in `step`; pieces are disjoint.
        unsafe { adamw_portion_with(Isa::best(), &piece, portion, &to, &hyper) }.unwrap();
    };
    pool.run(len.div_ceil(PIECE), &task).unwrap();
}

/// A span of nothing.
fn span_of(dtype: DType) -> Span {
    let none = std::ptr::null_mut();
    Span {
        param: none,
        grad: none,
        master: none,
        exp_avg: none.cast(),
        exp_avg_sq: none.cast(),
        len: 0,
        dtype,
        reset_master: false,
    }
}

fn with_criterion(len: usize, pool: &Pool) {
    let mut criterion = Criterion::default().configure_from_args().sample_size(10);
    for (name, dtype) in DTYPES {
        let (_region, span) = buffers(dtype, len);
        let mut group = criterion.benchmark_group(format!("adamw/{name}"));
        group.throughput(Throughput::Bytes((traffic(dtype) * len) as u64));
        group.bench_function(format!("{} threads", pool.threads()), |b| b.iter(|| step(pool, span)));
        for isa in Isa::available() {
            group.bench_function(format!("1 thread, {}", isa.name()), |b| {
                // SAFETY: as in `step`.
                b.iter(|| unsafe { adamw_with(isa, &span, &hyper()) }.unwrap());
            });
        }
        group.finish();
        let mut group = criterion.benchmark_group(format!("norm/{name}"));
        let mut partials = vec![0.0; norm_blocks(len)];
        group.throughput(Throughput::Bytes((dtype.size() * len) as u64));
        group.bench_function(format!("{} threads", pool.threads()), |b| {
            // SAFETY: as in `step`.
            b.iter(|| unsafe { norm_sq_parallel(pool, span.grad, len, dtype, &mut partials) }.unwrap());
        });
        group.finish();
    }
    criterion.final_summary();
}

fn by_line(len: usize, pool: &Pool) {
    let all = DTYPES.map(|(name, dtype)| (name, buffers(dtype, len)));
    let (_region, spare) = buffers(DType::F16, len);
    println!("isa {} threads {} len {len}", funicular::optim::isa(), pool.threads());
    for line in std::io::stdin().lock().lines() {
        let line = line.unwrap();
        let (place, name) = line.trim().split_once(' ').unwrap_or(("in", line.trim()));
        let (_, (_, span)) = all.iter().find(|(known, _)| *known == name).unwrap();
        let start = Instant::now();
        match place {
            "into" => step_into(pool, *span, &spare),
            "weights" => step_portion(pool, *span, &spare, Portion::Weights),
            "moments" => step_portion(pool, *span, &spare, Portion::Moments),
            "param" => step_portion(pool, *span, &spare, Portion::Param),
            "states" => step_portion(pool, *span, &spare, Portion::States),
            _ => step(pool, *span),
        }
        println!("{}", start.elapsed().as_secs_f64());
    }
}

fn main() {
    let len = setting("ADAMW_MI", 64) << 20;
    let pool = Pool::new(std::env::var_os("ADAMW_THREADS").map(|_| setting("ADAMW_THREADS", 1))).unwrap();
    if std::env::var_os("ADAMW_LINE").is_some() { by_line(len, &pool) } else { with_criterion(len, &pool) }
}
