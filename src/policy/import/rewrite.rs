//! A DeepSpeed tree in the making, out of the keys of other formats, with the names that the user wrote.

use super::{Hints, Imported, Item, deepspeed, report::Found};
use crate::policy::{
    ParamsDtype,
    source::{Entry, Node, Source, Value},
};

/// Said of a number format beside FSDP, which keeps fp32 masters.
pub(super) const AUTOCAST: &str =
    "belongs to your training loop: torch.autocast works as it is, and params.dtype converts, with masters in fp32";

/// Where a value of the tree comes from.
pub(super) struct Label {
    /// Its path in the tree.
    pub(super) path: String,
    /// Its path in the file.
    pub(super) name: String,
    /// What is to be said of it besides.
    pub(super) remark: &'static str,
}

/// The number format that the file around a DeepSpeed configuration asks for; `"auto"` in there means it.
#[derive(Clone, Debug)]
pub(super) struct Half {
    /// `None`: the model's own.
    pub(super) format: Option<ParamsDtype>,
    /// The key that says so.
    pub(super) item: Item,
    /// The weights are converted, with FSDP as with DeepSpeed.
    pub(super) weights: bool,
}

/// What is known of a configuration besides its tree.
#[derive(Clone, Copy, Default)]
pub(super) struct Around<'a> {
    pub(super) hints: Hints,
    pub(super) labels: &'a [Label],
    pub(super) half: Option<&'a Half>,
}

/// A tree in the making.
pub(super) struct Rewrite<'a> {
    pub(super) source: &'a Source<'a>,
    pub(super) root: Node,
    labels: Vec<Label>,
    /// What the file says of the number format.
    pub(super) half: Option<Half>,
    /// Items that do not pass through the tree, and what they make of the policy.
    pub(super) own: Imported,
}

impl<'a> Rewrite<'a> {
    pub(super) fn new(source: &'a Source<'a>) -> Self {
        Self {
            source,
            root: Node::made(Value::Table(Vec::new())),
            labels: Vec::new(),
            half: None,
            own: Imported::new(source.name()),
        }
    }

    /// True if nothing was put into the tree.
    pub(super) fn is_empty(&self) -> bool {
        matches!(&self.root.value, Value::Table(entries) if entries.is_empty())
    }

    /// Puts a value under a path of DeepSpeed's. What is there already counts.
    pub(super) fn put(&mut self, path: &str, name: &str, node: &Node, remark: &'static str) {
        let steps: Vec<&str> = path.split('.').filter(|step| !step.is_empty()).collect();
        self.put_at(&steps, name, node, remark);
    }

    fn put_at(&mut self, steps: &[&str], name: &str, node: &Node, remark: &'static str) {
        let there = steps.iter().try_fold(&self.root, |node, key| node.get(key));
        match (there, &node.value) {
            (Some(Node { value: Value::Table(_), .. }), Value::Table(entries)) => {
                for Entry { key, node, .. } in entries {
                    let steps = [steps, &[key.as_str()]].concat();
                    self.put_at(&steps, &joined(name, key), node, remark);
                }
            }
            (Some(there), _) => {
                let same = said(there) == said(node);
                let path = steps.join(".");
                let chosen = self.labels.iter().find(|l| l.path == path).map_or(path, |l| l.name.clone());
                if same {
                    self.ignored(name, node, &format!("says the same as {chosen}"));
                } else {
                    self.undecided(name, node, &format!("contradicts {chosen}, which was taken"));
                }
            }
            (None, _) => {
                self.label(&steps.join("."), name, node, remark);
                self.root.put(steps, node.clone());
            }
        }
    }

    /// Names a value and all that is in it.
    fn label(&mut self, path: &str, name: &str, node: &Node, remark: &'static str) {
        if let Value::Table(entries) = &node.value {
            for Entry { key, node, .. } in entries {
                self.label(&joined(path, key), &joined(name, key), node, remark);
            }
        }
        if path != name || !remark.is_empty() {
            self.labels.push(Label { path: path.to_owned(), name: name.to_owned(), remark });
        }
    }

    /// True if a key of the file is in the tree.
    pub(super) fn has(&self, name: &str) -> bool {
        self.labels.iter().any(|label| label.name == name)
    }

    /// A key that says what a table is an instance of; a call of Python has none.
    pub(super) fn names_class(&mut self, name: &str, node: &Node) {
        if node.span.is_some() {
            self.ignored(name, node, "says what this configures");
        }
    }

    pub(super) fn mapped(&mut self, key: &str, node: &Node, note: &str) {
        self.own.mapped.push(Item::new(self.source, Found { key, node }, note));
    }

    pub(super) fn ignored(&mut self, key: &str, node: &Node, note: &str) {
        self.own.ignored.push(Item::new(self.source, Found { key, node }, note));
    }

    pub(super) fn undecided(&mut self, key: &str, node: &Node, note: &str) {
        self.own.undecided.push(Item::new(self.source, Found { key, node }, note));
    }

    /// Another file has the settings.
    pub(super) fn refer(&mut self, key: &str, node: &Node, path: &str) {
        self.mapped(key, node, "the settings are in that file");
        self.own.refers_to = Some(path.to_owned());
    }

    /// Notes the number format that a key asks for; the first one counts.
    pub(super) fn format(&mut self, key: &str, node: &Node, format: Option<ParamsDtype>) {
        let item = Item::new(self.source, Found { key, node }, "");
        match &self.half {
            None => self.half = Some(Half { format, item, weights: false }),
            Some(half) if half.format == format || format.is_none() => {
                let note = format!("{} says it", half.item.key);
                self.ignored(key, node, &note);
            }
            Some(Half { format: None, item: weaker, .. }) => {
                let note = format!("{key} says it");
                self.own.ignored.push(Item { note, ..weaker.clone() });
                self.half = Some(Half { format, item, weights: false });
            }
            Some(half) => {
                let note = format!("contradicts {}, which was taken", half.item.key);
                self.undecided(key, node, &note);
            }
        }
    }

    /// As [`Rewrite::format`] for a key that converts the weights themselves.
    pub(super) fn format_of_weights(&mut self, key: &str, node: &Node, format: Option<ParamsDtype>) {
        self.format(key, node, format);
        if let Some(half) = self.half.as_mut().filter(|half| half.item.key == key) {
            half.weights = true;
        }
    }

    /// What the tree comes to, with the items that did not pass through it.
    pub(super) fn finish(mut self, hints: Hints) -> Imported {
        if self.own.refers_to.is_some() {
            self.own.half = self.half;
            return self.own;
        }
        let around = Around { hints, labels: &self.labels, half: self.half.as_ref() };
        let mut out = deepspeed::import(self.source, &self.root, around);
        out.mapped.extend(self.own.mapped);
        out.ignored.extend(self.own.ignored);
        out.undecided.extend(self.own.undecided);
        out.sort();
        out
    }

    /// As [`Rewrite::finish`] for a file without anything of DeepSpeed's: its number format is autocast's, unless it says that
    /// the weights have it.
    pub(super) fn finish_without(mut self) -> Imported {
        let Some(half) = self.half else { return self.own };
        match half.format {
            Some(format) if half.weights => {
                self.own.policy.params.dtype = format;
                let note = format!("params.dtype = \"{}\", with masters in fp32", format.word());
                self.own.mapped.push(Item { note, ..half.item });
            }
            Some(_) => self.own.ignored.push(Item { note: AUTOCAST.to_owned(), ..half.item }),
            None => {
                let note = "the model's own number format counts".to_owned();
                self.own.ignored.push(Item { note, ..half.item });
            }
        }
        self.own
    }
}

/// `a.b`, `a[0]`, or only `b`.
pub(super) fn joined(path: &str, key: &str) -> String {
    match (path, key.starts_with('[')) {
        ("", _) => key.to_owned(),
        (_, true) => format!("{path}{key}"),
        (_, false) => format!("{path}.{key}"),
    }
}

/// A word in place of the value that the user wrote.
pub(super) fn word(text: &str, like: &Node) -> Node {
    Node { span: like.span.clone(), value: Value::Text(text.to_owned()) }
}

/// A scalar as a text to compare: `cpu`, `"CPU"` and `5e7`, `50000000` are the same.
fn said(node: &Node) -> Option<String> {
    match &node.value {
        Value::Null => Some("none".to_owned()),
        Value::Bool(b) => Some(b.to_string()),
        Value::Integer(n) => Some(n.to_string()),
        Value::Float(x) => Some(x.to_string()),
        Value::Text(text) => Some(text.trim().to_ascii_lowercase()),
        Value::List(_) | Value::Table(_) | Value::Code(_) => None,
    }
}
