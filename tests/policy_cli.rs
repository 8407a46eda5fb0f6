//! `funicular policy` as its user runs it.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::process::{Command, Output};

fn funicular(arguments: &[&str], env: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_funicular"));
    command.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/ds"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("FUNICULAR_")) {
        command.env_remove(name);
    }
    command.args(arguments).envs(env.iter().copied()).output().unwrap()
}

/// Exit code, standard output, standard error.
fn run(arguments: &[&str], env: &[(&str, &str)]) -> (i32, String, String) {
    let output = funicular(arguments, env);
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[test]
fn check_says_what_a_run_would_say() {
    let dir = tempfile::tempdir().unwrap();
    let write = |text: &str| {
        let path = dir.path().join("p.toml");
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let file = write(&format!("[optimizer]\ntier = \"nvme\"\n[nvme]\npaths = [\"{}\"]\n", env!("CARGO_TARGET_TMPDIR")));
    let (code, out, err) = run(&["policy", "check", &file], &[]);
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.ends_with("p.toml: a valid policy\n"), "{out}");
    let (code, _, err) = run(&["policy", "check", &file, "--set", "nvme.paths="], &[]);
    assert!(code == 1 && err.contains("FN-E503 optimizer.tier is nvme, but nvme.paths is empty."), "{err}");
    assert_eq!(run(&["policy", "check", &file], &[("FUNICULAR_OPTIMIZER__WHERE", "gpu")]).0, 0);
    let (code, out, err) = run(&["policy", "check", &write("[optimizer]\nteir = \"host\"\n")], &[]);
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(err.contains("p.toml:2:1: unknown key 'optimizer.teir' (did you mean 'tier'?)\n"), "{err}");
    assert!(err.contains("\n      | ^^^^"), "{err}");
}

#[test]
fn another_systems_file_is_told_from_a_slip() {
    let (code, _, err) = run(&["policy", "check", "complete.json"], &[]);
    assert!(code == 1 && err.ends_with("^\nThis is another system's configuration: `funicular policy import complete.json > policy.toml` makes a policy of it.\n"), "{err}");
    let dir = tempfile::tempdir().unwrap();
    // With comments, in a list, and with nothing that a policy could take over.
    let foreign = dir.path().join("ds.json");
    let zero = "{\"zero_optimization\": {\"stage\": 3, \"offload_param\": {\"device\": \"cpu\"}}}";
    for text in [&format!("// mine\n{zero}"), &format!("[{zero}]"), "{\"zero_optimization\": {\"stage\": 3}}"] {
        std::fs::write(&foreign, text).unwrap();
        let (code, _, err) = run(&["policy", "check", foreign.to_str().unwrap()], &[]);
        assert!(code == 1 && err.contains("funicular policy import"), "{text}: {err}");
    }
    for text in ["// mine\n{\"budget\": {\"hbm\": \"1GiB\"}}", "{\"budget\": {\"hbm\": true}}"] {
        std::fs::write(&foreign, text).unwrap();
        let (code, _, err) = run(&["policy", "check", foreign.to_str().unwrap()], &[]);
        assert!(code == 1 && !err.contains("policy import"), "{text}: {err}");
    }
    let slip = dir.path().join("p.toml");
    std::fs::write(&slip, "[param]\ntier = 'host'\n").unwrap();
    let (code, _, err) = run(&["policy", "check", slip.to_str().unwrap()], &[]);
    assert!(code == 1 && err.contains("^^^^^\nValid keys of a policy: version, device"), "{err}");
    let (code, _, err) = run(&["policy", "check", "fits", "--set", "nvme.paths=/proc"], &[]);
    assert!(
        code == 3 && err.contains("/proc: no file can be made in this directory") && !err.contains("Create"),
        "{err}"
    );
}

#[test]
fn check_tells_the_policy_from_the_machine() {
    let check = |key: &str| run(&["policy", "check", "fits", "--set", key], &[]);
    assert_eq!(run(&["policy", "check", "host"], &[]), (0, "host: a valid policy\n".to_owned(), String::new()));
    for (key, code, part) in [
        ("nvme.paths=/no/such/folder", "FN-E604", "/no/such/folder: No such file"),
        ("device=cuda:4000", "FN-E001", "device = \"cuda:4000\", but this machine has"),
        ("budget.host=4000TiB", "FN-E202", "budget.host = 4000.0 TiB is more than the whole machine may give"),
    ] {
        let (exit, out, err) = check(key);
        assert_eq!(
            (exit, out.as_str()),
            (3, "fits: a valid policy, but this machine cannot run it as it is\n"),
            "{err}"
        );
        assert!(err.starts_with(code) && err.contains(part) && err.lines().count() == 1, "{err}");
    }
    for (key, hint) in [
        ("params.tier=cpu", "(did you mean 'host'?)"),
        ("optimizer.tier=disk", "(did you mean 'nvme'?)"),
        ("optimizer.tier=gpu", "(did you mean 'hbm'?)"),
        ("optimizer.where=cuda", "(did you mean 'gpu'?)"),
        ("params.dtype=bf16", "(did you mean 'bfloat16'?)"),
        ("device=gpu", "(did you mean \"cuda\"?)"),
        ("device=gpu:1", "(did you mean \"cuda:1\"?)"),
        ("device=cpu", "(did you mean \"host\"?)"),
    ] {
        let (exit, out, err) = check(key);
        assert_eq!((exit, out.as_str()), (1, ""), "{key}");
        assert!(err.starts_with("FN-E503") && err.contains(hint), "{key}: {err}");
    }
    // A file that cannot be read says nothing; a slip in the name of a preset is such a file.
    assert_eq!(run(&["policy", "check", "none.toml"], &[]).0, 2);
    let (exit, _, err) = run(&["policy", "check", "hots"], &[]);
    assert!(exit == 2 && err.contains("FN-E504") && err.contains("did you mean 'host'?"), "{err}");
    let (exit, _, err) = run(&["policy", "check", "nvme"], &[]);
    assert!(exit == 1 && err.contains("params.tier is nvme, but nvme.paths is empty"), "{err}");
}

#[test]
fn show_resolves_the_sources_in_order() {
    let (code, out, _) =
        run(&["policy", "show"], &[("FUNICULAR_BUDGET__HBM", "1GiB"), ("FUNICULAR_BUDGET__HOST", "2GiB")]);
    assert!(code == 0 && out.contains("hbm = \"1GiB\"\nhost = \"2GiB\"\nnvme = \"auto\"\n"), "{out}");
    let (code, out, _) = run(&["policy", "show", "--set", "budget.hbm=3GiB"], &[("FUNICULAR_BUDGET__HBM", "1GiB")]);
    assert!(code == 0 && out.contains("hbm = \"3GiB\"\n"), "{out}");
    let (code, _, err) = run(&["policy", "show", "--set", "budget.hbm"], &[]);
    assert!(code == 2 && err.contains("no '=' in it"), "{err}");
}

#[test]
fn schema_is_json() {
    let (code, out, _) = run(&["policy", "schema"], &[]);
    assert_eq!(code, 0);
    let published = include_str!("../docs/policy.schema.json");
    assert_eq!(out, published);
}

#[test]
fn import_prints_a_policy_that_check_takes() {
    let (code, out, err) = run(&["policy", "import", "complete.json"], &[]);
    assert_eq!(code, 0);
    assert!(err.contains("complete.json: ") && err.contains("1 to decide"), "{err}");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("p.toml");
    std::fs::write(&file, out).unwrap();
    let (code, out, err) = run(&["policy", "check", file.to_str().unwrap()], &[]);
    assert!(out.contains("a valid policy") && (code == 0 || err.contains("/local_nvme")), "{code} {out} {err}");
    let (code, out, err) = run(&["policy", "import", "accelerate_file.yaml", "--hidden-size", "4096"], &[]);
    assert!(code == 0 && err.contains("accelerate_file.yaml refers to hf_nvme.json"), "{err}");
    assert!(out.contains("15099494 elements"), "{out}");
    let (code, out, err) = run(&["policy", "import", "missing_comma.json"], &[]);
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(err.contains("missing_comma.json:6:32:"), "{err}");
    let (code, out, err) = run(&["policy", "import", "../imports/recipe.yaml"], &[]);
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(err.starts_with("FN-E507 ../imports/recipe.yaml: not a configuration"), "{err}");
    let (code, _, err) = run(&["policy", "import", "none.json"], &[]);
    assert!(code == 2 && err.starts_with("FN-E504 none.json: No such file") && !err.contains("preset"), "{err}");
}

#[test]
fn wrong_arguments_are_told() {
    let (code, _, err) = run(&["polic"], &[]);
    assert!(code == 2 && err.contains("policy"), "{err}");
    assert_eq!(run(&[], &[]).0, 2);
}
