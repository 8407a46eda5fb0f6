//! From a parsed tree to typed values by serde, with an error that knows the key and the place.

use std::{fmt, ops::Range};

use serde::de::{self, IntoDeserializer, Visitor, value::StrDeserializer};

use super::{
    source::{Entry, Node, Source, Value},
    suggest,
};
use crate::error::{Code, Error};

/// Reads `T` from a tree; `keys` are all dotted keys, to find one that was put into the wrong section.
pub(crate) fn decode<T: de::DeserializeOwned>(source: &Source<'_>, node: &Node, keys: &[&str]) -> Result<T, Error> {
    T::deserialize(NodeReader { node }).map_err(|fault| fault.into_error(source, keys))
}

/// What is wrong, while the path to it is still being put together.
#[derive(Debug)]
pub(crate) struct Fault(Box<FaultParts>);

#[derive(Debug)]
struct FaultParts {
    kind: Kind,
    path: String,
    span: Option<Range<usize>>,
}

#[derive(Debug)]
enum Kind {
    UnknownKey { key: String, valid: &'static [&'static str] },
    MissingKey(&'static str),
    Value(String),
}

impl Fault {
    fn new(kind: Kind) -> Self {
        Self(Box::new(FaultParts { kind, path: String::new(), span: None }))
    }

    /// The innermost place wins.
    fn at(mut self, span: &Option<Range<usize>>) -> Self {
        if self.0.span.is_none() {
            self.0.span.clone_from(span);
        }
        self
    }

    fn under(mut self, key: &str) -> Self {
        let dot = if self.0.path.is_empty() || self.0.path.starts_with('[') { "" } else { "." };
        self.0.path = format!("{key}{dot}{}", self.0.path);
        self
    }

    fn into_error(self, source: &Source<'_>, keys: &[&str]) -> Error {
        let FaultParts { kind, path, span } = *self.0;
        let section = if path.is_empty() { "a policy".to_owned() } else { format!("[{path}]") };
        match kind {
            Kind::UnknownKey { key, valid } => {
                let full = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                let hint = match suggest::nearest(&key, valid.iter().copied()) {
                    Some(near) => format!(" (did you mean '{near}'?)"),
                    None => elsewhere(&key, keys),
                };
                source
                    .error(Code::PolicyKey, span.as_ref(), &format!("unknown key '{full}'{hint}"))
                    .action(format!("Valid keys of {section}: {}.", valid.join(", ")))
            }
            Kind::MissingKey(key) => {
                source.error(Code::PolicyKey, span.as_ref(), &format!("{section} lacks the key '{key}'"))
            }
            Kind::Value(what) => {
                let key = if path.is_empty() { String::new() } else { format!("{path}: ") };
                source.error(Code::PolicyValue, span.as_ref(), &format!("{key}{what}"))
            }
        }
    }
}

/// A hint to the key of the same name in another section.
fn elsewhere(key: &str, keys: &[&str]) -> String {
    let found: Vec<&str> = keys.iter().filter(|k| k.rsplit('.').next() == Some(key)).copied().collect();
    match found[..] {
        [one] => format!(" (did you mean '{one}'?)"),
        [] => String::new(),
        _ => format!(" (did you mean one of {}?)", found.join(", ")),
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} at '{}'", self.0.kind, self.0.path)
    }
}

impl std::error::Error for Fault {}

impl de::Error for Fault {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::new(Kind::Value(message.to_string()))
    }

    fn invalid_type(found: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        let expected = match expected.to_string().as_str() {
            "i64" | "i32" | "u64" | "u32" => "a whole number".to_owned(),
            "f64" => "a number".to_owned(),
            "string" | "str" => "a text".to_owned(),
            other => other.replace("a sequence", "a list"),
        };
        let instead = match found {
            de::Unexpected::Str(text) if expected == "a list" => format!(": write [{text:?}]"),
            _ => String::new(),
        };
        let found = match found {
            de::Unexpected::Str(text) => format!("the string \"{text}\""),
            de::Unexpected::Signed(n) => format!("the number {n}"),
            de::Unexpected::Float(x) => format!("the number {x}"),
            de::Unexpected::Bool(b) => format!("{b}"),
            de::Unexpected::Unit => "null".to_owned(),
            de::Unexpected::Seq => "a list".to_owned(),
            de::Unexpected::Map => "a table".to_owned(),
            other => other.to_string(),
        };
        Self::new(Kind::Value(format!("{found} is not {expected}{instead}")))
    }

    fn unknown_variant(word: &str, valid: &'static [&'static str]) -> Self {
        let hint = suggest::did_you_mean(word, valid.iter().copied());
        Self::new(Kind::Value(format!("'{word}' is not one of {}{hint}", valid.join(", "))))
    }

    fn unknown_field(key: &str, valid: &'static [&'static str]) -> Self {
        Self::new(Kind::UnknownKey { key: key.to_owned(), valid })
    }

    fn missing_field(key: &'static str) -> Self {
        Self::new(Kind::MissingKey(key))
    }
}

struct NodeReader<'a> {
    node: &'a Node,
}

impl NodeReader<'_> {
    fn unexpected(&self) -> de::Unexpected<'_> {
        match &self.node.value {
            Value::Null => de::Unexpected::Unit,
            Value::Bool(b) => de::Unexpected::Bool(*b),
            Value::Integer(n) => de::Unexpected::Signed(*n),
            Value::Float(x) => de::Unexpected::Float(*x),
            Value::Text(text) => de::Unexpected::Str(text),
            Value::List(_) => de::Unexpected::Seq,
            Value::Table(_) => de::Unexpected::Map,
            Value::Code(_) => de::Unexpected::Other("an expression"),
        }
    }
}

impl<'de> de::Deserializer<'de> for NodeReader<'_> {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match &self.node.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(b) => visitor.visit_bool(*b),
            Value::Integer(n) => visitor.visit_i64(*n),
            Value::Float(x) => visitor.visit_f64(*x),
            Value::Text(text) | Value::Code(text) => visitor.visit_str(text),
            Value::List(items) => visitor.visit_seq(Items { items: items.iter(), index: 0 }),
            Value::Table(entries) => visitor.visit_map(Entries { entries: entries.iter(), value: None }),
        }
        .map_err(|fault| fault.at(&self.node.span))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_some(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        words: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        match &self.node.value {
            Value::Text(text) => {
                let word: StrDeserializer<'_, Fault> = text.as_str().into_deserializer();
                visitor.visit_enum(word)
            }
            _ => Err(de::Error::invalid_type(self.unexpected(), &format!("one of {}", words.join(", ")).as_str())),
        }
        .map_err(|fault| fault.at(&self.node.span))
    }

    /// Only a table is a section: serde would take a list for its fields in order.
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        match self.node.value {
            Value::Table(_) => self.deserialize_any(visitor),
            _ => {
                let fault: Fault = de::Error::invalid_type(self.unexpected(), &visitor);
                Err(fault.at(&self.node.span))
            }
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_newtype_struct(self)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf unit unit_struct
        seq tuple tuple_struct map identifier ignored_any
    }
}

struct Items<'a> {
    items: std::slice::Iter<'a, Node>,
    index: usize,
}

impl<'de> de::SeqAccess<'de> for Items<'_> {
    type Error = Fault;

    fn next_element_seed<S: de::DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, Fault> {
        let Some(node) = self.items.next() else { return Ok(None) };
        let index = self.index;
        self.index += 1;
        seed.deserialize(NodeReader { node })
            .map(Some)
            .map_err(|fault| fault.under(&format!("[{index}]")).at(&node.span))
    }
}

struct Entries<'a> {
    entries: std::slice::Iter<'a, Entry>,
    value: Option<&'a Entry>,
}

impl<'de> de::MapAccess<'de> for Entries<'_> {
    type Error = Fault;

    fn next_key_seed<S: de::DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, Fault> {
        let Some(entry) = self.entries.next() else { return Ok(None) };
        self.value = Some(entry);
        let key: StrDeserializer<'_, Fault> = entry.key.as_str().into_deserializer();
        seed.deserialize(key).map(Some).map_err(|fault| fault.at(&entry.span))
    }

    fn next_value_seed<S: de::DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Fault> {
        let Some(entry) = self.value.take() else {
            return Err(de::Error::custom("a value was asked for before its key"));
        };
        seed.deserialize(NodeReader { node: &entry.node }).map_err(|fault| fault.under(&entry.key).at(&entry.node.span))
    }
}
