//! Random programs of copies and fills against plain memory.

use proptest::prelude::*;

use crate::{
    bench::{Bench, DOWN, UP, pattern},
    on_every_device,
};

/// One step of a random program over a ring of 4 chunks.
#[derive(Clone, Debug)]
enum Step {
    Upload { unit: usize, at: usize, from: usize, len: usize },
    Download { unit: usize, at: usize, to: usize, len: usize },
    Fill { unit: usize, at: usize, byte: u8, len: usize },
}

const SPANS: [(u32, u32); 5] = [(0, 2), (2, 2), (3, 2), (1, 4), (2, 1)];
const HOST_HALF: usize = 64 << 10;

fn step() -> impl Strategy<Value = Step> {
    let place = (0..SPANS.len(), any::<usize>(), 0..HOST_HALF, 0..20_000usize);
    prop_oneof![
        place.clone().prop_map(|(unit, at, from, len)| Step::Upload { unit, at, from, len }),
        place.clone().prop_map(|(unit, at, to, len)| Step::Download { unit, at, to, len }),
        (place, any::<u8>()).prop_map(|((unit, at, _, len), byte)| Step::Fill { unit, at, byte, len }),
    ]
}

/// Runs the steps on the device, ordered by gates alone, and on plain memory.
fn run_against_model(bench: &Bench, steps: &[Step]) {
    let chunk = bench.device.granularity() as usize;
    let frames = bench.frames(4, chunk as u64, &SPANS);
    let sources = pattern(11, HOST_HALF);
    bench.set(0, &sources);
    bench.set(HOST_HALF, &vec![0; HOST_HALF]);
    bench.fill(UP, frames.address(3), 0, 4 * chunk);
    let (mut ring, mut arrived) = (vec![0u8; 4 * chunk], vec![0u8; HOST_HALF]);
    let place = |unit: usize, at: usize, byte: usize| (SPANS[unit].0 as usize * chunk + at + byte) % (4 * chunk);
    for step in steps {
        match *step {
            Step::Upload { unit, at, from, len } => {
                let (at, len) = clip(unit, at, len.min(HOST_HALF - from), chunk);
                bench.order(DOWN, UP);
                bench.copy(UP, frames.address(unit) + at as u64, bench.at(from), len);
                (0..len).for_each(|i| ring[place(unit, at, i)] = sources[from + i]);
            }
            Step::Download { unit, at, to, len } => {
                let (at, len) = clip(unit, at, len.min(HOST_HALF - to), chunk);
                bench.order(UP, DOWN);
                bench.copy(DOWN, bench.at(HOST_HALF + to), frames.address(unit) + at as u64, len);
                (0..len).for_each(|i| arrived[to + i] = ring[place(unit, at, i)]);
            }
            Step::Fill { unit, at, byte, len } => {
                let (at, len) = clip(unit, at, len, chunk);
                bench.order(DOWN, UP);
                bench.fill(UP, frames.address(unit) + at as u64, byte, len);
                (0..len).for_each(|i| ring[place(unit, at, i)] = byte);
            }
        }
    }
    bench.order(UP, DOWN);
    bench.finish(DOWN);
    assert!(bench.get(HOST_HALF, HOST_HALF) == arrived, "what was downloaded");
    // Unit 3 starts at chunk 1 and goes around the whole ring.
    ring.rotate_left(chunk);
    assert!(bench.read(frames.address(3), 4 * chunk) == ring, "what is in the ring");
}

/// A place and length that the unit has; every other place lies shortly before a border of chunks.
fn clip(unit: usize, at: usize, len: usize, chunk: usize) -> (usize, usize) {
    let chunks = SPANS[unit].1 as usize;
    let at = if at.is_multiple_of(2) { at % (chunks * chunk) } else { (1 + at % chunks) * chunk - (1 + at % 4000) };
    (at, len.min(chunks * chunk - at))
}

#[test]
fn random_programs_match_plain_memory() {
    on_every_device(|device| {
        let chunk = device.granularity();
        let bench = Bench::new(device, 2 * HOST_HALF as u64 + 4 * chunk);
        let config = ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() };
        proptest!(config, |(steps in prop::collection::vec(step(), 1..60))| {
            run_against_model(&bench, &steps);
        });
    });
}
