//! What several ranks of one host agree on, and how: by words in memory that all of them see. Pure: no threads, no clock, no waiting.
//!
//! - [`owned`]: which elements a rank updates;
//! - [`board`]: where each word is, and who writes it;
//! - [`posts`]: steps, gradients and meetings, and what may be done when;
//! - [`crossed`]: ranks that wait for each other in different calls.

pub mod board;
pub mod crossed;
pub mod owned;
pub mod posts;
