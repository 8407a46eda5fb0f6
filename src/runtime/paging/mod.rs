//! Where parameters and their states live in host memory, and what happens when they are touched where they are not.

pub(super) mod faults;
pub mod homes;
