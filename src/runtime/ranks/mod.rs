//! Several ranks of one host that train one model: memory that they share, what they post for each other, waiting for each other, and how
//! one learns that another is gone. What is posted, and what follows from it, stands in [`crate::schedule::ranks`].
//!
//! K1: parameters, gradients and states lie in one file in memory, laid out alike in every rank; before them the words of the board. K2: a rank
//! writes elements that it owns, and no others: by updates, and gradients that it has summed. K3: no wait for another rank holds a lock of
//! the runtime; each ends by an error when the rank that it waits for is gone.

mod ahead;
#[cfg(test)]
mod ahead_tests;
pub(super) mod calls;
mod crossed;
mod devices;
mod elsewhere;
#[cfg(test)]
mod nvme_tests;
pub(super) mod peers;
pub(super) mod reads;
#[cfg(test)]
mod reads_tests;
pub(super) mod shelf;
pub(super) mod spec;
pub(super) mod states;
#[cfg(test)]
mod states_tests;
pub(super) mod steps;
#[cfg(test)]
mod tests;
pub(super) mod together;
pub(super) mod waits;
pub(super) mod watcher;
