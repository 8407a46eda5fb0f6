//! Checkpoints: what is saved while training goes on, and what is read back.

pub(super) mod budget;
pub(super) mod copy_on_update;
pub(super) mod read_ahead;
pub(super) mod restore;
pub(super) mod save;
pub(super) mod write_behind;
