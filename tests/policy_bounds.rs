//! What a file may cost: a megabyte of anything is read or refused within little memory and time, waits for nothing, shows
//! nothing of other files, and gives the terminal no command.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::{
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

/// Size of the inputs: as large as a policy may be.
const SIZE: usize = 1 << 20;

/// Address space in KiB and seconds of processor time that one command gets. Wall time depends on the machine's other work.
const MEMORY: u64 = 320 << 10;
const SECONDS: u64 = 20;

fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
    assert!(text.len() <= SIZE, "{name}: {} bytes would be refused by their number", text.len());
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

/// Runs the program within the limits. The system kills what exceeds them.
fn funicular(arguments: &[&str], file: &Path) -> Output {
    let shell = format!("ulimit -v {MEMORY}; ulimit -t {SECONDS}; ulimit -c 0; exec \"$0\" \"$@\"");
    Command::new("sh")
        .args(["-c", &shell, env!("CARGO_BIN_EXE_funicular")])
        .args(arguments)
        .arg(file)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// `item(0)`, `item(1)`, ... between the two ends, as many as fit.
fn many(start: &str, end: &str, item: impl Fn(usize) -> String) -> String {
    let mut out = start.to_owned();
    for n in 0.. {
        let next = item(n);
        if out.len() + next.len() + end.len() > SIZE {
            break;
        }
        out += &next;
    }
    out + end
}

fn repeat(start: &str, part: &str, end: &str) -> String {
    many(start, end, |_| part.to_owned())
}

/// Each is refused with this code.
fn refused(command: &[&str], cases: &[(&str, String, &str)]) {
    let dir = tempfile::tempdir().unwrap();
    for (name, input, code) in cases {
        let got = funicular(command, &write(dir.path(), name, input));
        let err = text(&got.stderr);
        let start: String = err.chars().take(300).collect();
        assert_eq!(got.status.code(), Some(1), "{name}: {:?} {start}", got.status.signal());
        assert!(err.starts_with(code), "{name}: {start}");
        assert!(err.len() < 16 << 10, "{name}: {} bytes of error", err.len());
    }
}

#[test]
fn a_megabyte_of_policy_is_refused_cheaply() {
    let paths = many("{\"nvme\": {\"paths\": [\"/\"", "]}}", |n| format!(",\"/{n}\""));
    refused(
        &["policy", "check"],
        &[
            ("keys.json", many("{\"a\": 1", "}", |n| format!(",\"{n}\":1")), "FN-E503"),
            ("section.json", many("{\"budget\": {\"a\": 1", "}}", |n| format!(",\"{n}\":1")), "FN-E503"),
            ("paths.json", paths, "FN-E503"),
            ("deep.json", repeat("{\"a\": ", "[", ""), "FN-E501"),
            ("glob.json", repeat("{\"units\": {\"match\": [\"", "*a", "\"]}}"), "FN-E503"),
            ("string.json", repeat("{\"device\": \"", "a", "\"}"), "FN-E503"),
            ("key.json", repeat("{\"", "a", "\": 1}"), "FN-E503"),
            ("numbers.json", repeat("{\"log\": {\"trace_steps\": [1", ",1", "]}}"), "FN-E503"),
            ("keys.toml", many("", "", |n| format!("k{n}=1\n")), "FN-E503"),
            ("section.toml", many("[budget]\n", "", |n| format!("k{n}=1\n")), "FN-E503"),
            ("paths.toml", many("nvme.paths = [", "]", |n| format!("'/{n}',")), "FN-E503"),
            ("glob.toml", repeat("units.match = ['", "{a,b}", "']"), "FN-E503"),
            ("globs.toml", repeat("units.match = [", "'{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}',", "]"), "FN-E503"),
            ("overrides.toml", repeat("", "[[override]]\nmatch='*'\nparams='host'\n", ""), "FN-E503"),
            ("tables.toml", many("", "", |n| format!("[a{n}]\n")), "FN-E503"),
            ("size.toml", repeat("budget.hbm = '", "9", "'"), "FN-E503"),
        ],
    );
}

#[test]
fn a_megabyte_of_nesting_ends_no_process() {
    let dir = tempfile::tempdir().unwrap();
    for (name, input) in [
        ("dotted.toml", repeat("", "a.", "a = 1")),
        ("header.toml", repeat("[", "a.", "a]")),
        ("headers.toml", many("", "", |n| format!("[a.b{n}.c]\n"))),
        ("arrays.toml", repeat("a = ", "[", "")),
        ("inline.toml", repeat("a = ", "{a=", "")),
        ("objects.json", repeat("", "{\"a\":", "")),
        ("escapes.json", repeat("{\"a\": \"", "\\u0041", "\"}")),
        ("lines.toml", repeat("", "#\n", "")),
    ] {
        let got = funicular(&["policy", "check"], &write(dir.path(), name, &input));
        let code = got.status.code();
        assert!(matches!(code, Some(0 | 1)), "{name}: {:?}", got.status);
        assert!(got.stderr.len() < 16 << 10, "{name}: {} bytes of error", got.stderr.len());
    }
}

#[test]
fn a_megabyte_to_import_is_cheap() {
    refused(
        &["policy", "import"],
        &[
            ("keys.json", many("{\"zero_optimization\": {}", "}", |n| format!(",\"{n}\":1")), "FN-E503"),
            ("aio.json", many("{\"aio\": {\"a\": 1", "}}", |n| format!(",\"{n}\":1")), "FN-E503"),
            (
                "names.json",
                repeat("{\"zero_optimization\": {\"leaf_module\": {\"names\": [\"a\"", ",\"b\"", "]}}}"),
                "FN-E503",
            ),
            ("keys.yaml", many("", "", |n| format!("k{n}: 1\n")), "FN-E503"),
            ("flow.yaml", many("a: {b: 1", "}", |n| format!(", k{n}: 1")), "FN-E503"),
            ("deep.yaml", repeat("a: ", "[", ""), "FN-E501"),
            ("block.yaml", repeat("", "- ", "a"), "FN-E501"),
            ("alias.yaml", repeat("a: &a [x, x]\nb: [*a", ", *a", "]\n"), "FN-E501"),
            ("keys.py", many("dict(a=1", ")", |n| format!(", k{n}=1")), "FN-E507"),
            ("deep.py", repeat("x = ", "(", ""), "FN-E501"),
            ("equals.py", repeat("", "x=", "1"), "FN-E507"),
            ("calls.py", repeat("", "x(a=", "1"), "FN-E501"),
        ],
    );
    let dir = tempfile::tempdir().unwrap();
    for (name, input) in [
        ("questions.yaml", repeat("", "? ", "a")),
        ("anchors.yaml", many("", "", |n| format!("k{}: &a{n} {{}}\n", n % 900))),
        ("plain.yaml", repeat("a: ", "b ", "")),
        ("folded.yaml", repeat("a: >\n", "  b\n", "")),
        ("quoted.yaml", repeat("a: \"", "\\x41", "\"")),
        ("documents.yaml", repeat("", "---\n", "")),
        ("comments.py", repeat("x = 1", "#\n", "")),
        ("steps.py", repeat("c = {'zero_optimization': {}}\nc", "['a']", " = 1")),
        ("names.py", many("", "", |n| format!("a{} = a{n}\n", n + 1))),
        ("edits.py", many("c = {'zero_optimization': {}}\n", "", |n| format!("c['{n}'] = 1\n"))),
        ("given.py", repeat("c = {'zero_optimization': {}}\n", "f(c)\n", "")),
        ("parts.py", repeat("c = {'zero_optimization': {}}\n", "a = c['zero_optimization']\n", "")),
        ("unpacked.py", repeat("", "a = {**a, **a}\n", "")),
        ("shards.py", many("", "", |n| format!("fully_shard(m, offload_policy=p{n})\n"))),
        ("conditions.py", repeat("", "if x:\n c = {'zero_optimization': {}}\n", "")),
        ("strings.py", repeat("", "x = \"a\n", "")),
        ("functions.py", repeat("", "def f():\n return f()\n", "")),
        ("semicolons.py", repeat("", "a,;", "")),
        ("sums.py", repeat("x = 1", "+1", "")),
        ("powers.py", repeat("x = 2", "**2", "")),
        ("brackets.py", repeat("c = {'zero_optimization': {}}\nx = 1 + ", "(", "")),
        (
            "sections.json",
            many("{\"zero_optimization\": {}", "}", |n| {
                if n < 900 { format!(",\"{n}\": [{}1]", "1,".repeat(30)) } else { " ".to_owned() }
            }),
        ),
    ] {
        let got = funicular(&["policy", "import"], &write(dir.path(), name, &input));
        assert!(matches!(got.status.code(), Some(0 | 1)), "{name}: {:?}", got.status);
        assert!(got.stderr.len() < 16 << 10, "{name}: {} bytes of error", got.stderr.len());
    }
}

/// The other way round: what real files hold is far from the bounds.
#[test]
fn large_policies_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let overrides: String =
        (0..2_000).map(|n| format!("[[override]]\nmatch = 'model.layers.{n}.*'\nparams = 'host'\n")).collect();
    let got = funicular(&["policy", "check"], &write(dir.path(), "p.toml", &overrides));
    assert_eq!(got.status.code(), Some(0), "{}", text(&got.stderr));
}

#[test]
fn a_file_that_is_named_by_another_is_not_shown() {
    let dir = tempfile::tempdir().unwrap();
    let secrets = [
        ("shadow", "root:$6$secret$hash:19000:0:99999:7:::\n"),
        ("token.json", "{\"auths\": {\"secret\": \"hash\"}}"),
        ("list.json", "[\"secret\", \"hash\"]"),
        ("near.json", "{\"zero_optimization\": {}, \"secret\" \"hash\"}"),
        ("wrong.json", "{\"zero_optimization\": \"secret hash\"}"),
        ("keys.yaml", "secret: hash\n"),
        ("script.py", "secret(hash=1)"),
    ];
    for (name, contents) in secrets {
        let secret = write(dir.path(), name, contents);
        for (from, contents) in [
            ("from.yaml", format!("deepspeed_config:\n  deepspeed_config_file: {}\n", secret.display())),
            ("from.py", format!("DeepSpeedStrategy(config=\"{}\")", secret.display())),
        ] {
            let got = funicular(&["policy", "import"], &write(dir.path(), from, &contents));
            let (out, err) = (text(&got.stdout), text(&got.stderr));
            assert_eq!(got.status.code(), Some(1), "{name}: {out}");
            assert!(!out.contains("hash") && !err.contains("hash") && !err.contains("secret"), "{name}: {out} {err}");
            assert!(err.contains("FN-E507") && err.contains(name) && err.contains(from), "{name}: {err}");
        }
        // By itself it is the caller's own choice, and the error shows the place.
        let got = funicular(&["policy", "import"], &secret);
        let err = text(&got.stderr);
        assert!(
            got.status.code() == Some(0) || ["FN-E501", "FN-E503", "FN-E507"].iter().any(|code| err.contains(code)),
            "{name}: {err}"
        );
    }
    for target in ["/dev/zero", "/nowhere", "/tmp"] {
        let from = write(dir.path(), "from.yaml", &format!("deepspeed_config: {{deepspeed_config_file: {target}}}\n"));
        let got = funicular(&["policy", "import"], &from);
        let err = text(&got.stderr);
        assert!(got.status.code() == Some(2) && err.contains("FN-E504") && err.contains(target), "{err}");
    }
}

#[test]
fn pipes_and_devices_are_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe.json");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let from = write(dir.path(), "from.yaml", "deepspeed_config: {deepspeed_config_file: pipe.json}\n");
    for (command, file) in [("check", &pipe), ("import", &pipe), ("import", &from)] {
        let got = funicular(&["policy", command], file);
        let err = text(&got.stderr);
        assert!(got.status.code() == Some(2) && err.contains("FN-E504") && err.contains("not a regular file"), "{err}");
    }
    // What a shell hands over is read to its end.
    let shell = "printf '[budget]\\nhbm = \"1GiB\"\\n' | \"$0\" policy show /dev/stdin";
    let got = Command::new("sh").args(["-c", shell, env!("CARGO_BIN_EXE_funicular")]).output().unwrap();
    assert!(got.status.success() && text(&got.stdout).contains("hbm = \"1GiB\""), "{}", text(&got.stderr));
}

/// Every control character of the inputs is one that a terminal would obey.
#[test]
fn nothing_from_a_file_commands_the_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let evil = "\u{9b}2J\u{202e}\u{7f}";
    for (command, name, contents) in [
        ("check", "key.toml", format!("[budget]\n\"a\\u001b[2J{evil}\" = 1\n")),
        ("check", "value.toml", format!("device = \"a\\u001b[2J\\u0007{evil}\"\n")),
        ("check", "\u{1b}[31mname.toml", "device = 1\n".to_owned()),
        ("check", "key.json", format!("{{\"a\\u001b{evil}\": 1}}")),
        ("check", "syntax.json", format!("{{\"a\": \u{1b}[2J{evil}}}")),
        ("show", "show.toml", format!("nvme.paths = [\"/a\\u001b{evil}\"]\n")),
        ("import", "import.json", format!("{{\"k\\u001b{evil}\": \"v\\u001b{evil}\", \"zero_optimization\": {{}}}}")),
        ("import", "import.yaml", format!("\"k\\e{evil}\": \"v\\e{evil}\"\n\"\\e{evil}\": [1\n")),
        ("import", "import.py", format!("x(\"\u{1b}{evil}\")")),
    ] {
        let got = funicular(&["policy", command], &write(dir.path(), name, &contents));
        for (stream, shown) in [("out", text(&got.stdout)), ("err", text(&got.stderr))] {
            let bad = shown.chars().find(|&c| (c.is_control() && c != '\n' && c != '\t') || c == '\u{202e}');
            assert_eq!(bad, None, "{name}, {stream}: {shown:?}");
        }
    }
}
