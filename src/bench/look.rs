//! How the report looks on a terminal or elsewhere: its colours, and how wide it is.

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_come_after_what_was_escaped() {
        let look = Look { colour: true, ..Look::PLAIN };
        assert_eq!(look.inked(Ink::Warning, "a\x1b[31m"), "\x1b[33ma\\u001b[31m\x1b[0m");
        assert_eq!(look.inked(Ink::Plain, "a"), "a");
        assert_eq!(Look::PLAIN.inked(Ink::Warning, "a\n"), "a\n");
    }
}
