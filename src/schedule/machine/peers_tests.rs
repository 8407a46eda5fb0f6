//! Updates of which other ranks make parts.

use super::{
    tests::{HOST, Rig, u},
    *,
};
use crate::schedule::{order::Phase, placement::Homes};

#[test]
fn a_unit_is_updated_when_all_ranks_have_made_their_parts() {
    let mut rig = Rig::new(2, 0, &[(1, HOST); 4]);
    rig.machine = rig.machine.among_peers();
    (0..2).for_each(|n| rig.machine.submit(u(n), &mut rig.out));
    assert_eq!(rig.take(), [Command::RunChunk(u(0), 0), Command::RunChunk(u(1), 0)]);
    let opened = rig.machine.open(u(0), Phase::Forward, true, &mut rig.out);
    assert_eq!(opened, Opening::Pending(Wait::Update));
    // Early, or for a unit that is not updated: nothing.
    rig.machine.peers_done(u(0), &mut rig.out);
    rig.machine.peers_done(u(3), &mut rig.out);
    assert!(rig.machine.update_queued(u(0)) && !rig.machine.awaits_peers(u(0)));
    rig.machine.chunk_ran(u(0), 0, &mut rig.out);
    assert!(rig.machine.awaits_peers(u(0)) && rig.machine.update_unmade(u(0)) && rig.machine.unsettled(u(0)));
    assert_eq!(rig.take(), [], "it is not paged in");
    rig.machine.promote(u(0), Want::Home, &mut rig.out);
    rig.machine.peers_done(u(0), &mut rig.out);
    assert_eq!(rig.take(), [Command::CopyUp(u(0))], "who waits is served");
    assert!(!rig.machine.update_pending(u(0)) && rig.machine.updating());
    assert!(!rig.machine.reads_gradients(u(0)) && rig.machine.awaits_peers(u(0)), "states of others may trail");
    rig.machine.peers_made(u(0), &mut rig.out);
    assert!(!rig.machine.update_unmade(u(0)));
    rig.machine.chunk_ran(u(1), 0, &mut rig.out);
    rig.machine.peers_done(u(1), &mut rig.out);
    rig.machine.peers_made(u(1), &mut rig.out);
    assert!(!rig.machine.updating());
    // The next one begins as the first did.
    rig.machine.submit(u(0), &mut rig.out);
    assert!(rig.take().contains(&Command::RunChunk(u(0), 0)));
}

#[test]
fn states_trail_on_each_rank_for_itself() {
    let mut rig = Rig::new(2, 0, &[(1, HOST); 4]);
    rig.machine = rig.machine.among_peers();
    (0..3).for_each(|n| rig.machine.submit(u(n), &mut rig.out));
    assert_eq!(rig.take(), [Command::RunChunk(u(0), 0), Command::RunChunk(u(1), 0)]);
    rig.machine.weights_ran(u(0), false, &mut rig.out);
    assert_eq!(rig.take(), [Command::RunChunk(u(2), 0)], "weights come first");
    assert!(rig.machine.update_queued(u(0)) && !rig.machine.awaits_peers(u(0)), "its states are its own to make");
    rig.machine.peers_done(u(0), &mut rig.out);
    assert!(!rig.machine.update_queued(u(0)) && rig.machine.reads_gradients(u(0)));
    // All others have made theirs: nothing as long as this one has not.
    rig.machine.peers_made(u(0), &mut rig.out);
    assert!(rig.machine.update_unmade(u(0)) && rig.machine.trails() && rig.take().is_empty());
    rig.machine.stalled(&mut rig.out);
    assert_eq!(rig.take(), [Command::RunStates(u(0))], "the updates handed out wait for other ranks");
    rig.machine.stalled(&mut rig.out);
    assert_eq!(rig.take(), [], "one after the other");
    rig.machine.states_ran(u(0), &mut rig.out);
    assert!(!rig.machine.reads_gradients(u(0)) && rig.machine.update_unmade(u(0)) && rig.machine.awaits_peers(u(0)));
    rig.machine.peers_made(u(0), &mut rig.out);
    assert!(!rig.machine.update_unmade(u(0)) && !rig.machine.trails());
    // States may be made before the weights of other ranks.
    [1, 2].into_iter().for_each(|n| rig.machine.weights_ran(u(n), false, &mut rig.out));
    assert_eq!(rig.take(), [Command::RunStates(u(2))], "what was made last is wanted first");
    rig.machine.states_ran(u(2), &mut rig.out);
    assert!(rig.machine.update_queued(u(2)) && rig.machine.awaits_peers(u(2)));
    rig.machine.peers_done(u(2), &mut rig.out);
    rig.machine.peers_made(u(2), &mut rig.out);
    assert!(!rig.machine.update_unmade(u(2)));
}

/// A rig among ranks of one unit whose update takes two pieces through NVMe.
fn streaming() -> Rig {
    let mut rig = Rig::new(8, 8, &[(1, Homes { optimizer: Tier::Nvme, ..HOST })]);
    rig.machine = rig.machine.among_peers();
    (rig.machine.units[0].streamed, rig.machine.units[0].chunks) = (true, 2);
    rig
}

#[test]
fn states_on_nvme_are_this_ranks_part_when_they_are_written() {
    let mut rig = streaming();
    let (machine, out) = (&mut rig.machine, &mut rig.out);
    machine.submit(u(0), out);
    for chunk in 0..2 {
        assert!(!machine.own_weights_made(u(0)), "piece {chunk} is not made");
        machine.chunk_read(u(0), chunk, out);
        machine.chunk_ran(u(0), chunk, out);
    }
    assert!(machine.own_weights_made(u(0)) && !machine.own_part_stored(u(0)));
    machine.chunk_written(u(0), 1, out);
    assert!(!machine.own_part_stored(u(0)), "the first one is on its way");
    machine.peers_done(u(0), out);
    assert!(!machine.update_queued(u(0)) && machine.update_unmade(u(0)) && !machine.own_part_stored(u(0)));
    machine.chunk_written(u(0), 0, out);
    assert!(machine.own_part_stored(u(0)));
    machine.peers_made(u(0), out);
    assert!(!machine.update_unmade(u(0)) && !machine.own_part_stored(u(0)), "there is nothing to tell any more");
}

#[test]
fn what_was_made_ahead_goes_home_on_each_rank_for_itself() {
    let mut rig = streaming();
    let (machine, out) = (&mut rig.machine, &mut rig.out);
    assert!(machine.begin_ahead(u(0), out));
    for chunk in 0..2 {
        machine.chunk_read(u(0), chunk, out);
        machine.ran_ahead(u(0), chunk, true, out);
    }
    out.clear();
    machine.submit(u(0), out);
    assert_eq!(std::mem::take(out), [Command::Decide(u(0))]);
    machine.decided(u(0), true, out);
    assert_eq!(std::mem::take(out), [Command::BringOwn(u(0))], "and no places are swapped");
    assert!(machine.update_queued(u(0)) && !machine.own_weights_made(u(0)));
    machine.brought(u(0), out);
    assert!(machine.own_weights_made(u(0)) && !machine.own_part_stored(u(0)) && !machine.in_spare(u(0)));
    (0..2).for_each(|chunk| machine.chunk_written(u(0), chunk, out));
    assert!(machine.own_part_stored(u(0)));
    machine.peers_done(u(0), out);
    assert!(!machine.begin_ahead(u(0), out), "states of other ranks are yet to come");
    machine.peers_made(u(0), out);
    assert!(machine.begin_ahead(u(0), out));
}
