//! `funicular.json`: what a checkpoint consists of, and the checksum of every piece of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use twox_hash::XxHash3_64;

use crate::{
    checkpoint::folder::is_plain,
    error::{Code, Error, Result},
};

/// File name of the manifest. A directory without it is no checkpoint of this project.
pub const MANIFEST: &str = "funicular.json";
/// What this version writes and reads.
pub const VERSION: u32 = 1;
/// Bytes of a tensor under one checksum.
pub const PIECE: u64 = 4 << 20;
/// The largest manifest: that of some 20 TiB of tensors.
pub(super) const LONGEST: u64 = 256 << 20;
/// The largest small file, and the largest header that the format of safetensors allows.
pub(super) const LONGEST_FILE: u64 = 100_000_000;

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
    /// The text is kept as it is: numbers would change on their way through another representation.
    pub training: Box<RawValue>,
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
    pub fn new(training: Box<RawValue>) -> Self {
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
        manifest.check_names().map_err(damaged)?;
        Ok(manifest)
    }

    /// Names of files and nothing else, each once, and no shard of a set left out.
    fn check_names(&self) -> std::result::Result<(), String> {
        let mut seen = BTreeSet::from([MANIFEST]);
        for name in self.names() {
            if !is_plain(name) {
                return Err(format!("it names '{name}', which is not the name of a file in its directory"));
            }
            if !seen.insert(name) {
                return Err(format!("it names '{name}' twice"));
            }
        }
        complete(self.shards.iter().map(|s| s.name.as_str()))
    }

    /// The names of all files but the manifest.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        let shards = self.shards.iter().map(|s| s.name.as_str());
        shards.chain(self.files.iter().map(|f| f.name.as_str()))
    }

    /// The step that the training was at.
    pub(super) fn step(&self) -> Option<u64> {
        #[derive(Deserialize)]
        struct Step {
            step: u64,
        }
        serde_json::from_str::<Step>(self.training.get()).ok().map(|s| s.step)
    }

    /// Bytes of the model's files, or of the optimizer's, or of both.
    pub(super) fn bytes(&self, optimizer: Option<bool>) -> u64 {
        let of_set = self.shards.iter().filter(|s| optimizer.is_none_or(|o| s.optimizer == o));
        of_set.fold(0, |total, shard| total.saturating_add(shard.bytes))
    }
}

/// Fails if of files called `STEM-00001-of-00003.safetensors` and so on one is not among the names.
pub(super) fn complete<'a>(names: impl Iterator<Item = &'a str>) -> std::result::Result<(), String> {
    let mut sets: BTreeMap<(&str, u64), BTreeSet<u64>> = BTreeMap::new();
    for name in names {
        if let Some((stem, number, count)) = numbered(name) {
            sets.entry((stem, count)).or_default().insert(number);
        }
    }
    for ((stem, count), numbers) in sets {
        if let Some(lost) = (1..=count).find(|n| !numbers.contains(n)) {
            return Err(format!("of {count} files '{stem}-*.safetensors' number {lost} is not named"));
        }
    }
    Ok(())
}

/// The stem, the number and the count in the name of one of several shards.
fn numbered(name: &str) -> Option<(&str, u64, u64)> {
    let (rest, count) = name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let digits = |text: &str| text.len() >= 2 && text.bytes().all(|b| b.is_ascii_digit());
    (digits(number) && digits(count)).then(|| Some((stem, number.parse().ok()?, count.parse().ok()?)))?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(text: &str) -> Box<RawValue> {
        RawValue::from_string(text.to_owned()).expect("JSON")
    }

    fn sample() -> Manifest {
        let mut manifest = Manifest::new(raw(r#"{"step":7,"lr":0.30000000000000004}"#));
        manifest.files.push(FileFacts { name: "config.json".into(), bytes: 2, checksum: hex(sum(b"{}")) });
        manifest
    }

    #[test]
    fn survives_the_trip() {
        let read = Manifest::decode(&sample().encode(), Path::new("m")).expect("reads");
        assert_eq!(read.step(), Some(7));
        assert_eq!(read.training.get(), sample().training.get(), "to the letter");
        assert_eq!(read.files[0].name, "config.json");
    }

    #[test]
    fn names_are_those_of_files_in_the_directory() {
        for name in ["../x", "/abs", "/dev/zero", "a/b", "", "..", "nul\0", MANIFEST, "config.json"] {
            let mut forged = sample();
            forged.files.push(FileFacts { name: name.into(), bytes: 0, checksum: hex(0) });
            let error = Manifest::decode(&forged.encode(), Path::new("m")).expect_err("refused");
            assert_eq!(error.code(), Code::CheckpointDamaged, "{name}");
        }
    }

    #[test]
    fn no_shard_is_left_out() {
        let shards = |names: &[&'static str]| complete(names.iter().copied());
        assert_eq!(shards(&["model.safetensors", "other-of-02.safetensors"]), Ok(()));
        assert_eq!(shards(&["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"]), Ok(()));
        assert!(shards(&["m-00001-of-00002.safetensors"]).is_err());
        assert!(shards(&["m-00001-of-18446744073709551615.safetensors"]).is_err());
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
