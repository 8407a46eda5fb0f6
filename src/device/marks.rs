//! Marks: points in the work of streams whose time is wanted. Taken from a ring made in advance; nothing waits for them.

/// Marks of one device that are remembered; of older ones the time is lost.
pub const MARKS: u64 = 8192;

/// A point in the work of a stream. Making one never fails for want of room: the oldest is given up instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Its place in the sequence of all marks of the device; 0: it was never made.
    seq: u64,
}

impl Mark {
    /// A mark that was never made: the stream could not take it.
    pub const LOST: Self = Self { seq: 0 };

    pub(super) const fn new(seq: u64) -> Self {
        Self { seq }
    }

    pub(super) const fn slot(self) -> usize {
        (self.seq % MARKS) as usize
    }

    /// True if its slot is still its own, `last` being the newest mark.
    pub(super) const fn kept(self, last: u64) -> bool {
        self.seq > 0 && last - self.seq < MARKS
    }
}

/// The time between two marks, on the clock of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Elapsed {
    /// One of them is still ahead of its stream.
    Pending,
    /// One of them is too old, or was never made.
    Lost,
    /// Nanoseconds; negative if the later one, on another stream, came first.
    Nanos(i64),
}
