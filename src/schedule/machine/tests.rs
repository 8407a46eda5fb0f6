//! What the machine does in the cases that decide how fast a step is, and in those that were once wrong.

use super::*;
use crate::{model::FrameSpan, schedule::placement::Homes};

pub(super) const HOST: Homes = Homes { params: Tier::Host, optimizer: Tier::Host, grads: Tier::Host };
pub(super) const NVME: Homes = Homes { params: Tier::Nvme, optimizer: Tier::Nvme, grads: Tier::Host };

/// A machine whose commands the test sees, over units of the given sizes one after the other around the ring.
pub(super) struct Rig {
    pub(super) machine: Machine,
    pub(super) out: Vec<Command>,
}

impl Rig {
    pub(super) fn new(ring: u32, window: u32, units: &[(u32, Homes)]) -> Self {
        let mut next = 0;
        let spans = units
            .iter()
            .map(|&(chunks, _)| {
                let span = FrameSpan { first_chunk: next % ring, chunks };
                next += chunks;
                span
            })
            .collect();
        let placement = Placement {
            homes: units.iter().map(|u| u.1).collect(),
            chunk_bytes: 1,
            ring_chunks: ring,
            spans,
            page_slots: (3, 1),
            update_slots: (5, 1),
            grad_slots: (0, 1),
            update_elems: 1,
            spare: vec![false; units.len()],
            lane_elems: 0,
            lane_bytes: 0,
            hbm_bytes: 0,
            host_bytes: 0,
            shadow_bytes: 0,
            nvme_bytes: 0,
        };
        let chunks: Vec<u32> = units.iter().map(|u| if u.1 == NVME { 2 } else { 0 }).collect();
        Self { machine: Machine::new(&placement, &chunks, window), out: Vec::new() }
    }

    fn on_host(ring: u32, window: u32, units: u32) -> Self {
        Self::new(ring, window, &vec![(1, HOST); units as usize])
    }

    fn open(&mut self, unit: u32, phase: Phase) -> Opening {
        self.machine.open(UnitId(unit), phase, true, &mut self.out)
    }

    fn again(&mut self, unit: u32) -> Opening {
        self.machine.open(UnitId(unit), Phase::Eval, false, &mut self.out)
    }

    fn release(&mut self, unit: u32) {
        self.machine.release(UnitId(unit), &mut self.out);
    }

    fn submit(&mut self, unit: u32) {
        self.machine.submit(UnitId(unit), &mut self.out);
    }

    fn read(&mut self, unit: u32) {
        self.machine.params_read(UnitId(unit), &mut self.out);
    }

    fn pass(&mut self, units: impl Iterator<Item = u32>, phase: Phase) {
        for u in units {
            assert_eq!(self.open(u, phase), Opening::Ready);
            self.release(u);
        }
    }

    fn step(&mut self, units: u32) {
        self.pass(0..units, Phase::Forward);
        self.pass((0..units).rev(), Phase::Backward);
    }

    pub(super) fn take(&mut self) -> Vec<Command> {
        std::mem::take(&mut self.out)
    }

    fn copies(&mut self) -> Vec<u32> {
        self.take().iter().filter_map(|c| if let Command::CopyUp(u) = c { Some(u.0) } else { None }).collect()
    }
}

pub(super) const fn u(n: u32) -> UnitId {
    UnitId(n)
}

#[test]
fn units_around_the_turn_stay_in_their_frames() {
    let mut rig = Rig::on_host(3, 3, 8);
    rig.step(8);
    rig.step(8);
    let before = rig.machine.prefetches();
    rig.take();
    rig.step(8);
    let after = rig.machine.prefetches();
    // Forward brings 3..=7, backward 4..=0; 7, 6, 5 are still there at the turn, and 0, 1, 2 at the step's end.
    assert_eq!(rig.copies(), [3, 4, 5, 6, 7, 4, 3, 2, 1, 0]);
    assert_eq!((after.hits - before.hits, after.demand, after.wasted), (16, before.demand, before.wasted));
}

#[test]
fn prefetch_reaches_as_far_as_its_window() {
    let mut rig = Rig::on_host(6, 2, 12);
    for _ in 0..2 {
        rig.pass(0..12, Phase::Eval);
    }
    rig.pass(0..4, Phase::Eval);
    rig.take();
    assert_eq!(rig.open(4, Phase::Eval), Opening::Ready);
    assert_eq!(rig.copies(), [6], "5 is there already; 7 would be a third");
}

#[test]
fn a_prefetch_leaves_what_is_needed_sooner() {
    // 3 shares frames with 0 and comes after it: it must wait, although its frames are idle.
    let mut rig = Rig::on_host(3, 3, 4);
    for _ in 0..3 {
        rig.pass([0, 1, 0, 3, 2].into_iter(), Phase::Eval);
    }
    rig.pass(0..1, Phase::Eval);
    rig.take();
    assert_eq!(rig.open(1, Phase::Eval), Opening::Ready);
    assert!(!rig.copies().contains(&3));
}

#[test]
fn a_unit_without_bytes_needs_nothing() {
    let mut rig = Rig::new(2, 2, &[(1, NVME), (0, NVME), (0, HOST)]);
    assert_eq!(rig.open(1, Phase::Forward), Opening::Ready);
    assert_eq!(rig.open(2, Phase::Forward), Opening::Ready);
    assert!(rig.take().is_empty());
}

#[test]
fn what_a_claim_never_overwrote_is_waited_for_by_the_next() {
    // 0 fills both chunks; 1 claims both and is still being read when 2 takes the first, and then 3 the second.
    let mut rig = Rig::new(2, 0, &[(2, HOST), (2, NVME), (1, NVME), (1, HOST)]);
    assert_eq!(rig.open(0, Phase::Eval), Opening::Ready);
    rig.release(0);
    assert!(matches!(rig.open(1, Phase::Eval), Opening::Pending(_)));
    rig.machine.forget(u(1));
    assert!(matches!(rig.open(2, Phase::Eval), Opening::Pending(_)));
    rig.machine.forget(u(2));
    rig.take();
    assert_eq!(rig.open(3, Phase::Eval), Opening::Ready);
    assert_eq!(rig.take(), [Command::WaitReleased(u(0)), Command::CopyUp(u(3))]);
}

#[test]
fn two_who_wait_for_the_same_frames_both_get_on() {
    let mut rig = Rig::new(1, 0, &[(1, NVME), (1, NVME)]);
    assert!(matches!(rig.open(0, Phase::Eval), Opening::Pending(_)));
    assert!(matches!(rig.open(1, Phase::Eval), Opening::Pending(_)));
    assert_eq!(rig.take(), [Command::ReadParams(u(0))], "1 does not take the frames of 0");
    rig.read(0);
    assert!(matches!(rig.again(1), Opening::Pending(_)), "0 was not seen yet by who waits for it");
    assert_eq!(rig.again(0), Opening::Ready);
    assert_eq!(rig.again(1), Opening::Conflict, "1 is used from its home");
}

#[test]
fn who_holds_older_bytes_is_not_refilled_until_it_asks() {
    let mut rig = Rig::on_host(4, 4, 4);
    rig.step(4);
    rig.step(4);
    assert_eq!(rig.open(0, Phase::Forward), Opening::Ready);
    rig.machine.invalidate(u(0));
    rig.take();
    rig.pass(1..4, Phase::Forward);
    rig.pass((1..4).rev(), Phase::Backward);
    assert!(!rig.copies().contains(&0), "a kernel may be reading them through a view");
    assert!(rig.machine.held(u(0)));
    assert_eq!(rig.open(0, Phase::Backward), Opening::Ready);
    assert_eq!(rig.take(), [Command::WaitReleased(u(0)), Command::CopyUp(u(0))]);
}

#[test]
fn submitting_does_not_page_in_what_may_be_submitted_next() {
    let mut rig = Rig::on_host(2, 2, 4);
    rig.step(4);
    rig.step(4);
    rig.machine.invalidate(u(0));
    rig.take();
    rig.submit(3);
    assert_eq!(rig.take(), [Command::RunChunk(u(3), 0)], "0 is next, and stale, but may be next in the queue, too");
    rig.machine.chunk_ran(u(3), 0, &mut rig.out);
    assert_eq!(rig.copies(), [0]);
}

#[test]
fn a_read_under_way_when_its_unit_is_updated_is_dropped() {
    let mut rig = Rig::new(1, 0, &[(1, NVME)]);
    assert!(matches!(rig.open(0, Phase::Eval), Opening::Pending(Wait::NvmeRead)));
    rig.submit(0);
    assert!(!rig.machine.wants_params(u(0)));
    rig.take();
    rig.read(0);
    assert_eq!(rig.take(), [Command::DropSlot(u(0))]);
    for c in [0, 1] {
        rig.machine.chunk_read(u(0), c, &mut rig.out);
        rig.machine.chunk_ran(u(0), c, &mut rig.out);
    }
    assert_eq!(rig.again(0), Opening::Pending(Wait::NvmeWrite), "the writes are not down yet");
    rig.take();
    rig.machine.chunk_written(u(0), 0, &mut rig.out);
    assert_eq!(rig.take(), []);
    rig.machine.chunk_written(u(0), 1, &mut rig.out);
    assert_eq!(rig.take(), [Command::ReadParams(u(0))], "without being asked again");
}

#[test]
fn whoever_is_waited_for_is_updated_first() {
    let mut rig = Rig::on_host(4, 4, 4);
    (0..4).for_each(|n| rig.submit(n));
    assert_eq!(rig.take(), [Command::RunChunk(u(0), 0), Command::RunChunk(u(1), 0)], "one at work, one behind it");
    assert_eq!(rig.open(3, Phase::Forward), Opening::Pending(Wait::Update));
    rig.machine.chunk_ran(u(0), 0, &mut rig.out);
    assert_eq!(rig.take()[0], Command::RunChunk(u(3), 0), "3 overtakes 2");
    rig.machine.promote(u(1), Want::Weights, &mut rig.out);
    rig.machine.promote(u(2), Want::Weights, &mut rig.out);
    rig.machine.chunk_ran(u(1), 0, &mut rig.out);
    assert_eq!(rig.take()[0], Command::RunChunk(u(2), 0));
    rig.machine.chunk_ran(u(3), 0, &mut rig.out);
    assert!(rig.copies().contains(&3), "it is paged in at once");
    assert_eq!(rig.again(3), Opening::Ready);
    rig.machine.chunk_ran(u(2), 0, &mut rig.out);
    assert!(!rig.machine.updating());
}

#[test]
fn parameters_change_places_and_go_home_only_where_somebody_needs_them() {
    let mut rig = Rig::on_host(2, 0, 6);
    (0..6).for_each(|n| rig.submit(n));
    rig.take();
    for n in 0..3 {
        rig.machine.swapped(u(n), &mut rig.out);
    }
    assert_eq!(rig.take(), [2, 3, 4].map(|n| Command::RunChunk(u(n), 0)), "no caller waits for a home");
    rig.machine.promote(u(2), Want::Weights, &mut rig.out);
    assert_eq!(rig.take(), [], "its frames can be filled");
    rig.machine.promote(u(2), Want::Home, &mut rig.out);
    rig.machine.promote(u(0), Want::Home, &mut rig.out);
    assert_eq!(rig.take(), [Command::CopyHome(u(2))], "one at a time");
    rig.machine.homed(u(2), &mut rig.out);
    assert_eq!(rig.take(), [Command::CopyHome(u(0))]);
    rig.machine.homed(u(0), &mut rig.out);
    assert!(!rig.machine.update_pending(u(0)) && !rig.machine.update_pending(u(2)));
    assert_eq!(rig.open(1, Phase::Forward), Opening::Ready);
    assert!(rig.take().contains(&Command::CopyUp(u(1))));
    assert!(rig.machine.in_spare(u(1)) && rig.machine.update_pending(u(1)), "its home is older");
    // 3 shares frames with 1, which is held: 3 is to be used from its home.
    assert_eq!(rig.open(3, Phase::Forward), Opening::Pending(Wait::Update));
    rig.machine.swapped(u(3), &mut rig.out);
    assert_eq!(rig.take(), [Command::RunChunk(u(5), 0), Command::CopyHome(u(3))], "the pending opening waits for it");
    rig.machine.homed(u(3), &mut rig.out);
    assert_eq!(rig.again(3), Opening::Conflict);
    rig.machine.release(u(1), &mut rig.out);
    (4..6).for_each(|n| rig.machine.chunk_ran(u(n), 0, &mut rig.out));
    assert!(!rig.machine.updating() && !rig.machine.in_spare(u(4)) && rig.machine.in_spare(u(1)));
    // The next update of 1 brings it home by itself, be it made ahead or now; the one after that of 2 does not.
    rig.submit(1);
    rig.submit(2);
    rig.machine.promote(u(1), Want::Home, &mut rig.out);
    rig.machine.promote(u(2), Want::Home, &mut rig.out);
    rig.take();
    rig.machine.swapped(u(1), &mut rig.out);
    assert!(!rig.machine.update_pending(u(1)));
    rig.machine.swapped(u(2), &mut rig.out);
    assert!(rig.take().contains(&Command::CopyHome(u(2))), "it was wanted before it was made");
}

/// What was commanded of states and homes since the last look.
fn states(rig: &mut Rig) -> Vec<Command> {
    rig.take().into_iter().filter(|c| matches!(c, Command::RunStates(_) | Command::CopyHome(_))).collect()
}

#[test]
fn states_follow_once_all_weights_are_made_and_the_last_first() {
    let mut rig = Rig::on_host(4, 4, 4);
    rig.step(4);
    rig.take();
    (0..4).for_each(|unit| rig.submit(unit));
    for unit in 0..4 {
        rig.machine.weights_ran(u(unit), false, &mut rig.out);
        assert!(!rig.machine.update_queued(u(unit)) && rig.machine.update_unmade(u(unit)));
        // Its weights can be used.
        assert_eq!(rig.open(unit, Phase::Forward), Opening::Ready);
        rig.release(unit);
    }
    assert_eq!(states(&mut rig), [Command::RunStates(u(3))]);
    // Which a caller waits for overtakes the others, but not the one at work.
    rig.machine.promote(u(1), Want::States, &mut rig.out);
    assert_eq!(states(&mut rig), []);
    for (ran, next) in [(3, Some(1)), (1, Some(2)), (2, Some(0)), (0, None)] {
        assert!(rig.machine.updating());
        rig.machine.states_ran(u(ran), &mut rig.out);
        assert!(!rig.machine.update_unmade(u(ran)));
        assert_eq!(states(&mut rig), next.map(|n| Command::RunStates(u(n))).into_iter().collect::<Vec<_>>());
    }
    assert!(!rig.machine.updating());
}

#[test]
fn states_that_a_caller_waits_for_do_not_wait_for_weights_and_homes_wait_for_states() {
    let mut rig = Rig::on_host(4, 4, 4);
    rig.step(4);
    (0..4).for_each(|unit| rig.submit(unit));
    rig.machine.weights_ran(u(0), true, &mut rig.out);
    rig.machine.weights_ran(u(1), true, &mut rig.out);
    rig.take();
    assert!(rig.machine.in_spare(u(0)) && rig.machine.in_spare(u(1)));
    // Opening a window hurries nothing but weights.
    assert_eq!(rig.open(3, Phase::Forward), Opening::Pending(Wait::Update));
    rig.machine.forget(u(3));
    assert_eq!(states(&mut rig), []);
    rig.machine.promote(u(0), Want::Home, &mut rig.out);
    assert_eq!(states(&mut rig), [Command::RunStates(u(0))], "its old weights are at home");
    rig.machine.states_ran(u(0), &mut rig.out);
    assert_eq!(states(&mut rig), [Command::CopyHome(u(0))]);
    rig.machine.homed(u(0), &mut rig.out);
    // Callers who waited before the weights were made are not forgotten.
    for want in [Want::States, Want::Home] {
        let mut rig = Rig::on_host(4, 4, 4);
        (0..3).for_each(|unit| rig.submit(unit));
        rig.machine.promote(u(1), want, &mut rig.out);
        states(&mut rig);
        rig.machine.weights_ran(u(1), true, &mut rig.out);
        assert_eq!(states(&mut rig), [Command::RunStates(u(1))], "{want:?}, with weights left to be made");
    }
}

#[test]
fn who_wants_the_next_result_at_home_is_not_served_with_this_one() {
    let mut rig = Rig::on_host(1, 0, 1);
    rig.submit(0);
    rig.machine.swapped(u(0), &mut rig.out);
    rig.machine.promote(u(0), Want::Home, &mut rig.out);
    rig.take();
    // A save that is given up leaves its copy on the way.
    rig.submit(0);
    rig.machine.promote(u(0), Want::Home, &mut rig.out);
    rig.take();
    rig.machine.homed(u(0), &mut rig.out);
    assert!(rig.machine.update_pending(u(0)) && !rig.machine.in_spare(u(0)));
    rig.machine.swapped(u(0), &mut rig.out);
    assert_eq!(rig.take(), [Command::CopyHome(u(0))]);
    rig.machine.homed(u(0), &mut rig.out);
    assert!(!rig.machine.update_pending(u(0)));
}

#[test]
fn a_promoted_update_in_pieces_goes_on_where_it_was() {
    let mut rig = Rig::new(2, 0, &[(1, NVME), (1, NVME), (1, NVME)]);
    (0..3).for_each(|n| rig.submit(n));
    let reads = [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(n, c)| Command::ReadChunk(u(n), c));
    assert_eq!(rig.take(), reads, "four slots: the fifth is the runtime's");
    for n in [0, 1] {
        for c in [0, 1] {
            rig.machine.chunk_read(u(n), c, &mut rig.out);
            rig.machine.chunk_ran(u(n), c, &mut rig.out);
        }
    }
    assert!(!rig.machine.update_pending(u(0)) && rig.machine.unsettled(u(0)), "writes trail");
    // The next update of 0 waits for them, and does not hold up 2 meanwhile.
    rig.submit(0);
    rig.take();
    rig.machine.chunk_written(u(0), 0, &mut rig.out);
    assert_eq!(rig.take(), [Command::ReadChunk(u(2), 0)]);
    rig.machine.promote(u(0), Want::Weights, &mut rig.out);
    rig.machine.chunk_written(u(1), 0, &mut rig.out);
    assert_eq!(rig.take(), [], "0 is first now, and its last write is under way");
    rig.machine.chunk_written(u(0), 1, &mut rig.out);
    let reads = [(0, 0), (0, 1)].map(|(n, c)| Command::ReadChunk(u(n), c));
    assert_eq!(rig.take(), reads);
}

#[test]
fn nothing_is_read_while_the_unit_is_overwritten() {
    let mut rig = Rig::new(1, 0, &[(1, NVME)]);
    assert!(matches!(rig.open(0, Phase::Eval), Opening::Pending(Wait::NvmeRead)));
    rig.machine.begin_write(u(0));
    assert!(rig.machine.reading(u(0)) && !rig.machine.wants_params(u(0)), "what comes now is of no use");
    rig.take();
    rig.read(0);
    assert_eq!(rig.take(), [Command::DropSlot(u(0))]);
    assert!(matches!(rig.again(0), Opening::Pending(_)));
    assert_eq!(rig.take(), []);
    rig.machine.end_write(u(0), &mut rig.out);
    assert_eq!(rig.take(), [Command::ReadParams(u(0))]);
    rig.read(0);
    assert_eq!(rig.again(0), Opening::Ready);
}
