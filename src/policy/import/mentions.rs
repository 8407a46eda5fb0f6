//! Where a statement of a script names something, and what it does with it.

use super::edits::Line;
use crate::policy::{
    parse_python::{parse_expression, quoted_length},
    source::{CALLEE, Node, Source, Value},
};

/// `name["a"]["b"]`, and the method that is called on it.
pub(super) struct Path {
    pub(super) name: String,
    pub(super) steps: Vec<String>,
    /// Empty if there is none.
    pub(super) method: String,
    /// Its bytes, without the method's arguments.
    pub(super) length: usize,
}

/// Deepest `name["a"]["b"]...` that is followed.
pub(super) const MAX_STEPS: usize = 16;

/// Functions that leave a dict as it is, by the last part of their names.
const READERS: &[&str] = &[
    "print",
    "pprint",
    "pformat",
    "dump",
    "dumps",
    "safe_dump",
    "len",
    "str",
    "repr",
    "bool",
    "isinstance",
    "type",
    "id",
    "info",
    "debug",
    "warning",
    "error",
    "log",
    "log_hyperparams",
    "initialize",
    "Init",
    "DeepSpeedConfig",
    "HfDeepSpeedConfig",
    "HfTrainerDeepSpeedConfig",
    "DeepSpeedPlugin",
    "DeepSpeedStrategy",
    "FSDPStrategy",
    "FullyShardedDataParallel",
    "FSDP",
    "fully_shard",
    "Accelerator",
    "Trainer",
    "Fabric",
];

/// The path that a text begins with, if its name is known.
pub(super) fn path(text: &str, known: impl Fn(&str) -> bool) -> Option<Path> {
    let end = word(text);
    let token = text[..end].trim_end_matches('.');
    let (name, mut method) = match token.rsplit_once('.') {
        _ if known(token) => (token, ""),
        Some((name, method)) if known(name) => (name, method),
        _ => return None,
    };
    let mut at = token.len();
    let mut steps = Vec::new();
    while method.is_empty()
        && steps.len() < MAX_STEPS
        && let Some(inner) = text[at..].strip_prefix('[')
        && inner.starts_with(['"', '\''])
    {
        let quoted = quoted_length(inner);
        if quoted < 3 || !inner[quoted..].starts_with(']') {
            break;
        }
        steps.push(inner[1..quoted - 1].to_owned());
        at += quoted + 2;
    }
    if method.is_empty()
        && let Some(rest) = text[at..].strip_prefix('.')
    {
        method = &rest[..word(rest)];
        at += 1 + method.len();
    }
    Some(Path { name: name.to_owned(), steps, method: method.to_owned(), length: at })
}

/// Bytes of the name that a text begins with, with its dots.
fn word(text: &str) -> usize {
    text.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == '.')).unwrap_or(text.len())
}

/// A place where a statement names something.
pub(super) struct Mention {
    pub(super) path: Path,
    /// It is plain that the statement leaves it as it is.
    pub(super) harmless: bool,
    /// It stands where values are read.
    pub(super) read: bool,
}

/// Every place where a statement names something that is known, and whether it is plain that it leaves that as it is.
/// `value`: it is what is assigned, not a whole statement.
pub(super) fn of(text: &str, value: bool, known: impl Fn(&str) -> bool + Copy) -> Vec<Mention> {
    let first = &text[..word(text)];
    if ["import", "from", "def", "class", "global", "nonlocal", "async"].contains(&first) {
        return Vec::new();
    }
    let test = ["if", "elif", "while", "assert"].contains(&first) && (first == "assert" || text.ends_with(':'));
    let returns = ["return", "yield"].contains(&first);
    let mut found = Vec::new();
    let mut open: Vec<&str> = Vec::new();
    let (mut at, mut before, mut calls) = (0, "", 0);
    // Behind the `=` of an assignment.
    let mut assigned = value;
    let comprehension = text.contains(" for ");
    while let Some(c) = text[at..].chars().next() {
        match c {
            '"' | '\'' => {
                at += quoted_length(&text[at..]);
                before = "";
                continue;
            }
            '#' => {
                at += text[at..].find('\n').unwrap_or(text.len() - at);
                continue;
            }
            '(' => {
                calls += usize::from(before != "dict");
                open.push(before);
            }
            '=' if open.is_empty() => {
                let compares = text[at + 1..].starts_with('=') || text[..at].ends_with(['=', '<', '>', '!']);
                assigned |= !compares;
            }
            '[' | '{' => open.push("["),
            ')' | ']' | '}' => calls -= usize::from(open.pop().is_some_and(|o| o != "[" && o != "dict")),
            c if c.is_alphanumeric() || c == '_' => {
                before = &text[at..at + word(&text[at..])];
                let after = text[at + before.len()..].trim_start();
                let keyword = after.starts_with('=') && !after.starts_with("==");
                if let Some(path) = path(&text[at..], known)
                    && !(keyword && (!open.is_empty() || at == 0))
                {
                    let reads = match open.last() {
                        Some(function) => reader(function),
                        None => test || returns && path.method.is_empty(),
                    };
                    let dict = ["", "get", "keys"].contains(&path.method.as_str());
                    // A dict in a dict is followed when all is read.
                    let inside = !open.is_empty() && calls == 0 && !comprehension && path.steps.is_empty();
                    // `dict(cfg, a=1)` is a copy, which is not followed.
                    let copy = open.last() == Some(&"dict") && text[..at].trim_end().ends_with('(');
                    let plain = inside && !copy && path.method.is_empty();
                    let whole = value && open.is_empty() && path.length == text.len() && path.steps.is_empty();
                    let read = assigned || test || returns || !open.is_empty();
                    let harmless = reads && dict || plain || whole && path.method.is_empty();
                    found.push(Mention { path, harmless, read });
                }
                at += before.len();
                continue;
            }
            _ => {}
        }
        if !c.is_whitespace() && c != '(' {
            before = "";
        }
        at += c.len_utf8();
    }
    found
}

fn reader(function: &str) -> bool {
    let class = function.rsplit('.').next().unwrap_or_default();
    READERS.contains(&class) || class.ends_with("TrainingArguments") || class.ends_with("Plugin")
}

/// The name and the call of `with open("a") as f:`.
pub(super) fn opened(source: &Source<'_>, line: &Line<'_>) -> Option<(String, Node)> {
    let call = line.text.strip_prefix("with ")?.trim_start();
    let (_, name) = line.text.rsplit_once(" as ")?;
    let name = name.split(':').next().unwrap_or_default().trim();
    let length = call.find(" as ")?;
    let text = &source.text()[..line.start + line.text.len() - call.len() + length];
    let (node, _) = parse_expression(source, text, line.start + line.text.len() - call.len()).ok()?;
    Some((name.to_owned(), node))
}

/// Whether a value is `json.load(...)`, `json.loads(...)` or its like.
pub(super) fn is_load(node: &Node) -> bool {
    let modules = ["json", "hjson", "json5", "commentjson"];
    let called = |name: &str| {
        name.split_once('.').is_some_and(|(of, name)| modules.contains(&of) && ["load", "loads"].contains(&name))
    };
    matches!(node.get(CALLEE), Some(Node { value: Value::Text(name), .. }) if called(name))
}

/// Whether it is `json.load(open(...))`.
pub(super) fn is_load_of_opened(node: &Node) -> bool {
    let opens = |from: &Node| from.get(CALLEE).is_some() || read_path(from).is_some();
    is_load(node) && node.get("argument 1").is_some_and(opens)
}

/// The path in `json.load(open("path"))` and `json.loads(Path("path").read_text())`.
pub(super) fn loaded(node: &Node) -> Option<Node> {
    let from = node.get("argument 1").filter(|_| is_load(node))?;
    let is_open = matches!(from.get(CALLEE), Some(Node { value: Value::Text(name), .. }) if name == "open");
    let path = match from.get("argument 1").filter(|_| is_open).map(|path| &path.value) {
        Some(Value::Text(path)) => path.clone(),
        _ => read_path(from)?,
    };
    Some(Node { span: node.span.clone(), value: Value::Text(path) })
}

/// The path in `open("path").read()`, `Path("path").open()` and `Path("path").read_text()`.
fn read_path(node: &Node) -> Option<String> {
    let Value::Code(code) = &node.value else { return None };
    let (opens, rest) = code.split_once('(')?;
    let quote = rest.chars().next().filter(|c| matches!(c, '"' | '\''))?;
    let (path, after) = rest[1..].split_once(quote)?;
    let read = [".read()", ".read_text(", ".read_bytes(", ".open("].iter().any(|end| after.contains(end));
    let known = ["open", "Path", "pathlib.Path"].contains(&opens) && read && !path.is_empty();
    known.then(|| path.to_owned())
}
