//! Pages of docs/ show what the commands in them print.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::process::Command;

/// Pages with `$ funicular plan ...` and its output.
const PAGES: [&str; 2] = ["docs/plans.md", "docs/quickstart.md"];

fn path(page: &str) -> String {
    format!("{}/{page}", env!("CARGO_MANIFEST_DIR"))
}

/// What `funicular plan` prints.
fn plan(arguments: &str) -> String {
    let run = Command::new(env!("CARGO_BIN_EXE_funicular"))
        .arg("plan")
        .args(arguments.split_whitespace())
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(run.stderr.is_empty(), "{arguments}: {}", String::from_utf8_lossy(&run.stderr));
    String::from_utf8(run.stdout).unwrap()
}

/// The page with the output of every `$ funicular plan ...` made anew.
fn remade(text: &str) -> String {
    let mut out = String::new();
    let mut skipping = false;
    for line in text.lines() {
        if line.starts_with("```") {
            skipping = false;
        }
        if skipping {
            continue;
        }
        out += line;
        out.push('\n');
        if let Some(arguments) = line.strip_prefix("$ funicular plan ") {
            out += &plan(arguments);
            skipping = true;
        }
    }
    out
}

#[test]
fn pages_with_plans_are_in_step() {
    for page in PAGES {
        let text = std::fs::read_to_string(path(page)).unwrap();
        let new = remade(&text);
        if std::env::var_os("FUNICULAR_WRITE_DOCS").is_some() {
            std::fs::write(path(page), &new).unwrap();
            continue;
        }
        assert!(text.contains("$ funicular plan"), "there is something to compare");
        assert!(new == text, "{page} is old: run the test with FUNICULAR_WRITE_DOCS=1");
    }
}

#[test]
fn commands_of_the_readme_run() {
    let text = std::fs::read_to_string(path("README.md")).unwrap();
    let commands: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("funicular plan ")).collect();
    assert_eq!(commands.len(), 1);
    assert!(plan(commands[0]).contains("It fits."));
}

#[test]
fn who_updates_is_planned() {
    let model = "--params 11B --layers 48 --gpu 141GB --ram 125GB --cpus 16 --profile examples/profiles/h200.toml";
    let planned = |wish: &str| -> serde_json::Value {
        let out =
            plan(&format!("{model} --tokens 16384 --flops 400e12 --recompute --json --set optimizer.where={wish}"));
        serde_json::from_str(&out).unwrap()
    };
    let bytes = |plan: &serde_json::Value, link: &str| -> u64 {
        let all = plan["traffic"].as_array().unwrap();
        all.iter().find(|entry| entry[0] == link).unwrap()[1].as_u64().unwrap()
    };
    let seconds = |plan: &serde_json::Value| plan["step"]["seconds"].as_f64().unwrap();
    let [cpu, gpu, auto] = ["cpu", "gpu", "auto"].map(planned);
    let part = |plan: &serde_json::Value| plan["step"]["by_gpu"].as_f64().unwrap();
    assert_eq!((part(&cpu), part(&gpu)), (0.0, 1.0));
    assert!((0.4..0.8).contains(&part(&auto)), "{}", part(&auto));
    assert_eq!((bytes(&cpu, "gpu_update"), bytes(&gpu, "cpu_update")), (0, 0));
    assert!(seconds(&auto) < seconds(&cpu) && seconds(&auto) <= seconds(&gpu));
    let together = bytes(&auto, "cpu_update") + bytes(&auto, "gpu_update");
    // Lanes take memory of the GPU: a little less of the model is resident beside them.
    assert!((1.0..1.01).contains(&(together as f64 / bytes(&cpu, "cpu_update") as f64)), "{together}");
}

#[test]
fn gradients_go_to_nvme_where_nothing_else_makes_the_model_fit() {
    let planned = |ram: &str, more: &str| -> serde_json::Value {
        let set = "--set nvme.paths=[\"/mnt/nvme0\"]";
        let out = plan(&format!("--params 7B --layers 32 --gpu 24GB --ram {ram} --disk 2TB {set} --json {more}"));
        serde_json::from_str(&out).unwrap()
    };
    let on_nvme = |plan: &serde_json::Value| {
        assert_eq!(plan["fits"], true, "{plan}");
        let units = plan["units"].as_array().unwrap();
        units.iter().filter(|unit| unit["grads_tier"] == "nvme").count()
    };
    let (wide, tight) = (planned("32GB", ""), planned("12GB", ""));
    assert_eq!(on_nvme(&wide), 0);
    assert!(on_nvme(&tight) > 16, "{tight}");
    let wear = |plan: &serde_json::Value| plan["wear"]["bytes_per_step"].as_u64().unwrap();
    let fixed = "--set optimizer.tier=nvme --set params.tier=host --set gradients.tier";
    let asked = planned("64GB", &format!("{fixed}=nvme"));
    let one = wear(&asked) - wear(&planned("64GB", &format!("{fixed}=host")));
    assert!((12_000_000_000..15_000_000_000).contains(&one), "each gradient is written once: {one}");
    let twice = wear(&planned("64GB", &format!("{fixed}=nvme --passes 2")));
    assert!(twice - wear(&asked) >= one, "each backward writes them");
    let refused = plan(
        "--params 7B --layers 32 --gpu 24GB --ram 12GB --set nvme.paths=[\"/mnt/nvme0\"] --set gradients.tier=host",
    );
    assert!(refused.contains("It does not fit") && refused.contains("gradients.tier"), "{refused}");
}

#[test]
fn ranks_share_the_hosts_memory() {
    let model = "--params 7B --layers 32 --gpu 24GB --ram 160GB --cpus 64";
    let rates = "--profile examples/profiles/h200.toml --tokens 16384 --flops 400e12 --recompute --set optimizer.where=cpu --set budget.hbm=2GiB";
    let planned = |more: &str| -> serde_json::Value {
        serde_json::from_str(&plan(&format!("{model} {rates} --json {more}"))).unwrap()
    };
    let [one, two, eight] = ["", "--ranks 2", "--ranks 8"].map(planned);
    assert!(one.get("ranks").is_none() && planned("--ranks 1") == one, "one process is planned as ever");
    let per_parameter = |plan: &serde_json::Value| plan["ranks"]["per_parameter"].as_f64().unwrap();
    // 28 + 4 N; what the ring holds still is not copied again.
    assert!((34.5..36.1).contains(&per_parameter(&two)), "{}", per_parameter(&two));
    assert!((54.5..60.1).contains(&per_parameter(&eight)), "{}", per_parameter(&eight));
    let host = |plan: &serde_json::Value| plan["tiers"][1]["holds"].clone();
    assert_eq!(host(&two), host(&eight), "host memory is there once");
    assert_eq!(two["ranks"]["hbm"].as_u64().unwrap() * 4, eight["ranks"]["hbm"].as_u64().unwrap());
    let rate = |plan: &serde_json::Value| plan["step"]["tokens_per_second"].as_f64().unwrap();
    assert!(rate(&one) < rate(&two) && rate(&two) < rate(&eight) && rate(&eight) < 8.0 * rate(&one));
    assert_eq!(eight["step"]["binding"], "host_memory", "{}", eight["step"]);
    let text = plan(&format!("{model} --ranks 2"));
    assert!(text.contains("2 ranks: the tier host is there once") && text.contains("Per rank and step:"), "{text}");
}

#[test]
fn each_rank_grows_by_what_it_owns() {
    let planned = |ranks: u32| -> serde_json::Value {
        let text = plan(&format!(
            "--params 1B --layers 16 --gpu 80GB --ram 200GB --cpus 64 --tokens 4096 --recompute --json --ranks {ranks}"
        ));
        serde_json::from_str::<serde_json::Value>(&text).unwrap()["grows"].clone()
    };
    let [two, eight] = [2, 8].map(planned);
    assert_eq!(two["units"], two["of"], "{two}");
    let bytes = |plan: &serde_json::Value| plan["bytes"].as_f64().unwrap();
    // States and weights, both sets of them, of half the parameters.
    assert!((0.98..1.1).contains(&(bytes(&two) / (1e9 * 24.0 / 2.0))), "{two}");
    assert!((0.98..1.2).contains(&(4.0 * bytes(&eight) / bytes(&two))), "{eight}");
}

#[test]
fn rates_of_ranks_at_once_are_taken_as_measured() {
    let dir = tempfile::tempdir().unwrap();
    let profile = |name: &str, ranks: &str, up: f64| {
        let text = std::fs::read_to_string("examples/profiles/h200.toml").unwrap();
        let text = text.replace("version = 1", &format!("version = 1\n{ranks}"));
        let file = dir.path().join(name);
        std::fs::write(&file, text.replace("host_to_device = 55.5e9", &format!("host_to_device = {up}"))).unwrap();
        file.display().to_string()
    };
    let planned = |profile: &str, ranks: u32| -> serde_json::Value {
        let work = "--tokens 16384 --flops 400e12 --set optimizer.where=cpu --set budget.hbm=2GiB --json";
        let model = "--params 7B --layers 32 --gpu 24GB --ram 160GB --cpus 64";
        serde_json::from_str(&plan(&format!("{model} {work} --profile {profile} --ranks {ranks}"))).unwrap()
    };
    let up = |plan: &serde_json::Value| {
        let parts = plan["step"]["parts"].as_array().unwrap();
        parts.iter().find(|part| part[0] == "host_to_device").unwrap()[1].as_f64().unwrap()
    };
    let note = |plan: &serde_json::Value| -> String {
        let notes = plan["notes"].as_array().unwrap();
        notes.iter().filter_map(|note| note.as_str()).filter(|note| note.starts_with("These rates")).collect()
    };
    let alone = profile("alone", "", 55.5e9);
    let [slow, fast] = [20e9, 60e9].map(|each| profile(&format!("{each}"), "ranks = 2", 2.0 * each));
    let [alone, slow_two, fast_two] = [&alone, &slow, &fast].map(|file| planned(file, 2));
    // Twice one process's would be more than 107 GB/s; what was measured is taken as it is.
    assert!((up(&alone) / up(&fast_two) - 60.0 / 53.5).abs() < 1e-6, "{} {}", up(&alone), up(&fast_two));
    assert!((up(&slow_two) / up(&fast_two) - 3.0).abs() < 1e-6, "{} {}", up(&slow_two), up(&fast_two));
    assert!(note(&alone).contains("of one process, not of 2 ranks"), "{alone}");
    assert_eq!(note(&slow_two), "");
    let four = planned(&fast, 4);
    assert!((up(&four) / up(&fast_two) - 4.0 * 60.0 / 107.0).abs() < 1e-6, "the memory is shared: {}", up(&four));
    assert!(note(&four).contains("of 2 ranks at once, not of 4 ranks"), "{four}");
    let one = planned(&fast, 1);
    assert!((up(&one) / up(&fast_two) - 1.0).abs() < 1e-6 && note(&one).contains("may be faster"), "{one}");
}

#[test]
fn a_configuration_stands_for_its_directory() {
    let dir = tempfile::tempdir().unwrap();
    let header = r#"{"w": {"dtype": "BF16", "shape": [64, 64], "data_offsets": [0, 8192]}}"#;
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.resize(file.len() + 8192, 0);
    std::fs::write(dir.path().join("model.safetensors"), file).unwrap();
    std::fs::write(dir.path().join("config.json"), r#"{"num_hidden_layers": 1, "hidden_size": 64}"#).unwrap();
    let planned = |model: &std::path::Path| {
        plan(&format!("{} --gpu 1GB --ram 4GB --cpus 1 --tokens 64 --flops 1e12", model.display()))
    };
    let whole = planned(dir.path());
    assert!(whole.contains("an estimate from config.json"), "{whole}");
    assert_eq!(planned(&dir.path().join("config.json")), whole);
    let here = Command::new(env!("CARGO_BIN_EXE_funicular"))
        .args(["plan", "config.json", "--gpu", "1GB", "--ram", "4GB"])
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert_eq!(here.status.code(), Some(0), "{}", String::from_utf8_lossy(&here.stderr));
}

#[test]
fn a_plan_of_nothing_names_both_ways_to_give_a_model() {
    let run = |more: &[&str]| {
        let run = Command::new(env!("CARGO_BIN_EXE_funicular")).arg("plan").args(more).output().unwrap();
        (run.status.code(), String::from_utf8(run.stderr).unwrap())
    };
    let (code, said) = run(&[]);
    let missing = said.split("Usage").next().unwrap();
    assert!(code == Some(2) && missing.contains("MODEL") && missing.contains("--params"), "{said}");
    let (code, said) = run(&["dir", "--params", "7B", "--layers", "2"]);
    assert!(code == Some(2) && said.contains("cannot be used with"), "{said}");
}

#[test]
fn what_is_larger_than_the_gpu_does_not_fit() {
    let run = |more: &str| {
        let arguments = ["plan", "--params", "7B", "--layers", "32", "--ram", "640GB"];
        let mut command = Command::new(env!("CARGO_BIN_EXE_funicular"));
        let run = command.args(arguments).args(more.split_whitespace()).output().unwrap();
        (run.status.code(), String::from_utf8(run.stdout).unwrap())
    };
    for (more, next) in [
        ("--gpu 100MB", "name smaller modules in units.match, or take a GPU with more memory"),
        ("--gpu 24GB --set budget.hbm=40GiB", "Lower budget.hbm"),
    ] {
        let (code, said) = run(more);
        assert!(code == Some(1) && said.contains("It does not fit") && said.contains("FN-E201"), "{said}");
        assert!(said.contains(next), "{said}");
    }
    assert_eq!(run("--gpu 1GB").0, Some(0));
}

#[test]
fn a_model_that_is_not_there_gets_the_hint_that_helps() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("llama.json"), r#"{"model_type": "llama"}"#).unwrap();
    for (model, part) in [
        ("org/model-7B", "hf download org/model-7B config.json"),
        ("dir/model.json", "Give the path of a directory"),
        ("./model", "Give the path of a directory"),
        ("/a/model", "Give the path of a directory"),
        ("llama.json", "is read under the name config.json alone"),
    ] {
        let run = Command::new(env!("CARGO_BIN_EXE_funicular"))
            .args(["plan", model, "--ram", "4GB"])
            .current_dir(dir.path())
            .output()
            .unwrap();
        let said = String::from_utf8(run.stderr).unwrap();
        assert_eq!(run.status.code(), Some(2), "{said}");
        assert!(said.starts_with("FN-E505") && said.contains(part), "{model}: {said}");
        assert_eq!(said.contains("hf download"), model.starts_with("org"), "{said}");
    }
}

#[test]
fn activations_that_do_not_fit_are_in_the_answer() {
    let model = "--params 7B --layers 32 --gpu 24GB --ram 128GB --cpus 8 --flops 80e12";
    let answer = |more: &str| {
        let out = plan(&format!("{model} {more}"));
        out.lines().find(|line| line.starts_with("It ")).unwrap().to_owned()
    };
    let said = answer("--tokens 4096");
    assert!(said.starts_with("It fits, but for the activations: they take about 2"), "{said}");
    assert!(said.ends_with("GiB for them."), "{said}");
    for enough in ["--tokens 4096 --recompute", ""] {
        assert_eq!(answer(enough), "It fits.", "{enough}");
    }
}

/// A model whose states do not fit into host memory, on ranks.
fn on_small_hosts(ranks: &str, more: &[&str]) -> std::process::Output {
    let model = ["plan", "--params", "7B", "--layers", "32", "--gpu", "24GB", "--ram", "64GB", "--disk", "1TB"];
    Command::new(env!("CARGO_BIN_EXE_funicular"))
        .args(model.iter().chain(&["--ranks", ranks]).chain(more))
        .output()
        .unwrap()
}

#[test]
fn states_of_ranks_are_on_nvme_once() {
    let planned = |ranks: &str| -> serde_json::Value {
        let run = on_small_hosts(ranks, &["--json"]);
        assert_eq!(run.status.code(), Some(0), "{}", String::from_utf8_lossy(&run.stderr));
        serde_json::from_slice(&run.stdout).unwrap()
    };
    let of = |plan: &serde_json::Value, tier: &str| {
        plan["tiers"].as_array().unwrap().iter().find(|t| t["tier"] == tier).unwrap().clone()
    };
    let held = |tier: &serde_json::Value, what: &str| -> u64 {
        let all = tier["holds"].as_array().unwrap();
        all.iter().find(|held| held[0] == what).map_or(0, |held| held[1].as_u64().unwrap())
    };
    let (two, four) = (planned("2"), planned("4"));
    let states = |plan: &serde_json::Value| held(&of(plan, "nvme"), "states") + held(&of(plan, "host"), "states");
    assert!(held(&of(&two, "nvme"), "states") > 0 && states(&two) == states(&four));
    let staging = |plan: &serde_json::Value| held(&of(plan, "host"), "staging");
    assert_eq!(staging(&two) * 2, staging(&four), "each rank has staging of its own");
    let host = of(&four, "host");
    assert!(host["steady"].as_u64() <= host["budget"].as_u64(), "{host}");
    let moved = |plan: &serde_json::Value, ranks: u64| -> u64 {
        plan["traffic"].as_array().unwrap().iter().find(|t| t[0] == "nvme_write").unwrap()[1].as_u64().unwrap() * ranks
    };
    // But for the rounding of each unit.
    let (moved, states) = (moved(&two, 2), held(&of(&two, "nvme"), "states"));
    assert!(moved.abs_diff(states) < states / 100, "{moved} of {states}");
}

#[test]
fn what_ranks_cannot_have_is_refused() {
    for key in ["params", "gradients"] {
        let dir = tempfile::tempdir().unwrap();
        let policy = dir.path().join("policy.toml");
        std::fs::write(&policy, format!("version = 1\n[{key}]\ntier = \"nvme\"\n")).unwrap();
        let run = on_small_hosts("2", &["--policy", policy.to_str().unwrap()]);
        assert_eq!(run.status.code(), Some(2));
        let said = String::from_utf8_lossy(&run.stderr);
        assert!(said.contains("FN-E704") && said.contains(&format!("{key}.tier")), "{said}");
    }
}
