//! The rules of the house that no compiler checks, over the files that git would commit (the whole tree without git).

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use funicular::Code;

#[path = "tidy/circles.rs"]
mod circles;
#[path = "tidy/dead_code.rs"]
mod dead_code;
#[path = "tidy/python.rs"]
mod python;
#[path = "tidy/riddles.rs"]
mod riddles;

/// Longest Rust file under src/ and longest Python file, in lines.
const LONGEST_FILE: usize = 500;

/// The folders of src/ whose work is raw memory.
const UNSAFE_LAYERS: &[&str] = &["memory", "io", "device", "optim", "runtime", "bench", "python"];

/// Codes that no test provokes yet, with the reason. A code that a test names must not be here.
const UNTESTED: &[(Code, &str)] = &[(Code::Cuda, "needs a failing driver")];

/// Words that mean unfinished work. Spelled in two halves so that this file passes its own test.
const BANNED: &[&str] =
    &[concat!("FIX", "ME"), concat!("XX", "X"), concat!("todo", "!"), concat!("unimplemented", "!")];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Files by path relative to the root: what git tracks, and what it would if all were added.
fn files() -> Vec<PathBuf> {
    let mut files = match git(&["ls-files", "--cached", "--others", "--exclude-standard", "-z"]) {
        Some(out) => out.split('\0').filter(|path| !path.is_empty()).map(PathBuf::from).collect(),
        None => walk(root()),
    };
    files.retain(|path| root().join(path).is_file());
    files.sort();
    files.dedup();
    assert!(files.iter().any(|path| path == Path::new("src/lib.rs")), "the list of files is wrong: no src/lib.rs");
    files
}

fn git(arguments: &[&str]) -> Option<String> {
    let out = Command::new("git").arg("-C").arg(root()).args(arguments).output().ok()?;
    if out.status.success() { String::from_utf8(out.stdout).ok() } else { None }
}

fn walk(folder: &Path) -> Vec<PathBuf> {
    let ignored = ["target", ".venv", ".git", "__pycache__", "dist", "build"];
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("the source tree is readable").flatten() {
        let path = entry.path();
        if path.is_dir() && !ignored.contains(&entry.file_name().to_string_lossy().as_ref()) {
            found.extend(walk(&path));
        } else if path.is_file() {
            found.push(path.strip_prefix(root()).expect("below the root").to_owned());
        }
    }
    found
}

fn read(path: &Path) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn with_extension(extension: &str) -> Vec<(PathBuf, String)> {
    let wanted = |path: &PathBuf| path.extension().is_some_and(|found| found == extension);
    files().into_iter().filter(wanted).map(|path| (path.clone(), read(&path))).collect()
}

/// Fails with all findings at once.
fn report(findings: &[String], rule: &str) {
    assert!(findings.is_empty(), "{rule}\n  {}\n", findings.join("\n  "));
}

/// Rust source with comments and the contents of literals blanked; lines stay where they are.
fn code_of(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(next) = rest.chars().next() {
        let skipped = literal_or_comment(rest, out.chars().next_back());
        let taken = if skipped > 0 { skipped } else { next.len_utf8() };
        if skipped > 0 {
            out.extend(rest[..taken].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
        } else {
            out.push(next);
        }
        rest = &rest[taken..];
    }
    out
}

/// Length of the comment, string or character literal that `rest` begins with; 0 if it begins with none.
fn literal_or_comment(rest: &str, before: Option<char>) -> usize {
    if rest.starts_with("//") {
        return rest.find('\n').unwrap_or(rest.len());
    }
    if rest.starts_with("/*") {
        return block_comment(rest);
    }
    if rest.starts_with('"') {
        return quoted(rest, '"');
    }
    let in_word = before.is_some_and(|c| c.is_alphanumeric() || c == '_');
    if rest.starts_with('r') && (!in_word || before == Some('b')) {
        let hashes = rest[1..].bytes().take_while(|b| *b == b'#').count();
        if rest[1 + hashes..].starts_with('"') {
            let end = format!("\"{}", "#".repeat(hashes));
            let body = 2 + hashes;
            return rest[body..].find(&end).map_or(rest.len(), |at| body + at + end.len());
        }
    }
    // A lifetime has no closing quote right after its first character.
    let mut characters = rest.chars();
    if characters.next() == Some('\'')
        && let Some(first) = characters.next()
        && (first == '\\' || characters.next() == Some('\''))
    {
        return quoted(rest, '\'');
    }
    0
}

fn block_comment(rest: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < rest.len() {
        if rest[at..].starts_with("/*") {
            depth += 1;
            at += 2;
        } else if rest[at..].starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += rest[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    rest.len()
}

fn quoted(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// Where `word` stands alone in `text`, as byte offsets.
fn words<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let part_of_word = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(word).map(|(at, _)| at).filter(move |&at| {
        let after = text[at + word.len()..].chars().next();
        !text[..at].ends_with(part_of_word) && (word.ends_with('!') || !after.is_some_and(part_of_word))
    })
}

fn line_of(text: &str, at: usize) -> usize {
    text[..at].matches('\n').count() + 1
}

/// The layers named in the docs of src/lib.rs, lowest first: module name to rank.
fn layers() -> BTreeMap<String, usize> {
    let source = read(Path::new("src/lib.rs"));
    let docs: String = source.lines().filter_map(|line| line.strip_prefix("//!")).collect();
    let mut ranks = BTreeMap::new();
    let list = docs.split_once("downward").expect("src/lib.rs documents the layers after the word `downward`").1;
    let list = list.split_once(": ").expect("a colon before the layers").1;
    for (rank, group) in list.split(" < ").enumerate() {
        let names = group.split('`').nth(1).expect("each layer stands in backticks");
        ranks.extend(names.split_whitespace().map(|name| (name.to_owned(), rank)));
    }
    assert!(ranks.len() > 10, "src/lib.rs: only {} modules found in the list of layers", ranks.len());
    ranks
}

/// First path segments after each `crate::` in `code`, with their offsets; groups are opened.
fn crate_paths(code: &str) -> Vec<(usize, String)> {
    let ident = |text: &str| text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    let mut found = Vec::new();
    for (at, prefix) in code.match_indices("crate::") {
        let rest = &code[at + prefix.len()..];
        if !rest.starts_with('{') {
            found.push((at, ident(rest)));
            continue;
        }
        let mut depth = 0;
        for (offset, c) in rest.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 1 && (c == ',' || c == '{') {
                found.push((at, ident(&rest[offset + 1..])));
            }
            if depth == 0 {
                break;
            }
        }
    }
    found.retain(|(_, name): &(usize, String)| !name.is_empty());
    found
}

/// The top-level module that a file under src/ belongs to; `None` for lib.rs and the programs.
fn module_of(path: &Path) -> Option<String> {
    let inner = path.strip_prefix("src").ok()?;
    let first = inner.components().next()?.as_os_str().to_string_lossy().into_owned();
    let name = first.strip_suffix(".rs").unwrap_or(&first).to_owned();
    (name != "lib" && name != "bin").then_some(name)
}

#[test]
fn imports_go_downward() {
    let ranks = layers();
    let mut findings = Vec::new();
    for (path, source) in with_extension("rs") {
        let Some(module) = module_of(&path) else { continue };
        let Some(rank) = ranks.get(&module) else {
            findings.push(format!("{}: module `{module}` is in no layer of src/lib.rs", path.display()));
            continue;
        };
        let code = code_of(&source);
        for (at, name) in crate_paths(&code) {
            // What the crate root re-exports comes from the lowest layer.
            let target = ranks.get(&name).copied().unwrap_or(0);
            if target > *rank {
                findings.push(format!(
                    "{}:{}: `{module}` uses `crate::{name}`, which lies above it",
                    path.display(),
                    line_of(&code, at)
                ));
            }
        }
    }
    report(&findings, "imports go only to lower layers or to the same one");
}

#[test]
fn files_are_short() {
    let mut findings = Vec::new();
    let rust = with_extension("rs").into_iter().filter(|(path, _)| path.starts_with("src"));
    for (path, source) in rust.chain(with_extension("py")).chain(with_extension("pyi")) {
        let lines = source.lines().count();
        if lines > LONGEST_FILE {
            findings.push(format!("{}: {lines} lines", path.display()));
        }
    }
    report(&findings, "files have at most 500 lines; cut along a noun");
}

#[test]
fn unsafe_is_declared_and_explained() {
    let mut findings = Vec::new();
    for (path, source) in with_extension("rs") {
        let code = code_of(&source);
        let lines: Vec<&str> = source.lines().collect();
        for at in words(&code, "unsafe") {
            let line = line_of(&code, at);
            let place = format!("{}:{line}", path.display());
            if module_of(&path).is_some_and(|module| !UNSAFE_LAYERS.contains(&module.as_str())) {
                findings.push(format!("{place}: unsafe in a layer that needs none"));
            }
            if !code.contains("expect(unsafe_code") {
                findings
                    .push(format!("{place}: unsafe in a file that does not declare expect(unsafe_code, reason = ...)"));
            }
            let after = code[at + "unsafe".len()..].trim_start();
            if (after.starts_with('{') || after.starts_with("impl")) && !explained(&lines, line) {
                findings.push(format!("{place}: no SAFETY comment within three lines above"));
            }
        }
    }
    report(&findings, "unsafe stays in the files made for it, and each block says why it is sound");
}

/// Whether `SAFETY:` stands on this line (from 1) or within three lines above; a comment found there is read to its top.
fn explained(lines: &[&str], line: usize) -> bool {
    let mut first = line.saturating_sub(4);
    while first > 0 && lines[first].trim_start().starts_with("//") {
        first -= 1;
    }
    lines[first..line].iter().any(|text| text.contains("SAFETY:"))
}

#[test]
fn nothing_is_left_unfinished() {
    let mut findings = Vec::new();
    let mut check = |path: &Path, text: &str| {
        for word in BANNED {
            findings.extend(words(text, word).map(|at| format!("{}:{}: {word}", path.display(), line_of(text, at))));
        }
    };
    for extension in ["rs", "py", "pyi", "cu", "cuh", "toml", "md"] {
        for (path, text) in with_extension(extension) {
            check(&path, &text);
        }
    }
    report(&findings, "unfinished work belongs into an issue, not into the code");
}

/// docs/errors.md with its tables made anew, each from the line of dashes under its head to the next empty line.
fn with_tables(text: &str) -> String {
    let mut tables = ["E", "W", "I"].into_iter();
    let mut out = String::new();
    let mut old = false;
    for line in text.lines() {
        old &= !line.is_empty();
        if old {
            continue;
        }
        out += line;
        out.push('\n');
        if line.starts_with("|---") {
            old = true;
            let letter = tables.next().expect("three tables");
            for entry in funicular::error::entries().filter(|entry| entry.code[3..].starts_with(letter)) {
                let family = if letter == "E" { format!(" {} |", entry.family) } else { String::new() };
                let action = if letter == "I" { String::new() } else { format!(" {} |", entry.action) };
                out += &format!("| {} |{family} {} |{action}\n", entry.code, entry.meaning);
            }
        }
    }
    assert!(tables.next().is_none(), "docs/errors.md has a table for errors, for warnings and for facts");
    out
}

#[test]
fn codes_are_documented() {
    let path = Path::new("docs/errors.md");
    let text = read(path);
    let new = with_tables(&text);
    if std::env::var_os("FUNICULAR_WRITE_DOCS").is_some() {
        fs::write(root().join(path), &new).expect("writes");
        return;
    }
    assert!(new == text, "docs/errors.md is old: run this test with FUNICULAR_WRITE_DOCS=1");
    let wrong = |entry: &&funicular::error::Entry| {
        let unsaid = entry.action.is_empty() && !entry.code.starts_with("FN-I");
        unsaid || [entry.meaning, entry.action].iter().any(|text| text.contains(['|', '\n']))
    };
    let wrong: Vec<String> = funicular::error::entries().filter(wrong).map(|entry| entry.code.to_owned()).collect();
    report(&wrong, "every error and warning has something to do, and each text fits a cell");
}

/// Every code in a text, such as `FN-E201`.
fn codes_in(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.match_indices("FN-").filter_map(|(at, _)| {
        let code = text.get(at..at + 7)?;
        let letter = code.as_bytes()[3];
        (matches!(letter, b'E' | b'W' | b'I') && code[4..].bytes().all(|b| b.is_ascii_digit())).then_some((at, code))
    })
}

#[test]
fn codes_of_the_log_are_the_ones_in_use() {
    let home = Path::new("src/error/codes.rs");
    let known: BTreeSet<&str> = funicular::error::entries().map(|entry| entry.code).collect();
    let mut used = BTreeSet::new();
    let mut findings = Vec::new();
    for (path, source) in with_extension("rs").into_iter().chain(with_extension("py")) {
        if !(path.starts_with("src") || path.starts_with("python")) || path == home {
            continue;
        }
        let product = &source[..source.len() - test_code(&path, &source).len()];
        let python = path.extension().is_some_and(|extension| extension == "py");
        for (_, text) in literals(product, python) {
            used.extend(codes_in(&text).map(|(_, code)| code.to_owned()));
        }
        for (at, code) in codes_in(product).filter(|(_, code)| !known.contains(code)) {
            findings.push(format!("{}:{}: {code} is not in {}", path.display(), line_of(&source, at), home.display()));
        }
    }
    let lines = known.iter().filter(|code| !code.starts_with("FN-E"));
    findings.extend(lines.filter(|code| !used.contains(**code)).map(|code| format!("{code}: nothing logs it")));
    report(&findings, "codes of warnings and facts stand in src/error/codes.rs, and in the code that logs them");
    assert_eq!(codes_in("see FN-E201, FN-X100, FN-W60x").map(|(_, code)| code).collect::<Vec<_>>(), ["FN-E201"]);
}

/// The part of a file that is test code: all of a test file, in src/ what follows the first `#[cfg(test)]`.
fn test_code<'a>(path: &Path, source: &'a str) -> &'a str {
    let is_test_file = path.starts_with("tests") || path.components().any(|part| part.as_os_str() == "tests");
    if is_test_file || path.file_stem().is_some_and(|stem| stem == "tests") {
        return source;
    }
    source.find("#[cfg(test)]").map_or("", |at| &source[at..])
}

#[test]
fn every_error_is_provoked_by_a_test() {
    let mut tested = BTreeSet::new();
    for (path, source) in with_extension("rs").into_iter().chain(with_extension("py")) {
        if ["tests/tidy.rs", "src/error.rs", "src/error/codes.rs"].iter().any(|home| path == Path::new(home)) {
            continue;
        }
        let tests = test_code(&path, &source);
        for code in Code::ALL {
            if words(tests, &format!("Code::{code:?}")).next().is_some() || tests.contains(code.as_str()) {
                tested.insert(code.as_str());
            }
        }
    }
    let allowed: BTreeMap<&str, &str> = UNTESTED.iter().map(|(code, reason)| (code.as_str(), *reason)).collect();
    let mut findings = Vec::new();
    for code in Code::ALL {
        let (name, text) = (format!("{code:?}"), code.as_str());
        match (tested.contains(text), allowed.get(text).copied()) {
            (false, None) => {
                findings.push(format!("{text} {name}: no test names it; write one, or add it to UNTESTED"))
            }
            (true, Some(_)) => findings.push(format!("{text} {name}: tested now; take it out of UNTESTED")),
            (false, Some("")) => findings.push(format!("{text} {name}: no reason given")),
            _ => {}
        }
    }
    report(&findings, "every error code is provoked by a test");
}

/// The comments and the literals of Rust or Python source as they are written, with their offsets.
fn pieces(source: &str, python: bool) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(next) = source[at..].chars().next() {
        let rest = &source[at..];
        let length = match (python, next) {
            (true, '#') => rest.find('\n').unwrap_or(rest.len()),
            (true, '"' | '\'') => {
                let triple = next.to_string().repeat(3);
                match rest.strip_prefix(&triple) {
                    Some(body) => body.find(&triple).map_or(rest.len(), |end| end + 6),
                    None => quoted(rest, next),
                }
            }
            (true, _) => 0,
            (false, _) => literal_or_comment(rest, source[..at].chars().next_back()),
        };
        if length > 0 {
            found.push((at, &rest[..length]));
        }
        at += length.max(next.len_utf8());
    }
    found
}

/// The contents of all string literals in Rust or Python source, with their offsets; what a format string fills in is left out.
fn literals(source: &str, python: bool) -> Vec<(usize, String)> {
    let is_comment = |text: &str| text.starts_with('/') || text.starts_with('#');
    let outside = |text: &str| {
        let mut depth = 0_i32;
        text.chars()
            .filter(|c| {
                depth += i32::from(*c == '{');
                let keep = depth == 0;
                depth -= i32::from(*c == '}' && depth > 0);
                keep
            })
            .collect()
    };
    let texts = pieces(source, python).into_iter().filter(|(_, text)| !is_comment(text));
    texts.map(|(at, text)| (at, outside(text))).collect()
}

/// `word.word` in a text, where nothing else belongs to it: no call, no path, no third part.
fn dotted(text: &str) -> Vec<(&str, &str)> {
    let part = |c: char| c.is_ascii_lowercase() || c == '_';
    let mut found = Vec::new();
    for (dot, _) in text.match_indices('.') {
        let (before, after) = (&text[..dot], &text[dot + 1..]);
        let first = &before[before.rfind(|c| !part(c)).map_or(0, |end| end + 1)..];
        let second = &after[..after.find(|c| !part(c)).unwrap_or(after.len())];
        let left = before[..before.len() - first.len()].chars().next_back();
        let mut right = after[second.len()..].chars();
        let (next, second_next) = (right.next(), right.next());
        let joined = left.is_some_and(|c| c.is_alphanumeric() || matches!(c, '.' | '/' | '-' | '*'))
            || next.is_some_and(|c| c.is_alphanumeric() || matches!(c, '(' | '/' | '*'))
            || (next == Some('.') && second_next.is_some_and(char::is_alphanumeric));
        if !first.is_empty() && !second.is_empty() && !joined {
            found.push((first, second));
        }
    }
    found
}

/// First words of dotted names that are not the policy's: other systems' configurations, the kernel's settings, modules.
const FOREIGN: &[&str] = &[
    "aio",
    "block",
    "copy",
    "cpu",
    "deepspeed_config",
    "fs",
    "funicular",
    "importlib",
    "kernel",
    "memory",
    "model",
    "numpy",
    "opt",
    "p",
    "param",
    "pids",
    "s",
    "t",
    "torch",
    "transformers",
    "vm",
    "weakref",
    "zero_optimization",
];
/// Endings of names of files.
const FILES: &[&str] = &["bin", "ckpt", "css", "cu", "json", "pt", "py", "rs", "safetensors", "so", "toml", "yaml"];
/// Attributes of objects called like a section.
const ATTRIBUTES: &[&str] = &["optimizer.state"];
/// Options of other programs.
const FOREIGN_OPTIONS: &[&str] = &[
    "--cpunodebind",
    "--direct-io",
    "--gpus",
    "--local-dir",
    "--membind",
    "--memory",
    "--nproc-per-node",
    "--security-opt",
    "--ulimit",
];
/// What may follow `funicular` in prose and in code.
const PROSE: &[&str] = &["import", "on", "reads", "that", "wrote"];

fn help(arguments: &[&str]) -> String {
    let out = Command::new(env!("CARGO_BIN_EXE_funicular")).args(arguments).arg("--help").output().expect("it runs");
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// The subcommands that a help text lists.
fn commands(help: &str) -> Vec<&str> {
    let list = help.split_once("Commands:\n").map_or("", |(_, rest)| rest);
    list.lines().map_while(|line| line.strip_prefix("  ")).filter_map(|line| line.split_whitespace().next()).collect()
}

/// What is wrong with the names in one text.
fn wrong_names(text: &str, keys: &BTreeSet<String>, helps: &BTreeMap<String, String>) -> Vec<String> {
    let mut wrong = Vec::new();
    for (first, second) in dotted(text) {
        let name = format!("{first}.{second}");
        let known = keys.contains(&name) || FILES.contains(&second) || ATTRIBUTES.contains(&name.as_str());
        if !known && !FOREIGN.contains(&first) {
            wrong.push(format!("{name} is no key of the policy"));
        }
    }
    for (at, prefix) in text.match_indices("funicular ") {
        let mut words = text[at + prefix.len()..].split(|c: char| !(c.is_ascii_lowercase() || c == '-'));
        let (command, sub) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        if command.is_empty() || command.starts_with('-') || PROSE.contains(&command) {
            continue;
        }
        match helps.get(command) {
            None => wrong.push(format!("funicular {command} is no command")),
            Some(help) if help.contains("Commands:") && !sub.is_empty() && !commands(help).contains(&sub) => {
                wrong.push(format!("funicular {command} {sub} is no command"));
            }
            Some(_) => {}
        }
    }
    let option = |at: usize| {
        let rest = &text[at..];
        let part = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let end = rest[2..].find(|c| !part(c)).map_or(rest.len(), |end| end + 2);
        rest[..end].trim_end_matches('-')
    };
    // In sentences: what is a literal by itself is an argument for another program.
    let within = |at: usize| text[..at].ends_with([' ', '`', '(']);
    for (at, _) in text.match_indices("--").filter(|(at, _)| within(*at)) {
        let option = option(at);
        let begins = option.len() > 3 && option.as_bytes()[2].is_ascii_lowercase();
        let known =
            FOREIGN_OPTIONS.contains(&option) || helps.values().any(|help| words(help, option).next().is_some());
        if begins && !known {
            wrong.push(format!("{option} is no option of any command"));
        }
    }
    wrong
}

/// The commands of ours that a page shows: in backquotes within a line, and as lines of blocks.
fn commands_in(page: &str) -> BTreeSet<&str> {
    let spans = page.lines().flat_map(|line| line.split('`').skip(1).step_by(2));
    let blocks = page.split("```").skip(1).step_by(2).flat_map(str::lines);
    let commands = spans.chain(blocks.map(|line| line.trim_start_matches("$ ")));
    commands
        .filter(|text| text.starts_with("funicular "))
        .map(|text| text.split(['#', '>']).next().unwrap_or(text))
        .collect()
}

#[test]
fn advice_names_what_exists() {
    let schema: serde_json::Value =
        serde_json::from_str(&read(Path::new("docs/policy.schema.json"))).expect("the schema is JSON");
    let mut keys = BTreeSet::new();
    for (section, about) in schema["properties"].as_object().expect("sections") {
        let inside = about.get("properties").or_else(|| about["items"].get("properties"));
        for key in inside.and_then(serde_json::Value::as_object).into_iter().flatten() {
            keys.insert(format!("{section}.{}", key.0));
        }
    }
    assert!(keys.contains("budget.hbm") && keys.contains("nvme.engine"), "{keys:?}");
    let mut helps = BTreeMap::new();
    let top = help(&[]);
    for command in commands(&top) {
        let text = help(&[command]);
        for sub in commands(&text) {
            helps.insert(format!("{command} {sub}"), help(&[command, sub]));
        }
        helps.insert(command.to_owned(), text);
    }
    helps.insert(String::new(), top);
    // Hidden from the list, and there.
    helps.insert("page-lock".to_owned(), help(&["page-lock"]));
    let mut findings = Vec::new();
    for (path, source) in with_extension("rs").into_iter().chain(with_extension("py")) {
        if !path.starts_with("src") && !path.starts_with("python") {
            continue;
        }
        let product = &source[..source.len() - test_code(&path, &source).len()];
        for (at, text) in literals(product, path.extension().is_some_and(|extension| extension == "py")) {
            let wrong = wrong_names(&text, &keys, &helps);
            findings.extend(wrong.iter().map(|what| format!("{}:{}: {what}", path.display(), line_of(&source, at))));
        }
    }
    for (path, text) in with_extension("md") {
        for span in commands_in(&text) {
            let wrong = wrong_names(span, &keys, &helps);
            findings.extend(wrong.iter().map(|what| format!("{}: `{span}`: {what}", path.display())));
        }
    }
    report(&findings, "texts name keys, commands and options that exist");
    for (text, what) in [
        ("Lower io.threads, or wait.", "io.threads is no key"),
        ("Set budget.hmb.", "budget.hmb is no key"),
        ("See `funicular policies check`.", "funicular policies is no command"),
        ("See `funicular policy chekc`.", "funicular policy chekc is no command"),
        ("Give --hiden.", "--hiden is no option"),
    ] {
        let found = wrong_names(text, &keys, &helps);
        assert!(found.len() == 1 && found[0].starts_with(what), "{text}: {found:?}");
    }
    let right = "Set budget.hbm = \"1GiB\"; run funicular policy check --set nvme.paths=/x, see config.json.";
    assert_eq!(wrong_names(right, &keys, &helps), [""; 0]);
}

#[test]
fn exit_codes_of_every_command_are_documented() {
    let text = read(Path::new("docs/cli.md"));
    let listed: BTreeSet<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split(" | ").next())
        .flat_map(|cell| cell.split('`').filter(|part| part.starts_with(|c: char| c.is_ascii_lowercase())))
        .collect();
    let mut there = BTreeSet::new();
    for command in commands(&help(&[])).into_iter().filter(|command| *command != "help") {
        let subs = help(&[command]);
        let subs: Vec<&str> = commands(&subs).into_iter().filter(|sub| *sub != "help").collect();
        there.extend(subs.iter().map(|sub| format!("{command} {sub}")));
        there.extend(subs.is_empty().then(|| command.to_owned()));
    }
    let listed: BTreeSet<String> = listed.into_iter().map(str::to_owned).collect();
    assert_eq!(listed, there, "the table of docs/cli.md names every command");
}

#[test]
fn only_sources_are_tracked() {
    let Some(tracked) = git(&["ls-files", "-z"]) else { return };
    let built = ["so", "o", "a", "pyc", "whl", "rlib", "rmeta", "dylib", "ptx", "cubin", "pt", "safetensors"];
    let folders = ["target", "__pycache__", "dist", "build", ".venv", ".pytest_cache", ".mypy_cache", ".ruff_cache"];
    let findings: Vec<String> = tracked
        .split('\0')
        .map(Path::new)
        .filter(|path| {
            path.extension().is_some_and(|extension| built.iter().any(|built| extension == *built))
                || path.components().any(|part| folders.iter().any(|folder| part.as_os_str() == *folder))
        })
        .map(|path| path.display().to_string())
        .collect();
    report(&findings, "nothing that is built is tracked");
}

#[test]
fn the_documents_exist() {
    let needed = ["README.md", "CHANGELOG.md", "LICENSE", "docs/errors.md", "docs/decisions.md"];
    let findings: Vec<String> =
        needed.iter().filter(|path| !root().join(path).is_file()).map(|path| (*path).to_owned()).collect();
    report(&findings, "these documents exist");
}

#[test]
fn code_is_told_from_comments_and_literals() {
    let source = "a /* x /* y */ z */ b // c\n\"d\\\"e\" f r#\"g\"# 'h' '\\'' &'static i";
    let code: Vec<String> = code_of(source).split_whitespace().map(str::to_owned).collect();
    assert_eq!(code, ["a", "b", "f", "&'static", "i"]);
    assert_eq!(code_of(source).lines().count(), source.lines().count());
    let names = |code: &str| crate_paths(code).into_iter().map(|(_, name)| name).collect::<Vec<_>>();
    assert_eq!(
        names("use crate::{error::{Code, Result}, io, memory::Slot}; crate::quantities::x"),
        ["error", "io", "memory", "quantities"]
    );
}

/// Names in backquotes that look like files of this project: with an extension of ours, or a folder that ends in `/`.
fn named_files(text: &str) -> BTreeSet<&str> {
    let extensions = ["rs", "py", "pyi", "cu", "md", "toml", "json", "txt"];
    let is_name = |word: &str| !word.is_empty() && word.chars().all(|c| c.is_alphanumeric() || "_-./".contains(c));
    let quoted = text.lines().flat_map(|line| line.split('`').skip(1).step_by(2)).flat_map(str::split_whitespace);
    quoted
        .map(|word| word.split("::").next().unwrap_or(word).trim_end_matches([',', ';']))
        .filter(|word| is_name(word))
        .filter(|word| {
            let known = Path::new(word).extension().is_some_and(|e| extensions.iter().any(|known| e == *known));
            known || (word.ends_with('/') && word.len() > 1)
        })
        .collect()
}

#[test]
fn files_that_the_map_names_exist() {
    assert_eq!(
        named_files("`a/b.rs`, `c.py::test` and `make x.toml`, `d/`, `e.f`, `fn x()` and g.rs"),
        ["a/b.rs", "c.py", "d/", "x.toml"].into()
    );
    let tracked = files();
    let names: BTreeSet<_> = tracked.iter().filter_map(|path| path.file_name()).collect();
    let mut findings = Vec::new();
    for page in ["docs/architecture.md", "CONTRIBUTING.md"] {
        let text = read(Path::new(page));
        let named = named_files(&text);
        assert!(named.len() > 10, "{page} names files");
        for name in named {
            let below = |folder: &str| root().join(folder).join(name).exists();
            let alone = !name.contains('/') && names.contains(Path::new(name).as_os_str());
            if !alone && !["", "src", "python/funicular"].into_iter().any(below) {
                findings.push(format!("{page}: {name}"));
            }
        }
    }
    report(&findings, "the map names files that exist, from the root, from src or from python/funicular");
}
