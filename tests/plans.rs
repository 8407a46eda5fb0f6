//! docs/plans.md shows what the commands in it print.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::process::Command;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/plans.md");

/// The page with the output of every `$ funicular plan ...` made anew.
fn remade(text: &str) -> String {
    let mut out = String::new();
    let mut skipping = false;
    for line in text.lines() {
        if line.starts_with("```") {
            skipping = false;
        }
        if skipping {
            continue;
        }
        out += line;
        out.push('\n');
        if let Some(arguments) = line.strip_prefix("$ funicular plan ") {
            let run = Command::new(env!("CARGO_BIN_EXE_funicular"))
                .arg("plan")
                .args(arguments.split_whitespace())
                .current_dir(env!("CARGO_MANIFEST_DIR"))
                .output()
                .unwrap();
            assert!(run.stderr.is_empty(), "{arguments}: {}", String::from_utf8_lossy(&run.stderr));
            out += &String::from_utf8(run.stdout).unwrap();
            skipping = true;
        }
    }
    out
}

#[test]
fn the_page_of_plans_is_in_step() {
    let text = std::fs::read_to_string(FILE).unwrap();
    let new = remade(&text);
    if std::env::var_os("FUNICULAR_WRITE_DOCS").is_some() {
        std::fs::write(FILE, &new).unwrap();
        return;
    }
    assert!(text.contains("$ funicular plan"), "there is something to compare");
    assert!(new == text, "docs/plans.md is old: run the test with FUNICULAR_WRITE_DOCS=1");
}
