//! The kinds of values a policy holds: sizes with units, `"auto"`, words, devices, paths.

use std::{fmt, marker::PhantomData, path::PathBuf};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::suggest;
use crate::quantities::ByteCount;

/// Units of size and their bytes, the larger first within each family.
const UNITS: &[(&str, u64)] = &[
    ("B", 1),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("kB", 1_000),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
];

/// Largest count that a policy accepts for threads, queue depths and rows.
const MAX_COUNT: u32 = 4096;

/// Most directories that files are striped over.
const MAX_PATHS: usize = 256;

/// `"auto"`, or a value that holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Auto<T> {
    /// Left to the planner.
    #[default]
    Auto,
    /// Given.
    Set(T),
}

impl<T> Auto<T> {
    /// The value, if one was given.
    pub fn given(self) -> Option<T> {
        match self {
            Self::Auto => None,
            Self::Set(value) => Some(value),
        }
    }

    /// The value given, or this one.
    pub fn or(self, default: T) -> T {
        self.given().unwrap_or(default)
    }
}

/// A scalar as it is written in a policy.
pub trait Setting: Sized + Copy {
    /// What is expected, for messages.
    const EXPECTED: &'static str;
    /// From a string.
    ///
    /// # Errors
    /// What is wrong with it.
    fn from_text(text: &str) -> Result<Self, String>;
    /// From a number.
    ///
    /// # Errors
    /// What is wrong with it.
    fn from_integer(n: i64) -> Result<Self, String>;
    /// As written: text, or a number.
    fn write<S: Serializer>(self, to: S) -> Result<S::Ok, S::Error>;
}

impl Setting for ByteCount {
    const EXPECTED: &'static str = "a size with a unit such as \"4GiB\"";

    fn from_text(text: &str) -> Result<Self, String> {
        parse_size(text)
    }

    fn from_integer(n: i64) -> Result<Self, String> {
        Err(needs_unit(&n.to_string()))
    }

    fn write<S: Serializer>(self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&format_size(self))
    }
}

impl Setting for u32 {
    const EXPECTED: &'static str = "a whole number from 1 to 4096";

    fn from_text(text: &str) -> Result<Self, String> {
        if let Ok(n) = text.trim().parse::<i64>() {
            return Err(format!("\"{text}\" is a string; write the number {n} without quotes"));
        }
        Err(format!("\"{text}\" is not {}", Self::EXPECTED))
    }

    fn from_integer(n: i64) -> Result<Self, String> {
        match Self::try_from(n) {
            Ok(n) if (1..=MAX_COUNT).contains(&n) => Ok(n),
            _ => Err(format!("{n} is not {}", Self::EXPECTED)),
        }
    }

    fn write<S: Serializer>(self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u32(self)
    }
}

/// Reads a size such as `4GiB`, `512 MiB` or `1.5GB`; part of a byte is dropped.
///
/// # Errors
/// A sentence with what to write instead.
pub fn parse_size(text: &str) -> Result<ByteCount, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = (&text[..digits], text[digits..].trim());
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || part.contains('.') || (number.contains('.') && part.is_empty()) {
        return Err(format!("\"{text}\" is not {}", ByteCount::EXPECTED));
    }
    if unit.is_empty() {
        return Err(needs_unit(number));
    }
    let Some(&(_, scale)) = UNITS.iter().find(|(name, _)| *name == unit) else {
        return Err(unknown_unit(text, number, unit));
    };
    scaled(whole, part, scale).ok_or_else(|| format!("\"{text}\" is more than a file system holds"))
}

/// `whole.part` times `scale`, exactly, rounded down to a byte.
fn scaled(whole: &str, part: &str, scale: u64) -> Option<ByteCount> {
    let part = &part[..part.len().min(15)];
    let whole = whole.parse::<u64>().ok()?.checked_mul(scale)?;
    let fraction = if part.is_empty() { 0 } else { part.parse::<u64>().ok()? };
    let fraction = u128::from(fraction) * u128::from(scale) / 10u128.pow(u32::try_from(part.len()).ok()?);
    let bytes = whole.checked_add(u64::try_from(fraction).ok()?)?;
    (i64::try_from(bytes).is_ok()).then_some(ByteCount(bytes))
}

/// The message for a number without a unit. It suggests GiB for a small number, which is hardly meant as bytes, and
/// bytes for a large one.
fn needs_unit(number: &str) -> String {
    let suggestion = match number.parse::<u64>() {
        Ok(n) if n >= 1 << 20 => format_size(ByteCount(n)),
        _ => format!("{number}GiB"),
    };
    format!("a size needs a unit and {number} has none (did you mean \"{suggestion}\"?)")
}

fn unknown_unit(text: &str, number: &str, unit: &str) -> String {
    let names = || UNITS.iter().map(|(name, _)| *name);
    let guess = match unit.to_ascii_lowercase().as_str() {
        "k" => Some("KiB"),
        "m" => Some("MiB"),
        "g" => Some("GiB"),
        "t" => Some("TiB"),
        lower => names().find(|n| n.eq_ignore_ascii_case(lower)).or_else(|| suggest::nearest(unit, names())),
    };
    let hint = guess.map_or_else(String::new, |g| format!(" (did you mean \"{number}{g}\"?)"));
    format!("\"{text}\" has no known unit{hint}; units are {}", names().collect::<Vec<_>>().join(", "))
}

/// A size as a policy writes it, exactly: the largest unit that leaves a whole number.
pub fn format_size(size: ByteCount) -> String {
    let fits = |scale: u64| size.0 >= scale && size.0.is_multiple_of(scale);
    let best = |family: &[(&'static str, u64)]| family.iter().rev().find(|(_, s)| fits(*s)).copied();
    let (name, scale) = match (best(&UNITS[1..5]), best(&UNITS[6..])) {
        (Some(binary), Some(decimal)) if size.0 / decimal.1 < size.0 / binary.1 => decimal,
        (Some(unit), _) | (None, Some(unit)) => unit,
        (None, None) => UNITS[0],
    };
    format!("{}{name}", size.0 / scale)
}

/// Serde of a size that may not be `"auto"`.
pub(crate) mod size {
    use super::{ByteCount, Deserializer, Serializer, Setting, SettingVisitor};

    pub(crate) fn serialize<S: Serializer>(size: &ByteCount, to: S) -> Result<S::Ok, S::Error> {
        size.write(to)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<ByteCount, D::Error> {
        from.deserialize_any(SettingVisitor::new(""))
    }

    /// The size of a block of I/O: a power of two that disks and the buffer pool agree with.
    pub(crate) fn block<'de, D: Deserializer<'de>>(from: D) -> Result<ByteCount, D::Error> {
        let size = deserialize(from)?;
        if !size.0.is_power_of_two() || size < ByteCount::kib(4) || size > ByteCount::mib(256) {
            let text = super::format_size(size);
            let message = format!("{text} is not a power of two from 4KiB to 256MiB; 1MiB suits most drives");
            return Err(super::de::Error::custom(message));
        }
        Ok(size)
    }
}

impl<T: Setting> Serialize for Auto<T> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => to.serialize_str("auto"),
            Self::Set(value) => value.write(to),
        }
    }
}

impl<'de, T: Setting> Deserialize<'de> for Auto<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(WordOr::new("auto")).map(|given| given.map_or(Self::Auto, Self::Set))
    }
}

/// Reads a setting.
struct SettingVisitor<T> {
    also: &'static str,
    of: PhantomData<T>,
}

impl<T> SettingVisitor<T> {
    fn new(also: &'static str) -> Self {
        Self { also, of: PhantomData }
    }
}

impl<T: Setting> de::Visitor<'_> for SettingVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.also, T::EXPECTED)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        T::from_text(text).map_err(E::custom)
    }

    fn visit_i64<E: de::Error>(self, n: i64) -> Result<T, E> {
        T::from_integer(n).map_err(E::custom)
    }
}

/// Reads a setting, or a word that stands for none.
struct WordOr<T> {
    word: &'static str,
    of: PhantomData<T>,
}

impl<T> WordOr<T> {
    fn new(word: &'static str) -> Self {
        Self { word, of: PhantomData }
    }
}

impl<T: Setting> de::Visitor<'_> for WordOr<T> {
    type Value = Option<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\" or {}", self.word, T::EXPECTED)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Option<T>, E> {
        if text == self.word {
            return Ok(None);
        }
        if suggest::nearest(text, [self.word]).is_some() {
            return Err(E::custom(format!("\"{text}\" is not known (did you mean \"{}\"?)", self.word)));
        }
        T::from_text(text).map(Some).map_err(E::custom)
    }

    fn visit_i64<E: de::Error>(self, n: i64) -> Result<Option<T>, E> {
        T::from_integer(n).map(Some).map_err(E::custom)
    }
}

/// How many rows a block takes at a time: `"off"` (all) or a number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MicroBatch {
    /// All rows at once.
    #[default]
    Off,
    /// This many.
    Rows(u32),
}

impl Serialize for MicroBatch {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Off => to.serialize_str("off"),
            Self::Rows(n) => to.serialize_u32(*n),
        }
    }
}

impl<'de> Deserialize<'de> for MicroBatch {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(WordOr::new("off")).map(|given| given.map_or(Self::Off, Self::Rows))
    }
}

/// Which compute device to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The GPU that the model is on, else torch's current one, else the processor.
    #[default]
    Auto,
    /// The processor.
    Host,
    /// A CUDA device: this ordinal, or torch's current one.
    Cuda(Option<u32>),
}

impl Serialize for DeviceChoice {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => to.serialize_str("auto"),
            Self::Host => to.serialize_str("host"),
            Self::Cuda(None) => to.serialize_str("cuda"),
            Self::Cuda(Some(n)) => to.collect_str(&format_args!("cuda:{n}")),
        }
    }
}

impl<'de> Deserialize<'de> for DeviceChoice {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        match text.as_str() {
            "auto" => Ok(Self::Auto),
            "host" => Ok(Self::Host),
            "cuda" => Ok(Self::Cuda(None)),
            _ => match text.strip_prefix("cuda:").and_then(|n| n.parse().ok()) {
                Some(n) => Ok(Self::Cuda(Some(n))),
                None => {
                    let (name, number) =
                        text.split_at(text.find(|c: char| c == ':' || c.is_ascii_digit()).unwrap_or(text.len()));
                    let number = number.trim_start_matches(':').parse::<u32>();
                    let guess = match (suggest::meant(name, ["cuda"]), number) {
                        (Some(cuda), Ok(number)) => Some(format!("{cuda}:{number}")),
                        _ => suggest::meant(&text, ["auto", "host", "cuda", "cuda:0"]).map(str::to_owned),
                    };
                    let hint = guess.map_or_else(String::new, |g| format!(" (did you mean \"{g}\"?)"));
                    Err(de::Error::custom(format!("\"{text}\" is not one of auto, host, cuda, cuda:N{hint}")))
                }
            },
        }
    }
}

/// Reads directories: none empty, none twice, none with a leading `~`, which only a shell expands.
pub(crate) fn directories<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<PathBuf>, D::Error> {
    let paths = Vec::<String>::deserialize(from)?;
    if paths.len() > MAX_PATHS {
        return Err(de::Error::custom(format!("{} paths; at most {MAX_PATHS} are striped over", paths.len())));
    }
    for (at, path) in paths.iter().enumerate() {
        if path.trim().is_empty() {
            return Err(de::Error::custom("an empty path; name a directory on a local disk"));
        }
        if path.starts_with('~') {
            return Err(de::Error::custom(format!("\"{path}\": '~' is not expanded; write the whole path")));
        }
        let same = |other: &String| PathBuf::from(other).components().eq(PathBuf::from(path).components());
        if paths[..at].iter().any(same) {
            return Err(de::Error::custom(format!("\"{path}\" is there twice")));
        }
    }
    Ok(paths.into_iter().map(PathBuf::from).collect())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn reads_sizes_exactly() {
        for (text, bytes) in [
            ("4GiB", 4 << 30),
            ("512 MiB", 512 << 20),
            ("1.5GB", 1_500_000_000),
            ("0.1GiB", 107_374_182),
            ("0B", 0),
            ("7kB", 7000),
            ("2TB", 2_000_000_000_000),
            (" 1TiB ", 1 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(ByteCount(bytes)), "{text}");
        }
    }

    #[test]
    fn says_what_to_write_instead() {
        for (text, hint) in [
            ("12", "did you mean \"12GiB\"?"),
            ("4294967296", "did you mean \"4GiB\"?"),
            ("4gb", "did you mean \"4GB\"?"),
            ("4g", "did you mean \"4GiB\"?"),
            ("4GIB", "did you mean \"4GiB\"?"),
            ("4GiBs", "did you mean \"4GiB\"?"),
            ("4 parsecs", "units are B, KiB"),
            ("-4GiB", "is not a size"),
            ("1.GiB", "is not a size"),
            ("1.2.3GiB", "is not a size"),
            ("GiB", "is not a size"),
            ("", "is not a size"),
            ("99999999999TiB", "more than a file system holds"),
        ] {
            let error = parse_size(text).unwrap_err();
            assert!(error.contains(hint), "{text}: {error}");
        }
    }

    #[test]
    fn sizes_are_written_as_read() {
        for text in ["0B", "1B", "1023B", "1KiB", "4GiB", "1500MB", "3TiB", "2TB", "1GB", "1536MiB", "1000000001B"] {
            assert_eq!(format_size(parse_size(text).unwrap()), text, "{text}");
        }
    }
}
