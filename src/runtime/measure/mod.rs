//! What is measured of a run: counters, the time of a step and what it is bound by, the trace, slow requests.

pub(super) mod intervals;
pub(super) mod slow;
pub mod stats;
pub mod step_time;
pub mod trace;
mod trace_file;
pub mod trace_merge;
