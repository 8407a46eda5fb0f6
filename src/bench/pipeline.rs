//! The pipelines: what training does with the hops, several at once, in pieces that are passed from one to the next.
//!
//! L1: a slot is in one place at a time: with the disk, with a copy, or in hand.
//! L2: a piece counts when the last of its hops has ended.

use std::{
    cell::RefCell,
    collections::VecDeque,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    bench::{
        Exercise,
        clock::{Clock, nanos},
        disk::Lane,
        link::{HostMemory, Lent, Link, Way},
        memory::{STATE_BYTES, States},
        stats::Round,
    },
    device::Gate,
    error::Result,
    io::{Direction, IoPart},
    memory::{SlotLease, SlotPool},
    optim::Pool,
};

/// Bytes per parameter that a step sends up: the weights, for the forward and for the backward.
pub const UP_BYTES: u64 = 4;
/// Bytes per parameter that a step sends down: the gradient.
pub const DOWN_BYTES: u64 = 2;

/// What all pipelines use.
#[derive(Clone)]
pub struct Parts {
    /// The engine over all paths.
    pub lane: Rc<Lane>,
    /// Slots that the engine and the device know.
    pub slots: SlotPool,
    /// Bytes of one piece, at most those of a slot.
    pub piece: usize,
    /// The device.
    pub link: Rc<Link>,
}

/// From NVMe to the device, or back.
pub struct Relay {
    parts: Parts,
    way: Way,
    next: u64,
    copying: VecDeque<(Lent, Vec<IoPart>)>,
    begun: Vec<Instant>,
}

impl Relay {
    /// `Way::Up` reads and copies up, `Way::Down` copies down and writes.
    pub fn new(parts: Parts, way: Way) -> Self {
        let begun = vec![Instant::now(); parts.slots.region().len() / parts.slots.slot_len()];
        Self { parts, way, next: 0, copying: VecDeque::with_capacity(begun.len()), begun }
    }

    fn with_disk(&mut self, lease: SlotLease, parts: Vec<IoPart>) -> Result<()> {
        let direction = if self.way == Way::Up { Direction::Read } else { Direction::Write };
        let part = self.parts.lane.part(direction, self.next, self.parts.piece);
        self.next += 1;
        self.parts.lane.submit(lease, parts, part)
    }

    fn with_device(&mut self, lease: SlotLease, parts: Vec<IoPart>) -> Result<()> {
        self.copying.push_back((self.parts.link.lend(self.way, lease, self.parts.piece)?, parts));
        Ok(())
    }

    /// Begins a piece with its first hop.
    fn begin(&mut self, lease: SlotLease, parts: Vec<IoPart>) -> Result<()> {
        self.begun[lease.index() as usize] = Instant::now();
        if self.way == Way::Up { self.with_disk(lease, parts) } else { self.with_device(lease, parts) }
    }

    /// A piece has done its last hop; false if no other was begun in its place.
    fn end(&mut self, clock: &mut Clock, lease: SlotLease, parts: Vec<IoPart>) -> Result<bool> {
        let took = nanos(self.begun[lease.index() as usize]);
        let more = clock.ended(self.parts.piece as u64, 0, took);
        if more {
            self.begin(lease, parts)?;
        }
        Ok(more)
    }
}

impl Exercise for Relay {
    fn round(&mut self, time: Duration) -> Result<Round> {
        let mut pieces = 0;
        while let Some(lease) = self.parts.slots.lease() {
            self.begin(lease, Vec::with_capacity(1))?;
            pieces += 1;
        }
        let mut clock = Clock::new(pieces, time).in_laps(pieces);
        let all = pieces;
        while pieces > 0 {
            // The disk is kept busy first: pieces wait for it, not for the copies, unless it has little to do.
            let with_disk = pieces - self.copying.len();
            let copied = match self.copying.front() {
                Some((lent, _)) => lent.ready()? || with_disk * 2 < all,
                None => false,
            };
            if copied && let Some((lent, parts)) = self.copying.pop_front() {
                let Some(lease) = lent.take()? else { continue };
                match self.way {
                    Way::Up => pieces -= usize::from(!self.end(&mut clock, lease, parts)?),
                    Way::Down => self.with_disk(lease, parts)?,
                }
                continue;
            }
            let done = self.parts.lane.wait()?;
            match self.way {
                Way::Up => self.with_device(done.lease, done.parts)?,
                Way::Down => pieces -= usize::from(!self.end(&mut clock, done.lease, done.parts)?),
            }
        }
        Ok(clock.round)
    }
}

/// AdamW over states on NVMe: each piece is read, updated and written back.
pub struct AdamwNvme {
    parts: Parts,
    states: Rc<RefCell<States>>,
    pool: Arc<Pool>,
    /// With the weights going up and the gradients coming down at the same time, in the proportions of a step.
    traffic: bool,
    next: u64,
    at: usize,
    begun: Vec<Instant>,
    copies: Vec<[Gate; 2]>,
}

impl AdamwNvme {
    /// The states are updated on the threads of `pool`.
    pub fn new(parts: Parts, states: Rc<RefCell<States>>, pool: Arc<Pool>, traffic: bool) -> Self {
        let count = parts.slots.region().len() / parts.slots.slot_len();
        let (begun, copies) = (vec![Instant::now(); count], vec![[Gate::OPEN; 2]; count]);
        Self { parts, states, pool, traffic, next: 0, at: 0, begun, copies }
    }

    fn params(&self) -> usize {
        params_of(self.parts.piece)
    }

    fn read(&mut self, lease: SlotLease, parts: Vec<IoPart>) -> Result<()> {
        self.begun[lease.index() as usize] = Instant::now();
        let len = self.params() * STATE_BYTES as usize;
        let part = self.parts.lane.part(Direction::Read, self.next, len);
        self.next += 1;
        self.parts.lane.submit(lease, parts, part)
    }

    /// Updates a piece that was read, and writes it back where it came from.
    fn update(&mut self, mut lease: SlotLease, parts: Vec<IoPart>) -> Result<()> {
        let params = self.params();
        if self.traffic {
            let (up, down) = (params * UP_BYTES as usize, params * DOWN_BYTES as usize);
            let up_gate = self.parts.link.push(Way::Up, HostMemory::Pinned, self.at, up, up)?;
            let down_gate = self.parts.link.push(Way::Down, HostMemory::Pinned, self.at, down, down)?;
            self.copies[lease.index() as usize] = [up_gate, down_gate];
            self.at = self.at.wrapping_add(up);
        }
        self.states.borrow_mut().update_piece(&self.pool, &mut lease, params)?;
        let Some(&read) = parts.first() else { return Ok(()) };
        self.parts.lane.submit(lease, parts, IoPart { direction: Direction::Write, ..read })
    }
}

/// Parameters whose states make up a piece: a multiple of what direct I/O can place.
pub fn params_of(piece: usize) -> usize {
    (piece / STATE_BYTES as usize / 2048 * 2048).max(2048)
}

impl Exercise for AdamwNvme {
    fn round(&mut self, time: Duration) -> Result<Round> {
        let mut pieces = 0;
        while let Some(lease) = self.parts.slots.lease() {
            self.read(lease, Vec::with_capacity(1))?;
            pieces += 1;
        }
        let params = self.params() as u64;
        let copied = if self.traffic { UP_BYTES + DOWN_BYTES } else { 0 };
        // Reads run ahead at first; after as many pieces again, reads and writes are in balance.
        let mut clock = Clock::new(2 * pieces, time).in_laps(pieces);
        while pieces > 0 {
            let done = self.parts.lane.wait()?;
            if done.parts.first().is_some_and(|part| part.direction == Direction::Read) {
                clock.moved(params * STATE_BYTES);
                self.update(done.lease, done.parts)?;
                continue;
            }
            let slot = done.lease.index() as usize;
            for gate in std::mem::replace(&mut self.copies[slot], [Gate::OPEN; 2]) {
                self.parts.link.wait(gate)?;
            }
            if clock.ended(params * (STATE_BYTES + copied), 0, nanos(self.begun[slot])) {
                self.read(done.lease, done.parts)?;
            } else {
                pieces -= 1;
            }
        }
        // Not by pieces that ended: a round is short beside what is in flight, and reads come in bursts.
        clock.round.params = clock.round.bytes / (2 * STATE_BYTES + copied);
        Ok(clock.round)
    }
}
