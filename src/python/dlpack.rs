//! Memory of the runtime as DLPack capsules: one dimension of bytes, kept alive by what owns it.
//!
//! The structures are those of DLPack 0.8 (<https://dmlc.github.io/dlpack/latest/c_api.html>).
#![expect(unsafe_code, reason = "builds the C structure that DLPack asks for")]

use std::{any::Any, ffi::c_void};

use pyo3::{ffi, prelude::*};

use funicular::device::DeviceKind;

#[repr(C)]
struct Device {
    device_type: i32,
    device_id: i32,
}

#[repr(C)]
struct DataType {
    code: u8,
    bits: u8,
    lanes: u16,
}

#[repr(C)]
struct Tensor {
    data: *mut c_void,
    device: Device,
    ndim: i32,
    dtype: DataType,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

#[repr(C)]
struct Managed {
    tensor: Tensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Self)>,
}

/// What a capsule keeps alive.
type Owner = Box<dyn Any + Send + Sync>;

/// One allocation: the structure DLPack sees, its shape, and the owner of the bytes.
#[repr(C)]
struct Holder {
    managed: Managed,
    shape: [i64; 1],
    strides: [i64; 1],
    /// The process that made it. Devices and threads are that process's: a forked child gives none of them up.
    pid: u32,
    _owner: Owner,
}

const NAME: &std::ffi::CStr = c"dltensor";
const CPU: i32 = 1;
const CUDA: i32 = 2;
const UNSIGNED: u8 = 1;

unsafe extern "C" fn delete(managed: *mut Managed) {
    // May run with the GIL held: nothing that a device waits for when it is dropped needs the GIL.
    // SAFETY: `context` is the `Holder` that `capsule` leaked; DLPack calls this once.
    let holder = unsafe { Box::from_raw((*managed).context.cast::<Holder>()) };
    if holder.pid != std::process::id() {
        std::mem::forget(holder);
    }
}

unsafe extern "C" fn destroy(capsule: *mut ffi::PyObject) {
    // SAFETY: called by Python with the capsule; a consumer renames it, so this name means that no consumer took the
    // tensor.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, NAME.as_ptr()) == 1 {
            let managed = ffi::PyCapsule_GetPointer(capsule, NAME.as_ptr()).cast::<Managed>();
            if let Some(deleter) = (*managed).deleter {
                deleter(managed);
            }
        }
    }
}

/// A capsule over `len` bytes at `address` on `kind`, keeping `owner` alive while any tensor made from it lives.
pub(crate) fn capsule(py: Python<'_>, address: u64, len: u64, kind: DeviceKind, owner: Owner) -> PyResult<Py<PyAny>> {
    let device = match kind {
        DeviceKind::Host => Device { device_type: CPU, device_id: 0 },
        DeviceKind::Cuda(n) => Device { device_type: CUDA, device_id: n.cast_signed() },
    };
    let tensor = Tensor {
        data: address as *mut c_void,
        device,
        ndim: 1,
        dtype: DataType { code: UNSIGNED, bits: 8, lanes: 1 },
        shape: std::ptr::null_mut(),
        strides: std::ptr::null_mut(),
        byte_offset: 0,
    };
    let managed = Managed { tensor, context: std::ptr::null_mut(), deleter: Some(delete) };
    let holder = Box::leak(Box::new(Holder {
        managed,
        shape: [len.cast_signed()],
        strides: [1],
        pid: std::process::id(),
        _owner: owner,
    }));
    holder.managed.tensor.shape = holder.shape.as_mut_ptr();
    holder.managed.tensor.strides = holder.strides.as_mut_ptr();
    holder.managed.context = std::ptr::from_mut(holder).cast();
    // SAFETY: a valid pointer, a static name, and a destructor that frees what was leaked above.
    let raw =
        unsafe { ffi::PyCapsule_New(std::ptr::from_mut(&mut holder.managed).cast(), NAME.as_ptr(), Some(destroy)) };
    // SAFETY: a new reference, or null with an exception set.
    unsafe { Bound::from_owned_ptr_or_err(py, raw) }.map(Bound::unbind)
}
