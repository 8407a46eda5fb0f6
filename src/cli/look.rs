//! How text on a terminal looks: its width, and whether it has colours.

use std::{
    ffi::OsString,
    io::{IsTerminal, stdout},
    os::fd::AsFd,
};

use crate::bench::Look;

/// As narrow as it gets.
const NARROWEST: usize = 60;

/// For standard output: in the terminal's width, up to that of pipes.
pub(super) fn of_stdout() -> Look {
    let terminal = stdout().is_terminal();
    let columns = if terminal { columns(stdout()).clamp(NARROWEST, Look::PLAIN.columns) } else { Look::PLAIN.columns };
    Look { columns, colour: colour(terminal, |name| std::env::var_os(name)) }
}

/// Columns of a terminal, as far as it tells.
pub(super) fn columns(terminal: impl AsFd) -> usize {
    let told = rustix::termios::tcgetwinsize(terminal).map_or(0, |size| usize::from(size.ws_col));
    if told == 0 { Look::PLAIN.columns } else { told }
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
}
