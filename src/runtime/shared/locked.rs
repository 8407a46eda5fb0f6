//! What the runtime's lock guards: the machine, gates by unit, leases on their way, and the first failure.

use crate::{
    device::Gate,
    error::{Error, Result},
    io::{IoCompletion, IoPart},
    memory::SlotLease,
    quantities::UnitId,
    runtime::{measure::stats::Busy, shared::closed::closed},
    schedule::{Command, Machine},
};

/// The gates of one unit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gates {
    /// The end of its last window, on the compute stream.
    pub(crate) release: Gate,
    /// The end of the copy into its frames.
    pub(crate) fill: Gate,
    /// The last write to its home by a stream.
    pub(crate) home: Gate,
    /// What its update waits for: the user's stream, gradients down, parameters up.
    pub(crate) update: [Gate; 3],
}

/// A slot in which the gradients of a unit are gathered.
pub(crate) struct Gathered {
    pub(crate) lease: SlotLease,
    /// Bytes copied into it so far.
    pub(crate) bytes: u64,
}

/// The one request at a time that is not part of a step.
#[derive(Debug, Default)]
pub(crate) struct OffStep {
    /// Number of the last request.
    pub(crate) last: u32,
    /// It has not come back.
    pub(crate) out: bool,
    /// It came back, for the thread that waits for it.
    pub(crate) done: Option<IoCompletion>,
}

/// What the lock guards.
pub(crate) struct Inner {
    pub(crate) machine: Machine,
    pub(crate) commands: Vec<Command>,
    pub(crate) gates: Vec<Gates>,
    pub(crate) last_down: Gate,
    pub(crate) pages: Vec<Option<SlotLease>>,
    pub(crate) chunks: Vec<(UnitId, u32, SlotLease)>,
    /// Units whose update is to begin ahead of its step, in the order in which their gradients come.
    pub(crate) foreseen: Vec<UnitId>,
    /// Pieces of updates ahead that were read.
    pub(crate) ahead: Vec<(UnitId, u32, SlotLease)>,
    pub(crate) grad_slots: Vec<Option<Gathered>>,
    pub(crate) spare_parts: Vec<Vec<IoPart>>,
    pub(crate) off_step: OffStep,
    /// The unit whose home the runner writes now.
    pub(crate) at_work: Option<UnitId>,
    pub(crate) failed: Option<Error>,
    /// The caller has seen the failure.
    pub(crate) failure_seen: bool,
    pub(crate) closing: bool,
    pub(crate) events: u64,
    pub(crate) busy_read: Busy,
    pub(crate) busy_write: Busy,
}

impl Inner {
    pub(crate) fn new(machine: Machine, units: usize) -> Self {
        let open = Gates { release: Gate::OPEN, fill: Gate::OPEN, home: Gate::OPEN, update: [Gate::OPEN; 3] };
        Self {
            machine,
            commands: Vec::with_capacity(64),
            gates: vec![open; units],
            last_down: Gate::OPEN,
            pages: (0..units).map(|_| None).collect(),
            chunks: Vec::with_capacity(16),
            foreseen: Vec::with_capacity(units),
            ahead: Vec::with_capacity(16),
            grad_slots: (0..units).map(|_| None).collect(),
            spare_parts: (0..16).map(|_| Vec::with_capacity(64)).collect(),
            off_step: OffStep::default(),
            at_work: None,
            failed: None,
            failure_seen: false,
            closing: false,
            events: 0,
            busy_read: Busy::default(),
            busy_write: Busy::default(),
        }
    }

    pub(crate) fn usable(&self) -> Result<()> {
        match &self.failed {
            Some(error) => Err(error.clone()),
            None if self.closing => Err(closed()),
            None => Ok(()),
        }
    }
}
