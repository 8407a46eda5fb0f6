//! The configurations in a file: the whole of it, a section, one of several, or none.

use std::collections::BTreeSet;

use super::{
    Hints, Imported, Item, accelerate,
    deepspeed::speaks_of_offloading,
    edits::Note,
    fsdp,
    kinds::{KNOWN, Kind, called},
    lightning,
    report::Found,
    rewrite::{Rewrite, joined},
    trainer,
};
use crate::{
    error::{Code, Error, Result},
    policy::{
        Policy,
        source::{CALLEE, Entry, Node, Source, Value},
    },
    text::printable,
};

/// Said of a key that is read by nothing here.
pub(super) const SPEAKS: &str =
    "speaks of offloading, and is no key that import knows: set params.tier and optimizer.tier";

/// Deepest section that is looked into.
const MAX_DEPTH: usize = 16;

/// Most configurations of a file that are told apart.
const MAX_BLOCKS: usize = 100;

/// A configuration in a file.
struct Block<'n> {
    /// Where it is; empty: the whole file.
    path: String,
    node: &'n Node,
    kind: Kind,
    /// The name that a script has given it.
    name: &'n str,
}

/// The texts that a file is made of.
#[derive(Clone, Copy)]
pub(super) enum Parts<'n> {
    /// Documents; what stands beside a configuration is the file's too.
    Documents(&'n [Node]),
    /// Statements of a script; the rest of a script is not its configuration.
    Statements(&'n [Entry]),
}

impl<'n> Parts<'n> {
    fn roots(self) -> Vec<(String, &'n Node)> {
        match self {
            Self::Documents([one]) => vec![(String::new(), one)],
            Self::Documents(all) => {
                all.iter().enumerate().map(|(at, node)| (format!("document {}", at + 1), node)).collect()
            }
            Self::Statements(all) => all.iter().map(|e| (String::new(), &e.node)).collect(),
        }
    }

    /// The name of a root of a script.
    fn name(self, at: usize) -> &'n str {
        match self {
            Self::Documents(_) => "",
            Self::Statements(all) => &all[at].key,
        }
    }
}

/// What a script does besides.
#[derive(Clone, Copy, Default)]
pub(super) struct Beside<'n> {
    /// Statements that may change a configuration.
    pub(super) notes: &'n [Note],
    /// Statements that speak of offloading.
    pub(super) speaking: &'n [Node],
    /// Where reading ended before the script does, and why.
    pub(super) unread: Option<(&'n Node, &'static str)>,
}

/// Imports the configuration of a file.
///
/// # Errors
/// `FN-E507` if there is none.
pub(super) fn import(source: &Source<'_>, parts: Parts<'_>, script: Beside<'_>, hints: Hints) -> Result<Imported> {
    let roots = parts.roots();
    let mut blocks: Vec<Block<'_>> = Vec::new();
    for (at, (path, node)) in roots.iter().enumerate() {
        let before = blocks.len();
        search(path, node, 0, &mut blocks);
        blocks[before..].iter_mut().for_each(|block| block.name = parts.name(at));
    }
    if matches!(parts, Parts::Statements(_)) {
        drop_repeated(&mut blocks);
    }
    let offloads = |b: &Block<'_>| !offloading("", b.node).is_empty() || names_a_file(b.node);
    let Some(chosen) = blocks.iter().position(offloads).or(if blocks.is_empty() { None } else { Some(0) }) else {
        return Err(unknown(source, &roots));
    };
    // A name stands for what was given to it last.
    let name = blocks[chosen].name;
    let chosen = blocks.iter().rposition(|b| !name.is_empty() && b.name == name && b.path.is_empty()).unwrap_or(chosen);
    let taken = blocks.swap_remove(chosen);
    let mut out = read(source, &taken, hints);
    for other in &blocks {
        another(source, &taken, other, hints, &mut out);
    }
    for (path, node) in &roots {
        let skip: Vec<&Node> = blocks.iter().map(|b| b.node).chain([taken.node]).collect();
        let all = matches!(parts, Parts::Documents(_));
        let outside = Outside { source, skip: &skip, kind: taken.kind, all };
        if all || !written_in(taken.node, node) {
            outside.account(path, node, 0, &mut out);
        }
    }
    out.undecided.extend(script.notes.iter().map(|note| Item::statement(source, &note.node, note.why)));
    out.undecided.extend(script.unread.map(|(node, why)| Item::statement(source, node, why)));
    if !out.says_homes() && out.refers_to.is_none() {
        let mut seen = BTreeSet::new();
        blocks.iter().chain([&taken]).for_each(|block| places(block.node, &mut seen));
        speaking(source, script.speaking, &seen, &mut out);
    }
    if out.refers_to.is_none() {
        out.settle();
    }
    out.sort();
    Ok(out)
}

/// Names statements that speak of offloading, where no configuration has a part in them.
fn speaking(source: &Source<'_>, statements: &[Node], seen: &BTreeSet<(usize, usize)>, out: &mut Imported) {
    for node in statements {
        let Some(span) = &node.span else { continue };
        let line = source.locate(span.start).0;
        if seen.range((span.start, 0)..(span.end, 0)).next().is_none()
            && out.undecided.iter().all(|item| item.line != Some(line))
        {
            out.undecided.push(Item::statement(source, node, "speaks of offloading, and is not followed"));
        }
    }
}

/// Accounts for a configuration beside the one that was taken.
fn another(source: &Source<'_>, taken: &Block<'_>, other: &Block<'_>, hints: Hints, out: &mut Imported) {
    let key = if other.path.is_empty() { called(other.node) } else { &other.path };
    let line = taken.node.span.as_ref().map_or(0, |span| source.locate(span.start).0);
    let place = if taken.path.is_empty() { format!("the one in line {line}") } else { taken.path.clone() };
    let found = Found { key, node: other.node };
    // FSDP is told of each block, and of the model.
    if (taken.kind, other.kind) == (Kind::Fsdp, Kind::Fsdp) {
        let says = read(source, other, hints).policy;
        if says == out.policy {
            return out.ignored.push(Item::new(source, found, format!("says the same as {place}")));
        }
        if says == Policy::default() {
            let note = format!("offloads nothing, unlike {place}, which was taken for the whole model");
            return out.undecided.push(Item::new(source, found, note));
        }
    }
    let class = called(other.node).rsplit('.').next().unwrap_or_default();
    if class == "initialize" {
        let note = format!("is given a configuration that is not followed: see whether it is {place}, which was taken");
        return out.undecided.push(Item::new(source, found, note));
    }
    let note =
        format!("another {}; {place} was taken: put this one into a file of its own to import it", other.kind.name());
    out.undecided.push(Item::new(source, found, note));
}

/// A script names what it has assigned before: such a block is found again, by itself or inside of another one.
fn drop_repeated(blocks: &mut Vec<Block<'_>>) {
    let repeated: Vec<bool> = blocks
        .iter()
        .enumerate()
        .map(|(at, block)| {
            let again = blocks[..at].iter().any(|b| b.node.span == block.node.span);
            again || blocks.iter().any(|b| b.node.span != block.node.span && written_in(b.node, block.node))
        })
        .collect();
    let mut repeated = repeated.into_iter();
    blocks.retain(|_| !repeated.next().unwrap_or(false));
}

/// True if a node is a part of a tree, by the place where it is written.
fn written_in(tree: &Node, node: &Node) -> bool {
    tree.span == node.span || children(tree).iter().any(|(_, child)| written_in(child, node))
}

/// Where a tree and all in it is written.
pub(super) fn places(tree: &Node, into: &mut BTreeSet<(usize, usize)>) {
    into.extend(tree.span.as_ref().map(|span| (span.start, span.end)));
    children(tree).iter().for_each(|(_, child)| places(child, into));
}

/// True if a configuration is in a tree.
pub(super) fn holds(node: &Node) -> bool {
    let mut found = Vec::new();
    search("", node, 0, &mut found);
    !found.is_empty()
}

/// Reads a block.
fn read(source: &Source<'_>, block: &Block<'_>, hints: Hints) -> Imported {
    let mut to = Rewrite::new(source);
    into(&mut to, &block.path, block.node, block.kind);
    let deepspeed = matches!(block.kind, Kind::DeepSpeed | Kind::Zero | Kind::Plugin);
    if deepspeed || !to.is_empty() || to.own.refers_to.is_some() { to.finish(hints) } else { to.finish_without() }
}

/// Reads a table that stands where a DeepSpeed configuration is expected.
pub(super) fn inner(to: &mut Rewrite<'_>, path: &str, node: &Node) {
    let kind = Kind::of(node).filter(|kind| matches!(kind, Kind::Plugin | Kind::Zero));
    into(to, path, node, kind.unwrap_or(Kind::DeepSpeed));
}

pub(super) fn into(to: &mut Rewrite<'_>, path: &str, node: &Node, kind: Kind) {
    match kind {
        Kind::DeepSpeed => to.put("", path, node, ""),
        Kind::Zero => to.put("zero_optimization", path, node, ""),
        Kind::Accelerate => accelerate::file(to, path, node),
        Kind::Plugin => accelerate::plugin(to, path, node),
        Kind::Trainer => trainer::file(to, path, node),
        Kind::Lightning => lightning::arguments(to, path, node),
        Kind::Fsdp => fsdp::section(to, path, node),
    }
}

fn search<'n>(path: &str, node: &'n Node, depth: usize, found: &mut Vec<Block<'n>>) {
    if found.len() >= MAX_BLOCKS {
        return;
    }
    if let Some(kind) = Kind::of(node) {
        found.push(Block { path: path.to_owned(), node, kind, name: "" });
        return;
    }
    if depth >= MAX_DEPTH {
        return;
    }
    for (key, node) in children(node) {
        search(&joined(path, &key), node, depth + 1, found);
    }
}

/// The parts of a table or list, with what they are called.
pub(super) fn children(node: &Node) -> Vec<(String, &Node)> {
    match &node.value {
        Value::Table(entries) => entries.iter().map(|e| (e.key.clone(), &e.node)).collect(),
        Value::List(items) => items.iter().enumerate().map(|(at, node)| (format!("[{at}]"), node)).collect(),
        _ => Vec::new(),
    }
}

/// The keys in a tree that speak of offloading.
pub(super) fn offloading<'n>(key: &str, node: &'n Node) -> Vec<(String, &'n Node)> {
    let mut found = Vec::new();
    gather(key, key, node, 0, &mut found);
    found
}

fn gather<'n>(path: &str, key: &str, node: &'n Node, depth: usize, found: &mut Vec<(String, &'n Node)>) {
    let scalar = !matches!(node.value, Value::Table(_) | Value::List(_));
    let value = matches!(&node.value, Value::Text(text) if text.to_ascii_lowercase().contains("offload"));
    if scalar && (speaks_of_offloading(key, node) || value) {
        found.push((path.to_owned(), node));
    }
    if depth < MAX_DEPTH {
        for (inner, part) in children(node) {
            if let (CALLEE, Value::Text(name)) = (inner.as_str(), &part.value) {
                // What is called stands where the call is.
                if name.to_ascii_lowercase().contains("offload") {
                    found.push((name.clone(), node));
                }
                continue;
            }
            // `offload_param: {device: cpu}`: the section's name speaks for what is in it.
            let key = if inner == "device" { key } else { &inner };
            gather(&joined(path, &inner), key, part, depth + 1, found);
        }
    }
}

/// True if a block points at another file.
fn names_a_file(node: &Node) -> bool {
    children(node).iter().any(
        |(key, node)| matches!(&node.value, Value::Text(path) if path.ends_with(".json") && !key.contains("output")),
    )
}

/// The first JSON file that a tree names.
fn json_named(node: &Node, depth: usize) -> Option<&str> {
    match &node.value {
        Value::Text(path) if path.ends_with(".json") => Some(path),
        _ if depth < MAX_DEPTH => children(node).into_iter().find_map(|(_, node)| json_named(node, depth + 1)),
        _ => None,
    }
}

/// What stands beside the block that was taken.
struct Outside<'s, 'n> {
    source: &'s Source<'s>,
    skip: &'s [&'n Node],
    kind: Kind,
    /// Every key; else only those that speak of offloading.
    all: bool,
}

impl Outside<'_, '_> {
    fn account(&self, path: &str, node: &Node, depth: usize, out: &mut Imported) {
        if self.skip.iter().any(|block| same(block, node)) {
            return;
        }
        // The path of the file that is followed.
        if !self.all && matches!((&node.value, &out.refers_to), (Value::Text(text), Some(path)) if text == path) {
            return;
        }
        let key = path.rsplit('.').next().unwrap_or_default();
        let speaking = offloading(key, node);
        let parts = children(node);
        if self.holds(node, depth) || !(speaking.is_empty() || parts.is_empty() || depth >= MAX_DEPTH) {
            for (key, part) in parts {
                // What is called stands where the call is.
                let called = key == CALLEE && part.span.is_none();
                let (key, part) = if called { (super::kinds::called(node).to_owned(), node) } else { (key, part) };
                match called {
                    true if !key.to_ascii_lowercase().contains("offload") => {}
                    true => out.undecided.push(Item::new(self.source, Found { key: &key, node: part }, SPEAKS)),
                    false => self.account(&joined(path, &key), part, depth + 1, out),
                }
            }
            return;
        }
        if !speaking.is_empty() {
            out.undecided.push(Item::new(self.source, Found { key: path, node }, SPEAKS));
        } else if self.all {
            let format = ["precision", "mixed_precision", "bf16", "fp16"].contains(&key);
            let found = Found { key: path, node };
            if format && !matches!(node.value, Value::Bool(false) | Value::Null) {
                let note = "stands outside of the configuration: set params.dtype if the model is converted";
                out.undecided.push(Item::new(self.source, found, note));
            } else {
                let note = format!("outside of the {}; belongs to your training loop", self.kind.name());
                out.ignored.push(Item::new(self.source, found, note));
            }
        }
    }

    fn holds(&self, node: &Node, depth: usize) -> bool {
        depth < MAX_DEPTH
            && children(node)
                .iter()
                .any(|(_, node)| self.skip.iter().any(|block| same(block, node)) || self.holds(node, depth + 1))
    }
}

fn same(a: &Node, b: &Node) -> bool {
    std::ptr::eq(a, b) || (a.span.is_some() && a.span == b.span && matches!(b.value, Value::Table(_)))
}

/// `FN-E507`, with the keys that the file has, and those that speak of offloading.
fn unknown(source: &Source<'_>, roots: &[(String, &Node)]) -> Error {
    let name = printable(source.name()).into_owned();
    let text = source.text();
    let error = |what: String| Error::new(Code::ImportFormat, what);
    if text.lines().map(str::trim).all(|line| line.is_empty() || line.starts_with('#')) {
        return error(format!("{name}: there is nothing in it.")).action("Give the file that has the settings.");
    }
    if let [(_, node)] = roots
        && !children(node).is_empty()
        && Policy::from_node(source, node).is_ok()
    {
        return error(format!("{name}: is a policy already."))
            .action(format!("There is nothing to import: `funicular policy check {name}` reads it as a run does."));
    }
    let written = |key: &String| key != CALLEE && !key.starts_with("argument ");
    let keys = roots.iter().flat_map(|(_, node)| children(node)).map(|(key, _)| key).filter(written);
    let keys: Vec<String> = keys.take(5).collect();
    let has = if keys.is_empty() { String::new() } else { format!("; it has the keys {}", keys.join(", ")) };
    let mut what = format!("{name}: not a configuration of a format that import knows{has}.");
    let named = roots.iter().find_map(|(_, node)| json_named(node, 0)).or_else(|| json_in(text));
    if let Some(file) = named {
        what += &format!(" It names {file}: if that has the settings, import it.");
    }
    let mut speaking: Vec<String> = roots
        .iter()
        .flat_map(|(_, node)| offloading("", node))
        .map(|(key, node)| {
            let line = node.span.as_ref().map_or(0, |span| source.locate(span.start).0);
            format!("{key} (line {line})")
        })
        .collect();
    if speaking.is_empty() {
        // A text without keys, such as a shell script.
        let lines = text.lines().enumerate().filter(|(_, line)| line.to_ascii_lowercase().contains("offload"));
        speaking.extend(lines.map(|(at, _)| format!("line {}", at + 1)));
    }
    speaking.truncate(5);
    if !speaking.is_empty() {
        what += &format!(" It does speak of offloading: {}.", speaking.join(", "));
    }
    let known =
        ["Known are ", KNOWN, ". Or write a policy: params.tier and optimizer.tier say where things live."].concat();
    error(what).action(known)
}

/// The first word of a text that is the name of a JSON file, as `--deepspeed ds_config.json` in a shell script has it.
fn json_in(text: &str) -> Option<&str> {
    let ends = |c: char| c.is_whitespace() || "\"'`=,;:()[]{}<>".contains(c);
    text.split(ends).find(|word| word.ends_with(".json") && word.len() > ".json".len())
}
