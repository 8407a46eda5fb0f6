//! What a script does to a configuration after it has assigned it: what is plain is applied, and every other statement that
//! names the configuration is a line that needs a decision.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use super::mentions::{self, Mention, Path};
use crate::policy::{
    parse_python::{parse_call, parse_expression},
    source::{CALLEE, Entry, Node, Source, Value},
};

/// Said of a statement that may change the configuration.
pub(super) const NOT_FOLLOWED: &str =
    "is not followed: see whether it changes the configuration, and set the policy so";

/// Said of a statement that is run or not.
pub(super) const CONDITIONAL: &str = "is run under a condition or in a loop: set in the policy what is meant";

/// Most names that are followed to one another.
const MAX_CHAIN: usize = 8;

/// A statement that needs a decision.
pub(super) struct Note {
    /// The name that it is about.
    about: String,
    /// Its text.
    pub(super) node: Node,
    pub(super) why: &'static str,
}

/// A statement.
pub(super) struct Line<'t> {
    /// The whole text of it.
    pub(super) text: &'t str,
    /// Where it begins.
    pub(super) start: usize,
    /// Whether it stands under `if`, `for` and the like.
    pub(super) conditional: bool,
    /// The function that it is in.
    pub(super) function: Option<&'t str>,
}

/// The statements of a script as far as they were read.
#[derive(Default)]
pub(super) struct Edits {
    pub(super) statements: Vec<Entry>,
    /// The last statement of each name.
    last: BTreeMap<String, usize>,
    pub(super) notes: Vec<Note>,
    /// Names that stand for a part of what another one has.
    aliases: BTreeMap<String, (String, Vec<String>)>,
    /// Names of which it is not known what they are: something was made of a configuration.
    unknown: BTreeMap<String, String>,
    /// Names of open files, with the call that opened them.
    files: BTreeMap<String, Node>,
    /// What functions return.
    returned: BTreeMap<String, String>,
    /// Functions whose value has a name already.
    called: BTreeSet<String>,
    /// Names that are assigned under a condition.
    pub(super) conditional: BTreeSet<String>,
}

impl Edits {
    /// `name = value`.
    pub(super) fn assign(&mut self, line: &Line<'_>, name: String, mut node: Node) {
        let own = if line.conditional { CONDITIONAL } else { NOT_FOLLOWED };
        if let Some((base, _)) = name.split_once('.')
            && self.known(base)
        {
            return self.note(line, base, own);
        }
        if line.conditional {
            self.conditional.insert(name.clone());
        }
        if let Some(alias) = self.part(&node) {
            // Another name of the same: what is done to it is done to that one.
            if line.conditional || alias.0 == name || self.aliases.contains_key(&name) {
                self.note(line, &alias.0, own);
                self.unknown.insert(name, alias.0);
            } else {
                self.aliases.insert(name, alias);
            }
            return;
        }
        if self.mentions(line) {
            let of = self.notes.last().map(|note| note.about.clone()).unwrap_or_default();
            self.unknown.insert(name.clone(), of);
        } else {
            self.unknown.remove(&name);
        }
        // What a function makes that does not always return the same, or is called twice.
        if let Some(Node { value: Value::Text(function), .. }) = node.get(CALLEE)
            && let Some(base) = self.returned.get(function)
        {
            let of = if base.is_empty() { format!("{function}()") } else { base.clone() };
            self.unknown.insert(name.clone(), of);
        }
        if line.conditional {
            self.note(line, &name, CONDITIONAL);
        }
        self.aliases.remove(&name);
        self.open(&mut node);
        self.push(name, node.span.clone(), node);
    }

    /// `name["a"]["b"] = value`.
    pub(super) fn edit(&mut self, line: &Line<'_>, name: String, steps: &[String], node: Node) {
        if let Some((base, _)) = name.split_once('.')
            && self.known(base)
        {
            return self.note(line, base, NOT_FOLLOWED);
        }
        let known = self.known(&name);
        if line.conditional {
            self.note(line, &name, CONDITIONAL);
        }
        let from = node.span.as_ref().and_then(|span| line.text.get(span.start.checked_sub(line.start)?..));
        self.named_in(line, from.unwrap_or_default(), true);
        if known && line.conditional {
            return;
        }
        if known && self.hides(&name, steps, &node) {
            return self.note(line, &name, NOT_FOLLOWED);
        }
        match self.place(&name, steps) {
            Some(place) => *place = node,
            None if known => self.note(line, &name, NOT_FOLLOWED),
            None => {
                let mut whole = Node { span: node.span.clone(), value: Value::Table(Vec::new()) };
                whole.put(&steps.iter().map(String::as_str).collect::<Vec<_>>(), node.clone());
                self.push(name, node.span, whole);
            }
        }
    }

    /// `return value`, `a, b = value`, or a value by itself.
    pub(super) fn value(&mut self, line: &Line<'_>, node: Node, returns: bool) {
        self.mentions(line);
        let mut key = String::new();
        if let Some(function) = line.function.filter(|_| returns) {
            let base = self.part(&node).filter(|(_, steps)| steps.is_empty()).map(|(base, _)| base);
            let own = base.or_else(|| {
                key = format!("{function}()");
                matches!(node.value, Value::Table(_)).then(|| key.clone())
            });
            // Of several values it is not known which.
            let twice = line.conditional || self.returned.contains_key(function);
            let own = own.filter(|_| !twice).unwrap_or_default();
            self.returned.insert(function.to_owned(), own);
        }
        self.push(key, node.span.clone(), node);
    }

    /// A statement that assigns nothing by `=`: `cfg.update(...)`, `del cfg["a"]`, a call, or what only running it would tell.
    /// True for a change that is applied.
    pub(super) fn other(&mut self, source: &Source<'_>, line: &Line<'_>, node: Node) -> bool {
        if let Some((name, applied)) = self.change(source, line) {
            if !applied {
                let why = if line.conditional { CONDITIONAL } else { NOT_FOLLOWED };
                self.note(line, &name, why);
            }
            return applied;
        }
        self.mentions(line);
        if let Some((name, opened)) = mentions::opened(source, line) {
            self.files.insert(name, opened);
        }
        if !matches!(node.value, Value::Code(_)) {
            self.push(String::new(), node.span.clone(), node);
        }
        false
    }

    /// Applies a change that is plain; the name that it is of, and whether it was.
    fn change(&mut self, source: &Source<'_>, line: &Line<'_>) -> Option<(String, bool)> {
        let (deletes, text) = match line.text.strip_prefix("del ") {
            Some(rest) => (true, rest.trim_start()),
            None => (false, line.text),
        };
        let Path { name, steps, method, length } = mentions::path(text, |name| self.known(name))?;
        let at = line.start + line.text.len() - text.len() + length;
        let rest = &text[length..];
        if !matches!(self.entry(&name), Some(Node { value: Value::Table(_) | Value::Text(_), .. }) | None) {
            return None;
        }
        // An object's method, such as `trainer.fit()`, does not change its arguments.
        let object = self.entry(&name).is_some_and(|node| !is_dict(node)) && !self.loaded(&name);
        if object && !method.is_empty() && steps.is_empty() && !self.unknown.contains_key(&name) {
            return None;
        }
        let applied = |yes: Option<()>| Some((name.clone(), yes.is_some()));
        if line.conditional && (deletes || rest.starts_with("|=") || CHANGES.contains(&method.as_str())) {
            return Some((name, false));
        }
        if deletes {
            return match steps.is_empty() {
                true => None,
                false => applied(if rest.is_empty() { self.remove(&name, &steps) } else { None }),
            };
        }
        if let Some(value) = rest.trim_start().strip_prefix("|=").filter(|_| method.is_empty()) {
            let from = line.start + line.text.len() - value.len();
            let parsed = parse_expression(source, source.text(), from).ok();
            return applied(parsed.and_then(|(node, _)| self.update(&name, &steps, entries(&node)?)));
        }
        if !CHANGES.contains(&method.as_str()) {
            return None;
        }
        let (call, end) = parse_call(source, source.text(), at).ok()?;
        if end != line.start + line.text.len() {
            return applied(None);
        }
        let Value::Table(arguments) = call.value else { return applied(None) };
        applied(self.call(&name, &steps, &method, arguments))
    }

    fn call(&mut self, name: &str, steps: &[String], method: &str, arguments: Vec<Entry>) -> Option<()> {
        if method == "update" {
            let mut all = Vec::new();
            for argument in arguments {
                match argument.key.starts_with("argument ") {
                    true => all.extend(entries(&argument.node)?),
                    false => all.push(argument),
                }
            }
            return self.update(name, steps, all);
        }
        let Value::Text(key) = &arguments.first()?.node.value else { return None };
        let path = [steps, std::slice::from_ref(key)].concat();
        match (method, &arguments[..]) {
            ("pop", [_] | [_, _]) => self.remove(name, &path),
            ("setdefault", [_, default]) => {
                let there = self.place(name, steps).is_some_and(|node| node.get(key).is_some());
                if !there {
                    *self.place(name, &path)? = default.node.clone();
                }
                Some(())
            }
            _ => None,
        }
    }

    fn update(&mut self, name: &str, steps: &[String], all: Vec<Entry>) -> Option<()> {
        if all.iter().any(|entry| entry.key.starts_with("**")) {
            return None;
        }
        let hidden =
            all.iter().any(|entry| self.hides(name, &[steps, std::slice::from_ref(&entry.key)].concat(), &entry.node));
        if hidden || self.place(name, steps).is_none() {
            return None;
        }
        for Entry { key, node, .. } in all {
            *self.place(name, &[steps, &[key]].concat())? = node;
        }
        Some(())
    }

    /// Whether a value that cannot be read would take the place of a table that can.
    fn hides(&self, name: &str, steps: &[String], node: &Node) -> bool {
        let computed = match &node.value {
            Value::Code(code) => !self.known(code),
            Value::Table(_) => !is_dict(node) && self.returned_by(node).is_none(),
            _ => false,
        };
        computed && self.at(name, steps).is_some_and(|node| matches!(node.value, Value::Table(_)))
    }

    fn remove(&mut self, name: &str, path: &[String]) -> Option<()> {
        let (key, steps) = path.split_last()?;
        let node = self.place(name, steps)?;
        let Value::Table(entries) = &mut node.value else { return None };
        // What is not there may be what cannot be read.
        let unpacked = entries.iter().any(|entry| entry.key.starts_with("**"));
        let before = entries.len();
        entries.retain(|entry| entry.key != *key);
        (before > entries.len() && !unpacked).then_some(())
    }

    /// The place of a path, made where it is not there; `None` if something on the way is no dict.
    fn place(&mut self, name: &str, steps: &[String]) -> Option<&mut Node> {
        let (mut name, mut steps) = (name.to_owned(), steps.to_vec());
        for _ in 0..MAX_CHAIN {
            if self.unknown.contains_key(&name) {
                return None;
            }
            if let Some((base, before)) = self.aliases.get(&name) {
                steps = [&before[..], &steps].concat();
                name.clone_from(base);
                continue;
            }
            // A part of it that another name has.
            let mut node = self.entry(&name)?;
            let mut other = None;
            for (at, step) in steps.iter().enumerate() {
                let Some(next) = node.get(step) else { break };
                node = next;
                if let Value::Code(code) = &node.value
                    && at + 1 < steps.len()
                {
                    other = Some((code.clone(), steps[at + 1..].to_vec()));
                    break;
                }
            }
            match other {
                Some(next) => (name, steps) = next,
                None => break,
            }
        }
        // What is done to what a file has cannot be put into that file.
        if self.entry(&name).is_some_and(mentions::is_load_of_opened) {
            return None;
        }
        let mut node = &mut self.statements.get_mut(*self.last.get(&name)?)?.node;
        for (at, step) in steps.iter().enumerate() {
            // Of a call at the top, the rest is said not to be seen.
            let call = node.get(CALLEE).is_some() && !is_dict(node);
            let Value::Table(entries) = &mut node.value else { return None };
            if call && at > 0 {
                return None;
            }
            let found = entries.iter().position(|e| e.key == *step).unwrap_or_else(|| {
                let node = Node::made(Value::Table(Vec::new()));
                entries.push(Entry { key: step.clone(), span: None, node });
                entries.len() - 1
            });
            node = &mut entries[found].node;
        }
        Some(node)
    }

    /// The name and the path that a value is a part of: `cfg["zero_optimization"]`, or the call of a function that returns it.
    fn part(&mut self, node: &Node) -> Option<(String, Vec<String>)> {
        match &node.value {
            Value::Code(code) => {
                let Path { name, steps, method, length } = mentions::path(code, |name| self.known(name))?;
                if length < code.len() || !method.is_empty() || self.unknown.contains_key(&name) {
                    return None;
                }
                let table = self.at(&name, &steps).is_some_and(|node| {
                    matches!(node.value, Value::Table(_) | Value::Text(_)) && (is_dict(node) || steps.is_empty())
                });
                (table && !self.scalar(&name, &steps)).then_some((name, steps))
            }
            Value::Table(_) => {
                let (function, base) = self.returned_by(node)?;
                self.called.insert(function).then_some((base, Vec::new()))
            }
            _ => None,
        }
    }

    /// The function of this script that a value is a call of, and the name of what it returns.
    fn returned_by(&self, node: &Node) -> Option<(String, String)> {
        let Some(Node { value: Value::Text(function), .. }) = node.get(CALLEE) else { return None };
        let base = self.returned.get(function).filter(|base| !base.is_empty())?;
        Some((function.clone(), base.clone()))
    }

    /// What is at a path, through other names.
    fn at(&self, name: &str, steps: &[String]) -> Option<&Node> {
        let (mut name, mut steps) = (name.to_owned(), steps.to_vec());
        for _ in 0..MAX_CHAIN {
            let Some((base, before)) = self.aliases.get(&name) else { break };
            steps = [&before[..], &steps].concat();
            name.clone_from(base);
        }
        steps.iter().try_fold(self.entry(&name)?, |node, step| node.get(step))
    }

    fn scalar(&self, name: &str, steps: &[String]) -> bool {
        self.at(name, steps).is_some_and(|n| {
            let plain = !matches!(n.value, Value::Table(_) | Value::List(_) | Value::Code(_));
            plain && !self.loaded(name)
        })
    }

    fn push(&mut self, key: String, span: Option<Range<usize>>, node: Node) {
        self.last.insert(key.clone(), self.statements.len());
        self.statements.push(Entry { key, span, node });
    }

    fn entry(&self, name: &str) -> Option<&Node> {
        self.last.get(name).and_then(|at| self.statements.get(*at)).map(|e| &e.node)
    }

    /// Whether a name is what a file has.
    fn loaded(&self, name: &str) -> bool {
        self.at(name, &[]).is_some_and(mentions::is_load)
    }

    fn known(&self, name: &str) -> bool {
        self.aliases.contains_key(name) || self.unknown.contains_key(name) || self.entry(name).is_some()
    }

    /// Notes what a statement does with a name that is not known to leave it as it is. True if there is such a name.
    fn mentions(&mut self, line: &Line<'_>) -> bool {
        self.named_in(line, line.text, false)
    }

    fn named_in(&mut self, line: &Line<'_>, text: &str, value: bool) -> bool {
        let found = mentions::of(text, value, |name| self.known(name));
        let mut noted = false;
        for Mention { path, harmless, read } in found {
            // What was made of one, such as a model, is noted where it was made.
            let whole = self.at(&path.name, &[]);
            let mutable = whole.is_some_and(|node| is_dict(node) || matches!(node.value, Value::List(_)));
            let object = !mutable && !self.loaded(&path.name);
            if !(harmless || object || read && self.reads(&path)) {
                self.note(line, &path.name, NOT_FOLLOWED);
                noted = true;
            }
        }
        noted
    }

    /// Whether a path is of a value that is no dict.
    fn reads(&self, path: &Path) -> bool {
        path.method.is_empty() && self.scalar(&path.name, &path.steps)
    }

    fn note(&mut self, line: &Line<'_>, name: &str, why: &'static str) {
        let span = line.start..line.start + line.text.len();
        let mut same = self.notes.iter().rev().take_while(|note| note.node.span.as_ref() == Some(&span));
        if same.any(|note| note.about == name) {
            return;
        }
        let text = line.text.split_whitespace().collect::<Vec<_>>().join(" ");
        let node = Node { span: Some(span), value: Value::Code(text) };
        self.notes.push(Note { about: name.to_owned(), node, why });
    }

    /// Puts the call that opened a file in place of its name, where something is read from it.
    fn open(&self, node: &mut Node) {
        if !mentions::is_load(node) {
            return;
        }
        let Value::Table(entries) = &mut node.value else { return };
        for entry in entries {
            if let Value::Code(code) = &entry.node.value
                && let Some(opened) = self.files.get(code)
            {
                entry.node = opened.clone();
            }
        }
    }

    /// What another name stands for, at the end.
    pub(super) fn stands_for(&self, name: &str) -> Option<&Node> {
        let (base, steps) = self.aliases.get(name)?;
        self.at(base, steps)
    }

    /// What a function returns, if that is one thing.
    pub(super) fn returned(&self, function: &str) -> Option<&Node> {
        self.entry(self.returned.get(function).filter(|base| !base.is_empty())?)
    }

    /// The name that a note is about, through aliases.
    pub(super) fn about<'n>(&'n self, note: &'n Note) -> &'n str {
        let mut name = note.about.as_str();
        for _ in 0..MAX_CHAIN {
            match self.aliases.get(name).map(|(base, _)| base).or_else(|| self.unknown.get(name)) {
                Some(base) if base != name => name = base,
                _ => break,
            }
        }
        name
    }
}

/// Methods that change a dict.
const CHANGES: &[&str] = &["update", "pop", "setdefault", "clear", "popitem"];

/// Whether something is a dict as it is written.
fn is_dict(node: &Node) -> bool {
    match (&node.value, node.get(CALLEE)) {
        (Value::Table(_), Some(Node { value: Value::Text(name), .. })) => name == "dict",
        (Value::Table(_), None) => true,
        _ => false,
    }
}

/// The entries of a dict without what is only its call.
fn entries(node: &Node) -> Option<Vec<Entry>> {
    let Value::Table(entries) = &node.value else { return None };
    let written = entries.iter().filter(|entry| entry.key != CALLEE);
    (is_dict(node) && !entries.iter().any(|entry| entry.key.starts_with("argument ")))
        .then(|| written.cloned().collect())
}
