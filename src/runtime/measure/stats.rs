//! Counters: what moved, how long links were busy, what was waited for. Reading them costs the data path nothing.

use std::sync::atomic::{AtomicU64, Ordering};

/// A link or processor that bytes pass through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// Host to device.
    Up,
    /// Device to host.
    Down,
    /// NVMe to host.
    NvmeRead,
    /// Host to NVMe.
    NvmeWrite,
    /// AdamW on the CPU; bytes are its memory traffic.
    Update,
    /// AdamW on the device for what has its home on the host; bytes are those over the link, both ways.
    GpuUpdate,
    /// Gradients to and from other ranks; bytes are those of both ways. Last: a process alone has none.
    Exchange,
}

impl Link {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Up, Self::Down, Self::NvmeRead, Self::NvmeWrite, Self::Update, Self::GpuUpdate, Self::Exchange];
    /// How many of these, the first, a process alone has.
    pub const ALONE: usize = 6;

    /// The name in statistics and traces.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Up => "host_to_device",
            Self::Down => "device_to_host",
            Self::NvmeRead => "nvme_read",
            Self::NvmeWrite => "nvme_write",
            Self::Update => "cpu_update",
            Self::GpuUpdate => "gpu_update",
            Self::Exchange => "exchange",
        }
    }
}

/// Why the compute stream waited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// For an update of parameters.
    Update,
    /// For bytes from NVMe.
    NvmeRead,
    /// For bytes on their way to NVMe.
    NvmeWrite,
    /// For a copy to the device.
    Copy,
    /// For gradients on their way to the host.
    Grads,
    /// For gradients on their way between ranks. From here on: with other ranks only.
    Exchange,
    /// For other ranks that have to come to an exchange of gradients, or to end it.
    PeersGrads,
    /// For other ranks that have to come to a step, or to another call of all.
    PeersStep,
    /// For the parts of an update that other ranks make.
    PeersUpdate,
}

impl Cause {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Update,
        Self::NvmeRead,
        Self::NvmeWrite,
        Self::Copy,
        Self::Grads,
        Self::Exchange,
        Self::PeersGrads,
        Self::PeersStep,
        Self::PeersUpdate,
    ];
    /// How many of these, the first, a process alone has.
    pub const ALONE: usize = 5;

    /// The name in statistics and traces.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Update => "update",
            Self::NvmeRead => "nvme_read",
            Self::NvmeWrite => "nvme_write",
            Self::Copy => "copy",
            Self::Grads => "grads",
            Self::Exchange => "exchange",
            Self::PeersGrads => "peers_grads",
            Self::PeersStep => "peers_step",
            Self::PeersUpdate => "peers_update",
        }
    }

    /// What a trace calls the wait.
    pub const fn wait(self) -> &'static str {
        match self {
            Self::Update => "wait: update",
            Self::NvmeRead => "wait: nvme_read",
            Self::NvmeWrite => "wait: nvme_write",
            Self::Copy => "wait: copy",
            Self::Grads => "wait: grads",
            Self::Exchange => "exchange",
            Self::PeersGrads => "wait: peers_grads",
            Self::PeersStep => "wait: peers_step",
            Self::PeersUpdate => "wait: peers_update",
        }
    }
}

#[derive(Debug, Default)]
struct Flow {
    bytes: AtomicU64,
    busy_nanos: AtomicU64,
}

/// All counters of a runtime.
#[derive(Debug, Default)]
pub struct Stats {
    flows: [Flow; Link::ALL.len()],
    stalls: [AtomicU64; Cause::ALL.len()],
    lost: AtomicU64,
    steps: AtomicU64,
    shadow_bytes: AtomicU64,
    shadow_peak: AtomicU64,
    home_uses: AtomicU64,
    speculations: [AtomicU64; 2],
    weights_first: AtomicU64,
    updated: [AtomicU64; 2],
}

/// One link's totals.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowTotals {
    /// Bytes moved.
    pub bytes: u64,
    /// Nanoseconds during which something was under way.
    pub busy_nanos: u64,
}

impl Stats {
    /// Notes a transfer; `busy_nanos` must not count the same instant twice.
    pub fn moved(&self, link: Link, bytes: u64, busy_nanos: u64) {
        let flow = &self.flows[link as usize];
        flow.bytes.fetch_add(bytes, Ordering::Relaxed);
        flow.busy_nanos.fetch_add(busy_nanos, Ordering::Relaxed);
    }

    /// Notes time the compute stream waited.
    pub fn stalled(&self, cause: Cause, nanos: u64) {
        self.stalls[cause as usize].fetch_add(nanos, Ordering::Relaxed);
    }

    /// Notes a copy whose time is not known.
    pub fn lost_one(&self) {
        self.lost.fetch_add(1, Ordering::Relaxed);
    }

    /// Copies whose time is not known.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Notes an optimizer step.
    pub fn stepped(&self) {
        self.steps.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes that a speculative update was used, or made in vain.
    pub fn speculated(&self, used: bool) {
        self.speculations[usize::from(used)].fetch_add(1, Ordering::Relaxed);
    }

    /// Notes an update whose weights were made first.
    pub fn weights_first(&self) {
        self.weights_first.fetch_add(1, Ordering::Relaxed);
    }

    /// Speculative updates: used, and made in vain; and updates whose weights were made first.
    pub fn speculations(&self) -> (u64, u64, u64) {
        let [in_vain, used] = &self.speculations;
        (used.load(Ordering::Relaxed), in_vain.load(Ordering::Relaxed), self.weights_first.load(Ordering::Relaxed))
    }

    /// Notes parameters of paged units that the processor and the device updated.
    pub fn updated(&self, elems: [u64; 2]) {
        for (count, elems) in self.updated.iter().zip(elems) {
            count.fetch_add(elems, Ordering::Relaxed);
        }
    }

    /// Parameters of paged units that the processor and the device updated.
    pub fn updates(&self) -> (u64, u64) {
        (self.updated[0].load(Ordering::Relaxed), self.updated[1].load(Ordering::Relaxed))
    }

    /// Notes that a unit was used from its home because its frames were held.
    pub fn used_home(&self) {
        self.home_uses.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes memory for what is read outside of steps: shadows, and states in the caller's memory. False, and nothing is noted,
    /// if more than `limit` would be in use.
    pub fn lent(&self, bytes: u64, limit: u64) -> bool {
        let fits = |now: u64| now.checked_add(bytes).filter(|&sum| sum <= limit);
        match self.shadow_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits) {
            Ok(before) => {
                self.shadow_peak.fetch_max(before + bytes, Ordering::Relaxed);
                true
            }
            Err(_) => false,
        }
    }

    /// Notes that such memory was given back.
    pub fn returned(&self, bytes: u64) {
        self.shadow_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Such memory in use now, and at most so far.
    pub fn shadows(&self) -> (u64, u64) {
        (self.shadow_bytes.load(Ordering::Relaxed), self.shadow_peak.load(Ordering::Relaxed))
    }

    /// One link's totals.
    pub fn flow(&self, link: Link) -> FlowTotals {
        let flow = &self.flows[link as usize];
        FlowTotals { bytes: flow.bytes.load(Ordering::Relaxed), busy_nanos: flow.busy_nanos.load(Ordering::Relaxed) }
    }

    /// Nanoseconds waited for a cause.
    pub fn stall(&self, cause: Cause) -> u64 {
        self.stalls[cause as usize].load(Ordering::Relaxed)
    }

    /// Optimizer steps.
    pub fn steps(&self) -> u64 {
        self.steps.load(Ordering::Relaxed)
    }

    /// Uses from the home.
    pub fn home_uses(&self) -> u64 {
        self.home_uses.load(Ordering::Relaxed)
    }
}

/// Busy time of a link that serves in order: an interval counts from the end of the one before.
#[derive(Debug, Default)]
pub struct Busy {
    end: u64,
}

impl Busy {
    /// Nanoseconds of `[start, end]` that were not counted yet.
    pub fn add(&mut self, start: u64, end: u64) -> u64 {
        let fresh = end.saturating_sub(start.max(self.end));
        self.end = self.end.max(end);
        fresh
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_transfers_count_once() {
        let mut busy = Busy::default();
        assert_eq!(busy.add(0, 10), 10);
        assert_eq!(busy.add(5, 12), 2);
        assert_eq!(busy.add(20, 25), 5);
        assert_eq!(busy.add(1, 3), 0);
    }
}
