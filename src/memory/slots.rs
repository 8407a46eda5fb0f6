//! Equal slots in a region, each with one owner at a time.
#![expect(unsafe_code, reason = "hands out the bytes of a slot to its one owner")]

use std::{fmt, sync::Arc};

use parking_lot::Mutex;

use crate::{
    error::Result,
    memory::{HostRegion, page_size},
    quantities::{ByteCount, round_up},
};

#[derive(Debug)]
struct Inner {
    region: Arc<HostRegion>,
    slot_len: usize,
    free: Mutex<Vec<u32>>,
}

/// A fixed number of slots of one size.
#[derive(Clone, Debug)]
pub struct SlotPool(Arc<Inner>);

impl SlotPool {
    /// `count` slots of `slot_len` bytes (rounded up to a page), in a region of their own.
    ///
    /// # Errors
    /// `FN-E204` when the system refuses the memory.
    pub fn new(count: u32, slot_len: ByteCount, purpose: &str) -> Result<Self> {
        let slot_len = round_up(slot_len.0.max(1), page_size() as u64);
        let region = HostRegion::new(ByteCount(slot_len * u64::from(count)), purpose)?;
        let free = (0..count).rev().collect();
        Ok(Self(Arc::new(Inner { region, slot_len: slot_len as usize, free: Mutex::new(free) })))
    }

    /// One slot: a whole region.
    pub(crate) fn whole(region: Arc<HostRegion>) -> Self {
        let slot_len = region.len();
        Self(Arc::new(Inner { region, slot_len, free: Mutex::new(vec![0]) }))
    }

    /// Takes a free slot, or none if all are leased.
    pub fn lease(&self) -> Option<SlotLease> {
        let index = self.0.free.lock().pop()?;
        Some(SlotLease { pool: Arc::clone(&self.0), index })
    }

    /// Slots not leased at this moment.
    pub fn free(&self) -> usize {
        self.0.free.lock().len()
    }

    /// Bytes of one slot.
    pub fn slot_len(&self) -> usize {
        self.0.slot_len
    }

    /// The region all slots lie in.
    pub fn region(&self) -> &Arc<HostRegion> {
        &self.0.region
    }
}

/// Ownership of one slot. Code that gives the bytes to hardware holds the lease until the hardware is done.
pub struct SlotLease {
    pool: Arc<Inner>,
    index: u32,
}

impl SlotLease {
    /// First byte of the slot. Exclusive to the holder of the lease.
    pub fn as_ptr(&self) -> *mut u8 {
        // SAFETY: `index` < count, so the slot lies inside the region.
        unsafe { self.pool.region.as_ptr().add(self.offset()) }
    }

    /// The slot's bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the slot is inside the region, the lease is its only owner, and it is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.as_ptr(), self.pool.slot_len) }
    }

    /// Where the slot starts in its region.
    pub fn offset(&self) -> usize {
        self.index as usize * self.pool.slot_len
    }

    /// Bytes of the slot.
    pub fn len(&self) -> usize {
        self.pool.slot_len
    }

    /// True for a slot without bytes; never the case.
    pub fn is_empty(&self) -> bool {
        self.pool.slot_len == 0
    }

    /// The region the slot lies in.
    pub fn region(&self) -> &Arc<HostRegion> {
        &self.pool.region
    }

    /// Its number in the pool.
    pub fn index(&self) -> u32 {
        self.index
    }
}

impl fmt::Debug for SlotLease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SlotLease({} of {} bytes)", self.index, self.pool.slot_len)
    }
}

impl Drop for SlotLease {
    fn drop(&mut self) {
        self.pool.free.lock().push(self.index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_has_one_owner_and_comes_back() {
        let pool = SlotPool::new(2, ByteCount(5000), "a test").expect("maps");
        assert_eq!(pool.slot_len(), 5000_usize.next_multiple_of(page_size()));
        let mut a = pool.lease().expect("first");
        let mut b = pool.lease().expect("second");
        assert!(pool.lease().is_none());
        a.bytes().fill(1);
        b.bytes().fill(2);
        assert!(a.bytes().iter().all(|&x| x == 1));
        drop(a);
        assert_eq!(pool.free(), 1);
        assert!(pool.lease().is_some());
    }
}
