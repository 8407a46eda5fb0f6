//! Host memory: regions of exact size, and pools of equal slots in them.
//!
//! Owns every byte of host memory that hardware may read or write. M1: a region is mapped once and never moves.
//! M2: a slot has one owner, its [`SlotLease`]; dropping the lease returns the slot.

mod copy;
mod heap;
mod region;
mod shadow;
mod slots;

pub(crate) use copy::copy_past_caches;
pub use heap::trim;
pub use region::{HostRegion, HugePages};
pub use shadow::Shadow;
pub use slots::{SlotLease, SlotPool};
