//! The hops between host memory and the device: copies on the device's own two streams.
//!
//! N1: a slot that is lent to a copy comes back only when the copy's gate has passed.
//! N2: a copy never leaves the buffers made here; lengths and places are checked.
#![expect(unsafe_code, reason = "enqueues copies between buffers that it owns or has been lent")]

use std::{
    collections::VecDeque,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    bench::{
        Exercise,
        clock::{Clock, nanos},
        disk::fill_with_numbers,
        stats::Round,
    },
    device::{self, Device, DeviceChoice, DeviceKind, FrameSpan, Frames, Gate, StreamRef},
    error::{Code, Error, Result},
    memory::{HostRegion, SlotLease},
    quantities::{ByteCount, round_up},
};

/// Blocks in flight per direction.
pub const DEPTH: usize = 4;
/// How long a copy may take before the benchmark gives up.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);
/// Smallest chunk of frames; a driver may ask for more.
const CHUNK: u64 = 2 << 20;
/// Copies between two gates, when blocks are small.
const LAP: usize = 256;

/// Which way a copy goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Host to device.
    Up,
    /// Device to host.
    Down,
}

impl Way {
    const fn stream(self) -> StreamRef {
        match self {
            Self::Up => StreamRef::Up,
            Self::Down => StreamRef::Down,
        }
    }
}

/// The host's side of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostMemory {
    /// Page-locked for the device.
    Pinned,
    /// As `malloc` would give it.
    Pageable,
}

/// A device, and as much memory on both sides for each direction.
pub struct Link {
    device: Arc<dyn Device>,
    frames: Arc<dyn Frames>,
    pinned: Arc<HostRegion>,
    /// Only where it makes a difference.
    pageable: Option<Arc<HostRegion>>,
    registered: Vec<Arc<HostRegion>>,
    /// Bytes per direction on each side.
    side: usize,
}

impl Link {
    /// Opens a device with buffers of `side` bytes per direction; `slots` are the regions whose slots will be lent.
    ///
    /// # Errors
    /// `FN-E001`, `FN-E002` from the device, `FN-E201` or `FN-E204` without the memory.
    pub fn open(choice: DeviceChoice, side: u64, slots: &[Arc<HostRegion>]) -> Result<Self> {
        let device = device::open(choice)?;
        let chunk = device.granularity().max(CHUNK);
        let side = round_up(side.max(chunk), chunk);
        let chunks = u32::try_from(side / chunk).unwrap_or(u32::MAX);
        let spans = [FrameSpan { first_chunk: 0, chunks }, FrameSpan { first_chunk: chunks, chunks }];
        let frames = device.create_frames(chunks * 2, chunk, &spans)?;
        let pinned = HostRegion::new(ByteCount(side * 2), "the benchmark's copies")?;
        device.register(&pinned)?;
        for region in slots {
            device.register(region)?;
        }
        let pageable = match device.kind() {
            DeviceKind::Host => None,
            DeviceKind::Cuda(_) => Some(HostRegion::new(ByteCount(side * 2), "the benchmark's copies")?),
        };
        let link = Self { device, frames, pinned, pageable, registered: slots.to_vec(), side: side as usize };
        link.first_touch()?;
        Ok(link)
    }

    /// Fills all buffers on both sides, so that no first touch is timed, with what no drive can compress.
    fn first_touch(&self) -> Result<()> {
        for region in [Some(&self.pinned), self.pageable.as_ref()].into_iter().flatten() {
            // SAFETY: the whole region, which no other code has yet.
            fill_with_numbers(unsafe { std::slice::from_raw_parts_mut(region.as_ptr(), region.len()) });
        }
        for unit in 0..2 {
            let (dst, src) = (self.frames.address(unit), self.pinned.as_ptr() as u64);
            // SAFETY: a whole frame and half of the region; both live as long as `self`, whose drop drains the device.
            unsafe { self.device.copy(StreamRef::Up, dst, src, self.side)? };
        }
        self.wait(self.device.record(StreamRef::Up)?)
    }

    /// The block to take where `wanted` is asked for: at most what leaves room for those in flight.
    pub fn block(&self, wanted: usize) -> usize {
        wanted.min(self.side / DEPTH)
    }

    /// Which device it is.
    pub fn kind(&self) -> DeviceKind {
        self.device.kind()
    }

    /// The device.
    pub(super) fn device(&self) -> &dyn Device {
        &*self.device
    }

    /// The device's buffers, numbered by [`Way`], and the bytes of each.
    pub(super) fn frames(&self) -> (&dyn Frames, usize) {
        (&*self.frames, self.side)
    }

    /// Whether page-locking makes a difference on this device.
    pub fn has_pageable(&self) -> bool {
        self.pageable.is_some()
    }

    /// Enqueues a copy of `len` bytes in one direction, at `at` of the buffers made for it (from the start again at
    /// their end), and gives its gate.
    ///
    /// # Errors
    /// `FN-E002` from the device.
    ///
    /// # Panics
    /// If `len` is more than the buffers hold.
    pub fn push(&self, way: Way, memory: HostMemory, at: usize, len: usize, block: usize) -> Result<Gate> {
        assert!(len <= self.side && block > 0, "a copy of {len} bytes in buffers of {}", self.side);
        let at = at % (self.side - len + 1);
        let region = match (memory, &self.pageable) {
            (HostMemory::Pageable, Some(region)) => region,
            _ => &self.pinned,
        };
        let host = region.as_ptr() as u64 + (way as usize * self.side + at) as u64;
        let frame = self.frames.address(way as usize) + at as u64;
        for start in (0..len).step_by(block) {
            let (part, start) = (block.min(len - start), start as u64);
            let (dst, src) = if way == Way::Up { (frame, host) } else { (host, frame) };
            // SAFETY: both ranges lie in this direction's half of buffers that live as long as `self`, whose drop
            // drains the device; no other code accesses them.
            unsafe { self.device.copy(way.stream(), dst + start, src + start, part)? };
        }
        self.device.record(way.stream())
    }

    /// Lends a slot to a copy of its first `len` bytes.
    ///
    /// # Errors
    /// `FN-E002` from the device, or if the slot's region was not given to [`Link::open`].
    ///
    /// # Panics
    /// If `len` is more than the slot or the buffers hold.
    pub fn lend(self: &Rc<Self>, way: Way, lease: SlotLease, len: usize) -> Result<Lent> {
        assert!(len <= lease.len() && len <= self.side, "a copy of {len} bytes of {lease:?}");
        if !self.registered.iter().any(|region| Arc::ptr_eq(region, lease.region())) {
            return Err(Error::new(Code::Cuda, "a slot of a region that is not page-locked.").action("This is a bug."));
        }
        let places = self.side / len.max(1);
        let frame = self.frames.address(way as usize) + (lease.index() as usize % places * len) as u64;
        let host = lease.as_ptr() as u64;
        let (dst, src) = if way == Way::Up { (frame, host) } else { (host, frame) };
        // SAFETY: the frame lives as long as `self`, which `Lent` holds, and the slot's lease is in `Lent` until the
        // gate has passed. Two copies into one place of the frame are in order on one stream.
        unsafe { self.device.copy(way.stream(), dst, src, len)? };
        let gate = self.device.record(way.stream());
        // Without a gate there is no sign that the slot is free again: wait for all copies.
        let gate = gate.inspect_err(|_| self.device.drain())?;
        Ok(Lent { link: Rc::clone(self), lease: Some(lease), gate })
    }

    /// Blocks until a gate has passed.
    ///
    /// # Errors
    /// `FN-E102` after two minutes.
    pub fn wait(&self, gate: Gate) -> Result<()> {
        if self.device.block(gate, PATIENCE)? {
            return Ok(());
        }
        Err(Error::new(Code::Stuck, "a copy of the benchmark did not end in two minutes.")
            .action("See dmesg and nvidia-smi for the state of the device."))
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.device.drain();
    }
}

/// A slot that a copy has; it comes back from [`Lent::take`].
pub struct Lent {
    link: Rc<Link>,
    lease: Option<SlotLease>,
    gate: Gate,
}

impl Lent {
    /// Whether the copy has ended.
    ///
    /// # Errors
    /// `FN-E002` from the device.
    pub fn ready(&self) -> Result<bool> {
        self.link.device.passed(self.gate)
    }

    /// Blocks until the copy has ended and gives the slot back.
    ///
    /// # Errors
    /// Those of [`Link::wait`].
    pub fn take(mut self) -> Result<Option<SlotLease>> {
        self.link.wait(self.gate)?;
        Ok(self.lease.take())
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if self.lease.is_some() && !matches!(self.link.device.block(self.gate, PATIENCE), Ok(true)) {
            // The device may still write to it: its memory is never given to anyone else.
            std::mem::forget(self.lease.take());
        }
    }
}

/// Copies in one or both directions, a few blocks in flight in each.
pub struct LinkHop {
    link: Rc<Link>,
    ways: &'static [Way],
    memory: HostMemory,
    block: usize,
    at: usize,
}

impl LinkHop {
    /// Copies of `block` bytes.
    pub fn new(link: Rc<Link>, ways: &'static [Way], memory: HostMemory, block: usize) -> Self {
        Self { link, ways, memory, block, at: 0 }
    }

    /// What goes between two gates: one block, or several small ones.
    fn lap(&self) -> usize {
        let most = self.link.side / DEPTH / self.block;
        self.block * LAP.min((16 << 20) / self.block.min(16 << 20)).min(most).max(1)
    }

    fn push(&mut self, way: Way) -> Result<(Gate, Instant)> {
        let len = self.lap().min(self.link.side);
        self.at = (self.at + len) % self.link.side;
        let begun = Instant::now();
        Ok((self.link.push(way, self.memory, self.at / len * len, len, self.block)?, begun))
    }
}

/// Copies under way in one direction, oldest first, and since when.
type Queue = (Way, VecDeque<(Gate, Instant)>);

impl LinkHop {
    /// Starts a few copies in each direction.
    pub(super) fn begin(&mut self) -> Result<Vec<Queue>> {
        let ways = self.ways;
        let queue = |&way: &Way| Ok((way, (0..DEPTH).map(|_| self.push(way)).collect::<Result<_>>()?));
        ways.iter().map(queue).collect()
    }

    /// Starts a copy for each that has ended; gives the bytes of those.
    pub(super) fn pump(&mut self, queues: &mut [Queue]) -> Result<u64> {
        let mut ended = 0;
        for (way, queue) in queues {
            while let Some(&(gate, _)) = queue.front()
                && self.link.device.passed(gate)?
            {
                queue.pop_front();
                queue.push_back(self.push(*way)?);
                ended += self.bytes();
            }
        }
        Ok(ended)
    }

    /// Waits for all copies.
    pub(super) fn end(&self, queues: Vec<Queue>) -> Result<()> {
        queues.into_iter().flat_map(|(_, queue)| queue).try_for_each(|(gate, _)| self.link.wait(gate))
    }

    fn bytes(&self) -> u64 {
        self.lap().min(self.link.side) as u64
    }
}

impl Exercise for LinkHop {
    fn round(&mut self, time: Duration) -> Result<Round> {
        let mut queues = self.begin()?;
        let mut clock = Clock::new(DEPTH * self.ways.len(), time);
        while let Some(&(oldest, _)) =
            queues.iter().filter_map(|(_, queue)| queue.front()).min_by_key(|(_, begun)| *begun)
        {
            self.link.device.block(oldest, Duration::from_millis(1))?;
            for (way, queue) in &mut queues {
                while let Some(&(gate, begun)) = queue.front()
                    && self.link.device.passed(gate)?
                {
                    queue.pop_front();
                    if clock.ended(self.bytes(), 0, nanos(begun)) {
                        queue.push_back(self.push(*way)?);
                    }
                }
                if let Some(&(gate, begun)) = queue.front()
                    && begun.elapsed() > PATIENCE
                {
                    self.link.wait(gate)?;
                }
            }
        }
        Ok(clock.round)
    }
}
