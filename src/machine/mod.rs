//! What the kernel says about this machine and this process, read from `/proc`, `/sys` and cgroups; files that belong to one drive or one
//! device are read where that is looked after.

mod cgroups;
mod limits;
mod process;
mod processor;
mod text;

pub use cgroups::CgroupLimit;
pub use limits::HostLimits;
#[cfg(test)]
pub(crate) use limits::limits;
pub(crate) use process::{began, lockable_bytes, may_lock_anything, resident};
pub(crate) use processor::{allowed_cpus, cpu_list, cpu_model, last_caches, online_cpus};
pub(crate) use text::text;
