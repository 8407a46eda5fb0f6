//! NVMe: which bytes lie where, requests on their way, the thread that takes completions, I/O that is not part of a step.

pub(super) mod driver;
pub(super) mod ends;
pub(super) mod files;
pub mod map;
pub(super) mod off_step_io;
pub(super) mod requests;
pub(super) mod ticket;
