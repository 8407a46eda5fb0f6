//! Expressions of Python as far as they can be read without running them; the rest is kept as it is written.

use super::{
    arithmetic,
    parse_json::{Dialect, MAX_DEPTH, Parser},
    source::{CALLEE, Entry, Node, Source, Value},
};
use crate::error::Result;

/// How much of an expression is kept, in characters.
const MAX_CODE: usize = 200;

/// Parses the expression of Python that begins at a byte, up to the end of its logical line: what it is, and where it ends.
///
/// # Errors
/// `FN-E501` if a bracket or a string is never closed.
pub(crate) fn parse_expression(source: &Source<'_>, text: &str, at: usize) -> Result<(Node, usize)> {
    let mut parser = Parser { source, text, at, dialect: Dialect::Python };
    let node = parser.expression(0)?;
    Ok((node, parser.at))
}

/// Parses the arguments of a call from its `(` on: what they are, and where the call ends.
///
/// # Errors
/// `FN-E501` if a bracket or a string is never closed.
pub(crate) fn parse_call(source: &Source<'_>, text: &str, at: usize) -> Result<(Node, usize)> {
    let mut parser = Parser { source, text, at, dialect: Dialect::Python };
    if parser.peek() != Some('(') {
        return Err(parser.fault("a call was expected here"));
    }
    let value = parser.arguments(0)?;
    Ok((Node { span: Some(at..parser.at), value }, parser.at))
}

impl Parser<'_> {
    /// `name(key=value, ...)` after its `(`, through its `)`.
    pub(super) fn arguments(&mut self, depth: usize) -> Result<Value> {
        let open = self.at;
        self.at += 1;
        let mut entries: Vec<Entry> = Vec::new();
        loop {
            self.space();
            if self.closes(')', entries.is_empty())? {
                return Ok(Value::Table(entries));
            }
            if self.rest().starts_with("**") {
                let entry = self.unpacked()?;
                self.add(&mut entries, entry)?;
                self.separator(')', open)?;
                continue;
            }
            let start = self.at;
            let mut key = self.name();
            let mut span = start..self.at;
            self.space();
            if key.is_empty() || self.rest().starts_with("==") || !self.take('=') {
                // An argument by its place.
                key = format!("argument {}", entries.len() + 1);
                span = start..start;
                self.at = start;
            }
            let node = self.item(depth + 1)?;
            self.add(&mut entries, Entry { key, span: Some(span), node })?;
            self.separator(')', open)?;
        }
    }

    /// `**name` in a dict or a call.
    pub(super) fn unpacked(&mut self) -> Result<Entry> {
        let start = self.at;
        self.at += 2;
        self.space();
        let name = self.at;
        if !self.skip(false) || self.at == name {
            return Err(self.fault("a value was expected here"));
        }
        let code = self.text[start..self.at].trim_end().to_owned();
        let span = Some(start..start + code.len());
        Ok(Entry { key: code.clone(), span: span.clone(), node: Node { span, value: Value::Code(code) } })
    }

    /// A literal, a call, or what only running it would tell. At depth 0 it ends with its line.
    pub(super) fn expression(&mut self, depth: usize) -> Result<Node> {
        self.space();
        let start = self.at;
        let literal = self.value(depth);
        let rest = self.rest().trim_start_matches([' ', '\t', '\r']);
        let inside = if depth == 0 { rest } else { rest.trim_start() };
        let ends = inside.is_empty() || inside.starts_with([',', ')', ']', '}', '#', '\n', ';']);
        if ends && let Ok(node) = literal {
            return Ok(converted(node));
        }
        self.at = start;
        let closed = self.skip(depth == 0);
        let end = start + self.text[start..self.at].trim_end().len();
        if !closed || end == start || depth > MAX_DEPTH {
            return Err(literal.err().unwrap_or_else(|| self.fault("a value was expected here")));
        }
        self.at = end;
        if let Some(value) = arithmetic::value(&self.text[start..end]) {
            return Ok(Node { span: Some(start..end), value });
        }
        Ok(Node { span: Some(start..end), value: Value::Code(self.text[start..end].chars().take(MAX_CODE).collect()) })
    }

    /// Skips an expression: stops at the comma or bracket that ends it, or the end of a line outside of brackets. False if a
    /// bracket is never closed.
    fn skip(&mut self, line: bool) -> bool {
        let mut open = 0_usize;
        while let Some(c) = self.peek() {
            match c {
                '"' | '\'' => {
                    self.at += quoted_length(self.rest());
                    continue;
                }
                '#' => {
                    self.at += self.rest().find('\n').unwrap_or(self.rest().len());
                    continue;
                }
                '\\' if self.rest().starts_with("\\\n") => self.at += 1,
                '(' | '[' | '{' => open += 1,
                ')' | ']' | '}' if open == 0 => return true,
                ')' | ']' | '}' => open -= 1,
                ',' if open == 0 && !line => return true,
                '\n' if open == 0 && line => return true,
                _ => {}
            }
            self.at += c.len_utf8();
        }
        open == 0
    }
}

/// What `int(1e6)`, `Path("a")` and the like stand for: their only argument; `os.path.join("a", "b")`: the path.
fn converted(node: Node) -> Node {
    const CONVERSIONS: &[&str] = &["float", "str", "bool", "Path", "pathlib.Path", "dict"];
    const JOINS: &[&str] = &["os.path.join", "Path", "pathlib.Path"];
    match &node.value {
        Value::Table(entries) => match &entries[..] {
            [Entry { key, node: Node { value: Value::Text(name), .. }, .. }, argument]
                if key == CALLEE && name == "int" && argument.key == "argument 1" =>
            {
                Node { span: argument.node.span.clone(), value: truncated(&argument.node.value) }
            }
            [Entry { key, node: Node { value: Value::Text(name), .. }, .. }, parts @ ..]
                if key == CALLEE && parts.len() > 1 && JOINS.contains(&name.as_str()) =>
            {
                let texts: Option<Vec<&str>> = parts
                    .iter()
                    .map(|part| match &part.node.value {
                        Value::Text(text) if part.key.starts_with("argument ") => Some(text.as_str()),
                        _ => None,
                    })
                    .collect();
                let path = texts.map(|texts| texts.iter().collect::<std::path::PathBuf>());
                match path.as_deref().and_then(std::path::Path::to_str) {
                    Some(path) => Node { value: Value::Text(path.to_owned()), ..node },
                    None => node,
                }
            }
            [Entry { key, node: name, .. }, argument]
                if key == CALLEE
                    && argument.key == "argument 1"
                    && matches!(&name.value, Value::Text(name) if CONVERSIONS.contains(&name.as_str())) =>
            {
                argument.node.clone()
            }
            _ => node,
        },
        _ => node,
    }
}

/// A number without what stands behind its point.
fn truncated(value: &Value) -> Value {
    match value {
        Value::Float(x) if x.fract() != 0.0 => Value::Float(x.trunc()),
        other => other.clone(),
    }
}

/// Bytes of the string of Python that a text begins with, in any quotes; one that is not closed ends with its line.
pub(crate) fn quoted_length(text: &str) -> usize {
    let quote = text.get(..3).filter(|q| *q == "\"\"\"" || *q == "'''").unwrap_or(&text[..1]);
    let mut at = quote.len();
    while let Some(c) = text[at..].chars().next() {
        if text[at..].starts_with(quote) {
            return at + quote.len();
        }
        if c == '\n' && quote.len() == 1 {
            return at;
        }
        let escaped = if c == '\\' { text[at + 1..].chars().next() } else { None };
        at += c.len_utf8() + escaped.map_or(0, char::len_utf8);
    }
    text.len()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn what_only_running_would_tell_is_kept() {
        let text = "F(m, a=int(1e6), b=[x for x in y], c=\"u\" if v else 'w', d={'e': n ** 3, **f}, g=1) # h\nnext";
        let (node, end) = parse_expression(&Source::new("t.py", text), text, 0).unwrap();
        assert_eq!(&text[end..], " # h\nnext");
        let want = serde_json::json!({
            "_target_": "F", "argument 1": "m", "a": 1e6,
            "b": ["x for x in y"], "c": "\"u\" if v else 'w'", "d": {"e": "n ** 3", "**f": "**f"}, "g": 1,
        });
        assert_eq!(node.to_json(), want);
    }
}
