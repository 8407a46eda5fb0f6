//! Imports of Python scripts that change a configuration after they have assigned it.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use funicular::policy::{
    Policy,
    cli::import,
    import::{Hints, any},
};

/// `cfg` with the optimizer's states on the host and bfloat16.
const CFG: &str =
    "cfg = {'zero_optimization': {'stage': 3, 'offload_optimizer': {'device': 'cpu'}}, 'bf16': {'enabled': True}}\n";

/// What a script that begins with [`CFG`] gives: homes of parameters and states, and the lines that need a decision.
fn told(after: &str) -> (String, String, Vec<usize>) {
    let found = any(&format!("{CFG}{after}"), "a.py", Hints::default()).unwrap();
    let Policy { params, optimizer, .. } = &found.policy;
    let lines = found.undecided.iter().filter_map(|item| item.line).collect();
    (params.tier.word().to_owned(), optimizer.tier.word().to_owned(), lines)
}

#[test]
fn plain_edits_are_applied() {
    for (after, params, optimizer) in [
        ("cfg['zero_optimization'].pop('offload_optimizer')\n", "auto", "auto"),
        ("del cfg['zero_optimization']['offload_optimizer']\n", "auto", "auto"),
        ("cfg['zero_optimization'].update({'offload_param': {'device': 'cpu'}})\n", "host", "host"),
        ("cfg['zero_optimization'].update(offload_param=dict(device='cpu'))\n", "host", "host"),
        ("cfg.update({'zero_optimization': {'stage': 3, 'offload_param': {'device': 'cpu'}}})\n", "host", "auto"),
        ("cfg['zero_optimization'] |= {'offload_param': {'device': 'cpu'}}\n", "host", "host"),
        ("cfg['zero_optimization'].setdefault('offload_param', {'device': 'cpu'})\n", "host", "host"),
        ("cfg['zero_optimization'].setdefault('offload_optimizer', {'device': 'none'})\n", "auto", "host"),
        ("zero = cfg['zero_optimization']\nzero['offload_param'] = {'device': 'cpu'}\n", "host", "host"),
        ("x = 1; cfg['zero_optimization']['offload_param'] = {'device': 'cpu'}\n", "host", "host"),
        (
            "if __name__ == '__main__':\n    cfg['zero_optimization']['offload_param'] = {'device': 'cpu'}\n",
            "host",
            "host",
        ),
    ] {
        assert_eq!(told(after), (params.to_owned(), optimizer.to_owned(), Vec::new()), "{after}");
    }
}

#[test]
fn what_is_not_followed_needs_a_decision() {
    for after in [
        "cfg['zero_optimization'].pop(name)\n",
        "cfg['zero_optimization'].update(extra)\n",
        "cfg.update({'zero_optimization': other})\n",
        "cfg.update(**more)\n",
        "cfg['zero_optimization'] = other()\n",
        "cfg[key]['offload_param'] = {'device': 'cpu'}\n",
        "cfg['zero_optimization']['offload_param'], x = {'device': 'cpu'}, 2\n",
        "cfg['zero_optimization'] += 1\n",
        "cfg['zero_optimization']['offload_optimizer']['device'] += 'x'\n",
        "cfg['zero_optimization']['offload_optimizer']['device'], x = 'nvme', 2\n",
        "other['x'] = patch(cfg)\n",
        "cfg.clear()\n",
        "patch(cfg)\n",
        "patch(cfg['zero_optimization'])\n",
        "other = dict(cfg, gradient_clipping=1.0)\n",
        "if (other := cfg):\n    pass\n",
        "for section in cfg.values():\n    section['device'] = 'nvme'\n",
    ] {
        let (params, optimizer, lines) = told(after);
        assert_eq!((params.as_str(), optimizer.as_str(), &lines[..]), ("auto", "host", &[2][..]), "{after}");
    }
    let (.., lines) = told("zero = cfg.get('zero_optimization')\nzero['offload_param'] = {'device': 'cpu'}\n");
    assert_eq!(lines, [2, 3]);
    let (.., lines) = told("all = [cfg]\nall[0]['zero_optimization']['offload_param'] = {'device': 'cpu'}\n");
    assert_eq!(lines, [3]);
}

#[test]
fn what_only_reads_needs_none() {
    let after = "print(cfg)\nlr = cfg['bf16']['enabled']\nif cfg['zero_optimization']['stage'] == 3:\n    json.dump(cfg, f)\n\
        text = f'{cfg}'\n# cfg.pop('bf16')\nengine, *_ = deepspeed.initialize(model=m, config=cfg)\nmodel.train()\n";
    assert_eq!(told(after).2, [0_usize; 0]);
}

#[test]
fn what_stands_under_a_condition_is_not_applied() {
    for head in ["if x:", "for x in y:", "while x:", "try:", "if x:\n    pass\nelse:"] {
        for edit in [
            "cfg['zero_optimization']['offload_param'] = {'device': 'cpu'}",
            "cfg['zero_optimization'].pop('offload_optimizer')",
            "del cfg['zero_optimization']",
        ] {
            let at = 2 + head.lines().count();
            let (params, optimizer, lines) = told(&format!("{head}\n    {edit}\n"));
            assert_eq!((params.as_str(), optimizer.as_str(), lines), ("auto", "host", vec![at]), "{head} {edit}");
        }
    }
    assert_eq!(told("if x: cfg['zero_optimization']['offload_optimizer']['device'] = 'nvme'\n").2, [2]);
    // A name that is given a value under a condition is not followed.
    let after = "if x:\n    to = 'cpu'\ncfg['zero_optimization']['offload_param'] = {'device': to}\n";
    assert_eq!(told(after).0, "auto");
}

/// A function that returns a configuration.
const GET: &str =
    "def get():\n    c = {'zero_optimization': {'stage': 3, 'offload_optimizer': {'device': 'cpu'}}}\n    return c\n";

#[test]
fn what_a_function_returns_is_followed() {
    let literal = GET.replace("c = ", "return ").replace("    return c\n", "");
    for get in [GET, &literal] {
        for (after, params) in [
            ("deepspeed.initialize(config=get())\n", "auto"),
            (
                "ds = get()\nds['zero_optimization']['offload_param'] = {'device': 'cpu'}\ndeepspeed.initialize(config=ds)\n",
                "host",
            ),
        ] {
            let found = any(&format!("{get}{after}"), "a.py", Hints::default()).unwrap();
            assert!(found.undecided.is_empty(), "{after}: {found}");
            assert_eq!((found.policy.params.tier.word(), found.policy.optimizer.tier.word()), (params, "host"));
        }
    }
    // The second call makes another one.
    let twice = format!("{GET}a = get()\nb = get()\nb['zero_optimization']['offload_param'] = {{'device': 'cpu'}}\n");
    let found = any(&twice, "a.py", Hints::default()).unwrap();
    assert_eq!((found.policy.params.tier.word(), found.undecided[0].line), ("auto", Some(6)), "{found}");
}

#[test]
fn a_file_that_the_script_reads_is_followed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.py");
    let config = r#"{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}"#;
    std::fs::write(dir.path().join("ds_z3_offload.json"), config).unwrap();
    let call = "deepspeed.initialize(model=m, config=cfg)\n";
    let with = "with open('ds_z3_offload.json') as f:\n    cfg = json.load(f)\n";
    let edit = "cfg['zero_optimization']['offload_optimizer'] = {'device': 'cpu'}\n";
    for text in [
        format!("cfg = json.load(open('ds_z3_offload.json'))\n{call}"),
        format!("{with}{call}"),
        format!("{with}{edit}{call}"),
        format!("name = 'ds_z3_offload.json'\n{}{call}", with.replace("'ds_z3_offload.json'", "name")),
    ] {
        std::fs::write(&path, &text).unwrap();
        let output = import(&path, Hints::default());
        assert!(
            output.code == 0 && output.out.contains("offload_param.device = \"cpu\" -> params.tier"),
            "{text}{}",
            output.out
        );
        assert!(!output.out.contains("offloads nothing") && !output.out.contains("another"), "{text}{}", output.out);
        assert_eq!(output.out.contains("is not followed"), text.contains(edit), "{text}{}", output.out);
    }
    for text in ["with open(path) as f:\n    cfg = json.load(f)\n", "cfg = make()\n", "cfg = pick\n"] {
        let found = any(&format!("{text}{call}"), "a.py", Hints::default()).unwrap().to_string();
        assert!(found.contains("cannot be told from it") && !found.contains("offloads nothing"), "{text}{found}");
    }
}

#[test]
fn a_file_is_followed_however_the_script_reads_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.py");
    let config = r#"{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}"#;
    std::fs::create_dir(dir.path().join("conf")).unwrap();
    std::fs::write(dir.path().join("conf/z3.json"), config).unwrap();
    for (given, edited) in [
        ("deepspeed.initialize(model=m, config_params=json.load(open('conf/z3.json')))", false),
        ("deepspeed.initialize(model=m, config=json.loads(Path('conf/z3.json').read_text()))", false),
        ("deepspeed.initialize(model=m, config=json.loads(open('conf/z3.json', 'r').read()))", false),
        ("deepspeed.initialize(model=m, config=json.load(pathlib.Path('conf/z3.json').open()))", false),
        ("deepspeed.initialize(model=m, config=os.path.join('conf', 'z3.json'))", false),
        ("c = json.loads(Path('conf/z3.json').read_text())\nc['a'] = 1\ndeepspeed.initialize(config=c)", true),
    ] {
        std::fs::write(&path, given).unwrap();
        let output = import(&path, Hints::default());
        let mapped = output.out.contains("offload_param.device = \"cpu\" -> params.tier");
        assert!(output.code == 0 && mapped, "{given}: {}{}", output.out, output.err);
        assert_eq!(output.out.contains("is not followed"), edited, "{given}: {}", output.out);
    }
}

#[test]
fn arguments_that_are_unpacked_may_be_changed_under_a_condition() {
    for start in ["kw = {}", "kw = {'mesh': mesh}", "kw = dict(mesh=mesh)"] {
        let text = format!(
            "{start}\nif cpu_offload:\n    kw['offload_policy'] = CPUOffloadPolicy()\n\
             for block in model.layers:\n    fully_shard(block, **kw, reshard_after_forward=True)\nfully_shard(model, **kw)\n"
        );
        let found = any(&text, "a.py", Hints::default()).unwrap();
        let said = found.to_string();
        assert!(said.contains("cannot be told from it") && !said.contains("offloads nothing"), "{said}");
        let edit = found.undecided.iter().find(|item| item.line == Some(3)).unwrap();
        assert!(edit.note.contains("is run under a condition"), "{said}");
        assert!(found.undecided.iter().all(|item| item.line.is_none_or(|line| line < 4)), "{said}");
    }
}

#[test]
fn a_script_that_speaks_of_offloading_elsewhere_is_not_said_to_offload_nothing() {
    for text in [
        "fully_shard(model, **arguments(cpu_offload=True))\n",
        "if args.cpu_offload:\n    model = wrap(model)\nfully_shard(model)\n",
        "kw = arguments[args.offload]\nfully_shard(model, **kw)\n",
        "def build(model, offload_params=True):\n    fully_shard(model)\n",
    ] {
        let said = any(text, "a.py", Hints::default()).unwrap().to_string();
        assert!(said.contains("cannot be told from it") && !said.contains("offloads nothing"), "{said}");
    }
    for text in [
        "from a import CPUOffloadPolicy\n# offload\nfully_shard(model)\n",
        "cfg = {'zero_optimization': {\n  'stage': 3,\n  'offload_param':\n    {'device': 'none'}}}\n",
        "fully_shard(model, offload_policy=OffloadPolicy())\n",
    ] {
        let said = any(text, "a.py", Hints::default()).unwrap().to_string();
        assert!(!said.contains("cannot be told from it"), "{said}");
    }
}

#[test]
fn where_reading_ends_is_said() {
    for (rest, line) in [
        ("print(\ncfg['zero_optimization']['offload_param'] = {'device': 'nvme'}\n", 2),
        ("x = [\n", 2),
        (&*"x = 1\n".repeat(20_001), 20_001),
    ] {
        let found = any(&format!("{CFG}{rest}"), "a.py", Hints::default()).unwrap();
        let last = found.undecided.last().unwrap();
        assert!(last.line == Some(line) && last.note.contains("is not read"), "{line}: {:?}", found.undecided);
        assert_eq!(found.policy.optimizer.tier.word(), "host");
    }
}

#[test]
fn arithmetic_of_numbers_is_read() {
    let text = "cfg = {'zero_optimization': {'stage': 1 + 2, 'offload_param': {'device': 'cpu'},\n\
        'stage3_prefetch_bucket_size': 10 * 10**5}, 'aio': {'block_size': 1 << 20, 'queue_depth': 2 * (8 + 8)}}\n";
    let found = any(text, "a.py", Hints::default()).unwrap();
    assert!(found.undecided.is_empty(), "{found}");
    let toml = found.toml().unwrap();
    assert!(toml.contains("queue_depth = 32\n") && toml.contains("window = \"2MB\""), "{toml}");
    let text = text.replace("2 * (8 + 8)", "2 * n").replace("1 << 20", "1 << 20, 'thread_count': 4");
    let found = any(&text, "a.py", Hints::default()).unwrap();
    assert!(!found.toml().unwrap().contains("queue_depth"), "{found}");
}

#[test]
fn a_comparison_is_shown_as_it_is_written() {
    let text = "cfg = {'zero_optimization': {'stage': 3}, 'bf16': {'enabled': dtype == 'bf16'}}\n";
    let found = any(text, "a.py", Hints::default()).unwrap();
    assert!(found.undecided.iter().any(|item| item.value == "dtype == 'bf16'"), "{found}");
}

#[test]
fn several_plugins_are_one_configuration_with_its_format() {
    let text = "a = DeepSpeedPlugin(hf_ds_config={'zero_optimization': {'stage': 3, 'offload_param': {'device': 'cpu'}}})\n\
        b = DeepSpeedPlugin(hf_ds_config={'zero_optimization': {'stage': 2}})\n\
        acc = Accelerator(deepspeed_plugins={'student': a, 'teacher': b}, mixed_precision='bf16')\n";
    let found = any(text, "a.py", Hints::default()).unwrap();
    let policy = &found.policy;
    assert_eq!((policy.params.tier.word(), policy.params.dtype.word()), ("host", "bfloat16"), "{found}");
    assert_eq!(found.undecided.len(), 1, "{found}");
    assert!(found.undecided[0].note.contains("into a file of its own"), "{found}");
}

#[test]
fn the_last_of_several_values_of_a_name_counts() {
    let (params, optimizer, lines) =
        told("cfg = {'zero_optimization': {'stage': 3, 'offload_param': {'device': 'nvme', 'nvme_path': '/q'}}}\n");
    assert_eq!((params.as_str(), optimizer.as_str(), &lines[..]), ("nvme", "auto", &[1][..]));
}

#[test]
fn what_is_given_to_deepspeed_is_not_called_lightnings() {
    let (params, optimizer, lines) = told("deepspeed.initialize(model=m, config=pick())\n");
    assert_eq!((params.as_str(), optimizer.as_str(), &lines[..]), ("auto", "host", &[2][..]));
    let found =
        any(&format!("{CFG}deepspeed.initialize(config=pick())\n"), "a.py", Hints::default()).unwrap().to_string();
    assert!(found.contains("a configuration that is not followed") && !found.contains("Lightning"), "{found}");
}

#[test]
fn a_section_that_speaks_of_offloading_is_not_passed_over() {
    let text = "distributed_type: MEGATRON_LM\nmegatron_lm_config: {megatron_lm_optimizer_cpu_offload: true}\nnum_processes: 1\n";
    let found = any(text, "a.yaml", Hints::default()).unwrap().to_string();
    assert!(found.contains("cannot be told from it") && !found.contains("offloads nothing"), "{found}");
}
