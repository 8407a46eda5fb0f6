//! Scripts of Python: what they assign and call, as far as it can be read without running them.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    blocks,
    edits::{Edits, Line, Note},
    mentions,
};
use crate::{
    error::Error,
    policy::{
        parse_python::{parse_expression, quoted_length},
        source::{CALLEE, Entry, Node, Source, Value},
    },
};

/// Most statements of a script that are looked at.
const MAX_STATEMENTS: usize = 20_000;

/// Most statements that are shown because they speak of offloading, and words of each.
const MAX_SPEAKING: usize = 100;
const MAX_WORDS: usize = 40;

/// Deepest nesting that names are looked for in.
const MAX_DEPTH: usize = 16;

/// Most values that names are replaced by.
const MAX_COPIED: usize = 10_000;

/// What a script says.
pub(super) struct Script {
    /// Its assignments and calls that are literals, by name; those of calls are empty.
    pub(super) statements: Vec<Entry>,
    /// What it does with them that needs a decision.
    pub(super) notes: Vec<Note>,
    /// Its statements that speak of offloading.
    pub(super) speaking: Vec<Node>,
    /// Where reading ended before the script does.
    pub(super) unread: Option<Node>,
    /// The first thing in it that is no Python.
    pub(super) fault: Option<Error>,
}

/// Said of the statement at which reading ends, or after which it does.
pub(super) const UNREAD: &str =
    "is where reading ends, at a bracket that is never closed: it and what stands after it is not read";
pub(super) const TOO_LONG: &str =
    "is where reading ends, after 20000 statements: it and what stands after it is not read";

/// Reads a script.
pub(super) fn read(source: &Source<'_>, text: &str) -> Script {
    let (mut edits, mut blocks, mut fault) = (Edits::default(), Blocks::default(), None);
    let mut speaking = Vec::new();
    let mut at = if text.starts_with('\u{feff}') { '\u{feff}'.len_utf8() } else { 0 };
    for _ in 0..MAX_STATEMENTS {
        at += text[at..].len() - text[at..].trim_start_matches([' ', '\t', '\r', '\n', ';']).len();
        if at >= text.len() {
            break;
        }
        if text[at..].starts_with('#') {
            at += text[at..].find('\n').unwrap_or(text.len() - at);
            continue;
        }
        let target = target(&text[at..]);
        let start = at + target.as_ref().map_or(0, |t| t.length);
        match parse_expression(source, text, start) {
            Ok((node, end)) => {
                blocks.reach(text, at);
                let whole = without_comment(&text[at..end.max(at)]);
                let line =
                    Line { text: whole, start: at, conditional: blocks.conditional(), function: blocks.function() };
                let applied = take(&mut edits, source, &line, target, node);
                if !applied && speaks(whole) && speaking.len() < MAX_SPEAKING {
                    speaking.push(statement(whole, at));
                }
                blocks.enter(whole);
                at = end.max(start + 1).min(text.len());
                // What stands behind a `;` is a statement too.
                if !text[at..].trim_start_matches([' ', '\t']).starts_with(';') {
                    at += text[at..].find('\n').unwrap_or(0);
                }
            }
            Err(found) => {
                fault.get_or_insert(found);
                break;
            }
        }
    }
    let rest = text[at..].trim_start_matches([' ', '\t', '\r', '\n', ';']);
    let unread = text.len() - rest.len();
    let line = rest.lines().next().unwrap_or_default();
    let (statements, notes) = resolve(edits);
    Script { statements, notes, speaking, unread: (!line.is_empty()).then(|| statement(line, unread)), fault }
}

/// The text of a statement on one line, and where it stands.
fn statement(text: &str, at: usize) -> Node {
    let words: Vec<&str> = text.split_whitespace().take(MAX_WORDS).collect();
    Node { span: Some(at..at + text.len()), value: Value::Code(words.join(" ")) }
}

/// Whether a statement is about offloading; one that imports a name does nothing with it, and a text by itself neither.
fn speaks(text: &str) -> bool {
    let passive = ["import ", "from ", "\"", "'"].iter().any(|start| text.starts_with(start));
    !passive && text.to_ascii_lowercase().contains("offload")
}

/// A statement without the comment behind it.
fn without_comment(text: &str) -> &str {
    let mut at = 0;
    while let Some(c) = text[at..].chars().next() {
        match c {
            '"' | '\'' => at += quoted_length(&text[at..]),
            '#' if !text[at..].contains('\n') => return text[..at].trim_end(),
            c => at += c.len_utf8(),
        }
    }
    text
}

/// The blocks that a statement is in.
#[derive(Default)]
struct Blocks<'t> {
    /// Column, the first word, and the name of a function.
    open: Vec<(usize, Block<'t>)>,
    column: usize,
}

enum Block<'t> {
    Conditional,
    Function(&'t str),
    Other,
}

impl<'t> Blocks<'t> {
    /// Leaves the blocks that end before a statement.
    fn reach(&mut self, text: &str, at: usize) {
        let line = text[..at].rfind('\n').map_or(0, |end| end + 1);
        if text[line..at].trim_matches([' ', '\t', '\r', '\u{feff}']).is_empty() {
            self.column = at - line;
            self.open.retain(|(column, _)| *column < at - line);
        }
    }

    fn enter(&mut self, text: &'t str) {
        let first = text.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default();
        let rest = text.strip_prefix("async ").unwrap_or(text).trim_start();
        let block = match first {
            _ if !text.ends_with(':') => return,
            "if" if text.contains("__name__") => Block::Other,
            "if" | "elif" | "else" | "for" | "while" | "try" | "except" | "finally" | "match" | "case" => {
                Block::Conditional
            }
            _ if rest.starts_with("for ") => Block::Conditional,
            _ if let Some(name) = rest.strip_prefix("def ") => {
                Block::Function(name.split('(').next().unwrap_or_default().trim())
            }
            _ => Block::Other,
        };
        self.open.push((self.column, block));
    }

    fn conditional(&self) -> bool {
        self.open.iter().any(|(_, block)| matches!(block, Block::Conditional))
    }

    fn function(&self) -> Option<&'t str> {
        self.open.iter().rev().find_map(|(_, block)| match block {
            Block::Function(name) => Some(*name),
            _ => None,
        })
    }
}

/// The left side of an assignment.
struct Target {
    name: String,
    /// `name["a"]["b"]`.
    steps: Vec<String>,
    /// Bytes through the `=`.
    length: usize,
}

/// The target of a statement that assigns; `return` and `yield` have an empty name.
fn target(text: &str) -> Option<Target> {
    for word in ["return ", "yield ", "await "] {
        if text.starts_with(word) {
            return Some(Target { name: String::new(), steps: Vec::new(), length: word.len() });
        }
    }
    let line = text.lines().next().unwrap_or_default();
    let end = line.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == '.')).filter(|end| *end > 0)?;
    let mut rest = &line[end..];
    let mut steps = Vec::new();
    while let Some(inner) = rest.strip_prefix('[') {
        if steps.len() >= mentions::MAX_STEPS {
            return None;
        }
        let (step, after) = inner.split_once(']')?;
        let step = step.trim();
        let quoted = step.len() > 2 && step.starts_with(['"', '\'']) && step.ends_with(&step[..1]);
        steps.push(if quoted { step[1..step.len() - 1].to_owned() } else { return None });
        rest = after;
    }
    rest = rest.trim_start();
    if rest.starts_with(',') {
        // `engine, _ = ...`: what is called counts, and has no name.
        let at = line.find('=')?;
        let names = line[..at].chars().all(|c| c.is_alphanumeric() || "_.,* ".contains(c));
        return names.then(|| Target { name: String::new(), steps: Vec::new(), length: at + 1 });
    }
    if rest.starts_with(':') {
        // An annotation; one with a `=` in it is none that is written.
        rest = &rest[rest.find('=')?..];
    }
    let value = rest.strip_prefix('=').filter(|value| !value.starts_with('='))?;
    Some(Target { name: line[..end].to_owned(), steps, length: line.len() - value.len() })
}

/// True for a change of what is there that is applied.
fn take(edits: &mut Edits, source: &Source<'_>, line: &Line<'_>, target: Option<Target>, node: Node) -> bool {
    match target {
        None => return edits.other(source, line, node),
        Some(Target { name, .. }) if name.is_empty() => edits.value(line, node, line.text.starts_with("return")),
        Some(Target { name, steps, .. }) if steps.is_empty() => edits.assign(line, name, node),
        Some(Target { name, steps, .. }) => edits.edit(line, name, &steps, node),
    }
    false
}

/// Puts in place of a name what is assigned to it, where that is once. What was unpacked into others goes.
fn resolve(mut edits: Edits) -> (Vec<Entry>, Vec<Note>) {
    let mut names: BTreeMap<String, (usize, Node)> = BTreeMap::new();
    for Entry { key, node, .. } in edits.statements.iter().filter(|e| !e.key.is_empty()) {
        let (times, last) = names.entry(key.clone()).or_insert_with(|| (0, node.clone()));
        *times += 1 + usize::from(edits.conditional.contains(key));
        last.clone_from(node);
    }
    let mut statements = std::mem::take(&mut edits.statements);
    edits.statements.clone_from(&statements);
    let mut names = Names {
        of: names,
        edits: &edits,
        own: String::new(),
        left: MAX_COPIED,
        unpacked: BTreeSet::new(),
        here: BTreeSet::new(),
    };
    // What is unpacked into a configuration is a part of it.
    let mut parts_of = BTreeSet::new();
    for entry in &mut statements {
        names.own.clone_from(&entry.key);
        names.here.clear();
        names.replace(&mut entry.node, 0);
        if !names.here.is_empty() && blocks::holds(&entry.node) {
            parts_of.append(&mut names.here);
        }
    }
    let unpacked = names.unpacked;
    // Only what is done to a configuration counts, or to a part of one.
    let mut places = BTreeSet::new();
    let holders = statements.iter().map(|entry| &entry.node).filter(|node| blocks::holds(node));
    holders.for_each(|node| blocks::places(node, &mut places));
    let place = |entry: &Entry| entry.node.span.as_ref().map(|span| (span.start, span.end));
    let parts = edits.statements.iter().filter(|entry| place(entry).is_some_and(|place| places.contains(&place)));
    let kept: BTreeSet<String> = parts.map(|entry| entry.key.clone()).chain(parts_of).collect();
    let notes = std::mem::take(&mut edits.notes);
    let notes = notes.into_iter().filter(|note| kept.contains(edits.about(note))).collect();
    statements.retain(|entry| !unpacked.contains(&entry.key));
    (statements, notes)
}

/// What a script has given names to.
struct Names<'e> {
    edits: &'e Edits,
    /// How often each is assigned, and what last.
    of: BTreeMap<String, (usize, Node)>,
    /// The name that is being assigned: in its own value it is what it was before.
    own: String,
    /// How many values may still be put in place of names.
    left: usize,
    unpacked: BTreeSet<String>,
    /// Those of the statement at hand.
    here: BTreeSet<String>,
}

impl Names<'_> {
    fn named(&self, name: &str) -> Option<&Node> {
        self.of.get(name).filter(|(times, _)| *times == 1 && name != self.own).map(|(_, node)| node)
    }

    fn replace(&mut self, node: &mut Node, depth: usize) {
        if depth > MAX_DEPTH {
            return;
        }
        match &mut node.value {
            Value::Code(code) => {
                let found = self.named(code).or_else(|| self.edits.stands_for(code));
                if let Some(found) = found.cloned()
                    && let Some(left) = self.left.checked_sub(size(&found))
                {
                    self.left = left;
                    *node = found;
                    self.replace(node, depth + 1);
                }
            }
            Value::List(items) => items.iter_mut().for_each(|item| self.replace(item, depth + 1)),
            Value::Table(entries) => {
                self.unpack(entries);
                entries.iter_mut().for_each(|entry| self.replace(&mut entry.node, depth + 1));
                self.call(node, depth);
            }
            _ => {}
        }
    }

    /// Puts what a call gives in its place: the path of the file that it reads, or what a function returns.
    fn call(&mut self, node: &mut Node, depth: usize) {
        if let Some(path) = mentions::loaded(node) {
            *node = path;
        } else if let Some(Node { value: Value::Text(function), .. }) = node.get(CALLEE)
            && depth > 0
            && let Some(found) = self.edits.returned(function).cloned()
            && let Some(left) = self.left.checked_sub(size(&found))
        {
            self.left = left;
            *node = found;
            self.replace(node, depth + 1);
        }
    }

    /// Puts the entries of `base` in place of `**base`. What stands further down in a dict counts.
    fn unpack(&mut self, entries: &mut Vec<Entry>) {
        let mut at = 0;
        while at < entries.len() {
            let name = entries[at].key.strip_prefix("**").unwrap_or_default().to_owned();
            match self.named(&name).map(|base| base.value.clone()) {
                Some(Value::Table(more)) if self.left > more.len() => {
                    self.left -= more.len() + 1;
                    self.here.insert(name.clone());
                    self.unpacked.insert(name);
                    let after = entries.split_off(at);
                    entries.retain(|e| more.iter().all(|m| m.key != e.key));
                    entries.extend(more.into_iter().filter(|m| after.iter().all(|e| e.key != m.key)));
                    entries.extend(after.into_iter().skip(1));
                }
                _ => at += 1,
            }
        }
    }
}

fn size(node: &Node) -> usize {
    match &node.value {
        Value::List(items) => 1 + items.iter().map(size).sum::<usize>(),
        Value::Table(entries) => 1 + entries.iter().map(|e| size(&e.node)).sum::<usize>(),
        _ => 1,
    }
}
