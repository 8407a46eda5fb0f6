//! Frames in device memory: one address range for all units, mapped chunk by chunk onto a ring of physical handles.
//!
//! F1: a handle is mapped whole, at offset 0 (what the driver demands), at as many addresses as units share it.
//! F2: taken down in the order copies, mappings, addresses, handles.
#![expect(unsafe_code, reason = "maps device memory through the driver")]

use std::sync::Arc;

use cudarc::driver::sys::{
    CUdeviceptr, CUmemAccess_flags, CUmemAccessDesc, CUmemAllocationGranularity_flags, CUmemAllocationHandleType,
    CUmemAllocationProp, CUmemAllocationProp_st__bindgen_ty_1, CUmemAllocationType, CUmemGenericAllocationHandle,
    CUmemLocation, CUmemLocationType,
};

use super::{
    driver::{Context, code},
    streams::Streams,
};
use crate::{
    device::{FrameSpan, Frames},
    error::{Code, Error, Result},
    quantities::ByteCount,
};

/// Where frames live: this device's own memory.
fn location(context: &Context) -> CUmemLocation {
    CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: context.ordinal.cast_signed() }
}

fn properties(context: &Context) -> CUmemAllocationProp {
    CUmemAllocationProp {
        type_: CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE,
        location: location(context),
        win32HandleMetaData: std::ptr::null_mut(),
        allocFlags: CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        },
    }
}

/// Smallest size of a chunk.
pub(super) fn granularity(context: &Context) -> Result<u64> {
    let _entered = context.enter()?;
    let (mut bytes, prop) = (0, properties(context));
    let minimum = CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
    // SAFETY: writes one integer, reads `prop` during the call.
    context.check(unsafe { context.driver.cuMemGetAllocationGranularity(&raw mut bytes, &raw const prop, minimum) })?;
    Ok(bytes as u64)
}

/// Device addresses and the physical memory behind them. What is recorded here exists, so a half-made one drops cleanly.
pub(super) struct CudaFrames {
    streams: Arc<Streams>,
    chunk_bytes: usize,
    /// The reserved range; 0 bytes before it is reserved.
    base: CUdeviceptr,
    reserved: usize,
    /// Bytes mapped so far, from `base` on.
    mapped: usize,
    ring: Vec<CUmemGenericAllocationHandle>,
    addresses: Vec<u64>,
}

impl CudaFrames {
    /// Takes the memory and maps every span; the spans fit the ring (see [`crate::device::check_ring`]).
    pub(super) fn create(
        streams: Arc<Streams>,
        ring_chunks: u32,
        chunk_bytes: u64,
        spans: &[FrameSpan],
    ) -> Result<Self> {
        let context = Arc::clone(&streams.context);
        let _entered = context.enter()?;
        let mut frames = Self {
            streams,
            chunk_bytes: chunk_bytes as usize,
            base: 0,
            reserved: 0,
            mapped: 0,
            ring: Vec::with_capacity(ring_chunks as usize),
            addresses: Vec::with_capacity(spans.len()),
        };
        for _ in 0..ring_chunks {
            frames.take_chunk(ring_chunks)?;
        }
        let chunks: u64 = spans.iter().map(|span| u64::from(span.chunks)).sum();
        frames.reserve((chunks * chunk_bytes) as usize)?;
        for span in spans {
            frames.map(*span)?;
        }
        Ok(frames)
    }

    fn take_chunk(&mut self, ring_chunks: u32) -> Result<()> {
        let context = &*self.streams.context;
        let (mut handle, prop) = (0, properties(context));
        // SAFETY: writes one handle, which `drop` releases; reads `prop` during the call.
        let taken = unsafe { context.driver.cuMemCreate(&raw mut handle, self.chunk_bytes, &raw const prop, 0) };
        match taken {
            Err(failure) if failure.code == code::OUT_OF_MEMORY => Err(self.no_memory(ring_chunks)),
            other => {
                context.check(other)?;
                self.ring.push(handle);
                Ok(())
            }
        }
    }

    fn no_memory(&self, ring_chunks: u32) -> Error {
        let chunk = self.chunk_bytes as u64;
        let (wanted, taken) = (ByteCount(chunk * u64::from(ring_chunks)), ByteCount(chunk * self.ring.len() as u64));
        let left = self.streams.context.memory().map_or_else(
            |_| "how much is left is unknown".to_owned(),
            |(free, total)| format!("{} of {} were free", ByteCount(free + taken.0), ByteCount(total)),
        );
        let ordinal = self.streams.context.ordinal;
        Error::new(Code::HbmBudget, format!("CUDA device {ordinal} has no {wanted} for frames: {left}."))
            .action("Lower budget.hbm, or free memory of the device (other processes: nvidia-smi).")
    }

    fn reserve(&mut self, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let context = &*self.streams.context;
        // SAFETY: writes one address; `drop` frees the range.
        context.check(unsafe { context.driver.cuMemAddressReserve(&raw mut self.base, bytes, 0, 0, 0) })?;
        self.reserved = bytes;
        Ok(())
    }

    /// Maps the next unit behind those mapped before.
    fn map(&mut self, span: FrameSpan) -> Result<()> {
        let context = &*self.streams.context;
        let start = self.base + self.mapped as u64;
        for chunk in 0..span.chunks as usize {
            let handle = self.ring[(span.first_chunk as usize + chunk) % self.ring.len()];
            let at = self.base + self.mapped as u64;
            // SAFETY: the next unmapped chunk of our reservation, and a whole handle of the same size.
            context.check(unsafe { context.driver.cuMemMap(at, self.chunk_bytes, 0, handle, 0) })?;
            self.mapped += self.chunk_bytes;
        }
        let access = CUmemAccessDesc {
            location: location(context),
            flags: CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        self.addresses.push(start);
        let bytes = span.chunks as usize * self.chunk_bytes;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the range was mapped whole just above; `access` is read during the call.
        context.check(unsafe { context.driver.cuMemSetAccess(start, bytes, &raw const access, 1) })
    }
}

impl Frames for CudaFrames {
    fn address(&self, unit: usize) -> u64 {
        self.addresses[unit]
    }
}

impl Drop for CudaFrames {
    fn drop(&mut self) {
        self.streams.drain();
        let context = &*self.streams.context;
        // Without a context there is nothing to unmap or release.
        let Ok(_entered) = context.enter() else { return };
        // SAFETY: exactly what this value mapped, reserved and created; the copies are done and the owner gave it up.
        // `drop` cannot return a failure; the context remembers it if it matters.
        unsafe {
            // Chunk by chunk, as they were mapped: whether one call may undo several is not documented.
            for at in (0..self.mapped).step_by(self.chunk_bytes) {
                let _ = context.check(context.driver.cuMemUnmap(self.base + at as u64, self.chunk_bytes));
            }
            if self.reserved > 0 {
                let _ = context.check(context.driver.cuMemAddressFree(self.base, self.reserved));
            }
            for &handle in &self.ring {
                let _ = context.check(context.driver.cuMemRelease(handle));
            }
        }
    }
}
