//! YAML text into the tree with spans, by the scalars that PyYAML knows.

use std::collections::BTreeMap;

use saphyr_parser::{Event, Parser, ScalarStyle, Span};

use crate::{
    error::{Code, Result},
    policy::source::{Entry, MAX_KEYS, Node, Source, Value},
};

/// Deepest nesting that is read.
const MAX_DEPTH: usize = 64;

/// Most values that all aliases of a text stand for together.
const MAX_COPIED: usize = 10_000;

/// What a text holds.
pub(super) struct Parsed {
    /// Its documents that are not empty.
    pub(super) documents: Vec<Node>,
    /// Keys that their table has again further down, with the values that do not count.
    pub(super) twice: Vec<(String, Node)>,
}

/// Parses all documents.
///
/// # Errors
/// `FN-E501` with the place.
pub(super) fn parse(source: &Source<'_>, text: &str) -> Result<Parsed> {
    let mut reader = Reader {
        source,
        offsets: text.char_indices().map(|(at, _)| at).collect(),
        len: text.len(),
        parser: Parser::new_from_str(text),
        anchors: BTreeMap::new(),
        copied: 0,
        twice: Vec::new(),
    };
    let mut documents = Vec::new();
    while let Some((event, span)) = reader.next()? {
        match event {
            Event::StreamStart | Event::DocumentStart(_) | Event::DocumentEnd => {}
            Event::StreamEnd => break,
            event => {
                let node = reader.node(event, &span, 0)?;
                if !matches!(node.value, Value::Null) {
                    documents.push(node);
                }
            }
        }
    }
    Ok(Parsed { documents, twice: reader.twice })
}

struct Reader<'a> {
    source: &'a Source<'a>,
    /// Byte offset of every character: the parser counts characters.
    offsets: Vec<usize>,
    len: usize,
    parser: Parser<'a, saphyr_parser::StrInput<'a>>,
    /// What `&name` stands before, by the parser's number of it.
    anchors: BTreeMap<usize, Node>,
    /// Values that aliases stand for.
    copied: usize,
    twice: Vec<(String, Node)>,
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
        let (anchor, value) = match event {
            Event::Scalar(text, style, anchor, _) => (anchor, scalar(&text, style)),
            Event::SequenceStart(anchor, _) => (anchor, self.list(depth)?),
            Event::MappingStart(anchor, _) => (anchor, self.table(depth)?),
            Event::Alias(of) => (0, self.alias(of, span)?),
            _ => return Err(self.fault(span, "a value was expected here")),
        };
        let node = Node { span: Some(self.range(span)), value };
        if anchor > 0 {
            self.anchors.insert(anchor, node.clone());
        }
        Ok(node)
    }

    /// What `*name` stands for. All of them together are bounded: aliases of aliases would grow without end.
    fn alias(&mut self, of: usize, span: &Span) -> Result<Value> {
        let Some(node) = self.anchors.get(&of) else { return Err(self.fault(span, "stands for nothing before it")) };
        self.copied += count(node);
        if self.copied > MAX_COPIED {
            return Err(self.fault(span, "aliases stand for too much"));
        }
        Ok(node.value.clone())
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
            let Some((event, at)) = self.next()? else { break };
            let node = self.node(event, &at, depth + 1)?;
            if let Some(before) = entries.iter().position(|e| e.key == key) {
                let earlier = entries.remove(before);
                self.twice.push((key.clone(), earlier.node));
            }
            entries.push(Entry { key, span: Some(self.range(&span)), node });
        }
        Ok(Value::Table(merged(entries)))
    }
}

/// With what `<<: *base` brings in where the table does not say it by itself.
fn merged(mut entries: Vec<Entry>) -> Vec<Entry> {
    let Some(at) = entries.iter().position(|e| e.key == "<<") else { return entries };
    let bases = match entries.remove(at).node.value {
        Value::List(bases) => bases,
        value => vec![Node::made(value)],
    };
    for base in bases {
        let Value::Table(more) = base.value else { continue };
        for entry in more {
            if entries.len() < MAX_KEYS && entries.iter().all(|e| e.key != entry.key) {
                entries.push(entry);
            }
        }
    }
    entries
}

/// How many values a tree has.
fn count(node: &Node) -> usize {
    match &node.value {
        Value::List(items) => 1 + items.iter().map(count).sum::<usize>(),
        Value::Table(entries) => 1 + entries.iter().map(|e| count(&e.node)).sum::<usize>(),
        _ => 1,
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
