//! Imports of other systems' configurations: every example in its right list, every key in exactly one.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use funicular::{
    Code,
    policy::{
        Auto, OptimizerTier, ParamsDtype, ParamsTier, Policy,
        import::{self, Hints, Imported, Item},
    },
    quantities::ByteCount,
};
use proptest::prelude::*;

fn read(name: &str) -> String {
    std::fs::read_to_string(format!("{}/tests/data/ds/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn load(name: &str) -> Imported {
    let imported = import::any(&read(name), name, Hints::default()).unwrap();
    let printed = imported.to_string();
    assert_eq!(Policy::from_toml_str(&printed, name).unwrap(), imported.policy, "{printed}");
    imported
}

fn item<'a>(list: &'a [Item], key: &str) -> &'a Item {
    list.iter().find(|i| i.key == key).unwrap_or_else(|| panic!("no {key} in {list:#?}"))
}

/// The keys of a list, without their sections.
fn leaves(list: &[Item]) -> Vec<&str> {
    list.iter().map(|i| i.key.rsplit('.').next().unwrap_or_default()).collect()
}

fn notes(list: &[Item], key: &str, part: &str) {
    let item = item(list, key);
    assert!(item.note.contains(part), "no {part:?} in {item:?}");
}

/// How many leaves a JSON file has; a section that is dealt with as a whole counts once.
fn count(value: &serde_json::Value, path: &str) -> usize {
    let whole = ["optimizer", "scheduler", "activation_checkpointing"];
    match value {
        serde_json::Value::Object(map) if !map.is_empty() && !whole.contains(&path) => map
            .iter()
            .map(|(key, value)| count(value, &format!("{path}{}{key}", if path.is_empty() { "" } else { "." })))
            .sum(),
        _ => 1,
    }
}

#[test]
fn every_key_is_in_exactly_one_list() {
    for name in [
        "complete.json",
        "hf_nvme.json",
        "nvme_tune.json",
        "old_pipeline.json",
        "deprecated.json",
        "zero2_offload.json",
        "twin_flow.json",
    ] {
        let imported = load(name);
        let lists = [&imported.mapped, &imported.ignored, &imported.undecided];
        let mut keys: Vec<&str> =
            lists.iter().flat_map(|l| l.iter()).map(|i| i.key.as_str()).filter(|k| !k.is_empty()).collect();
        let all = keys.len();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), all, "{name}: a key twice");
        assert_eq!(all, count(&serde_json::from_str(&read(name)).unwrap(), ""), "{name}: {imported}");
    }
}

#[test]
fn the_complete_file() {
    let i = load("complete.json");
    assert_eq!(i.policy.params.tier, ParamsTier::Nvme);
    assert_eq!(i.policy.optimizer.tier, OptimizerTier::Nvme);
    assert_eq!(i.policy.nvme.paths, [std::path::PathBuf::from("/local_nvme")]);
    assert_eq!((i.policy.budget.hbm, i.policy.prefetch.window), (Auto::Auto, Auto::Auto), "DeepSpeed's defaults");
    notes(&i.ignored, "zero_optimization.stage3_max_live_parameters", "DeepSpeed's default");
    notes(&i.ignored, "zero_optimization.stage3_prefetch_bucket_size", "DeepSpeed's default");
    assert_eq!(i.policy.nvme.block, ByteCount::mib(1));
    assert_eq!(i.policy.nvme.queue_depth, Auto::Set(8));
    assert_eq!(leaves(&i.undecided), ["max_in_cpu"]);
    notes(&i.undecided, "zero_optimization.offload_param.max_in_cpu", "1000000000 elements (1.9 GiB)");
    notes(&i.ignored, "zero_optimization.offload_param.buffer_size", "100000000 elements, 190.8 MiB");
    notes(&i.ignored, "zero_optimization.sub_group_size", "15.0 GiB of states");
    notes(&i.ignored, "zero_optimization.stage3_model_persistence_threshold", "no limit");
    notes(&i.ignored, "scheduler", "belongs to your training loop");
    assert_eq!(item(&i.mapped, "zero_optimization.offload_param.device").line, Some(9));
    notes(&i.mapped, "bf16.enabled", "params.dtype = \"bfloat16\"");
    assert_eq!(i.policy.params.dtype, ParamsDtype::Bfloat16);
    i.policy.check_consistent().unwrap();
}

#[test]
fn hugging_face_puts_aio_in_the_wrong_place() {
    let i = load("hf_nvme.json");
    assert_eq!(i.policy.nvme.block, ByteCount::kib(256));
    assert_eq!(i.policy.nvme.queue_depth, Auto::Set(32));
    notes(&i.mapped, "zero_optimization.aio.block_size", "DeepSpeed refuses aio inside zero_optimization");
    notes(&i.mapped, "zero_optimization.aio.thread_count", "DeepSpeed does not read this name");
    assert_eq!(i.policy.prefetch.window, Auto::Auto);
    notes(&i.mapped, "zero_optimization.stage3_prefetch_bucket_size", "0.9 * hidden_size^2");
    assert_eq!(leaves(&i.undecided), ["enabled", "max_in_cpu"]);
    notes(&i.undecided, "bf16.enabled", "set params.dtype = \"bfloat16\"");
}

#[test]
fn auto_sizes_follow_the_hidden_size() {
    for (hidden, elements) in [(4096, 15_099_494), (2048, 3_774_873)] {
        let i = import::deepspeed(&read("hf_nvme.json"), "x.json", Hints { hidden_size: Some(hidden) }).unwrap();
        assert_eq!(i.policy.prefetch.window, Auto::Set(ByteCount(2 * elements)), "{hidden}");
    }
}

#[test]
fn the_tuners_output() {
    let i = load("nvme_tune.json");
    assert_eq!(i.policy.nvme.queue_depth, Auto::Set(256));
    notes(&i.mapped, "aio.num_threads", "meant as intra_op_parallelism");
    notes(&i.ignored, "aio.single_submit", "written as a string");
    notes(&i.ignored, "aio.overlap_events", "written as a string");
    notes(&i.undecided, "", "offloads nothing");
}

#[test]
fn derived_keys_and_two_paths() {
    let i = load("old_pipeline.json");
    assert_eq!(i.policy.nvme.paths.len(), 2);
    assert_eq!(i.policy.nvme.queue_depth, Auto::Set(64));
    notes(&i.ignored, "zero_optimization.offload_optimizer.pipeline", "derives it");
    notes(&i.mapped, "zero_optimization.offload_param.nvme_path", "number 2");
    notes(&i.ignored, "zero_optimization.offload_param.max_in_cpu", "0");
    assert!(i.undecided.is_empty(), "{i}");
}

#[test]
fn deprecated_keys() {
    let i = load("deprecated.json");
    assert_eq!((i.policy.params.tier, i.policy.optimizer.tier), (ParamsTier::Host, OptimizerTier::Host));
    notes(&i.mapped, "zero_optimization.cpu_offload", "deprecated");
    assert_eq!(i.policy.budget.hbm, Auto::Auto);
    notes(&i.ignored, "zero_optimization.stage3_max_live_parameters", "no limit");
    notes(&i.ignored, "_comment", "a comment");
    assert_eq!(leaves(&i.undecided), ["stage3_prefetch_bucket_size"]);
}

#[test]
fn stage_two_and_full_precision() {
    let i = load("zero2_offload.json");
    assert_eq!(i.policy.optimizer.tier, OptimizerTier::Host);
    notes(&i.undecided, "zero_optimization.stage3_max_live_parameters", "\"1GB\" would hold parameters within as much");
    notes(&i.undecided, "zero_optimization.stage3_max_live_parameters", "elements of 4 bytes");
    notes(&i.ignored, "zero_optimization.offload_optimizer.nvme_path", "not nvme");
    notes(&i.undecided, "zero_optimization.stage", "stage 2 keeps all parameters on the GPU");
    notes(&i.undecided, "zero_optimization.offload_optimizer.pin_memory", "always page-locked");
    notes(&i.undecided, "activation_checkpointing", "set activations.micro_batch too");
    assert!(i.policy.nvme.paths.is_empty());
}

#[test]
fn parameters_that_a_low_stage_leaves_on_the_gpu_are_spoken_of() {
    let note = |zero: &str| {
        let text = format!("{{\"zero_optimization\": {{{zero}}}}}");
        let i = import::deepspeed(&text, "ds.json", Hints::default()).unwrap();
        (item(&i.undecided, "zero_optimization.stage").note.clone(), i.policy.params.tier)
    };
    for (device, tier) in [("cpu", ParamsTier::Host), ("nvme", ParamsTier::Nvme)] {
        let (note, set) = note(&format!("\"stage\": 1, \"offload_param\": {{\"device\": \"{device}\"}}"));
        assert!(note.contains("stage 1 keeps all parameters on the GPU; offload_param has no effect there"), "{note}");
        assert_eq!(set, tier);
    }
    let (said, _) = note("\"stage\": 0, \"offload_optimizer\": {\"device\": \"cpu\"}");
    assert!(said.contains("states too; offload_* have no effect there"), "{said}");
    for none in ["\"stage\": 2, \"offload_param\": {\"device\": \"none\"}", "\"stage\": 2"] {
        let (note, set) = note(none);
        assert!(!note.contains("offload_param") && note.contains("paged through budget.hbm"), "{note}");
        assert_eq!(set, ParamsTier::Auto);
    }
}

#[test]
fn what_is_computed_differently_needs_a_decision() {
    let i = load("twin_flow.json");
    for (key, part) in [
        ("optimizer", "'Lion' has no kernel"),
        ("data_types.grad_accum_dtype", "sums in fp32"),
        ("zero_optimization.offload_optimizer.ratio", "on the GPU"),
        ("zero_optimization.offload_optimizer.super_offload", "no such mode"),
        ("zero_optimization.offload_optimizer.cpuadam_cores_perc", "0.9 of the CPUs"),
        ("zero_optimization.leaf_module.classes", "not of classes"),
    ] {
        notes(&i.undecided, key, part);
    }
    assert_eq!(i.undecided.len(), 6, "{i}");
    let units: Vec<&str> = i.policy.units.patterns.iter().map(|p| p.as_str()).collect();
    assert_eq!(units, ["model.layers.0.moe", "*.mlp"]);
}

#[test]
fn slips_are_found() {
    let i = load("slips.json");
    for (key, part) in [
        ("zero_optimisation", "did you mean 'zero_optimization'?"),
        ("offload_param", "inside zero_optimization only"),
        ("zero_optimization.offload_param.device", "did you mean 'nvme'?"),
        ("zero_optimization.offload_param.pin_memroy", "did you mean 'pin_memory'?"),
        ("zero_optimization.stage3_max_live_parameters", "not a whole number"),
        ("zero_optimization.overlap_com", "did you mean 'overlap_comm'?"),
        ("aio.que_depth", "did you mean 'queue_depth'?"),
        ("aio.io_parallel", "contradicts aio.num_threads"),
        ("", "no nvme_path can be used"),
    ] {
        notes(&i.undecided, key, part);
    }
    assert_eq!(i.policy.nvme.block, ByteCount::kib(512));
    assert_eq!(i.policy.nvme.queue_depth, Auto::Set(32));
    assert!(i.policy.check_consistent().is_err());
}

#[test]
fn broken_files_show_line_and_caret() {
    let error = import::any(&read("missing_comma.json"), "missing_comma.json", Hints::default()).unwrap_err();
    assert_eq!(error.code(), Code::PolicySyntax);
    let text = error.to_string();
    assert!(text.contains("missing_comma.json:6:32: ',' or '}' is missing after this"), "{text}");
    assert!(text.ends_with('^') && text.contains("\"/local_nvme\"\n"), "{text}");
    let error = import::any(&read("accelerate_broken.yaml"), "a.yaml", Hints::default()).unwrap_err();
    assert_eq!(error.code(), Code::PolicySyntax);
    assert!(error.to_string().contains("a.yaml:3:") && error.to_string().ends_with('^'), "{error}");
    let error = import::any("- a\n- b\n", "a.yaml", Hints::default()).unwrap_err();
    assert_eq!(error.code(), Code::PolicyValue);
    assert_eq!(import::any("[]", "a.json", Hints::default()).unwrap_err().code(), Code::PolicyValue);
    assert_eq!(import::any("", "a.json", Hints::default()).unwrap_err().code(), Code::PolicySyntax);
}

#[test]
fn accelerate() {
    let i = load("accelerate_nvme.yaml");
    assert_eq!((i.policy.params.tier, i.policy.optimizer.tier), (ParamsTier::Host, OptimizerTier::Nvme));
    assert_eq!(i.policy.nvme.paths, [std::path::PathBuf::from("/nvme")]);
    let device = item(&i.mapped, "deepspeed_config.offload_optimizer_device");
    assert_eq!(device.line, Some(7));
    notes(&i.ignored, "deepspeed_config.offload_param_nvme_path", "not nvme");
    notes(&i.mapped, "mixed_precision", "params.dtype = \"bfloat16\"");
    assert!(i.undecided.is_empty(), "{i}");
    assert_eq!(i.mapped.len() + i.ignored.len(), 20, "{i}");
    assert_eq!(load("accelerate_file.yaml").refers_to.as_deref(), Some("hf_nvme.json"));
    let fsdp = import::any("fsdp_config:\n  fsdp_offload_params: true\n", "f.yaml", Hints::default()).unwrap();
    assert_eq!(fsdp.policy.params.tier, ParamsTier::Host);
}

#[test]
fn lightning() {
    let i = load("lightning.py");
    assert_eq!((i.policy.params.tier, i.policy.optimizer.tier), (ParamsTier::Host, OptimizerTier::Nvme));
    assert_eq!(i.policy.nvme.paths, [std::path::PathBuf::from("/scratch/nvme")]);
    assert_eq!(i.policy.nvme.queue_depth, Auto::Set(16));
    notes(&i.mapped, "offload_optimizer_device", "optimizer.tier");
    notes(&i.undecided, "pin_memory", "always page-locked");
    assert_eq!(i.undecided.len(), 1, "{i}");
    assert_eq!(i.mapped.len() + i.ignored.len() + i.undecided.len(), 19, "{i}");

    let i = load("lightning_kwargs.json");
    assert_eq!((i.policy.params.tier, i.policy.optimizer.tier), (ParamsTier::Auto, OptimizerTier::Host));
    notes(&i.undecided, "queue_depht", "did you mean 'queue_depth'?");
    notes(&i.ignored, "offload_params_device", "offload_parameters is off");

    let i = load("lightning_trainer.py");
    assert_eq!((i.policy.params.tier, i.policy.optimizer.tier), (ParamsTier::Nvme, OptimizerTier::Nvme));
    assert_eq!(i.policy.nvme.paths, [std::path::PathBuf::from("/local_nvme")]);

    let config =
        "DeepSpeedStrategy(stage=2, config={'zero_optimization': {'stage': 3, 'offload_param': {'device': 'cpu'}}})";
    let i = import::any(config, "x.py", Hints::default()).unwrap();
    assert_eq!(i.policy.params.tier, ParamsTier::Host);
    notes(&i.ignored, "stage", "overrides");
    assert_eq!(i.ignored.len() + i.mapped.len() + i.undecided.len(), 3, "{i}");
    let i = import::any("DeepSpeedStrategy(config='ds.json')", "x.py", Hints::default()).unwrap();
    assert_eq!(i.refers_to.as_deref(), Some("ds.json"));
    let i = import::any("\"ddp\"", "x.py", Hints::default()).unwrap();
    notes(&i.ignored, "strategy", "about several GPUs");
    let i = import::any("\"deepspeed_stage_4\"", "x.py", Hints::default()).unwrap();
    notes(&i.undecided, "strategy", "is not a DeepSpeed strategy");
}

#[test]
fn a_line_feed_in_a_key_does_not_leave_the_comment() {
    let text = r#"{"a\nversion = 2": 1, "optimizer": {"type": "x\nversion = 3"}}"#;
    let i = import::deepspeed(text, "x\ny = 1.json", Hints::default()).unwrap();
    assert_eq!(Policy::from_toml_str(&i.to_string(), "x").unwrap(), i.policy, "{i}");
}

/// A JSON value for a key of the offload sections, right or wrong.
fn any_value() -> impl Strategy<Value = serde_json::Value> {
    prop_oneof![
        proptest::sample::select(vec![
            "auto", "nvme", "cpu", "none", "true", "false", "/a", "8M", "1e9", "", "~", "\n"
        ])
        .prop_map(|s| serde_json::json!(s)),
        any::<i64>().prop_map(|n| serde_json::json!(n)),
        any::<f64>().prop_map(|x| serde_json::json!(x)),
        any::<bool>().prop_map(|b| serde_json::json!(b)),
        Just(serde_json::json!(null)),
        Just(serde_json::json!({})),
        Just(serde_json::json!({"names": ["a*"], "device": "nvme"})),
        Just(serde_json::json!([1, "a"])),
    ]
}

proptest! {
    #[test]
    fn any_values_give_a_policy_that_reads_back(values in proptest::collection::vec(any_value(), 14)) {
        let mut v = values.into_iter();
        let mut next = || v.next().unwrap();
        let json = serde_json::json!({
            "zero_optimization": {
                "stage": next(), "leaf_module": next(),
                "offload_param": {"device": next(), "nvme_path": next(), "max_in_cpu": next(), "pin_memory": next()},
                "offload_optimizer": {"device": next(), "ratio": next()},
                "stage3_prefetch_bucket_size": next(), "stage3_max_live_parameters": next(), "cpu_offload": next(),
            },
            "aio": {"block_size": next(), "queue_depth": next(), "num_threads": next()},
        });
        let text = json.to_string();
        let imported = import::deepspeed(&text, "x.json", Hints { hidden_size: Some(u64::MAX) }).unwrap();
        let printed = imported.to_string();
        prop_assert_eq!(Policy::from_toml_str(&printed, "x").unwrap(), imported.policy.clone(), "{}", printed);
    }
}
