//! YAML text into the tree with spans, by the scalars that PyYAML knows.

use saphyr_parser::{Event, Parser, ScalarStyle, Span};

use crate::{
    error::{Code, Result},
    policy::source::{Entry, MAX_KEYS, Node, Source, Value},
};

/// Deepest nesting that is read.
const MAX_DEPTH: usize = 64;

/// Parses the first document.
///
/// # Errors
/// `FN-E501` with the place.
pub(super) fn parse(source: &Source<'_>, text: &str) -> Result<Node> {
    let mut reader = Reader {
        source,
        offsets: text.char_indices().map(|(at, _)| at).collect(),
        len: text.len(),
        parser: Parser::new_from_str(text),
    };
    loop {
        match reader.next()? {
            Some((Event::StreamStart | Event::DocumentStart(_), _)) => {}
            Some((Event::StreamEnd | Event::DocumentEnd, span)) => {
                return Ok(Node { span: Some(reader.range(&span)), value: Value::Table(Vec::new()) });
            }
            Some((event, span)) => return reader.node(event, &span, 0),
            None => return Ok(Node::made(Value::Table(Vec::new()))),
        }
    }
}

struct Reader<'a> {
    source: &'a Source<'a>,
    /// Byte offset of every character: the parser counts characters.
    offsets: Vec<usize>,
    len: usize,
    parser: Parser<'a, saphyr_parser::StrInput<'a>>,
}

impl<'a> Reader<'a> {
    fn byte(&self, character: usize) -> usize {
        self.offsets.get(character).copied().unwrap_or(self.len)
    }

    fn range(&self, span: &Span) -> std::ops::Range<usize> {
        self.byte(span.start.index())..self.byte(span.end.index())
    }

    fn fault(&self, span: &Span, what: &str) -> crate::Error {
        self.source.error(Code::PolicySyntax, Some(&self.range(span)), what)
    }

    fn next(&mut self) -> Result<Option<(Event<'a>, Span)>> {
        self.parser.next_event().transpose().map_err(|e| {
            let at = self.byte(e.marker().index());
            self.source.error(Code::PolicySyntax, Some(&(at..at + 1)), e.info())
        })
    }

    fn node(&mut self, event: Event<'a>, span: &Span, depth: usize) -> Result<Node> {
        if depth > MAX_DEPTH {
            return Err(self.fault(span, "nested too deep"));
        }
        let value = match event {
            Event::Scalar(text, style, ..) => scalar(&text, style),
            Event::SequenceStart(..) => self.list(depth)?,
            Event::MappingStart(..) => self.table(depth)?,
            Event::Alias(_) => return Err(self.fault(span, "aliases are not supported")),
            _ => return Err(self.fault(span, "a value was expected here")),
        };
        Ok(Node { span: Some(self.range(span)), value })
    }

    fn list(&mut self, depth: usize) -> Result<Value> {
        let mut items = Vec::new();
        while let Some((event, span)) = self.next()? {
            if matches!(event, Event::SequenceEnd) {
                break;
            }
            items.push(self.node(event, &span, depth + 1)?);
        }
        Ok(Value::List(items))
    }

    fn table(&mut self, depth: usize) -> Result<Value> {
        let mut entries: Vec<Entry> = Vec::new();
        while let Some((event, span)) = self.next()? {
            let key = match event {
                Event::MappingEnd => break,
                Event::Scalar(key, ..) => key.into_owned(),
                _ => return Err(self.fault(&span, "a key was expected here")),
            };
            if entries.len() >= MAX_KEYS {
                return Err(self.source.too_many_keys(Some(&self.range(&span))));
            }
            if entries.iter().any(|e| e.key == key) {
                return Err(self.fault(&span, &format!("the key \"{key}\" is there twice")));
            }
            let Some((event, at)) = self.next()? else { break };
            let node = self.node(event, &at, depth + 1)?;
            entries.push(Entry { key, span: Some(self.range(&span)), node });
        }
        Ok(Value::Table(entries))
    }
}

fn scalar(text: &str, style: ScalarStyle) -> Value {
    if style != ScalarStyle::Plain {
        return Value::Text(text.to_owned());
    }
    match text.to_ascii_lowercase().as_str() {
        "" | "~" | "null" => return Value::Null,
        "true" | "yes" | "on" => return Value::Bool(true),
        "false" | "no" | "off" => return Value::Bool(false),
        _ => {}
    }
    match (text.parse(), text.parse::<f64>()) {
        (Ok(n), _) => Value::Integer(n),
        (_, Ok(x)) if x.is_finite() => Value::Float(x),
        _ => Value::Text(text.to_owned()),
    }
}
