//! Public items that nothing uses: the compiler reports only private ones.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use super::{code_of, line_of, report, with_extension};

/// Items of src/ whose name stands nowhere else in the product, with the reason.
const FOR_TESTS: &[(&str, &str)] = &[
    ("directories", "serde is told its name in a string"),
    ("policy_schema", "Python's tests compare docs/policy.schema.json with it"),
];

/// Names of the Python stub that only tests use, with the reason.
const STUB_FOR_TESTS: &[(&str, &str)] = &[
    ("policy_schema", "a test compares docs/policy.schema.json with it"),
    ("split_updates", "tests choose who updates"),
    ("update_pending", "tests wait for an update"),
];

/// What may follow `pub` and its scope, before the name of an item.
const KINDS: &[&str] = &["fn", "struct", "enum", "const", "type", "static", "trait", "union"];

/// Rust code without the items under `#[cfg(test)]` and `#[cfg(all(test, ...))]`; lines stay where they are.
pub(crate) fn without_tests(code: &str) -> String {
    let mut out = String::with_capacity(code.len());
    let mut rest = code;
    let next =
        |rest: &str| ["#[cfg(test)]", "#[cfg(all(test"].iter().filter_map(|attribute| rest.find(attribute)).min();
    while let Some(at) = next(rest) {
        out.push_str(&rest[..at]);
        let item = &rest[at..];
        let end = item_end(item);
        out.extend(item[..end].chars().filter(|c| *c == '\n'));
        rest = &item[end..];
    }
    out.push_str(rest);
    out
}

/// Where the first item of the text ends: at its semicolon, or at the brace that closes it.
fn item_end(text: &str) -> usize {
    let mut depth = 0_usize;
    for (at, c) in text.char_indices() {
        match c {
            ';' if depth == 0 => return at + 1,
            '{' => depth += 1,
            '}' => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    return at + 1;
                }
            }
            _ => {}
        }
    }
    text.len()
}

/// Rust code without `use` statements and without `wrap_pyfunction!(...)`: naming an item there uses nothing of it.
fn without_imports(code: &str) -> String {
    let mut out = String::new();
    let mut rest = code;
    while let Some(line) = rest.split_inclusive('\n').next() {
        let mut words = line.split_whitespace();
        let mut first = words.next();
        if first.is_some_and(|word| word.starts_with("pub")) {
            first = words.next();
        }
        if first == Some("use") {
            let end = rest.find(';').map_or(rest.len(), |at| at + 1);
            rest = &rest[end..];
            continue;
        }
        if !line.contains("wrap_pyfunction!") {
            out.push_str(line);
        }
        rest = &rest[line.len()..];
    }
    out
}

fn identifiers(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|word| !word.is_empty())
}

/// Names of the public items that some code declares, with the offset of their line.
fn public_items(code: &str) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    let mut at = 0;
    for line in code.split_inclusive('\n') {
        let text = line.trim_start();
        let scoped = text.strip_prefix("pub").filter(|rest| rest.starts_with([' ', '(']));
        let rest =
            scoped.map(|rest| if rest.starts_with('(') { rest.split_once(')').map_or("", |r| r.1) } else { rest });
        if let Some(rest) = rest {
            let mut words = identifiers(rest);
            while let Some(word) = words.next() {
                if KINDS.contains(&word) {
                    // `const fn name` and `unsafe fn name` are functions.
                    let name = words.find(|name| !["fn", "unsafe", "mut"].contains(name));
                    found.extend(name.map(|name| (at, name)));
                    break;
                }
                if !["unsafe", "async", "extern"].contains(&word) {
                    break;
                }
            }
        }
        at += line.len();
    }
    found
}

#[test]
fn public_items_are_used() {
    // How often each name stands in all code, and in that of the product.
    let (mut everywhere, mut product) = (BTreeMap::<String, usize>::new(), BTreeMap::<String, usize>::new());
    let mut declared = Vec::new();
    for (path, source) in with_extension("rs").into_iter().chain(with_extension("py")) {
        if path.starts_with("tests/tidy") || path == Path::new("tests/tidy.rs") {
            continue;
        }
        let is_rust = path.extension().is_some_and(|extension| extension == "rs");
        let code = if is_rust { code_of(&source) } else { source };
        let used = if is_rust { without_imports(&code) } else { code.clone() };
        identifiers(&used).for_each(|name| *everywhere.entry(name.to_owned()).or_default() += 1);
        let is_test = path.starts_with("tests") || path.to_string_lossy().ends_with("tests.rs");
        if is_test {
            continue;
        }
        let used = if is_rust { without_imports(&without_tests(&code)) } else { used };
        identifiers(&used).for_each(|name| *product.entry(name.to_owned()).or_default() += 1);
        if path.starts_with("src") {
            let code = without_tests(&code);
            let items = public_items(&code).into_iter().map(|(at, name)| (line_of(&code, at), name.to_owned()));
            declared.extend(items.map(|(line, name)| (format!("{}:{line}", path.display()), name)));
        }
    }
    assert!(declared.len() > 500, "only {} public items found", declared.len());
    let excused: BTreeMap<&str, &str> = FOR_TESTS.iter().copied().collect();
    let mut findings = Vec::new();
    let mut for_tests = BTreeSet::new();
    for (place, name) in &declared {
        let count = |counts: &BTreeMap<String, usize>| counts.get(name).copied().unwrap_or(0);
        if count(&everywhere) <= 1 {
            findings.push(format!("{place}: nothing uses `{name}`"));
        } else if count(&product) <= 1 && !excused.contains_key(name.as_str()) {
            findings.push(format!("{place}: only tests use `{name}`"));
        } else if count(&product) <= 1 {
            for_tests.insert(name.as_str());
        }
    }
    findings.extend(
        excused.keys().filter(|name| !for_tests.contains(*name)).map(|name| format!("`{name}` needs no excuse")),
    );
    report(&findings, "public items are used by the product; what is not used goes");
}

#[test]
fn the_stub_has_nothing_that_python_does_not_use() {
    let (mut everywhere, mut product) = (BTreeSet::new(), BTreeSet::new());
    for (path, source) in with_extension("py") {
        let names: Vec<String> = identifiers(&source).map(str::to_owned).collect();
        if path.starts_with("python") {
            product.extend(names.iter().cloned());
        }
        everywhere.extend(names);
    }
    let stubs = with_extension("pyi");
    let (path, stub) = stubs.iter().find(|(path, _)| path.ends_with("_core.pyi")).expect("the stub of the core");
    let mut findings = Vec::new();
    let mut before = "";
    for (at, line) in stub.lines().enumerate() {
        let (text, decorator) = (line.trim_start(), std::mem::replace(&mut before, line.trim()));
        if decorator == "@property" {
            // A field of a record, which the wrapper passes to its constructor.
            continue;
        }
        let name = ["def ", "class "].iter().find_map(|prefix| text.strip_prefix(prefix));
        let Some(name) = name.and_then(|rest| identifiers(rest).next()).filter(|name| !name.starts_with("__")) else {
            continue;
        };
        let excused = STUB_FOR_TESTS.iter().any(|(excused, _)| *excused == name);
        if !everywhere.contains(name) || (!product.contains(name) && !excused) {
            findings.push(format!("{}:{}: `{name}`", path.display(), at + 1));
        }
        if excused && product.contains(name) {
            findings.push(format!("`{name}` needs no excuse"));
        }
    }
    report(&findings, "what the core offers to Python is used there");
}

#[test]
fn items_are_found_and_uses_are_told_from_imports() {
    let code = "pub fn a() {}\npub(crate) const B: u8 = 0;\n    pub const unsafe fn c() {}\npub use x::{\n  d,\n};\n\
        struct E;\n#[cfg(test)]\nmod tests { fn f() { a(); } }\npub static mut G: u8 = 0;\n";
    let names: Vec<&str> = public_items(code).into_iter().map(|(_, name)| name).collect();
    assert_eq!(names, ["a", "B", "c", "G"]);
    let product = without_tests(code);
    assert!(!product.contains("mod tests") && product.contains('G'), "{product}");
    assert_eq!(product.lines().count(), code.lines().count());
    let used = without_imports("use a::b;\npub(crate) use c::{\n d,\n};\nm.add(wrap_pyfunction!(e, m)?)?;\nf();\n");
    assert_eq!(identifiers(&used).collect::<Vec<_>>(), ["f"]);
}
