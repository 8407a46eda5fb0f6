//! What to do next: pure functions and state machines. No threads, no clock, no I/O, no unsafe.
//!
//! - [`placement`]: where every segment lives, and the ring of frames, within the budgets;
//! - [`order`]: which unit comes next, learned by watching;
//! - [`machine`]: the residency of units and the progress of updates, driven by events, answering with commands.

#![forbid(unsafe_code)]

pub mod machine;
pub mod order;
pub mod placement;

pub use machine::{Command, Machine, Opening};
pub use order::{Order, Phase};
pub use placement::{Budgets, Limits, Placement, Tiers};
