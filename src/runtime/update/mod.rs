//! The optimizer's update: steps, updates begun in backward, who does which part, AdamW over one piece.

pub(super) mod ahead;
pub(super) mod factors;
pub(super) mod run;
pub(super) mod runner;
pub(super) mod share;
pub(super) mod step;
