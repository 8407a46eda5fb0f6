//! NVMe: which bytes lie where, requests on their way, the threads that take completions, and what is not part of a step.

pub mod map;
pub(super) mod off_step;
pub(super) mod threads;
pub(super) mod ticket;
