//! One set of updates, shared between the processor's threads and the lanes of the device.
//!
//! H1: every element is updated once: pieces are claimed from one word, the processor's from the front, the lanes' in groups from
//! the back. H2: when a run is over, be it by an error, nothing touches the arrays any more. H3: in steady state nothing
//! allocates. H4: a lane takes no group for which the processor would have to wait, and none while the link brings a unit that
//! somebody computes with next.
#![expect(unsafe_code, reason = "hands raw spans to the kernel and to lanes")]

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::{
    device::{Elapsed, Lanes},
    error::{Code, Error, Result},
    optim::{Hyper, Isa, PIECE, Pool, Span, Target, adamw, adamw_into_with, unsupported},
    runtime::{measure::stats::Link, shared::Shared},
    units::UnitId,
};

/// A wait for a lane looks this often at the clock, and gives up after so many looks.
const SLICE: Duration = Duration::from_millis(100);
const SLICES: u32 = 1200;
/// Between two looks whether the link is free again.
const NAP: Duration = Duration::from_micros(50);

/// Who updates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// The processor alone.
    Processor,
    /// The lanes alone.
    Lanes,
    /// Both, as fast as they are seen to be.
    Rates,
    /// Half of the pieces each; for tests.
    Halves,
}

/// A span to update, in place or into another place.
struct Part {
    /// Number of its first piece.
    first: u32,
    span: Span,
    hyper: Hyper,
    to: Option<Target>,
}

// SAFETY: addresses and numbers; whoever runs the share vouches for the bytes.
unsafe impl Send for Part {}
// SAFETY: as above.
unsafe impl Sync for Part {}

/// What one side did in a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Work {
    /// Elements updated.
    pub(crate) elems: u64,
    /// Memory traffic of the processor, or bytes over the link.
    pub(crate) bytes: u64,
    /// When it began and ended.
    pub(crate) time: (u64, u64),
}

/// A group under way on a lane.
#[derive(Clone, Copy, Debug)]
struct Flight {
    start: u64,
    elems: u64,
    bytes: u64,
}

/// Updates to be shared, and what is known about who is how fast.
pub(crate) struct Share {
    lanes: Option<Arc<dyn Lanes>>,
    split: Sharing,
    /// Most pieces of one launch.
    group: u32,
    pace: Pace,
    parts: Vec<Part>,
    pieces: u32,
    flights: Vec<Option<Flight>>,
}

impl Share {
    /// Lanes take groups of at most `group` elements, a multiple of [`PIECE`].
    pub(crate) fn new(lanes: Option<(Arc<dyn Lanes>, u64)>, split: Sharing) -> Self {
        let group = lanes.as_ref().map_or(1, |(_, elems)| u32::try_from(elems / PIECE as u64).unwrap_or(u32::MAX));
        let lanes = lanes.map(|(lanes, _)| lanes);
        let flights = vec![None; lanes.as_ref().map_or(0, |lanes| lanes.count())];
        Self { lanes, split, group: group.max(1), pace: Pace::default(), parts: Vec::new(), pieces: 0, flights }
    }

    /// Says who updates from now on; false where there is no choice.
    pub(crate) fn set_split(&mut self, split: Sharing) -> bool {
        self.split = split;
        self.lanes.is_some()
    }

    /// True if there are lanes to share with.
    pub(crate) fn shares(&self) -> bool {
        self.lanes.is_some() && self.split != Sharing::Processor
    }

    /// Begins a new set.
    pub(crate) fn clear(&mut self) {
        self.parts.clear();
        self.pieces = 0;
    }

    /// Adds a span to the set; its new values go to `to`, or where the old ones are.
    ///
    /// # Errors
    /// `FN-E112` for a type that is not trainable.
    pub(crate) fn add(&mut self, span: Span, hyper: Hyper, to: Option<Target>) -> Result<()> {
        if !span.dtype.trainable() {
            return Err(unsupported(span.dtype));
        }
        if span.len > 0 {
            self.parts.push(Part { first: self.pieces, span, hyper, to });
            self.pieces += u32::try_from(span.len.div_ceil(PIECE)).unwrap_or(u32::MAX);
        }
        Ok(())
    }

    /// Updates the set; gives what the processor and the lanes did. `now` is the time in nanoseconds, `paging` tells whether a unit is
    /// on its way up at the moment.
    ///
    /// # Errors
    /// A panic on the pool's threads, a failure of the device. Some elements are not updated then.
    ///
    /// # Safety
    /// For the spans and targets of the set: as for [`adamw`], [`adamw_into_with`] and, with lanes, [`Lanes::launch`].
    pub(crate) unsafe fn run(
        &mut self,
        pool: &Pool,
        now: &(dyn Fn() -> u64 + Sync),
        paging: &dyn Fn() -> Result<bool>,
    ) -> Result<[Work; 2]> {
        let Self { lanes, group, pace, parts, pieces, flights, .. } = self;
        let lanes = lanes.as_deref().filter(|_| self.split != Sharing::Processor);
        let claims = Claims::new(*pieces, if lanes.is_some() { self.split } else { Sharing::Processor });
        let (elems, bytes, begun, ended) = (AtomicU64::new(0), AtomicU64::new(0), now(), AtomicU64::new(0));
        let task = |_| {
            let Some(piece) = claims.first() else { return };
            let (part, span, to) = cut(parts, piece..piece + 1);
            // The only error, a type without a kernel, was ruled out when the part was added.
            // SAFETY: the caller's contract; every piece is claimed once, and pieces are disjoint.
            let _ = unsafe {
                match to {
                    None => adamw(&span, &part.hyper),
                    Some(to) => adamw_into_with(Isa::best(), &span, &to, &part.hyper),
                }
            };
            elems.fetch_add(span.len as u64, Ordering::Relaxed);
            bytes.fetch_add(span.traffic(), Ordering::Relaxed);
            ended.fetch_max(now(), Ordering::Relaxed);
        };
        let tasks = claims.processors as usize;
        let mut flown = Work::default();
        match lanes {
            None => pool.run(tasks, &task)?,
            Some(lanes) => {
                let rates = self.split == Sharing::Rates;
                let mut feeder = Feeder {
                    lanes,
                    claims: &claims,
                    parts,
                    group: *group,
                    rates,
                    pace,
                    flights,
                    now,
                    paging,
                    flown: &mut flown,
                };
                let mut fed = Ok(());
                pool.run_beside(tasks, &task, &mut || fed = feeder.feed())?;
                fed?;
            }
        }
        let time = (begun, ended.into_inner());
        let done = Work { elems: elems.into_inner(), bytes: bytes.into_inner(), time };
        if done.elems > 0 {
            self.pace.ran(done.elems, time.1 - time.0);
        }
        Ok([done, flown])
    }
}

/// The part that holds some pieces, which are all of one part, and the span and target of those pieces.
fn cut(parts: &[Part], pieces: Range<u32>) -> (&Part, Span, Option<Target>) {
    let part = &parts[holder(parts, pieces.start)];
    let start = (pieces.start - part.first) as usize * PIECE;
    let span = part.span.piece(start, pieces.len() * PIECE);
    (part, span, part.to.map(|to| to.from(start, span.dtype)))
}

/// The index of the part that holds a piece.
fn holder(parts: &[Part], piece: u32) -> usize {
    parts.partition_point(|part| part.first <= piece).saturating_sub(1)
}

/// Which pieces are still to be had: from `front` to `back`, both in one word.
struct Claims {
    left: AtomicU64,
    /// The processor takes none from here on.
    processors: u32,
    /// Lanes take none before this.
    lanes: u32,
}

impl Claims {
    fn new(pieces: u32, split: Sharing) -> Self {
        let (processors, lanes) = match split {
            Sharing::Processor => (pieces, pieces),
            Sharing::Lanes => (0, 0),
            Sharing::Rates => (pieces, 0),
            Sharing::Halves => (pieces / 2, pieces / 2),
        };
        Self { left: AtomicU64::new(Self::pack(0, pieces)), processors, lanes }
    }

    fn pack(front: u32, back: u32) -> u64 {
        u64::from(front) << 32 | u64::from(back)
    }

    #[expect(clippy::cast_possible_truncation, reason = "the two halves of a word")]
    fn unpack(word: u64) -> (u32, u32) {
        ((word >> 32) as u32, word as u32)
    }

    fn left(&self) -> u32 {
        let (front, back) = Self::unpack(self.left.load(Ordering::Relaxed));
        back - front
    }

    /// Claims the first piece for the processor.
    fn first(&self) -> Option<u32> {
        let claim = |word| {
            let (front, back) = Self::unpack(word);
            (front < back.min(self.processors)).then(|| Self::pack(front + 1, back))
        };
        let before = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, claim);
        before.ok().map(|word| Self::unpack(word).0)
    }

    /// Claims the last pieces for a lane, from the one that `start` says for an end, or from the first that is left.
    fn last(&self, start: impl Fn(u32) -> u32) -> Option<Range<u32>> {
        let of = |word| {
            let (front, back) = Self::unpack(word);
            let least = front.max(self.lanes);
            (least < back).then(|| (front, start(back).max(least)..back))
        };
        let claim = |word| of(word).map(|(front, pieces)| Self::pack(front, pieces.start));
        let before = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, claim);
        before.ok().and_then(of).map(|(_, pieces)| pieces)
    }
}

/// How fast both sides were lately.
#[derive(Debug)]
struct Pace {
    /// Elements that the processor updated, and the nanoseconds it took.
    elems: f64,
    nanos: f64,
    /// Nanoseconds from the launch of a whole group to its end.
    flight: f64,
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
    fn worth_it(&self, left: u64) -> bool {
        self.nanos > 0.0 && left as f64 * self.nanos > self.flight * self.elems
    }

    fn ran(&mut self, elems: u64, nanos: u64) {
        (self.elems, self.nanos) = (self.elems + elems as f64, self.nanos + nanos as f64);
        let keep = (Self::MEMORY / self.elems).min(1.0);
        (self.elems, self.nanos) = (self.elems * keep, self.nanos * keep);
    }

    fn flew(&mut self, nanos: u64) {
        self.flight += (nanos as f64 - self.flight) / 8.0;
    }

    /// Nothing was launched: one slow group must not keep the lanes away for good.
    fn declined(&mut self) {
        self.flight *= 0.98;
    }
}

/// Keeps the lanes busy, on one thread.
struct Feeder<'a> {
    lanes: &'a dyn Lanes,
    claims: &'a Claims,
    parts: &'a [Part],
    group: u32,
    /// Whether lanes leave to the processor what it would be through with sooner.
    rates: bool,
    pace: &'a mut Pace,
    flights: &'a mut [Option<Flight>],
    now: &'a (dyn Fn() -> u64 + Sync),
    paging: &'a dyn Fn() -> Result<bool>,
    flown: &'a mut Work,
}

impl Feeder<'_> {
    /// Launches groups on the lanes in turn until none is left for them, and waits for the last ones.
    fn feed(&mut self) -> Result<()> {
        let launched = self.launch_all();
        let landed = (0..self.flights.len()).map(|lane| self.land(lane)).fold(Ok(()), Result::and);
        launched.and(landed)
    }

    fn launch_all(&mut self) -> Result<()> {
        for turn in 0.. {
            let lane = turn % self.flights.len();
            self.land(lane)?;
            if self.rates && !self.worth_it(turn)? {
                break;
            }
            let start = |back: u32| self.parts[holder(self.parts, back - 1)].first.max(back.saturating_sub(self.group));
            let Some(pieces) = self.claims.last(start) else { break };
            let (part, span, to) = cut(self.parts, pieces);
            let flight = Flight { start: (self.now)(), elems: span.len as u64, bytes: span.traffic() };
            self.flights[lane] = Some(flight);
            // SAFETY: the contract of `Share::run`; the pieces were claimed above, and `land` waits for their end.
            unsafe { self.lanes.launch(lane, &span, &to.unwrap_or_else(|| Target::in_place(&span)), &part.hyper) }?;
        }
        Ok(())
    }

    /// Whether a group should be launched, now that the link is free; false when the processor would be through sooner.
    fn worth_it(&mut self, turn: usize) -> Result<bool> {
        loop {
            let left = self.claims.left();
            if !self.pace.worth_it(u64::from(left) * PIECE as u64) {
                if turn == 0 && left >= self.group {
                    self.pace.declined();
                }
                return Ok(false);
            }
            if !(self.paging)()? {
                return Ok(true);
            }
            std::thread::sleep(NAP);
        }
    }

    /// Waits for the group on a lane, if there is one.
    fn land(&mut self, lane: usize) -> Result<()> {
        let Some(flight) = self.flights[lane].take() else { return Ok(()) };
        let mut looks = 0;
        while !self.lanes.block(lane, SLICE)? {
            looks += 1;
            if looks == SLICES {
                let message = format!("an update on the device did not end for {:?}.", SLICE * SLICES);
                return Err(Error::new(Code::Stuck, message)
                    .action("Check the device with its own tools; start again from the last checkpoint."));
            }
        }
        let now = (self.now)();
        if flight.elems == u64::from(self.group) * PIECE as u64 {
            self.pace.flew(now - flight.start);
        }
        if self.flown.elems == 0 {
            self.flown.time.0 = flight.start;
        }
        self.flown.time.1 = now;
        self.flown.elems += flight.elems;
        self.flown.bytes += flight.bytes;
        Ok(())
    }
}

impl Drop for Feeder<'_> {
    /// After a panic too nothing is under way (H2).
    fn drop(&mut self) {
        for lane in 0..self.flights.len() {
            // The panic is what is told.
            let _ = self.land(lane);
        }
    }
}

impl Shared {
    /// Whether a unit is on its way up: the copy that the reaper waits for has begun.
    fn paging(&self) -> Result<bool> {
        let Some(began) = *self.paging.lock() else { return Ok(false) };
        Ok(matches!(self.device.elapsed(began, began)?, Elapsed::Nanos(_)))
    }

    /// Updates a set of a unit's, and notes who did how much.
    ///
    /// # Safety
    /// As for [`Share::run`].
    pub(crate) unsafe fn run_share(&self, share: &mut Share, unit: UnitId, name: &'static str) -> Result<()> {
        // SAFETY: passed on.
        let done = unsafe { share.run(&self.pool, &|| self.trace.now(), &|| self.paging()) }?;
        self.stats.updated(done.map(|work| work.elems));
        let sides = [(Link::Update, "cpu update"), (Link::GpuUpdate, "gpu update")];
        for ((link, track), work) in sides.into_iter().zip(done).filter(|(_, work)| work.elems > 0) {
            self.stats.moved(link, work.bytes, work.time.1.saturating_sub(work.time.0));
            self.trace.span_until(track, name, u64::from(unit.0), work.time, work.bytes);
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "share_tests.rs"]
mod tests;
