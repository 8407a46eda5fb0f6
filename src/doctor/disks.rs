//! The checks of paths and of the I/O engine.

use std::{path::Path, process::Command, time::Duration};

use crate::{
    doctor::{Check, child, drive},
    io::{DirectIo, EngineChoice, EngineOptions, FileSystem, free_bytes, open_engine, probe_directory},
    quantities::ByteCount,
};

/// Less than this is hardly room for any model's states.
const LITTLE: ByteCount = ByteCount::gib(16);
/// Percent of a drive's rated endurance from which on it should be watched.
const WORN: u64 = 80;

pub(super) fn checks(dir: &Path) -> Vec<Check> {
    let name = format!("path {}", dir.display());
    let probe = match probe_directory(dir, DirectIo::Preferred) {
        Ok(probe) => probe,
        Err(e) => return vec![Check::failed(name, &e)],
    };
    let drive = drive::of(dir);
    let mut checks = vec![match probe.file_system {
        FileSystem::Unusual(kind) => Check::warn(
            &name,
            format!("{kind}: expect less bandwidth than from a local drive"),
            "Use a directory on a local drive (in a container: mount a volume).",
        ),
        _ if !drive.in_memory.is_empty() => Check::warn(
            &name,
            drive.in_memory.clone(),
            "Use a directory on a local drive: pages would stay in host memory, and count against its limit.",
        ),
        _ if drive.rotational && !drive.is_virtual => Check::warn(
            &name,
            format!("{}: it spins", drive.describe()),
            "Use an NVMe drive: a spinning disk moves a few percent of its bandwidth.",
        ),
        _ => Check::okay(&name, drive.describe()),
    }];
    checks.push(if probe.direct {
        Check::okay("  direct I/O", "works, aligned to 4096 (written and read back)")
    } else {
        let refusal = probe.notes.iter().find(|note| note.contains("FN-W604"));
        Check::warn(
            "  direct I/O",
            refusal.map_or("refused", |note| note.split(';').next().unwrap_or(note)),
            "Use a directory on a local ext4 or XFS file system: buffered I/O counts against the memory limit.",
        )
    });
    checks.push(match free_bytes(dir) {
        Err(e) => Check::failed("  free space", &e),
        Ok(free) if free < LITTLE.0 => Check::warn(
            "  free space",
            ByteCount(free).to_string(),
            "Free some, or use another drive: AdamW's states need 10 bytes per parameter.",
        ),
        Ok(free) => Check::okay("  free space", ByteCount(free).to_string()),
    });
    checks.extend(wear(&drive));
    checks
}

/// What `smartctl` says, where it is installed and allowed to read the drive.
fn wear(drive: &drive::Drive) -> Option<Check> {
    let node = drive::node(drive).filter(|_| drive.name.starts_with("nvme"))?;
    let answer = child::output(Command::new("smartctl").args(["-j", "-A"]).arg(node), Duration::from_secs(10));
    let used = answer.ok().and_then(|text| percentage_used(&text));
    Some(match used {
        None => Check::okay("  wear", "not readable (needs smartctl, and root)"),
        Some(used) if used >= WORN => Check::warn(
            "  wear",
            format!("{used} % of its rated endurance is used up"),
            "Plan for a new drive, or keep the states in host memory: training writes 10 bytes per parameter and step.",
        ),
        Some(used) => Check::okay("  wear", format!("{used} % of its rated endurance")),
    })
}

/// The drive's own estimate in `smartctl -j -A`.
fn percentage_used(text: &str) -> Option<u64> {
    let report: serde_json::Value = serde_json::from_str(text).ok()?;
    report.get("nvme_smart_health_information_log")?.get("percentage_used")?.as_u64()
}

/// Whether io_uring works, by making a ring and reading and writing through it.
pub(super) fn io_uring() -> Check {
    let options = EngineOptions { choice: EngineChoice::IoUring, queue_depth: 4, ..EngineOptions::default() };
    match open_engine(&options, Vec::new(), &[], drop) {
        Ok(_) => Check::okay("io_uring", "works (written and read through a ring)"),
        Err(e) => {
            let action = e.next_action().unwrap_or_default().trim_end_matches("Or set nvme.engine = \"auto\".").trim();
            let profile = if action.contains("seccomp") {
                " `funicular doctor --write-seccomp FILE` writes such a profile."
            } else {
                ""
            };
            let found = format!("{} The engine `threads` is used instead.", e.message());
            Check::warn("io_uring", found, format!("{action}{profile}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn wear_is_read_from_smartctl() {
        let text = r#"{"nvme_smart_health_information_log": {"percentage_used": 7, "media_errors": 0}}"#;
        assert_eq!(percentage_used(text), Some(7));
        assert_eq!(percentage_used("{}"), None);
        assert_eq!(percentage_used("smartctl: not allowed"), None);
    }

    #[test]
    fn a_path_that_cannot_be_used_fails_with_its_action() {
        let checks = checks(Path::new("/no/such/directory"));
        assert_eq!(checks.len(), 1);
        assert_eq!(checks[0].status, Status::Fail);
        assert!(checks[0].found.starts_with("FN-E604") && checks[0].action.is_some(), "{checks:?}");
    }
}
