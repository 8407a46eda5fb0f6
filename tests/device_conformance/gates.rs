//! Gates: the order they give, when they open, and what happens to thousands of them.

use std::{sync::Arc, time::Duration};

use funicular::{
    device::{Gate, HostDevice, Role},
    error::Code,
};

use crate::{
    bench::{Bench, DOWN, PATIENCE, UP, USER, pattern, round_to},
    on_every_device,
};

#[test]
fn gates_order_the_streams() {
    on_every_device(|device| {
        let chunk = device.granularity();
        let len = round_to(1 << 20, chunk);
        let bench = Bench::new(device, 16 * len as u64);
        let frames = bench.frames(1, len as u64, &[(0, 1), (0, 1)]);
        // Unit after unit through one frame: up, the user's stream, down, and the frame again. Nothing is waited for
        // on the host, so only gates keep the bytes apart.
        let units = 7;
        for unit in 0..units {
            bench.set(unit * len, &pattern(unit as u64, len));
        }
        for unit in 0..units {
            let address = frames.address(unit % 2);
            bench.copy(UP, address, bench.at(unit * len), len);
            bench.order(UP, USER);
            bench.fill(USER, address + 17, unit as u8, 4096);
            bench.order(USER, DOWN);
            bench.copy(DOWN, bench.at((units + unit) * len), address, len);
            bench.order(DOWN, UP);
        }
        bench.finish(DOWN);
        for unit in 0..units {
            let mut expected = pattern(unit as u64, len);
            expected[17..17 + 4096].fill(unit as u8);
            assert!(bench.get((units + unit) * len, len) == expected, "unit {unit}");
        }
    });
}

/// A host device whose down stream is held up for `millis`; the gate opens behind that.
fn held_down(millis: u64) -> (Bench, Gate) {
    let device = HostDevice::with_caps(None, Some(1e6)).expect("starts");
    let bench = Bench::new(Arc::new(device), 1 << 22);
    bench.copy(DOWN, bench.at(1 << 21), bench.at(0), millis as usize * 1000);
    let gate = bench.device.record(DOWN).expect("recorded");
    (bench, gate)
}

#[test]
fn a_gate_is_closed_while_its_stream_is_busy() {
    let (bench, gate) = held_down(2000);
    assert!(!bench.device.passed(gate).expect("works"));
    assert!(!bench.device.block(gate, Duration::from_millis(5)).expect("works"), "the time was over");
    assert!(!bench.device.block(gate, Duration::ZERO).expect("works"));
    // What waits for it is closed too, on the stream and on the thread that computes.
    bench.device.wait(UP, gate).expect("enqueued");
    let behind = bench.device.record(UP).expect("recorded");
    assert!(!bench.device.passed(behind).expect("works"));
    bench.device.wait(USER, gate).expect("waits");
    assert!(bench.device.passed(gate).expect("works"), "the user's stream went on before the gate");
    assert!(bench.device.block(behind, PATIENCE).expect("works"));
    assert!(bench.device.block(gate, Duration::MAX).expect("works"), "no limit is not an error");
}

#[test]
fn block_ends_and_gates_stay_open_on_every_device() {
    on_every_device(|device| {
        let bench = Bench::new(device, 1 << 26);
        let frames = bench.frames(1, round_to(1 << 25, bench.device.granularity()) as u64, &[(0, 1)]);
        for _ in 0..8 {
            bench.copy(UP, frames.address(0), bench.at(0), 1 << 25);
        }
        let gate = bench.device.record(UP).expect("recorded");
        let early = bench.device.block(gate, Duration::ZERO).expect("works");
        let passed = bench.device.passed(gate).expect("works");
        assert!(passed >= early, "a gate closed again");
        assert!(bench.device.block(gate, PATIENCE).expect("works"));
        assert!(bench.device.passed(gate).expect("works"));
        assert!(bench.device.passed(Gate::OPEN).expect("works"));
        for role in [Role::Up, Role::Down] {
            assert!(bench.device.passed(Gate { role, seq: 0 }).expect("works"));
        }
    });
}

#[test]
fn a_gate_never_recorded_is_an_error_and_no_hang() {
    on_every_device(|device| {
        let last = device.record(UP).expect("recorded");
        let never = Gate { role: Role::Up, seq: last.seq + 1 };
        assert_eq!(device.passed(never).expect_err("unknown").code(), Code::Stuck);
        assert_eq!(device.block(never, PATIENCE).expect_err("unknown").code(), Code::Stuck);
        for stream in [UP, DOWN, USER] {
            assert_eq!(device.wait(stream, never).expect_err("unknown").code(), Code::Stuck);
        }
    });
}

#[test]
fn numbers_grow_and_thousands_of_gates_stay_answerable() {
    on_every_device(|device| {
        let bench = Bench::new(device, 1 << 20);
        for stream in [UP, DOWN, USER] {
            let gates: Vec<_> = (0..10_000)
                .map(|_| {
                    bench.copy(stream, bench.at(1 << 16), bench.at(0), 64);
                    bench.device.record(stream).expect("recorded")
                })
                .collect();
            if stream != USER {
                assert!(gates.is_sorted_by_key(|gate| gate.seq) && gates[0].seq < gates[9_999].seq);
            }
            // The oldest first: its event has been used again since.
            for gate in [gates[0], gates[1], gates[5_000], gates[9_999]] {
                for other in [UP, DOWN, USER] {
                    bench.device.wait(other, gate).expect("waits");
                }
                assert!(bench.device.block(gate, PATIENCE).expect("works"));
            }
            bench.finish(stream);
            for gate in gates {
                assert!(bench.device.passed(gate).expect("works"));
            }
        }
    });
}

#[test]
fn a_full_queue_makes_the_caller_wait_and_not_fail() {
    let (bench, gate) = held_down(100);
    // Up is held by Down, and more is enqueued than any queue holds.
    bench.device.wait(UP, gate).expect("enqueued");
    for i in 0..10_000 {
        bench.fill(UP, bench.at(0), (i % 251) as u8, 1);
    }
    bench.finish(UP);
    assert_eq!(bench.get(0, 1), [(9_999 % 251) as u8]);
}
