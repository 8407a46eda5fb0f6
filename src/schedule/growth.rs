//! Which units' states move up into free memory of the compute device, and when they move down again.
//!
//! G1: nothing is taken before the free memory of a few steps is known, and never more than leaves the margin in the leanest moment of
//! those steps. G2: below half the margin units go down, the last taken first, until the margin is free again. G3: what was given back
//! because memory was short is not taken again for a while, each time for longer, so that moves cannot go on for ever.

use crate::{
    dtype::StateKind,
    model::{Layout, SECTION_ALIGN, Unit},
    quantities::{Tier, UnitId, round_up},
    schedule::{
        placement::Placement,
        ranks::owned::{OWNED_BLOCK, owned},
    },
};

/// Steps whose free memory is looked at before anything is taken.
pub const LOOKS: usize = 3;
/// Of the memory of the compute device, this part stays free (one in so many), and at least [`LEAST_MARGIN`].
const MARGIN: u64 = 10;
const LEAST_MARGIN: u64 = 1 << 30;
/// Of the memory of the compute device, this part moves up in one step (one in so many), and at least [`LEAST_AT_ONCE`]: more in one go would hold
/// the link up for other copies, for a third of a second as it is.
const AT_ONCE: u64 = 8;
const LEAST_AT_ONCE: u64 = 2 << 30;
const LARGEST_CHUNK: u64 = 32 << 20;
/// Steps without moves after memory was short, at first and at most.
const PAUSES: (u32, u32) = (8, 512);

/// A unit whose states may move up, and what they take there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The unit.
    pub unit: UnitId,
    /// Bytes of its states, of both sets where it has a spare copy.
    pub bytes: u64,
}

/// The units whose states may move up, those first whose move gains the most for its bytes. A unit without a spare copy has one set
/// of states, and its update is made at the step, where time is dear; one with a spare copy takes twice as much, and its update is
/// made ahead. Within both the order is that of the forward, which waits for updates in that order. Of one of several ranks: what it owns.
pub fn candidates(layout: &Layout, placement: &Placement, granularity: u64, own: Option<Own>) -> Vec<Candidate> {
    let bytes_of = |unit: UnitId| -> u64 {
        states(layout.unit(unit), own).map(|state| round_up(state.bytes, SECTION_ALIGN)).sum()
    };
    let on_host = |unit: &UnitId| {
        // Updates that stream through slots find states at home.
        bytes_of(*unit) > 0 && placement.homes[unit.index()].all_in(Tier::Host)
    };
    let one = |unit: UnitId| {
        let sets = if placement.spare[unit.index()] { 2 } else { 1 };
        let bytes = bytes_of(unit) * sets;
        Candidate { unit, bytes: round_up(bytes, chunk(bytes, granularity)) }
    };
    let (spare, alone): (Vec<_>, Vec<_>) = layout.ids().filter(on_host).partition(|u| placement.spare[u.index()]);
    alone.into_iter().chain(spare).map(one).collect()
}

/// Which of several ranks has states that move up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Own {
    /// Its number.
    pub rank: usize,
    /// How many there are.
    pub size: usize,
    /// Lanes alone update what is up: then its parameters are kept beside their states, so that they need not come up for an update. Those of
    /// one process may be edited at home; ranks change them by updates alone.
    pub holds: bool,
}

/// One state of one section, or its parameters, that moves up, and which of its bytes do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatePart {
    /// The section.
    pub section: usize,
    /// The state, or the parameters.
    pub kind: StateKind,
    /// First byte within it, and how many.
    pub start: u64,
    /// See [`Self::start`].
    pub bytes: u64,
}

/// What moves up of a unit, in the order in which it lies there: all of its states, or what one of several ranks owns.
pub fn states(unit: &Unit, own: Option<Own>) -> impl Iterator<Item = StatePart> {
    unit.sections.iter().enumerate().flat_map(move |(index, section)| {
        // Only units at home in host memory move up: their blocks are the narrowest.
        let part = own.map(|own| owned(section.elems, OWNED_BLOCK, own.rank, own.size));
        let held = own.is_some_and(|own| own.holds) && section.bytes(StateKind::ExpAvg) > 0;
        StateKind::OPTIMIZER.into_iter().chain(held.then_some(StateKind::Param)).filter_map(move |kind| {
            let (size, all) = (kind.element_size(section.dtype) as u64, section.bytes(kind));
            let bytes = part.clone().map_or(0..all, |part| part.start * size..part.end * size);
            let (start, bytes) = (bytes.start, bytes.end - bytes.start);
            (all > 0 && bytes > 0).then_some(StatePart { section: index, kind, start, bytes })
        })
    })
}

/// What memory for so many bytes is made of: chunks as large as waste little, for each is a handle of the device.
pub fn chunk(bytes: u64, granularity: u64) -> u64 {
    let mut chunk = granularity;
    while chunk < LARGEST_CHUNK && chunk * 64 <= bytes {
        chunk *= 2;
    }
    chunk
}

/// The margin on a device of so many bytes.
pub fn margin(capacity: u64) -> u64 {
    (capacity / MARGIN).max(LEAST_MARGIN.min(capacity / 4))
}

/// How far candidates will move up, where `free` bytes of a device of `capacity` stay free in the leanest moment of a step.
pub fn reach(candidates: &[Candidate], free: u64, capacity: u64) -> (usize, u64) {
    let mut left = free.saturating_sub(margin(capacity));
    let fit =
        candidates.iter().take_while(|c| c.bytes <= left && left.checked_sub(c.bytes).map(|l| left = l).is_some());
    fit.fold((0, 0), |(count, bytes), c| (count + 1, bytes + c.bytes))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Home,
    /// It is to move up.
    Rising,
    Up,
}

/// What is taken, what is known of free memory, and what follows from it.
#[derive(Debug)]
pub struct Growth {
    order: Vec<Candidate>,
    /// Per candidate.
    places: Vec<Place>,
    margin: u64,
    /// Of each of the last steps, the least that all others left: free bytes and those taken here.
    left: [u64; LOOKS],
    looked: usize,
    /// The same of the step under way.
    least: u64,
    /// Steps to go without taking anything, and how many it will be the next time.
    pause: u32,
    next_pause: u32,
    /// Bytes that move up in a step, and that still may in this one.
    at_once: u64,
    this_step: u64,
}

impl Growth {
    /// On a device of `capacity` bytes.
    pub fn new(order: Vec<Candidate>, capacity: u64) -> Self {
        Self {
            places: vec![Place::Home; order.len()],
            order,
            margin: margin(capacity),
            left: [0; LOOKS],
            looked: 0,
            least: u64::MAX,
            pause: 0,
            next_pause: PAUSES.0,
            at_once: (capacity / AT_ONCE).max(LEAST_AT_ONCE),
            this_step: 0,
        }
    }

    /// Bytes that stay free.
    pub fn margin(&self) -> u64 {
        self.margin
    }

    /// Bytes of units that are up.
    pub fn taken(&self) -> u64 {
        self.bytes(|place| place == Place::Up)
    }

    fn bytes(&self, which: impl Fn(Place) -> bool) -> u64 {
        self.order.iter().zip(&self.places).filter(|(_, place)| which(**place)).map(|(c, _)| c.bytes).sum()
    }

    /// So many bytes are free on the device now; true if that is too few, and units should go down ([`Self::give`]).
    pub fn look(&mut self, free: u64) -> bool {
        let taken = self.taken();
        self.least = self.least.min(free.saturating_add(taken));
        taken > 0 && free < self.margin / 2
    }

    /// A step is over.
    pub fn step(&mut self) {
        self.left.rotate_left(1);
        self.left[LOOKS - 1] = self.least;
        self.looked = (self.looked + 1).min(LOOKS);
        (self.least, self.this_step) = (u64::MAX, self.at_once);
        self.pause = self.pause.saturating_sub(1);
    }

    /// The next unit to move up, if there is room for one; it is taken once [`Self::rose`] says so.
    pub fn take(&mut self) -> Option<UnitId> {
        if self.looked < LOOKS || self.pause > 0 {
            return None;
        }
        let left = self.left.iter().copied().min().unwrap_or(0);
        let room = left.saturating_sub(self.margin + self.bytes(|place| place != Place::Home));
        let first = self.this_step == self.at_once;
        let fits = |bytes| bytes <= room && (bytes <= self.this_step || first);
        let home = self.places.iter().position(|&place| place == Place::Home)?;
        let Candidate { unit, bytes } = self.order[home];
        if !fits(bytes) {
            return None;
        }
        self.this_step = self.this_step.saturating_sub(bytes);
        self.places[home] = Place::Rising;
        Some(unit)
    }

    /// A unit that was to move up is there.
    pub fn rose(&mut self, unit: UnitId) {
        self.set(unit, Place::Up);
    }

    /// A unit's states are at home, or stay there.
    pub fn at_home(&mut self, unit: UnitId) {
        self.set(unit, Place::Home);
    }

    fn set(&mut self, unit: UnitId, place: Place) {
        if let Some(at) = self.order.iter().position(|c| c.unit == unit) {
            self.places[at] = place;
        }
    }

    /// The unit that goes down next, as long as fewer bytes than the margin are free; of units that are to move up there are none.
    pub fn give(&self, free: u64) -> Option<UnitId> {
        if free >= self.margin { None } else { self.last() }
    }

    /// The unit that moved up last.
    pub fn last(&self) -> Option<UnitId> {
        self.places.iter().rposition(|&place| place == Place::Up).map(|at| self.order[at].unit)
    }

    /// Memory was short, or the device had none for a unit: nothing is taken for a while, and what was seen before is out of date.
    pub fn was_short(&mut self) {
        (self.pause, self.looked) = (self.next_pause, 0);
        self.next_pause = (self.next_pause * 2).min(PAUSES.1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn units(count: u32, bytes: u64) -> Vec<Candidate> {
        (0..count).map(|unit| Candidate { unit: UnitId(unit), bytes }).collect()
    }

    /// A device, what others have of it, and what moves.
    struct World {
        growth: Growth,
        capacity: u64,
        others: u64,
        moves: u32,
    }

    impl World {
        fn new(count: u32, bytes: u64, capacity: u64, others: u64) -> Self {
            Self { growth: Growth::new(units(count, bytes), capacity), capacity, others, moves: 0 }
        }

        fn free(&self) -> u64 {
            (self.capacity - self.others).saturating_sub(self.growth.taken())
        }

        fn look(&mut self) {
            if self.growth.look(self.free()) {
                while let Some(unit) = self.growth.give(self.free()) {
                    self.growth.at_home(unit);
                    self.moves += 1;
                }
                self.growth.was_short();
            }
        }

        fn step(&mut self) {
            self.look();
            self.growth.step();
            while let Some(unit) = self.growth.take() {
                self.growth.rose(unit);
                self.moves += 1;
            }
        }
    }

    #[test]
    fn it_looks_first_and_takes_what_is_left_but_a_margin() {
        let mut world = World::new(40, GIB, 80 * GIB, 40 * GIB);
        for _ in 0..LOOKS - 1 {
            world.step();
            assert_eq!(world.growth.taken(), 0);
        }
        world.step();
        assert_eq!(world.growth.taken(), 10 * GIB, "as much as moves in one step");
        (0..40).for_each(|_| world.step());
        assert_eq!(world.growth.taken(), 32 * GIB);
        assert_eq!(world.free(), world.growth.margin());
        assert_eq!(reach(&units(40, GIB), 40 * GIB, 80 * GIB), (32, 32 * GIB), "the planner says the same");
        let moves = world.moves;
        (0..100).for_each(|_| world.step());
        assert_eq!(world.moves, moves, "and then nothing moves");
    }

    #[test]
    fn the_leanest_moment_of_a_step_counts() {
        let mut world = World::new(40, GIB, 80 * GIB, 20 * GIB);
        for _ in 0..20 {
            world.others = 50 * GIB;
            world.look();
            world.others = 20 * GIB;
            world.step();
        }
        assert_eq!(world.growth.taken(), 22 * GIB);
    }

    #[test]
    fn it_gives_back_until_the_margin_is_free_and_waits_longer_each_time() {
        let mut world = World::new(40, GIB, 80 * GIB, 40 * GIB);
        (0..40).for_each(|_| world.step());
        let mut waited = Vec::new();
        for _ in 0..3 {
            world.others += 6 * GIB;
            world.look();
            assert_eq!(world.growth.taken(), 26 * GIB);
            assert!(world.free() >= world.growth.margin());
            world.others -= 6 * GIB;
            let steps = (0..).take_while(|_| (world.step(), world.growth.taken() <= 26 * GIB).1).count();
            waited.push(steps);
            (0..40).for_each(|_| world.step());
        }
        assert!(waited.windows(2).all(|w| w[0] < w[1]) && waited[0] >= 7, "{waited:?}");
    }

    #[test]
    fn a_large_unit_alone_may_be_more_than_what_moves_in_one_step() {
        let mut world = World::new(3, 12 * GIB, 80 * GIB, 0);
        (0..LOOKS).for_each(|_| world.step());
        assert_eq!(world.growth.taken(), 12 * GIB);
        world.step();
        assert_eq!(world.growth.taken(), 24 * GIB);
    }

    #[test]
    fn what_does_not_rise_is_not_taken() {
        let mut growth = Growth::new(units(2, GIB), 80 * GIB);
        for _ in 0..LOOKS {
            growth.look(40 * GIB);
            growth.step();
        }
        assert_eq!(growth.take(), Some(UnitId(0)));
        assert_eq!(growth.take(), Some(UnitId(1)));
        assert_eq!((growth.take(), growth.taken()), (None, 0));
        growth.rose(UnitId(1));
        growth.at_home(UnitId(0));
        growth.was_short();
        assert_eq!((growth.taken(), growth.last()), (GIB, Some(UnitId(1))));
        assert!(growth.take().is_none(), "not at once");
    }

    proptest::proptest! {
        #[test]
        fn others_always_find_what_they_ask_for_within_the_margin(
            asked in proptest::collection::vec((0u64..60, 1u32..6), 1..60), bytes in 1u64..6,
        ) {
            let mut world = World::new(64, bytes * GIB / 2, 80 * GIB, 20 * GIB);
            let half = world.growth.margin() / 2;
            for (others, steps) in asked {
                // Towards what is asked, never faster than half the margin between two looks.
                while world.others != others * GIB {
                    let to = others * GIB;
                    world.others = to.clamp(world.others.saturating_sub(half), world.others + half);
                    proptest::prop_assert!(world.growth.taken() <= world.capacity - world.others, "no memory");
                    world.look();
                }
                (0..steps).for_each(|_| world.step());
            }
        }
    }
}
