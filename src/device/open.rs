//! Opening the device that was chosen.

use std::sync::Arc;

use super::{Device, DeviceChoice, HostDevice};
use crate::error::Result;
#[cfg(not(feature = "cuda"))]
use crate::error::{Code, Error};

/// Opens a device.
///
/// # Errors
/// `FN-E001` without a CUDA driver or a device of that number, `FN-E002` when the driver fails, `FN-E204` from the host.
pub fn open(choice: DeviceChoice) -> Result<Arc<dyn Device>> {
    match choice {
        DeviceChoice::Auto if cuda_count()? > 0 => open_cuda(0),
        DeviceChoice::Auto | DeviceChoice::Host => Ok(Arc::new(HostDevice::new()?)),
        DeviceChoice::Cuda(ordinal) => open_cuda(ordinal),
    }
}

#[cfg(feature = "cuda")]
fn cuda_count() -> Result<u32> {
    super::cuda::count()
}

#[cfg(feature = "cuda")]
fn open_cuda(ordinal: u32) -> Result<Arc<dyn Device>> {
    Ok(Arc::new(super::CudaDevice::new(ordinal)?))
}

#[cfg(not(feature = "cuda"))]
#[expect(clippy::unnecessary_wraps, reason = "the build with CUDA can fail here")]
fn cuda_count() -> Result<u32> {
    Ok(0)
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(ordinal: u32) -> Result<Arc<dyn Device>> {
    Err(Error::new(Code::NoCuda, format!("CUDA device {ordinal} was asked for; this build has no CUDA."))
        .action("Build with the feature `cuda`, or choose the host device."))
}
