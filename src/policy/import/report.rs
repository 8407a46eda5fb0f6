//! What an import made of a file: the policy, and why for every key.

use std::{collections::BTreeSet, fmt};

use super::rewrite::Half;
use crate::{
    error::Result,
    policy::{
        Policy,
        source::{Node, Source, Value},
    },
    text::misleads,
};

/// Parts of notes that say that what is offloaded cannot be told.
const NOT_TOLD: &[&str] =
    &["speaks of offloading", "the script computes which file", "makes the rest of the configuration"];

/// How much of a statement is shown, in characters.
const MAX_STATEMENT: usize = 120;

/// A key of the imported file and what became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Dotted key as the file has it; empty if something is missing from the file.
    pub key: String,
    /// Its value, shortened.
    pub value: String,
    /// The file, if it is another one than [`Imported::name`].
    pub file: Option<String>,
    /// Line of the file, from 1.
    pub line: Option<usize>,
    /// What it became, or why it was left out, or what is to be decided.
    pub note: String,
}

/// An imported configuration. `Display` gives a policy file with the three lists as comments.
#[derive(Clone, Debug)]
pub struct Imported {
    /// Name of the file.
    pub name: String,
    /// The policy that results.
    pub policy: Policy,
    /// Keys that the policy now says.
    pub mapped: Vec<Item>,
    /// Keys that have no meaning here, and why.
    pub ignored: Vec<Item>,
    /// Keys that a person has to decide about.
    pub undecided: Vec<Item>,
    /// Another file that this one refers to for its settings (accelerate's `deepspeed_config_file`).
    pub refers_to: Option<String>,
    /// Whether that is a file of FSDP's settings, not DeepSpeed's.
    pub(in crate::policy) refers_to_fsdp: bool,
    /// What the file says of the number format, for the file that it refers to.
    pub(super) half: Option<Half>,
}

/// A key with its value, found in the file.
#[derive(Clone, Copy)]
pub(super) struct Found<'a> {
    pub(super) key: &'a str,
    pub(super) node: &'a Node,
}

impl Imported {
    pub(super) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            policy: Policy::default(),
            mapped: Vec::new(),
            ignored: Vec::new(),
            undecided: Vec::new(),
            refers_to: None,
            refers_to_fsdp: false,
            half: None,
        }
    }

    /// Every list in the order of the file.
    pub(super) fn sort(&mut self) {
        for list in [&mut self.mapped, &mut self.ignored, &mut self.undecided] {
            list.sort_by_key(|item| item.line.unwrap_or(usize::MAX));
        }
    }

    fn items(&self) -> impl Iterator<Item = &Item> {
        [&self.mapped, &self.ignored, &self.undecided].into_iter().flatten()
    }

    /// Adds what a file said that names this one; its keys come first.
    pub(super) fn preceded_by(mut self, outer: Self) -> Self {
        let file = Some(outer.name);
        let lists = [
            (&mut self.mapped, outer.mapped),
            (&mut self.ignored, outer.ignored),
            (&mut self.undecided, outer.undecided),
        ];
        for (list, before) in lists {
            list.extend(before.into_iter().map(|item| Item { file: file.clone(), ..item }));
            list.sort_by_key(|item| (item.file.is_none(), item.line.unwrap_or(usize::MAX)));
        }
        self
    }

    /// Whether it is said where parameters or states live.
    pub(super) fn says_homes(&self) -> bool {
        let auto = Policy::default();
        let tiers = ["params.tier = ", "optimizer.tier = "];
        let said = self.mapped.iter().any(|item| tiers.iter().any(|tier| item.note.contains(tier)));
        said || (self.policy.params.tier, self.policy.optimizer.tier) != (auto.params.tier, auto.optimizer.tier)
    }

    /// Says so if nothing is offloaded, or if that cannot be told.
    pub(super) fn settle(&mut self) {
        if self.says_homes() {
            return;
        }
        let unclear = self.undecided.iter().any(|item| {
            let speaks = |text: &str| {
                ["offload", "deepspeed", "fsdp"].iter().any(|word| text.to_ascii_lowercase().contains(word))
            };
            let key = item.key.rsplit('.').take(2).any(speaks);
            let statement = item.key.is_empty() && item.line.is_some();
            if statement || NOT_TOLD.iter().any(|part| item.note.contains(part)) {
                return true;
            }
            (key || speaks(&item.value)) && !item.key.ends_with("stage")
        });
        self.undecided.push(Item::missing(match unclear {
            true => "what the file offloads cannot be told from it; set params.tier and optimizer.tier",
            false => "the file offloads nothing by itself; params.tier and optimizer.tier stay \"auto\"",
        }));
    }

    /// The policy as TOML, only what differs from the defaults.
    ///
    /// # Errors
    /// As for [`Policy::to_toml`].
    pub fn toml(&self) -> Result<String> {
        self.policy.to_toml_short()
    }
}

impl Item {
    pub(super) fn new(source: &Source<'_>, found: Found<'_>, note: impl Into<String>) -> Self {
        let line = found.node.span.as_ref().map(|span| source.locate(span.start).0);
        Self { key: found.key.to_owned(), value: shown(found.node), file: None, line, note: note.into() }
    }

    /// A statement of a script.
    pub(super) fn statement(source: &Source<'_>, node: &Node, why: &str) -> Self {
        let found = Found { key: "", node };
        let Value::Code(text) = &node.value else { return Self::new(source, found, why) };
        let short: String = text.chars().take(MAX_STATEMENT).collect();
        let dots = if text.chars().count() > MAX_STATEMENT { "..." } else { "" };
        let note = format!("`{short}{dots}` {why}");
        Self { value: String::new(), ..Self::new(source, found, note) }
    }

    pub(super) fn missing(note: impl Into<String>) -> Self {
        Self { key: String::new(), value: String::new(), file: None, line: None, note: note.into() }
    }

    fn write(&self, f: &mut fmt::Formatter<'_>, joint: &str) -> fmt::Result {
        let file = self.file.as_ref().map_or_else(String::new, |file| format!("{file} "));
        let place = self.line.map_or_else(String::new, |line| format!("{file}line {line}: "));
        let setting = if self.key.is_empty() { String::new() } else { format!("{} = {}{joint}", self.key, self.value) };
        comment(f, &format!("  {place}{setting}{}", self.note))
    }
}

impl fmt::Display for Imported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let others: BTreeSet<&str> = self.items().filter_map(|item| item.file.as_deref()).collect();
        let others: String = others.iter().map(|name| format!(", which {name} names")).collect();
        comment(f, &format!("Imported from {}{others}", self.name))?;
        let lists = [
            ("mapped", &self.mapped, " -> "),
            ("ignored because", &self.ignored, ": "),
            ("needs a decision", &self.undecided, ": "),
        ];
        for (title, items, joint) in lists {
            writeln!(f, "#\n# {title} ({}):", items.len())?;
            for item in items {
                item.write(f, joint)?;
            }
        }
        writeln!(f)?;
        match self.toml() {
            Ok(toml) => f.write_str(&toml),
            Err(error) => writeln!(f, "# {error}"),
        }
    }
}

/// Writes a comment of one line, also if `text` holds a line feed, as a key of the file may.
fn comment(f: &mut fmt::Formatter<'_>, text: &str) -> fmt::Result {
    let line: String = text.chars().map(|c| if misleads(c) { ' ' } else { c }).collect();
    writeln!(f, "# {line}")
}

/// A value on one line, tables and long texts shortened.
fn shown(node: &Node) -> String {
    match &node.value {
        Value::Null => "null".to_owned(),
        Value::Bool(b) => b.to_string(),
        Value::Integer(n) => n.to_string(),
        Value::Float(x) if x.abs() >= 1e6 => format!("{x:e}"),
        Value::Float(x) => x.to_string(),
        Value::Text(text) => {
            let short: String = text.chars().take(60).flat_map(char::escape_default).collect();
            let dots = if text.chars().count() > 60 { "..." } else { "" };
            format!("\"{short}{dots}\"")
        }
        Value::List(items) if items.len() <= 4 => {
            format!("[{}]", items.iter().map(shown).collect::<Vec<_>>().join(", "))
        }
        Value::List(items) => format!("[{} items]", items.len()),
        Value::Table(entries) if entries.is_empty() => "{}".to_owned(),
        Value::Table(_) => "{...}".to_owned(),
        Value::Code(code) => code.chars().take(60).collect(),
    }
}
