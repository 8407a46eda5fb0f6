//! The kernels of kernels/adamw.cu: compiled for this device at first use, loaded once, launched on any stream.
#![expect(unsafe_code, reason = "calls into the CUDA driver")]

use std::{
    ffi::{CStr, c_int, c_uint, c_void},
    ptr,
    sync::Arc,
};

use cudarc::driver::sys::{CUdevice_attribute, CUfunction, CUmodule, CUstream};

use super::{driver::Context, nvrtc};
use crate::{
    dtype::DType,
    error::Result,
    optim::{Hyper, Span, Target, unsupported},
};

pub(super) const SOURCE: &str = include_str!("../../../kernels/adamw.cu");

const BLOCK: c_uint = 256;
/// Blocks per multiprocessor: enough in flight to fill the memory system.
const BLOCKS: c_int = 8;

/// A loaded module.
pub(super) struct Kernels {
    context: Arc<Context>,
    module: CUmodule,
    /// fp32, bf16, fp16.
    adamw: [CUfunction; 3],
    grid: c_uint,
}

// SAFETY: a module and its functions may be used from any thread; the handles are never changed.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

impl Kernels {
    /// Compiles and loads.
    ///
    /// # Errors
    /// `FN-E003` without a compiler, `FN-E002` when the driver refuses.
    pub(super) fn load(context: &Arc<Context>) -> Result<Self> {
        let major = context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let processors = context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let code = nvrtc::cubin("adamw.cu", SOURCE, (major, minor))?;
        let _entered = context.enter()?;
        let mut module = ptr::null_mut();
        // SAFETY: writes one handle, which `drop` unloads; the code is a whole ELF image.
        context.check(unsafe { context.driver.cuModuleLoadData(&raw mut module, code.as_ptr().cast()) })?;
        let mut kernels = Self {
            context: Arc::clone(context),
            module,
            adamw: [ptr::null_mut(); 3],
            grid: (processors.max(1) * BLOCKS).unsigned_abs(),
        };
        for (function, name) in kernels.adamw.iter_mut().zip([c"adamw_f32", c"adamw_bf16", c"adamw_f16"]) {
            // SAFETY: writes one handle; the module is loaded and the name a C string.
            context.check(unsafe { find(context, function, module, name) })?;
        }
        Ok(kernels)
    }

    /// Enqueues the update of one span of device memory; its new values go to `to`.
    ///
    /// # Safety
    /// The arrays of the span are valid for reading, those of `to` for writing, and aligned to their elements; each of `to` is the same one of the
    /// span or disjoint from all. No other code writes the former or accesses the latter until the stream has run it; the addresses are the device's.
    pub(super) unsafe fn adamw(&self, stream: CUstream, span: &Span, to: &Target, hyper: &Hyper) -> Result<()> {
        let function = match span.dtype {
            DType::F32 => self.adamw[0],
            DType::Bf16 => self.adamw[1],
            DType::F16 => self.adamw[2],
            DType::Opaque { .. } => {
                return Err(unsupported(span.dtype));
            }
        };
        if span.len == 0 {
            return Ok(());
        }
        let (mut param, mut grad, mut master) = (span.param, span.grad, span.master);
        let (mut m, mut v, mut n) = (span.exp_avg, span.exp_avg_sq, span.len as u64);
        let (mut to, mut hyper, mut reset) = (*to, *hyper, u32::from(span.reset_master));
        let mut arguments: [*mut c_void; 9] = [
            (&raw mut param).cast(),
            (&raw mut grad).cast(),
            (&raw mut master).cast(),
            (&raw mut m).cast(),
            (&raw mut v).cast(),
            (&raw mut to).cast(),
            (&raw mut n).cast(),
            (&raw mut hyper).cast(),
            (&raw mut reset).cast(),
        ];
        let needed = (span.len as u64).div_ceil(8).div_ceil(u64::from(BLOCK));
        let grid = c_uint::try_from(needed).map_or(self.grid, |blocks| blocks.clamp(1, self.grid));
        let context = &*self.context;
        let _entered = context.enter()?;
        // SAFETY: the arguments are those of the kernel's signature and are read during the call.
        context.check(unsafe {
            context.driver.cuLaunchKernel(
                function,
                grid,
                1,
                1,
                BLOCK,
                1,
                1,
                0,
                stream,
                arguments.as_mut_ptr(),
                ptr::null_mut(),
            )
        })
    }
}

/// # Safety
/// The module is loaded.
unsafe fn find(
    context: &Context,
    function: &mut CUfunction,
    module: CUmodule,
    name: &CStr,
) -> std::result::Result<(), super::driver::Failure> {
    // SAFETY: writes one handle; the caller vouches for the module.
    unsafe { context.driver.cuModuleGetFunction(&raw mut *function, module, name.as_ptr()) }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        let context = &*self.context;
        let Ok(_entered) = context.enter() else { return };
        // SAFETY: loaded in `load`; the owner of each stream has waited for its kernels. `drop` cannot return a failure.
        let _ = context.check(unsafe { context.driver.cuModuleUnload(self.module) });
    }
}
