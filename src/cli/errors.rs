//! `funicular errors`: what a code means.

use std::fmt::Write;

use super::{exit::COULD_NOT_TELL, terminal::for_terminal};
use crate::{
    error::{Entry, entries},
    policy::cli::Output,
    text::printable,
};

/// The entries of a code, which may be written without `FN-` and in small letters; all codes without one.
pub(super) fn run(code: Option<&str>) -> Output {
    let Some(code) = code else {
        let mut out = String::new();
        for entry in entries() {
            let _ = writeln!(out, "{}  {}", entry.code, entry.meaning);
        }
        return Output { out: for_terminal(&out), ..Output::default() };
    };
    let wanted = code.to_ascii_uppercase();
    let wanted = wanted.strip_prefix("FN-").unwrap_or(&wanted);
    match entries().find(|entry| entry.code.strip_prefix("FN-") == Some(wanted)) {
        Some(entry) => Output { out: for_terminal(&described(entry)), ..Output::default() },
        None => Output {
            err: format!(
                "There is no code '{}'. The nearest are {}. `funicular errors` lists all.\n",
                printable(code),
                nearest(wanted).join(", ")
            ),
            code: COULD_NOT_TELL,
            ..Output::default()
        },
    }
}

fn described(entry: &Entry) -> String {
    let kind = match entry.family {
        "Usage" => "usage, in Python a ValueError",
        "Budget" => "budget, in Python a MemoryError",
        "Storage" => "storage, in Python an OSError",
        "Runtime" => "runtime, in Python a RuntimeError",
        "Warning" => "a warning in the log",
        _ => "a fact in the log",
    };
    let action = match entry.action {
        "" => String::new(),
        action => format!("What to do: {}\n", action.replace('`', "")),
    };
    format!("{}: {}\nKind: {kind}.\n{action}", entry.code, entry.meaning.replace('`', ""))
}

/// The codes that begin alike and whose numbers are nearest, of the letter that was given if there was one.
fn nearest(wanted: &str) -> Vec<&'static str> {
    let number = |text: &str| text.trim_start_matches(|c: char| !c.is_ascii_digit()).parse::<i64>().unwrap_or(0);
    let letter = wanted.chars().next().filter(|c| "EWI".contains(*c)).unwrap_or('E');
    let mut codes: Vec<&str> = entries().map(|entry| entry.code).filter(|code| code[3..].starts_with(letter)).collect();
    let alike = |code: &str| code[3..].bytes().zip(wanted.bytes()).take_while(|(a, b)| a == b).count();
    codes.sort_by_key(|code| (std::cmp::Reverse(alike(code)), number(code).abs_diff(number(wanted))));
    codes.truncate(3);
    codes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_found_as_people_write_it() {
        let full = run(Some("FN-E202"));
        assert!(
            full.code == 0 && full.out.starts_with("FN-E202: the host budget is too small\nKind: budget"),
            "{full:?}"
        );
        assert!(full.out.contains("What to do: Raise [budget] host"), "{full:?}");
        for short in ["e202", "E202", "fn-e202"] {
            assert_eq!(run(Some(short)), full);
        }
        assert!(run(Some("FN-W606")).out.contains("Kind: a warning in the log."));
        assert!(!run(Some("FN-I405")).out.contains("What to do"));
    }

    #[test]
    fn an_unknown_code_is_met_with_the_nearest() {
        for (code, near) in [
            ("FN-E299", "FN-E205"),
            ("W6", "FN-W601"),
            ("E2020", "FN-E202"),
            ("202", "FN-E202"),
            ("nothing\x1b[2J", "FN-E001"),
        ] {
            let said = run(Some(code));
            assert!(said.code == 2 && said.out.is_empty() && said.err.contains(near), "{said:?}");
            assert!(!said.err.contains('\x1b'), "{said:?}");
        }
    }

    #[test]
    fn all_are_listed() {
        let all = run(None).out;
        assert_eq!(all.lines().count(), entries().count());
        assert!(all.contains("FN-E001  no CUDA driver") && all.contains("FN-I307  "), "{all}");
    }
}
