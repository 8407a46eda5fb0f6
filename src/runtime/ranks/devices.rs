//! Where the devices of all ranks meet, before they exchange gradients.
//!
//! A kernel that waits for another rank's data holds processors of its device, which what is computed beside it then lacks. So each device says on
//! the board that it has come to an exchange, and its stream waits there for the others, which takes no processor; then the kernels run together.
//! No result depends on it, so that a rank may have all streams go on at any time: it writes the most that there is to all words. It does so again and
//! again where its own device has waited for long, as for a rank that is slow or gone, or because the driver has another stream of the program behind
//! this one, for whose work a rank waits before it comes here. A rank that fails or closes its model does so until its device stores no more.
#![expect(unsafe_code, reason = "hands addresses of words to the device")]

use std::time::{Duration, Instant};

use crate::{
    device::{PAST_ALL, StreamRef},
    error::Result,
    runtime::{
        ranks::together::{Meetings, Ranks},
        shared::{Shared, waits::SLICE},
    },
    schedule::ranks::board::{AT_EXCHANGE, Board},
};

/// How often the end of a model looks whether its device is past its exchanges: for 10 s.
const SLICES: u32 = 200;
/// Longer than ranks that go on are apart from each other.
const LONG: Duration = Duration::from_millis(100);

impl Shared {
    /// Has this rank's device tell that it has come to its next exchange, and, where it takes part (`waits`), wait on this stream for those of
    /// the other ranks. All ranks do this equally often.
    pub(crate) fn meet_on_devices(&self, ranks: &Ranks, stream: u64, waits: bool) -> Result<()> {
        drop(self.lock()?);
        let mut meetings = ranks.meetings.lock();
        let Meetings { count, mine, others, last } = &mut *meetings;
        *count += 1;
        let others: &[u64] = if waits { others } else { &[] };
        let stream = StreamRef::Compute(stream);
        // SAFETY: words of the board, which the device has registered; they stay until it is past this (`end_meetings`).
        if unsafe { self.device.meet(stream, *count, *mine, others)? } {
            *last = self.device.record(stream)?;
        } else {
            ranks.words.store(Board::of_rank(ranks.spec.rank, AT_EXCHANGE), PAST_ALL);
        }
        Ok(())
    }

    /// At the end: has this rank's device pass all exchanges to which it was sent, before the words go away. What it computes before them may itself
    /// wait for a rank that is gone: then this is given up.
    pub(crate) fn end_meetings(&self, ranks: &Ranks) {
        for _ in 0..SLICES {
            ranks.release_devices();
            // Held by a thread that waits for the driver, which waits for the device.
            let Some(last) = ranks.meetings.try_lock_for(SLICE).map(|meetings| meetings.last) else { continue };
            if !matches!(self.device.block(last, SLICE), Ok(false)) {
                break;
            }
        }
        // Over what it has stored meanwhile; it stores no more.
        ranks.release_devices();
    }
}

impl Ranks {
    /// Has no stream wait for other ranks' devices where this one's has come to an exchange and waited there for long. The watcher looks here again
    /// and again; `waits_at`: the exchange at which it was seen to wait first, and when.
    pub(super) fn hurry_meetings(&self, waits_at: &mut Option<(u64, Instant)>) {
        let mine = self.at_exchange(self.spec.rank);
        let late = || (0..self.spec.size).filter(|&rank| self.at_exchange(rank) < mine);
        match *waits_at {
            _ if late().next().is_none() => *waits_at = None,
            Some((number, since)) if number == mine => {
                if since.elapsed() >= LONG {
                    self.release(late());
                }
            }
            _ => *waits_at = Some((mine, Instant::now())),
        }
    }

    fn at_exchange(&self, rank: usize) -> u64 {
        self.words.load(Board::of_rank(rank, AT_EXCHANGE))
    }

    /// Has no stream wait for a device any more.
    pub(crate) fn release_devices(&self) {
        self.release(0..self.spec.size);
    }

    /// Has no stream wait for those of these ranks that have not come yet.
    fn release(&self, ranks: impl Iterator<Item = usize>) {
        ranks.for_each(|rank| self.words.store(Board::of_rank(rank, AT_EXCHANGE), PAST_ALL));
    }
}
