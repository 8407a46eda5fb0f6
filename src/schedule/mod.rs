//! What to do next: pure functions and state machines. No threads, no clock, no I/O, no unsafe.
//!
//! - [`placement`]: where every segment lives, and the ring of frames, within the budgets;
//! - [`advice`]: what would make a model fit;
//! - [`traffic`], [`cost`]: what a step moves, and how long it takes at given rates;
//! - [`order`]: which unit comes next, learned from past openings;
//! - [`machine`]: the residency of units and the progress of updates, driven by events, answering with commands.

#![forbid(unsafe_code)]

pub mod advice;
pub mod cost;
pub mod machine;
pub mod order;
pub mod placement;
pub mod traffic;

pub use machine::{Command, Machine, Opening};
pub use order::{Order, Phase};
pub use placement::{Budgets, LaneUse, Limits, Placement, Tiers};
