//! accelerate's file and the arguments of its `DeepSpeedPlugin`, rewritten as a DeepSpeed configuration.

use super::{
    blocks, fsdp,
    kinds::{Kind, called, is_root_key, is_zero_key},
    rewrite::{Rewrite, joined},
    scalar,
};
use crate::policy::{
    ParamsDtype,
    source::{CALLEE, Entry, Node, Value},
    suggest,
};

/// Keys of the plugin and what they are in DeepSpeed's file.
const PLUGIN: &[(&str, &str)] = &[
    ("zero_stage", "zero_optimization.stage"),
    ("offload_optimizer_device", "zero_optimization.offload_optimizer.device"),
    ("offload_optimizer_nvme_path", "zero_optimization.offload_optimizer.nvme_path"),
    ("offload_param_device", "zero_optimization.offload_param.device"),
    ("offload_param_nvme_path", "zero_optimization.offload_param.nvme_path"),
    ("zero3_save_16bit_model", "zero_optimization.stage3_gather_16bit_weights_on_model_save"),
    ("gradient_clipping", "gradient_clipping"),
    ("gradient_accumulation_steps", "gradient_accumulation_steps"),
];

/// Keys of the plugin that have no part in DeepSpeed's file.
const PLUGIN_OTHER: &[(&str, &str)] = &[
    ("zero3_init_flag", "the model is wrapped after it is built here; from the meta device too"),
    ("deepspeed_hostfile", "about launching on several machines"),
    ("deepspeed_multinode_launcher", "about launching on several machines"),
    ("deepspeed_exclusion_filter", "about launching on several machines"),
    ("deepspeed_inclusion_filter", "about launching on several machines"),
    ("deepspeed", "this file configures it"),
    ("enable_deepspeed", "this file configures it"),
    ("is_train_batch_min", "belongs to your training loop"),
    ("enable_msamp", "about 8-bit communication between ranks"),
    ("msamp_opt_level", "about 8-bit communication between ranks"),
];

/// The keys that name DeepSpeed's own file.
const FILES: &[&str] = &["deepspeed_config_file", "hf_ds_config"];

/// Said of DeepSpeed's keys in a place where accelerate does not read them.
const NOT_READ: &str = " (accelerate does not read this key here; it belongs into DeepSpeed's own file)";

/// Reads accelerate's file.
pub(super) fn file(to: &mut Rewrite<'_>, prefix: &str, root: &Node) {
    let Value::Table(entries) = &root.value else { return };
    if let Some(node) = root.get("mixed_precision") {
        mixed_precision(to, &joined(prefix, "mixed_precision"), node);
    }
    // Its own block decides before what stands beside it.
    for Entry { key, node, .. } in entries {
        if let ("deepspeed_config" | "deepspeed_plugin", Value::Table(_)) = (key.as_str(), &node.value) {
            plugin(to, &joined(prefix, key), node);
        }
    }
    for Entry { key, node, .. } in entries {
        let full = joined(prefix, key);
        match (key.as_str(), &node.value) {
            ("deepspeed_config" | "deepspeed_plugin", Value::Table(_)) | ("mixed_precision", _) => {}
            ("deepspeed_plugins", Value::Table(_) | Value::List(_)) => plugins(to, &full, node),
            ("fsdp_config", Value::Table(keys)) if keys.is_empty() => to.ignored(&full, node, "empty"),
            ("deepspeed_config" | "fsdp_config", Value::Null) => to.ignored(&full, node, "empty"),
            ("deepspeed_config_file", _) => refer(to, &full, node),
            ("fsdp_config" | "fsdp_plugin", Value::Table(_)) => fsdp::section(to, &full, node),
            (CALLEE, _) => to.names_class(&full, node),
            ("num_processes", _) => processes(to, &full, node),
            ("num_machines", _) => hosts(to, &full, node, false),
            ("zero_optimization" | "aio" | "bf16" | "fp16", Value::Table(_)) => unread(to, &full, key, node, NOT_READ),
            ("debug", _) => to.ignored(&full, node, "belongs to your training loop"),
            _ => beside(to, &full, key, node, "about launching; belongs to your training loop"),
        }
    }
}

/// Reads the first of several plugins, each for a model of its own.
fn plugins(to: &mut Rewrite<'_>, full: &str, node: &Node) {
    let mut all = blocks::children(node).into_iter();
    let Some((first, taken)) = all.next() else { return to.ignored(full, node, "empty") };
    let place = joined(full, &first);
    plugin(to, &place, taken);
    for (key, node) in all {
        let note =
            format!("of another model than {place}, which was taken: put it into a file of its own to import it");
        to.undecided(&joined(full, &key), node, &note);
    }
}

/// Reads the plugin's keys.
pub(super) fn plugin(to: &mut Rewrite<'_>, prefix: &str, table: &Node) {
    let Value::Table(entries) = &table.value else { return };
    // The same keys stand in files of other programs, which read more than accelerate does.
    let place = prefix.rsplit('.').next().unwrap_or_default();
    let accelerates = ["deepspeed_config", "deepspeed_plugin"].contains(&place) || !called(table).is_empty();
    let remark = if accelerates { NOT_READ } else { "" };
    let named = entries.iter().any(|e| FILES.contains(&e.key.as_str()) && is_named(&e.node));
    // accelerate's own keys decide before those that it does not read.
    let (own, other): (Vec<&Entry>, Vec<&Entry>) =
        entries.iter().partition(|e| PLUGIN.iter().any(|(name, _)| *name == e.key));
    for Entry { key, node, .. } in own.into_iter().chain(other) {
        let full = joined(prefix, key);
        let mapped = PLUGIN.iter().find(|(name, _)| name == key);
        match (key.as_str(), &node.value) {
            (CALLEE, _) => to.names_class(&full, node),
            (name, _) if FILES.contains(&name) => refer(to, &full, node),
            ("mixed_precision", _) => mixed_precision(to, &full, node),
            _ if named && (mapped.is_some() || is_root_key(key) || is_zero_key(key)) => {
                to.ignored(&full, node, "the DeepSpeed file decides, except where it says \"auto\"");
            }
            (_, _) if mapped.is_some() => to.put(mapped.map_or("", |(_, path)| path), &full, node, ""),
            ("deepspeed_moe_layer_cls_names" | "transformer_moe_cls_names", Value::Null) => {
                to.ignored(&full, node, "empty");
            }
            ("deepspeed_moe_layer_cls_names" | "transformer_moe_cls_names", _) => {
                to.undecided(&full, node, "units.match takes names of modules, not of classes; name the modules");
            }
            _ if is_root_key(key) => unread(to, &full, key, node, remark),
            _ if is_zero_key(key) => unread_zero(to, &full, key, node, remark),
            _ => match PLUGIN_OTHER.iter().find(|(name, _)| name == key) {
                Some((_, why)) => to.ignored(&full, node, why),
                None if prefix.is_empty() => beside(to, &full, key, node, "belongs to your training loop"),
                None => unknown(to, &full, key, node),
            },
        }
    }
}

/// A key of DeepSpeed's where accelerate does not read it: taken over if it says where things live or in what format.
fn unread(to: &mut Rewrite<'_>, full: &str, key: &str, node: &Node, remark: &'static str) {
    match (key, &node.value) {
        ("zero_optimization", Value::Table(entries)) => {
            for Entry { key, node, .. } in entries {
                unread_zero(to, &joined(full, key), key, node, remark);
            }
        }
        ("bf16" | "bfloat16" | "fp16", _) if to.half.is_some() && !remark.is_empty() => {
            to.ignored(full, node, "accelerate does not read this key here; mixed_precision decides");
        }
        _ => to.put(key, full, node, remark),
    }
}

fn unread_zero(to: &mut Rewrite<'_>, full: &str, key: &str, node: &Node, remark: &'static str) {
    match remark.is_empty() || key == "stage" || key.contains("offload") {
        true => to.put(&format!("zero_optimization.{key}"), full, node, remark),
        false => to.ignored(full, node, remark.trim_matches([' ', '(', ')'])),
    }
}

fn unknown(to: &mut Rewrite<'_>, full: &str, key: &str, node: &Node) {
    let known = PLUGIN.iter().chain(PLUGIN_OTHER).map(|(name, _)| *name).chain(FILES.iter().copied());
    let hint = suggest::did_you_mean(key, known.chain(["deepspeed_moe_layer_cls_names", "mixed_precision"]));
    to.undecided(full, node, &format!("unknown key{hint}"));
}

/// A key beside those that are known: one that speaks of offloading is not passed over.
pub(super) fn beside(to: &mut Rewrite<'_>, full: &str, key: &str, node: &Node, why: &str) {
    match (blocks::offloading(key, node).is_empty(), Kind::of(node)) {
        (true, _) => to.ignored(full, node, why),
        (false, None) => to.undecided(full, node, blocks::SPEAKS),
        (false, Some(kind)) => {
            let note = format!("another {}: put it into a file of its own to import it", kind.name());
            to.undecided(full, node, &note);
        }
    }
}

fn is_named(node: &Node) -> bool {
    match &node.value {
        Value::Text(path) => !path.trim().is_empty() && path.trim() != "none",
        Value::Table(_) | Value::Code(_) => true,
        _ => false,
    }
}

/// A key whose value is the path of DeepSpeed's file, or what would be in it.
pub(super) fn refer(to: &mut Rewrite<'_>, full: &str, node: &Node) {
    match &node.value {
        Value::Text(path) if is_named(node) => to.refer(full, node, path.trim()),
        Value::Table(_) => blocks::inner(to, full, node),
        Value::Code(_) => to.undecided(full, node, "the script computes which file has the settings: import that file"),
        Value::Null | Value::Text(_) | Value::Bool(false) => to.ignored(full, node, "empty"),
        _ => to.undecided(full, node, "is neither a path nor a table"),
    }
}

/// `bf16`, `fp16`, `no`, and what YAML makes of a bare `no`.
pub(super) fn mixed_precision(to: &mut Rewrite<'_>, full: &str, node: &Node) {
    let word = match &node.value {
        Value::Text(word) => word.trim().to_ascii_lowercase(),
        Value::Null | Value::Bool(false) => "no".to_owned(),
        _ => "?".to_owned(),
    };
    match word.as_str() {
        "bf16" => to.format(full, node, Some(ParamsDtype::Bfloat16)),
        "fp16" => to.format(full, node, Some(ParamsDtype::Float16)),
        "no" | "none" | "" => to.format(full, node, None),
        "fp8" => to.undecided(full, node, "there are no 8-bit formats here; set params.dtype"),
        _ => to.undecided(full, node, "is not one of no, fp16, bf16; set params.dtype"),
    }
}

/// On how many hosts; `each` if another key says how many processes of each, and not how many of all.
pub(super) fn hosts(to: &mut Rewrite<'_>, full: &str, node: &Node, each: bool) {
    let note = match scalar::count(node) {
        Ok(read) if read.value <= 1 => return to.ignored(full, node, "one, as here"),
        Err(_) if matches!(node.value, Value::Null) => return to.ignored(full, node, "empty"),
        Err(_) => ": say how many processes there are in all",
        Ok(_) if !each => ": num_processes is the number of processes of all of them",
        Ok(read) => &format!(": multiply what is accumulated by {} besides for the same batch", read.value),
    };
    to.undecided(full, node, &format!("several hosts, and here a model trains on one{note}"));
}

/// How many took part: here as many processes of one host may, which hold the model once together.
pub(super) fn processes(to: &mut Rewrite<'_>, full: &str, node: &Node) {
    match scalar::count(node) {
        Ok(read) if read.value <= 1 => to.ignored(full, node, "one, as here"),
        Ok(read) => {
            let note = format!(
                "start as many here, on one host, by torchrun: they hold the model once together (funicular plan --ranks {0} says what it takes); with one process multiply what it accumulates by {0} for the same batch",
                read.value
            );
            to.undecided(full, node, &note);
        }
        Err(_) if scalar::is_auto(node) || matches!(node.value, Value::Null) => {
            to.ignored(full, node, "as many as are started here")
        }
        Err(_) => to.undecided(full, node, "says how many processes took part: start as many here, on one host"),
    }
}
