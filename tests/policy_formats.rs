//! Imports of whole files as people have them: every format that is known, and one that is not.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};

use funicular::policy::{
    Auto, Policy,
    cli::{Output, import},
    import::{Hints, any},
};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/imports").join(name)
}

fn load(name: &str) -> (Policy, Output) {
    let output = import(&data(name), Hints::default());
    assert_eq!(output.code, 0, "{name}: {}", output.err);
    (Policy::from_toml_str(&output.out, name).unwrap(), output)
}

fn text(text: &str, name: &str) -> String {
    any(text, name, Hints::default()).unwrap().to_string()
}

/// File; homes of parameters and states; number format; path.
const FILES: &[(&str, &str, &str, &str, &[&str])] = &[
    ("launcher.json", "host", "nvme", "bfloat16", &["/scratch/nvme"]),
    ("launcher_beside_zero.json", "host", "host", "keep", &[]),
    ("launcher_unread.yaml", "host", "host", "keep", &[]),
    ("launcher_stage2.yaml", "host", "host", "float16", &[]),
    ("launcher_file.yaml", "host", "host", "float16", &[]),
    ("launcher_fsdp.yaml", "host", "host", "keep", &[]),
    ("plugin.toml", "host", "nvme", "bfloat16", &["/mnt/nvme"]),
    ("comments.json", "nvme", "nvme", "bfloat16", &["/mnt/nvme0", "/mnt/nvme1"]),
    ("two_formats.json", "nvme", "nvme", "keep", &["/nvme"]),
    ("wrapped.json", "host", "host", "bfloat16", &[]),
    ("documents.yaml", "host", "host", "bfloat16", &[]),
    ("axolotl/full.yml", "host", "host", "bfloat16", &[]),
    ("axolotl/sharded.yaml", "host", "host", "keep", &[]),
    ("factory/examples/train_full/sft.yaml", "host", "nvme", "bfloat16", &["/local_nvme"]),
    ("lightning_cli.yaml", "nvme", "host", "bfloat16", &["/scratch"]),
    ("hydra.yaml", "auto", "host", "bfloat16", &[]),
    ("fabric.yaml", "host", "host", "float16", &[]),
    ("script_dict.py", "auto", "host", "float16", &[]),
    ("script_names.py", "host", "nvme", "bfloat16", &["/mnt/fast"]),
    ("script_arguments.py", "host", "host", "bfloat16", &[]),
    ("script_fully_shard.py", "host", "host", "keep", &[]),
    ("sections.yaml", "host", "nvme", "keep", &["/mnt/nvme0"]),
    ("short_name.json", "host", "host", "bfloat16", &[]),
    ("sharded_file.json", "host", "host", "keep", &[]),
    ("listed.json", "host", "auto", "keep", &[]),
];

#[test]
fn every_file_has_the_homes_paths_and_formats_that_it_means() {
    for (name, params, optimizer, format, paths) in FILES {
        let (policy, output) = load(name);
        let found = (policy.params.tier.word(), policy.optimizer.tier.word(), policy.params.dtype.word());
        assert_eq!(found, (*params, *optimizer, *format), "{name}: {}", output.out);
        assert_eq!(policy.nvme.paths, paths.iter().map(PathBuf::from).collect::<Vec<_>>(), "{name}");
        assert_eq!(policy.budget.hbm, Auto::Auto, "{name}: no file of another system is a budget of the GPU's memory");
        assert!(!output.out.contains("offloads nothing"), "{name}: {}", output.out);
        policy.check_consistent().unwrap();
    }
}

/// Lines of a file that say something by themselves: those with a value, in files where each has its own.
fn lines_with_values(name: &str) -> Vec<usize> {
    let text = std::fs::read_to_string(data(name)).unwrap();
    let says = |line: &str| {
        let line = line.split(" #").next().unwrap_or_default().split("  //").next().unwrap_or_default().trim();
        let value = line.split_once(": ").map_or("", |(_, value)| value.trim());
        !line.starts_with(['#', '/']) && !value.is_empty() && !value.starts_with(['&', '*']) && value != "{"
    };
    text.lines().enumerate().filter(|(_, line)| says(line)).map(|(at, _)| at + 1).collect()
}

#[test]
fn every_line_is_accounted_for() {
    for (name, ..) in FILES.iter().filter(|(name, ..)| !name.ends_with(".py") && *name != "documents.yaml") {
        let (_, output) = load(name);
        let own = match output.err.contains(" refers to ") {
            true => format!("{} line ", data(name).display()),
            false => "#   line ".to_owned(),
        };
        let lines = lines_with_values(name);
        assert!(lines.len() > 2 || name.ends_with(".toml"), "{name}");
        for line in lines {
            assert!(output.out.contains(&format!("{own}{line}: ")), "{name}: no line {line} in {}", output.out);
        }
    }
}

#[test]
fn what_needs_a_decision_is_asked() {
    for (name, parts) in [
        ("launcher_stage2.yaml", &["num_processes = 8: start as many here, on one host, by torchrun"][..]),
        (
            "launcher_beside_zero.json",
            &["zero_optimization.offload_param.device = \"nvme\": contradicts deepspeed_config"],
        ),
        ("comments.json", &["budget.hbm = \"600MB\" would hold parameters within as much"]),
        (
            "two_formats.json",
            &[
                "fp16.enabled = true: fp16 and bf16 are both on",
                "bf16.enabled = true: fp16 and bf16 are both on",
                "'LAMB' has no kernel",
                "compression_training = {...}: DeepSpeed does this by itself",
            ],
        ),
        ("documents.yaml", &["document 2 = {...}: another DeepSpeed configuration; document 1 was taken"]),
        ("axolotl/full.yml", &["optimizer = \"paged_adamw_8bit\": AdamW here keeps its states in fp32"]),
        ("fabric.yaml", &["trainer.devices = 2: start as many here"]),
        ("script_computed.py", &["is computed by the script", "what the file offloads cannot be told from it"]),
    ] {
        let (_, output) = load(name);
        let (_, decisions) = output.out.split_once("# needs a decision").unwrap();
        for part in parts {
            assert!(decisions.contains(part), "{name}: no {part:?} in {decisions}");
        }
    }
}

#[test]
fn a_precision_of_the_weights_converts_them_also_without_deepspeed() {
    let sharded =
        |precision: &str| text(&format!("strategy: fsdp_cpu_offload\nprecision: {precision}\n"), "train.yaml");
    for (precision, dtype) in [("bf16-true", "bfloat16"), ("16-true", "float16")] {
        let out = sharded(precision);
        assert!(out.contains(&format!("precision = \"{precision}\" -> params.dtype = \"{dtype}\"")), "{out}");
        assert!(out.contains(&format!("\ndtype = \"{dtype}\"\ntier = \"host\"")), "{out}");
    }
    for precision in ["bf16-mixed", "32-true"] {
        let out = sharded(precision);
        assert!(!out.contains("-> params.dtype") && !out.contains("\ndtype"), "{out}");
    }
    let script = "fabric = Fabric(strategy=FSDPStrategy(cpu_offload=True), precision='bf16-true')\n";
    assert!(text(script, "train.py").contains("params.dtype = \"bfloat16\""));
}

#[test]
fn a_batch_is_multiplied_once_for_each_process() {
    let batch = |text: &str| {
        text.lines()
            .filter_map(|line| {
                line.split_once("multiply ")?.1.split_once(" by ")?.1.split(' ').next()?.parse::<u64>().ok()
            })
            .product::<u64>()
    };
    let out = text("compute_environment: X\nnum_machines: 2\nnum_processes: 16\n", "a.yaml");
    assert!(out.contains("num_machines = 2: several hosts, and here a model trains on one"), "{out}");
    // accelerate counts the processes of all hosts, Lightning and torchrun those of one.
    assert_eq!(batch(&out), 16, "{out}");
    let out = text("strategy: deepspeed_stage_3_offload\ndevices: 8\nnum_nodes: 2\n", "b.yaml");
    assert_eq!(batch(&out), 16, "{out}");
    let out = text("deepspeed: zero3\nnproc_per_node: 4\nnnodes: 3\n", "c.yaml");
    assert_eq!(batch(&out), 12, "{out}");
    let one = text("compute_environment: X\nnum_machines: 1\nnum_processes: 2\n", "d.yaml");
    assert!(one.contains("num_machines = 1: one, as here"), "{one}");
}

#[test]
fn names_of_configurations_and_the_type_beside_them_are_read() {
    let swift = |name: &str, dtype: &str| text(&format!("deepspeed: {name}\ntorch_dtype: {dtype}\n"), "swift.yaml");
    for (word, dtype) in [("bfloat16", "bfloat16"), ("torch.float16", "float16")] {
        let out = swift("zero3_offload", word);
        assert!(out.contains(&format!("\ndtype = \"{dtype}\"\ntier = \"host\"")), "{out}");
    }
    assert!(!swift("zero3_offload", "float32").contains("dtype = \"float32\"\n"));
    assert!(swift("zero3", "auto").contains("which is not said here; set params.dtype"));
    // Without such a name it is how the script loads the model.
    let plain = text("fsdp: offload\ntorch_dtype: bfloat16\n", "plain.yaml");
    assert!(!plain.contains("-> params.dtype") && plain.contains("torch_dtype = \"bfloat16\": belongs"), "{plain}");
    let out = swift("zero3_offlod", "bfloat16");
    assert!(
        out.contains("deepspeed = \"zero3_offlod\": is no name of a configuration (did you mean 'zero3_offload'?)")
    );
    assert!(out.contains("what the file offloads cannot be told from it"), "{out}");
}

#[test]
fn what_another_program_puts_in_is_called_so() {
    // A policy that names no directory is not consistent, and the path is asked for.
    let (policy, output) = load("launcher_auto.yaml");
    assert!(policy.nvme.paths.is_empty(), "{}", output.out);
    for part in [
        "offload_optimizer.device = \"auto\": is what your launcher says, such as accelerate's own configuration; set optimizer.tier",
        "offload_param.nvme_path = \"auto\": is what your launcher says; set nvme.paths",
        "offload_optimizer_device = \"cpu\": the DeepSpeed file decides, except where it says \"auto\"",
    ] {
        assert!(output.out.contains(part), "no {part:?} in {}", output.out);
    }
    for (name, with, part) in [
        (
            "a.py",
            "ds = {'zero_optimization': {'offload_param': {'device': pick(1)}}}",
            "device = {...}: is computed by the script",
        ),
        (
            "a.py",
            "ds = {'zero_optimization': {'stage': 3}, 'bf16': {'enabled': ok()}}",
            "enabled = {...}: is computed by the script",
        ),
        (
            "a.py",
            "ds = json.load(f)\nds['zero_optimization']['stage'] = 3\n",
            "makes the rest of the configuration, which is not seen",
        ),
        (
            "a.json",
            r#"{"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "<DIR>"}}}"#,
            "nothing expands this path",
        ),
        (
            "a.json",
            r#"{"zero_optimization": {"offload_param": {"device": "{{ device }}"}}}"#,
            "is filled in by another program",
        ),
        ("a.json", r#"{"zero_optimization": {"offload_param": "$DEVICE"}}"#, "is filled in by another program"),
        (
            "a.json",
            r#"{"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}"#,
            "ZenFlow updates most parameters steps later",
        ),
        (
            "a.json",
            r#"{"zero_optimization": {"stage": 2}, "fp16": true}"#,
            "set params.dtype = \"float16\" if that is meant",
        ),
    ] {
        let out = text(with, name);
        let (_, decisions) = out.split_once("# needs a decision").unwrap();
        assert!(decisions.contains(part) && !out.contains(": a comment"), "{with}: {out}");
    }
}

#[test]
fn keys_of_other_programs_are_not_called_accelerates() {
    let (_, output) = load("sections.yaml");
    assert!(!output.out.contains("accelerate") && output.out.contains("needs a decision (0)"), "{}", output.out);
    let (_, output) = load("sharded_file.json");
    assert!(!output.out.contains("DeepSpeed") && output.out.contains("needs a decision (0)"), "{}", output.out);
}

#[test]
fn fsdp_is_told_of_each_block_and_of_the_model() {
    let (_, output) = load("script_fully_shard.py");
    assert!(output.out.contains("fully_shard = {...}: says the same as the one in line 6"), "{}", output.out);
    let out = text("fully_shard(b, offload_policy=CPUOffloadPolicy())\nfully_shard(m)\n", "a.py");
    assert!(out.contains("offloads nothing, unlike the one in line 1, which was taken for the whole model"), "{out}");
    let out = text("model = FSDP(model, cpu_offload=CPUOffload(offload_params=True))\n", "a.py");
    assert!(out.contains("needs a decision (0)") && out.contains("argument 1 = model: about sharding"), "{out}");
    let two = "trainer:\n  strategy: deepspeed_stage_2_offload\ndeepspeed: {zero_optimization: {offload_param: {device: cpu}}}\n";
    assert!(
        text(two, "a.yaml").contains("trainer = {...}: another Lightning configuration: put it into a file of its own")
    );
}

#[test]
fn sizes_that_are_deepspeeds_defaults_pin_nothing() {
    let (policy, output) = load("launcher_beside_zero.json");
    assert_eq!(policy.prefetch.window, Auto::Auto, "{}", output.out);
    let out = text(
        r#"{"zero_optimization": {"stage3_max_live_parameters": 1e9, "stage3_prefetch_bucket_size": 5e7}}"#,
        "a.json",
    );
    assert_eq!(Policy::from_toml_str(&out, "a").unwrap(), Policy::default(), "{out}");
    assert_eq!(out.matches("DeepSpeed's default").count(), 2, "{out}");
}

#[test]
fn a_format_that_is_not_known_is_called_so() {
    let output = import(&data("recipe.yaml"), Hints::default());
    assert_eq!((output.code, output.out.as_str()), (1, ""));
    for part in ["FN-E507", "not a configuration of a format that import knows", "fsdp_cpu_offload (line 4)", "axolotl"]
    {
        assert!(output.err.contains(part), "no {part:?} in {}", output.err);
    }
    let error = any("ds = json.load(open('ds.json'))\n", "a.py", Hints::default()).unwrap_err().to_string();
    assert!(error.contains("knows. It names ds.json: if that has the settings, import it."), "{error}");
    let output = import(&data("run.sh"), Hints::default());
    for part in ["It names configs/zero3.json: if that has", "It does speak of offloading: line 3."] {
        assert!(output.err.contains(part), "no {part:?} in {}", output.err);
    }
    for (name, text, part) in [
        ("a.yaml", "# nothing\n\n", "a.yaml: there is nothing in it. Give the file that has the settings."),
        ("a.py", "o = CPUOffloadOptimizer(ps, AdamW)\n", "It does speak of offloading: CPUOffloadOptimizer (line 1)."),
        ("a.ipynb", r#"{"cells": [{"source": ["cpu_offload"]}]}"#, "offloading: cells[0].source[0] (line 1)."),
        (
            "a.toml",
            "[params]\ntier = 'host'\n",
            "is a policy already. There is nothing to import: `funicular policy check a.toml`",
        ),
        (
            "a.json",
            "[1]",
            "and this is a list without one\n    1 | [1]\n      | ^^^\nGive the file that has the settings.",
        ),
    ] {
        let error = any(text, name, Hints::default()).unwrap_err().to_string();
        assert!(error.contains(part), "no {part:?} in {error}");
    }
    for (name, text) in [
        ("a.json", "{}"),
        ("a.json", r#"{"name": "x", "version": 3}"#),
        ("a.yaml", "services: {web: {image: nginx}}\n"),
        ("a.yaml", ""),
        ("a.toml", "[package]\nname = 'x'\n"),
        ("a.py", "import os\nprint('zero_optimization')\n"),
        ("a.sh", "deepspeed train.py --deepspeed ds.json --offload\n"),
        ("a", "Dear reader,\n\nstage: 3 is not for us.\n"),
    ] {
        let error = any(text, name, Hints::default()).unwrap_err();
        assert!(["FN-E507", "FN-E503"].contains(&error.code().as_str()), "{name} {text}: {error}");
    }
}

#[test]
fn files_that_are_named_are_found_or_told() {
    let output = import(&data("missing_file.yaml"), Hints::default());
    assert_eq!((output.code, output.out.as_str()), (2, ""));
    assert!(output.err.starts_with("FN-E504") && output.err.contains("not/there.json"), "{}", output.err);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.yaml");
    std::fs::write(&path, "model_name_or_path: a\noutput_dir: b\ndeepspeed: secret.json\n").unwrap();
    std::fs::write(dir.path().join("secret.json"), r#"{"password": "hunter2"}"#).unwrap();
    let output = import(&path, Hints::default());
    assert!(output.code == 1 && output.err.starts_with("FN-E507"), "{}", output.err);
    assert!(!output.err.contains("hunter2") && !output.err.contains("password"), "{}", output.err);
    assert_eq!(import(&dir.path().join("none.json"), Hints::default()).code, 2);
    let wide: Vec<u8> = "{}".encode_utf16().flat_map(u16::to_le_bytes).collect();
    std::fs::write(&path, [&[0xff, 0xfe], &wide[..]].concat()).unwrap();
    let output = import(&path, Hints::default());
    assert!(
        output.code == 2 && output.err.contains("Save it as UTF-8, as `iconv -f UTF-16 -t UTF-8`"),
        "{}",
        output.err
    );
}

#[test]
fn nothing_is_offloaded_only_where_the_file_says_so() {
    for (name, with) in [
        ("a.yaml", "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nmixed_precision: bf16\n"),
        ("a.yaml", "trainer: {strategy: ddp, devices: 1}\n"),
        ("a.json", r#"{"zero_optimization": {"stage": 2}}"#),
        ("a.yaml", "base_model: x\noutput_dir: y\nlearning_rate: 1e-5\nbf16: true\n"),
    ] {
        assert!(text(with, name).contains("offloads nothing by itself"), "{with}: {}", text(with, name));
    }
    for (name, with) in [
        ("a.yaml", "base_model: x\noutput_dir: y\nlearning_rate: 1e-5\ncpu_offload: true\n"),
        ("a.yaml", "trainer: {strategy: ddp, devices: 1}\nmodel: {offload_to_cpu: true}\n"),
        ("a.json", r#"{"zero_optimization": {"stage": 3, "offload_param": {"pin_memory": true}}}"#),
        ("a.json", r#"{"zero_optimization": {"stage": 3, "offload_params": {"device": "cpu"}}}"#),
        ("a.json", r#"{"zero_optimization": {"stage": 3, "offload_param": {"device": "dsk"}}}"#),
        ("a.py", "ds = {'zero_optimization': {'stage': 3, 'offload_param': make()}}\n"),
        ("a.yaml", "output_dir: x\ndeepspeed: true\n"),
    ] {
        let out = text(with, name);
        assert!(!out.contains("offloads nothing") && out.contains("cannot be told from it"), "{with}: {out}");
    }
}

#[test]
fn other_spellings_mean_the_same() {
    for (name, with, params, optimizer) in [
        ("a.yaml", "fsdp: full_shard auto_wrap offload\noutput_dir: x\n", "host", "host"),
        ("a.yaml", "fsdp: [full_shard, offload]\noutput_dir: x\n", "host", "host"),
        ("a.py", "s = FSDPStrategy(cpu_offload=CPUOffload(offload_params=True))\n", "host", "host"),
        ("a.py", "m = FSDP(model, cpu_offload=CPUOffload(offload_params=True))\n", "host", "host"),
        (
            "a.py",
            "p = DeepSpeedPlugin(zero_stage=2, offload_optimizer_device='cpu')\nAccelerator(deepspeed_plugin=p)\n",
            "auto",
            "host",
        ),
        ("a.py", "p = DeepSpeedPlugin(zero_stage=3, offload_param_device='cpu')\n", "host", "auto"),
        (
            "a.py",
            "e, *_ = deepspeed.initialize(model=m, config={'zero_optimization': {'offload_param': {'device': 'nvme', 'nvme_path': '/a'}}})\n",
            "nvme",
            "auto",
        ),
        ("a.py", "t = pl.Trainer(strategy='deepspeed_stage_3_offload', precision=16)\n", "host", "host"),
        (
            "a.json",
            r#"{"training": {"deepspeed": {"zero_stage": "ZERO_3", "offload_optimizer": {"device": "cpu"}}}}"#,
            "auto",
            "host",
        ),
        (
            "a.json",
            r#"{"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}"#,
            "host",
            "host",
        ),
        ("conf", "{\"zero_optimization\": {\"offload_param\": {\"device\": \"cpu\"}}} // a", "host", "auto"),
    ] {
        let policy = Policy::from_toml_str(&text(with, name), name).unwrap();
        let found = (policy.params.tier.word(), policy.optimizer.tier.word());
        assert_eq!(found, (params, optimizer), "{with}: {}", text(with, name));
    }
}

#[test]
fn aliases_do_not_grow_without_end() {
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..12 {
        let items = vec![format!("*a{}", level - 1); 10].join(", ");
        bomb += &format!("a{level}: &a{level} [{items}]\n");
    }
    let error = any(&bomb, "bomb.yaml", Hints::default()).unwrap_err().to_string();
    assert!(error.starts_with("FN-E501 bomb.yaml:") && error.contains("aliases stand for too much"), "{error}");
    let mut script = "a0 = [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n".to_owned();
    for level in 1..12 {
        script += &format!("a{level} = [{}]\n", vec![format!("a{}", level - 1); 10].join(", "));
    }
    script += "ds = {'zero_optimization': {'offload_param': {'device': 'cpu'}}, 'x': a11}\n";
    assert!(text(&script, "bomb.py").contains("params.tier = \"host\""));
}

#[test]
fn an_object_that_offloads_is_read_however_it_is_written() {
    let object = "torch.distributed.fsdp.CPUOffload";
    for (inner, tier, said) in [
        (format!("{{class_path: {object}, init_args: {{offload_params: true}}}}"), "host", "-> params.tier"),
        (format!("{{class_path: {object}, init_args: {{offload_params: false}}}}"), "auto", "offloads nothing"),
        (format!("{{class_path: {object}}}"), "auto", "offloads nothing"),
        (format!("{{_target_: {object}, offload_params: true}}"), "host", "-> params.tier"),
        ("{class_path: my.Policy, init_args: {all: true}}".to_owned(), "auto", "cannot be told from it"),
        ("{offload: true}".to_owned(), "auto", "cannot be told from it"),
    ] {
        let file =
            format!("trainer:\n  strategy:\n    class_path: FSDPStrategy\n    init_args: {{cpu_offload: {inner}}}\n");
        let found = any(&file, "a.yaml", Hints::default()).unwrap();
        assert_eq!((found.policy.params.tier.word(), found.policy.optimizer.tier.word()), (tier, tier), "{found}");
        assert!(found.to_string().contains(said), "{found}");
    }
}

#[test]
fn a_precision_that_stands_elsewhere_is_said_to_be_so() {
    let file = "trainer:\n  strategy: deepspeed_stage_3_offload\n  precision: ${half}\nhalf: bf16-true\n";
    let found = text(file, "a.yaml");
    assert!(found.contains("trainer.precision = \"${half}\": is filled in by another program"), "{found}");
    let file = file.replace("${half}", "64-true");
    assert!(text(&file, "a.yaml").contains("is none of 32-true, 16-true, 16-mixed, bf16-true, bf16-mixed"));
}
