//! Policies out of other systems' configurations.
//!
//! I1: every key of the file is in exactly one list: mapped, ignored because, needs a decision.
//! I2: nothing is guessed silently; an alias, a misplaced section, a string for a number is said in the note.
//! I3: broken syntax is an error, and so is a format that is not known; a value of the wrong kind needs a decision.
//! I4: a file that speaks of offloading is never said to offload nothing.

mod accelerate;
mod aio;
mod blocks;
mod deepspeed;
mod edits;
mod fsdp;
mod kinds;
mod lightning;
mod mentions;
mod python;
mod report;
mod rewrite;
mod rules;
mod scalar;
mod sizes;
mod trainer;
mod training;
mod yaml;

use super::{
    parse_json::{self, Dialect},
    parse_toml,
    source::{Node, Source, Value},
};
use crate::error::{Code, Result};
use blocks::{Beside, Parts};
use kinds::Kind;
use report::Found;
use rewrite::{Around, Rewrite};

pub use report::{Imported, Item};

/// What the file does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// The model's hidden size, from which the Hugging Face Trainer computes `"auto"` sizes.
    pub hidden_size: Option<u64>,
}

/// Imports a DeepSpeed configuration (`ds_config.json`, or the `aio` block that `ds_nvme_tune` prints), of any keys.
///
/// # Errors
/// `FN-E501` with line, column and caret if it is not JSON, `FN-E503` if it is not an object.
pub fn deepspeed(text: &str, name: &str, hints: Hints) -> Result<Imported> {
    let source = Source::new(name, text);
    let node = json(&source, text)?;
    let mut out = deepspeed::import(&source, &node, Around { hints, ..Around::default() });
    out.settle();
    Ok(out)
}

/// Imports a file of any format that is known, by what is in it. How it is written is told by its name's ending (`.json`,
/// `.yaml`, `.toml`, `.py`), else by its text. If it names a DeepSpeed file, [`Imported::refers_to`] has its path.
///
/// # Errors
/// `FN-E501` with line, column and caret if it is not what its name says, `FN-E503` if it has no keys, `FN-E507` if its
/// format is not known.
pub fn any(text: &str, name: &str, hints: Hints) -> Result<Imported> {
    let source = Source::new(name, text);
    let ending = name.rsplit('.').next().unwrap_or_default().to_ascii_lowercase();
    let braces = text.trim_start_matches(['\u{feff}', ' ', '\t', '\r', '\n']).starts_with(['{', '/']);
    match ending.as_str() {
        "json" | "jsonc" | "hjson" | "json5" => {
            let node = json(&source, text)?;
            blocks::import(&source, Parts::Documents(&[node]), Beside::default(), hints)
        }
        "yaml" | "yml" => documents(&source, text, hints),
        "toml" => {
            let node = parse_toml::parse(&source, text)?;
            table(&source, &node)?;
            blocks::import(&source, Parts::Documents(&[node]), Beside::default(), hints)
        }
        "py" => script(&source, text, hints),
        _ if braces => {
            let node = json(&source, text);
            node.and_then(|node| blocks::import(&source, Parts::Documents(&[node]), Beside::default(), hints))
                .or_else(|fault| script(&source, text, hints).map_err(|_| fault))
        }
        // No ending that tells: what can be read as YAML with keys is that, else it may be a script.
        _ => script(&source, text, hints).or_else(|fault| documents(&source, text, hints).map_err(|_| fault)),
    }
}

fn json(source: &Source<'_>, text: &str) -> Result<Node> {
    let node = parse_json::parse(source, text, Dialect::Relaxed)?;
    table(source, &node)?;
    Ok(node)
}

fn documents(source: &Source<'_>, text: &str, hints: Hints) -> Result<Imported> {
    let yaml::Parsed { documents, twice } = yaml::parse(source, text)?;
    for node in &documents {
        table(source, node)?;
    }
    let mut out = blocks::import(source, Parts::Documents(&documents), Beside::default(), hints)?;
    for (key, node) in &twice {
        let note = "is there again further down, which counts";
        out.ignored.push(Item::new(source, Found { key, node }, note));
    }
    out.sort();
    Ok(out)
}

fn script(source: &Source<'_>, text: &str, hints: Hints) -> Result<Imported> {
    let script = python::read(source, text);
    for entry in &script.statements {
        source.check_size(&entry.node)?;
    }
    let why = if script.fault.is_some() { python::UNREAD } else { python::TOO_LONG };
    // Only the name of a strategy, as a script gives it to `Trainer`.
    if let [only] = &script.statements[..]
        && let Value::Text(name) = &only.node.value
        && !name.ends_with(".json")
    {
        let mut to = Rewrite::new(source);
        lightning::strategy(&mut to, "strategy", name, &only.node);
        let mut out = to.finish(hints);
        out.settle();
        return Ok(out);
    }
    let beside = Beside {
        notes: &script.notes,
        speaking: &script.speaking,
        unread: script.unread.as_ref().map(|node| (node, why)),
    };
    let found = blocks::import(source, Parts::Statements(&script.statements), beside, hints);
    found.map_err(|unknown| script.fault.unwrap_or(unknown))
}

/// Imports a configuration of DeepSpeed or FSDP that another file names; `None` if it is none. Nothing of such a file may be
/// shown before it is known to be one: the file that names it may come from elsewhere.
pub(super) fn referred(text: &str, name: &str, outer: Imported, hints: Hints) -> Option<Imported> {
    let source = Source::new(name, text);
    let node = parse_json::parse(&source, text, Dialect::Relaxed).ok()?;
    table(&source, &node).ok()?;
    let kind = match outer.refers_to_fsdp {
        // FSDP's file says little else but how to shard: any keys make one, if one of them is FSDP's.
        true => Kind::Fsdp,
        false => Kind::of(&node).filter(|kind| matches!(kind, Kind::DeepSpeed | Kind::Zero | Kind::Fsdp))?,
    };
    if outer.refers_to_fsdp && !fsdp::is_section(&node) {
        return None;
    }
    let mut to = Rewrite::new(&source);
    if kind == Kind::Fsdp {
        // What the file around it offloads counts.
        to.own.policy = outer.policy.clone();
    }
    to.half.clone_from(&outer.half);
    if let Some(half) = &mut to.half {
        half.item.file = Some(outer.name.clone());
    }
    blocks::into(&mut to, "", &node, kind);
    let inner = if kind == Kind::Fsdp { to.finish_without() } else { to.finish(hints) };
    let mut out = inner.preceded_by(outer);
    out.settle();
    Some(out)
}

/// A table of keys, or a list that has one.
fn table(source: &Source<'_>, node: &Node) -> Result<()> {
    source.check_size(node)?;
    let what = match &node.value {
        Value::Table(_) => return Ok(()),
        Value::List(items) if items.iter().any(|item| matches!(item.value, Value::Table(_))) => return Ok(()),
        Value::List(_) => "a list without one",
        _ => "a single value",
    };
    let what = format!("a configuration is a table of keys and values, and this is {what}");
    let error = source.error(Code::PolicyValue, node.span.as_ref(), &what);
    Err(error.action("Give the file that has the settings."))
}
