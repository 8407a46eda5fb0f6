//! The names of disk requests: what each was for, in one number.

use crate::quantities::UnitId;

/// What a request was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ticket {
    Params(UnitId),
    ReadChunk(UnitId, u32),
    WriteChunk(UnitId, u32),
    /// A request that is not part of a step; numbered, so that one that was given up is not taken for a later one.
    OffStep(u32),
    /// A read of a save; numbered through all saves.
    Save(u32),
    /// A write of a load; likewise.
    Load(u32),
    /// A read of parameters that a thread touched where they were not; likewise.
    Fault(u32),
    /// A write of a unit's gradients.
    Grads(UnitId),
    /// A read of them.
    ReadGrads(UnitId),
}

impl Ticket {
    pub(crate) fn encode(self) -> u64 {
        let pack = |kind: u64, unit: UnitId, chunk: u32| kind << 62 | u64::from(unit.0) << 32 | u64::from(chunk);
        match self {
            Self::Params(u) => pack(0, u, 0),
            Self::ReadChunk(u, c) => pack(1, u, c),
            Self::WriteChunk(u, c) => pack(2, u, c),
            Self::OffStep(n) => 3 << 62 | u64::from(n),
            Self::Save(n) => 3 << 62 | 1 << 32 | u64::from(n),
            Self::Load(n) => 3 << 62 | 2 << 32 | u64::from(n),
            Self::Fault(n) => 3 << 62 | 3 << 32 | u64::from(n),
            Self::Grads(u) => 3 << 62 | 4 << 32 | u64::from(u.0),
            Self::ReadGrads(u) => 3 << 62 | 5 << 32 | u64::from(u.0),
        }
    }

    pub(crate) const fn decode(n: u64) -> Self {
        let unit = UnitId((n << 2 >> 34) as u32);
        #[expect(clippy::cast_possible_truncation, reason = "the low half is the chunk, or a number")]
        let chunk = n as u32;
        match n >> 62 {
            0 => Self::Params(unit),
            1 => Self::ReadChunk(unit, chunk),
            2 => Self::WriteChunk(unit, chunk),
            _ if unit.0 == 0 => Self::OffStep(chunk),
            _ if unit.0 == 1 => Self::Save(chunk),
            _ if unit.0 == 2 => Self::Load(chunk),
            _ if unit.0 == 3 => Self::Fault(chunk),
            _ if unit.0 == 4 => Self::Grads(UnitId(chunk)),
            _ => Self::ReadGrads(UnitId(chunk)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tickets_survive_the_trip() {
        for t in [
            Ticket::Params(UnitId(7)),
            Ticket::ReadChunk(UnitId((1 << 30) - 1), u32::MAX),
            Ticket::WriteChunk(UnitId(3), 0),
            Ticket::OffStep(0),
            Ticket::OffStep(u32::MAX),
            Ticket::Save(0),
            Ticket::Save(u32::MAX),
            Ticket::Load(0),
            Ticket::Load(u32::MAX),
            Ticket::Fault(0),
            Ticket::Fault(u32::MAX),
            Ticket::Grads(UnitId(u32::MAX)),
            Ticket::ReadGrads(UnitId(u32::MAX)),
        ] {
            assert_eq!(Ticket::decode(t.encode()), t);
        }
    }
}
