//! The policy file: every kind of bad input by code, place, key and suggestion; round trips; overlays; the schema.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeSet;

use funicular::{
    Code, Error,
    policy::{
        Activations, ActivationsTier, Auto, Budget, Debugging, DeviceChoice, Direct, Engine, Gradients, GradientsTier,
        Level, Log, MicroBatch, Nvme, Optimizer, OptimizerTier, Override, PRESETS, Params, ParamsDtype, ParamsTier,
        Pattern, Policy, Prefetch, Pressure, UnderPressure, Units, UpdateOn, schema,
    },
    quantities::ByteCount,
};
use proptest::prelude::*;

fn refused(text: &str) -> Error {
    Policy::from_toml_str(text, "p.toml").expect_err(text)
}

/// The error's code, and that its text has every one of these parts.
fn assert_error(error: &Error, code: Code, parts: &[&str]) {
    assert_eq!(error.code(), code, "{error}");
    for part in parts {
        assert!(error.to_string().contains(part), "no {part:?} in:\n{error}");
    }
}

#[test]
fn an_empty_file_is_the_default() {
    assert_eq!(Policy::from_toml_str("", "p.toml").unwrap(), Policy::default());
    assert_eq!(Policy::from_json_str("{}", "p.json").unwrap(), Policy::default());
    assert_eq!(Policy::from_toml_str("version = 1\n[budget]\n", "p.toml").unwrap(), Policy::default());
}

#[test]
fn reads_every_kind_of_value() {
    let policy = Policy::from_toml_str(
        r#"
        device = "cuda:1"
        [budget]
        hbm = "4GiB"
        host = "1.5GB"
        threads = 6
        [nvme]
        paths = ["/mnt/a", "/mnt/b"]
        engine = "threads"
        block = "4MiB"
        queue_depth = 64
        direct = "required"
        checksums = false
        [units]
        match = ["model.layers.*"]
        [[override]]
        match = "*.experts.*"
        params = "nvme"
        [[override]]
        match = "*"
        optimizer = "host"
        [log]
        trace = "t.json"
        trace_steps = [3, 4]
        "#,
        "p.toml",
    )
    .unwrap();
    assert_eq!(policy.device, DeviceChoice::Cuda(Some(1)));
    assert_eq!(policy.budget.hbm, Auto::Set(ByteCount::gib(4)));
    assert_eq!(policy.budget.host, Auto::Set(ByteCount(1_500_000_000)));
    assert_eq!(policy.budget.nvme, Auto::Auto);
    assert_eq!(policy.budget.threads, Auto::Set(6));
    assert_eq!(policy.nvme.paths.len(), 2);
    assert_eq!(policy.nvme.engine, Engine::Threads);
    assert_eq!(policy.nvme.block, ByteCount::mib(4));
    assert!(!policy.nvme.checksums);
    assert_eq!(policy.overrides[0].params, Some(ParamsTier::Nvme));
    assert_eq!(policy.overrides[1].optimizer, Some(OptimizerTier::Host));
    assert!(policy.overrides[0].pattern.matches("h.0.experts.3.up"));
    assert_eq!(policy.log.trace_steps, [3, 4]);
}

#[test]
fn unknown_key_in_a_section() {
    let error = refused("[optimizer]\nteir = \"host\"\n");
    assert_error(
        &error,
        Code::PolicyKey,
        &["p.toml:2:1:", "'optimizer.teir'", "did you mean 'tier'?", "tier, spare, where"],
    );
    assert!(error.to_string().contains("    2 | teir = \"host\"\n      | ^^^^"), "{error}");
}

#[test]
fn unknown_section() {
    assert_error(&refused("[bugdet]\nhbm = \"1GiB\"\n"), Code::PolicyKey, &["p.toml:1:2:", "'bugdet'", "'budget'"]);
}

#[test]
fn key_in_the_wrong_place() {
    assert_error(
        &refused("hbm = \"1GiB\"\n"),
        Code::PolicyKey,
        &["p.toml:1:1:", "'hbm'", "did you mean 'budget.hbm'?"],
    );
    let error = refused("[nvme]\ntier = \"nvme\"\n");
    assert_error(&error, Code::PolicyKey, &["p.toml:2:1:", "'nvme.tier'", "params.tier", "optimizer.tier"]);
}

#[test]
fn unknown_key_in_an_override() {
    let error =
        refused("[[override]]\nmatch = \"*\"\nparams = \"nvme\"\n[[override]]\nmatch = \"a\"\nparam = \"host\"\n");
    assert_error(&error, Code::PolicyKey, &["p.toml:6:1:", "'override[1].param'", "did you mean 'params'?"]);
}

#[test]
fn override_without_match_or_effect() {
    assert_error(
        &refused("[[override]]\nparams = \"nvme\"\n"),
        Code::PolicyKey,
        &["p.toml:1:", "override[0]", "lacks the key 'match'"],
    );
    assert_error(&refused("[[override]]\nmatch = \"a\"\n"), Code::PolicyValue, &["override[0]", "sets nothing"]);
}

#[test]
fn size_without_unit() {
    assert_error(
        &refused("[budget]\nhbm = 12\n"),
        Code::PolicyValue,
        &["p.toml:2:7:", "budget.hbm", "did you mean \"12GiB\"?", "^^"],
    );
    assert_error(
        &refused("[budget]\nhost = \"12\"\n"),
        Code::PolicyValue,
        &["p.toml:2:8:", "budget.host", "\"12GiB\""],
    );
    assert_error(
        &refused("[budget]\nhost = 1.5\n"),
        Code::PolicyValue,
        &["p.toml:2:8:", "the number 1.5 is not", "4GiB"],
    );
    assert_error(&refused("[nvme]\nblock = 1048576\n"), Code::PolicyValue, &["p.toml:2:9:", "nvme.block", "\"1MiB\""]);
}

#[test]
fn size_with_an_unknown_unit() {
    assert_error(&refused("[budget]\nhbm = \"12gb\"\n"), Code::PolicyValue, &["p.toml:2:7:", "did you mean \"12GB\"?"]);
    assert_error(&refused("[budget]\nhbm = \"atuo\"\n"), Code::PolicyValue, &["budget.hbm", "did you mean \"auto\"?"]);
    assert_error(
        &refused("[budget]\nhbm = true\n"),
        Code::PolicyValue,
        &["budget.hbm", "true is not \"auto\" or a size"],
    );
}

#[test]
fn size_without_quotes() {
    let error = refused("[budget]\nhbm = 12GiB # all of it\n");
    assert_error(&error, Code::PolicySyntax, &["p.toml:2:", "write \"12GiB\"."]);
}

#[test]
fn block_that_no_disk_takes() {
    for block in ["3MiB", "512B", "1GiB", "1MB"] {
        let error = refused(&format!("[nvme]\nblock = \"{block}\"\n"));
        assert_error(&error, Code::PolicyValue, &["p.toml:2:9:", "nvme.block", "power of two"]);
    }
    assert_error(&refused("[nvme]\nblock = \"auto\"\n"), Code::PolicyValue, &["nvme.block"]);
}

#[test]
fn unknown_word() {
    let error = refused("[nvme]\nengine = \"iouring\"\n");
    assert_error(
        &error,
        Code::PolicyValue,
        &["p.toml:2:10:", "nvme.engine", "auto, io_uring, threads", "did you mean 'io_uring'?"],
    );
    assert_error(
        &refused("[params]\ntier = \"gpu\"\n"),
        Code::PolicyValue,
        &["params.tier", "'gpu' is not one of auto, host, nvme"],
    );
    assert_error(
        &refused("[params]\ntier = 3\n"),
        Code::PolicyValue,
        &["params.tier", "the number 3 is not one of auto"],
    );
}

#[test]
fn wrong_types() {
    assert_error(&refused("budget = \"12GiB\"\n"), Code::PolicyValue, &["p.toml:1:10:", "budget:", "write [budget]"]);
    assert_error(&refused("[nvme]\npaths = \"/mnt/a\"\n"), Code::PolicyValue, &["p.toml:2:9:", "nvme.paths"]);
    assert_error(
        &refused("[nvme]\npaths = [1]\n"),
        Code::PolicyValue,
        &["p.toml:2:10:", "nvme.paths[0]", "the number 1"],
    );
    assert_error(
        &refused("[nvme]\nchecksums = \"true\"\n"),
        Code::PolicyValue,
        &["nvme.checksums", "\"true\" is not a boolean"],
    );
    assert_error(
        &refused("[log]\nevery = -1\n"),
        Code::PolicyValue,
        &["p.toml:2:9:", "log.every", "-1 is not a whole number"],
    );
    assert_error(
        &refused("[log]\ntrace_steps = [1, \"2\"]\n"),
        Code::PolicyValue,
        &["p.toml:2:19:", "log.trace_steps[1]", "the string \"2\" is not a whole number"],
    );
    assert_error(
        &refused("nvme.paths = \"/tmp\"\n"),
        Code::PolicyValue,
        &["p.toml:1:14:", "nvme.paths: the string \"/tmp\" is not a list: write [\"/tmp\"]"],
    );
    assert_error(&refused("nvme.paths = 3\n"), Code::PolicyValue, &["nvme.paths: the number 3 is not a list\n"]);
    assert_error(&refused("[override]\nmatch = \"a\"\n"), Code::PolicyValue, &["p.toml:1:", "override"]);
}

#[test]
fn counts_out_of_range() {
    assert_error(
        &refused("[budget]\nthreads = 0\n"),
        Code::PolicyValue,
        &["p.toml:2:11:", "budget.threads", "from 1 to 4096"],
    );
    assert_error(&refused("[nvme]\nqueue_depth = 5000\n"), Code::PolicyValue, &["nvme.queue_depth", "from 1 to 4096"]);
    assert_error(&refused("[budget]\nthreads = \"8\"\n"), Code::PolicyValue, &["write the number 8 without quotes"]);
    assert_error(&refused("[budget]\nthreads = 8.0\n"), Code::PolicyValue, &["budget.threads", "whole number"]);
    assert_error(&refused("[activations]\nmicro_batch = \"of\"\n"), Code::PolicyValue, &["did you mean \"off\"?"]);
}

#[test]
fn bad_paths() {
    assert_error(&refused("[nvme]\npaths = [\"~/swap\"]\n"), Code::PolicyValue, &["p.toml:2:", "'~' is not expanded"]);
    assert_error(&refused("[nvme]\npaths = [\"\"]\n"), Code::PolicyValue, &["an empty path"]);
    assert_error(&refused("[nvme]\npaths = [\"/a/b\", \"/a//b/\"]\n"), Code::PolicyValue, &["is there twice"]);
}

#[test]
fn bad_pattern() {
    assert_error(
        &refused("[units]\nmatch = [\"a\", \"b[\"]\n"),
        Code::PolicyValue,
        &["p.toml:2:15:", "units.match[1]", "'[' without ']'"],
    );
}

#[test]
fn bad_device() {
    assert_error(
        &refused("device = \"cpu\"\n"),
        Code::PolicyValue,
        &["p.toml:1:10:", "device", "did you mean \"host\"?"],
    );
    assert_error(&refused("device = \"cuda:x\"\n"), Code::PolicyValue, &["cuda:N"]);
}

#[test]
fn other_versions() {
    assert_error(&refused("version = 2\n"), Code::PolicyValue, &["p.toml:1:11:", "version", "it reads 1"]);
    assert_error(&refused("version = \"1\"\n"), Code::PolicyValue, &["version"]);
}

#[test]
fn broken_toml() {
    assert_error(&refused("[budget\nhbm = \"1GiB\"\n"), Code::PolicySyntax, &["p.toml:1:8:", "[budget"]);
    assert_error(
        &refused("[budget]\nhbm = \"1GiB\"\nhbm = \"2GiB\"\n"),
        Code::PolicySyntax,
        &["p.toml:3:1:", "duplicate"],
    );
    assert_error(&refused("[budget]\nhbm = \n"), Code::PolicySyntax, &["p.toml:2:"]);
}

#[test]
fn json_has_the_same_schema_and_errors() {
    let text = "{\"version\": 1,\n \"budget\": {\"hbm\": \"4GiB\"},\n \"override\": [{\"match\": \"a*\", \"params\": \"nvme\"}]}";
    let policy = Policy::from_json_str(text, "p.json").unwrap();
    assert_eq!(policy.budget.hbm, Auto::Set(ByteCount::gib(4)));
    assert_eq!(policy.overrides.len(), 1);
    let json = |text: &str| Policy::from_json_str(text, "p.json").expect_err(text);
    assert_error(
        &json("{\"budget\": {\n  \"hmb\": \"4GiB\"}}"),
        Code::PolicyKey,
        &["p.json:2:3:", "'budget.hmb'", "'hbm'", "  \"hmb\""],
    );
    assert_error(&json("{\"budget\": {\"hbm\": 4}}"), Code::PolicyValue, &["p.json:1:20:", "budget.hbm", "\"4GiB\""]);
    assert_error(
        &json("{\"budget\": {\"hbm\": \"4GiB\"}\n \"log\": {}}"),
        Code::PolicySyntax,
        &["p.json:1:26:", "missing after this"],
    );
    assert_error(&json("{\"budget\": null}"), Code::PolicyValue, &["p.json:1:12:", "budget", "null"]);
    assert_error(&json("[]"), Code::PolicyValue, &["p.json:1:1:", "a list is not a policy"]);
}

#[test]
fn files() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let toml = path("a.toml", b"[budget]\nhbm = \"1GiB\"\n");
    assert_eq!(Policy::from_file(toml).unwrap().budget.hbm, Auto::Set(ByteCount::gib(1)));
    assert!(Policy::from_file(path("a.json", b"{\"log\": {\"every\": 3}}")).is_ok());
    assert!(Policy::from_file(path("noext", b" {\"log\": {\"every\": 3}}")).is_ok());
    let refuse = |path: std::path::PathBuf| Policy::from_file(path).unwrap_err();
    assert_error(&refuse(dir.path().join("none.toml")), Code::PolicyFile, &["none.toml", "No such file", "laptop"]);
    assert_eq!(refuse(dir.path().join("none.toml")).os_error(), Some(2));
    assert_error(&refuse(dir.path().to_path_buf()), Code::PolicyFile, &["directory"]);
    assert_error(&refuse(path("b.toml", b"a = \xff")), Code::PolicyFile, &["b.toml", "not UTF-8 at byte 4"]);
    assert_error(&refuse(path("c.yaml", b"a: 1")), Code::PolicyFile, &["not YAML"]);
    assert_error(&refuse("/dev/zero".into()), Code::PolicyFile, &["/dev/zero: not a regular file"]);
    assert_error(&refuse(path("large.toml", &[b'#'; (1 << 20) + 1])), Code::PolicyFile, &["larger than 1 MiB"]);
    assert_error(&refuse(path("d.toml", b"[budgets]\n")), Code::PolicyKey, &["d.toml:1:2:", "'budget'"]);
}

#[test]
fn presets_are_supported_and_read_back() {
    for name in PRESETS {
        let policy = Policy::preset(name).unwrap();
        assert_eq!(Policy::from_toml_str(&policy.to_toml().unwrap(), name).unwrap(), policy);
    }
    assert_eq!(Policy::preset("fits").unwrap(), Policy::default());
    assert_error(&Policy::preset("labtop").unwrap_err(), Code::PolicyValue, &["did you mean 'laptop'?", "fits, host"]);
}

#[test]
fn set_writes_one_key() {
    let mut policy = Policy::default();
    for (key, value) in [
        ("budget.hbm", "12GiB"),
        ("budget.threads", "3"),
        ("budget.host", "auto"),
        ("nvme.paths", "/mnt/a, /mnt/b"),
        ("nvme.checksums", "false"),
        ("nvme.engine", "\"threads\""),
        ("units.match", "[\"h.*\"]"),
        ("override", "[{match = \"*\", params = \"nvme\"}]"),
        ("log.trace", "7"),
        ("log.trace_steps", "3,4"),
        ("activations.micro_batch", "2"),
        ("device", "cuda:0"),
    ] {
        policy.set(key, value).unwrap();
    }
    assert_eq!(policy.budget.hbm, Auto::Set(ByteCount::gib(12)));
    assert_eq!(policy.budget.threads, Auto::Set(3));
    assert_eq!(policy.nvme.paths, ["/mnt/a", "/mnt/b"].map(std::path::PathBuf::from));
    assert_eq!((policy.nvme.checksums, policy.nvme.engine), (false, Engine::Threads));
    assert_eq!(policy.units.patterns.len(), 1);
    assert_eq!(policy.overrides[0].params, Some(ParamsTier::Nvme));
    assert_eq!((policy.log.trace.as_str(), &policy.log.trace_steps[..]), ("7", &[3, 4][..]));
    assert_eq!(policy.activations.micro_batch, MicroBatch::Rows(2));
    assert_eq!(policy.device, DeviceChoice::Cuda(Some(0)));
}

#[test]
fn set_refuses_and_changes_nothing() {
    for (key, value, code, parts) in [
        ("budget.hmb", "1GiB", Code::PolicyKey, &["--set budget.hmb=1GiB", "did you mean 'budget.hbm'?"][..]),
        ("hbm", "1GiB", Code::PolicyKey, &["did you mean 'budget.hbm'?"]),
        ("budget", "1GiB", Code::PolicyKey, &["is a section", "hbm, host"]),
        ("budget.hbm", "12", Code::PolicyValue, &["--set budget.hbm=12: budget.hbm", "\"12GiB\""]),
        ("budget.threads", "many", Code::PolicyValue, &["budget.threads", "whole number"]),
        ("nvme.checksums", "yes", Code::PolicyValue, &["nvme.checksums", "\"yes\" is not a boolean"]),
        ("nvme.engine", "uring", Code::PolicyValue, &["nvme.engine"]),
        ("override[0].params", "nvme", Code::PolicyKey, &["unknown key"]),
        ("", "", Code::PolicyKey, &["unknown key"]),
    ] {
        let mut policy = Policy::default();
        assert_error(&policy.set(key, value).unwrap_err(), code, parts);
        assert_eq!(policy, Policy::default());
    }
}

#[test]
fn environment_overrides() {
    let vars = [
        ("FUNICULAR_BUDGET__HBM", "12GiB"),
        ("FUNICULAR_NVME__QUEUE_DEPTH", "8"),
        ("FUNICULAR_DEVICE", "host"),
        ("FUNICULAR_LOG", "debug"),
        ("FUNICULARITY__X", "1"),
        ("HOME", "/root"),
    ];
    let policy = Policy::default().with_env(vars).unwrap();
    assert_eq!(policy.budget.hbm, Auto::Set(ByteCount::gib(12)));
    assert_eq!(policy.nvme.queue_depth, Auto::Set(8));
    assert_eq!(policy.device, DeviceChoice::Host);
    let refuse = |name: &str, value: &str| Policy::default().with_env([(name, value)]).unwrap_err();
    assert_error(
        &refuse("FUNICULAR_NVME__PATHS", "/mnt/\u{fffd}"),
        Code::PolicyValue,
        &["FUNICULAR_NVME__PATHS", "UTF-8"],
    );
    assert_error(&refuse("FUNICULAR_BUDGTE__HBM", "1GiB"), Code::PolicyKey, &["FUNICULAR_BUDGTE__HBM", "'budget.hbm'"]);
    assert_error(&refuse("FUNICULAR_BUDGET_HBM", "1GiB"), Code::PolicyKey, &["did you mean FUNICULAR_BUDGET__HBM?"]);
    assert_error(
        &refuse("FUNICULAR_BUDGET__HBM", "1"),
        Code::PolicyValue,
        &["environment FUNICULAR_BUDGET__HBM=1:", "\"1GiB\""],
    );
}

#[test]
fn contradictions_are_refused_by_name() {
    for (text, parts) in [
        ("[params]\ntier = \"nvme\"", ["params.tier is nvme", "nvme.paths"]),
        ("[optimizer]\ntier = \"nvme\"", ["optimizer.tier is nvme", "nvme.paths"]),
        ("[[override]]\nmatch = \"*\"\nparams = \"nvme\"", ["override[0].params is nvme", "nvme.paths"]),
        ("[activations]\ntier = \"host\"", ["activations.tier is host", "activations.micro_batch"]),
        ("[log]\ntrace_steps = [1]", ["log.trace_steps", "log.trace"]),
    ] {
        let error = Policy::from_toml_str(text, "p").unwrap().check_consistent().unwrap_err();
        assert_error(&error, Code::PolicyValue, &parts);
    }
    Policy::from_toml_str("[params]\ntier = \"nvme\"\n[nvme]\npaths = [\"/a\"]", "p")
        .unwrap()
        .check_consistent()
        .unwrap();
}

#[test]
fn short_form_has_only_what_differs() {
    let mut policy = Policy::default();
    assert_eq!(policy.to_toml_short().unwrap(), "version = 1\n");
    policy.set("budget.hbm", "4GiB").unwrap();
    assert_eq!(policy.to_toml_short().unwrap(), "version = 1\n\n[budget]\nhbm = \"4GiB\"\n");
}

/// Dotted keys of every leaf of a JSON object.
fn leaves(prefix: &str, value: &serde_json::Value, out: &mut BTreeSet<String>) {
    match value {
        serde_json::Value::Object(map) => {
            for (key, value) in map {
                leaves(&format!("{prefix}.{key}"), value, out);
            }
        }
        _ => drop(out.insert(prefix.trim_start_matches('.').to_owned())),
    }
}

/// A policy with an override that has every key, so that every key of the types is written out.
fn full() -> serde_json::Value {
    let overrides = vec![Override {
        pattern: Pattern::new("*").unwrap(),
        params: Some(ParamsTier::Host),
        optimizer: Some(OptimizerTier::Host),
    }];
    let mut json = serde_json::to_value(Policy { overrides, ..Policy::default() }).unwrap();
    json["override[]"] = json["override"][0].take();
    json.as_object_mut().unwrap().remove("override");
    json
}

#[test]
fn schema_and_types_have_the_same_keys_and_defaults() {
    let mut types = BTreeSet::new();
    leaves("", &full(), &mut types);
    let table: BTreeSet<String> = schema::KEYS.iter().map(|k| k.path.to_owned()).collect();
    assert_eq!(types, table);
    let json = schema::json_schema();
    let defaults = serde_json::to_value(Policy::default()).unwrap();
    let mut published = BTreeSet::new();
    for (section, schema) in json["properties"].as_object().unwrap() {
        let (schema, name) = match schema.get("items") {
            Some(items) if section == "override" => (items, "override[]".to_owned()),
            _ => (schema, section.clone()),
        };
        match schema.get("properties").and_then(|p| p.as_object()) {
            None => drop(published.insert(name)),
            Some(keys) => {
                assert_eq!(schema["additionalProperties"], false, "{name}");
                for (key, schema) in keys {
                    published.insert(format!("{name}.{key}"));
                    if section != "override" {
                        assert_eq!(schema["default"], defaults[section][key], "{name}.{key}");
                    }
                }
            }
        }
    }
    assert_eq!(published, types);
}

#[test]
fn documentation_is_in_step() {
    let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/docs");
    let schema = serde_json::to_string_pretty(&schema::json_schema()).unwrap() + "\n";
    let file = format!("{docs}/policy.schema.json");
    if std::env::var_os("FUNICULAR_WRITE_DOCS").is_some() {
        std::fs::write(&file, &schema).unwrap();
        let text = std::fs::read_to_string(format!("{docs}/policy.md")).unwrap();
        let (head, rest) = text.split_once("<!-- keys -->\n").unwrap();
        let (_, tail) = rest.split_once("<!-- end -->").unwrap();
        let text = format!("{head}<!-- keys -->\n{}<!-- end -->{tail}", schema::markdown());
        std::fs::write(format!("{docs}/policy.md"), text).unwrap();
    }
    let advice = "run the test with FUNICULAR_WRITE_DOCS=1";
    assert!(std::fs::read_to_string(file).unwrap() == schema, "docs/policy.schema.json is old: {advice}");
    let text = std::fs::read_to_string(format!("{docs}/policy.md")).unwrap();
    assert!(text.contains(&schema::markdown()), "docs/policy.md is old: {advice}");
    for (at, block) in text.split("```toml\n").skip(1).enumerate() {
        let (example, _) = block.split_once("```").unwrap();
        Policy::from_toml_str(example, &format!("docs/policy.md example {at}")).unwrap();
    }
}

fn size() -> impl Strategy<Value = ByteCount> {
    prop_oneof![0..1u64 << 20, (0..1u64 << 20).prop_map(|n| n << 20), (0..1u64 << 12).prop_map(|n| n * 1_000_000_000)]
        .prop_map(ByteCount)
}

fn auto<T: Copy + std::fmt::Debug>(of: impl Strategy<Value = T>) -> impl Strategy<Value = Auto<T>> {
    prop_oneof![Just(Auto::Auto), of.prop_map(Auto::Set)]
}

fn any_text() -> impl Strategy<Value = String> {
    prop_oneof!["[a-z/. \"'\\\\#=\\[\\]\n\t]{0,12}", "\\PC{0,8}"]
}

fn pattern() -> impl Strategy<Value = Pattern> {
    any_text().prop_filter_map("a pattern", |text| Pattern::new(&text).ok())
}

fn any_policy() -> impl Strategy<Value = Policy> {
    use proptest::sample::select;
    let params = select(vec![ParamsTier::Auto, ParamsTier::Host, ParamsTier::Nvme]);
    let states = select(vec![OptimizerTier::Auto, OptimizerTier::Hbm, OptimizerTier::Host, OptimizerTier::Nvme]);
    let device = prop_oneof![
        Just(DeviceChoice::Host),
        Just(DeviceChoice::Cuda(None)),
        any::<u32>().prop_map(|n| DeviceChoice::Cuda(Some(n)))
    ];
    let budget = (auto(size()), auto(size()), auto(size()), auto(1..=4096u32), auto(size()))
        .prop_map(|(hbm, host, nvme, threads, reserve)| Budget { hbm, host, nvme, threads, reserve });
    let nvme = (
        proptest::collection::btree_set("/[a-z \"\\\\é]{1,8}", 0..3),
        select(vec![Engine::Auto, Engine::IoUring, Engine::Threads]),
        12..=28u32,
        auto(1..=4096u32),
        select(vec![Direct::Auto, Direct::Required, Direct::Off]),
        any::<bool>(),
    )
        .prop_map(|(paths, engine, block, queue_depth, direct, checksums)| {
            let paths = paths.into_iter().map(Into::into).collect();
            Nvme { paths, engine, block: ByteCount(1 << block), queue_depth, direct, checksums }
        });
    let one = (pattern(), params.clone(), states.clone(), 0..3u8).prop_map(|(pattern, params, optimizer, which)| {
        Override { pattern, params: (which != 1).then_some(params), optimizer: (which != 0).then_some(optimizer) }
    });
    let rest = (
        proptest::collection::vec(pattern(), 0..3),
        proptest::collection::vec(one, 0..3),
        (auto(size()), auto(size())),
        prop_oneof![Just(MicroBatch::Off), (1..=4096u32).prop_map(MicroBatch::Rows)],
        any::<[bool; 6]>(),
        (any_text(), any_text()),
        select(vec![Level::Debug, Level::Info, Level::Warning, Level::Error]),
        any::<u32>(),
        proptest::collection::vec(0..=i64::MAX as u64, 0..3),
        (
            select(vec![UpdateOn::Auto, UpdateOn::Cpu, UpdateOn::Gpu]),
            select(vec![ParamsDtype::Keep, ParamsDtype::Float32, ParamsDtype::Bfloat16, ParamsDtype::Float16]),
            select(vec![GradientsTier::Auto, GradientsTier::Host, GradientsTier::Nvme]),
        ),
    );
    (device, budget, nvme, params, states, rest).prop_map(|(device, budget, nvme, params, states, rest)| {
        let (
            units,
            overrides,
            (window, spare),
            micro_batch,
            flags,
            (faults, trace),
            level,
            every,
            trace_steps,
            (update_on, dtype, gradients),
        ) = rest;
        let tier = if flags[4] { ActivationsTier::Host } else { ActivationsTier::Hbm };
        let action = if flags[2] { Pressure::Demote } else { Pressure::Refuse };
        Policy {
            version: 1,
            device,
            budget,
            nvme,
            params: Params { tier: params, dtype },
            optimizer: Optimizer { tier: states, spare, update_on },
            gradients: Gradients { tier: gradients },
            units: Units { patterns: units },
            overrides,
            prefetch: Prefetch { window },
            activations: Activations { micro_batch, tier },
            debug: Debugging { poison: flags[0], sync: flags[1], faults },
            log: Log { level, every, trace, trace_steps, nvtx: flags[5] },
            pressure: UnderPressure { action },
        }
    })
}

proptest! {
    #[test]
    fn a_policy_reads_back_as_itself(policy in any_policy()) {
        let toml = policy.to_toml().unwrap();
        prop_assert_eq!(&Policy::from_toml_str(&toml, "p").unwrap(), &policy, "{}", toml);
        let short = policy.to_toml_short().unwrap();
        prop_assert_eq!(&Policy::from_toml_str(&short, "p").unwrap(), &policy, "{}", short);
        let json = serde_json::to_string_pretty(&policy).unwrap();
        prop_assert_eq!(&Policy::from_json_str(&json, "p").unwrap(), &policy, "{}", json);
    }

    #[test]
    fn any_text_is_read_or_refused(text in "([a-z\\[\\]=\"'0-9.#{} \n\u{e9}]{0,60}|\\PC{0,60})") {
        let _ = Policy::from_toml_str(&text, "p");
        let _ = Policy::from_json_str(&text, "p");
        let _ = Policy::default().set(&text, &text);
    }
}
