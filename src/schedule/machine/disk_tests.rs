//! What the machine does with gradients on NVMe, and with updates ahead of their step.

use super::{
    tests::{HOST, NVME, Rig, u},
    *,
};
use crate::schedule::placement::Homes;

/// Parameters and gradients at home, states on NVMe.
const STATES: Homes = Homes { optimizer: Tier::Nvme, ..HOST };
/// Everything on NVMe.
const ALL: Homes = Homes { grads: Tier::Nvme, ..NVME };

/// Units whose updates take two pieces, and one gradient slot.
fn rig(units: &[Homes]) -> Rig {
    let mut rig = Rig::new(8, 8, &units.iter().map(|&home| (1, home)).collect::<Vec<_>>());
    for s in &mut rig.machine.units {
        (s.streamed, s.chunks) = (true, 2);
    }
    rig.machine.grad_free = 1;
    rig
}

#[test]
fn who_waits_for_a_gradient_slot_has_the_oldest_written() {
    let mut rig = rig(&[ALL, ALL]);
    let (machine, out) = (&mut rig.machine, &mut rig.out);
    assert!(machine.gather_grads(u(1), false, out) && machine.gather_grads(u(1), false, out));
    assert!(!machine.gather_grads(u(0), false, out), "there is one slot");
    assert_eq!(std::mem::take(out), [Command::SealGrads(u(1))]);
    assert!(!machine.gather_grads(u(0), false, out) && out.is_empty(), "it is on its way");
    machine.grads_landed(u(1), out);
    assert_eq!(std::mem::take(out), [Command::WriteGrads(u(1))]);
    assert!(!machine.gather_grads(u(1), false, out), "what is being written is added to no more");
    machine.grads_written(u(1), out);
    assert!(machine.gather_grads(u(0), false, out));
}

#[test]
fn an_update_begins_when_its_gradients_are_written() {
    let mut rig = rig(&[ALL]);
    let (machine, out) = (&mut rig.machine, &mut rig.out);
    assert!(machine.gather_grads(u(0), false, out));
    machine.submit(u(0), out);
    assert_eq!(std::mem::take(out), [Command::SealGrads(u(0))], "else they would never be written");
    machine.grads_landed(u(0), out);
    assert_eq!(std::mem::take(out), [Command::WriteGrads(u(0))]);
    machine.grads_written(u(0), out);
    assert_eq!(std::mem::take(out), [Command::ReadChunk(u(0), 0), Command::ReadChunk(u(0), 1)]);
}

#[test]
fn what_is_added_to_is_read_first() {
    let mut rig = rig(&[ALL, ALL]);
    let (machine, out) = (&mut rig.machine, &mut rig.out);
    machine.expect_grads(u(0), out);
    assert_eq!(std::mem::take(out), [Command::ReadGrads(u(0))]);
    assert!(
        !machine.gather_grads(u(0), true, out) && !machine.gather_grads(u(1), true, out),
        "the slot is being filled"
    );
    assert_eq!(std::mem::take(out), []);
    machine.grads_read(u(0), out);
    assert!(machine.gather_grads(u(0), true, out));
    assert!(!machine.gather_grads(u(1), true, out));
    assert_eq!(std::mem::take(out), [Command::SealGrads(u(0))], "who waits has it written");
}

/// Has both pieces of a unit's update ahead made.
fn make(rig: &mut Rig, unit: UnitId) {
    for chunk in 0..2 {
        rig.machine.chunk_read(unit, chunk, &mut rig.out);
        rig.machine.ran_ahead(unit, chunk, true, &mut rig.out);
    }
}

#[test]
fn what_was_made_ahead_becomes_current_at_the_step() {
    let mut rig = rig(&[STATES]);
    assert!(rig.machine.begin_ahead(u(0), &mut rig.out));
    assert_eq!(rig.take(), [Command::ReadChunk(u(0), 0), Command::ReadChunk(u(0), 1)]);
    make(&mut rig, u(0));
    let made = [
        Command::RunAhead(u(0), 0),
        Command::WriteAhead(u(0), 0),
        Command::RunAhead(u(0), 1),
        Command::WriteAhead(u(0), 1),
    ];
    assert_eq!(rig.take(), made, "nothing is current before the step");
    rig.machine.submit(u(0), &mut rig.out);
    assert_eq!(rig.take(), [Command::Decide(u(0))]);
    assert!(rig.machine.update_queued(u(0)));
    rig.machine.decided(u(0), true, &mut rig.out);
    assert_eq!(rig.take(), [Command::SwapPlaces(u(0))]);
    assert!(!rig.machine.update_queued(u(0)) && rig.machine.in_spare(u(0)), "parameters at home change places, too");
}

#[test]
fn a_step_that_asks_for_something_else_begins_when_what_was_begun_has_ended() {
    let mut rig = rig(&[STATES]);
    assert!(rig.machine.begin_ahead(u(0), &mut rig.out));
    rig.machine.chunk_read(u(0), 0, &mut rig.out);
    rig.take();
    rig.machine.submit(u(0), &mut rig.out);
    rig.machine.decided(u(0), false, &mut rig.out);
    assert_eq!(rig.take(), [Command::Decide(u(0))], "pieces are under way");
    rig.machine.ran_ahead(u(0), 0, true, &mut rig.out);
    rig.machine.chunk_read(u(0), 1, &mut rig.out);
    let again = [Command::ReadChunk(u(0), 0), Command::ReadChunk(u(0), 1)];
    assert_eq!(rig.take(), [&[Command::DropChunk(u(0), 0), Command::DropChunk(u(0), 1)][..], &again].concat());
}

#[test]
fn places_are_not_swapped_while_their_bytes_are_used() {
    let mut rig = rig(&[NVME]);
    assert!(rig.machine.begin_ahead(u(0), &mut rig.out));
    make(&mut rig, u(0));
    (0..2).for_each(|chunk| rig.machine.chunk_written(u(0), chunk, &mut rig.out));
    rig.machine.hold_still(u(0));
    rig.machine.submit(u(0), &mut rig.out);
    rig.take();
    rig.machine.decided(u(0), true, &mut rig.out);
    assert_eq!(rig.take(), []);
    rig.machine.end_write(u(0), &mut rig.out);
    assert_eq!(rig.take(), [Command::SwapPlaces(u(0))]);
}

#[test]
fn of_what_waits_the_last_is_made_first_and_what_is_begun_is_ended() {
    let mut rig = rig(&[STATES; 4]);
    // One slot for pieces.
    rig.machine.update_free = 1;
    for unit in [3, 2, 1] {
        assert!(rig.machine.begin_ahead(u(unit), &mut rig.out));
    }
    assert_eq!(rig.take(), [Command::ReadChunk(u(3), 0)]);
    rig.machine.chunk_read(u(3), 0, &mut rig.out);
    rig.machine.ran_ahead(u(3), 0, true, &mut rig.out);
    rig.take();
    rig.machine.chunk_written(u(3), 0, &mut rig.out);
    assert_eq!(rig.take(), [Command::ReadChunk(u(3), 1)], "it was begun");
    rig.machine.chunk_read(u(3), 1, &mut rig.out);
    rig.machine.ran_ahead(u(3), 1, true, &mut rig.out);
    rig.take();
    rig.machine.chunk_written(u(3), 1, &mut rig.out);
    assert_eq!(rig.take(), [Command::ReadChunk(u(1), 0)], "the next forward needs it first");
    rig.machine.submit(u(0), &mut rig.out);
    rig.machine.chunk_read(u(1), 0, &mut rig.out);
    rig.machine.ran_ahead(u(1), 0, true, &mut rig.out);
    rig.take();
    rig.machine.chunk_written(u(1), 0, &mut rig.out);
    assert_eq!(rig.take(), [Command::ReadChunk(u(0), 0)], "a step comes first");
}

#[test]
fn a_home_that_is_wanted_ends_an_update_ahead_that_writes_to_it() {
    let mut rig = rig(&[STATES]);
    assert!(rig.machine.begin_ahead(u(0), &mut rig.out));
    make(&mut rig, u(0));
    (0..2).for_each(|chunk| rig.machine.chunk_written(u(0), chunk, &mut rig.out));
    rig.machine.submit(u(0), &mut rig.out);
    rig.machine.decided(u(0), true, &mut rig.out);
    assert!(rig.machine.begin_ahead(u(0), &mut rig.out));
    rig.take();
    rig.machine.promote(u(0), Want::Home, &mut rig.out);
    assert_eq!(rig.take(), [], "two pieces are being read");
    rig.machine.chunk_read(u(0), 0, &mut rig.out);
    assert_eq!(rig.take(), [Command::DropChunk(u(0), 0)]);
    rig.machine.chunk_read(u(0), 1, &mut rig.out);
    assert_eq!(rig.take(), [Command::DropChunk(u(0), 1), Command::CopyHome(u(0))]);
}
