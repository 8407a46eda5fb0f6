//! What was measured on this machine, for the planner: `profile.toml`.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Code, Error, Result};

/// Rates of a machine, in bytes per second; 0 where nothing was measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Profile {
    /// Version of this file: 1.
    pub version: u32,
    /// When it was measured, in UTC.
    pub measured: String,
    /// On which machine.
    pub host: String,
    /// How many ranks measured at once, where there were several: rates are then sums over ranks, but for `adamw_params_one_thread` and
    /// those of disks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ranks: Option<u32>,
    /// The device and its link.
    pub device: DeviceRates,
    /// Host memory and the processor.
    pub memory: MemoryRates,
    /// All paths together.
    pub nvme: NvmeRates,
    /// Each path.
    #[serde(rename = "path")]
    pub paths: Vec<PathRates>,
}

/// Rates of a device's link.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DeviceRates {
    /// The device's name, or `host`.
    pub name: String,
    /// From page-locked memory up.
    pub host_to_device: f64,
    /// Down to page-locked memory.
    pub device_to_host: f64,
    /// Both at once, together.
    pub bidirectional: f64,
    /// Parameters per second of AdamW in bf16 on the device, with everything in its memory.
    pub adamw_params: f64,
    /// Bytes per second that copies within the device read and write, together.
    pub memory: f64,
}

/// Rates of host memory.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MemoryRates {
    /// The fastest of several kernels, all traffic counted.
    pub bandwidth: f64,
    /// Parameters per second of AdamW in bf16, alone.
    pub adamw_params: f64,
    /// The same on one thread.
    pub adamw_params_one_thread: f64,
    /// As `adamw_params`, while copies run in both directions of the link.
    pub adamw_params_beside_copies: f64,
    /// What those copies carried meanwhile, both directions together.
    pub copies_beside_adamw: f64,
    /// On so many threads.
    pub threads: u32,
}

/// Rates of all paths, striped.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NvmeRates {
    /// Reads alone.
    pub read: f64,
    /// Writes alone.
    pub write: f64,
    /// Both at once, together.
    pub read_write: f64,
    /// Parameters per second of AdamW in bf16 whose states pass through memory: 10 bytes of each in, 10 out.
    pub adamw_params: f64,
}

/// Rates of one path.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PathRates {
    /// The directory.
    pub path: String,
    /// Reads alone.
    pub read: f64,
    /// Writes alone.
    pub write: f64,
    /// Both at once, together.
    pub read_write: f64,
}

impl Profile {
    /// First line of the file.
    pub const HEADER: &'static str = "# Measured by funicular bench --save; rates in bytes per second.";

    /// How many processes measured at once.
    pub fn ranks(&self) -> u32 {
        self.ranks.unwrap_or(1).max(1)
    }

    /// Where it is kept: `funicular/profile.toml` in `$XDG_CONFIG_HOME`, or in `~/.config`. None without a home.
    pub fn default_path() -> Option<PathBuf> {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let config = set("XDG_CONFIG_HOME").or_else(|| set("HOME").map(|home| home.join(".config")))?;
        Some(config.join("funicular").join("profile.toml"))
    }

    /// Reads one.
    ///
    /// # Errors
    /// `FN-E504` when the file cannot be read, `FN-E501` when it is no profile of this version.
    pub fn read(path: &Path) -> Result<Self> {
        let text = super::read::read_text(path).map_err(|e| e.action("Measure with funicular bench --save."))?;
        let wrong = |why: String| {
            Error::new(Code::PolicySyntax, format!("{}: {why}.", path.display()))
                .action("Measure again with funicular bench --save.")
        };
        let profile: Self = toml::from_str(&text).map_err(|e| wrong(e.message().to_owned()))?;
        if profile.version == 1 { Ok(profile) } else { Err(wrong(format!("version {}, not 1", profile.version))) }
    }

    /// As text; [`Profile::read`] reads it back.
    ///
    /// # Errors
    /// `FN-E503` for a number that TOML cannot hold.
    pub fn to_toml(&self) -> Result<String> {
        let body = toml::to_string(self).map_err(|e| Error::new(Code::PolicyValue, format!("the profile: {e}.")))?;
        Ok(format!("{}\n{body}", Self::HEADER))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_back_what_it_wrote_and_nothing_else() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("profile.toml");
        let path = PathRates { path: "/nvme".to_owned(), read: 7.1e9, ..PathRates::default() };
        let profile = Profile { version: 1, paths: vec![path.clone(), path], ..Profile::default() };
        let text = profile.to_toml().expect("text");
        assert!(text.starts_with(Profile::HEADER) && text.contains("[[path]]"), "{text}");
        std::fs::write(&file, text).expect("writes");
        assert_eq!(Profile::read(&file).expect("reads"), profile);
        assert!(!profile.to_toml().expect("text").contains("ranks"), "one process says nothing of ranks");
        let several = Profile { ranks: Some(2), ..profile };
        std::fs::write(&file, several.to_toml().expect("text")).expect("writes");
        assert_eq!(Profile::read(&file).expect("reads"), several);
        // Keys that an older program did not measure are 0.
        std::fs::write(&file, "version = 1\n[memory]\nadamw_params = 2e9").expect("writes");
        let memory = Profile::read(&file).expect("reads").memory;
        assert_eq!((memory.adamw_params, memory.adamw_params_beside_copies), (2e9, 0.0));
        std::fs::write(&file, "version = 2").expect("writes");
        assert_eq!(Profile::read(&file).expect_err("another version").code(), Code::PolicySyntax);
        std::fs::write(&file, "version = 1\nspeed = 3").expect("writes");
        assert_eq!(Profile::read(&file).expect_err("another key").code(), Code::PolicySyntax);
        assert_eq!(Profile::read(&dir.path().join("none")).expect_err("missing").code(), Code::PolicyFile);
    }
}
