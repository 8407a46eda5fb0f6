//! The record that a private directory carries: which process made it. It proves that the directory is ours, and tells
//! whether its process is alive.

use std::{fs::File, io::Read, path::Path};

/// A record is a few short lines; more bytes than this are no record.
const LONGEST: u64 = 4096;

/// Who made a private directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Process number.
    pub pid: u32,
    /// When the process started, in clock ticks since boot.
    pub start: u64,
    /// The kernel's boot id; empty in records of versions that did not write it.
    pub boot: String,
    /// The machine's name, as `host_name` gives it.
    pub host: String,
}

impl Owner {
    /// The record of this process.
    pub fn this_process() -> Self {
        let pid = std::process::id();
        Self { pid, start: start_time(pid).unwrap_or(0), boot: boot_id(), host: host_name() }
    }

    /// Its text.
    pub fn encode(&self) -> String {
        format!("pid {}\nstart {}\nhost {}\nboot {}\n", self.pid, self.start, self.host, self.boot)
    }

    /// Reads a record; none if the text is not one.
    pub fn decode(text: &str) -> Option<Self> {
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Some(Self {
            pid: field("pid")?.parse().ok().filter(|&pid| pid > 0)?,
            start: field("start")?.parse().ok()?,
            host: field("host")?.to_owned(),
            boot: field("boot").unwrap_or_default().to_owned(),
        })
    }

    /// Reads a record from an open file; none if the file holds no record.
    pub fn read(file: &File) -> Option<Self> {
        let mut text = String::new();
        let read = file.take(LONGEST + 1).read_to_string(&mut text).ok()?;
        if read as u64 > LONGEST { None } else { Self::decode(&text) }
    }

    /// Whether the process that the record names runs on this machine now.
    pub fn is_alive(&self) -> bool {
        let this_boot = self.boot.is_empty() || self.boot == boot_id();
        self.host == host_name() && this_boot && start_time(self.pid) == Some(self.start)
    }
}

/// What a private directory's name says: `PREFIX HOST-PID-RANDOM`, with 16 digits of random.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrivateName {
    /// The machine's name.
    pub host: String,
    /// Process number.
    pub pid: u32,
}

impl PrivateName {
    /// Makes a name for this process.
    pub fn make(prefix: &str, random: u64) -> String {
        format!("{prefix}{}-{}-{random:016x}", host_name(), std::process::id())
    }

    /// Reads a name; none if [`Self::make`] did not make it.
    pub fn parse(prefix: &str, name: &str) -> Option<Self> {
        let mut parts = name.strip_prefix(prefix)?.rsplitn(3, '-');
        let random = parts.next()?;
        let pid = parts.next()?.parse().ok().filter(|&pid| pid > 0)?;
        let host = parts.next()?;
        let hex = random.len() == 16 && random.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        (hex && !host.is_empty()).then(|| Self { host: host.to_owned(), pid })
    }

    /// Whether a record and a name speak of the same process.
    pub fn fits(&self, owner: &Owner) -> bool {
        self.pid == owner.pid && self.host == owner.host
    }
}

/// This machine's name, in letters, digits, dots and `_` alone.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let clean: String =
        name.trim().chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '_' }).collect();
    if clean.is_empty() { "host".to_owned() } else { clean }
}

fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// When a process started, in clock ticks since boot; none if there is no such process.
fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).ok()?;
    // The name, in parentheses, may hold anything; what follows it are fields from the third on.
    let after_name = stat.rsplit_once(')')?.1;
    after_name.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_survives_and_this_process_is_alive() {
        let mine = Owner::this_process();
        assert_eq!(Owner::decode(&mine.encode()), Some(mine.clone()));
        assert!(mine.start > 0 && mine.is_alive());
        assert!(!Owner { start: mine.start + 1, ..mine.clone() }.is_alive(), "another process of that number");
        assert!(!Owner { boot: "another".into(), ..mine.clone() }.is_alive(), "before a restart");
        assert!(Owner { boot: String::new(), ..mine }.is_alive(), "a record of an older version");
    }

    #[test]
    fn what_is_no_record_is_none() {
        for text in ["", "me", "pid 1", "pid x\nstart 1\nhost a", "pid 0\nstart 1\nhost a", "pid 1\nstart 1"] {
            assert_eq!(Owner::decode(text), None, "{text}");
        }
    }

    #[test]
    fn names_are_told_from_the_users() {
        let name = PrivateName::make("funicular-", 0xabc);
        let parsed = PrivateName::parse("funicular-", &name).expect("ours");
        assert!(parsed.fits(&Owner::this_process()));
        for other in
            ["funicular-corpus", "funicular-x-1-0123", "funicular-a-b-0123456789abcdef", "funicular-1-0123456789abcdef"]
        {
            assert_eq!(PrivateName::parse("funicular-", other), None, "{other}");
        }
        let dashed = PrivateName::parse("funicular-", "funicular-a-b-7-0123456789abcdef").expect("a host with a dash");
        assert_eq!((dashed.host.as_str(), dashed.pid), ("a-b", 7));
    }
}
