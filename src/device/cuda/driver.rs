//! The CUDA driver, loaded at run time, and the primary context of one device.
//!
//! C1: a missing library, device or entry point is an error, never a panic.
//! C2: every call leaves the calling thread's current context as it found it (torch keeps its device there).
//! C3: after an error that loses the context no call is made any more; the first such error answers every later call.
#![expect(unsafe_code, reason = "calls into the CUDA driver")]

use std::{
    ffi::{CStr, c_char, c_int, c_uchar, c_uint, c_ulonglong, c_void},
    ptr::{self, NonNull},
    sync::{Arc, OnceLock},
};

use cudarc::driver::sys::{
    CUcontext, CUdevice, CUdevice_attribute, CUdeviceptr, CUevent, CUfunction, CUmemAccessDesc,
    CUmemAllocationGranularity_flags, CUmemAllocationProp, CUmemGenericAllocationHandle, CUmodule, CUstream,
    CUstreamCaptureMode,
};

use crate::error::{Code, Error, Result};

/// CUDA's numbers for the results that mean something here. Plain numbers: a newer driver may return ones that no
/// enumeration of an older header holds.
pub(super) mod code {
    use std::ffi::c_int;

    pub(in super::super) const OUT_OF_MEMORY: c_int = 2;
    pub(in super::super) const INVALID_HANDLE: c_int = 400;
    pub(in super::super) const NOT_READY: c_int = 600;
    pub(in super::super) const CAPTURED_EVENT: c_int = 907;
    pub(super) const DEINITIALIZED: c_int = 4;
    pub(super) const STUB_LIBRARY: c_int = 34;
    pub(super) const NO_DEVICE: c_int = 100;

    /// True for results after which the context answers nothing but the same error.
    pub(super) fn loses_context(code: c_int) -> bool {
        matches!(code, DEINITIALIZED | 201 | 214 | 220 | 226 | 700 | 702 | 709 | 710 | 714..=719 | 721 | 999)
    }
}

/// What errors call the thing that failed before there is a device.
const THING: &str = "CUDA driver";

/// A driver call that did not return success.
#[derive(Clone, Copy, Debug)]
pub(super) struct Failure {
    call: &'static str,
    pub(super) code: c_int,
}

type Done = std::result::Result<(), Failure>;

macro_rules! entry_points {
    ($($name:ident($($arg:ident: $type:ty),*);)*) => {
        /// The driver's entry points.
        #[expect(non_snake_case, reason = "the driver's own names")]
        pub(super) struct Driver { $($name: unsafe extern "C" fn($($type),*) -> c_int,)* }

        #[expect(non_snake_case, clippy::too_many_arguments, reason = "the driver's own names and signatures")]
        impl Driver {
            /// Looks every entry point up; names the one that is missing.
            ///
            /// # Safety
            /// `library` is a handle of the CUDA driver.
            unsafe fn look_up(library: NonNull<c_void>) -> std::result::Result<Self, &'static str> {
                $(
                    // SAFETY: the handle is valid and the name ends in a zero byte.
                    let address = unsafe {
                        libc::dlsym(library.as_ptr(), concat!(stringify!($name), "\0").as_ptr().cast())
                    };
                    if address.is_null() {
                        return Err(stringify!($name));
                    }
                    // SAFETY: the type is the one that CUDA's header declares for this name.
                    let $name = unsafe {
                        std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),*) -> c_int>(address)
                    };
                )*
                Ok(Self { $($name,)* })
            }

            $(
                /// The driver's call of this name.
                ///
                /// # Safety
                /// What CUDA's documentation asks for.
                pub(super) unsafe fn $name(&self, $($arg: $type),*) -> Done {
                    // SAFETY: passed on to the caller.
                    match unsafe { (self.$name)($($arg),*) } {
                        0 => Ok(()),
                        code => Err(Failure { call: stringify!($name), code }),
                    }
                }
            )*
        }
    };
}

entry_points! {
    cuInit(flags: c_uint);
    cuDriverGetVersion(version: *mut c_int);
    cuGetErrorName(error: c_int, text: *mut *const c_char);
    cuGetErrorString(error: c_int, text: *mut *const c_char);
    cuDeviceGetCount(count: *mut c_int);
    cuDeviceGet(device: *mut CUdevice, ordinal: c_int);
    cuDeviceGetName(name: *mut c_char, len: c_int, device: CUdevice);
    cuDeviceGetPCIBusId(bus: *mut c_char, len: c_int, device: CUdevice);
    cuDeviceGetAttribute(value: *mut c_int, attribute: CUdevice_attribute, device: CUdevice);
    cuDeviceTotalMem_v2(bytes: *mut usize, device: CUdevice);
    cuDevicePrimaryCtxRetain(context: *mut CUcontext, device: CUdevice);
    cuDevicePrimaryCtxRelease_v2(device: CUdevice);
    cuCtxGetCurrent(context: *mut CUcontext);
    cuCtxSetCurrent(context: CUcontext);
    cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int);
    cuThreadExchangeStreamCaptureMode(mode: *mut CUstreamCaptureMode);
    cuMemGetInfo_v2(free: *mut usize, total: *mut usize);
    cuMemGetAllocationGranularity(bytes: *mut usize, prop: *const CUmemAllocationProp, option: CUmemAllocationGranularity_flags);
    cuMemAddressReserve(address: *mut CUdeviceptr, bytes: usize, alignment: usize, hint: CUdeviceptr, flags: c_ulonglong);
    cuMemAddressFree(address: CUdeviceptr, bytes: usize);
    cuMemCreate(handle: *mut CUmemGenericAllocationHandle, bytes: usize, prop: *const CUmemAllocationProp, flags: c_ulonglong);
    cuMemRelease(handle: CUmemGenericAllocationHandle);
    cuMemMap(address: CUdeviceptr, bytes: usize, offset: usize, handle: CUmemGenericAllocationHandle, flags: c_ulonglong);
    cuMemUnmap(address: CUdeviceptr, bytes: usize);
    cuMemSetAccess(address: CUdeviceptr, bytes: usize, access: *const CUmemAccessDesc, count: usize);
    cuMemHostRegister_v2(address: *mut c_void, bytes: usize, flags: c_uint);
    cuMemHostUnregister(address: *mut c_void);
    cuMemHostGetDevicePointer_v2(device: *mut CUdeviceptr, host: *mut c_void, flags: c_uint);
    cuMemcpyAsync(dst: CUdeviceptr, src: CUdeviceptr, bytes: usize, stream: CUstream);
    cuMemsetD8Async(dst: CUdeviceptr, byte: c_uchar, bytes: usize, stream: CUstream);
    cuStreamCreateWithPriority(stream: *mut CUstream, flags: c_uint, priority: c_int);
    cuStreamSynchronize(stream: CUstream);
    cuStreamIsCapturing(stream: CUstream, status: *mut c_int);
    cuStreamWaitEvent(stream: CUstream, event: CUevent, flags: c_uint);
    cuStreamWriteValue64_v2(stream: CUstream, address: CUdeviceptr, value: u64, flags: c_uint);
    cuStreamWaitValue64_v2(stream: CUstream, address: CUdeviceptr, value: u64, flags: c_uint);
    cuStreamDestroy_v2(stream: CUstream);
    cuEventCreate(event: *mut CUevent, flags: c_uint);
    cuEventRecord(event: CUevent, stream: CUstream);
    cuEventQuery(event: CUevent);
    cuEventElapsedTime(millis: *mut f32, from: CUevent, to: CUevent);
    cuEventDestroy_v2(event: CUevent);
    cuModuleLoadData(module: *mut CUmodule, image: *const c_void);
    cuModuleUnload(module: CUmodule);
    cuModuleGetFunction(function: *mut CUfunction, module: CUmodule, name: *const c_char);
    cuLaunchKernel(function: CUfunction, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint, block_z: c_uint, shared: c_uint, stream: CUstream, arguments: *mut *mut c_void, extra: *mut *mut c_void);
}

impl Driver {
    /// The driver, loaded and initialised once.
    ///
    /// # Errors
    /// `FN-E001` without one, `FN-E002` when it does not start.
    pub(super) fn get() -> Result<&'static Self> {
        static DRIVER: OnceLock<Result<Driver>> = OnceLock::new();
        DRIVER.get_or_init(Self::load).as_ref().map_err(Error::clone)
    }

    fn load() -> Result<Self> {
        const ACTION: &str = "Install an NVIDIA driver (in a container, pass the GPU in), or choose the host device.";
        let library = open_library()
            .map_err(|cause| Error::new(Code::NoCuda, format!("there is no CUDA driver: {cause}.")).action(ACTION))?;
        // SAFETY: just opened, and never closed.
        let driver = unsafe { Self::look_up(library) }.map_err(|name| {
            Error::new(Code::NoCuda, format!("the CUDA driver here has no {name}; it is too old."))
                .action("Install a driver for CUDA 12.0 or later.")
        })?;
        // SAFETY: the first call of every CUDA program.
        match unsafe { driver.cuInit(0) } {
            Ok(()) => Ok(driver),
            Err(failure) if matches!(failure.code, code::NO_DEVICE | code::STUB_LIBRARY) => {
                Err(Error::new(Code::NoCuda, format!("{}.", driver.describe(failure))).action(ACTION))
            }
            Err(failure) => Err(driver.error(THING, failure)),
        }
    }

    /// How many devices it sees.
    pub(super) fn count(&self) -> Result<u32> {
        let mut count = 0;
        // SAFETY: writes one integer.
        unsafe { self.cuDeviceGetCount(&raw mut count) }.map_err(|e| self.error(THING, e))?;
        Ok(u32::try_from(count).unwrap_or(0))
    }

    /// The device of an ordinal.
    pub(super) fn device(&self, ordinal: u32) -> Result<CUdevice> {
        let count = self.count()?;
        if ordinal >= count {
            return Err(Error::new(
                Code::NoCuda,
                format!("there is no CUDA device {ordinal}; the driver sees {count}."),
            )
            .action("Look at CUDA_VISIBLE_DEVICES and nvidia-smi."));
        }
        let mut device = 0;
        // SAFETY: writes one integer.
        unsafe { self.cuDeviceGet(&raw mut device, ordinal.cast_signed()) }.map_err(|e| self.error(THING, e))?;
        Ok(device)
    }

    /// `cuMemMap failed: CUDA_ERROR_INVALID_VALUE (invalid argument)`.
    fn describe(&self, failure: Failure) -> String {
        let text = |look_up: &dyn Fn(*mut *const c_char) -> Done| {
            let mut text = ptr::null();
            if look_up(&raw mut text).is_err() || text.is_null() {
                return format!("error {}", failure.code);
            }
            // SAFETY: on success a string of static lifetime.
            unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
        };
        // SAFETY: both calls write one pointer and accept any number.
        let name = text(&|to| unsafe { self.cuGetErrorName(failure.code, to) });
        // SAFETY: as above.
        let meaning = text(&|to| unsafe { self.cuGetErrorString(failure.code, to) });
        format!("{} failed: {name} ({meaning})", failure.call)
    }

    /// The error a failed call becomes; `thing` is the device or the driver.
    pub(super) fn error(&self, thing: &str, failure: Failure) -> Error {
        let action = if code::loses_context(failure.code) {
            "The CUDA context is lost, often by a kernel that ran earlier: look at the first error, run again with \
             CUDA_LAUNCH_BLOCKING=1 to find it, and restart the process."
        } else {
            "If the driver and the GPU are sound (nvidia-smi), please report it with this message."
        };
        Error::new(Code::Cuda, format!("{thing}: {}.", self.describe(failure))).action(action)
    }
}

/// Opens the driver's library by the name that torch's runtime uses, so that both use the same one.
fn open_library() -> std::result::Result<NonNull<c_void>, String> {
    // SAFETY: a C string; the library's constructors are those that any CUDA program runs.
    let library = unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    NonNull::new(library).ok_or_else(|| {
        // SAFETY: takes nothing; after a failure it returns this thread's message.
        let cause = unsafe { libc::dlerror() };
        if cause.is_null() {
            return "libcuda.so.1 cannot be opened".to_owned();
        }
        // SAFETY: a C string, valid until the next such call of this thread.
        unsafe { CStr::from_ptr(cause) }.to_string_lossy().into_owned()
    })
}

/// The primary context of a device, shared with torch.
pub(super) struct Context {
    pub(super) driver: &'static Driver,
    pub(super) ordinal: u32,
    pub(super) device: CUdevice,
    handle: CUcontext,
    lost: OnceLock<Error>,
}

// SAFETY: a context may be used from any thread; the handle is never changed.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Retains the primary context of a device.
    pub(super) fn retain(ordinal: u32) -> Result<Arc<Self>> {
        let driver = Driver::get()?;
        let device = driver.device(ordinal)?;
        let mut handle = ptr::null_mut();
        // SAFETY: writes one handle; `drop` releases it.
        unsafe { driver.cuDevicePrimaryCtxRetain(&raw mut handle, device) }.map_err(|e| driver.error(THING, e))?;
        Ok(Arc::new(Self { driver, ordinal, device, handle, lost: OnceLock::new() }))
    }

    /// Makes the context current for this thread until the guard is dropped.
    pub(super) fn enter(&self) -> Result<Entered<'_>> {
        if let Some(error) = self.lost.get() {
            return Err(error.clone());
        }
        let mut before = ptr::null_mut();
        // SAFETY: writes one handle.
        self.check(unsafe { self.driver.cuCtxGetCurrent(&raw mut before) })?;
        if before != self.handle {
            // SAFETY: the context is retained.
            self.check(unsafe { self.driver.cuCtxSetCurrent(self.handle) })?;
        }
        Ok(Entered { context: self, before })
    }

    /// Turns the failure of a call into an error, and remembers it if the context is lost.
    pub(super) fn check(&self, done: Done) -> Result<()> {
        done.map_err(|failure| {
            let error = self.driver.error(&format!("CUDA device {}", self.ordinal), failure);
            if code::loses_context(failure.code) {
                return self.lost.get_or_init(|| error).clone();
            }
            error
        })
    }

    /// An attribute of the device.
    pub(super) fn attribute(&self, attribute: CUdevice_attribute) -> Result<c_int> {
        let mut value = 0;
        // SAFETY: writes one integer.
        self.check(unsafe { self.driver.cuDeviceGetAttribute(&raw mut value, attribute, self.device) })?;
        Ok(value)
    }

    /// True if the last record of an event is done; the context is entered. The query must not disturb a graph that the user
    /// captures on another thread.
    ///
    /// # Safety
    /// The event is alive.
    pub(super) unsafe fn done(&self, event: CUevent) -> Result<bool> {
        let mut mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: swaps the thread's mode with `mode`, here and back below.
        self.check(unsafe { self.driver.cuThreadExchangeStreamCaptureMode(&raw mut mode) })?;
        // SAFETY: the caller vouches for the event.
        let done = unsafe { self.driver.cuEventQuery(event) };
        // SAFETY: as above.
        self.check(unsafe { self.driver.cuThreadExchangeStreamCaptureMode(&raw mut mode) })?;
        match done {
            Err(failure) if failure.code == code::NOT_READY => Ok(false),
            other => self.check(other).map(|()| true),
        }
    }

    /// The highest priority of a stream.
    pub(super) fn first_priority(&self) -> Result<c_int> {
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: writes two integers.
        self.check(unsafe { self.driver.cuCtxGetStreamPriorityRange(&raw mut least, &raw mut greatest) })?;
        Ok(greatest)
    }

    /// Free and total bytes of the device's memory.
    pub(super) fn memory(&self) -> Result<(u64, u64)> {
        let _entered = self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two integers.
        self.check(unsafe { self.driver.cuMemGetInfo_v2(&raw mut free, &raw mut total) })?;
        Ok((free as u64, total as u64))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if self.lost.get().is_none() {
            // SAFETY: retained once in `retain`. At the end of a process the driver may be gone and says so.
            let _ = unsafe { self.driver.cuDevicePrimaryCtxRelease_v2(self.device) };
        }
    }
}

/// While it lives the context is the thread's current one.
pub(super) struct Entered<'a> {
    context: &'a Context,
    before: CUcontext,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        if self.before != self.context.handle {
            // SAFETY: what was current before; null is allowed.
            let _ = unsafe { self.context.driver.cuCtxSetCurrent(self.before) };
        }
    }
}
