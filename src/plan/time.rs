//! How fast a machine is by its profile, and what a step computes on it.

use crate::{
    model::Layout,
    policy::profile::Profile,
    quantities::UnitId,
    runtime::{Config, UpdateOn},
    schedule::{
        cost::{Rates, Work},
        traffic::Uses,
    },
};

/// Host memory that AdamW moves per bf16 parameter, which is what profiles count.
const BF16_TRAFFIC: f64 = 26.0;
/// The same over NVMe where its states live there, read and written.
const BF16_STATES: f64 = 20.0;
/// AdamW on a GPU whose rate is not known, parameters per second: a low figure for cards with HBM.
const DEVICE_UPDATE: f64 = 50e9;
/// What a step computes.
#[derive(Clone, Copy, Debug)]
pub struct Compute {
    /// Tokens (or other items) of all forwards of a step together, of each rank.
    pub tokens: u64,
    /// Arithmetic that the model sustains on the device, per second.
    pub flops: f64,
    /// Seconds of a step's forwards and backwards, in place of tokens and flops.
    pub seconds: Option<f64>,
    /// Whether blocks are computed again in the backward.
    pub recompute: bool,
    /// Forwards and backwards before each update.
    pub passes: u32,
}

/// Whether the GPU is to make all updates.
pub(super) fn lanes_alone(config: &Config) -> bool {
    config.updates.0 == UpdateOn::Gpu
}

/// The rates of a profile, or none if it was not measured for such a device.
pub(super) fn rates(profile: &Profile, gpu: bool, threads: u32) -> Option<Rates> {
    let on_host = profile.device.name == "host";
    if gpu == on_host || profile.device.host_to_device <= 0.0 || profile.memory.adamw_params <= 0.0 {
        return None;
    }
    // Those of ranks at once are sums: each has a GPU of its own, and the processors in common.
    let each = |rate: f64| if gpu { rate / f64::from(profile.ranks()) } else { rate };
    let known = |rate: f64, else_| if rate > 0.0 { rate } else { else_ };
    // Rates of threads add up until the memory is saturated, which may take fewer threads than there are.
    let all = profile.memory.adamw_params;
    let one = known(profile.memory.adamw_params_one_thread, all / f64::from(profile.memory.threads.max(1)));
    let share = (one * f64::from(threads) / all).min(1.0);
    let nvme = |rate: f64| known(rate, f64::MIN_POSITIVE);
    Some(Rates {
        up: each(profile.device.host_to_device),
        down: each(profile.device.device_to_host),
        both: each(known(profile.device.bidirectional, profile.device.host_to_device + profile.device.device_to_host)),
        nvme_read: nvme(profile.nvme.read),
        nvme_write: nvme(profile.nvme.write),
        // At the rate of updates that stream: some disks serve those better than single reads and writes in turn.
        nvme_both: nvme(known(profile.nvme.adamw_params * BF16_STATES, profile.nvme.read_write)),
        update: profile.memory.adamw_params * BF16_TRAFFIC * share,
        update_beside: known(profile.memory.adamw_params_beside_copies, 0.7 * profile.memory.adamw_params)
            * BF16_TRAFFIC
            * share,
        device_update: match on_host {
            true => profile.memory.adamw_params * share,
            false => known(each(profile.device.adamw_params), DEVICE_UPDATE),
        },
        shared: on_host.then_some(threads.max(1)),
    })
}

/// The seconds of each unit's windows: two operations per parameter and token forward, four backward, two more where
/// blocks are computed again. None if neither `seconds` nor `flops` says how fast that is.
pub(super) fn work(layout: &Layout, uses: Uses, compute: Compute, config: &Config) -> Option<Work> {
    #[expect(clippy::cast_precision_loss, reason = "a prediction is no bookkeeping")]
    let size = |u: UnitId| -> f64 {
        let elems: u64 = layout.unit(u).sections.iter().filter(|s| s.dtype.trainable()).map(|s| s.elems).sum();
        if uses.backward[u.index()] { elems as f64 } else { 0.0 }
    };
    let sizes: Vec<f64> = layout.ids().map(size).collect();
    let all: f64 = sizes.iter().sum();
    let again = if compute.recompute { 1.0 } else { 0.0 };
    #[expect(clippy::cast_precision_loss, reason = "as above")]
    let total = match compute.seconds {
        Some(seconds) => seconds,
        None if compute.flops > 0.0 => all * 2.0 * (3.0 + again) * compute.tokens as f64 / compute.flops,
        None => return None,
    };
    let per_pass = total / (3.0 + again) / f64::from(uses.passes);
    let part = |times: f64| sizes.iter().map(|s| if all > 0.0 { s / all * per_pass * times } else { 0.0 }).collect();
    Some(Work { forward: part(1.0), backward: part(2.0 + again), rest: 0.0, uses, lanes_alone: lanes_alone(config) })
}
