//! The optimizer's update: steps, speculative updates made in backward, which part the processor and the lanes do, AdamW over one piece.

mod claims;
pub(super) mod factors;
pub(super) mod job;
mod pace;
mod portions;
pub(super) mod rhythm;
pub(super) mod run;
pub(super) mod runner;
pub(super) mod share;
pub(super) mod speculate;
pub(super) mod speculation;
pub(super) mod step;
pub(super) mod streamed;
pub(super) mod task;
pub(super) mod update_on;
