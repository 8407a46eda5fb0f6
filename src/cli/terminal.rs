//! Text as a terminal shows it best: its width, lines cut between words, colours. Elsewhere nothing is cut.

use std::{
    ffi::OsString,
    io::{IsTerminal, stderr, stdout},
    os::fd::AsFd,
};

use crate::{bench::Look, text::wrapped};

/// As narrow as figures get.
const NARROWEST: usize = 60;
/// Prose is not cut for a terminal that is narrower.
const NARROWEST_FOR_PROSE: usize = 40;

/// How figures look on standard output: in the terminal's width, up to that of pipes.
pub(super) fn look_of_stdout() -> Look {
    let columns =
        columns(&stdout()).map_or(Look::PLAIN.columns, |columns| columns.clamp(NARROWEST, Look::PLAIN.columns));
    Look { columns, colour: coloured(stdout().is_terminal()) }
}

/// Columns of the terminal that a stream goes to; none if it goes elsewhere, or the terminal does not say.
pub(super) fn columns(stream: &(impl AsFd + IsTerminal)) -> Option<usize> {
    if !stream.is_terminal() {
        return None;
    }
    let size = rustix::termios::tcgetwinsize(stream).ok()?;
    Some(usize::from(size.ws_col)).filter(|&columns| columns > 0)
}

/// `text` cut for the terminal that a stream goes to, where there is one wide enough.
fn cut_for(stream: &(impl AsFd + IsTerminal), text: &str) -> String {
    let columns = columns(stream).filter(|&columns| columns >= NARROWEST_FOR_PROSE);
    columns.map_or_else(|| text.to_owned(), |columns| wrapped(text, columns))
}

/// Prose for the standard output.
pub(super) fn for_terminal(text: &str) -> String {
    cut_for(&stdout(), text)
}

/// An error, without controls, for the standard error.
pub(super) fn error_for_terminal(text: &str) -> String {
    inked(cut_for(&stderr(), text), coloured(stderr().is_terminal()))
}

/// `text` with the codes that its lines begin with in colour.
fn inked(text: String, coloured: bool) -> String {
    if !coloured {
        return text;
    }
    let line = |line: &str| match line.split_once(' ') {
        Some((code, rest)) if code.starts_with("FN-") => format!("\x1b[31m{code}\x1b[0m {rest}"),
        _ => line.to_owned(),
    };
    text.split_inclusive('\n').map(line).collect()
}

/// Whether text for a person has colours where it goes; the one rule, for the command line and for log lines.
#[must_use]
pub fn coloured(terminal: bool) -> bool {
    colour(terminal, |name| std::env::var_os(name))
}

/// Whether to colour: on a terminal that can, unless `NO_COLOR` is set or `CLICOLOR` is 0; elsewhere if `CLICOLOR_FORCE` is set.
fn colour(terminal: bool, variable: impl Fn(&str) -> Option<OsString>) -> bool {
    let set = |name| variable(name).filter(|value| !value.is_empty());
    let off = |name| set(name).is_some_and(|value| value == "0");
    if set("NO_COLOR").is_some() {
        return false;
    }
    if set("CLICOLOR_FORCE").is_some() && !off("CLICOLOR_FORCE") {
        return true;
    }
    terminal && !off("CLICOLOR") && set("TERM").is_none_or(|term| term != "dumb")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_for_terminals_and_can_be_switched_off() {
        let with = |terminal, set: &[(&str, &str)]| {
            let find =
                |name: &str| set.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value));
            colour(terminal, find)
        };
        assert!(with(true, &[]) && with(true, &[("TERM", "xterm"), ("CLICOLOR", "1"), ("NO_COLOR", "")]));
        assert!(!with(false, &[]) && !with(false, &[("CLICOLOR", "1")]));
        for off in [("NO_COLOR", "1"), ("CLICOLOR", "0"), ("TERM", "dumb")] {
            assert!(!with(true, &[off]), "{off:?}");
        }
        assert!(with(false, &[("CLICOLOR_FORCE", "1")]) && !with(false, &[("CLICOLOR_FORCE", "0")]));
        assert!(!with(true, &[("CLICOLOR_FORCE", "1"), ("NO_COLOR", "1")]));
    }

    #[test]
    fn colour_changes_nothing_but_colour() {
        let text = "FN-E404 /a: no checkpoint in it. Name a checkpoint, or a directory of checkpoints.\n";
        let shown = |text, coloured| inked(wrapped(text, 50), coloured);
        let (plain, coloured) = (shown(text, false), shown(text, true));
        assert_eq!(coloured.replace("\x1b[31m", "").replace("\x1b[0m", ""), plain);
        assert!(coloured.starts_with("\x1b[31mFN-E404\x1b[0m /a:") && plain.lines().all(|line| line.len() <= 50));
        assert_eq!(shown("no code\n", true), "no code\n");
        let two = shown("FN-E404 one\nFN-E404 two\n", true);
        assert_eq!(two, "\x1b[31mFN-E404\x1b[0m one\n\x1b[31mFN-E404\x1b[0m two\n");
    }
}
