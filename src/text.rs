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

/// `text` with lines longer than `width` cut between words. What follows stands under the second column of a line of two, and is
/// indented by two more elsewhere. Lines of files that are quoted, with a bar before them, stay as they are.
#[must_use]
pub fn wrapped(text: &str, width: usize) -> String {
    let mut out = String::with_capacity(text.len() + text.len() / 8);
    for line in text.split_inclusive('\n') {
        if line.starts_with(' ') && line.contains(" |") {
            out += line;
            continue;
        }
        let end = line.trim_end_matches('\n').len();
        out += &cut(&line[..end], width, &" ".repeat(hanging(line, width)), "").join("\n");
        out += &line[end..];
    }
    out
}

/// A line in lines of at most `width` characters, broken between words; those after the first begin with `hanging`, and all but the
/// last end with `end`. A word that is too long has a line for itself.
#[must_use]
pub(crate) fn cut(line: &str, width: usize, hanging: &str, end: &str) -> Vec<String> {
    let (mut lead, rest) = line.split_at(line.len() - line.trim_start_matches(' ').len());
    let mut rest = rest.trim_end();
    let mut lines = Vec::new();
    loop {
        let room = width.saturating_sub(lead.chars().count() + end.chars().count());
        let long = rest.chars().count() > room;
        let Some(at) = long.then(|| space(rest, room)).flatten() else {
            lines.push(format!("{lead}{rest}"));
            return lines;
        };
        lines.push(format!("{lead}{}{end}", rest[..at].trim_end()));
        (lead, rest) = (hanging, rest[at..].trim_start());
    }
}

/// Where a line goes on that is cut: under its second column, if it has two and the first takes no more than half of the width.
fn hanging(line: &str, width: usize) -> usize {
    let indent = line.len() - line.trim_start_matches(' ').len();
    let first = line[indent..].split("  ").next().unwrap_or_default();
    let rest = &line[indent + first.len()..];
    let second = rest.trim_start_matches(' ');
    let column = indent + first.chars().count() + rest.len() - second.len();
    let two = rest.len() > second.len() && !second.trim_end().is_empty() && !second.trim_end().contains("  ");
    if two && column <= width / 2 { column } else { indent + 2 }
}

/// The last space before which `room` characters hold all, but for one between a number and its unit; the first one after a word
/// that is longer.
fn space(line: &str, room: usize) -> Option<usize> {
    let end = line.char_indices().nth(room + 1).map_or(line.len(), |(at, _)| at);
    let unit = |at: usize| {
        ["GiB", "MiB", "KiB", "TiB", "TB", "GB", "s", "%"].iter().any(|unit| follows(&line[at + 1..], unit))
    };
    let cut = line[..end].rmatch_indices(' ').map(|(at, _)| at).find(|at| !unit(*at));
    cut.or_else(|| line.find(' '))
}

/// Whether a text begins with this word.
fn follows(text: &str, word: &str) -> bool {
    text.strip_prefix(word).is_some_and(|rest| !rest.starts_with(char::is_alphanumeric))
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
    fn lines_are_cut_between_words() {
        let line = "FN-E202 the host budget is too small: 10 GiB are needed.\n";
        assert_eq!(wrapped(line, 80), line);
        assert_eq!(wrapped(line, 24), "FN-E202 the host budget\n  is too small: 10 GiB\n  are needed.\n");
        assert_eq!(wrapped("a\n  3 | x = 1 and more\nb", 8), "a\n  3 | x = 1 and more\nb");
        assert_eq!(wrapped("see /a/very/long/path now and then", 10), "see\n  /a/very/long/path\n  now and\n  then");
        assert_eq!(wrapped("/a/very/long/path", 4), "/a/very/long/path");
        assert_eq!(wrapped("host needs 72.1 GiB, of 54 GiB", 16), "host needs\n  72.1 GiB, of\n  54 GiB");
        assert_eq!(wrapped("  or nvme.paths and more", 16), "  or nvme.paths\n    and more");
        assert_eq!(wrapped("  plan  one two three\n", 16), "  plan  one two\n        three\n");
        assert_eq!(
            wrapped("a long name  one two", 16),
            "a long name  one\n  two",
            "a second column that is too far right"
        );
        assert_eq!(wrapped("a  b  one two three", 12), "a  b  one\n  two three", "more than two columns");
        for width in 0..40 {
            let words = |text: &str| text.split_whitespace().map(ToOwned::to_owned).collect::<Vec<_>>();
            assert_eq!(words(&wrapped(line, width)), words(line), "{width}");
        }
    }

    #[test]
    fn a_line_can_go_on_with_a_mark() {
        assert_eq!(cut("one two three", 9, "  ", ""), ["one two", "  three"]);
        assert_eq!(cut("one two three", 9, "  ", " \\"), ["one two \\", "  three"]);
        assert_eq!(cut("one extraordinary two", 6, "", ""), ["one", "extraordinary", "two"]);
        assert_eq!(cut("", 6, "", ""), [""]);
        assert_eq!(cut("needs 72 GiB", 9, "", ""), ["needs", "72 GiB"], "a number stays with its unit");
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
