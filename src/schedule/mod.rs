//! What to do next: pure functions and state machines. No threads, no clock, no I/O, no unsafe.
//!
//! - [`placement`]: where every segment lives, and the ring of frames, within the budgets;
//! - [`advice`]: what would make a model fit;
//! - [`traffic`], [`cost`]: what a step moves, and how long it takes at given rates;
//! - [`growth`]: which units' states move up into free memory of the device, and down again;
//! - [`order`]: which unit comes next, learned from past openings;
//! - [`ranks`]: what several ranks of one host agree on;
//! - [`machine`]: the residency of units and the progress of updates, driven by events, answering with commands.

#![forbid(unsafe_code)]

pub mod advice;
pub mod cost;
pub mod growth;
pub mod machine;
pub mod order;
pub mod placement;
pub mod ranks;
pub mod traffic;

pub use machine::{Command, Machine, Opening, Want};
pub use order::{Order, Phase};
pub use placement::{Budgets, LaneUse, Limits, Placement, Tiers};
