//! Scripts of Python: what they assign and call, as far as it can be read without running them.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    error::Error,
    policy::{
        parse_python::parse_expression,
        source::{Entry, Node, Source, Value},
    },
};

/// Most statements of a script that are looked at.
const MAX_STATEMENTS: usize = 20_000;

/// Deepest nesting that names are looked for in.
const MAX_DEPTH: usize = 16;

/// Most values that names are replaced by.
const MAX_COPIED: usize = 10_000;

/// What a script says.
pub(super) struct Script {
    /// Its assignments and calls that are literals, by name; those of calls are empty.
    pub(super) statements: Vec<Entry>,
    /// The first thing in it that is no Python.
    pub(super) fault: Option<Error>,
}

/// Reads a script.
pub(super) fn read(source: &Source<'_>, text: &str) -> Script {
    let mut script = Script { statements: Vec::new(), fault: None };
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
                script.take(target, node);
                at = end.max(start + 1);
                at += text[at.min(text.len())..].find('\n').unwrap_or(0);
                at = at.min(text.len());
            }
            Err(fault) => {
                script.fault.get_or_insert(fault);
                break;
            }
        }
    }
    script.resolve();
    script
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

impl Script {
    fn take(&mut self, target: Option<Target>, node: Node) {
        let Some(Target { name, steps, .. }) = target else {
            if !matches!(node.value, Value::Code(_)) {
                self.statements.push(Entry { key: String::new(), span: node.span.clone(), node });
            }
            return;
        };
        let steps: Vec<&str> = steps.iter().map(String::as_str).collect();
        match self.statements.iter_mut().rfind(|e| e.key == name && !name.is_empty()) {
            Some(entry) if !steps.is_empty() => entry.node.put(&steps, node),
            _ => {
                let span = node.span.clone();
                let mut whole = Node { span: span.clone(), value: Value::Table(Vec::new()) };
                whole.put(&steps, node);
                self.statements.push(Entry { key: name, span, node: whole });
            }
        }
    }

    /// Puts in place of a name what is assigned to it, where that is once. What was unpacked into others goes.
    fn resolve(&mut self) {
        let mut names: BTreeMap<String, (usize, Node)> = BTreeMap::new();
        for Entry { key, node, .. } in self.statements.iter().filter(|e| !e.key.is_empty()) {
            let (times, last) = names.entry(key.clone()).or_insert_with(|| (0, node.clone()));
            *times += 1;
            last.clone_from(node);
        }
        let mut names = Names { of: names, own: String::new(), left: MAX_COPIED, unpacked: BTreeSet::new() };
        for entry in &mut self.statements {
            names.own.clone_from(&entry.key);
            names.replace(&mut entry.node, 0);
        }
        self.statements.retain(|entry| !names.unpacked.contains(&entry.key));
    }
}

/// What a script has given names to.
struct Names {
    /// How often each is assigned, and what last.
    of: BTreeMap<String, (usize, Node)>,
    /// The name that is being assigned: in its own value it is what it was before.
    own: String,
    /// How many values may still be put in place of names.
    left: usize,
    unpacked: BTreeSet<String>,
}

impl Names {
    fn named(&self, name: &str) -> Option<&Node> {
        self.of.get(name).filter(|(times, _)| *times == 1 && name != self.own).map(|(_, node)| node)
    }

    fn replace(&mut self, node: &mut Node, depth: usize) {
        if depth > MAX_DEPTH {
            return;
        }
        match &mut node.value {
            Value::Code(code) => {
                if let Some(found) = self.named(code).cloned()
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
            }
            _ => {}
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
