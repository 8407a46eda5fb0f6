//! The arguments of Hugging Face's Trainer, and the training files that are made of them: axolotl's, LLaMA-Factory's, TRL's.

use super::{
    accelerate, blocks, fsdp,
    rewrite::{Rewrite, joined, word},
    rules::LOOP,
    scalar,
};
use crate::policy::{
    ParamsDtype,
    source::{CALLEE, Entry, Node, Value},
    suggest,
};

/// Keys whose value is DeepSpeed's file, or what would be in it.
const FILES: &[&str] =
    &["deepspeed", "deepspeed_config", "deepspeed_config_file", "deepspeed_config_path", "ds_config"];

/// ms-swift's names of DeepSpeed configurations.
const SHORT: &[&str] = &["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"];

/// Keys that ask for 16 bits: what Trainer's are called, what axolotl's and LLaMA-Factory's are.
const FORMATS: &[(&str, ParamsDtype)] = &[
    ("bf16", ParamsDtype::Bfloat16),
    ("bfloat16", ParamsDtype::Bfloat16),
    ("pure_bf16", ParamsDtype::Bfloat16),
    ("fp16", ParamsDtype::Float16),
    ("float16", ParamsDtype::Float16),
];

/// The optimizers that compute what AdamW does here.
const ADAMW: &[&str] =
    &["adamw", "adam", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "fused_adam", "cpu_adam"];

/// Reads a training file.
pub(super) fn file(to: &mut Rewrite<'_>, prefix: &str, root: &Node) {
    let Value::Table(entries) = &root.value else { return };
    let names_file = |e: &&Entry| FILES.contains(&e.key.as_str());
    for Entry { key, node, .. } in entries.iter().filter(names_file) {
        deepspeed(to, &joined(prefix, key), node);
    }
    let swift = entries.iter().filter(names_file).any(|e| is_short(&e.node));
    for Entry { key, node, .. } in entries.iter().filter(|e| !names_file(e)) {
        let full = joined(prefix, key);
        let format = FORMATS.iter().find(|(name, _)| name == key);
        match (key.as_str(), &node.value) {
            (CALLEE, _) => to.names_class(&full, node),
            _ if format.is_some() => asks_for(to, &full, node, format.map(|(_, format)| *format)),
            ("fsdp", _) => sharded(to, &full, node),
            ("fsdp_config", Value::Table(_)) => fsdp::section(to, &full, node),
            ("fsdp_config", Value::Text(path)) if to.own.refers_to.is_none() && path.ends_with(".json") => {
                to.refer(&full, node, path);
                to.own.refers_to_fsdp = true;
            }
            ("optim" | "optimizer", Value::Text(name)) => optimizer(to, &full, name, node),
            ("gradient_checkpointing", Value::Text(word)) if word.starts_with("offload") => {
                fsdp::activations(to, &full, node);
            }
            ("activation_offloading" | "enable_activation_offloading", _) => fsdp::activations(to, &full, node),
            ("num_processes" | "nproc_per_node", _) => accelerate::processes(to, &full, node),
            ("num_machines", _) => accelerate::hosts(to, &full, node, false),
            ("nnodes", _) => accelerate::hosts(to, &full, node, true),
            ("torch_dtype", Value::Text(word)) if swift => of_model(to, &full, node, word),
            ("mixed_precision", _) => accelerate::mixed_precision(to, &full, node),
            _ => accelerate::beside(to, &full, key, node, LOOP),
        }
    }
}

fn deepspeed(to: &mut Rewrite<'_>, full: &str, node: &Node) {
    match &node.value {
        Value::Bool(true) => to.undecided(full, node, "says that DeepSpeed is used, and not how: import its file"),
        Value::Table(entries) if entries.is_empty() => to.ignored(full, node, "empty"),
        Value::Table(_) => blocks::inner(to, full, node),
        Value::Text(name) if is_short(node) => short(to, full, name.trim(), node),
        Value::Text(name) if !name.contains(['/', '.']) => match suggest::nearest(name, SHORT.iter().copied()) {
            Some(near) => {
                let note =
                    format!("is no name of a configuration (did you mean '{near}'?); if it is a file, import that");
                to.undecided(full, node, &note);
            }
            None => accelerate::refer(to, full, node),
        },
        _ => accelerate::refer(to, full, node),
    }
}

fn is_short(node: &Node) -> bool {
    matches!(&node.value, Value::Text(name) if SHORT.contains(&name.trim()))
}

/// ms-swift turns bf16 or fp16 on by the type that the model is loaded in, and its configurations leave both at `"auto"`.
fn of_model(to: &mut Rewrite<'_>, full: &str, node: &Node, word: &str) {
    match word.trim().trim_start_matches("torch.") {
        "bfloat16" => to.format(full, node, Some(ParamsDtype::Bfloat16)),
        "float16" => to.format(full, node, Some(ParamsDtype::Float16)),
        "float32" => to.format(full, node, None),
        _ => to.undecided(full, node, "is the type of the model's weights, which is not said here; set params.dtype"),
    }
}

/// A configuration that ms-swift brings along, by its name.
fn short(to: &mut Rewrite<'_>, full: &str, name: &str, node: &Node) {
    let (stage, offloads) = match name.strip_suffix("_offload") {
        Some(stage) => (stage, true),
        None => (name, false),
    };
    let stage = Value::Text(stage.replace("zero", "zero_"));
    to.put("zero_optimization.stage", &format!("{full} (stage)"), &Node { span: node.span.clone(), value: stage }, "");
    for section in ["offload_optimizer", "offload_param"] {
        if offloads && (section == "offload_optimizer" || name.starts_with("zero3")) {
            let path = format!("zero_optimization.{section}.device");
            to.put(&path, &format!("{full} ({section})"), &word("cpu", node), "");
        }
    }
}

/// `bf16: true`, and axolotl's `auto` and `full`.
fn asks_for(to: &mut Rewrite<'_>, full: &str, node: &Node, format: Option<ParamsDtype>) {
    let on = match &node.value {
        Value::Text(word) if ["auto", "full", "bfloat16", "float16"].contains(&word.trim()) => Ok(true),
        Value::Null => Ok(false),
        _ => scalar::flag(node).map(|on| on.value),
    };
    match on {
        Ok(true) => to.format(full, node, format),
        Ok(false) => to.format(full, node, None),
        Err(fault) => to.undecided(full, node, &fault),
    }
}

/// `fsdp: "full_shard auto_wrap offload"`, or the same as a list.
fn sharded(to: &mut Rewrite<'_>, full: &str, node: &Node) {
    let offloads = match &node.value {
        Value::Text(words) => words.split_whitespace().any(|word| word == "offload"),
        Value::List(items) => items.iter().any(|i| matches!(&i.value, Value::Text(word) if word == "offload")),
        _ => false,
    };
    match offloads {
        true => fsdp::offloaded(to, full, node),
        false => to.ignored(full, node, "about sharding over ranks"),
    }
}

fn optimizer(to: &mut Rewrite<'_>, full: &str, name: &str, node: &Node) {
    let same = ADAMW.contains(&name.trim().to_ascii_lowercase().as_str());
    if same {
        return to.ignored(
            full,
            node,
            "belongs to your training loop: funicular.AdamW takes lr, betas, eps and weight_decay",
        );
    }
    let note = match name.contains("adamw") || name.contains("adam") {
        true => "AdamW here keeps its states in fp32, in the tier of optimizer.tier: use funicular.AdamW",
        false => "has no kernel here; only AdamW has",
    };
    to.undecided(full, node, note);
}
