//! JSON text into the tree with spans: a parser of our own, for errors that show the line and name the slip.
//!
//! DeepSpeed reads its files with comments and trailing commas, so that dialect is here too. The Python dialect reads what
//! people paste from their scripts: `True`, single quotes, a call such as `DeepSpeedStrategy(stage=3, ...)` or `dict(...)`
//! as a table (a call's name is its entry [`CALLEE`]), and what only running it would tell as [`Value::Code`].

use super::source::{CALLEE, Entry, MAX_KEYS, Node, Source, Value};
use crate::error::{Code, Error, Result};

/// Deepest nesting that is read.
pub(super) const MAX_DEPTH: usize = 64;

/// What is accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// RFC 8259, duplicate keys refused.
    Json,
    /// The same with comments (`//`, `#`, `/* */`) and commas after the last item.
    Relaxed,
    /// Python literals and keyword arguments.
    Python,
}

/// Parses a document.
///
/// # Errors
/// `FN-E501` with the place and what was expected there.
pub(crate) fn parse(source: &Source<'_>, text: &str, dialect: Dialect) -> Result<Node> {
    let mut parser = Parser { source, text, at: 0, dialect };
    if text.starts_with('\u{feff}') {
        parser.at = '\u{feff}'.len_utf8();
    }
    let node = parser.value(0)?;
    parser.space();
    if parser.at < text.len() {
        return Err(parser.fault("nothing may follow the value"));
    }
    Ok(node)
}

pub(super) struct Parser<'a> {
    pub(super) source: &'a Source<'a>,
    pub(super) text: &'a str,
    pub(super) at: usize,
    pub(super) dialect: Dialect,
}

impl<'a> Parser<'a> {
    pub(super) fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    pub(super) fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn python(&self) -> bool {
        self.dialect == Dialect::Python
    }

    pub(super) fn fault(&self, what: &str) -> Error {
        self.fault_at(self.at, what)
    }

    pub(super) fn fault_at(&self, at: usize, what: &str) -> Error {
        let width = self.text[at..].chars().next().map_or(1, char::len_utf8);
        self.source.error(Code::PolicySyntax, Some(&(at..at + width)), what)
    }

    /// Skips white space and the dialect's comments.
    pub(super) fn space(&mut self) {
        loop {
            let rest = self.rest();
            self.at += rest.len() - rest.trim_start_matches([' ', '\t', '\r', '\n']).len();
            let rest = self.rest();
            let relaxed = self.dialect == Dialect::Relaxed;
            let end = if relaxed && rest.starts_with("/*") {
                rest.find("*/").map(|at| at + 2)
            } else if (relaxed && rest.starts_with("//")) || (self.dialect != Dialect::Json && rest.starts_with('#')) {
                rest.find('\n')
            } else {
                return;
            };
            self.at += end.unwrap_or(rest.len());
        }
    }

    pub(super) fn take(&mut self, c: char) -> bool {
        let found = self.peek() == Some(c);
        if found {
            self.at += c.len_utf8();
        }
        found
    }

    pub(super) fn value(&mut self, depth: usize) -> Result<Node> {
        self.space();
        let start = self.at;
        if depth > MAX_DEPTH {
            return Err(self.fault("nested too deep"));
        }
        let value = match self.peek() {
            Some('{') => self.table(depth)?,
            Some('[') => self.list(']', depth)?,
            Some('(') if self.python() => self.list(')', depth)?,
            Some('"') => Value::Text(self.string()?),
            Some('\'') if self.python() => Value::Text(self.string()?),
            Some(c) if c == '-' || c == '.' || c.is_ascii_digit() => self.number()?,
            Some(c) if c.is_alphabetic() || c == '_' => self.word(depth)?,
            Some('\'') => return Err(self.fault("JSON strings take double quotes")),
            Some('}' | ']') => return Err(self.fault("a value is missing here, or the comma before is one too many")),
            Some('#') => return Err(self.fault("JSON has no comments")),
            Some('/') => return Err(self.fault("JSON has no comments")),
            Some(_) => return Err(self.fault("a value was expected here")),
            None => return Err(self.fault("the text ends where a value was expected")),
        };
        Ok(Node { span: Some(start..self.at), value })
    }

    fn table(&mut self, depth: usize) -> Result<Value> {
        let open = self.at;
        self.at += 1;
        let mut entries: Vec<Entry> = Vec::new();
        loop {
            self.space();
            if self.closes('}', entries.is_empty())? {
                return Ok(Value::Table(entries));
            }
            if self.python() && self.rest().starts_with("**") {
                let entry = self.unpacked()?;
                self.add(&mut entries, entry)?;
                self.separator('}', open)?;
                continue;
            }
            let start = self.at;
            let key = match self.peek() {
                Some('"') => self.string()?,
                Some('\'') if self.python() => self.string()?,
                Some(c) if c.is_alphanumeric() || c == '\'' => return Err(self.fault("a key takes double quotes")),
                None => return Err(self.fault_at(open, "this '{' is never closed")),
                Some(_) => return Err(self.fault("a key in double quotes was expected here")),
            };
            let span = start..self.at;
            self.space();
            if !self.take(':') {
                return Err(self.fault(&format!("':' was expected after the key \"{key}\"")));
            }
            let node = self.item(depth + 1)?;
            self.add(&mut entries, Entry { key, span: Some(span), node })?;
            self.separator('}', open)?;
        }
    }

    fn list(&mut self, close: char, depth: usize) -> Result<Value> {
        let open = self.at;
        self.at += 1;
        let mut items = Vec::new();
        loop {
            self.space();
            if self.closes(close, items.is_empty())? {
                return Ok(Value::List(items));
            }
            items.push(self.item(depth + 1)?);
            self.separator(close, open)?;
        }
    }

    pub(super) fn add(&self, entries: &mut Vec<Entry>, entry: Entry) -> Result<()> {
        if entries.len() >= MAX_KEYS {
            return Err(self.source.too_many_keys(entry.span.as_ref()));
        }
        if entries.iter().any(|e| e.key == entry.key) {
            let what = format!("the key \"{}\" is there twice", entry.key);
            return Err(self.source.error(Code::PolicySyntax, entry.span.as_ref(), &what));
        }
        entries.push(entry);
        Ok(())
    }

    /// Skips the closing bracket if it comes next, and says whether it did; in JSON it may not follow a comma.
    pub(super) fn closes(&mut self, close: char, empty: bool) -> Result<bool> {
        if self.peek() != Some(close) {
            return Ok(false);
        }
        if !empty && self.dialect == Dialect::Json && self.text[..self.at].trim_end().ends_with(',') {
            let comma = self.text[..self.at].trim_end().len() - 1;
            return Err(self.fault_at(comma, "this comma is one too many: nothing follows it"));
        }
        self.at += close.len_utf8();
        Ok(true)
    }

    /// Skips the comma after an item, or stops before the closing bracket.
    pub(super) fn separator(&mut self, close: char, open: usize) -> Result<()> {
        let end = self.at;
        self.space();
        if self.take(',') || self.peek() == Some(close) {
            return Ok(());
        }
        match self.peek() {
            None => {
                let bracket = &self.text[open..=open];
                Err(self.fault_at(open, &format!("this '{bracket}' is never closed")))
            }
            Some(_) => {
                let last = self.text[..end].char_indices().next_back().map_or(0, |(at, _)| at);
                Err(self.fault_at(last, &format!("',' or '{close}' is missing after this")))
            }
        }
    }

    /// A value inside brackets; in Python any expression.
    pub(super) fn item(&mut self, depth: usize) -> Result<Node> {
        if self.python() { self.expression(depth) } else { self.value(depth) }
    }

    pub(super) fn name(&mut self) -> String {
        let rest = self.rest();
        let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == '.')).unwrap_or(rest.len());
        self.at += end;
        rest[..end].to_owned()
    }

    fn word(&mut self, depth: usize) -> Result<Value> {
        let start = self.at;
        let name = self.name();
        if self.python() && self.rest().trim_start().starts_with(['=', '(']) {
            self.space();
        }
        match (name.as_str(), self.python()) {
            ("true", _) | ("True", true) => Ok(Value::Bool(true)),
            ("false", _) | ("False", true) => Ok(Value::Bool(false)),
            ("null", _) | ("None", true) => Ok(Value::Null),
            ("True" | "False" | "None", false) => {
                let json = if name == "None" { "null".to_owned() } else { name.to_lowercase() };
                Err(self.fault_at(start, &format!("{name} is Python; JSON writes {json}")))
            }
            (_, true) if self.peek() == Some('(') => {
                let mut table = self.arguments(depth)?;
                if let Value::Table(entries) = &mut table
                    && name != "dict"
                {
                    let node = Node::made(Value::Text(name));
                    entries.insert(0, Entry { key: CALLEE.to_owned(), span: None, node });
                }
                Ok(table)
            }
            (_, true) if self.peek() == Some('=') && !self.rest().starts_with("==") => {
                self.at += 1;
                Ok(self.item(depth + 1)?.value)
            }
            _ => Err(self.fault_at(start, &format!("'{name}' is not a value; strings take double quotes"))),
        }
    }

    fn number(&mut self) -> Result<Value> {
        let (start, rest) = (self.at, self.rest());
        let end = rest
            .find(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.' | '_')))
            .unwrap_or(rest.len());
        self.at += end;
        let text = if self.python() { rest[..end].replace('_', "") } else { rest[..end].to_owned() };
        let digits = text.strip_prefix('-').unwrap_or(&text);
        let plain = digits.starts_with(|c: char| c.is_ascii_digit())
            && (self.python() || !digits.starts_with('0') || !digits[1..].starts_with(|c: char| c.is_ascii_digit()))
            && !digits.ends_with('.')
            && !digits.contains(".e");
        if let (true, Ok(n)) = (plain, text.parse()) {
            return Ok(Value::Integer(n));
        }
        match text.parse::<f64>() {
            Ok(x) if (plain || self.python()) && x.is_finite() => Ok(Value::Float(x)),
            _ => Err(self.fault_at(start, &format!("'{}' is not a number", &rest[..end]))),
        }
    }

    fn string(&mut self) -> Result<String> {
        let start = self.at;
        let quote = self.peek().unwrap_or('"');
        self.at += 1;
        let mut out = String::new();
        loop {
            let Some(c) = self.peek() else { return Err(self.fault_at(start, "this string is never closed")) };
            if c == '\n' {
                return Err(self.fault_at(start, "this string is not closed on its line"));
            }
            self.at += c.len_utf8();
            match c {
                _ if c == quote => return Ok(out),
                '\\' => out.push(self.escape()?),
                _ if c < ' ' => return Err(self.fault_at(self.at - 1, "a control character in a string")),
                _ => out.push(c),
            }
        }
    }

    fn escape(&mut self) -> Result<char> {
        let start = self.at - 1;
        let c = self.peek().ok_or_else(|| self.fault_at(start, "the text ends in an escape"))?;
        self.at += c.len_utf8();
        Ok(match c {
            'n' => '\n',
            't' => '\t',
            'r' => '\r',
            'b' => '\u{8}',
            'f' => '\u{c}',
            '"' | '\\' | '/' | '\'' => c,
            'u' => {
                let first = self.hex(start)?;
                let code = if (0xd800..0xdc00).contains(&first) && self.rest().starts_with("\\u") {
                    self.at += 2;
                    0x10000 + ((first - 0xd800) << 10) + (self.hex(start)?.wrapping_sub(0xdc00) & 0x3ff)
                } else {
                    first
                };
                char::from_u32(code).ok_or_else(|| self.fault_at(start, "half of a surrogate pair"))?
            }
            _ => return Err(self.fault_at(start, "an unknown escape")),
        })
    }

    fn hex(&mut self, start: usize) -> Result<u32> {
        let digits = self.rest().get(..4).filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()));
        let code = digits.and_then(|d| u32::from_str_radix(d, 16).ok());
        let code = code.ok_or_else(|| self.fault_at(start, "four hexadecimal digits were expected"))?;
        self.at += 4;
        Ok(code)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(text: &str, dialect: Dialect) -> Result<Node> {
        parse(&Source::new("t.json", text), text, dialect)
    }

    #[test]
    fn agrees_with_serde_json() {
        for text in [
            "{}",
            "[]",
            " [1, -2, 3.5, 1e9, 0.5e-3, 12345678901234567890] ",
            "\"\\u00e9\\ud83d\\ude00\\n\\/\"",
            r#"{"a": {"b": [true, false, null]}, "c": ""}"#,
            "-0.0",
            "0",
        ] {
            let want: serde_json::Value = serde_json::from_str(text).unwrap();
            let want = Node::from_json(want).to_json();
            assert_eq!(read(text, Dialect::Json).unwrap().to_json(), want, "{text}");
        }
    }

    #[test]
    fn names_the_slip_and_its_place() {
        for (text, place, what) in [
            ("{\"a\": 1\n \"b\": 2}", "t.json:1:7:", "',' or '}' is missing after this"),
            ("{\"a\": 1,\n}", "t.json:1:8:", "one too many"),
            ("{\"a\": True}", "t.json:1:7:", "JSON writes true"),
            ("{\"a\": 'x'}", "t.json:1:7:", "double quotes"),
            ("{a: 1}", "t.json:1:2:", "a key takes double quotes"),
            ("{\"a\" 1}", "t.json:1:6:", "':' was expected"),
            ("{\"a\": [1, 2}", "t.json:1:11:", "',' or ']' is missing"),
            ("{\"a\": 1", "t.json:1:1:", "never closed"),
            ("{\"a\": \"x\n\"}", "t.json:1:7:", "not closed on its line"),
            ("{\"a\": 1} x", "t.json:1:10:", "nothing may follow"),
            ("{\"a\": 1, \"a\": 2}", "t.json:1:10:", "there twice"),
            ("{\"a\": 01}", "t.json:1:7:", "not a number"),
            ("{\"a\": 1.}", "t.json:1:7:", "not a number"),
            ("// x\n{}", "t.json:1:1:", "no comments"),
            ("", "t.json:1:1:", "ends where a value"),
            ("{\"a\": \"\\x\"}", "t.json:1:8:", "unknown escape"),
        ] {
            let error = read(text, Dialect::Json).unwrap_err();
            assert_eq!(error.code(), Code::PolicySyntax);
            assert!(error.to_string().contains(place) && error.to_string().contains(what), "{text}: {error}");
        }
        assert!(read(&"[".repeat(10_000), Dialect::Json).is_err());
    }

    #[test]
    fn reads_python() {
        let node = read("strategy = X.Y(a=1_000, b='x', c={'d': None,}, # why\n e=(True, False))", Dialect::Python);
        let want = serde_json::json!({"_target_": "X.Y", "a": 1000, "b": "x", "c": {"d": null}, "e": [true, false]});
        assert_eq!(node.unwrap().to_json(), want);
    }

    #[test]
    fn reads_comments_where_deepspeed_does() {
        let text = "// a\n{\"x\": 1, # b\n /* c,\n} */ \"y\": [1, 2,],\n}\n// d";
        assert_eq!(read(text, Dialect::Relaxed).unwrap().to_json(), serde_json::json!({"x": 1, "y": [1, 2]}));
        assert!(read(text, Dialect::Json).is_err());
        assert!(read("{\"x\": 1,, \"y\": 2}", Dialect::Relaxed).is_err());
    }

    proptest! {
        #[test]
        fn never_panics_and_never_accepts_what_serde_refuses(text in "[\\[\\]{}:,\"a-e0-9.\\\\+ \n\u{e9}trufalsn-]{0,40}") {
            let ours = read(&text, Dialect::Json);
            let theirs: std::result::Result<serde_json::Value, _> = serde_json::from_str(&text);
            if ours.is_ok() {
                prop_assert!(theirs.is_ok(), "{text:?}");
            }
            let _ = read(&text, Dialect::Python);
            let _ = read(&text, Dialect::Relaxed);
        }
    }
}
