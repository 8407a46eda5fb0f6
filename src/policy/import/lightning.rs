//! The arguments of Lightning's `DeepSpeedStrategy`, of its `Trainer` and of `deepspeed.initialize`, rewritten as a DeepSpeed
//! configuration.

use super::{
    accelerate::{beside, hosts, processes, refer},
    fsdp,
    kinds::called,
    rewrite::{Rewrite, joined, word},
    rules::LOOP,
    scalar,
};
use crate::policy::{
    ParamsDtype,
    source::{CALLEE, Entry, Node, Value},
    suggest,
};

/// Arguments of Lightning's strategy and what they are in DeepSpeed's file.
const LIGHTNING: &[(&str, &str)] = &[
    ("stage", "zero_optimization.stage"),
    ("params_buffer_count", "zero_optimization.offload_param.buffer_count"),
    ("params_buffer_size", "zero_optimization.offload_param.buffer_size"),
    ("max_in_cpu", "zero_optimization.offload_param.max_in_cpu"),
    ("optimizer_buffer_count", "zero_optimization.offload_optimizer.buffer_count"),
    ("sub_group_size", "zero_optimization.sub_group_size"),
    ("contiguous_gradients", "zero_optimization.contiguous_gradients"),
    ("overlap_comm", "zero_optimization.overlap_comm"),
    ("allgather_partitions", "zero_optimization.allgather_partitions"),
    ("reduce_scatter", "zero_optimization.reduce_scatter"),
    ("allgather_bucket_size", "zero_optimization.allgather_bucket_size"),
    ("reduce_bucket_size", "zero_optimization.reduce_bucket_size"),
    ("pin_memory", "zero_optimization.cpu_offload_use_pin_memory"),
    ("block_size", "aio.block_size"),
    ("queue_depth", "aio.queue_depth"),
    ("thread_count", "aio.thread_count"),
    ("single_submit", "aio.single_submit"),
    ("overlap_events", "aio.overlap_events"),
    ("zero_allow_untested_optimizer", "zero_allow_untested_optimizer"),
];

/// Arguments that only Lightning has: where to offload to, and what is its own business.
const LIGHTNING_OWN: &[&str] = &[
    "zero_optimization",
    "offload_optimizer",
    "offload_parameters",
    "offload_params_device",
    "offload_optimizer_device",
    "nvme_path",
    "remote_device",
    "config",
    "strategy",
    "cpu_checkpointing",
    "precision",
    "devices",
    "num_nodes",
];

const LIGHTNING_LOOP: &[&str] = &[
    "accelerator",
    "parallel_devices",
    "cluster_environment",
    "precision_plugin",
    "process_group_backend",
    "timeout",
    "logging_batch_size_per_gpu",
    "logging_level",
    "loss_scale",
    "initial_scale_power",
    "loss_scale_window",
    "hysteresis",
    "min_loss_scale",
    "partition_activations",
    "contiguous_memory_optimization",
    "synchronize_checkpoint_boundary",
    "load_full_weights",
    "exclude_frozen_parameters",
    "max_epochs",
    "max_steps",
    "accumulate_grad_batches",
    "gradient_clip_val",
];

const NO_STRATEGY: &str = "is not a DeepSpeed strategy such as deepspeed_stage_3_offload";

/// `strategy="deepspeed_stage_3_offload"`.
pub(super) fn strategy(to: &mut Rewrite<'_>, key: &str, name: &str, node: &Node) {
    match name {
        "fsdp_cpu_offload" => return fsdp::offloaded(to, key, node),
        "auto" | "ddp" | "fsdp" | "dp" | "single_device" => {
            return to.ignored(key, node, "about several GPUs");
        }
        "deepspeed" => return to.ignored(key, node, "DeepSpeed's stage 2 without offload"),
        _ => {}
    }
    let (stage, rest) = match name.strip_prefix("deepspeed_stage_").map(|s| s.split_at(s.len().min(1))) {
        Some((stage @ ("1" | "2" | "3"), rest)) => (i64::from(stage.as_bytes()[0] - b'0'), rest),
        _ => return to.undecided(key, node, NO_STRATEGY),
    };
    let devices = match (stage, rest) {
        (_, "") => None,
        (2, "_offload") => Some((None, "cpu")),
        (3, "_offload") => Some((Some("cpu"), "cpu")),
        (3, "_nvme") => Some((Some("nvme"), "nvme")),
        _ => return to.undecided(key, node, NO_STRATEGY),
    };
    let number = Node { span: node.span.clone(), value: Value::Integer(stage) };
    to.put("zero_optimization.stage", &format!("{key} (stage)"), &number, "");
    let Some((params, optimizer)) = devices else { return };
    for (section, device) in [("offload_param", params), ("offload_optimizer", Some(optimizer))] {
        let Some(device) = device else { continue };
        to.put(&format!("zero_optimization.{section}.device"), &format!("{key} ({section})"), &word(device, node), "");
        if device == "nvme" {
            let path = format!("zero_optimization.{section}.nvme_path");
            to.put(&path, &format!("{key} (default nvme_path)"), &word("/local_nvme", node), "");
        }
    }
}

/// Reads the arguments of a strategy, of a trainer, or both in one table.
pub(super) fn arguments(to: &mut Rewrite<'_>, prefix: &str, table: &Node) {
    let Value::Table(entries) = &table.value else { return };
    if called(table).ends_with("FSDPStrategy") || called(table).ends_with("DDPFullyShardedNativeStrategy") {
        return fsdp::section(to, prefix, table);
    }
    let config = table.get("config").or_else(|| table.get("config_params"));
    if let Some(config) = config.filter(|c| !matches!(c.value, Value::Null)) {
        for Entry { key, node, .. } in entries {
            let full = joined(prefix, key);
            match key.as_str() {
                "class_path" | CALLEE => to.names_class(&full, node),
                "config" | "config_params" if std::ptr::eq(node, config) => refer(to, &full, node),
                _ if key.starts_with("argument ") || !called(table).ends_with("Strategy") && !is_own(key) => {
                    to.ignored(&full, node, LOOP);
                }
                _ => to.ignored(&full, node, "config is given, and overrides every other argument"),
            }
        }
        return;
    }
    for (flag, device, section) in [
        ("offload_parameters", "offload_params_device", "offload_param"),
        ("offload_optimizer", "offload_optimizer_device", "offload_optimizer"),
    ] {
        offload(to, prefix, table, [flag, device, section]);
    }
    for Entry { key, node, .. } in entries {
        argument(to, prefix, key, node);
    }
}

fn is_own(key: &str) -> bool {
    LIGHTNING_OWN.contains(&key) || LIGHTNING.iter().any(|(name, _)| *name == key)
}

fn argument(to: &mut Rewrite<'_>, prefix: &str, key: &str, node: &Node) {
    let full = joined(prefix, key);
    if let Some((_, path)) = LIGHTNING.iter().find(|(name, _)| *name == key) {
        return to.put(path, &full, node, "");
    }
    match (key, &node.value) {
        (CALLEE | "class_path", _) => to.names_class(&full, node),
        (
            "offload_parameters"
            | "offload_optimizer"
            | "offload_params_device"
            | "offload_optimizer_device"
            | "nvme_path",
            _,
        ) => {}
        ("init_args", Value::Table(_)) => arguments(to, &full, node),
        ("strategy", Value::Text(name)) => strategy(to, &full, name, node),
        ("strategy", Value::Table(_)) => arguments(to, &full, node),
        ("strategy", Value::Code(_)) => to.undecided(&full, node, scalar::COMPUTED),
        ("config" | "config_params", _) => to.ignored(&full, node, "empty"),
        ("zero_optimization", _) => to.ignored(&full, node, "paging is always on here"),
        ("remote_device", _) => {
            to.ignored(&full, node, "the model is wrapped after it is built here; from the meta device too");
        }
        ("cpu_checkpointing", Value::Bool(true)) => fsdp::activations(to, &full, node),
        ("precision", _) => precision(to, &full, node),
        ("devices", Value::List(items)) if items.len() <= 1 => to.ignored(&full, node, "one, as here"),
        ("devices", Value::Integer(-1)) => {
            to.undecided(&full, node, "all GPUs of the machine; here one process trains on one")
        }
        ("devices", _) => processes(to, &full, node),
        ("num_nodes", _) => hosts(to, &full, node, true),
        _ if LIGHTNING_LOOP.contains(&key) || key == "cpu_checkpointing" || key.starts_with("argument ") => {
            to.ignored(&full, node, LOOP);
        }
        _ => {
            let known = LIGHTNING.iter().map(|(name, _)| *name).chain(LIGHTNING_OWN.iter().copied());
            match suggest::nearest(key, known) {
                Some(near) => to.undecided(&full, node, &format!("unknown argument (did you mean '{near}'?)")),
                None => beside(to, &full, key, node, "not about offload; belongs to your training loop"),
            }
        }
    }
}

/// `bf16-mixed` and the like: DeepSpeed converts the model to it, and to `bf16-true` every strategy does.
fn precision(to: &mut Rewrite<'_>, full: &str, node: &Node) {
    let asked = match &node.value {
        Value::Text(text) => text.trim().to_ascii_lowercase(),
        Value::Integer(n) => n.to_string(),
        _ => String::new(),
    };
    match asked.as_str() {
        "bf16-true" => to.format_of_weights(full, node, Some(ParamsDtype::Bfloat16)),
        "16-true" => to.format_of_weights(full, node, Some(ParamsDtype::Float16)),
        "bf16" | "bf16-mixed" => to.format(full, node, Some(ParamsDtype::Bfloat16)),
        "16" | "16-mixed" => to.format(full, node, Some(ParamsDtype::Float16)),
        "32" | "32-true" => to.format(full, node, None),
        _ => {
            let known = "is none of 32-true, 16-true, 16-mixed, bf16-true, bf16-mixed; set params.dtype";
            to.undecided(full, node, scalar::elsewhere(node).unwrap_or(known));
        }
    }
}

/// A flag, the device it sends things to (`"cpu"` unless given), and the path, read only for nvme.
fn offload(to: &mut Rewrite<'_>, prefix: &str, table: &Node, [flag, device, section]: [&str; 3]) {
    let (flag_node, device_node) = (table.get(flag), table.get(device));
    let (flag_name, device_name) = (joined(prefix, flag), joined(prefix, device));
    let on = match flag_node.map(|node| (node, scalar::flag(node))) {
        None => false,
        Some((_, Ok(read))) => read.value,
        Some((node, Err(fault))) => return to.undecided(&flag_name, node, &fault),
    };
    let path = format!("zero_optimization.{section}.device");
    match (on, flag_node, device_node) {
        (true, Some(node), None) => to.put(&path, &flag_name, &word("cpu", node), ""),
        (true, Some(node), Some(given)) => {
            to.put(&path, &device_name, given, "");
            to.ignored(&flag_name, node, &format!("{device} says where to"));
        }
        (_, Some(node), _) => {
            to.put(&path, &flag_name, &word("none", node), "");
            if let Some(given) = device_node {
                to.ignored(&device_name, given, &format!("{flag} is off"));
            }
        }
        (_, None, Some(given)) => {
            to.undecided(&device_name, given, &format!("{flag} is not given, and is off by default"));
        }
        (_, None, None) => {}
    }
    let nvme = matches!(device_node, Some(Node { value: Value::Text(word), .. }) if word.trim() == "nvme");
    let path = format!("zero_optimization.{section}.nvme_path");
    let path_name = joined(prefix, "nvme_path");
    match (table.get("nvme_path"), device_node) {
        (Some(node), _) if on && nvme => to.put(&path, &path_name, node, ""),
        (None, Some(node)) if on && nvme => {
            to.put(&path, &format!("{path_name} (its default)"), &word("/local_nvme", node), "");
        }
        (Some(node), _) if section == "offload_optimizer" && !to.has(&path_name) => {
            to.ignored(&path_name, node, "no device is nvme");
        }
        _ => {}
    }
}
