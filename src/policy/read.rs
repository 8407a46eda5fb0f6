//! Policies out of files and texts.

use std::{fs::File, io::Read, os::unix::fs::OpenOptionsExt, path::Path};

use super::{
    PRESETS, Policy, decode,
    import::{self, Hints},
    parse_json::{self, Dialect},
    parse_toml, schema,
    source::{Node, Source},
    suggest,
};
use crate::error::{Code, Error, Result};

/// Largest policy file that is read.
const MAX_FILE: u64 = 1 << 20;

impl Policy {
    /// The preset of that name, else the file: a file that is called like a preset is `./host`.
    ///
    /// # Errors
    /// As for [`Policy::from_file`].
    pub fn named(name: &str) -> Result<Self> {
        if PRESETS.contains(&name) { Self::preset(name) } else { Self::from_file(name) }
    }

    /// Reads a file: JSON if its name ends in `.json` or its text starts with `{`, else TOML.
    ///
    /// # Errors
    /// `FN-E504` if it cannot be read, `FN-E501` to `FN-E503` with file, line and column if it is not a policy.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let name = path.display().to_string();
        let text = read_text(path)?;
        Self::from_text(path, &name, &text).map_err(|error| foreign(error, &name, &text))
    }

    fn from_text(path: &Path, name: &str, text: &str) -> Result<Self> {
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
        match extension.as_str() {
            "json" => Self::from_json_str(text, name),
            "yaml" | "yml" => {
                Err(Error::new(Code::PolicyFile, format!("{name}: policies are TOML or JSON, not YAML."))
                    .action("For an accelerate or DeepSpeed file use 'funicular policy import'."))
            }
            _ if text.trim_start().starts_with('{') => Self::from_json_str(text, name),
            _ => Self::from_toml_str(text, name),
        }
    }

    /// Reads TOML; `name` stands for the file in errors.
    ///
    /// # Errors
    /// `FN-E501` to `FN-E503` with name, line and column.
    pub fn from_toml_str(text: &str, name: &str) -> Result<Self> {
        let source = Source::new(name, text);
        Self::from_node(&source, &parse_toml::parse(&source, text)?)
    }

    /// Reads JSON of the same schema; `name` stands for the file in errors.
    ///
    /// # Errors
    /// `FN-E501` to `FN-E503` with name, line and column.
    pub fn from_json_str(text: &str, name: &str) -> Result<Self> {
        let source = Source::new(name, text);
        Self::from_node(&source, &parse_json::parse(&source, text, Dialect::Json)?)
    }

    pub(super) fn from_node(source: &Source<'_>, node: &Node) -> Result<Self> {
        source.check_size(node)?;
        decode::decode(source, node, &schema::paths())
    }
}

/// Says so of another system's configuration where a policy was expected.
fn foreign(error: Error, name: &str, text: &str) -> Error {
    let known = || import::any(text, name, Hints::default()).is_ok();
    if ![Code::PolicySyntax, Code::PolicyKey, Code::PolicyValue].contains(&error.code()) || !known() {
        return error;
    }
    Error::new(error.code(), error.message()).action(format!(
        "This is another system's configuration: `funicular policy import {name} > policy.toml` makes a policy of it."
    ))
}

/// Opens a file to read it: a regular one, so that nothing waits for a pipe's writer or acts on a device. What the shell hands
/// over (`<(...)`, `/dev/stdin`) may be a pipe.
pub(crate) fn open_regular(path: &Path) -> std::io::Result<File> {
    if ["/dev/fd", "/dev/stdin", "/proc/self/fd"].iter().any(|handed| path.starts_with(handed)) {
        return File::open(path);
    }
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_file() || kind.is_dir() {
        return Ok(file);
    }
    Err(std::io::Error::other("not a regular file"))
}

/// The text of a file, with limits on its size and kind.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let fault = |e: &std::io::Error| {
        let hint = path.to_str().map_or_else(String::new, |name| suggest::did_you_mean(name, PRESETS.iter().copied()));
        let error = Error::new(Code::PolicyFile, format!("{}: {e}{hint}.", path.display()));
        let error = error.action(format!("Give the path of a policy file, or a preset: {}.", PRESETS.join(", ")));
        error.errno(e.raw_os_error())
    };
    let mut bytes = Vec::new();
    let file = open_regular(path).map_err(|e| fault(&e))?;
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(|e| fault(&e))?;
    if bytes.len() as u64 > MAX_FILE {
        let what = format!("{}: larger than 1 MiB, which no policy and no configuration is.", path.display());
        return Err(Error::new(Code::PolicyFile, what).action("Check the path."));
    }
    String::from_utf8(bytes).map_err(|e| {
        let (at, bytes) = (e.utf8_error().valid_up_to(), e.as_bytes());
        let encoding =
            if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) { "UTF-16" } else { "ENCODING" };
        Error::new(Code::PolicyFile, format!("{}: not UTF-8 at byte {at}.", path.display()))
            .action(format!("Save it as UTF-8, as `iconv -f {encoding} -t UTF-8` does, if it is a text."))
    })
}
