//! One set of updates, shared between the processor's threads and the lanes of the device.
//!
//! H1: every element is updated once: pieces are claimed from one word, the processor's from the front, the lanes' in groups from
//! the back. H2: when a run is over, be it by an error, nothing touches the arrays any more. H3: in steady state nothing
//! allocates. H4: a lane takes no group for which the processor would have to wait, and none while the link brings up a unit, which a
//! window waits for.
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
    device::{Lanes, Launch},
    error::{Code, Error, Result},
    model::staging_bytes,
    optim::{Hyper, Isa, PIECE, Pool, Portion, Span, Target, adamw, adamw_into_with, adamw_portion_with, unsupported},
    runtime::update::{claims::Claims, pace::Pace, update_on::UpdateOn},
};

/// How long a wait for a lane lasts before it is counted, and how many of them there are before it is given up.
const SLICE: Duration = Duration::from_millis(100);
const SLICES: u32 = 1200;
/// Between two looks whether the link is free again.
const NAP: Duration = Duration::from_micros(50);

/// A span to update, in place or into another place.
struct Part {
    /// Number of its first piece.
    first: u32,
    span: Span,
    hyper: Hyper,
    to: Option<Target>,
    portion: Portion,
}

// SAFETY: only addresses and numbers; the caller of `Share::run` vouches for the bytes.
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

/// Updates to be shared, and what is known of how fast each side is.
pub(crate) struct Share {
    lanes: Option<Arc<dyn Lanes>>,
    update_on: UpdateOn,
    /// Most pieces of one launch.
    group: u32,
    pace: Pace,
    parts: Vec<Part>,
    pieces: u32,
    flights: Vec<Option<Flight>>,
    /// The states of this set lie in the device's memory, where the processor does not reach them.
    above: bool,
}

impl Share {
    /// Lanes take groups of at most `group` elements, a multiple of [`PIECE`].
    pub(crate) fn new(lanes: Option<(Arc<dyn Lanes>, u64)>, update_on: UpdateOn) -> Self {
        let group = lanes.as_ref().map_or(1, |(_, elems)| u32::try_from(elems / PIECE as u64).unwrap_or(u32::MAX));
        let lanes = lanes.map(|(lanes, _)| lanes);
        let flights = vec![None; lanes.as_ref().map_or(0, |lanes| lanes.count())];
        Self {
            lanes,
            update_on,
            group: group.max(1),
            pace: Pace::default(),
            parts: Vec::new(),
            pieces: 0,
            flights,
            above: false,
        }
    }

    /// Sets who updates from now on; false where there are no lanes.
    pub(crate) fn set_update_on(&mut self, update_on: UpdateOn) -> bool {
        self.update_on = update_on;
        self.lanes.is_some()
    }

    /// True if there are lanes to share with.
    pub(crate) fn uses_lanes(&self) -> bool {
        self.lanes.is_some() && self.update_on != UpdateOn::Cpu
    }

    /// Has lanes alone update this set, if `above`: its states lie in the device's memory.
    pub(crate) fn lanes_alone(&mut self, above: bool) {
        self.above = above;
    }

    /// Whether the new states of the set go to another place.
    pub(crate) fn apart(&self) -> bool {
        self.parts.iter().any(|part| part.to.is_some_and(|to| to.exp_avg != part.span.exp_avg))
    }

    /// Copies bytes on a lane, which waits for no other stream, and waits for it; false where there are no lanes. Between two sets.
    ///
    /// # Errors
    /// A failure of the device.
    ///
    /// # Safety
    /// As for [`Lanes::copy`].
    pub(crate) unsafe fn copy(&mut self, dst: u64, src: u64, len: usize) -> Result<bool> {
        let Some(lanes) = self.lanes.as_deref() else { return Ok(false) };
        // SAFETY: passed on; the end is waited for here.
        let copied = unsafe { lanes.copy(0, dst, src, len) };
        copied.and(await_lane(lanes, 0)).map(|()| true)
    }

    /// Begins a new set.
    pub(crate) fn clear(&mut self) {
        self.parts.clear();
        self.pieces = 0;
        self.above = false;
    }

    /// Adds a span to the set; its new values, or a portion of them, go to `to`, or where the old ones are.
    ///
    /// # Errors
    /// `FN-E112` for a type that is not trainable.
    pub(crate) fn add(&mut self, span: Span, hyper: Hyper, to: Option<Target>, portion: Portion) -> Result<()> {
        if !span.dtype.trainable() {
            return Err(unsupported(span.dtype));
        }
        if span.len > 0 {
            self.parts.push(Part { first: self.pieces, span, hyper, to, portion });
            self.pieces += u32::try_from(span.len.div_ceil(PIECE)).unwrap_or(u32::MAX);
        }
        Ok(())
    }

    /// The portion of the updates of the set.
    pub(crate) fn portion(&self) -> Portion {
        self.parts.first().map_or(Portion::Whole, |part| part.portion)
    }

    /// Updates the set; gives what the processor and the lanes did. `now` is the time in nanoseconds, `paging` tells whether a unit is
    /// on its way up at the moment.
    ///
    /// # Errors
    /// A panic on the pool's threads, a failure of the device. Some elements are not updated then.
    ///
    /// # Safety
    /// For the spans and targets of the set: as for [`adamw`], [`adamw_into_with`], [`adamw_portion_with`] and, with lanes,
    /// [`Lanes::launch`].
    pub(crate) unsafe fn run(
        &mut self,
        pool: &Pool,
        now: &(dyn Fn() -> u64 + Sync),
        paging: &dyn Fn() -> Result<bool>,
    ) -> Result<[Work; 2]> {
        let update_on = if self.above { UpdateOn::Gpu } else { self.update_on };
        let Self { lanes, group, pace, parts, pieces, flights, above, .. } = self;
        let lanes = lanes.as_deref().filter(|_| update_on != UpdateOn::Cpu);
        let claims = Claims::new(*pieces, if lanes.is_some() { update_on } else { UpdateOn::Cpu });
        let (elems, bytes, begun, ended) = (AtomicU64::new(0), AtomicU64::new(0), now(), AtomicU64::new(0));
        let task = |_| {
            let Some(piece) = claims.first() else { return };
            let (part, span, to) = cut(parts, piece..piece + 1);
            // The only error, a type without a kernel, was ruled out when the part was added.
            // SAFETY: the caller's contract; every piece is claimed once, and pieces are disjoint.
            let _ = unsafe {
                match (part.portion, to) {
                    (Portion::Whole, None) => adamw(&span, &part.hyper),
                    (Portion::Whole, Some(to)) => adamw_into_with(Isa::best(), &span, &to, &part.hyper),
                    (portion, to) => {
                        let to = to.unwrap_or_else(|| Target::in_place(&span));
                        adamw_portion_with(Isa::best(), &span, portion, &to, &part.hyper)
                    }
                }
            };
            elems.fetch_add(span.len as u64, Ordering::Relaxed);
            bytes.fetch_add(span.traffic(part.portion), Ordering::Relaxed);
            ended.fetch_max(now(), Ordering::Relaxed);
        };
        let tasks = claims.processors as usize;
        let mut flown = Work::default();
        match lanes {
            None => pool.run(tasks, &task)?,
            Some(lanes) => {
                let by_pace = update_on == UpdateOn::Both;
                let mut feeder = Feeder {
                    lanes,
                    claims: &claims,
                    parts,
                    group: *group,
                    by_pace,
                    above: *above,
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
            self.pace.ran(done.bytes, time.1 - time.0);
        }
        Ok([done, flown])
    }
}

/// Waits until what was launched on a lane has ended.
fn await_lane(lanes: &dyn Lanes, lane: usize) -> Result<()> {
    for _ in 0..SLICES {
        if lanes.block(lane, SLICE)? {
            return Ok(());
        }
    }
    let message = format!("an update on the device did not end for {:?}.", SLICE * SLICES);
    Err(Error::new(Code::Stuck, message)
        .action("Check the device with its own tools; start again from the last checkpoint."))
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

/// Keeps the lanes busy, on one thread.
struct Feeder<'a> {
    lanes: &'a dyn Lanes,
    claims: &'a Claims,
    parts: &'a [Part],
    group: u32,
    /// Whether lanes leave to the processor what it would be through with sooner.
    by_pace: bool,
    above: bool,
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
        for round in 0.. {
            let lane = round % self.flights.len();
            self.land(lane)?;
            if self.by_pace && !self.worth_it(round)? {
                break;
            }
            let start = |back: u32| {
                let part = &self.parts[holder(self.parts, back - 1)];
                part.first.max(back.saturating_sub(self.group * self.fold(part)))
            };
            let Some(pieces) = self.claims.last(start) else { break };
            let (part, span, to) = cut(self.parts, pieces);
            // Gradients up and parameters down; up too, where they are not kept: of what lies in the device's memory no more crosses the link.
            let kept = to.is_some_and(|to| !to.second.is_null());
            let arrays = if kept { 2 } else { 3 };
            let bytes =
                if self.above { arrays * (span.len * span.dtype.size()) as u64 } else { span.traffic(part.portion) };
            let flight = Flight { start: (self.now)(), elems: span.len as u64, bytes };
            self.flights[lane] = Some(flight);
            let to = to.unwrap_or_else(|| Target::in_place(&span));
            let (portion, hyper) = (part.portion, &part.hyper);
            // SAFETY: the contract of `Share::run`; the pieces were claimed above, and `land` waits for their end.
            unsafe {
                self.lanes.launch(lane, &Launch { span: &span, target: &to, portion, hyper, above: self.above })
            }?;
        }
        Ok(())
    }

    /// How many times as many elements a launch takes whose states do not pass through the lane's memory.
    fn fold(&self, part: &Part) -> u32 {
        let apart = self.above && part.portion == Portion::Whole;
        if apart { (staging_bytes(1) / (2 * part.span.dtype.size() as u64)).max(1) as u32 } else { 1 }
    }

    /// Whether a group should be launched, now that the link is free; false when the processor would be through sooner.
    fn worth_it(&mut self, round: usize) -> Result<bool> {
        loop {
            let left = self.claims.left();
            if !self.pace.worth_it(u64::from(left) * self.piece_bytes()) {
                if round == 0 && left >= self.group {
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

    /// Bytes that the update of a piece reads and writes.
    fn piece_bytes(&self) -> u64 {
        self.parts.first().map_or(0, |part| Span { len: PIECE, ..part.span }.traffic(part.portion))
    }

    /// Waits for the group on a lane, if there is one.
    fn land(&mut self, lane: usize) -> Result<()> {
        let Some(flight) = self.flights[lane].take() else { return Ok(()) };
        await_lane(self.lanes, lane)?;
        let now = (self.now)();
        if flight.elems == u64::from(self.group) * PIECE as u64 && !self.above {
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
            // The panic is what is reported.
            let _ = self.land(lane);
        }
    }
}

#[cfg(test)]
#[path = "share_tests.rs"]
mod tests;
