//! Host memory: regions of exact size, and pools of equal slots in them.
//!
//! Owns every byte of host memory that hardware may read or write. M1: a region is mapped once and never moves.
//! M2: a slot has one owner, its [`SlotLease`]; dropping the lease returns the slot.

mod ballast;
mod copy;
mod fault;
mod fault_table;
mod fork;
mod headroom;
mod heap;
mod page;
mod region;
mod shadow;
mod shared_file;
mod slots;
mod words;

pub use ballast::{Heap, set_aside};
pub(crate) use copy::copy_past_caches;
pub(crate) use fault::install as watch_faults;
pub(crate) use fork::NotForked;
pub use fork::{forked, keep};
pub use headroom::headroom;
pub use heap::trim;
pub use page::page_size;
pub use region::HostRegion;
pub use shadow::{Shadow, ShadowSpace};
pub use shared_file::SharedFile;
pub use slots::{SlotLease, SlotPool};
pub use words::SharedWords;
