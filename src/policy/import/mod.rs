//! Policies out of other systems' configurations.
//!
//! I1: every key of the file is in exactly one list: mapped, ignored because, needs a decision.
//! I2: nothing is guessed silently; an alias, a misplaced section, a string for a number is said in the note.
//! I3: only broken syntax is an error; a value of the wrong kind needs a decision.

mod aio;
mod deepspeed;
mod others;
mod report;
mod rules;
mod scalar;
mod sizes;
mod training;
mod yaml;

use super::{
    parse_json::{self, Dialect},
    source::{Node, Source, Value},
};
use crate::error::{Code, Result};

pub use report::{Imported, Item};

/// What the file does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// The model's hidden size, from which the Hugging Face Trainer computes `"auto"` sizes.
    pub hidden_size: Option<u64>,
}

/// Imports a DeepSpeed configuration (`ds_config.json`, or the `aio` block that `ds_nvme_tune` prints).
///
/// # Errors
/// `FN-E501` with line, column and caret if it is not JSON, `FN-E503` if it is not an object.
pub fn deepspeed(text: &str, name: &str, hints: Hints) -> Result<Imported> {
    let source = Source::new(name, text);
    let node = parse_json::parse(&source, text, Dialect::Json)?;
    table(&source, &node)?;
    Ok(deepspeed::import(&source, &node, hints, &[]))
}

/// Imports an accelerate configuration (YAML). If it names a DeepSpeed file, [`Imported::refers_to`] has its path.
///
/// # Errors
/// `FN-E501` with line, column and caret if it is not YAML, `FN-E503` if it is not a mapping.
pub fn accelerate(text: &str, name: &str, hints: Hints) -> Result<Imported> {
    let source = Source::new(name, text);
    let node = yaml::parse(&source, text)?;
    table(&source, &node)?;
    Ok(others::accelerate(&source, &node, hints))
}

/// Imports the arguments of Lightning's `DeepSpeedStrategy`: JSON, a Python dict, the call itself, or
/// `Trainer(strategy="deepspeed_stage_3_offload")`.
///
/// # Errors
/// `FN-E501` with line, column and caret if it is none of these.
pub fn lightning(text: &str, name: &str, hints: Hints) -> Result<Imported> {
    let source = Source::new(name, text);
    let node = parse_json::parse(&source, text, Dialect::Python)?;
    match node.value {
        Value::Text(_) => source.check_size(&node)?,
        _ => table(&source, &node)?,
    }
    Ok(others::lightning(&source, &node, hints))
}

/// Imports any of them: by the name's ending (`.yaml`, `.yml`, `.py`), else by what is inside.
///
/// # Errors
/// As for the function it chooses.
pub fn any(text: &str, name: &str, hints: Hints) -> Result<Imported> {
    let ending = name.rsplit('.').next().unwrap_or_default().to_ascii_lowercase();
    let json = text.trim_start_matches(['\u{feff}', ' ', '\t', '\r', '\n']).starts_with('{');
    match ending.as_str() {
        "yaml" | "yml" => accelerate(text, name, hints),
        "py" => lightning(text, name, hints),
        _ if !json => lightning(text, name, hints),
        _ => {
            let source = Source::new(name, text);
            let node = parse_json::parse(&source, text, Dialect::Json)?;
            table(&source, &node)?;
            if others::is_lightning(&node) { lightning(text, name, hints) } else { deepspeed(text, name, hints) }
        }
    }
}

/// Imports a DeepSpeed configuration that another file names; `None` if it is none. Nothing of such a file may be shown before it
/// is known to be one: the file that names it may come from elsewhere.
pub(super) fn referred(text: &str, name: &str, hints: Hints) -> Option<Imported> {
    let source = Source::new(name, text);
    let node = parse_json::parse(&source, text, Dialect::Json).ok()?;
    table(&source, &node).ok()?;
    matches!(node.get("zero_optimization")?.value, Value::Table(_))
        .then(|| deepspeed::import(&source, &node, hints, &[]))
}

fn table(source: &Source<'_>, node: &Node) -> Result<()> {
    source.check_size(node)?;
    match node.value {
        Value::Table(_) => Ok(()),
        _ => Err(source.error(Code::PolicyValue, node.span.as_ref(), "a configuration is a table of keys and values")),
    }
}
