//! Free memory of the compute device: states of units move up into it between updates, are updated there, and move down again when
//! torch or another program needs it. What decides is [`crate::schedule::growth`]; this is what it decides about, and the moves.
//!
//! M1: a unit's states keep their home; while they are up, the home is older. Where they are changes with the lock of updates (`share`)
//! held, so that no piece of an update sees it change. M2: a move down needs no memory, no other thread and not the GIL: it may
//! be asked for from within torch's allocator. M3: a reader of a home has it made current first, a writer has the unit moved down.

pub(super) mod asked;
mod calls;
mod moves;
pub(super) mod record;
pub(super) mod state;
#[cfg(test)]
mod tests;
