//! The machine's processors and their caches.

use std::{collections::BTreeMap, fs, path::Path};

use super::text;

/// How many CPUs the machine has.
pub(crate) fn online_cpus() -> u32 {
    cpu_list(&text("/sys/devices/system/cpu/online")).len() as u32
}

/// The numbers in `0-3,8`.
pub(crate) fn cpu_list(text: &str) -> Vec<u32> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.trim().parse().ok()?..=last.trim().parse().ok()?)
    };
    text.split(',').filter_map(range).flatten().collect()
}

/// CPUs this process may run on.
pub(crate) fn allowed_cpus() -> Vec<u32> {
    let status = text("/proc/self/status");
    status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).map(cpu_list).unwrap_or_default()
}

/// The processor's name.
pub(crate) fn cpu_model() -> String {
    model_in(&text("/proc/cpuinfo"))
}

fn model_in(cpuinfo: &str) -> String {
    let of =
        |key: &str| cpuinfo.lines().find_map(|line| line.strip_prefix(key)?.split_once(':').map(|(_, v)| v.trim()));
    of("model name").or_else(|| of("Model")).unwrap_or(std::env::consts::ARCH).to_owned()
}

/// Bytes of the caches of the last level, all together; 0 if unknown.
pub(crate) fn last_caches() -> u64 {
    last_caches_under(Path::new("/sys/devices/system/cpu"))
}

/// Bytes of the caches of the last level: each counts once, however many CPUs share it.
fn last_caches_under(cpus: &Path) -> u64 {
    let mut caches: BTreeMap<(u32, String), u64> = BTreeMap::new();
    let folders = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    for cpu in folders(cpus) {
        for cache in folders(&cpu.join("cache")) {
            let level = text(cache.join("level")).parse();
            if let (Ok(level), Some(size)) = (level, parse_cache_size(&text(cache.join("size")))) {
                caches.insert((level, text(cache.join("shared_cpu_list"))), size);
            }
        }
    }
    let last = caches.keys().map(|(level, _)| *level).max();
    caches.iter().filter(|((level, _), _)| Some(*level) == last).map(|(_, size)| size).sum()
}

/// `32768K` and the like, in bytes.
fn parse_cache_size(text: &str) -> Option<u64> {
    let (number, shift) = match text.strip_suffix('K') {
        Some(number) => (number, 10),
        None => (text.strip_suffix('M')?, 20),
    };
    number.parse::<u64>().ok().map(|n| n << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_the_kernel_are_read() {
        assert_eq!(model_in("processor\t: 0\nmodel name\t: ACME CPU @ 2GHz\n"), "ACME CPU @ 2GHz");
        assert_eq!(parse_cache_size("32768K"), Some(32 << 20));
        assert_eq!(parse_cache_size("1M"), Some(1 << 20));
        assert_eq!(parse_cache_size(""), None);
    }

    #[test]
    fn caches_of_the_last_level_are_added_up() {
        let dir = tempfile::tempdir().expect("a directory");
        for (cpu, shared) in [("cpu0", "0-1"), ("cpu1", "0-1"), ("cpu2", "2-3"), ("cpu3", "2-3")] {
            for (index, level, size, of) in [("index0", "1", "32K", cpu), ("index3", "3", "16M", shared)] {
                let folder = dir.path().join(cpu).join("cache").join(index);
                fs::create_dir_all(&folder).expect("makes");
                for (file, text) in [("level", level), ("size", size), ("shared_cpu_list", of)] {
                    fs::write(folder.join(file), text).expect("writes");
                }
            }
        }
        assert_eq!(last_caches_under(dir.path()), 32 << 20);
        assert_eq!(last_caches_under(&dir.path().join("none")), 0);
    }
}
