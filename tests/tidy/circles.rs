//! No circle among the files of src/: a file that another one imports does not import it, not even by way of others.
//!
//! A `pub use` of a module is not an import: a folder's `mod.rs` may name what its files offer. A file that imports a name offered so
//! imports the file that has it.

use std::collections::{BTreeMap, BTreeSet};

use super::{code_of, dead_code::without_tests, report, with_extension};

/// Folders that still have circles. A folder without them must not be here.
const NOT_YET: &[&str] = &["src/policy/import"];

type Module = Vec<String>;

/// What one file says: paths that it uses, and names that it offers for other files' items.
#[derive(Default)]
struct File {
    path: String,
    uses: Vec<Module>,
    offers: BTreeMap<String, Module>,
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The module of a file: `src/a/b.rs` and `src/a/b/mod.rs` are `a::b`; none for programs and tests.
fn module(path: &str) -> Option<Module> {
    let inner = path.strip_prefix("src/")?.strip_suffix(".rs")?;
    let mut parts: Module = inner.split('/').map(str::to_owned).collect();
    if parts[0] == "bin" || parts.last()?.ends_with("tests") {
        return None;
    }
    if parts.last()? == "mod" || parts == ["lib"] {
        parts.pop();
    }
    Some(parts)
}

/// The paths of a use tree such as `a::{b, c::{d as e}}`, each with the name it gets.
fn opened(tree: &str, before: &Module, into: &mut Vec<(Module, String)>) {
    let tree = tree.trim();
    if let Some(group) = tree.strip_prefix('{') {
        let group = group.strip_suffix('}').unwrap_or(group);
        let mut depth = 0;
        let part = |c: char| {
            depth += i32::from(c == '{') - i32::from(c == '}');
            c == ',' && depth == 0
        };
        group.split(part).filter(|part| !part.trim().is_empty()).for_each(|part| opened(part, before, into));
        return;
    }
    let (head, rest) = tree.split_once("::").unwrap_or((tree, ""));
    let (name, alias) = head.split_once(" as ").unwrap_or((head, head));
    let mut path = before.clone();
    path.push(name.trim().to_owned());
    if rest.is_empty() { into.push((path, alias.trim().to_owned())) } else { opened(rest, &path, into) }
}

/// A path as one from the root of the crate; none if it is not this crate's.
fn absolute(path: &[String], here: &Module, modules: &BTreeSet<Module>) -> Option<Module> {
    let ups = path.iter().take_while(|part| *part == "super").count();
    let (mut base, rest) = match path[0].as_str() {
        "crate" => (Vec::new(), &path[1..]),
        "self" => (here.clone(), &path[1..]),
        "super" => (here[..here.len().checked_sub(ups)?].to_vec(), &path[ups..]),
        child => {
            let module: Module = here.iter().cloned().chain([child.to_owned()]).collect();
            if !modules.contains(&module) {
                return None;
            }
            (here.clone(), path)
        }
    };
    base.extend_from_slice(rest);
    Some(base)
}

/// Reads the code of a file, without comments, literals and tests.
fn read(code: &str, here: &Module, modules: &BTreeSet<Module>) -> File {
    let mut file = File::default();
    let mut rest = String::new();
    let mut statements = code.split_inclusive(';');
    for statement in &mut statements {
        // A statement begins after the last brace or attribute before it: `use` stands at the start of a line.
        let at = statement.match_indices("use ").map(|(at, _)| at).find(|&at| {
            let line = statement[..at].rsplit('\n').next().unwrap_or_default().trim();
            line.is_empty() || (line.starts_with("pub") && !line.contains(['{', '=']) && line.split(' ').count() == 1)
        });
        let Some(at) = at else {
            rest.push_str(statement);
            continue;
        };
        let line = statement[..at].rfind('\n').map_or(0, |at| at + 1);
        rest.push_str(&statement[..line]);
        let public = statement[line..at].trim().starts_with("pub");
        let mut paths = Vec::new();
        opened(statement[at + 4..].trim_end_matches(';'), &Module::new(), &mut paths);
        for (path, name) in paths {
            let Some(path) = absolute(&path, here, modules) else { continue };
            if public {
                file.offers.insert(name, path);
            } else {
                file.uses.push(path);
            }
        }
    }
    for path in rest.split(|c: char| !(is_word(c) || c == ':')).filter(|path| path.contains("::")) {
        let parts: Module = path.split("::").filter(|part| !part.is_empty()).map(str::to_owned).collect();
        if parts.len() > 1 && !path.starts_with(':') {
            file.uses.extend(absolute(&parts, here, modules));
        }
    }
    file
}

/// The module whose file has what a path names.
fn home(path: &[String], files: &BTreeMap<Module, File>, depth: usize) -> Module {
    let len = (0..=path.len()).rev().find(|&len| files.contains_key(&path[..len])).unwrap_or(0);
    let (module, rest) = path.split_at(len);
    let offered = rest.first().and_then(|name| files.get(module)?.offers.get(name));
    match offered {
        Some(target) if depth < 8 && target != path => {
            let whole: Module = target.iter().chain(&rest[1..]).cloned().collect();
            home(&whole, files, depth + 1)
        }
        _ => module.to_vec(),
    }
}

/// Which modules a graph lets each module reach.
fn reach(graph: &BTreeMap<Module, BTreeSet<Module>>) -> BTreeMap<&Module, BTreeSet<&Module>> {
    let from = |start| {
        let (mut seen, mut next) = (BTreeSet::new(), vec![start]);
        while let Some(module) = next.pop() {
            next.extend(graph.get(module).into_iter().flatten().filter(|target| seen.insert(*target)));
        }
        seen
    };
    graph.keys().map(|module| (module, from(module))).collect()
}

/// The files that are on a circle, as lists.
fn circles(files: &BTreeMap<Module, File>) -> Vec<Vec<String>> {
    let targets = |(module, file): (&Module, &File)| {
        let targets: BTreeSet<Module> = file.uses.iter().map(|path| home(path, files, 0)).collect();
        (module.clone(), targets.into_iter().filter(|target| target != module).collect())
    };
    let graph: BTreeMap<Module, BTreeSet<Module>> = files.iter().map(targets).collect();
    let reach = reach(&graph);
    let mut found: BTreeSet<Vec<String>> = BTreeSet::new();
    for (module, reached) in &reach {
        if reached.contains(*module) {
            let both = reached.iter().filter(|other| reach.get(**other).is_some_and(|back| back.contains(*module)));
            let members: BTreeSet<&&Module> = both.collect();
            let mut lines: Vec<String> = members.iter().map(|member| files[**member].path.clone()).collect();
            for member in &members {
                let inside = graph[**member].iter().filter(|target| members.contains(&target));
                lines.extend(inside.map(|target| format!("  {} -> {}", files[**member].path, files[target].path)));
            }
            found.insert(lines);
        }
    }
    found.into_iter().collect()
}

fn files_of(sources: Vec<(String, String)>) -> BTreeMap<Module, File> {
    let named = |(path, source): (String, String)| Some((module(&path)?, path, source));
    let sources: Vec<(Module, String, String)> = sources.into_iter().filter_map(named).collect();
    let modules: BTreeSet<Module> = sources.iter().map(|(module, ..)| module.clone()).collect();
    let read = |(module, path, source): (Module, String, String)| {
        let file = read(&without_tests(&code_of(&source)), &module, &modules);
        (module, File { path, ..file })
    };
    sources.into_iter().map(read).collect()
}

#[test]
fn files_import_in_one_direction() {
    let sources = with_extension("rs").into_iter().map(|(path, source)| (path.display().to_string(), source));
    let files = files_of(sources.collect());
    assert!(files.len() > 150, "only {} files found", files.len());
    let uses: usize = files.values().map(|file| file.uses.len()).sum();
    assert!(uses > 1000, "only {uses} uses found");
    let found = circles(&files);
    let excuse =
        |lines: &[String]| NOT_YET.iter().find(|folder| lines.iter().all(|line| line.trim().starts_with(**folder)));
    let mut findings: Vec<String> =
        found.iter().filter(|lines| excuse(lines).is_none()).map(|lines| lines.join("\n  ")).collect();
    let left: BTreeSet<&&str> = found.iter().filter_map(|lines| excuse(lines)).collect();
    findings
        .extend(NOT_YET.iter().filter(|folder| !left.contains(folder)).map(|folder| format!("{folder} has no circle")));
    report(&findings, "files import each other in one direction; types that both sides need get a file of their own");
}

#[test]
fn circles_are_found() {
    let file = |path: &str, source: &str| (path.to_owned(), source.to_owned());
    let of = |sources: Vec<(String, String)>| circles(&files_of(sources)).len();
    let facade = file("src/a/mod.rs", "mod b;\nmod c;\npub use b::B;\npub struct A;\n");
    let b = file("src/a/b.rs", "use super::A;\npub struct B(A);\n#[cfg(test)]\nmod tests { use crate::a::c::C; }\n");
    let c = |source: &str| file("src/a/c.rs", source);
    assert_eq!(of(vec![facade.clone(), b.clone(), c("use crate::a::{A, B};\npub struct C(A, B);\n")]), 0);
    // Through a name that is offered elsewhere, by a path without `use`, by a child of one's own, through a third file.
    let back = file("src/a/b.rs", "pub(crate) struct B(crate::a::c::C);\n");
    assert_eq!(of(vec![facade.clone(), back, c("use crate::{a::{B}};\n")]), 1);
    let child = file("src/a/mod.rs", "mod b;\npub struct A;\nfn f() -> b::B { b::B::new() }\n");
    assert_eq!(of(vec![child, b]), 1);
    let third = vec![
        file("src/x.rs", "use crate::y;\n"),
        file("src/y.rs", "use super::z::Z;\n"),
        file("src/z.rs", "fn f() { crate::x::g(); }\n"),
    ];
    assert_eq!(of(third), 1);
}
