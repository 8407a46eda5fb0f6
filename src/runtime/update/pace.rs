//! How fast the processor and the lanes update.

/// How fast both sides were lately.
#[derive(Debug)]
pub(super) struct Pace {
    /// Elements that the processor updated, and the nanoseconds it took.
    pub(super) elems: f64,
    pub(super) nanos: f64,
    /// Nanoseconds from the launch of a whole group to its end.
    pub(super) flight: f64,
}

impl Default for Pace {
    fn default() -> Self {
        Self { elems: 0.0, nanos: 0.0, flight: 2e6 }
    }
}

#[expect(clippy::cast_precision_loss, reason = "rates are no bookkeeping")]
impl Pace {
    /// The processor's rate is that of so many elements.
    const MEMORY: f64 = (256 << 20) as f64;

    /// True if a group that is launched now ends before the processor would be through with all that is left.
    pub(super) fn worth_it(&self, left: u64) -> bool {
        self.nanos > 0.0 && left as f64 * self.nanos > self.flight * self.elems
    }

    pub(super) fn ran(&mut self, elems: u64, nanos: u64) {
        (self.elems, self.nanos) = (self.elems + elems as f64, self.nanos + nanos as f64);
        let keep = (Self::MEMORY / self.elems).min(1.0);
        (self.elems, self.nanos) = (self.elems * keep, self.nanos * keep);
    }

    pub(super) fn flew(&mut self, nanos: u64) {
        self.flight += (nanos as f64 - self.flight) / 8.0;
    }

    /// Nothing was launched: one slow group must not keep the lanes away for good.
    pub(super) fn declined(&mut self) {
        self.flight *= 0.98;
    }
}
