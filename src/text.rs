//! Text that comes from files, made safe to print: a terminal obeys control characters, a reader is misled by hidden ones.

use std::{borrow::Cow, fmt::Write};

/// `text` with every character escaped that a terminal obeys or that cannot be seen, line ends included. For one name,
/// value or path: what comes back stays on one line.
#[must_use]
pub fn printable(text: &str) -> Cow<'_, str> {
    escaped(text, |_| false)
}

/// As [`printable`], but line ends and tabs stay. For whole messages and reports.
#[must_use]
pub fn printable_lines(text: &str) -> Cow<'_, str> {
    escaped(text, |c| matches!(c, '\n' | '\t'))
}

fn escaped(text: &str, kept: impl Fn(char) -> bool) -> Cow<'_, str> {
    let hidden = |c: char| misleads(c) && !kept(c);
    if !text.contains(hidden) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        match c {
            c if !hidden(c) => out.push(c),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            // Valid in JSON, TOML and Python strings alike, so that printed documents keep their meaning.
            c => drop(write!(out, "\\u{:04x}", u32::from(c))),
        }
    }
    Cow::Owned(out)
}

/// Control characters (C0, DEL, C1), and those that change the order of what is shown, break lines, or have no width.
pub(crate) fn misleads(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinary_text_is_not_copied() {
        for text in ["", "model.layers.3.weight", "größe_重み_🙂", "C:\\dir"] {
            assert!(matches!(printable(text), Cow::Borrowed(t) if t == text), "{text}");
        }
    }

    #[test]
    fn what_a_terminal_obeys_is_escaped() {
        assert_eq!(printable("a\x1b[31mb\x07\x7f\u{9b}2Jc"), r"a\u001b[31mb\u0007\u007f\u009b2Jc");
        assert_eq!(printable("one\ntwo\r\t\0"), r"one\ntwo\r\t\u0000");
        assert_eq!(printable("x\u{202e}y\u{200b}\u{feff}\u{2028}"), r"x\u202ey\u200b\ufeff\u2028");
        assert_eq!(printable_lines("one\n\ttwo\r\x1b]0;x\x07"), "one\n\ttwo\\r\\u001b]0;x\\u0007");
    }

    #[test]
    fn a_printed_document_keeps_its_meaning() {
        let name = "a\x1b\u{9b}\u{202e}\x7f";
        let json = serde_json::json!({ "name": name }).to_string();
        let read: serde_json::Value = serde_json::from_str(&printable_lines(&json)).unwrap_or_default();
        assert_eq!(read["name"], name);
        let toml = toml::Table::from_iter([("name".to_owned(), toml::Value::from(name))]).to_string();
        let read: toml::Table = printable_lines(&toml).parse().unwrap_or_default();
        assert_eq!(read["name"].as_str(), Some(name));
    }
}
