//! What a rank posts, and what it may do once others have posted.
//!
//! A1: a *line* is a count with a few numbers. A rank posts number `n` of a line only when it has seen that all posted `n - 1`; who finds a
//! higher count than its own therefore need not compare. Numbers of odd and of even posts have places of their own: those of `n` are written
//! over by `n + 2`, which comes when all have posted `n + 1`, and so have done with `n`.
//! A2: a piece of step `n` is begun only when all ranks have posted `n` alike (none has another idea of the step) and all are *quiet*: what
//! they had enqueued before it, which may read what it writes, has run.
//! A3: a rank publishes a unit's step when its own part of the weights is made, and once more when its states are; the unit is read again when
//! all have published it, its states when all have done so once more, and only then is it stepped again.
//! A4: gradients of a unit are exchanged when all have posted which of them they have; a unit is posted again only by who has seen that.
//! A5: a rank takes its step when all are at theirs after the same number of backwards; who did fewer joins those of the others.
//! A7: an owner may keep states elsewhere, newer than their home. Who reads or writes them asks for that of the last step, which none can leave
//! before it posts the next; the owner answers once they are at home, or are there to stay until it updates them. A number of the step says both.
//! A8: a rank that has yet to read a unit for a save says from which step on updates of the unit wait: from the one that it posts next. It says so
//! before it posts that step, and takes it back when it has read the unit; a piece of the unit's update begins only then.
//!
//! A6, on ranks that wait in different calls, stands in [`super::crossed`].

use crate::schedule::ranks::board::{
    ARRIVED, BACKWARD, Board, HOME, LANDED, MADE, MEETINGS, NUMBERS, PASSED, PID, POSTS, PUBLISHED, QUIET, READS, SEEN,
    STARTED, STATE, STEPS, TEXT, TEXT_BYTES, WANTS, Words,
};

/// Numbers that tell a step: digests of what is stepped and how.
pub const STEP_PARTS: usize = 5;

/// What is posted again and again, and compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    /// Steps.
    Steps,
    /// That what was enqueued before a step has run, with the factors that the step multiplies gradients by.
    Quiet,
    /// Places where all ranks meet.
    Meetings,
}

impl Line {
    const fn at(self) -> (usize, usize) {
        match self {
            Self::Steps => (STEPS, STEP_PARTS),
            Self::Quiet => (QUIET, 1),
            Self::Meetings => (MEETINGS, 1),
        }
    }
}

/// What a rank finds when it looks at the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// All are there, and alike.
    All,
    /// This rank is not there yet.
    Waits(usize),
    /// This rank posted another number as this part.
    Differs(usize, usize),
}

/// What a rank that is at its step does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// It takes the step.
    Step,
    /// It joins the backward of this number.
    Join(u64),
    /// It waits for this rank.
    Waits(usize),
}

/// How far a rank is with its model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Not there yet.
    Absent,
    /// At work.
    Running,
    /// It failed; its text says why.
    Failed,
    /// It has closed its model.
    Closed,
}

/// What must not be posted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Misuse {
    /// The backward's number is none that may follow.
    Backward,
    /// The one before has not been seen to be posted by all.
    Unseen,
    /// Not as many notes as the unit has parameters.
    Notes,
}

/// One rank's view of the board.
#[derive(Debug)]
pub struct Posts<'a, W> {
    /// Where words are.
    pub board: &'a Board,
    /// The words.
    pub words: &'a W,
    /// Whose view it is.
    pub rank: usize,
}

impl<W: Words> Posts<'_, W> {
    pub(super) fn load(&self, rank: usize, word: usize) -> u64 {
        self.words.load(Board::of_rank(rank, word))
    }

    pub(super) fn store(&self, word: usize, value: u64) {
        self.words.store(Board::of_rank(self.rank, word), value);
    }

    pub(super) fn others(&self) -> impl Iterator<Item = usize> + use<W> {
        let rank = self.rank;
        (0..self.board.ranks()).filter(move |&r| r != rank)
    }

    /// The number of this rank's last post of a line.
    pub fn count(&self, line: Line) -> u64 {
        self.load(self.rank, line.at().0)
    }

    /// Posts the next of a line (A1).
    pub fn post(&self, line: Line, parts: &[u64]) {
        let (at, width) = line.at();
        debug_assert_eq!(parts.len(), width);
        let count = self.count(line) + 1;
        for (part, &value) in parts.iter().enumerate() {
            self.store(Self::part(at, width, count, part), value);
        }
        self.store(at, count);
    }

    fn part(at: usize, width: usize, count: u64, part: usize) -> usize {
        at + 1 + part + if count.is_multiple_of(2) { 0 } else { width }
    }

    /// Whether all have posted this number of a line as this rank did, which has.
    pub fn look(&self, line: Line, count: u64) -> Look {
        self.look_at(line, count, self.others())
    }

    /// The same of those that have not closed their models.
    pub fn look_at_open(&self, line: Line, count: u64) -> Look {
        self.look_at(line, count, self.others().filter(|&rank| self.state(rank) != State::Closed))
    }

    fn look_at(&self, line: Line, count: u64, others: impl Iterator<Item = usize>) -> Look {
        let (at, width) = line.at();
        let mut missing = None;
        for rank in others {
            let theirs = self.load(rank, at);
            if theirs < count {
                missing = self.rather(missing, rank);
            } else if theirs == count {
                let differs = |&part: &usize| {
                    let word = Self::part(at, width, count, part);
                    self.load(rank, word) != self.load(self.rank, word)
                };
                // Looked at again: it may have gone on, as may this rank.
                let still = || self.load(rank, at) == count && self.count(line) <= count + 1;
                if let Some(part) = (0..width).find(differs).filter(|_| still()) {
                    return Look::Differs(rank, part);
                }
            }
        }
        missing.map_or(Look::All, Look::Waits)
    }

    /// Whether a piece of a step may begin (A2).
    pub fn may_begin(&self, step: u64) -> Look {
        match self.look(Line::Steps, step) {
            Look::All => self.look(Line::Quiet, step),
            other => other,
        }
    }

    /// This rank is to read a unit as the steps that it has posted leave it: updates of later ones wait (A8).
    pub fn begin_read(&self, unit: usize) {
        self.words.store(self.board.of_unit(self.rank, unit, READS), self.count(Line::Steps) + 1);
    }

    /// This rank has read a unit, or does not need it any more.
    pub fn end_read(&self, unit: usize) {
        self.words.store(self.board.of_unit(self.rank, unit, READS), 0);
    }

    /// Another rank that has yet to read a unit as it is before this step. To be asked once all have posted the step.
    pub fn read_by(&self, unit: usize, step: u64) -> Option<usize> {
        self.others().find(|&rank| (1..=step).contains(&self.words.load(self.board.of_unit(rank, unit, READS))))
    }

    /// This rank's part of a unit's weights is made, of this step (A3). Where its states are made too, those are published first.
    pub fn publish(&self, unit: usize, step: u64) {
        self.words.store(self.board.of_unit(self.rank, unit, PUBLISHED), step);
    }

    /// This rank's part of a unit's states is made, of this step (A3).
    pub fn publish_states(&self, unit: usize, step: u64) {
        self.words.store(self.board.of_unit(self.rank, unit, MADE), step);
    }

    /// A rank that has not published a unit's weights of this step; none if all have.
    pub fn unpublished(&self, unit: usize, step: u64) -> Option<usize> {
        self.lacks(unit, PUBLISHED, step)
    }

    /// A rank that has not published a unit's states of this step; none if all have.
    pub fn unmade(&self, unit: usize, step: u64) -> Option<usize> {
        self.lacks(unit, MADE, step)
    }

    /// Asks the owners of a unit's states, of which all ranks have made their parts, to have them at home: for a reader, or to leave them there
    /// for a writer. Returns what they answer. One thread of a rank at a time.
    pub fn want_states(&self, unit: usize, writes: bool) -> u64 {
        let mine = |word| self.words.load(self.board.of_unit(self.rank, unit, word));
        let number = Self::wanted_of(mine(MADE)) + u64::from(writes);
        // What another thread asks of the same step is not taken back.
        self.words.store(self.board.of_unit(self.rank, unit, WANTS), number.max(mine(WANTS)));
        number
    }

    /// What is asked for by a reader after a step.
    fn wanted_of(step: u64) -> u64 {
        2 * (step + 1)
    }

    /// A rank that has not answered so; none if all others have.
    pub fn away(&self, unit: usize, number: u64) -> Option<usize> {
        let lacking = |&rank: &usize| self.words.load(self.board.of_unit(rank, unit, HOME)) < number;
        self.others().filter(lacking).fold(None, |missing, rank| self.rather(missing, rank))
    }

    /// What this rank is to answer others that want a unit's states after its last step; none where none do, or all have been answered. The
    /// second one says whether they are wanted for a writer.
    pub fn asked(&self, unit: usize) -> Option<(u64, bool)> {
        let of = |rank: usize, word| self.words.load(self.board.of_unit(rank, unit, word));
        let (first, answered) = (Self::wanted_of(of(self.rank, MADE)), of(self.rank, HOME));
        let now = |&number: &u64| (first..first + 2).contains(&number) && number > answered;
        self.others().map(|rank| of(rank, WANTS)).filter(now).max().map(|number| (number, number > first))
    }

    /// This rank's part of a unit's states is at home, as was asked.
    pub fn answer(&self, unit: usize, number: u64) {
        self.words.store(self.board.of_unit(self.rank, unit, HOME), number);
    }

    /// Whether this rank has said that its part of a unit's states stays at home, where others may write it, and has not updated the unit since:
    /// what they ask for between two updates has one number, and is answered once.
    pub fn promised(&self, unit: usize) -> bool {
        let mine = |word| self.words.load(self.board.of_unit(self.rank, unit, word));
        mine(HOME) == Self::wanted_of(mine(MADE)) + 1
    }

    /// This rank's states are at home from now on.
    pub fn states_stay(&self) {
        (0..self.board.units()).for_each(|unit| self.answer(unit, u64::MAX));
    }

    fn lacks(&self, unit: usize, word: usize, count: u64) -> Option<usize> {
        let lacking = |&rank: &usize| self.words.load(self.board.of_unit(rank, unit, word)) < count;
        (0..self.board.ranks()).filter(lacking).fold(None, |missing, rank| self.rather(missing, rank))
    }

    /// Of ranks that are missing, one that will never come is told, else the first.
    fn rather(&self, missing: Option<usize>, rank: usize) -> Option<usize> {
        let ended = |&rank: &usize| self.state(rank) == State::Closed;
        missing.filter(|first| ended(first) || !ended(&rank)).or(Some(rank))
    }

    /// Posts which gradients of a unit a backward gave this rank, one note per parameter (A4).
    ///
    /// # Errors
    /// What the caller did wrong; nothing is posted.
    pub fn post_gradients(&self, unit: usize, backward: u64, notes: &[u8]) -> Result<(), Misuse> {
        let mine = |word| self.words.load(self.board.of_unit(self.rank, unit, word));
        let last = mine(POSTS);
        if notes.len() != self.board.parameters(unit) {
            return Err(Misuse::Notes);
        }
        if backward == 0 || (last > 0 && backward <= mine(NUMBERS + (last % 2) as usize)) {
            return Err(Misuse::Backward);
        }
        if mine(SEEN) < last {
            return Err(Misuse::Unseen);
        }
        let (post, store) = (last + 1, |at, value| self.words.store(at, value));
        store(self.board.of_unit(self.rank, unit, NUMBERS + (post % 2) as usize), backward);
        let at = self.board.note(self.rank, unit, post);
        for (word, bytes) in notes.chunks(8).enumerate() {
            let mut eight = [0; 8];
            eight[..bytes.len()].copy_from_slice(bytes);
            store(at + word, u64::from_le_bytes(eight));
        }
        // For who is at its step after fewer backwards.
        self.store(BACKWARD, backward.max(self.load(self.rank, BACKWARD)));
        store(self.board.of_unit(self.rank, unit, POSTS), post);
        Ok(())
    }

    /// The number of posts for a unit, if the last one of this rank was for that backward.
    pub fn post_of(&self, unit: usize, backward: u64) -> Option<u64> {
        let mine = |word| self.words.load(self.board.of_unit(self.rank, unit, word));
        let post = mine(POSTS);
        (post > 0 && mine(NUMBERS + (post % 2) as usize) == backward).then_some(post)
    }

    /// The notes of all ranks on a unit, once all have posted as often as this one; for another backward than this rank is [`Look::Differs`].
    /// With [`Look::All`] `into` has them.
    pub fn gradients(&self, unit: usize, into: &mut Vec<Vec<u8>>) -> Look {
        let at = |rank, word| self.words.load(self.board.of_unit(rank, unit, word));
        let post = at(self.rank, POSTS);
        if let Some(rank) = self.lacks(unit, POSTS, post) {
            return Look::Waits(rank);
        }
        let number = NUMBERS + (post % 2) as usize;
        if let Some(rank) = self.others().find(|&rank| at(rank, number) != at(self.rank, number)) {
            return Look::Differs(rank, 0);
        }
        let count = self.board.parameters(unit);
        let note = |rank| {
            let first = self.board.note(rank, unit, post);
            let words = (first..first + count.div_ceil(8)).flat_map(|at| self.words.load(at).to_le_bytes());
            words.take(count).collect()
        };
        into.clear();
        into.extend((0..self.board.ranks()).map(note));
        self.words.store(self.board.of_unit(self.rank, unit, SEEN), post);
        Look::All
    }

    /// This rank's slices of a unit's gradients are in the segment, those of this post and all before.
    pub fn land(&self, unit: usize, post: u64) {
        self.words.store(self.board.of_unit(self.rank, unit, LANDED), post);
    }

    /// A rank whose slices of this post are not there yet; none if all are.
    pub fn unlanded(&self, unit: usize, post: u64) -> Option<usize> {
        self.lacks(unit, LANDED, post)
    }

    /// Says that this rank is at its step, after so many backwards.
    pub fn arrive(&self, backward: u64) {
        self.store(ARRIVED, (self.load(self.rank, PASSED) + 1) << 32 | (backward & 0xffff_ffff));
    }

    /// What a rank that has arrived does next (A5).
    pub fn arrived(&self, backward: u64) -> Arrival {
        let turn = self.load(self.rank, PASSED) + 1;
        // A rank that has passed saw all of them here.
        let passed = || self.others().any(|rank| self.load(rank, PASSED) >= turn);
        let step = || {
            self.store(PASSED, turn);
            Arrival::Step
        };
        if passed() {
            return step();
        }
        let mut missing = None;
        for rank in self.others() {
            let word = self.load(rank, ARRIVED);
            let here = word >> 32 == turn;
            let latest = self.load(rank, BACKWARD).max(if here { word & 0xffff_ffff } else { 0 });
            if latest > backward {
                // One that has passed may be in a backward of the next step.
                return if passed() { step() } else { Arrival::Join(latest) };
            }
            if !here || word & 0xffff_ffff != backward {
                missing = self.rather(missing, rank);
            }
        }
        match missing {
            Some(_) if passed() => step(),
            Some(rank) => Arrival::Waits(rank),
            None => step(),
        }
    }

    /// This rank is there: the process, and when it began.
    pub fn enter(&self, pid: u32, started: u64) {
        self.store(PID, u64::from(pid));
        self.store(STARTED, started);
        self.set_state(State::Running);
    }

    /// A rank's process, and when it began.
    pub fn process(&self, rank: usize) -> (u64, u64) {
        (self.load(rank, PID), self.load(rank, STARTED))
    }

    /// Says how far this rank is.
    pub fn set_state(&self, state: State) {
        self.store(STATE, state as u64);
    }

    /// How far a rank is.
    pub fn state(&self, rank: usize) -> State {
        match self.load(rank, STATE) {
            0 => State::Absent,
            1 => State::Running,
            2 => State::Failed,
            _ => State::Closed,
        }
    }

    /// Shows a text to the others, cut where it is too long. One thread of a rank at a time.
    pub fn say(&self, text: &str) {
        let text = &text.as_bytes()[..text.floor_char_boundary(TEXT_BYTES)];
        let turn = self.load(self.rank, TEXT);
        self.store(TEXT, turn + 1);
        self.store(TEXT + 1, text.len() as u64);
        for (word, bytes) in text.chunks(8).enumerate() {
            let mut eight = [0; 8];
            eight[..bytes.len()].copy_from_slice(bytes);
            self.store(TEXT + 2 + word, u64::from_le_bytes(eight));
        }
        self.store(TEXT, turn + 2);
    }

    /// The text that a rank shows; none while it is being written.
    pub fn said(&self, rank: usize) -> Option<String> {
        let turn = self.load(rank, TEXT);
        let len = usize::try_from(self.load(rank, TEXT + 1)).ok()?.min(TEXT_BYTES);
        let words = (0..len.div_ceil(8)).flat_map(|word| self.load(rank, TEXT + 2 + word).to_le_bytes());
        let bytes: Vec<u8> = words.take(len).collect();
        let whole = turn.is_multiple_of(2) && self.load(rank, TEXT) == turn;
        whole.then(|| String::from_utf8_lossy(&bytes).into_owned())
    }
}
