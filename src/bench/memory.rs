//! The hops of host memory alone: its bandwidth, AdamW on the processor, and AdamW while copies run.
//!
//! The bandwidth is that of the fastest of several kernels. AdamW updates in place: what it writes it has read anyway.
#![expect(unsafe_code, reason = "gives AdamW the addresses of arrays that it owns")]

use std::{
    cell::RefCell,
    ops::Range,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use crate::{
    bench::{
        Exercise,
        clock::{Clock, nanos},
        disk::fill_with_numbers,
        kernels::{self, Five, Kernel},
        link::{LinkHop, PATIENCE},
        stats::{Round, as_f64},
    },
    dtype::DType,
    error::Result,
    memory::{HostRegion, SlotLease, SlotPool},
    optim::{self, AdamWOptions, Hyper, Isa, Pool, Span, Update, adamw_parallel},
    quantities::ByteCount,
};

/// Bytes that an update of a bf16 parameter moves: parameter, remainder and both moments in and out, the gradient in.
pub const ADAMW_TRAFFIC: u64 = 26;
/// Bytes of a bf16 parameter and everything that belongs to it.
pub const PARAM_BYTES: u64 = 14;
/// Bytes of an fp32 parameter's states on NVMe when the bf16 half stays in memory: both moments and the remainder.
pub const STATE_BYTES: u64 = 10;
/// Elements of a task of the triad.
const TRIAD_PIECE: usize = 16 << 10;
/// Parts of the arrays by which the faster of two kernels is found.
const TRIALS: usize = 6;
/// Elements or parameters of one part, per thread: long beside the start of the threads, short beside a round.
const PART: usize = 1 << 20;
/// Parameters that are updated between two looks at the copies beside it, per thread.
const BETWEEN_LOOKS: usize = 256 << 10;

/// How far the arrays of the triad are shifted against each other: regions begin at multiples of 2 MiB, and what is
/// equally far into each would share the same sets of the caches.
const SHIFT: usize = 20_544;

/// The three arrays of the triad.
pub struct Arrays {
    leases: [SlotLease; 3],
    /// Where the next part begins.
    at: usize,
}

impl Arrays {
    /// Arrays of `bytes` each.
    ///
    /// # Errors
    /// `FN-E204` when the system refuses the memory.
    pub fn new(bytes: u64) -> Result<Rc<RefCell<Self>>> {
        let take = || -> Result<SlotLease> {
            let pool = SlotPool::new(1, ByteCount(bytes + 2 * SHIFT as u64), "the triad")?;
            let mut lease = pool.lease().ok_or_else(|| crate::Error::new(crate::Code::HostAlloc, "no slot."))?;
            fill_with_numbers(lease.bytes());
            Ok(lease)
        };
        Ok(Rc::new(RefCell::new(Self { leases: [take()?, take()?, take()?], at: 0 })))
    }

    /// The triad over the next `most` elements, from the start again at the end; gives how many there were.
    fn triad(&mut self, pool: &Pool, most: usize) -> Result<usize> {
        let [a, b, c] = &mut self.leases;
        let len = a.len() / 8 * 8 - 2 * SHIFT;
        let part = next_part(&mut self.at, len / 8, most);
        let a = &mut bytemuck::cast_slice_mut::<u8, f64>(&mut a.bytes()[..len])[part.clone()];
        let b = &bytemuck::cast_slice::<u8, f64>(&b.bytes()[SHIFT..SHIFT + len])[part.clone()];
        let c = &bytemuck::cast_slice::<u8, f64>(&c.bytes()[2 * SHIFT..2 * SHIFT + len])[part];
        let elements = a.len();
        let pieces: Vec<_> =
            a.chunks_mut(TRIAD_PIECE).zip(b.chunks(TRIAD_PIECE)).zip(c.chunks(TRIAD_PIECE)).map(Mutex::new).collect();
        let scale = std::hint::black_box(0.5);
        pool.run(pieces.len(), &|index| {
            let mut piece = pieces[index].lock();
            let ((a, b), c) = &mut *piece;
            kernels::triad(a, b, c, scale);
        })?;
        Ok(elements)
    }
}

/// The next `most` of `len` elements, and where the ones after them begin.
fn next_part(at: &mut usize, len: usize, most: usize) -> Range<usize> {
    let start = if *at < len { *at } else { 0 };
    *at = start + most.min(len - start);
    start..*at
}

/// A kernel over one part after the other of arrays much larger than the caches.
pub struct Bandwidth {
    /// The fastest of these is taken.
    kernels: &'static [Kernel],
    fastest: Option<Kernel>,
    arrays: Rc<RefCell<Arrays>>,
    states: Rc<RefCell<States>>,
    pool: Arc<Pool>,
}

impl Bandwidth {
    /// The triad over `arrays`, on the threads of `pool`.
    pub fn triad(arrays: Rc<RefCell<Arrays>>, states: Rc<RefCell<States>>, pool: Arc<Pool>) -> Self {
        Self { kernels: &[Kernel::Triad], fastest: None, arrays, states, pool }
    }

    /// What AdamW does to `states`, without its arithmetic.
    pub fn in_place(arrays: Rc<RefCell<Arrays>>, states: Rc<RefCell<States>>, pool: Arc<Pool>) -> Self {
        Self { kernels: &[Kernel::InPlace, Kernel::InPlaceAhead], ..Self::triad(arrays, states, pool) }
    }

    /// The next part; gives the bytes that it moved.
    fn part(&self, kernel: Kernel) -> Result<u64> {
        let most = PART * self.pool.threads();
        let elements = match kernel {
            Kernel::Triad => self.arrays.borrow_mut().triad(&self.pool, most)?,
            Kernel::InPlace | Kernel::InPlaceAhead => self.states.borrow_mut().touch(kernel, &self.pool, most)?,
        };
        Ok(elements as u64 * kernel.bytes())
    }

    /// The kernel that was fastest over some part, of some parts for each in turn.
    fn choose(&self) -> Result<Kernel> {
        let mut best = (f64::INFINITY, self.kernels[0]);
        for _ in 0..if self.kernels.len() > 1 { TRIALS } else { 0 } {
            for &kernel in self.kernels {
                let begun = Instant::now();
                let bytes = self.part(kernel)?;
                let per_byte = begun.elapsed().as_secs_f64() / as_f64(bytes);
                if per_byte < best.0 {
                    best = (per_byte, kernel);
                }
            }
        }
        Ok(best.1)
    }
}

impl Exercise for Bandwidth {
    fn round(&mut self, time: Duration) -> Result<Round> {
        let kernel = match self.fastest {
            Some(kernel) => kernel,
            None => *self.fastest.insert(self.choose()?),
        };
        let mut clock = Clock::new(1, time);
        loop {
            let begun = Instant::now();
            let bytes = self.part(kernel)?;
            if !clock.ended(bytes, 0, nanos(begun)) {
                return Ok(clock.round);
            }
        }
    }
}

/// Parameters, gradients and states in memory.
pub struct States {
    region: Arc<HostRegion>,
    len: usize,
    /// Where the next part begins, and the parameters and gradients of the next lent piece.
    at: usize,
}

impl States {
    /// Of `len` bf16 parameters.
    ///
    /// # Errors
    /// `FN-E204` when the system refuses the memory.
    pub fn new(len: usize) -> Result<Rc<RefCell<Self>>> {
        let len = len.next_multiple_of(64).max(64);
        let region = HostRegion::new(ByteCount(len as u64 * 14), "AdamW's states")?;
        // SAFETY: the region is this function's own, and this is the only reference into it.
        let bytes = unsafe { std::slice::from_raw_parts_mut(region.as_ptr(), len * 14) };
        fill_with_numbers(bytes);
        // Parameters and gradients: the halves of an fp32 number are no ordinary bf16 numbers.
        for half in bytemuck::cast_slice_mut::<u8, u16>(&mut bytes[8 * len..12 * len]) {
            *half = 0x3f00 | (*half & 0x7f);
        }
        Ok(Rc::new(RefCell::new(Self { region, len, at: 0 })))
    }

    /// Parameters.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Where everything lies, as [`span_at`] has it.
    pub(super) fn region(&self) -> &Arc<HostRegion> {
        &self.region
    }

    fn span(&self) -> Span {
        span_at(self.region.as_ptr(), self.len)
    }

    /// A kernel over the next `most` parameters; gives how many there were.
    fn touch(&mut self, kernel: Kernel, pool: &Pool, most: usize) -> Result<usize> {
        let n = self.len;
        let part = next_part(&mut self.at, n, most);
        // SAFETY: the whole region, borrowed mutably with `self`, begins at a multiple of 2 MiB and is not read by others.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.region.as_ptr(), n * 14) };
        let (m, rest) = bytes.split_at_mut(4 * n);
        let (v, rest) = rest.split_at_mut(4 * n);
        let (param, rest) = rest.split_at_mut(2 * n);
        let (grad, low) = rest.split_at_mut(2 * n);
        let m = &mut bytemuck::cast_slice_mut::<u8, u32>(m)[part.clone()];
        let v = &mut bytemuck::cast_slice_mut::<u8, u32>(v)[part.clone()];
        let param = &mut bytemuck::cast_slice_mut::<u8, u16>(param)[part.clone()];
        let low = &mut bytemuck::cast_slice_mut::<u8, u16>(low)[part.clone()];
        let grad: &[u16] = &bytemuck::cast_slice(grad)[part.clone()];
        let pieces: Vec<_> = (param.chunks_mut(optim::PIECE).zip(low.chunks_mut(optim::PIECE)))
            .zip(m.chunks_mut(optim::PIECE).zip(v.chunks_mut(optim::PIECE)))
            .zip(grad.chunks(optim::PIECE))
            .map(|(((param, low), (m, v)), grad)| Mutex::new(Five { param, low, m, v, grad }))
            .collect();
        let isa = Isa::best();
        pool.run(pieces.len(), &|index| kernels::in_place(kernel, isa, &mut pieces[index].lock()))?;
        Ok(part.len())
    }

    /// Updates the next `len` parameters, and gives how many there were before the end.
    fn update_next(&mut self, pool: &Pool, len: usize) -> Result<usize> {
        let part = next_part(&mut self.at, self.len, len);
        let span = self.span().piece(part.start, part.len());
        // SAFETY: the part lies within `self.len`, and the five arrays are disjoint and borrowed mutably with `self`.
        unsafe { adamw_parallel(pool, &[Update { span, hyper: hyper() }])? };
        Ok(part.len())
    }

    /// Updates a piece of `len` parameters whose states lie in a slot; parameters and gradients are taken from here.
    ///
    /// # Errors
    /// Those of [`adamw_parallel`].
    ///
    /// # Panics
    /// If the slot has no room for the states, or there are fewer parameters here.
    pub fn update_piece(&mut self, pool: &Pool, slot: &mut SlotLease, len: usize) -> Result<()> {
        assert!(len as u64 * STATE_BYTES <= slot.len() as u64 && len <= self.len, "a piece of {len} parameters");
        if self.at + len > self.len {
            self.at = 0;
        }
        let whole = self.span();
        let states = slot.bytes().as_mut_ptr();
        let span = Span {
            exp_avg: states.cast(),
            exp_avg_sq: states.wrapping_add(4 * len).cast(),
            master: states.wrapping_add(8 * len),
            param: whole.param.wrapping_add(2 * self.at),
            grad: whole.grad.wrapping_add(2 * self.at),
            len,
            ..whole
        };
        self.at += len;
        // SAFETY: the states lie in the slot, which is borrowed mutably, and have room there as checked above; the
        // parameters and gradients lie in arrays of `self`, borrowed mutably, within their length. Slots start on a
        // page and `len` is even, so all are aligned.
        unsafe { adamw_parallel(pool, &[Update { span, hyper: hyper() }]) }
    }
}

/// The arrays of `n` bf16 parameters, one after the other: moments first, then the 2-byte arrays.
pub(super) fn span_at(start: *mut u8, n: usize) -> Span {
    Span {
        exp_avg: start.cast(),
        exp_avg_sq: start.wrapping_add(4 * n).cast(),
        param: start.wrapping_add(8 * n),
        grad: start.wrapping_add(10 * n),
        master: start.wrapping_add(12 * n),
        len: n,
        dtype: DType::Bf16,
        reset_master: false,
    }
}

pub(super) fn hyper() -> Hyper {
    Hyper::new(&AdamWOptions::default(), 10, 1.0)
}

/// AdamW over states in memory.
pub struct AdamwCpu {
    states: Rc<RefCell<States>>,
    pool: Arc<Pool>,
}

impl AdamwCpu {
    /// On the threads of `pool`.
    pub fn new(states: Rc<RefCell<States>>, pool: Arc<Pool>) -> Self {
        Self { states, pool }
    }
}

impl Exercise for AdamwCpu {
    fn round(&mut self, time: Duration) -> Result<Round> {
        let mut states = self.states.borrow_mut();
        let len = PART * self.pool.threads();
        let mut clock = Clock::new(1, time);
        loop {
            let begun = Instant::now();
            let params = states.update_next(&self.pool, len)? as u64;
            if !clock.ended(params * ADAMW_TRAFFIC, params, nanos(begun)) {
                return Ok(clock.round);
            }
        }
    }
}

/// AdamW while the link carries copies in both directions, as fast as it can.
pub struct AdamwAndCopies {
    states: Rc<RefCell<States>>,
    pool: Arc<Pool>,
    copies: LinkHop,
}

impl AdamwAndCopies {
    /// On the threads of `pool`, beside `copies`.
    pub fn new(states: Rc<RefCell<States>>, pool: Arc<Pool>, copies: LinkHop) -> Self {
        Self { states, pool, copies }
    }
}

impl Exercise for AdamwAndCopies {
    fn round(&mut self, time: Duration) -> Result<Round> {
        let mut states = self.states.borrow_mut();
        let len = BETWEEN_LOOKS * self.pool.threads();
        let mut queues = self.copies.begin()?;
        // The copies have to be under way, and the first ones do not count.
        let mut clock = Clock::new(states.len.div_ceil(len).min(8), time);
        let mut copied = 0;
        let patience = Instant::now() + PATIENCE;
        loop {
            let begun = Instant::now();
            let params = states.update_next(&self.pool, len)? as u64;
            let moved = self.copies.pump(&mut queues)?;
            copied += if clock.is_warm() { moved } else { 0 };
            if !clock.ended(params * ADAMW_TRAFFIC, params, nanos(begun)) {
                // A round in which no copy ends says nothing of copies: it goes on until one does.
                if copied == 0 && begun < patience {
                    clock.extend();
                    continue;
                }
                clock.round.copied = copied;
                self.copies.end(queues)?;
                return Ok(clock.round);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        bench::link::{HostMemory, Link, Way},
        device::DeviceChoice,
    };

    #[test]
    fn an_update_of_a_lent_piece_changes_its_states_and_stays_inside() {
        let pool = Pool::new(Some(2)).expect("threads");
        let states = States::new(4096).expect("maps");
        let slots = SlotPool::new(1, ByteCount(4096 * STATE_BYTES), "a test").expect("maps");
        let mut slot = slots.lease().expect("a slot");
        fill_with_numbers(slot.bytes());
        let before = slot.bytes().to_vec();
        states.borrow_mut().update_piece(&pool, &mut slot, 2048).expect("updates");
        let after = slot.bytes();
        assert_ne!(before[..2048 * 10], after[..2048 * 10]);
        assert_eq!(before[2048 * 10..], after[2048 * 10..]);
        let moments: &[f32] = bytemuck::cast_slice(&after[..2048 * 8]);
        assert!(moments.iter().all(|x| x.is_finite()));
    }

    #[test]
    fn every_kernel_counts_what_it_moves() {
        let arrays = Arrays::new(1 << 20).expect("maps");
        let states = States::new(1 << 16).expect("maps");
        let pool = Arc::new(Pool::new(Some(2)).expect("threads"));
        let mut triad = Bandwidth::triad(Rc::clone(&arrays), Rc::clone(&states), Arc::clone(&pool));
        let round = triad.round(Duration::ZERO).expect("runs");
        assert!((round.bytes / 3).abs_diff(1 << 20) < 4096, "{}", round.bytes);
        {
            let mut arrays = arrays.borrow_mut();
            let [a, b, c] = &mut arrays.leases;
            let number = |lease: &mut SlotLease, shift| bytemuck::cast_slice::<u8, f64>(&lease.bytes()[shift..])[777];
            assert_eq!(number(a, 0), number(b, SHIFT) + 0.5 * number(c, 2 * SHIFT));
        }
        let mut in_place = Bandwidth::in_place(arrays, states, pool);
        assert_eq!(in_place.round(Duration::ZERO).expect("runs").bytes, 26 << 16);
        assert!(in_place.fastest.is_some());
    }

    #[test]
    fn an_update_beside_copies_lasts_until_a_copy_has_ended() {
        let pool = Arc::new(Pool::new(Some(1)).expect("threads"));
        let link = Rc::new(Link::open(DeviceChoice::Host, 64 << 20, &[]).expect("opens"));
        let copies = LinkHop::new(Rc::clone(&link), &[Way::Up, Way::Down], HostMemory::Pinned, link.block(16 << 20));
        let mut beside = AdamwAndCopies::new(States::new(4096).expect("maps"), pool, copies);
        let round = beside.round(Duration::ZERO).expect("runs");
        assert!(round.copied > 0 && round.params >= 4096, "{} bytes, {} parameters", round.copied, round.params);
    }

    #[test]
    fn parts_follow_each_other_over_all_of_the_arrays() {
        let pool = Pool::new(Some(2)).expect("threads");
        let arrays = Arrays::new(1 << 20).expect("maps");
        let states = States::new(1 << 16).expect("maps");
        let (mut arrays, mut states) = (arrays.borrow_mut(), states.borrow_mut());
        let elements = arrays.triad(&pool, usize::MAX).expect("runs");
        let parts: Vec<usize> = (0..3).map(|_| arrays.triad(&pool, elements - 100).expect("runs")).collect();
        assert_eq!(parts, [elements - 100, 100, elements - 100]);
        let parts: Vec<usize> = (0..3).map(|_| states.touch(Kernel::InPlace, &pool, 60_000).expect("runs")).collect();
        assert_eq!(parts, [60_000, 5_536, 60_000]);
    }

    #[test]
    fn an_update_goes_on_where_the_last_one_ended() {
        let pool = Pool::new(Some(1)).expect("threads");
        let states = States::new(1000).expect("maps");
        let mut states = states.borrow_mut();
        let lens: Vec<usize> = (0..4).map(|_| states.update_next(&pool, 400).expect("updates")).collect();
        assert_eq!(lens, [400, 400, 224, 400]);
    }
}
