//! `funicular.json`: what a checkpoint consists of, and the checksum of every piece of it.

use std::{collections::BTreeMap, path::Path};

use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

use crate::error::{Code, Error, Result};

/// File name of the manifest. A directory without it is no checkpoint of this project.
pub const MANIFEST: &str = "funicular.json";
/// What this version writes and reads.
pub const VERSION: u32 = 1;
/// Bytes of a tensor under one checksum.
pub const PIECE: u64 = 4 << 20;

const FORMAT: &str = "funicular-checkpoint";
const BLANK: &str = "0000000000000000";

/// A file of tensors.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ShardFacts {
    /// File name.
    pub name: String,
    /// Bytes.
    pub bytes: u64,
    /// Whether it belongs to the optimizer.
    pub optimizer: bool,
    /// Checksum of the header, its length included.
    pub header: String,
    /// Checksums of each tensor's pieces.
    pub tensors: BTreeMap<String, Vec<String>>,
}

/// A small file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FileFacts {
    /// File name.
    pub name: String,
    /// Bytes.
    pub bytes: u64,
    /// Checksum of the file.
    pub checksum: String,
}

/// The manifest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// Says that this is one.
    pub format: String,
    /// Version of the format.
    pub version: u32,
    /// Checksum of this file, with zeros in place of these digits.
    pub checksum: String,
    /// Who wrote it.
    pub written_by: String,
    /// Nanoseconds since 1970.
    pub created: u64,
    /// Kind of checksum.
    pub checksums: String,
    /// Bytes of a tensor under one checksum.
    pub piece: u64,
    /// Files of tensors.
    pub shards: Vec<ShardFacts>,
    /// Other files.
    pub files: Vec<FileFacts>,
    /// What the wrapper needs: steps, groups, random states, policy, and what the user gave.
    pub training: serde_json::Value,
}

#[derive(Deserialize)]
struct Head {
    format: String,
    version: u32,
}

/// A checksum as text.
pub(super) fn hex(sum: u64) -> String {
    format!("{sum:016x}")
}

/// The checksum of some bytes.
pub(super) fn sum(bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot(bytes)
}

impl Manifest {
    /// A new one, without files.
    pub fn new(training: serde_json::Value) -> Self {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self {
            format: FORMAT.to_owned(),
            version: VERSION,
            checksum: BLANK.to_owned(),
            written_by: format!("funicular {}", env!("CARGO_PKG_VERSION")),
            created: since.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)),
            checksums: "xxh3-64".to_owned(),
            piece: PIECE,
            shards: Vec::new(),
            files: Vec::new(),
            training,
        }
    }

    /// Its text, with its checksum filled in.
    pub fn encode(&self) -> Vec<u8> {
        let blank = Self { checksum: BLANK.to_owned(), ..self.clone() };
        let text = serde_json::to_string_pretty(&blank).unwrap_or_default();
        let found = format!("\"checksum\": \"{}\"", hex(sum(text.as_bytes())));
        text.replacen(&format!("\"checksum\": \"{BLANK}\""), &found, 1).into_bytes()
    }

    /// Reads its text; `path` is what errors call it.
    ///
    /// # Errors
    /// `FN-E405` for another version, `FN-E406` for damage.
    pub fn decode(bytes: &[u8], path: &Path) -> Result<Self> {
        let damaged = |why: String| {
            Error::new(Code::CheckpointDamaged, format!("{}: {why}.", path.display()))
                .action("Load another checkpoint; `funicular checkpoint verify` says which are whole.")
        };
        let head: Head = serde_json::from_slice(bytes).map_err(|e| damaged(e.to_string()))?;
        if head.format != FORMAT {
            return Err(damaged(format!("its format is '{}', not '{FORMAT}'", head.format)));
        }
        if head.version != VERSION {
            let (is, action) = match head.version < VERSION {
                true => {
                    ("older", "Load it with the version of funicular that wrote it, and save it anew with this one.")
                }
                false => ("newer", "Upgrade funicular."),
            };
            let text = format!(
                "{}: version {} of the format; {is} than {VERSION}, which this funicular reads.",
                path.display(),
                head.version
            );
            return Err(Error::new(Code::CheckpointVersion, text).action(action));
        }
        let manifest: Self = serde_json::from_slice(bytes).map_err(|e| damaged(e.to_string()))?;
        let text = String::from_utf8_lossy(bytes);
        let blank = text.replacen(
            &format!("\"checksum\": \"{}\"", manifest.checksum),
            &format!("\"checksum\": \"{BLANK}\""),
            1,
        );
        let actual = hex(sum(blank.as_bytes()));
        if actual != manifest.checksum {
            return Err(damaged(format!("its checksum is {actual}, it says {}", manifest.checksum)));
        }
        Ok(manifest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Manifest {
        let mut manifest = Manifest::new(serde_json::json!({ "step": 7, "lr": 0.1 }));
        manifest.files.push(FileFacts { name: "config.json".into(), bytes: 2, checksum: hex(sum(b"{}")) });
        manifest
    }

    #[test]
    fn survives_the_trip() {
        let read = Manifest::decode(&sample().encode(), Path::new("m")).expect("reads");
        assert_eq!(read.training["step"], 7);
        assert_eq!(read.files[0].name, "config.json");
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let text = sample().encode();
        for at in 0..text.len() * 8 {
            let mut bad = text.clone();
            bad[at / 8] ^= 1 << (at % 8);
            let error = Manifest::decode(&bad, Path::new("m")).expect_err("one bit differs");
            assert!(matches!(error.code(), Code::CheckpointDamaged | Code::CheckpointVersion), "{error}");
        }
    }

    #[test]
    fn another_version_says_so() {
        for (version, word) in [(0, "older"), (2, "newer")] {
            let text = String::from_utf8(sample().encode()).expect("text");
            let other = text.replace("\"version\": 1", &format!("\"version\": {version}"));
            let error = Manifest::decode(other.as_bytes(), Path::new("m")).expect_err("another version");
            assert_eq!(error.code(), Code::CheckpointVersion);
            assert!(error.to_string().contains(word), "{error}");
        }
    }
}
