//! Updates of which other ranks make parts.

use super::{
    tests::{HOST, Rig, u},
    *,
};
use crate::schedule::order::Phase;

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
    rig.machine.chunk_ran(u(1), 0, &mut rig.out);
    rig.machine.peers_done(u(1), &mut rig.out);
    assert!(!rig.machine.updating());
    // The next one begins as the first did.
    rig.machine.submit(u(0), &mut rig.out);
    assert!(rig.take().contains(&Command::RunChunk(u(0), 0)));
}
