//! How fast the processor and the lanes update.

/// How fast both sides were lately.
#[derive(Debug)]
pub(super) struct Pace {
    /// Bytes that the processor read and wrote, and the nanoseconds it took.
    pub(super) bytes: f64,
    pub(super) nanos: f64,
    /// Nanoseconds from the launch of a whole group to its end.
    pub(super) flight: f64,
}

impl Default for Pace {
    fn default() -> Self {
        Self { bytes: 0.0, nanos: 0.0, flight: 2e6 }
    }
}

#[expect(clippy::cast_precision_loss, reason = "rates are no bookkeeping")]
impl Pace {
    /// The processor's rate is that of so many bytes.
    const MEMORY: f64 = (26_u64 * (256 << 20)) as f64;

    /// True if a group that is launched now ends before the processor would be through with all that is left.
    pub(super) fn worth_it(&self, left: u64) -> bool {
        self.nanos > 0.0 && left as f64 * self.nanos > self.flight * self.bytes
    }

    pub(super) fn ran(&mut self, bytes: u64, nanos: u64) {
        (self.bytes, self.nanos) = (self.bytes + bytes as f64, self.nanos + nanos as f64);
        let keep = (Self::MEMORY / self.bytes).min(1.0);
        (self.bytes, self.nanos) = (self.bytes * keep, self.nanos * keep);
    }

    pub(super) fn flew(&mut self, nanos: u64) {
        self.flight += (nanos as f64 - self.flight) / 8.0;
    }

    /// Nothing was launched: one slow group must not keep the lanes away for good.
    pub(super) fn declined(&mut self) {
        self.flight *= 0.98;
    }
}
