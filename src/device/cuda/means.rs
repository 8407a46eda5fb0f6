//! The kernels of kernels/mean.cu: parts of a whole unit in one launch.
#![expect(unsafe_code, reason = "launches a kernel over raw addresses")]

use std::sync::Arc;

use cudarc::driver::sys::{CUfunction, CUstream};

use super::{
    driver::Context,
    kernels::{ELEMENTS_PER_BLOCK, Functions, Module},
};
use crate::{dtype::DType, error::Result, optim::MeanPart};

pub(super) const SOURCE: &str =
    concat!(include_str!("../../../kernels/elements.cuh"), include_str!("../../../kernels/mean.cu"));

/// As in kernels/mean.cu. The arguments of a kernel are 4096 bytes at most.
const PARTS: usize = 48;
const _: () = assert!(size_of::<Parts>() <= 3584);

/// The layout of `Part` in kernels/mean.cu, where the fields are explained.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Part {
    out: u64,
    own: u64,
    others: u64,
    stride: u64,
    len: u64,
    tiles: u64,
    count: u32,
    before: u32,
    wide: u32,
}

/// Those of one launch: a kernel's argument.
#[repr(C)]
struct Parts {
    part: [Part; PARTS],
    count: u32,
    ranks: f32,
}

impl Parts {
    fn new(ranks: usize) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "as torch divides: the number of ranks in fp32")]
        let ranks = ranks as f32;
        Self { part: [Part::default(); PARTS], count: 0, ranks }
    }

    fn tiles(&self) -> u64 {
        self.count.checked_sub(1).map_or(0, |last| self.part[last as usize].tiles)
    }

    fn push(&mut self, part: &MeanPart) {
        let len = part.len as u64;
        self.part[self.count as usize] = Part {
            out: part.out as u64,
            own: part.own as u64,
            others: part.others as u64,
            stride: part.stride as u64,
            len,
            tiles: self.tiles() + len.div_ceil(ELEMENTS_PER_BLOCK),
            // No host has so many ranks that these would be cut.
            count: part.count as u32,
            before: part.before as u32,
            wide: part.aligned_to(16).into(),
        };
        self.count += 1;
    }
}

/// The kernels.
pub(super) struct Means {
    module: Module,
    functions: Functions,
}

impl Means {
    /// Compiles and loads.
    ///
    /// # Errors
    /// `FN-E003` without a compiler, `FN-E002` when the driver refuses.
    pub(super) fn load(context: &Arc<Context>) -> Result<Self> {
        let module = Module::load(context, "mean.cu", SOURCE)?;
        let functions = module.functions([c"mean_f32", c"mean_bf16", c"mean_f16"])?;
        Ok(Self { module, functions })
    }

    /// Enqueues the means of parts: one launch for each type, and more where there are more parts than one takes.
    ///
    /// # Safety
    /// As for [`crate::optim::mean`], until the stream has run it; the addresses are the device's.
    pub(super) unsafe fn enqueue(&self, stream: CUstream, parts: &[MeanPart], ranks: usize) -> Result<()> {
        parts.iter().try_for_each(MeanPart::check)?;
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            let Some(function) = self.functions.of(dtype) else { continue };
            let mut batch = Parts::new(ranks);
            for part in parts.iter().filter(|part| part.dtype == dtype && part.len > 0) {
                batch.push(part);
                if batch.count as usize == PARTS {
                    // SAFETY: passed on to the caller.
                    unsafe { self.launch(stream, function, &mut batch)? };
                    batch = Parts::new(ranks);
                }
            }
            if batch.count > 0 {
                // SAFETY: as above.
                unsafe { self.launch(stream, function, &mut batch)? };
            }
        }
        Ok(())
    }

    /// # Safety
    /// As for [`Means::enqueue`].
    unsafe fn launch(&self, stream: CUstream, function: CUfunction, batch: &mut Parts) -> Result<()> {
        let elements = batch.tiles() * ELEMENTS_PER_BLOCK;
        // SAFETY: the kernel takes this one argument; the caller vouches for the arrays.
        unsafe { self.module.launch(stream, function, elements, &mut [(&raw mut *batch).cast()]) }
    }
}
