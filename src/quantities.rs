//! Newtypes for what is counted and what is numbered.

use std::fmt;

/// Bytes, always `u64` away from the pointer edge.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteCount(pub u64);

impl ByteCount {
    /// `n` KiB.
    pub const fn kib(n: u64) -> Self {
        Self(n << 10)
    }
    /// `n` MiB.
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }
    /// `n` GiB.
    pub const fn gib(n: u64) -> Self {
        Self(n << 30)
    }
}

impl fmt::Display for ByteCount {
    /// Binary units with one decimal, rounded up so that a need that is shown is enough: `640 B`, `12.5 MiB`, `1.0 GiB`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
        if self.0 < 1024 {
            return write!(f, "{} B", self.0);
        }
        #[expect(clippy::cast_precision_loss, reason = "a human reads one decimal")]
        let mut value = self.0 as f64 / 1024.0;
        let mut name = 0;
        while value >= 1024.0 && name + 1 < NAMES.len() {
            value /= 1024.0;
            name += 1;
        }
        write!(f, "{:.1} {}", (value * 10.0).ceil() / 10.0, NAMES[name])
    }
}

/// Index of a unit: the parameters that are paged together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnitId(pub u32);

impl UnitId {
    /// As an index into a table of units.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for UnitId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unit {}", self.0)
    }
}

/// Where bytes live.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// Memory of the compute device.
    Hbm,
    /// Page-locked host memory.
    Host,
    /// Files on NVMe drives.
    Nvme,
}

impl Tier {
    /// The name used in policies, messages and statistics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Hbm => "hbm",
            Self::Host => "host",
            Self::Nvme => "nvme",
        }
    }
}

/// Rounds `n` up to a multiple of `to`, a power of two.
pub const fn round_up(n: u64, to: u64) -> u64 {
    debug_assert!(to.is_power_of_two());
    (n + to - 1) & !(to - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_shown_in_binary_units() {
        assert_eq!(ByteCount(640).to_string(), "640 B");
        assert_eq!(ByteCount(1536).to_string(), "1.5 KiB");
        assert_eq!(ByteCount::gib(3).to_string(), "3.0 GiB");
    }

    #[test]
    fn rounding_keeps_multiples() {
        assert_eq!(round_up(0, 4096), 0);
        assert_eq!(round_up(1, 4096), 4096);
        assert_eq!(round_up(4096, 4096), 4096);
    }
}
