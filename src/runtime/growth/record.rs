//! What moved, when and why, for statistics and the log.

use std::collections::VecDeque;

use crate::quantities::UnitId;

/// So many of the last moves are kept.
const KEPT: usize = 256;

/// Why a unit's states moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Up: there is room.
    Room,
    /// Down: less than half the margin was free.
    Short,
    /// Down: torch's allocator asked for all that can be given back.
    Asked,
    /// Down: their home is written, by a load or by the program.
    Written,
    /// Down: growth was turned off.
    Off,
}

impl Why {
    /// The word in statistics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Room => "room",
            Self::Short => "short",
            Self::Asked => "asked",
            Self::Written => "written",
            Self::Off => "off",
        }
    }
}

/// One move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moved {
    /// Its number, counted from 1.
    pub number: u64,
    /// Steps submitted before it.
    pub step: u64,
    /// The unit.
    pub unit: UnitId,
    /// What its states take in the compute tier.
    pub bytes: u64,
    /// Why.
    pub why: Why,
}

/// All moves together, and the last ones.
#[derive(Clone, Debug, Default)]
pub struct Record {
    /// Bytes that moved up and down so far.
    pub up: u64,
    /// See [`Self::up`].
    pub down: u64,
    /// Times that the device had no memory for a unit.
    pub refused: u64,
    /// Bytes up now, and at most so far.
    pub taken: u64,
    /// See [`Self::taken`].
    pub peak: u64,
    /// The last moves, in order.
    pub moves: VecDeque<Moved>,
    count: u64,
}

impl Record {
    pub(crate) fn note(&mut self, step: u64, unit: UnitId, bytes: u64, why: Why) {
        if why == Why::Room {
            self.up += bytes;
            self.taken += bytes;
        } else {
            self.down += bytes;
            self.taken -= bytes;
        }
        self.peak = self.peak.max(self.taken);
        self.count += 1;
        if self.moves.len() == KEPT {
            self.moves.pop_front();
        }
        self.moves.push_back(Moved { number: self.count, step, unit, bytes, why });
    }
}
