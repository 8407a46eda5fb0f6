//! The hops of the device's own memory: its bandwidth, and AdamW with everything in it.
//!
//! G1: the arrays are this module's own frames; nothing else enqueues work on them.
#![expect(unsafe_code, reason = "enqueues work on frames that it owns")]

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
        link::{Link, Way},
        memory::{ADAMW_TRAFFIC, PARAM_BYTES, States, hyper, span_at},
        stats::Round,
    },
    device::{FrameSpan, Frames, Gate, StreamRef},
    error::Result,
    quantities::round_up,
};

/// Operations in flight.
const DEPTH: usize = 4;
/// Parameters at most: with everything that belongs to them far more than a device's cache.
const MOST: u64 = 64 << 20;

/// Keeps a few operations in flight; each moves `bytes` and updates `params`.
fn steadily(
    link: &Link,
    time: Duration,
    (bytes, params): (u64, u64),
    mut enqueue: impl FnMut() -> Result<Gate>,
) -> Result<Round> {
    let mut begin = || -> Result<(Gate, Instant)> {
        let begun = Instant::now();
        Ok((enqueue()?, begun))
    };
    let mut queue = (0..DEPTH).map(|_| begin()).collect::<Result<VecDeque<_>>>()?;
    let mut clock = Clock::new(DEPTH, time);
    while let Some((gate, begun)) = queue.pop_front() {
        link.wait(gate)?;
        if clock.ended(bytes, params, nanos(begun)) {
            queue.push_back(begin()?);
        }
    }
    Ok(clock.round)
}

/// Copies within the device. What is read and what is written both count.
pub struct DeviceMemory(Rc<Link>);

impl DeviceMemory {
    /// Between the link's buffers.
    pub fn new(link: Rc<Link>) -> Self {
        Self(link)
    }
}

impl Exercise for DeviceMemory {
    fn round(&mut self, time: Duration) -> Result<Round> {
        let link = &self.0;
        let (frames, len) = link.frames();
        steadily(link, time, (2 * len as u64, 0), || {
            let (dst, src) = (frames.address(Way::Down as usize), frames.address(Way::Up as usize));
            // SAFETY: two frames of the link, which outlives this call, and nothing else is under way on them.
            unsafe { link.device().copy(StreamRef::Up, dst, src, len)? };
            link.device().record(StreamRef::Up)
        })
    }
}

/// AdamW in bf16 on the device, over states in its memory.
pub struct AdamwGpu {
    link: Rc<Link>,
    frames: Arc<dyn Frames>,
    len: usize,
}

impl AdamwGpu {
    /// Takes an eighth of the device's free memory at most, and fills it with copies of `states`.
    ///
    /// # Errors
    /// `FN-E003` where nothing can be compiled, `FN-E002` from the driver, `FN-E201` without the memory.
    pub fn new(link: Rc<Link>, states: &States) -> Result<Self> {
        let device = link.device();
        device.prepare_updates()?;
        let free = device.free_memory()?.map_or(u64::MAX, |free| free.0 / 8 / PARAM_BYTES);
        let len = (free.min(MOST) / 64 * 64).max(64);
        let len = if free == u64::MAX { states.len() as u64 } else { len };
        let chunk = device.granularity().max(2 << 20);
        let chunks = u32::try_from(round_up(len * PARAM_BYTES, chunk) / chunk).unwrap_or(u32::MAX);
        let frames = device.create_frames(chunks, chunk, &[FrameSpan { first_chunk: 0, chunks }])?;
        let this = Self { frames, len: len as usize, link };
        this.fill(states)?;
        Ok(this)
    }

    fn fill(&self, states: &States) -> Result<()> {
        let device = self.link.device();
        device.register(states.region())?;
        let base = states.region().as_ptr() as u64;
        // Each array, from its own in the host's memory, again and again.
        let mut at = 0;
        for size in [4, 4, 2, 2, 2] {
            for first in (0..self.len).step_by(states.len()) {
                let elements = states.len().min(self.len - first);
                let dst = self.frames.address(0) + (at * self.len + first * size) as u64;
                // SAFETY: `elements` of both arrays from here on; the states are registered and outlive the wait below.
                unsafe { device.copy(StreamRef::Up, dst, base + (at * states.len()) as u64, elements * size)? };
            }
            at += size;
        }
        self.link.wait(device.record(StreamRef::Up)?)
    }
}

impl Exercise for AdamwGpu {
    fn round(&mut self, time: Duration) -> Result<Round> {
        let (device, params) = (self.link.device(), self.len as u64);
        let span = span_at(self.frames.address(0) as *mut u8, self.len);
        steadily(&self.link, time, (params * ADAMW_TRAFFIC, params), || {
            // SAFETY: five disjoint arrays of `len` elements in this exercise's own frames; one stream, one after another.
            unsafe { device.adamw(StreamRef::Up, &span, &hyper())? };
            device.record(StreamRef::Up)
        })
    }
}

impl Drop for AdamwGpu {
    /// The frames go away only when nothing is under way on them.
    fn drop(&mut self) {
        self.link.device().drain();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{bench::memory::AdamwCpu, device::DeviceChoice, optim::Pool};

    #[test]
    fn both_hops_run_on_a_device_and_count_what_they_move() {
        let link = Rc::new(Link::open(DeviceChoice::Host, 4 << 20, &[]).expect("opens"));
        let round = DeviceMemory::new(Rc::clone(&link)).round(Duration::ZERO).expect("copies");
        assert_eq!(round.bytes, 8 << 20);
        let (frames, len) = link.frames();
        // SAFETY: both frames of the host device are memory of this process, and nothing is under way on them.
        let [up, down] = [0, 1].map(|n| unsafe { std::slice::from_raw_parts(frames.address(n) as *const u8, len) });
        assert!(up == down && up[..4096].iter().any(|&byte| byte != 0));
    }

    #[test]
    fn states_on_the_device_become_those_of_the_processor() {
        let link = Rc::new(Link::open(DeviceChoice::Host, 4 << 20, &[]).expect("opens"));
        let states = States::new(1 << 12).expect("maps");
        let mut gpu = AdamwGpu::new(Rc::clone(&link), &states.borrow()).expect("fills");
        let (address, bytes) = (gpu.frames.address(0) as *const u8, gpu.len * PARAM_BYTES as usize);
        assert_eq!(gpu.round(Duration::ZERO).expect("updates").params, 1 << 12);
        // As often as there: as many to warm up as are in flight and as many again; two in each round here.
        let mut cpu = AdamwCpu::new(Rc::clone(&states), Arc::new(Pool::new(Some(1)).expect("threads")));
        for _ in 0..DEPTH {
            assert_eq!(cpu.round(Duration::ZERO).expect("updates").params, 1 << 12);
        }
        let states = states.borrow();
        // SAFETY: the whole frame, and the whole region; nothing is under way on either.
        let (there, here) = unsafe {
            (std::slice::from_raw_parts(address, bytes), std::slice::from_raw_parts(states.region().as_ptr(), bytes))
        };
        assert!(there == here, "the device computes something else");
    }
}
