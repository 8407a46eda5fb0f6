//! The threads that learn when copies and steps have ended, each in the order of its stream.

use std::time::Duration;

use crate::{
    device::Elapsed,
    error::Result,
    runtime::{
        measure::stats::Link,
        paging::landing::{Ended, Landing},
        shared::Shared,
    },
};

/// Waits for the end of a copy, or of a step.
pub(crate) fn ended(shared: &Shared, link: Link, what: Ended) -> Result<()> {
    let (Ended::Copy(Landing { gate, .. })
    | Ended::Step { gate, .. }
    | Ended::Grads { gate, .. }
    | Ended::Slices { gate, .. }) = what;
    if let Ended::Copy(Landing { marks, .. }) = &what
        && link == Link::Up
    {
        *shared.paging.lock() = Some(marks.0);
    }
    while !shared.device.block(gate, Duration::from_millis(100))? {
        if shared.inner.lock().closing {
            return Ok(());
        }
    }
    if link == Link::Up {
        *shared.paging.lock() = None;
    }
    match what {
        Ended::Copy(landing) => landed(shared, link, landing),
        Ended::Step { at, .. } => shared.step_ended(at),
        Ended::Grads { unit, .. } => shared.grads_landed(unit),
        Ended::Slices { unit, post, .. } => {
            shared.slices_landed(unit, post);
            Ok(())
        }
    }
}

fn landed(shared: &Shared, link: Link, landing: Landing) -> Result<()> {
    let (from, to) = landing.marks;
    shared.trace.saw(&*shared.device, to)?;
    let nanos = match shared.device.elapsed(from, to)? {
        Elapsed::Nanos(nanos) => u64::try_from(nanos).unwrap_or(0),
        Elapsed::Pending | Elapsed::Lost => {
            shared.stats.lost_one();
            0
        }
    };
    shared.stats.moved(link, landing.bytes, nanos);
    let (track, name) = if link == Link::Up { ("up", "page in") } else { ("down", "gradient") };
    shared.trace.device_span(&*shared.device, track, name, u64::from(landing.unit.0), (from, to), landing.bytes)?;
    if landing.lease.is_some() {
        drop(landing.lease);
        let unit = landing.unit;
        shared.event(|m, out| m.copied(unit, out))?;
    }
    Ok(())
}
