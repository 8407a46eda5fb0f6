//! AdamW on the CPU: one written order of fp32 operations, the split master, gradient norms, means over
//! ranks, and the threads they run on.
//!
//! Owns the arithmetic of the update; docs/arithmetic.md states it once for the CPU, the CUDA kernels and the Python
//! reference. O1: the bits of a result depend on the inputs only, not on the instruction set, the number of threads,
//! the cut into pieces or the floating-point mode of the calling thread. O2: nothing allocates after a [`Pool`] is
//! made. O3: every NaN that is stored is canonical (`0x7fc00000`, `0x7fc0`, `0x7e00`).

mod adamw;
mod half;
mod hyper;
mod isa;
mod mean;
mod norm;
mod pool;

pub(crate) use adamw::unsupported;
pub use adamw::{
    Portion, Span, Target, Update, adamw, adamw_into_parallel, adamw_into_with, adamw_parallel, adamw_portion_with,
    adamw_with,
};
pub use half::{f16_to_f32, f32_to_f16, join_master, split_master};
pub use hyper::{AdamWOptions, Hyper};
pub use isa::Isa;
pub(crate) use isa::{Level, per_isa, prefetch};
pub use mean::{MeanPart, mean};
pub use norm::{NORM_BLOCK, NORM_SUMS, norm_blocks, norm_sq, norm_sq_parallel, norm_sq_with};
pub use pool::Pool;

pub use crate::model::PIECE;

/// Name of the instruction set that updates and norms use on this machine.
pub fn isa() -> &'static str {
    Isa::best().name()
}
