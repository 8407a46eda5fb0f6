//! What a directory's file system lies on, as the kernel tells.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::Serialize;

use crate::doctor::facts;

/// A block device. Empty where the kernel does not tell: layered and network file systems have none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Drive {
    /// The file system's name, such as `ext4`.
    pub file_system: String,
    /// The device's name in `/sys/block`, such as `nvme0n1`.
    pub name: String,
    /// Its model.
    pub model: String,
    /// It spins.
    pub rotational: bool,
    /// A virtual disk: what lies behind it, and whether its host caches, is not visible from here.
    pub is_virtual: bool,
    /// Why its transfers may end in this machine's memory even with direct I/O; empty if they do not.
    pub in_memory: String,
    /// Smallest transfer in bytes; 0 if unknown.
    pub logical_block: u64,
    /// Bytes per second of its PCIe link in one direction, as negotiated; none where it has no link of its own.
    pub line_rate: Option<u64>,
    /// Largest transfer the kernel makes of it, in bytes; 0 if unknown.
    pub max_transfer: u64,
}

impl Drive {
    /// In one line: `ext4 on nvme0n1 (Samsung SSD 990 PRO 2TB)`.
    pub fn describe(&self) -> String {
        let file_system = if self.file_system.is_empty() { "an unknown file system" } else { &self.file_system };
        let kind = match self {
            _ if !self.model.is_empty() => self.model.clone(),
            Self { is_virtual: true, .. } => "virtual disk".to_owned(),
            Self { rotational: true, .. } => "spinning disk".to_owned(),
            _ => String::new(),
        };
        match (self.name.is_empty(), kind.is_empty()) {
            (true, _) => file_system.to_owned(),
            (false, true) => format!("{file_system} on {}", self.name),
            (false, false) => format!("{file_system} on {} ({kind})", self.name),
        }
    }
}

/// Looks a directory up.
pub fn of(dir: &Path) -> Drive {
    let Ok(device) = crate::io::device_number(dir) else { return Drive::default() };
    let (major, minor) = (libc::major(device), libc::minor(device));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mount = parse_mount(&mounts, &format!("{major}:{minor}"));
    // Some file systems (btrfs) number themselves and name their device as the source of the mount.
    let node = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok().or_else(|| {
        let name = Path::new(&mount.as_ref()?.1).file_name()?.to_owned();
        fs::canonicalize(Path::new("/sys/class/block").join(name)).ok()
    });
    let file_system = mount.map(|(kind, _)| kind).unwrap_or_default();
    let Some(node) = node else { return Drive { file_system, ..Drive::default() } };
    // A partition lies in the folder of its disk.
    let disk =
        if node.join("partition").exists() { node.parent().map_or(node.clone(), Path::to_path_buf) } else { node };
    described(&disk, file_system)
}

fn described(disk: &Path, file_system: String) -> Drive {
    let read = |file: &str| fs::read_to_string(disk.join(file)).unwrap_or_default().trim().to_owned();
    let number = |file: &str| read(file).parse::<u64>().unwrap_or(0);
    let name = disk.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let in_memory = match &*name {
        // A loop device is a file: it is read through the page cache unless it was set up otherwise.
        loops if loops.starts_with("loop") && read("loop/dio") != "1" => {
            format!("{loops} is a file behind the page cache (losetup --direct-io=on avoids it)")
        }
        memory if ["ram", "zram", "pmem"].iter().any(|prefix| memory.starts_with(prefix)) => {
            format!("{memory} is memory")
        }
        _ => String::new(),
    };
    Drive {
        file_system,
        in_memory,
        model: read("device/model"),
        rotational: number("queue/rotational") == 1 && !["vd", "loop"].iter().any(|prefix| name.starts_with(prefix)),
        is_virtual: ["vd", "xvd", "nbd"].iter().any(|prefix| name.starts_with(prefix)),
        logical_block: number("queue/logical_block_size"),
        // An NVMe namespace's device is its controller, whose device is the PCIe function.
        line_rate: read("device/device/current_link_width")
            .parse()
            .ok()
            .and_then(|width| facts::line_rate(&read("device/device/current_link_speed"), width)),
        max_transfer: number("queue/max_sectors_kb") << 10,
        name,
    }
}

/// File system and source of the mount with this `major:minor`, from `/proc/self/mountinfo`.
fn parse_mount(mounts: &str, device: &str) -> Option<(String, String)> {
    mounts.lines().find_map(|line| {
        let (front, back) = line.split_once(" - ")?;
        (front.split(' ').nth(2)? == device).then_some(())?;
        let mut words = back.split(' ');
        Some((words.next()?.to_owned(), words.next()?.to_owned()))
    })
}

/// The device node of a drive, for tools that read its health.
pub fn node(drive: &Drive) -> Option<PathBuf> {
    (!drive.name.is_empty()).then(|| Path::new("/dev").join(&drive.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found_by_device_number() {
        let mounts = "22 1 0:20 / /proc rw shared:5 - proc proc rw\n\
                      30 1 259:2 / / rw,noatime shared:1 - ext4 /dev/nvme0n1p2 rw,errors=remount-ro\n\
                      31 30 0:44 /@home /home rw - btrfs /dev/sda1 rw\n";
        let found = |device| parse_mount(mounts, device);
        assert_eq!(found("259:2"), Some(("ext4".to_owned(), "/dev/nvme0n1p2".to_owned())));
        assert_eq!(found("0:44"), Some(("btrfs".to_owned(), "/dev/sda1".to_owned())));
        assert_eq!(found("8:1"), None);
    }

    #[test]
    fn a_disk_is_described_from_its_folder() {
        let dir = tempfile::tempdir().expect("a directory");
        let disk = dir.path().join("nvme7n1");
        for (file, text) in [
            ("device/model", "ACME 9000 "),
            ("queue/max_sectors_kb", "512"),
            ("queue/rotational", "0"),
            ("device/device/current_link_speed", "16.0 GT/s PCIe"),
            ("device/device/current_link_width", "4"),
        ] {
            std::fs::create_dir_all(disk.join(file).parent().expect("a parent")).expect("makes");
            std::fs::write(disk.join(file), text).expect("writes");
        }
        let drive = described(&disk, "xfs".to_owned());
        assert_eq!(drive.describe(), "xfs on nvme7n1 (ACME 9000)");
        assert_eq!((drive.max_transfer, drive.rotational, drive.is_virtual), (512 << 10, false, false));
        assert_eq!(drive.line_rate.map(|rate| rate / 100_000_000), Some(78));
        assert!(drive.in_memory.is_empty());
        let looped = dir.path().join("loop3");
        std::fs::create_dir_all(looped.join("loop")).expect("makes");
        for (dio, cached) in [("0", true), ("1", false)] {
            std::fs::write(looped.join("loop/dio"), dio).expect("writes");
            assert_eq!(!described(&looped, "ext4".to_owned()).in_memory.is_empty(), cached);
        }
        assert_eq!(described(Path::new("/dev/zram0"), "ext4".to_owned()).in_memory, "zram0 is memory");
        assert_eq!(described(Path::new("/nowhere/vda"), "ext4".to_owned()).describe(), "ext4 on vda (virtual disk)");
    }
}
