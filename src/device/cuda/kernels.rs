//! Kernels: compiled for this device at first use, loaded once, launched on any stream. And those of kernels/adamw.cu.
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

pub(super) const SOURCE: &str =
    concat!(include_str!("../../../kernels/elements.cuh"), include_str!("../../../kernels/adamw.cu"));

const BLOCK: c_uint = 256;
/// Elements that a block takes at a time, eight per thread: a tile of kernels/mean.cu.
pub(super) const ELEMENTS_PER_BLOCK: u64 = 8 * BLOCK as u64;
/// Blocks per multiprocessor: enough in flight to fill the memory system.
const BLOCKS: c_int = 8;

/// A loaded module of kernels.
pub(super) struct Module {
    context: Arc<Context>,
    handle: CUmodule,
    /// Blocks that fill the device.
    grid: c_uint,
}

// SAFETY: a module and its functions may be used from any thread; the handle is never changed.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// Compiles and loads.
    ///
    /// # Errors
    /// `FN-E003` without a compiler, `FN-E002` when the driver refuses.
    pub(super) fn load(context: &Arc<Context>, name: &str, source: &str) -> Result<Self> {
        let major = context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let processors = context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let code = nvrtc::cubin(name, source, (major, minor))?;
        let _entered = context.enter()?;
        let mut handle = ptr::null_mut();
        // SAFETY: writes one handle, which `drop` unloads; the code is a whole ELF image.
        context.check(unsafe { context.driver.cuModuleLoadData(&raw mut handle, code.as_ptr().cast()) })?;
        Ok(Self { context: Arc::clone(context), handle, grid: (processors.max(1) * BLOCKS).unsigned_abs() })
    }

    /// Kernels of these names, for fp32, bf16 and fp16.
    pub(super) fn functions(&self, names: [&CStr; 3]) -> Result<Functions> {
        let _entered = self.context.enter()?;
        let mut functions = [ptr::null_mut(); 3];
        for (function, name) in functions.iter_mut().zip(names) {
            // SAFETY: writes one handle; the module is loaded and the name a C string.
            let found = unsafe { self.context.driver.cuModuleGetFunction(function, self.handle, name.as_ptr()) };
            self.context.check(found)?;
        }
        Ok(Functions(functions))
    }

    /// Enqueues a kernel with as many blocks as fill the device, and no more than it has use for: each thread takes eight elements at a time.
    ///
    /// # Safety
    /// The arguments are those of the kernel's signature, and what they lead to may be accessed as the kernel does until the stream has run it.
    pub(super) unsafe fn launch(
        &self,
        stream: CUstream,
        function: CUfunction,
        elements: u64,
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        let needed = elements.div_ceil(ELEMENTS_PER_BLOCK);
        let grid = c_uint::try_from(needed).map_or(self.grid, |blocks| blocks.clamp(1, self.grid));
        let (context, arguments) = (&*self.context, arguments.as_mut_ptr());
        let _entered = context.enter()?;
        // SAFETY: the caller vouches for the arguments, which are read during the call.
        context.check(unsafe {
            context.driver.cuLaunchKernel(function, grid, 1, 1, BLOCK, 1, 1, 0, stream, arguments, ptr::null_mut())
        })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let context = &*self.context;
        let Ok(_entered) = context.enter() else { return };
        // SAFETY: loaded in `load`; the owner of each stream has waited for its kernels. `drop` cannot return a failure.
        let _ = context.check(unsafe { context.driver.cuModuleUnload(self.handle) });
    }
}

/// A kernel for each type: fp32, bf16, fp16.
pub(super) struct Functions([CUfunction; 3]);

// SAFETY: functions of a module may be used from any thread; the handles are never changed.
unsafe impl Send for Functions {}
// SAFETY: as above.
unsafe impl Sync for Functions {}

impl Functions {
    /// The one for this type; none for a type without values.
    pub(super) fn of(&self, dtype: DType) -> Option<CUfunction> {
        match dtype {
            DType::F32 => Some(self.0[0]),
            DType::Bf16 => Some(self.0[1]),
            DType::F16 => Some(self.0[2]),
            DType::Opaque { .. } => None,
        }
    }
}

/// The kernels of updates.
pub(super) struct Kernels {
    module: Module,
    adamw: Functions,
}

impl Kernels {
    /// Compiles and loads.
    ///
    /// # Errors
    /// `FN-E003` without a compiler, `FN-E002` when the driver refuses.
    pub(super) fn load(context: &Arc<Context>) -> Result<Self> {
        let module = Module::load(context, "adamw.cu", SOURCE)?;
        let adamw = module.functions([c"adamw_f32", c"adamw_bf16", c"adamw_f16"])?;
        Ok(Self { module, adamw })
    }

    /// Enqueues the update of one span of device memory; its new values go to `to`.
    ///
    /// # Safety
    /// The arrays of the span are valid for reading, those of `to` for writing, and aligned to their elements; each of `to` is the same one of the
    /// span or disjoint from all. No other code writes the former or accesses the latter until the stream has run it; the addresses are the device's.
    pub(super) unsafe fn adamw(&self, stream: CUstream, span: &Span, to: &Target, hyper: &Hyper) -> Result<()> {
        let function = self.adamw.of(span.dtype).ok_or_else(|| unsupported(span.dtype))?;
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
        // SAFETY: the arguments are those of the kernel's signature; the caller vouches for the arrays.
        unsafe { self.module.launch(stream, function, span.len as u64, &mut arguments) }
    }
}
