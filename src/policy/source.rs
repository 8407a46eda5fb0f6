//! Where policy text came from: lines, columns, the snippet with a caret, and the parsed tree with its spans.

use std::{cell::OnceCell, ops::Range};

use crate::{
    error::{Code, Error, Result},
    text::{misleads, printable},
};

/// Most keys of one table, most items of one list, most values in all, and the longest string in bytes. A file within
/// these bounds takes little time and memory in every later step; no real configuration comes near them.
pub(crate) const MAX_KEYS: usize = 1_000;
const MAX_ITEMS: usize = 4_096;
const MAX_VALUES: usize = 32_768;
const MAX_TEXT: usize = 4_096;

/// The key under which a table that was a call has the name that was called; Hydra's files write the same.
pub(crate) const CALLEE: &str = "_target_";

/// Bytes between two places whose line and column are known.
const MARK: usize = 4_096;

/// Longest part of a line that a snippet shows, in characters.
const SNIPPET: usize = 100;

/// A named text, or only a name (an environment variable, a `--set`) when there are no lines to point at.
#[derive(Clone, Debug)]
pub(crate) struct Source<'a> {
    name: &'a str,
    text: Option<&'a str>,
    /// Line and column of every [`MARK`]th byte; made when a place is first asked for.
    marks: OnceCell<Vec<(usize, usize)>>,
}

impl<'a> Source<'a> {
    /// A file's text under the name that errors print.
    pub(crate) fn new(name: &'a str, text: &'a str) -> Self {
        Self { name, text: Some(text), marks: OnceCell::new() }
    }

    /// An origin without lines.
    pub(crate) fn named(name: &'a str) -> Self {
        Self { name, text: None, marks: OnceCell::new() }
    }

    /// The text; empty for an origin without lines.
    pub(crate) fn text(&self) -> &'a str {
        self.text.unwrap_or_default()
    }

    /// The name that errors print.
    pub(crate) fn name(&self) -> &'a str {
        self.name
    }

    /// Line and column of a byte offset, both from 1, the column in characters.
    pub(crate) fn locate(&self, offset: usize) -> (usize, usize) {
        let text = self.text.unwrap_or_default().as_bytes();
        let marks = self.marks.get_or_init(|| {
            let mut marks = vec![(1, 1)];
            let mut at = (1, 1);
            marks.extend(text.chunks_exact(MARK).map(|part| {
                at = advanced(at, part);
                at
            }));
            marks
        });
        let offset = offset.min(text.len());
        advanced(marks[offset / MARK], &text[offset / MARK * MARK..offset])
    }

    /// An error at a span: `name:line:column: what`, the line, and a caret under the span.
    pub(crate) fn error(&self, code: Code, span: Option<&Range<usize>>, what: &str) -> Error {
        let (name, what) = (printable(self.name), printable(what));
        match (self.text, span) {
            (Some(text), Some(span)) => {
                let (line, column) = self.locate(span.start);
                let snippet = snippet(text, span, line, column);
                Error::new(code, format!("{name}:{line}:{column}: {what}\n{snippet}"))
            }
            _ => Error::new(code, format!("{name}: {what}")),
        }
    }

    /// Refuses a tree that is larger than any configuration.
    ///
    /// # Errors
    /// `FN-E503` with the place and the bound.
    pub(crate) fn check_size(&self, root: &Node) -> Result<()> {
        let refuse = |span: &Option<Range<usize>>, what: &str| Err(self.error(Code::PolicyValue, span.as_ref(), what));
        let mut left = vec![root];
        let mut seen = 0;
        while let Some(node) = left.pop() {
            seen += 1;
            if seen > MAX_VALUES {
                return refuse(&None, &format!("more than {MAX_VALUES} values; no configuration has so many"));
            }
            match &node.value {
                Value::Text(text) | Value::Code(text) if text.len() > MAX_TEXT => {
                    let what = format!("a string of {} bytes; at most {MAX_TEXT} are read", text.len());
                    return refuse(&node.span, &what);
                }
                Value::List(items) if items.len() > MAX_ITEMS => {
                    let what = format!("a list of {} items; at most {MAX_ITEMS} are read", items.len());
                    return refuse(&node.span, &what);
                }
                Value::List(items) => left.extend(items),
                Value::Table(entries) => {
                    if entries.len() > MAX_KEYS {
                        return Err(self.too_many_keys(entries[MAX_KEYS].span.as_ref()));
                    }
                    if let Some(long) = entries.iter().find(|e| e.key.len() > MAX_TEXT) {
                        let what = format!("a key of {} bytes; at most {MAX_TEXT} are read", long.key.len());
                        return refuse(&long.span, &what);
                    }
                    left.extend(entries.iter().map(|e| &e.node));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// `FN-E503` for a table with more than [`MAX_KEYS`] keys, at the first that is too many.
    pub(crate) fn too_many_keys(&self, span: Option<&Range<usize>>) -> Error {
        self.error(Code::PolicyValue, span, &format!("a table with more than {MAX_KEYS} keys; no more are read"))
    }
}

/// Line and column after these bytes; a column is a character, which begins with its first byte.
fn advanced((mut line, mut column): (usize, usize), bytes: &[u8]) -> (usize, usize) {
    for byte in bytes {
        match byte {
            b'\n' => (line, column) = (line + 1, 1),
            0x80..=0xbf => {}
            _ => column += 1,
        }
    }
    (line, column)
}

/// The line of a span with carets under it, shortened around the span when long.
fn snippet(text: &str, span: &Range<usize>, line: usize, column: usize) -> String {
    // From the place itself: counting lines from the top would cost a script with many faults its square.
    let from = text.get(..span.start).unwrap_or(text);
    let begin = from.rfind('\n').map_or(0, |end| end + 1);
    let whole = text[begin..].split('\n').next().unwrap_or_default();
    let whole = whole.strip_suffix('\r').unwrap_or(whole);
    let width = text
        .get(span.start.min(text.len())..span.end.min(text.len()))
        .and_then(|s| s.lines().next())
        .map_or(1, |s| s.chars().count())
        .max(1);
    let at = column - 1;
    let long = whole.len() > SNIPPET && whole.chars().nth(SNIPPET).is_some();
    let first = if long { at.saturating_sub(SNIPPET / 2) } else { 0 };
    let part: String = whole.chars().skip(first).take(SNIPPET).map(|c| if misleads(c) { ' ' } else { c }).collect();
    let carets = "^".repeat(width.min(SNIPPET.saturating_sub(at - first)).max(1));
    format!("{line:5} | {part}\n      | {}{carets}", " ".repeat(at - first))
}

/// A parsed value with the place it was written at.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    /// Bytes of the text it came from; `None` for values that were made up.
    pub(crate) span: Option<Range<usize>>,
    /// What it is.
    pub(crate) value: Value,
}

/// The values that TOML, JSON and YAML have in common.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    /// `null` (JSON and YAML).
    Null,
    /// A boolean.
    Bool(bool),
    /// A whole number.
    Integer(i64),
    /// A number with a point or an exponent.
    Float(f64),
    /// A string.
    Text(String),
    /// A list.
    List(Vec<Node>),
    /// A table, in the order of the file.
    Table(Vec<Entry>),
    /// An expression of Python that only running it would give a value.
    Code(String),
}

/// A key of a table and its value.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    /// The key.
    pub(crate) key: String,
    /// Where the key is written.
    pub(crate) span: Option<Range<usize>>,
    /// Its value.
    pub(crate) node: Node,
}

impl Node {
    /// A value that no text stands for.
    pub(crate) fn made(value: Value) -> Self {
        Self { span: None, value }
    }

    /// The value under a key, if this is a table that has it.
    pub(crate) fn get(&self, key: &str) -> Option<&Self> {
        match &self.value {
            Value::Table(entries) => entries.iter().find(|e| e.key == key).map(|e| &e.node),
            _ => None,
        }
    }

    /// Puts a value under a dotted path, making tables on the way.
    pub(crate) fn put(&mut self, path: &[&str], node: Self) {
        let Some((key, rest)) = path.split_first() else {
            *self = node;
            return;
        };
        if !matches!(self.value, Value::Table(_)) {
            self.value = Value::Table(Vec::new());
        }
        if let Value::Table(entries) = &mut self.value {
            let at = entries.iter().position(|e| e.key == *key).unwrap_or_else(|| {
                let node = Self::made(Value::Table(Vec::new()));
                entries.push(Entry { key: (*key).to_owned(), span: None, node });
                entries.len() - 1
            });
            entries[at].node.put(rest, node);
        }
    }

    /// As a JSON value; code as its text.
    #[cfg(test)]
    pub(crate) fn to_json(&self) -> serde_json::Value {
        match &self.value {
            Value::Null => serde_json::Value::Null,
            Value::Bool(b) => (*b).into(),
            Value::Integer(n) => (*n).into(),
            Value::Float(x) => (*x).into(),
            Value::Text(s) | Value::Code(s) => s.as_str().into(),
            Value::List(items) => items.iter().map(Self::to_json).collect(),
            Value::Table(entries) => {
                serde_json::Value::Object(entries.iter().map(|e| (e.key.clone(), e.node.to_json())).collect())
            }
        }
    }

    /// From a JSON value, without spans.
    pub(crate) fn from_json(value: serde_json::Value) -> Self {
        Self::made(match value {
            serde_json::Value::Null => Value::Null,
            serde_json::Value::Bool(b) => Value::Bool(b),
            serde_json::Value::Number(n) => match n.as_i64() {
                Some(n) => Value::Integer(n),
                None => Value::Float(n.as_f64().unwrap_or(f64::NAN)),
            },
            serde_json::Value::String(s) => Value::Text(s),
            serde_json::Value::Array(items) => Value::List(items.into_iter().map(Self::from_json).collect()),
            serde_json::Value::Object(map) => Value::Table(
                map.into_iter().map(|(key, v)| Entry { key, span: None, node: Self::from_json(v) }).collect(),
            ),
        })
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn points_at_characters_not_bytes() {
        let text = "a = 1\n\"größe\" = 2\n";
        let source = Source::new("p.toml", text);
        let at = text.find('2').unwrap();
        assert_eq!(source.locate(at), (2, 11));
        let error = source.error(Code::PolicyValue, Some(&(at..at + 1)), "no").to_string();
        assert_eq!(error, "FN-E503 p.toml:2:11: no\n    2 | \"größe\" = 2\n      |           ^");
    }

    #[test]
    fn finds_places_in_long_texts() {
        let text = "größe = 1\n".repeat(3_000) + &"ö".repeat(10_000);
        let source = Source::new("p", &text);
        for (offset, _) in text.char_indices().step_by(997) {
            let before = &text[..offset];
            let line = before.matches('\n').count() + 1;
            let column = before.rsplit('\n').next().unwrap().chars().count() + 1;
            assert_eq!(source.locate(offset), (line, column), "{offset}");
        }
    }

    #[test]
    fn shortens_long_lines_around_the_span() {
        let text = format!("{}X{}", "a".repeat(500), "b".repeat(500));
        let error = Source::new("p", &text).error(Code::PolicySyntax, Some(&(500..501)), "no").to_string();
        let lines: Vec<&str> = error.lines().collect();
        assert_eq!(lines[1].chars().count(), 8 + SNIPPET);
        assert_eq!(lines[1].find('X'), lines[2].find('^'));
    }

    #[test]
    fn an_offset_at_the_end_is_on_the_last_line() {
        let source = Source::new("p", "a = \n");
        assert_eq!(source.locate(5), (2, 1));
        assert!(source.error(Code::PolicySyntax, Some(&(5..5)), "no").to_string().ends_with('^'));
    }
}
