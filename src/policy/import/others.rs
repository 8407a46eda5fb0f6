//! accelerate's YAML and Lightning's arguments, rewritten as a DeepSpeed configuration and imported as one.

use super::{Hints, Imported, Item, deepspeed, report::Found, scalar};
use crate::policy::{
    OptimizerTier, ParamsTier,
    source::{Entry, Node, Source, Value},
    suggest,
};

const LOOP: &str = "belongs to your training loop";

/// Keys of accelerate's `deepspeed_config` and what they are in DeepSpeed's.
const ACCELERATE: &[(&str, &str)] = &[
    ("zero_stage", "zero_optimization.stage"),
    ("offload_optimizer_device", "zero_optimization.offload_optimizer.device"),
    ("offload_optimizer_nvme_path", "zero_optimization.offload_optimizer.nvme_path"),
    ("offload_param_device", "zero_optimization.offload_param.device"),
    ("offload_param_nvme_path", "zero_optimization.offload_param.nvme_path"),
    ("zero3_save_16bit_model", "zero_optimization.stage3_gather_16bit_weights_on_model_save"),
    ("gradient_clipping", "gradient_clipping"),
    ("gradient_accumulation_steps", "gradient_accumulation_steps"),
];

/// Keys of accelerate's `deepspeed_config` that have no part in DeepSpeed's file.
const ACCELERATE_OTHER: &[(&str, &str)] = &[
    ("zero3_init_flag", "the model is wrapped after it is built here; from the meta device too"),
    ("deepspeed_hostfile", "about launching on several machines"),
    ("deepspeed_multinode_launcher", "about launching on several machines"),
    ("deepspeed_exclusion_filter", "about launching on several machines"),
    ("deepspeed_inclusion_filter", "about launching on several machines"),
];

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
    "devices",
    "max_epochs",
    "max_steps",
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "num_nodes",
];

/// A DeepSpeed tree in the making, with the names that the user wrote.
struct Rewrite<'a> {
    source: &'a Source<'a>,
    root: Node,
    labels: Vec<(String, String)>,
    /// Items that do not pass through the tree.
    own: Imported,
}

impl<'a> Rewrite<'a> {
    fn new(source: &'a Source<'a>) -> Self {
        Self {
            source,
            root: Node::made(Value::Table(Vec::new())),
            labels: Vec::new(),
            own: Imported::new(source.name()),
        }
    }

    fn put(&mut self, path: &str, label: &str, node: Node) {
        self.root.put(&path.split('.').collect::<Vec<_>>(), node);
        self.labels.push((path.to_owned(), label.to_owned()));
    }

    fn ignored(&mut self, key: &str, node: &Node, note: &str) {
        self.own.ignored.push(Item::new(self.source, Found { key, node }, note));
    }

    fn undecided(&mut self, key: &str, node: &Node, note: &str) {
        self.own.undecided.push(Item::new(self.source, Found { key, node }, note));
    }

    fn finish(self, hints: Hints) -> Imported {
        let mut out = deepspeed::import(self.source, &self.root, hints, &self.labels);
        out.mapped.extend(self.own.mapped);
        out.ignored.extend(self.own.ignored);
        out.undecided.extend(self.own.undecided);
        out.sort();
        out
    }
}

fn text(text: &str, like: &Node) -> Node {
    Node { span: like.span.clone(), value: Value::Text(text.to_owned()) }
}

pub(super) fn accelerate(source: &Source<'_>, root: &Node, hints: Hints) -> Imported {
    let mut to = Rewrite::new(source);
    let Value::Table(entries) = &root.value else { return to.finish(hints) };
    let (mut file, mut fsdp) = (None, None);
    for Entry { key, node, .. } in entries {
        match (key.as_str(), &node.value) {
            ("deepspeed_config", Value::Table(keys)) => {
                for Entry { key, node, .. } in keys {
                    accelerate_key(&mut to, key, node, &mut file);
                }
            }
            ("fsdp_config", Value::Table(keys)) => {
                for Entry { key, node, .. } in keys {
                    let full = format!("fsdp_config.{key}");
                    match (key.as_str(), scalar::flag(node)) {
                        ("fsdp_offload_params", Ok(on)) if on.value => fsdp = Some((full, node)),
                        _ => to.ignored(&full, node, "about sharding over ranks"),
                    }
                }
            }
            ("debug", _) | ("mixed_precision", _) => to.ignored(key, node, LOOP),
            _ => to.ignored(key, node, "about launching; belongs to your training loop"),
        }
    }
    if let Some((key, node)) = file {
        to.own.refers_to = Some(key);
        let item = Item::new(
            source,
            Found { key: "deepspeed_config.deepspeed_config_file", node },
            "the settings are in that file",
        );
        to.own.mapped.push(item);
        return to.own;
    }
    if let Some((key, node)) = fsdp {
        to.own.policy.params.tier = ParamsTier::Host;
        to.own.policy.optimizer.tier = OptimizerTier::Host;
        let note = "params.tier = \"host\" and optimizer.tier = \"host\"";
        to.own.mapped.push(Item::new(source, Found { key: &key, node }, note));
        return to.own;
    }
    to.finish(hints)
}

fn accelerate_key<'n>(to: &mut Rewrite<'_>, key: &str, node: &'n Node, file: &mut Option<(String, &'n Node)>) {
    let full = format!("deepspeed_config.{key}");
    if let Some((_, path)) = ACCELERATE.iter().find(|(name, _)| *name == key) {
        return to.put(path, &full, node.clone());
    }
    if let Some((_, why)) = ACCELERATE_OTHER.iter().find(|(name, _)| *name == key) {
        return to.ignored(&full, node, why);
    }
    match (key, &node.value) {
        ("deepspeed_config_file", Value::Text(path)) if path != "none" && !path.is_empty() => {
            *file = Some((path.clone(), node));
        }
        ("deepspeed_config_file", _) => to.ignored(&full, node, "empty"),
        ("deepspeed_moe_layer_cls_names", _) => {
            to.undecided(&full, node, "units.match takes names of modules, not of classes; name the modules");
        }
        _ => {
            let known = ACCELERATE.iter().chain(ACCELERATE_OTHER).map(|(name, _)| *name);
            let hint =
                suggest::did_you_mean(key, known.chain(["deepspeed_config_file", "deepspeed_moe_layer_cls_names"]));
            to.undecided(&full, node, &format!("unknown key{hint}"));
        }
    }
}

/// True if a JSON object holds arguments of Lightning's strategy and not a DeepSpeed configuration.
pub(super) fn is_lightning(root: &Node) -> bool {
    let Value::Table(entries) = &root.value else { return false };
    let section = |e: &Entry| matches!(e.node.value, Value::Table(_));
    let deepspeed = entries.iter().any(|e| matches!(e.key.as_str(), "zero_optimization" | "aio") && section(e));
    let own = |e: &Entry| {
        LIGHTNING_OWN.iter().any(|k| *k == e.key && *k != "zero_optimization")
            || LIGHTNING.iter().any(|(k, _)| *k == e.key)
    };
    !deepspeed && entries.iter().any(own)
}

pub(super) fn lightning(source: &Source<'_>, root: &Node, hints: Hints) -> Imported {
    let mut to = Rewrite::new(source);
    match &root.value {
        Value::Text(name) => strategy(&mut to, "strategy", name, root),
        Value::Table(entries) => match root.get("config").filter(|c| !matches!(c.value, Value::Null)) {
            Some(config) => {
                for Entry { key, node, .. } in entries.iter().filter(|e| e.key != "config") {
                    to.ignored(key, node, "config is given, and overrides every other argument");
                }
                match &config.value {
                    Value::Table(keys) => {
                        keys.iter().for_each(|e| to.root.put(&[&e.key], e.node.clone()));
                    }
                    Value::Text(path) => {
                        let item =
                            Item::new(source, Found { key: "config", node: config }, "the settings are in that file");
                        to.own.mapped.push(item);
                        to.own.refers_to = Some(path.clone());
                        return to.own;
                    }
                    _ => to.undecided("config", config, "is neither a table nor a path"),
                }
            }
            None => arguments(&mut to, root, entries),
        },
        _ => {}
    }
    to.finish(hints)
}

/// `strategy="deepspeed_stage_3_offload"`.
fn strategy(to: &mut Rewrite<'_>, key: &str, name: &str, node: &Node) {
    let (stage, rest) = match name.strip_prefix("deepspeed_stage_").map(|s| s.split_at(s.len().min(1))) {
        Some((stage @ ("1" | "2" | "3"), rest)) => (i64::from(stage.as_bytes()[0] - b'0'), rest),
        _ => return to.undecided(key, node, "is not a DeepSpeed strategy such as deepspeed_stage_3_offload"),
    };
    let devices = match (stage, rest) {
        (_, "") => None,
        (2, "_offload") => Some((None, "cpu")),
        (3, "_offload") => Some((Some("cpu"), "cpu")),
        (3, "_nvme") => Some((Some("nvme"), "nvme")),
        _ => return to.undecided(key, node, "is not a DeepSpeed strategy such as deepspeed_stage_3_offload"),
    };
    let number = Node { span: node.span.clone(), value: Value::Integer(stage) };
    to.put("zero_optimization.stage", &format!("{key} (stage)"), number);
    let Some((params, optimizer)) = devices else { return };
    for (section, device) in [("offload_param", params), ("offload_optimizer", Some(optimizer))] {
        let Some(device) = device else { continue };
        to.put(&format!("zero_optimization.{section}.device"), &format!("{key} ({section})"), text(device, node));
        if device == "nvme" {
            let path = format!("zero_optimization.{section}.nvme_path");
            to.put(&path, &format!("{key} (default nvme_path)"), text("/local_nvme", node));
        }
    }
}

fn arguments(to: &mut Rewrite<'_>, root: &Node, entries: &[Entry]) {
    for (flag, device, section) in [
        ("offload_parameters", "offload_params_device", "offload_param"),
        ("offload_optimizer", "offload_optimizer_device", "offload_optimizer"),
    ] {
        offload(to, root, flag, device, section);
    }
    for Entry { key, node, .. } in entries {
        if let Some((_, path)) = LIGHTNING.iter().find(|(name, _)| *name == key) {
            to.put(path, key, node.clone());
            continue;
        }
        match (key.as_str(), &node.value) {
            (
                "offload_parameters"
                | "offload_optimizer"
                | "offload_params_device"
                | "offload_optimizer_device"
                | "nvme_path",
                _,
            ) => {}
            ("strategy", Value::Text(name)) => strategy(to, key, name, node),
            ("strategy", Value::Table(inner)) => arguments(to, node, inner),
            ("config", _) => to.ignored(key, node, "empty"),
            ("zero_optimization", _) => to.ignored(key, node, "paging is always on here"),
            ("remote_device", _) => {
                to.ignored(key, node, "the model is wrapped after it is built here; from the meta device too")
            }
            ("cpu_checkpointing", Value::Bool(true)) => {
                to.undecided(key, node, "activations.tier = \"host\" does it for blocks that run in micro-batches: set activations.micro_batch too");
            }
            _ if LIGHTNING_LOOP.contains(&key.as_str()) || key == "cpu_checkpointing" => to.ignored(key, node, LOOP),
            _ => {
                let known = LIGHTNING.iter().map(|(name, _)| *name).chain(LIGHTNING_OWN.iter().copied());
                let hint = suggest::did_you_mean(key, known);
                to.undecided(key, node, &format!("unknown argument{hint}"));
            }
        }
    }
}

/// A flag, the device it sends things to (`"cpu"` unless given), and the path, read only for nvme.
fn offload(to: &mut Rewrite<'_>, root: &Node, flag: &str, device: &str, section: &str) {
    let (flag_node, device_node) = (root.get(flag), root.get(device));
    let on = match flag_node.map(scalar::flag) {
        None => false,
        Some(Ok(read)) => read.value,
        Some(Err(fault)) => {
            if let Some(node) = flag_node {
                to.undecided(flag, node, &fault);
            }
            return;
        }
    };
    let path = format!("zero_optimization.{section}.device");
    match (on, flag_node, device_node) {
        (true, Some(node), None) => to.put(&path, flag, text("cpu", node)),
        (true, Some(node), Some(given)) => {
            to.put(&path, device, given.clone());
            let note = format!("{device} says where to");
            to.ignored(flag, node, &note);
        }
        (_, Some(node), _) => {
            to.put(&path, flag, text("none", node));
            if let Some(given) = device_node {
                to.ignored(device, given, &format!("{flag} is off"));
            }
        }
        (_, None, Some(given)) => to.undecided(device, given, &format!("{flag} is not given, and is off by default")),
        (_, None, None) => {}
    }
    let nvme = matches!(device_node, Some(Node { value: Value::Text(word), .. }) if word.trim() == "nvme");
    match (root.get("nvme_path"), on && nvme) {
        (Some(node), true) => to.put(&format!("zero_optimization.{section}.nvme_path"), "nvme_path", node.clone()),
        (None, true) => {
            if let Some(node) = device_node {
                let path = format!("zero_optimization.{section}.nvme_path");
                to.put(&path, "nvme_path (its default)", text("/local_nvme", node));
            }
        }
        (Some(node), false) if section == "offload_optimizer" => {
            let used = to.labels.iter().any(|(_, label)| label == "nvme_path");
            if !used {
                to.ignored("nvme_path", node, "no device is nvme");
            }
        }
        _ => {}
    }
}
