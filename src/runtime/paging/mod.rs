//! Where parameters and their states live in host memory, windows, gradients, and what happens when parameters are touched where they are not.

pub(super) mod fault_server;
pub(super) mod faults;
pub(super) mod gradients;
pub mod homes;
pub(super) mod host_budget;
pub(super) mod landing;
pub(super) mod open;
pub(super) mod paged_gradients;
pub(super) mod reapers;
pub(super) mod shadows;
pub(super) mod sums;
