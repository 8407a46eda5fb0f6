//! Placeholder until the branch that owns this module lands.
