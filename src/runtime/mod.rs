//! In work.
pub mod homes;
pub mod stats;
pub mod trace;
