//! The two copy streams, and gates as CUDA events taken from rings made in advance.
//!
//! E1: the event of a gate is recorded again `RING` gates later. A completed event then stands for its last record, and
//! that covers the earlier ones: by the order of the stream for `Up` and `Down`; for `Compute`, whose gates come from
//! several streams, because the stream is first made to wait for the earlier record unless that is known to be done. So
//! a question about an old gate is answered for a newer one: perhaps late, never too early.
//! E2: that all gates up to one number have passed is concluded for `Up` and `Down` only.
#![expect(unsafe_code, reason = "calls into the CUDA driver")]

use std::{
    ffi::c_uint,
    ptr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use cudarc::driver::sys::{
    CUdevice_attribute, CUevent, CUevent_flags, CUstream, CUstream_flags, CUstreamWaitValue_flags,
    CUstreamWriteValue_flags,
};
use parking_lot::Mutex;

use super::driver::Context;
use crate::{
    device::{Gate, Role, StreamRef, unrecorded},
    error::Result,
};

/// Events of one role.
const RING: u64 = 4096;
/// First and longest sleep between two looks at a gate.
const NAP: [Duration; 2] = [Duration::from_micros(10), Duration::from_micros(200)];

/// An event and what is known about it.
struct Slot {
    event: CUevent,
    /// The last gate recorded with it; 0 before the first.
    recorded: AtomicU64,
    /// The last of its gates known to have passed.
    passed: AtomicU64,
}

/// The gates of one role.
struct GateRing {
    role: Role,
    slots: Box<[Slot]>,
    /// Held while a gate is recorded, so that numbers follow the order of the stream.
    recording: Mutex<()>,
    /// The last gate recorded.
    recorded: AtomicU64,
    /// All gates up to this have passed; stays 0 for `Compute` (E2).
    passed: AtomicU64,
}

impl GateRing {
    fn slot(&self, seq: u64) -> &Slot {
        &self.slots[(seq % RING) as usize]
    }

    fn known_passed(&self, seq: u64) -> bool {
        seq <= self.passed.load(Ordering::Acquire) || seq <= self.slot(seq).passed.load(Ordering::Acquire)
    }

    fn set_passed(&self, slot: &Slot, seq: u64) {
        slot.passed.fetch_max(seq, Ordering::AcqRel);
        if self.role != Role::Compute {
            self.passed.fetch_max(seq, Ordering::AcqRel);
        }
    }

    fn check(&self, gate: Gate) -> Result<()> {
        let recorded = self.recorded.load(Ordering::Acquire);
        if gate.seq > recorded { Err(unrecorded(gate, recorded)) } else { Ok(()) }
    }
}

/// The streams of one device. What is recorded here exists, so a half-made one drops cleanly.
pub(super) struct Streams {
    pub(super) context: Arc<Context>,
    /// `Up` and `Down`; null before they are made.
    copies: [CUstream; 2],
    rings: Vec<GateRing>,
}

// SAFETY: streams and events may be used from any thread; the handles are never changed after creation.
unsafe impl Send for Streams {}
// SAFETY: as above.
unsafe impl Sync for Streams {}

impl Streams {
    pub(super) fn new(context: Arc<Context>) -> Result<Arc<Self>> {
        let mut streams = Self { context, copies: [ptr::null_mut(); 2], rings: Vec::with_capacity(3) };
        streams.make_streams()?;
        for role in [Role::Up, Role::Down, Role::Compute] {
            streams.make_ring(role)?;
        }
        Ok(Arc::new(streams))
    }

    /// Of the highest priority, so that a copy goes out before kernels of the user that became ready with it.
    fn make_streams(&mut self) -> Result<()> {
        let context = &*self.context;
        let _entered = context.enter()?;
        let greatest = context.first_priority()?;
        let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint;
        for stream in &mut self.copies {
            // SAFETY: writes one handle, which `drop` destroys.
            context.check(unsafe { context.driver.cuStreamCreateWithPriority(&raw mut *stream, flags, greatest) })?;
        }
        Ok(())
    }

    fn make_ring(&mut self, role: Role) -> Result<()> {
        let context = &*self.context;
        let _entered = context.enter()?;
        let mut slots = Vec::with_capacity(RING as usize);
        let mut made = Ok(());
        while made.is_ok() && slots.len() < RING as usize {
            let (mut event, flags) = (ptr::null_mut(), CUevent_flags::CU_EVENT_DISABLE_TIMING as c_uint);
            // SAFETY: writes one handle, which `drop` destroys.
            made = context.check(unsafe { context.driver.cuEventCreate(&raw mut event, flags) });
            if made.is_ok() {
                slots.push(Slot { event, recorded: AtomicU64::new(0), passed: AtomicU64::new(0) });
            }
        }
        self.rings.push(GateRing {
            role,
            slots: slots.into_boxed_slice(),
            recording: Mutex::new(()),
            recorded: AtomicU64::new(0),
            passed: AtomicU64::new(0),
        });
        made
    }

    /// The driver's handle of a stream.
    pub(super) fn handle(&self, stream: StreamRef) -> CUstream {
        match stream {
            StreamRef::Up => self.copies[0],
            StreamRef::Down => self.copies[1],
            StreamRef::Compute(handle) => ptr::with_exposed_provenance_mut(handle as usize),
        }
    }

    fn ring(&self, role: Role) -> &GateRing {
        match role {
            Role::Up => &self.rings[0],
            Role::Down => &self.rings[1],
            Role::Compute => &self.rings[2],
        }
    }

    /// Records the next gate of a role on a stream.
    pub(super) fn record(&self, stream: StreamRef) -> Result<Gate> {
        let context = &*self.context;
        let (ring, handle) = (self.ring(stream.role()), self.handle(stream));
        let _entered = context.enter()?;
        let _recording = ring.recording.lock();
        let seq = ring.recorded.load(Ordering::Relaxed) + 1;
        let slot = ring.slot(seq);
        let before = slot.recorded.load(Ordering::Relaxed);
        if !ring.known_passed(before) && !self.query(ring, slot)? && ring.role == Role::Compute {
            // SAFETY: E1; both handles are alive, and the event was recorded.
            context.check(unsafe { context.driver.cuStreamWaitEvent(handle, slot.event, 0) })?;
        }
        // SAFETY: both handles are alive.
        context.check(unsafe { context.driver.cuEventRecord(slot.event, handle) })?;
        slot.recorded.store(seq, Ordering::Release);
        ring.recorded.store(seq, Ordering::Release);
        Ok(Gate { role: ring.role, seq })
    }

    /// Makes later work of a stream wait for a gate.
    pub(super) fn wait(&self, stream: StreamRef, gate: Gate) -> Result<()> {
        let context = &*self.context;
        let ring = self.ring(gate.role);
        let _entered = context.enter()?;
        ring.check(gate)?;
        let in_order = gate.role == stream.role() && gate.role != Role::Compute;
        if in_order || ring.known_passed(gate.seq) {
            return Ok(());
        }
        let event = ring.slot(gate.seq).event;
        // SAFETY: both handles are alive, and the event was recorded for this gate or a later one that covers it.
        context.check(unsafe { context.driver.cuStreamWaitEvent(self.handle(stream), event, 0) })
    }

    /// True if the gate has passed.
    pub(super) fn passed(&self, gate: Gate) -> Result<bool> {
        let ring = self.ring(gate.role);
        let _entered = self.context.enter()?;
        ring.check(gate)?;
        if ring.known_passed(gate.seq) { Ok(true) } else { self.query(ring, ring.slot(gate.seq)) }
    }

    /// True if the last record of the slot's event is done.
    fn query(&self, ring: &GateRing, slot: &Slot) -> Result<bool> {
        // Read first: should the event be recorded again meanwhile, its completion covers this number too.
        let recorded = slot.recorded.load(Ordering::Acquire);
        // SAFETY: the event is alive.
        let done = unsafe { self.context.done(slot.event) }?;
        if done {
            ring.set_passed(slot, recorded);
        }
        Ok(done)
    }

    /// Blocks the thread until the gate has passed; false when `deadline` came first.
    pub(super) fn block(&self, gate: Gate, deadline: Option<Instant>) -> Result<bool> {
        block(deadline, || self.passed(gate))
    }

    /// Stores a word when the stream comes here, and has it wait for others; false where the driver cannot have it wait for memory.
    ///
    /// # Safety
    /// The words are in registered memory, and stay valid until the stream has run this.
    pub(super) unsafe fn meet(&self, stream: StreamRef, value: u64, mine: u64, others: &[u64]) -> Result<bool> {
        let context = &*self.context;
        let supported = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS;
        if context.attribute(supported)? == 0 {
            return Ok(false);
        }
        let (handle, driver) = (self.handle(stream), context.driver);
        let _entered = context.enter()?;
        let stores = CUstreamWriteValue_flags::CU_STREAM_WRITE_VALUE_DEFAULT as c_uint;
        // SAFETY: the stream is alive; the caller vouches for the word.
        context.check(unsafe { driver.cuStreamWriteValue64_v2(handle, mine, value, stores) })?;
        let as_much = CUstreamWaitValue_flags::CU_STREAM_WAIT_VALUE_GEQ as c_uint;
        for &other in others {
            // SAFETY: as above.
            context.check(unsafe { driver.cuStreamWaitValue64_v2(handle, other, value, as_much) })?;
        }
        Ok(true)
    }

    /// Waits until both copy streams are empty. A failure is remembered by the context.
    pub(super) fn drain(&self) {
        let context = &*self.context;
        let Ok(_entered) = context.enter() else { return };
        for stream in self.copies.into_iter().filter(|stream| !stream.is_null()) {
            // SAFETY: the stream is alive.
            let _ = context.check(unsafe { context.driver.cuStreamSynchronize(stream) });
        }
    }
}

/// Blocks the thread until `ready`; false when `deadline` came first.
pub(super) fn block(deadline: Option<Instant>, ready: impl Fn() -> Result<bool>) -> Result<bool> {
    let mut nap = NAP[0];
    while !ready()? {
        let left = deadline.map_or(NAP[1], |at| at.saturating_duration_since(Instant::now()));
        if left.is_zero() {
            return Ok(false);
        }
        thread::sleep(nap.min(left));
        nap = (nap * 2).min(NAP[1]);
    }
    Ok(true)
}

impl Drop for Streams {
    fn drop(&mut self) {
        // Device and frames, the only users, have emptied the streams.
        let context = &*self.context;
        let Ok(_entered) = context.enter() else { return };
        // SAFETY: exactly what this value made, and no other code can name it. `drop` cannot return a failure.
        unsafe {
            for slot in self.rings.iter().flat_map(|ring| &ring.slots) {
                let _ = context.check(context.driver.cuEventDestroy_v2(slot.event));
            }
            for stream in self.copies.into_iter().filter(|stream| !stream.is_null()) {
                let _ = context.check(context.driver.cuStreamDestroy_v2(stream));
            }
        }
    }
}
