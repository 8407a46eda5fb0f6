//! Comments name the thread, the caller or the value that they speak of.

use std::path::Path;

use super::{line_of, pieces, report, with_extension, words};

/// Words that stand for a thread, a caller or a value without naming it.
const VAGUE: &[&str] = &["whoever", "somebody", "nobody", "whatever", "anybody"];

/// Folders whose comments still have such words. A folder without them must not be here.
const NOT_YET: &[&str] = &[];

/// The comments of a source with their offsets; in Python the texts in three double quotes too.
fn comments(source: &str, python: bool) -> Vec<(usize, &str)> {
    let is_comment = |text: &str| match python {
        true => text.starts_with('#') || text.starts_with("\"\"\""),
        false => text.starts_with('/'),
    };
    pieces(source, python).into_iter().filter(|(_, text)| is_comment(text)).collect()
}

/// Line and word of each vague word in the comments of a source.
fn vague(source: &str, python: bool) -> Vec<(usize, &'static str)> {
    let mut found = Vec::new();
    for (start, text) in comments(source, python) {
        let text = text.to_ascii_lowercase();
        for word in VAGUE {
            found.extend(words(&text, word).map(|at| (line_of(source, start + at), *word)));
        }
    }
    found.sort_unstable();
    found
}

#[test]
fn comments_name_what_they_speak_of() {
    let checked = |path: &Path| ["src", "kernels", "python/funicular"].iter().any(|folder| path.starts_with(folder));
    let mut findings = Vec::new();
    let mut left = Vec::new();
    for extension in ["rs", "cu", "cuh", "py", "pyi"] {
        for (path, source) in with_extension(extension).into_iter().filter(|(path, _)| checked(path)) {
            let found = vague(&source, extension.starts_with("py"));
            match NOT_YET.iter().find(|folder| path.starts_with(folder)) {
                Some(folder) if !found.is_empty() => left.push(*folder),
                Some(_) => {}
                None => findings.extend(found.iter().map(|(line, word)| format!("{}:{line}: {word}", path.display()))),
            }
        }
    }
    let done = NOT_YET.iter().filter(|folder| !left.contains(folder));
    findings.extend(done.map(|folder| format!("{folder}: no such word is left; take it out of NOT_YET")));
    report(&findings, "comments say which thread, caller or value: subject, verb, object");
}

#[test]
fn comments_are_told_from_code_and_texts() {
    let rust =
        "let nobody = \"// whoever\"; // Somebody waits.\n/// a\n/// whatever\n/* anybody */ let whatever_else = 1;";
    assert_eq!(vague(rust, false), [(1, "somebody"), (3, "whatever"), (4, "anybody")]);
    let python = "nobody = 'whoever # anybody'  #: somebody\n\"\"\"Say\nwhatever.\"\"\"\n";
    assert_eq!(vague(python, true), [(1, "somebody"), (3, "whatever")]);
}
