//! TOML text into the tree with spans.

use std::ops::Range;

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::source::{Entry, Node, Source, Value};
use crate::error::{Code, Result};

/// Parses a document.
///
/// # Errors
/// `FN-E501` with the place and, for the commonest slip, what to write.
pub(crate) fn parse(source: &Source<'_>, text: &str) -> Result<Node> {
    let table = DeTable::parse(text).map_err(|e| {
        let span = e.span().unwrap_or(0..0);
        let what = e.message().lines().collect::<Vec<_>>().join("; ");
        let error = source.error(Code::PolicySyntax, Some(&span), &what);
        match unquoted(text, &span) {
            Some(word) => error.action(format!("Strings need quotes: write \"{word}\".")),
            None => error,
        }
    })?;
    let span = table.span();
    Ok(Node { span: Some(span), value: read_table(table.into_inner()) })
}

fn read_table(table: DeTable<'_>) -> Value {
    let mut entries: Vec<Entry> = table
        .into_iter()
        .map(|(key, value)| Entry { span: Some(key.span()), key: key.into_inner().into_owned(), node: read(value) })
        .collect();
    entries.sort_by_key(|e| e.span.as_ref().map(|s| s.start));
    Value::Table(entries)
}

fn read(value: Spanned<DeValue<'_>>) -> Node {
    let span = Some(value.span());
    let value = match value.into_inner() {
        DeValue::String(s) => Value::Text(s.into_owned()),
        DeValue::Integer(n) => match i64::from_str_radix(n.as_str(), n.radix()) {
            Ok(n) => Value::Integer(n),
            Err(_) => Value::Float(n.as_str().parse().unwrap_or(f64::INFINITY)),
        },
        DeValue::Float(x) => Value::Float(x.as_str().parse().unwrap_or(f64::NAN)),
        DeValue::Boolean(b) => Value::Bool(b),
        DeValue::Datetime(d) => Value::Text(d.to_string()),
        DeValue::Array(items) => Value::List(items.into_iter().map(read).collect()),
        DeValue::Table(table) => read_table(table),
    };
    Node { span, value }
}

/// The bare word after the `=` of the line at fault: `hbm = 12GiB`.
fn unquoted<'a>(text: &'a str, span: &Range<usize>) -> Option<&'a str> {
    let at = span.start.min(text.len());
    let start = text.get(..at)?.rfind('\n').map_or(0, |n| n + 1);
    let line = text.get(start..)?.lines().next()?;
    let (_, value) = line.split_once('=')?;
    let value = value.split('#').next().unwrap_or_default().trim();
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | ':' | '/' | '*' | '-' | ' ');
    (value.chars().any(|c| c.is_ascii_alphabetic() || c == '/') && value.chars().all(plain)).then_some(value)
}
