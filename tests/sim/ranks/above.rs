//! States that a rank keeps on its device, newer than their home; they come home when another rank asks for them (A7), and when the device is short
//! of memory.

use super::{
    Fault,
    memory::Memory,
    rank::{Bytes, Model, Rank, posts},
};
use crate::chance::{Chance, mix};

/// What a rank knows of its own states, per unit.
#[derive(Debug)]
pub(super) struct Above {
    /// They are on the device; and which of the two sets are newer there than at home.
    up: Vec<bool>,
    newer: Vec<[bool; 2]>,
    /// They stay at home until the next step, since another rank may write them there.
    let_go: Vec<bool>,
}

impl Above {
    pub(super) fn new(units: usize) -> Self {
        Self { up: vec![false; units], newer: vec![[false; 2]; units], let_go: vec![false; units] }
    }

    /// A step is posted that updates a unit.
    pub(super) fn step(&mut self, unit: usize) {
        self.let_go[unit] = false;
    }
}

impl Rank {
    fn own<'a>(&self, model: &'a mut Model, unit: usize, set: usize) -> &'a mut Bytes {
        let places = &mut model.places;
        let all = if self.above.up[unit] { &mut places.above[set] } else { &mut places.states[set] };
        &mut all[unit][self.rank]
    }

    /// The version of one set of this rank's own states of a unit, wherever they are.
    pub(super) fn own_version(&self, model: &mut Model, unit: usize, set: usize) -> u64 {
        self.own(model, unit, set).version()
    }

    pub(super) fn read_own(&self, memory: &Memory, model: &mut Model, (unit, set): (usize, usize), version: u64) {
        self.own(model, unit, set).read(memory, self.rank, version, "own states");
    }

    pub(super) fn write_own(&mut self, memory: &Memory, model: &mut Model, (unit, set): (usize, usize), version: u64) {
        self.own(model, unit, set).write(memory, self.rank, version, "own states");
        self.above.newer[unit][set] = self.above.up[unit];
    }

    fn bring_down(&mut self, memory: &Memory, model: &mut Model, unit: usize, set: usize) {
        if std::mem::take(&mut self.above.newer[unit][set]) {
            let version = model.places.above[set][unit][self.rank].version();
            model.places.states[set][unit][self.rank].write(memory, self.rank, version, "states brought down");
        }
    }

    fn lower(&mut self, memory: &Memory, model: &mut Model, unit: usize) {
        (0..2).for_each(|set| self.bring_down(memory, model, unit, set));
        self.above.up[unit] = false;
    }

    fn rise(&mut self, memory: &Memory, model: &mut Model, unit: usize) {
        for set in 0..2 {
            let home = &mut model.places.states[set][unit][self.rank];
            let version = home.version();
            home.read(memory, self.rank, version, "states that move up");
            model.places.above[set][unit][self.rank].write(memory, self.rank, version, "states moved up");
        }
        self.above.up[unit] = true;
    }

    /// The watcher, which answers others; or memory that comes and goes.
    pub(super) fn grow(&mut self, memory: &Memory, model: &mut Model, chance: &mut Chance) -> bool {
        let units = self.above.up.len();
        if (0..units).any(|unit| self.answer(memory, model, unit)) {
            return true;
        }
        let unit = chance.index(units);
        let free = !self.above.let_go[unit] || self.fault == Fault::Eager;
        let trails = self.trail.iter().any(|trailing| trailing.unit == unit);
        if chance.percent(50) {
            self.lower(memory, model, unit);
        } else if free && !trails && !self.above.up[unit] {
            self.rise(memory, model, unit);
        }
        false
    }

    fn answer(&mut self, memory: &Memory, model: &mut Model, unit: usize) -> bool {
        let (rank, view) = (self.rank, memory.view(self.rank));
        let Some((number, writes)) = posts(&model.board, &view, rank).asked(unit) else { return false };
        // A step that is posted and not made yet leaves places as they are.
        let queued = self.queue.iter().any(|&(queued, _)| queued == unit);
        if !queued && !self.settled(memory, model, unit) {
            return false;
        }
        let place = self.ahead.place(unit);
        match self.fault {
            Fault::Promising => {}
            _ if writes && self.fault != Fault::Clinging => {
                self.lower(memory, model, unit);
                self.above.let_go[unit] = true;
            }
            _ => self.bring_down(memory, model, unit, place),
        }
        posts(&model.board, &view, rank).answer(unit, number);
        true
    }

    /// Whether all of a unit's states, whose places have been found, are at home, or there to stay for a writer; asks for them.
    pub(super) fn at_home(&mut self, memory: &Memory, model: &mut Model, unit: usize, writes: bool) -> bool {
        let (rank, view) = (self.rank, memory.view(self.rank));
        if writes {
            self.lower(memory, model, unit);
            self.above.let_go[unit] = true;
        } else {
            self.bring_down(memory, model, unit, self.ahead.place(unit));
        }
        if self.fault == Fault::Assuming {
            return true;
        }
        let posts = posts(&model.board, &view, rank);
        let number = posts.want_states(unit, writes);
        posts.away(unit, number).is_none()
    }

    /// Before a load: nothing of this rank's reads or writes what it changes.
    pub(super) fn quiesce(&mut self) -> bool {
        self.ahead.drop_all();
        self.idle()
    }

    /// A load, which one rank makes, into all weights and states; the others know that it was made. False if it has to wait.
    pub(super) fn load(&mut self, memory: &Memory, model: &mut Model, mine: bool) -> bool {
        let units = 0..self.above.up.len();
        if mine
            && !units.clone().all(|unit| self.settled(memory, model, unit) && self.at_home(memory, model, unit, true))
        {
            return false;
        }
        for unit in units {
            let loaded = mix(self.ahead.results[unit], 77);
            self.ahead.results[unit] = loaded;
            let place = self.ahead.place(unit);
            for owner in 0..if mine { model.board.ranks() } else { 0 } {
                model.weights[unit][owner].write(memory, self.rank, loaded, "weights loaded");
                model.places.states[place][unit][owner].write(memory, self.rank, loaded, "states loaded");
            }
        }
        true
    }
}
