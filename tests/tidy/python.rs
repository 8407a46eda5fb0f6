//! Rules for the Python package: which way imports go, where private names of torch stand, and what tests may import.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use crate::{line_of, quoted, report, with_extension, words};

/// The floors of python/funicular, lowest first: its folders and the files beside them. Each imports from lower floors and from its own.
const FLOORS: &[&[&str]] = &[
    &["_core", "errors", "policy", "reference"],
    &["torch_internals", "report"],
    &["units"],
    &["homes"],
    &["guard"],
    &["gradients"],
    &["ranks"],
    &["windows"],
    &["optim", "micro_batches"],
    &["checkpoint"],
    &["statistics", "offloading", "planning"],
    &["install"],
    &["integrations", "testing", "__init__", "__main__"],
];

/// What tests, benches and examples may import of the package, and nothing inside of it. They look inside with `funicular.testing`, and name
/// another module only as a string of its own, `"funicular.optim.adamw"`: to replace a function there by pytest's monkeypatch.
const PUBLIC: &[&str] =
    &["_core", "checkpoint", "errors", "integrations", "optim", "policy", "reference", "statistics", "testing"];

/// Attributes of torch's objects with private names, which stand in torch_internals alone.
const PRIVATE: &[&str] = &[
    "_backward_hooks",
    "_buffers",
    "_call_impl",
    "_cdata",
    "_compiled_call_impl",
    "_execution_engine",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_make_subclass",
    "_non_persistent_buffers_set",
    "_orig_mod",
    "_parameters",
    "_post_accumulate_grad_hooks",
    "_register_load_state_dict_pre_hook",
    "_save_to_state_dict",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_use_count",
];

/// Python files below a folder, by path relative to it, with `/` between parts.
fn sources(folder: &str) -> Vec<(String, String)> {
    let inside = |(path, text): (std::path::PathBuf, String)| {
        path.strip_prefix(folder).ok().map(|inner| (inner.to_string_lossy().into_owned(), text))
    };
    with_extension("py").into_iter().filter_map(inside).collect()
}

/// Python source with comments and the contents of strings blanked; lines stay where they are.
fn code_of(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(next) = rest.chars().next() {
        let triple = next.to_string().repeat(3);
        let skipped = match next {
            '#' => rest.find('\n').unwrap_or(rest.len()),
            '"' | '\'' if rest.starts_with(&triple) => rest[3..].find(&triple).map_or(rest.len(), |end| end + 6),
            '"' | '\'' => quoted(rest, next),
            _ => 0,
        };
        let taken = skipped.max(next.len_utf8());
        out.extend(rest[..taken].chars().map(|c| if skipped == 0 || c == '\n' { c } else { ' ' }));
        rest = &rest[taken..];
    }
    out
}

/// The dotted name that begins here.
fn dotted_name(text: &str) -> &str {
    let end = text.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == '.')).unwrap_or(text.len());
    text[..end].trim_end_matches('.')
}

/// The names of an import list, in parentheses or up to the end of the line.
fn imported_names(list: &str) -> Vec<&str> {
    let list = list.trim_start();
    let list = match list.strip_prefix('(') {
        Some(inner) => inner.split(')').next(),
        None => list.split('\n').next(),
    };
    let names = list.unwrap_or_default().split(',').filter_map(|name| name.split_whitespace().next());
    names.collect()
}

/// The modules of the package that code imports, also for type checkers alone: byte offsets and names below `funicular`.
fn imports(code: &str, modules: &BTreeSet<String>) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut start = 0;
    for line in code.split_inclusive('\n') {
        let (at, text) = (start + line.len() - line.trim_start().len(), line.trim_start());
        start += line.len();
        if let Some(rest) = text.strip_prefix("from funicular") {
            let from = dotted_name(rest.strip_prefix('.').unwrap_or_default());
            let after = &code[at + "from funicular".len()..];
            let list = after.split_once(" import ").map_or("", |(_, list)| list);
            for name in imported_names(list) {
                let inner = if from.is_empty() { name.to_owned() } else { format!("{from}.{name}") };
                found.push((at, if modules.contains(&inner) { inner } else { from.to_owned() }));
            }
        } else if let Some(rest) = text.strip_prefix("import funicular") {
            found.push((at, dotted_name(rest.strip_prefix('.').unwrap_or_default()).to_owned()));
        }
    }
    found
}

/// A file's name as a module below `funicular`: `units.unit`; a folder's `__init__.py` is the folder.
fn module_of(file: &str) -> String {
    let dotted = file.trim_end_matches(".py").replace('/', ".");
    dotted.strip_suffix(".__init__").map_or(dotted.clone(), str::to_owned)
}

/// A file's path in the package, its code, and the modules that it imports with their offsets.
type Module = (String, String, Vec<(usize, String)>);

/// Each file of the package with the modules that it imports.
fn package() -> Vec<Module> {
    let files = sources("python/funicular");
    assert!(files.len() > 50, "only {} files in python/funicular", files.len());
    let modules: BTreeSet<String> = files.iter().map(|(file, _)| module_of(file)).chain(["_core".to_owned()]).collect();
    let named = |(file, source): (String, String)| {
        let code = code_of(&source);
        let found = imports(&code, &modules).into_iter();
        // The package itself is its `__init__`.
        let found = found.map(|(at, name)| (at, if name.is_empty() { "__init__".to_owned() } else { name }));
        (file, found.collect(), code)
    };
    files.into_iter().map(named).map(|(file, found, code): (_, Vec<_>, _)| (file, code, found)).collect()
}

fn floor_of(module: &str) -> Option<usize> {
    let room = module.split('.').next().unwrap_or_default();
    FLOORS.iter().position(|floor| floor.contains(&room))
}

#[test]
fn imports_of_the_package_go_downward() {
    let mut findings = Vec::new();
    for (file, code, found) in package() {
        let Some(floor) = floor_of(&module_of(&file)) else {
            findings.push(format!("{file}: on no floor; add it to FLOORS"));
            continue;
        };
        for (at, module) in found {
            if floor_of(&module).is_none_or(|target| target > floor) {
                findings.push(format!("{file}:{} imports {module} from above", line_of(&code, at)));
            }
        }
    }
    report(&findings, "imports of python/funicular go to lower floors or stay on their own");
}

/// What is left of arrows when all that is in no circle, and between none, is taken away.
fn circles(mut arrows: BTreeMap<String, BTreeSet<String>>) -> Vec<String> {
    loop {
        let before = arrows.len();
        let imported: BTreeSet<String> = arrows.values().flatten().cloned().collect();
        arrows.retain(|from, _| imported.contains(from));
        let left: BTreeSet<String> = arrows.keys().cloned().collect();
        arrows.values_mut().for_each(|targets| targets.retain(|target| left.contains(target)));
        arrows.retain(|_, targets| !targets.is_empty());
        if arrows.len() == before {
            return arrows.iter().map(|(from, to)| format!("{from} imports {to:?}")).collect();
        }
    }
}

#[test]
fn below_windows_the_session_has_no_name() {
    let windows = floor_of("windows").expect("windows is on a floor");
    let mut findings = Vec::new();
    for (file, code, _) in package() {
        if floor_of(&module_of(&file)).is_some_and(|floor| floor < windows) {
            findings.extend(words(&code, "Session").map(|at| format!("{file}:{}", line_of(&code, at))));
        }
    }
    report(&findings, "below windows the session is an `Owner` (units/owner.py)");
}

/// Lines that assign to an attribute of what is called `unit` or `ref`.
fn writes_of_units(code: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (number, line) in code.lines().enumerate() {
        let ends: Vec<usize> = line.match_indices('=').map(|(at, _)| at).collect();
        // The first `=` that assigns: no comparison, no keyword within brackets.
        let assigns = |at: &usize| {
            let depth = line[..*at].matches(['(', '[', '{']).count() as isize
                - line[..*at].matches([')', ']', '}']).count() as isize;
            depth == 0 && !line[*at + 1..].starts_with('=') && !line[..*at].ends_with(['=', '!', '<', '>', ':'])
        };
        let Some(end) = ends.into_iter().find(assigns) else { continue };
        let targets = line[..end].trim_end_matches(['|', '+', '-', '&']);
        for target in targets.split([',', '=']).map(str::trim) {
            let (object, attribute) = target.rsplit_once('.').unwrap_or_default();
            if ["unit", "ref"].contains(&object.rsplit('.').next().unwrap_or_default()) {
                found.push((number + 1, attribute.to_owned()));
            }
        }
    }
    found
}

#[test]
fn what_changes_of_units_is_written_in_units() {
    let mut findings = Vec::new();
    for (file, code, _) in package() {
        for (line, attribute) in writes_of_units(&code) {
            // The optimizer's states write it in one statement with their own fields.
            if !file.starts_with("units/") && attribute != "states" {
                findings.push(format!("{file}:{line}: {attribute}"));
            }
        }
    }
    report(&findings, "attributes of units and of their parameters are written by methods of their classes");
    let code =
        "unit.a = 1\nx, ref.b = 1, 2\nself.c, self.ref.d = y\nf(unit.e=1)\nif unit.f == g:\nref.unit.h |= i\nunit.j()";
    let names: Vec<String> = writes_of_units(code).into_iter().map(|(_, name)| name).collect();
    assert_eq!(names, ["a", "b", "d", "h"]);
}

#[test]
fn there_is_no_circle_of_imports() {
    let mut files: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut rooms: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let room = |module: &str| module.split('.').next().unwrap_or_default().to_owned();
    for (file, code, found) in package() {
        let from = module_of(&file);
        for (at, to) in found {
            // What is indented is not imported with the file: it is for type checkers alone, or for later.
            if at == 0 || code[..at].ends_with('\n') {
                files.entry(from.clone()).or_default().insert(to.clone());
            }
            if room(&from) != room(&to) {
                rooms.entry(room(&from)).or_default().insert(room(&to));
            }
        }
    }
    report(&circles(files), "files of python/funicular that import each other in a circle");
    report(&circles(rooms), "folders of python/funicular that import each other in a circle, type checking included");
    let arrow = |from: &str, to: &[&str]| (from.to_owned(), to.iter().map(|name| (*name).to_owned()).collect());
    let arrows = [arrow("a", &["b"]), arrow("b", &["c", "d"]), arrow("c", &["b"]), arrow("d", &["e"])];
    assert_eq!(circles(BTreeMap::from(arrows)), [r#"b imports {"c"}"#, r#"c imports {"b"}"#]);
}

/// What of torch's private names code uses, with offsets.
fn private_names(code: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let private = |part: &str| part.starts_with('_') && !part.starts_with("__");
    for (at, _) in code.match_indices("torch") {
        let before = code[..at].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '.') {
            continue;
        }
        let name = dotted_name(&code[at..]);
        if name.split('.').next() == Some("torch") && name.split('.').any(private) {
            found.push((at, name.to_owned()));
        }
        let line_start = code[..at].rfind('\n').map_or(0, |end| end + 1);
        if code[line_start..at].trim() == "from"
            && let Some((_, list)) = code[at..].split_once(" import ")
        {
            let names = imported_names(list).into_iter().filter(|part| private(part));
            found.extend(names.map(|part| (at, format!("{name}.{part}"))));
        }
    }
    for name in PRIVATE {
        let ends = |at: usize| !code[at + name.len() + 1..].starts_with(|c: char| c.is_alphanumeric() || c == '_');
        let attribute = format!(".{name}");
        let uses = code.match_indices(&attribute).map(|(at, _)| at).filter(|&at| ends(at));
        // An attribute of the package's own classes may be called so.
        found.extend(uses.filter(|&at| !code[..at].ends_with("self")).map(|at| (at, (*name).to_owned())));
    }
    found
}

#[test]
fn private_names_of_torch_have_one_room() {
    let mut findings = Vec::new();
    for (file, source) in sources("python/funicular") {
        if !file.starts_with("torch_internals/") {
            let code = code_of(&source);
            let found = private_names(&code);
            findings.extend(found.iter().map(|(at, name)| format!("{file}:{}: {name}", line_of(&code, *at))));
        }
    }
    report(&findings, "private names of torch stand in python/funicular/torch_internals alone");
    let names = |code: &str| private_names(&code_of(code)).into_iter().map(|(_, name)| name).collect::<Vec<_>>();
    assert_eq!(names("x = torch._C._f(torch.__version__, my_torch._C)  # torch._D"), ["torch._C._f"]);
    assert_eq!(names("from torch.utils import (\n    _pytree as p,\n    data,\n)\n"), ["torch.utils._pytree"]);
    assert_eq!(names("import torch.nn._x\nm._buffers[0]; self._buffers; t._cdata_of"), ["torch.nn._x", "_buffers"]);
}

/// What a test, bench or example names of the package that is not public, with offsets. Programs in strings count too.
fn reaches(source: &str, rooms: &BTreeSet<String>) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let hidden = |name: &str| {
        let room = name.split('.').next().unwrap_or_default();
        rooms.contains(room) && !(PUBLIC.contains(&room))
    };
    for (at, prefix) in source.match_indices("funicular.") {
        let name = dotted_name(&source[at + prefix.len()..]);
        let (room, inner) = name.split_once('.').unwrap_or((name, ""));
        let within = ["checkpoint", "optim"].contains(&room) && inner.starts_with(|c: char| c.is_ascii_lowercase());
        // An f-string may fill in the last part.
        let after = source[at + prefix.len() + name.len()..].trim_start_matches('.');
        let alone = source[..at].ends_with('"') && after.starts_with(['"', '{']);
        if (hidden(name) || within) && !alone {
            found.push((at, format!("funicular.{name}")));
        }
    }
    for (at, prefix) in source.match_indices("from funicular import ") {
        let names = imported_names(&source[at + prefix.len()..]).into_iter().filter(|name| hidden(name));
        found.extend(names.map(|name| (at, format!("funicular.{name}"))));
    }
    found.extend(source.match_indices("_funicular_").map(|(at, name)| (at, name.to_owned())));
    found
}

#[test]
fn tests_import_what_is_public() {
    let rooms: BTreeSet<String> = sources("python/funicular")
        .iter()
        .filter_map(|(file, _)| file.split(['/', '.']).next().map(str::to_owned))
        .collect();
    let mut findings = Vec::new();
    for (path, source) in with_extension("py") {
        if ["tests", "benches", "examples"].iter().any(|folder| path.starts_with(Path::new(folder))) {
            let found = reaches(&source, &rooms);
            let place = |at: usize| format!("{}:{}", path.display(), line_of(&source, at));
            findings.extend(found.iter().map(|(at, name)| format!("{}: {name}", place(*at))));
        }
    }
    report(&findings, "tests, benches and examples import public modules; funicular.testing shows the inside");
    let names = |source: &str| reaches(source, &rooms).into_iter().map(|(_, name)| name).collect::<Vec<_>>();
    assert_eq!(names("import funicular.windows.session as s"), ["funicular.windows.session"]);
    assert_eq!(names("from funicular import _core, offloading"), ["funicular.offloading"]);
    assert_eq!(names("from funicular.checkpoint.facts import encode"), ["funicular.checkpoint.facts"]);
    assert_eq!(
        names("x = 'from funicular.units import unit'; m._funicular_session"),
        ["funicular.units", "_funicular_"]
    );
    assert_eq!(names("patch(\"funicular.units.unit.f\"); funicular.stats(m); \"funicular.json\""), [""; 0]);
    assert_eq!(names("f\"funicular.optim.adamw.{part}\""), [""; 0]);
    assert_eq!(names("\"funicular.units.unit is imported\""), ["funicular.units.unit"]);
}
