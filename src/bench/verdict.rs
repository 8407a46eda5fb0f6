//! What the figures mean: the limit of each hop, and what binds training on this machine.

use crate::{
    bench::{
        Options,
        memory::{ADAMW_TRAFFIC, STATE_BYTES},
        pipeline::{DOWN_BYTES, UP_BYTES},
        report::{FIO, Hop, Load, fastest, find},
        stats::as_f64,
        sweeps::Settings,
    },
    policy::format_size,
    quantities::ByteCount,
};

/// Bytes per parameter of `train_traffic` as it counts them.
const TRAFFIC: u64 = 2 * STATE_BYTES + UP_BYTES + DOWN_BYTES;

/// What is so many times as fast as the slowest binds nearly as much.
const NEAR: f64 = 1.2;

/// Sets the limit of every hop that has one.
pub(super) fn set_limits(hops: &mut [Hop]) {
    let (with_nvme, _) = loads(hops, 1);
    let mut limits: Vec<(&str, String, Vec<f64>)> = Vec::new();
    for (name, by) in [
        ("nvme_to_device", "nvme_read"),
        ("nvme_to_device", "host_to_device"),
        ("device_to_nvme", "nvme_write"),
        ("device_to_nvme", "device_to_host"),
        ("adamw_cpu", "host_memory"),
        ("adamw_gpu", "device_memory"),
    ] {
        limits.extend(measured(hops, by).map(|hop| (name, by.to_owned(), hop.rates(1.0))));
    }
    for load in &with_nvme {
        let Some(hop) = measured(hops, &load.hop) else { continue };
        let in_bytes = |of: u64| hop.rates(as_f64(of) / as_f64(load.bytes));
        limits.push(("train_traffic", load.hop.clone(), in_bytes(TRAFFIC)));
        if ["nvme_read_write", "adamw_cpu"].contains(&load.hop.as_str()) {
            limits.push(("adamw_nvme", load.hop.clone(), in_bytes(2 * STATE_BYTES)));
        }
    }
    if on_host(hops) {
        // A copy by the processor reads a byte and writes one.
        for name in ["host_to_device", "device_to_host", "bidirectional"] {
            limits.extend(measured(hops, "host_memory").map(|hop| (name, "host_memory".to_owned(), hop.rates(0.5))));
        }
    }
    for hop in hops {
        for (name, by, rates) in &limits {
            if *name == hop.name {
                hop.limited(by.as_str(), rates);
            }
        }
        if let Some(line) = hop.line_rate {
            hop.limited("PCIe line rate", &[line]);
        }
        let fio = std::mem::take(&mut hop.fio_rates);
        hop.limited(FIO, &fio);
        hop.fio_rates = fio;
    }
}

/// Whether the device is the processor.
fn on_host(hops: &[Hop]) -> bool {
    find(hops, "host_to_device").is_some_and(|hop| hop.place.starts_with("host"))
}

/// The hop that stands for a name: memory is as fast as the fastest way to use it.
pub(super) fn measured<'a>(hops: &'a [Hop], name: &str) -> Option<&'a Hop> {
    if name == "host_memory" { fastest(hops, name) } else { find(hops, name) }
}

/// What a step loads, slowest first: with states on NVMe, and with states in host memory. Each of several ranks copies all parameters up; the
/// rest they share, and none has anything on NVMe.
pub(super) fn loads(hops: &[Hop], ranks: u32) -> (Vec<Load>, Vec<Load>) {
    let up = UP_BYTES * u64::from(ranks);
    // On the host device a copy is made by the processor: a byte is read and one is written.
    let copies = (up + DOWN_BYTES) * if on_host(hops) { 2 } else { 1 };
    let load = |hop: &str, bytes: u64| {
        let rate = measured(hops, hop)?.rate();
        Some(Load { hop: hop.to_owned(), bytes, params_per_second: rate / as_f64(bytes) })
    };
    let of = |nvme: bool| {
        let disk = if nvme { 2 * STATE_BYTES } else { 0 };
        let mut loads: Vec<Load> = [
            load("host_to_device", up),
            load("device_to_host", DOWN_BYTES),
            load("adamw_cpu", ADAMW_TRAFFIC),
            load("host_memory", ADAMW_TRAFFIC + copies + disk),
        ]
        .into_iter()
        .flatten()
        .collect();
        if nvme {
            loads.extend(load("nvme_read_write", disk));
        }
        loads.sort_by(|a, b| a.params_per_second.total_cmp(&b.params_per_second));
        loads
    };
    let with_nvme = if ranks == 1 && find(hops, "nvme_read_write").is_some() { of(true) } else { Vec::new() };
    (with_nvme, of(false))
}

/// What binds: the slowest, and all that are so near to it that another run might name them.
fn binding(loads: &[Load]) -> Option<(String, &Load)> {
    let first = loads.first()?;
    let near = loads.iter().filter(|load| load.params_per_second < NEAR * first.params_per_second);
    let mut names: Vec<&str> = near.map(|load| load.hop.as_str()).collect();
    names.sort_unstable();
    let together = if names.len() > 1 { " (within a fifth of each other)" } else { "" };
    Some((format!("{}{together}", names.join(" and ")), first))
}

/// The verdict in words, for a person.
pub(super) fn sentences(
    hops: &[Hop],
    settings: Option<&Settings>,
    with_nvme: &[Load],
    in_memory: &[Load],
    options: &Options,
) -> Vec<String> {
    let mut out = Vec::new();
    if let Some((names, load)) = binding(with_nvme) {
        let mut text = format!(
            "With AdamW's states on NVMe, training here is bound by {names}: the {} bytes of {} per parameter and step at {:.2} GB/s allow {} \
             parameters per second, so a step of 1e9 parameters takes at least {:.1} s.",
            load.bytes,
            load.hop,
            measured(hops, &load.hop).map_or(0.0, Hop::rate) / 1e9,
            millions(load.params_per_second),
            1e9 / load.params_per_second,
        );
        if let Some(limit) = find(hops, "train_traffic").and_then(|hop| hop.limit.as_ref()) {
            text += &if limit.is_exceeded() {
                format!(" All hops at once were faster than that: {} was measured too low.", limit.by)
            } else {
                format!(" All hops at once reached {:.0} % of that.", limit.fraction.min(1.0) * 100.0)
            };
        }
        out.push(text);
    }
    if let Some((names, load)) = binding(in_memory) {
        out.push(format!(
            "With the states in host memory it is bound by {names}: {} parameters per second, {:.2} s for 1e9, unless the device computes \
             longer than that.",
            millions(load.params_per_second),
            1e9 / load.params_per_second,
        ));
    }
    out.extend(settings.map(|settings| better_settings(settings, options)));
    out
}

fn millions(rate: f64) -> String {
    if rate >= 1e9 { format!("{:.2}e9", rate / 1e9) } else { format!("{:.0}e6", rate / 1e6) }
}

/// Whether another block and depth is faster.
fn better_settings(settings: &Settings, options: &Options) -> String {
    match settings {
        Settings::Best => format!(
            "No other block or depth of the sweep is faster beyond the noise than {} and {}: leave [nvme] as it is.",
            format_size(options.block),
            options.depth
        ),
        Settings::Faster(best, now) => {
            let (block, depth) = (format_size(ByteCount(best.block)), best.depth);
            format!(
                "Faster, in turns with the present setting: {block} at depth {depth}, {:.2} GB/s read and {:.2} written (not {:.2} and {:.2}). In \
                 the policy: [nvme] block = \"{block}\", queue_depth = {depth}.",
                best.read / 1e9,
                best.write / 1e9,
                now.read / 1e9,
                now.write / 1e9,
            )
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::bench::{
        report::{Figure, Group},
        sweeps::Setting,
    };

    pub(in crate::bench) fn hop(name: &str, rate: f64) -> Hop {
        let figure = Figure {
            bytes_per_second: rate,
            low: rate,
            high: rate,
            spread: 0.0,
            rates: vec![rate],
            bytes: 1,
            p50_us: 1.0,
            p99_us: 2.0,
            params_per_second: None,
            copied_per_second: None,
            per_rank: Vec::new(),
        };
        Hop {
            name: name.to_owned(),
            place: "cuda:0, pinned".to_owned(),
            group: Group::Nvme,
            figure: Some(figure),
            skipped: None,
            block: Some(1 << 20),
            depth: Some(32),
            engine: None,
            direct: None,
            line_rate: None,
            limit: None,
            fio: None,
            fio_bytes_per_second: None,
            fio_rates: Vec::new(),
        }
    }

    fn all() -> Vec<Hop> {
        [
            ("nvme_read", 7e9),
            ("nvme_read_write", 6e9),
            ("host_to_device", 55e9),
            ("device_to_host", 50e9),
            ("host_memory", 104e9),
            ("adamw_cpu", 78e9),
            ("nvme_to_device", 6.3e9),
            ("train_traffic", 7.02e9),
        ]
        .map(|(name, rate)| hop(name, rate))
        .into()
    }

    #[test]
    fn a_pipeline_is_limited_by_its_slowest_hop() {
        let mut hops = all();
        hops.iter_mut().filter(|hop| hop.name == "host_to_device").for_each(|hop| hop.line_rate = Some(63e9));
        set_limits(&mut hops);
        let limit = |name: &str| find(&hops, name).and_then(|hop| hop.limit.clone()).expect("a limit");
        let relay = limit("nvme_to_device");
        assert_eq!((relay.by.as_str(), relay.bytes_per_second), ("nvme_read", 7e9));
        assert!((relay.fraction - 0.9).abs() < 1e-9);
        let traffic = limit("train_traffic");
        assert_eq!(traffic.by, "nvme_read_write");
        assert!((traffic.fraction - 0.9).abs() < 1e-9, "{}", traffic.fraction);
        assert_eq!(limit("host_to_device").by, "PCIe line rate");
        assert_eq!(limit("adamw_cpu").fraction, 0.75);
        assert_eq!(find(&hops, "nvme_read").and_then(|hop| hop.limit.clone()), None);
    }

    #[test]
    fn the_verdict_names_what_binds() {
        let hops = all();
        let (with_nvme, in_memory) = loads(&hops, 1);
        assert_eq!(with_nvme[0].hop, "nvme_read_write");
        assert_eq!(with_nvme[0].params_per_second, 3e8);
        // 78 GB/s at 26 bytes, and 104 GB/s at 32: the processor is slower.
        assert_eq!(in_memory[0].hop, "adamw_cpu");
        let said = sentences(&hops, None, &with_nvme, &in_memory, &Options::new(Vec::new(), true));
        assert!(said[0].contains("bound by nvme_read_write: the 20 bytes") && said[0].contains("300e6"), "{said:?}");
        // host_memory needs 32 bytes for 26: 3.25e9 parameters per second are within a fifth of 3.00e9.
        assert!(said[1].contains("bound by adamw_cpu and host_memory (within"), "{said:?}");
        assert!(said[1].contains("3.00e9") && said.len() == 2, "{said:?}");
    }

    #[test]
    fn a_part_of_a_limit_is_never_more_than_all_of_it() {
        let said = |traffic: f64| {
            let mut hops = all();
            hops.retain(|hop| hop.name != "train_traffic");
            hops.push(hop("train_traffic", traffic));
            set_limits(&mut hops);
            let (with_nvme, in_memory) = loads(&hops, 1);
            sentences(&hops, None, &with_nvme, &in_memory, &Options::new(Vec::new(), true)).swap_remove(0)
        };
        assert!(said(7.02e9).ends_with("reached 90 % of that."), "{}", said(7.02e9));
        assert!(said(8.4e9).ends_with("reached 100 % of that."), "{}", said(8.4e9));
        assert!(said(30e9).ends_with("nvme_read_write was measured too low."), "{}", said(30e9));
    }

    #[test]
    fn a_setting_is_named_only_if_it_was_faster_in_turns() {
        let options = Options::new(Vec::new(), false);
        assert!(better_settings(&Settings::Best, &options).contains("leave [nvme] as it is"));
        let setting = |block, depth, rate| Setting { block, depth, read: rate, write: rate };
        let said = better_settings(&Settings::Faster(setting(4 << 20, 16, 2e9), setting(1 << 20, 32, 1e9)), &options);
        assert!(said.contains("block = \"4MiB\", queue_depth = 16") && said.contains("(not 1.00 and 1.00)"), "{said}");
    }

    #[test]
    fn of_several_ranks_each_copies_all_parameters_up() {
        let (with_nvme, in_memory) = loads(&all(), 4);
        let bytes = |name: &str| in_memory.iter().find(|load| load.hop == name).map(|load| load.bytes);
        assert!(with_nvme.is_empty());
        assert_eq!((bytes("host_to_device"), bytes("device_to_host")), (Some(16), Some(2)));
        assert_eq!((bytes("adamw_cpu"), bytes("host_memory")), (Some(26), Some(44)), "28 + 4 per rank");
    }

    #[test]
    fn nothing_is_said_about_disks_that_were_not_measured() {
        let hops: Vec<Hop> = all().into_iter().filter(|hop| !hop.name.starts_with("nvme")).collect();
        let (with_nvme, in_memory) = loads(&hops, 1);
        assert!(with_nvme.is_empty() && !in_memory.is_empty());
    }
}
