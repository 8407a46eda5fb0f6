//! The configuration of a run, whether it may begin on this machine, and how its parts are made and started.

pub(super) mod admission;
pub(super) mod config;
mod running_notes;
pub(super) mod start;
