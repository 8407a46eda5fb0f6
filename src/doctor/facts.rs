//! The machine and its device in a few facts, for the head of a report.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::{
    device::{DeviceChoice, DeviceKind},
    error::Result,
    machine::{self, HostLimits, text},
    quantities::ByteCount,
};

/// What stands at the top of every report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// Its name.
    pub host: String,
    /// The processor.
    pub cpu: String,
    /// CPUs this process may use.
    pub cpus: u32,
    /// Bytes of memory.
    pub memory: u64,
    /// Bytes that this process may still allocate.
    pub available: u64,
    /// Bytes of the caches of the last level, all together; 0 if unknown.
    pub cache: u64,
    /// The kernel.
    pub kernel: String,
    /// The device: the GPU's name, or `host`.
    pub device: String,
    /// Bytes per second that the device's link could carry in one direction, as negotiated.
    pub link_line_rate: Option<u64>,
}

impl Machine {
    /// Asks the kernel; `device` is the one in use.
    ///
    /// # Errors
    /// `FN-E202` if `/proc/meminfo` cannot be read.
    pub fn read(device: DeviceKind) -> Result<Self> {
        let limits = HostLimits::read()?;
        let (device, link_line_rate) = described(device);
        Ok(Self {
            host: text("/proc/sys/kernel/hostname"),
            cpu: machine::cpu_model(),
            cpus: limits.cpus,
            memory: limits.mem_total.0,
            available: limits.available().0,
            cache: machine::last_caches(),
            kernel: text("/proc/sys/kernel/osrelease"),
            device,
            link_line_rate,
        })
    }

    /// In one line.
    pub fn describe(&self) -> String {
        let Self { host, cpu, cpus, memory, kernel, device, .. } = self;
        format!("{host}: {cpu}, {cpus} CPUs, {}, Linux {kernel}, device {device}", ByteCount(*memory))
    }
}

#[cfg(feature = "cuda")]
fn described(device: DeviceKind) -> (String, Option<u64>) {
    let DeviceKind::Cuda(ordinal) = device else { return ("host".to_owned(), None) };
    match crate::device::cuda::device_info(ordinal) {
        Ok(info) => (info.name, info.pcie.and_then(|link| line_rate(&link.current_speed, link.current_width))),
        Err(_) => (format!("cuda:{ordinal}"), None),
    }
}

#[cfg(not(feature = "cuda"))]
fn described(_: DeviceKind) -> (String, Option<u64>) {
    ("host".to_owned(), None)
}

/// Bytes per second and direction of a link such as `32.0 GT/s PCIe` with so many lanes, after its line code.
pub fn line_rate(speed: &str, width: u32) -> Option<u64> {
    let gigatransfers: f64 = speed.split_whitespace().next()?.parse().ok()?;
    // Up to 5 GT/s ten bits carry a byte; above, 130 bits carry sixteen.
    let bits_per_byte = if gigatransfers > 5.0 { 8.0 * 130.0 / 128.0 } else { 10.0 };
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "about 1e11")]
    let rate = (gigatransfers * 1e9 / bits_per_byte * f64::from(width)) as u64;
    (rate > 0).then_some(rate)
}

/// The device that a choice leads to, without opening it.
///
/// # Errors
/// `FN-E002` when there is a driver and it does not start.
pub fn chosen(choice: DeviceChoice) -> Result<DeviceKind> {
    Ok(match choice {
        DeviceChoice::Host => DeviceKind::Host,
        DeviceChoice::Cuda(ordinal) => DeviceKind::Cuda(ordinal),
        DeviceChoice::Auto if cuda_count()? > 0 => DeviceKind::Cuda(0),
        DeviceChoice::Auto => DeviceKind::Host,
    })
}

#[cfg(feature = "cuda")]
pub(super) fn cuda_count() -> Result<u32> {
    crate::device::cuda::count()
}

#[cfg(not(feature = "cuda"))]
#[expect(clippy::unnecessary_wraps, reason = "the build with CUDA can fail here")]
pub(super) fn cuda_count() -> Result<u32> {
    Ok(0)
}

/// The moment in UTC: `2026-01-31T08:05:09Z`.
pub fn utc_now() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    utc(seconds)
}

/// Seconds since 1970 as a date, by the calendar's rule of 400 years.
fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Years that begin in March put the leap day last.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_827_696), "2000-02-29T12:34:56Z");
        assert_eq!(utc(1_798_761_599), "2026-12-31T23:59:59Z");
    }

    #[test]
    fn a_links_line_rate_is_after_its_code() {
        assert_eq!(line_rate("32.0 GT/s PCIe", 16).map(|r| r / 1_000_000_000), Some(63));
        assert_eq!(line_rate("5.0 GT/s PCIe", 4), Some(2_000_000_000));
        assert_eq!(line_rate("Unknown", 16), None);
        assert_eq!(line_rate("8.0 GT/s", 0), None);
    }
}
