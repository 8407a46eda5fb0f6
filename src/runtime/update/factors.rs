//! Factors of gradients that the device computes and the update needs: they come down in the order of the stream, no thread waits for them.
//!
//! F1: a slot is read only by updates whose gates cover the copy into it. F2: slots are used in turn; a step takes a few, and its
//! updates have run before the next step but one begins.
#![expect(unsafe_code, reason = "copies from a raw device address; reads what a stream wrote")]

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use crate::{
    device::{Device, StreamRef},
    error::Result,
    memory::HostRegion,
    quantities::ByteCount,
};

/// One page.
pub(crate) const SLOTS: u32 = 1024;
/// As many as the wrapper takes for one step, so that slots of earlier steps are not taken again while they are read.
pub const FACTORS_PER_STEP: u32 = SLOTS / 4;

/// Slots in registered host memory.
#[derive(Debug)]
pub(crate) struct Factors {
    region: Arc<HostRegion>,
    next: AtomicU32,
}

impl Factors {
    pub(crate) fn new(device: &dyn Device) -> Result<Self> {
        let region = HostRegion::new(ByteCount(u64::from(SLOTS) * 4), "factors of gradients")?;
        device.register(&region)?;
        Ok(Self { region, next: AtomicU32::new(0) })
    }

    /// Brings an fp32 value down, after the work on `stream`; returns its slot.
    ///
    /// # Safety
    /// `src` must be the address of an fp32 value on the device that stays as it is until the stream is past this.
    pub(crate) unsafe fn bring(&self, device: &dyn Device, src: u64, stream: u64) -> Result<u32> {
        let slot = self.next.fetch_add(1, Ordering::Relaxed) % SLOTS;
        // SAFETY: the slot lies in the region, which the device keeps; the source is the caller's promise.
        unsafe { device.copy(StreamRef::Compute(stream), self.address(slot), src, 4)? };
        Ok(slot)
    }

    /// The value of a slot whose copy is over.
    pub(crate) fn value(&self, slot: u32) -> f32 {
        // SAFETY: inside the region and aligned; a stream wrote it, so the compiler must not assume anything.
        unsafe { std::ptr::read_volatile(self.address(slot) as *const f32) }
    }

    fn address(&self, slot: u32) -> u64 {
        self.region.as_ptr() as u64 + u64::from(slot % SLOTS) * 4
    }
}
