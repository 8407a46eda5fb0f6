//! How the report looks on a terminal or elsewhere: the width of its lines, and its colours.

use crate::text::printable_lines;

/// How text for a person looks: how wide it is, and whether it has colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// Characters in a line, where words allow.
    pub columns: usize,
    /// Whether to colour it.
    pub colour: bool,
}

impl Look {
    /// For files and pipes.
    pub const PLAIN: Self = Self { columns: 100, colour: false };

    /// `text`, made safe to print and then coloured.
    #[must_use]
    pub(super) fn inked(self, ink: Ink, text: &str) -> String {
        let text = printable_lines(text);
        match (self.colour, ink) {
            (false, _) | (_, Ink::Plain) => text.into_owned(),
            (true, Ink::Strong) => format!("\x1b[1m{text}\x1b[0m"),
            (true, Ink::Warning) => format!("\x1b[33m{text}\x1b[0m"),
            (true, Ink::Good) => format!("\x1b[32m{text}\x1b[0m"),
        }
    }
}

/// What a text is, and so its colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ink {
    /// As everything else.
    Plain,
    /// A heading.
    Strong,
    /// What the reader should not miss.
    Warning,
    /// What the reader came for.
    Good,
}

/// `text` in lines of at most `columns` characters, broken between words; those after the first begin with `indent`, and all but the
/// last end with `end`. A word that is too long has a line for itself.
#[must_use]
pub(super) fn wrapped(text: &str, columns: usize, indent: &str, end: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut line = String::new();
    for word in text.split(' ') {
        let len = line.chars().count() + 1 + word.chars().count() + end.chars().count();
        if line.is_empty() && lines.is_empty() {
            line.push_str(word);
        } else if len <= columns {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(line + end);
            line = format!("{indent}{word}");
        }
    }
    lines.push(line);
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_break_between_words() {
        assert_eq!(wrapped("one two three", 9, "  ", ""), ["one two", "  three"]);
        assert_eq!(wrapped("one two three", 9, "  ", " \\"), ["one two \\", "  three"]);
        assert_eq!(wrapped("one extraordinary two", 6, "", ""), ["one", "extraordinary", "two"]);
        assert_eq!(wrapped("", 6, "", ""), [""]);
    }

    #[test]
    fn colours_come_after_what_was_escaped() {
        let look = Look { colour: true, ..Look::PLAIN };
        assert_eq!(look.inked(Ink::Warning, "a\x1b[31m"), "\x1b[33ma\\u001b[31m\x1b[0m");
        assert_eq!(look.inked(Ink::Plain, "a"), "a");
        assert_eq!(Look::PLAIN.inked(Ink::Warning, "a\n"), "a\n");
    }
}
