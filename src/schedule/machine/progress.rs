//! How far what the machine has begun of a unit is.

/// Where a unit's gradients are, of those that live on NVMe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Grads {
    /// On NVMe, or in memory of their own that a reader asked for.
    Settled,
    /// On their way from NVMe into a slot.
    Reading,
    /// In a slot that copies down fill.
    Gathered,
    /// In a slot; the last copies into it are on their way.
    Landing,
    /// In a slot that is being written.
    Writing,
}

/// How far a unit's update ahead is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Ahead {
    pub(super) next: u32,
    pub(super) ran: u32,
    /// Pieces that are being read, or wait for the runner, or are with it.
    pub(super) flight: u32,
    /// An input has changed: nothing of it will be used.
    pub(super) dropped: bool,
    /// The step asks for the same, and waits for the rest of it.
    pub(super) taken: bool,
}
