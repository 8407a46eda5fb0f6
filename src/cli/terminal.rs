//! Text as a terminal shows it best: lines cut between words, codes of errors in colour. Elsewhere nothing is changed.

use std::{
    io::{IsTerminal, stderr, stdout},
    os::fd::AsFd,
};

use crate::text::wrapped;

/// Columns of the terminal that a stream goes to, or none if it goes elsewhere.
fn columns(stream: &(impl AsFd + IsTerminal)) -> Option<usize> {
    if !stream.is_terminal() {
        return None;
    }
    let size = rustix::termios::tcgetwinsize(stream).ok()?;
    Some(usize::from(size.ws_col)).filter(|&columns| columns >= 40)
}

/// Prose for the standard output.
pub(super) fn for_terminal(text: String) -> String {
    match columns(&stdout()) {
        Some(columns) => wrapped(&text, columns),
        None => text,
    }
}

/// An error, without controls, for the standard error.
pub(super) fn error_for_terminal(text: &str) -> String {
    let set = |name: &str| std::env::var_os(name);
    let coloured = set("NO_COLOR").is_none() && set("TERM").is_none_or(|term| term != "dumb");
    columns(&stderr()).map_or_else(|| text.to_owned(), |columns| shown(text, columns, coloured))
}

fn shown(text: &str, columns: usize, coloured: bool) -> String {
    let text = wrapped(text, columns);
    match text.split_once(' ') {
        Some((code, rest)) if coloured && code.starts_with("FN-") => format!("\x1b[31m{code}\x1b[0m {rest}"),
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colour_changes_nothing_but_colour() {
        let text = "FN-E404 /a: no checkpoint in it. Name a checkpoint, or a directory of checkpoints.\n";
        let (plain, coloured) = (shown(text, 50, false), shown(text, 50, true));
        assert_eq!(coloured.replace("\x1b[31m", "").replace("\x1b[0m", ""), plain);
        assert!(coloured.starts_with("\x1b[31mFN-E404\x1b[0m /a:") && plain.lines().all(|line| line.len() <= 50));
        assert_eq!(shown("no code\n", 50, true), "no code\n");
    }
}
