//! Full-parameter training of models larger than the GPU's memory.
//!
//! Layers, imports only downward (`tests/tidy.rs` checks it):
//! `error quantities dtype text os_error` < `machine` < `memory model policy` < `schedule` < `device io optim` < `checkpoint store` < `runtime` <
//! `bench doctor plan` < `cli` < `python`, which is a crate of its own.

pub mod bench;
pub mod checkpoint;
pub mod cli;
pub mod device;
pub mod doctor;
pub mod dtype;
pub mod error;
pub mod io;
pub mod machine;
pub mod memory;
pub mod model;
pub mod optim;
pub mod os_error;
pub mod plan;
pub mod policy;
pub mod quantities;
pub mod runtime;
pub mod schedule;
pub mod store;
pub mod text;

pub use error::{Code, Error, Result};
