//! The checks of the device, and the probe of how much memory can be page-locked for it.

use std::{process::Command, sync::Arc, time::Duration};

use crate::{
    device::{self, DeviceChoice, DeviceKind},
    doctor::{Check, Options, Status, child, facts},
    error::Result,
    machine::HostLimits,
    memory::HostRegion,
    quantities::ByteCount,
};

/// How much is locked at a time.
const STEP: ByteCount = ByteCount::mib(128);
/// Where the probe stops on its own.
const ENOUGH: ByteCount = ByteCount::gib(4);
/// Less than this leaves only a small ring of buffers.
const LITTLE: ByteCount = ByteCount::gib(1);

pub(super) fn checks(options: &Options) -> Vec<Check> {
    let kind = match facts::chosen(options.device) {
        Ok(kind) => kind,
        Err(e) => return vec![Check::failed("CUDA driver", &e)],
    };
    let mut checks = match kind {
        DeviceKind::Cuda(ordinal) => described(ordinal),
        DeviceKind::Host if options.device == DeviceChoice::Host => vec![Check::okay("GPU", "not asked for")],
        DeviceKind::Host => vec![Check::warn(
            "GPU",
            "no CUDA driver, or no device",
            "Install NVIDIA's driver (in a container: docker run --gpus all); without a GPU everything runs on the processor.",
        )],
    };
    if checks.iter().all(|check| check.status != Status::Fail) {
        checks.push(page_lock_limit(options, kind));
    }
    checks
}

#[cfg(feature = "cuda")]
fn described(ordinal: u32) -> Vec<Check> {
    let info = match device::cuda::device_info(ordinal) {
        Ok(info) => info,
        Err(e) => return vec![Check::failed(format!("GPU {ordinal}"), &e)],
    };
    let mut checks = vec![
        Check::okay(format!("GPU {ordinal}"), format!("{}, {} of {} free", info.name, info.free, info.total)),
        driver(info.driver, &crate::machine::text("/proc/driver/nvidia/version")),
        kernels(ordinal),
    ];
    let Some(link) = info.pcie else {
        checks.push(Check::okay("  PCIe", "the system does not tell"));
        return checks;
    };
    let found = format!(
        "{} x{} now, {} x{} at most (an idle device slows its link down)",
        link.current_speed, link.current_width, link.speed, link.width
    );
    checks.push(if link.current_width < link.width {
        Check::warn("  PCIe", found, "Seat the card in a slot with all lanes, and check the BIOS for bifurcation.")
    } else {
        Check::okay("  PCIe", found)
    });
    if let Some(node) = link.numa_node {
        checks.push(near(node, &crate::machine::text(format!("/sys/devices/system/node/node{node}/cpulist"))));
    }
    checks
}

/// The driver's own version, where its kernel module tells, and the newest CUDA that it serves.
#[cfg(feature = "cuda")]
fn driver(cuda: (u32, u32), module: &str) -> Check {
    let is_version = |word: &&str| word.contains('.') && word.split('.').all(|n| n.parse::<u32>().is_ok());
    let version = module.lines().next().and_then(|line| line.split_whitespace().find(is_version));
    let version = version.map_or_else(String::new, |version| format!("{version}, "));
    Check::okay("CUDA driver", format!("{version}CUDA {}.{}", cuda.0, cuda.1))
}

/// Whether the update can run on the device: by compiling and loading it.
#[cfg(feature = "cuda")]
fn kernels(ordinal: u32) -> Check {
    match device::open(DeviceChoice::Cuda(ordinal)).and_then(|device| device.prepare_updates()) {
        Ok(()) => Check::okay("  kernels", "compiled and loaded"),
        Err(e) => {
            let action = e.next_action().unwrap_or("See docs/errors.md for this code.").to_owned();
            Check::warn("  kernels", format!("{} {}", e.code().as_str(), e.message()), action)
        }
    }
}

#[cfg(not(feature = "cuda"))]
fn described(ordinal: u32) -> Vec<Check> {
    let e = device::open(DeviceChoice::Cuda(ordinal)).err();
    e.iter().map(|e| Check::failed(format!("GPU {ordinal}"), e)).collect()
}

/// Whether this process may run on the CPUs next to the device.
#[cfg(feature = "cuda")]
fn near(node: u32, cpus: &str) -> Check {
    use crate::machine::{allowed_cpus, cpu_list};
    let (near, allowed) = (cpu_list(cpus), allowed_cpus());
    if near.is_empty() || near.iter().any(|cpu| allowed.contains(cpu)) {
        return Check::okay("  NUMA node", node.to_string());
    }
    Check::warn(
        "  NUMA node",
        format!("{node}, whose CPUs ({cpus}) this process may not use"),
        format!("Run under numactl --cpunodebind={node} --membind={node}: copies across nodes are slower."),
    )
}

/// Tries in a child process, because a refusal can poison the driver for the rest of a process.
fn page_lock_limit(options: &Options, kind: DeviceKind) -> Check {
    const NAME: &str = "page-lock limit";
    let available = HostLimits::read().map_or(0, |limits| limits.available().0);
    let up_to = ByteCount((available / 4).min(ENOUGH.0) / STEP.0 * STEP.0);
    if up_to.0 == 0 {
        return Check::okay(NAME, format!("not tried: {} of memory are available", ByteCount(available)));
    }
    let Some((program, first)) = options.relaunch.split_first() else {
        return Check::okay(NAME, "not tried: this program cannot start itself again");
    };
    let device = match kind {
        DeviceKind::Host => "host".to_owned(),
        DeviceKind::Cuda(ordinal) => format!("cuda:{ordinal}"),
    };
    let mut command = Command::new(program);
    command.args(first).args(["page-lock", "--device", &device, "--up-to", &up_to.0.to_string()]);
    match child::output(&mut command, Duration::from_secs(60)).map(|text| text.trim().parse::<u64>()) {
        Ok(Ok(locked)) if locked >= up_to.0 => Check::okay(NAME, format!("{up_to} and more")),
        Ok(Ok(locked)) if kind == DeviceKind::Host => Check::warn(
            NAME,
            format!("{} can be locked", ByteCount(locked)),
            "ulimit -l unlimited, docker run --ulimit memlock=-1, or LimitMEMLOCK=infinity in the unit.",
        ),
        Ok(Ok(locked)) if locked < LITTLE.0 => Check::warn(
            NAME,
            format!("CUDA locks {} and no more", ByteCount(locked)),
            "Raise ulimit -l and the container's memory limit; under WSL2 this is a limit of the driver. Set budget.host to less.",
        ),
        Ok(Ok(locked)) => Check::okay(NAME, ByteCount(locked).to_string()),
        Ok(Err(_)) => {
            Check::warn(NAME, "the probe gave no number", "Run funicular page-lock by hand and report what it says.")
        }
        Err(why) => {
            Check::warn(NAME, format!("the probe failed: {why}"), "Run funicular page-lock by hand; see dmesg.")
        }
    }
}

/// Locks memory for a device, step by step, until it is refused or `up_to` is reached; how much it was. Meant for a
/// process of its own.
///
/// # Errors
/// Those of opening the device, or of memory itself.
pub fn page_lock(choice: DeviceChoice, up_to: ByteCount) -> Result<ByteCount> {
    let device = device::open(choice)?;
    let mut regions: Vec<Arc<HostRegion>> = Vec::new();
    while regions.len() as u64 * STEP.0 < up_to.0 {
        let region = HostRegion::new(STEP, "the page-lock probe")?;
        let locked = match device.kind() {
            DeviceKind::Host => region.lock(),
            DeviceKind::Cuda(_) => device.register(&region),
        };
        if locked.is_err() {
            break;
        }
        regions.push(region);
    }
    Ok(ByteCount(regions.len() as u64 * STEP.0))
}

#[cfg(all(test, feature = "cuda"))]
mod tests {
    use super::*;

    #[test]
    fn the_drivers_version_is_found_in_its_line() {
        let line = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs@x)  Mon\nGCC version: 13.2";
        assert_eq!(driver((13, 0), line).found, "580.65.06, CUDA 13.0");
        assert_eq!(driver((12, 8), "").found, "CUDA 12.8");
    }
}
