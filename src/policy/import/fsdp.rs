//! Settings of FSDP: what it offloads goes to host memory, parameters and states together.

use super::{
    accelerate::beside,
    rewrite::{AUTOCAST, Rewrite, joined},
    scalar,
};
use crate::policy::{
    OptimizerTier, ParamsTier,
    source::{CALLEE, Entry, Node, Value},
};

const RANKS: &str = "about sharding over ranks";

/// Keys of a file that `fsdp_config` names.
const OWN: &[&str] = &[
    "activation_checkpointing",
    "auto_wrap_policy",
    "backward_prefetch",
    "cpu_offload",
    "cpu_ram_efficient_loading",
    "forward_prefetch",
    "limit_all_gathers",
    "min_num_params",
    "offload_params",
    "reshard_after_forward",
    "sync_module_states",
    "transformer_layer_cls_to_wrap",
    "use_orig_params",
    "version",
    "xla",
];

/// Reads a section; `path` is the name of it.
pub(super) fn section(to: &mut Rewrite<'_>, path: &str, table: &Node) {
    let Value::Table(entries) = &table.value else { return };
    for Entry { key, node, .. } in entries {
        let full = joined(path, key);
        match (key.strip_prefix("fsdp_").unwrap_or(key), &node.value) {
            (CALLEE | "class_path", _) => to.names_class(&full, node),
            ("init_args", Value::Table(_)) => section(to, &full, node),
            ("offload_params" | "cpu_offload" | "cpu_offload_params" | "offload_policy", _) => offload(to, &full, node),
            (
                "activation_checkpointing" | "activation_checkpointing_reentrant" | "activation_checkpointing_policy",
                _,
            ) => {
                to.ignored(&full, node, "belongs to your training loop: torch.utils.checkpoint works as it is");
            }
            ("activation_cpu_offload" | "activation_offload", _) => activations(to, &full, node),
            (
                "auto_wrap_policy"
                | "transformer_layer_cls_to_wrap"
                | "min_num_params"
                | "transformer_cls_names_to_wrap",
                _,
            ) => {
                to.ignored(
                    &full,
                    node,
                    "what is paged as a whole is found by itself; units.match takes names of modules",
                );
            }
            ("cpu_ram_efficient_loading", _) => {
                to.ignored(&full, node, "offload(meta, checkpoint=) streams weights from files");
            }
            ("mixed_precision" | "mixed_precision_policy" | "mp_policy", _) => {
                to.ignored(&full, node, AUTOCAST);
            }
            (_, Value::Table(_)) => beside(to, &full, key, node, RANKS),
            (name, _) => beside(to, &full, name, node, RANKS),
        }
    }
}

/// True for a table that has a key of FSDP's settings.
pub(super) fn is_section(node: &Node) -> bool {
    let Value::Table(entries) = &node.value else { return false };
    entries.iter().any(|e| e.key.starts_with("fsdp_") || OWN.contains(&e.key.as_str()))
}

/// A flag, or an object such as `CPUOffload(offload_params=True)` and `CPUOffloadPolicy()`.
pub(super) fn offload(to: &mut Rewrite<'_>, full: &str, node: &Node) {
    let on = match &node.value {
        Value::Null => Ok(false),
        Value::Table(_) if super::kinds::called(node).ends_with("CPUOffloadPolicy") => Ok(true),
        Value::Table(_) if super::kinds::called(node).ends_with("OffloadPolicy") => Ok(false),
        Value::Table(entries) => {
            // LightningCLI writes arguments beside the class.
            let given = node.get("init_args").unwrap_or(node);
            match given.get("offload_params").or_else(|| given.get("argument 1")) {
                Some(inner) => scalar::flag(inner).map(|on| on.value),
                None if entries.is_empty() || super::kinds::called(node).ends_with("CPUOffload") => Ok(false),
                None => Err(super::blocks::SPEAKS.to_owned()),
            }
        }
        _ => scalar::flag(node).map(|on| on.value),
    };
    match on {
        Ok(true) => offloaded(to, full, node),
        Ok(false) => to.ignored(full, node, "off"),
        Err(fault) => to.undecided(full, node, &fault),
    }
}

/// Says that FSDP offloads. Where DeepSpeed is configured too, that decides.
pub(super) fn offloaded(to: &mut Rewrite<'_>, full: &str, node: &Node) {
    if !to.is_empty() || (to.own.refers_to.is_some() && !to.own.refers_to_fsdp) {
        return to.undecided(full, node, "DeepSpeed is configured too, and was taken");
    }
    to.own.policy.params.tier = ParamsTier::Host;
    to.own.policy.optimizer.tier = OptimizerTier::Host;
    to.mapped(full, node, "params.tier = \"host\" and optimizer.tier = \"host\"");
}

/// Activations that wait in host memory.
pub(super) fn activations(to: &mut Rewrite<'_>, full: &str, node: &Node) {
    match scalar::flag(node) {
        Ok(on) if !on.value => to.ignored(full, node, "off"),
        _ => to.undecided(
            full,
            node,
            "activations.tier = \"host\" does it for blocks that run in micro-batches: set activations.micro_batch too",
        ),
    }
}
