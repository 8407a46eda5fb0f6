//! DeepSpeed's keys about the update, number formats and modules.

use super::{
    deepspeed::Import,
    report::Found,
    rules::{LOOP, Rule},
    scalar,
};
use crate::policy::{
    ParamsDtype, Pattern,
    source::{Entry, Value},
};

impl Import<'_> {
    pub(super) fn ratio(&mut self, found: Found<'_>) {
        match scalar::share(found.node) {
            Err(fault) => self.undecided(found, fault),
            Ok(1.0) => self.ignored(found, "1: the whole update runs on the CPU, as here"),
            Ok(_) => self.undecided(
                found,
                "the rest of the update ran on the GPU; optimizer.tier and optimizer.where = \"auto\" leave the split to the planner",
            ),
        }
    }

    pub(super) fn cores(&mut self, found: Found<'_>) {
        match scalar::share(found.node) {
            Err(fault) => self.undecided(found, fault),
            Ok(_) if !self.super_offload => self.ignored(found, "read only with super_offload"),
            Ok(share) => {
                self.undecided(found, format!("set budget.threads to {share} of the CPUs of the machine that trains"))
            }
        }
    }

    pub(super) fn optimizer(&mut self, found: Found<'_>) {
        let kind = found.node.get("type").map(|node| &node.value);
        match kind {
            Some(Value::Text(kind)) if !["adamw", "adam"].contains(&kind.to_ascii_lowercase().as_str()) => {
                let note = format!("'{kind}' has no kernel here; only AdamW has");
                self.undecided(found, note);
            }
            _ => self
                .ignored(found, "belongs to your training loop: funicular.AdamW takes lr, betas, eps and weight_decay"),
        }
    }

    pub(super) fn half(&mut self, found: Found<'_>) {
        let Value::Table(entries) = &found.node.value else {
            return self.undecided(found, "is not a section");
        };
        for Entry { key, node, .. } in entries {
            let full = format!("{}.{key}", found.key);
            let found = Found { key: &full, node };
            match key.as_str() {
                "bf16_master_weights_and_grads" | "fp16_master_weights_and_grads" | "bf16_optimizer_states" => {
                    self.apply(Rule::IfTrue("master weights and states are always 32 bits here"), found);
                }
                "enabled" => self.format(found),
                _ => self.ignored(found, LOOP),
            }
        }
    }

    /// The number format that DeepSpeed would convert the model to.
    fn format(&mut self, found: Found<'_>) {
        let (format, word) = match found.key.starts_with("fp16") {
            true => (ParamsDtype::Float16, "float16"),
            false => (ParamsDtype::Bfloat16, "bfloat16"),
        };
        match scalar::flag(found.node) {
            Ok(on) if on.value => {
                self.out.policy.params.dtype = format;
                self.mapped(found, format!("params.dtype = \"{word}\""));
            }
            Ok(_) => self.ignored(found, "off: the model's own number format counts"),
            Err(_) if matches!(&found.node.value, Value::Text(text) if text == "auto") => {
                self.undecided(
                    found,
                    format!("as your trainer is told: set params.dtype = \"{word}\", or convert the model yourself"),
                );
            }
            Err(fault) => self.undecided(found, fault),
        }
    }

    pub(super) fn data_types(&mut self, found: Found<'_>) {
        let Value::Table(entries) = &found.node.value else {
            return self.undecided(found, "is not a section");
        };
        for Entry { key, node, .. } in entries {
            let full = format!("{}.{key}", found.key);
            let found = Found { key: &full, node };
            match (key.as_str(), &node.value) {
                ("grad_accum_dtype", Value::Text(t)) if t == "fp32" && self.element == 2 => {
                    self.undecided(
                        found,
                        "several backwards are summed in the parameter's number format, as in plain PyTorch; activations.micro_batch sums in fp32",
                    );
                }
                _ => self.ignored(found, LOOP),
            }
        }
    }

    pub(super) fn checkpointing(&mut self, found: Found<'_>) {
        let cpu = found.node.get("cpu_checkpointing").is_some_and(|n| scalar::flag(n).is_ok_and(|on| on.value));
        if cpu {
            self.undecided(found, "cpu_checkpointing: activations.tier = \"host\" does it for blocks that run in micro-batches: set activations.micro_batch too");
        } else {
            self.ignored(found, "belongs to your training loop: torch.utils.checkpoint works as it is");
        }
    }

    pub(super) fn leaf_module(&mut self, found: Found<'_>) {
        let Value::Table(entries) = &found.node.value else {
            return self.undecided(found, "is not a section");
        };
        if entries.is_empty() {
            return self.ignored(found, "empty");
        }
        for Entry { key, node, .. } in entries {
            let full = format!("{}.{key}", found.key);
            let found = Found { key: &full, node };
            let prefix = match key.as_str() {
                "names" => "",
                "name_suffixes" => "*",
                "classes" => {
                    self.undecided(found, "units.match takes names of modules, not of classes; name the modules");
                    continue;
                }
                _ => {
                    self.undecided(found, "unknown key; DeepSpeed refuses it");
                    continue;
                }
            };
            self.unit_names(found, prefix);
        }
    }

    fn unit_names(&mut self, found: Found<'_>, prefix: &str) {
        let Value::List(items) = &found.node.value else {
            return self.undecided(found, "is not a list of names");
        };
        let names = items.iter().map(|item| match &item.value {
            Value::Text(name) => Pattern::new(&format!("{prefix}{name}")).ok(),
            _ => None,
        });
        match names.collect::<Option<Vec<_>>>() {
            Some(patterns) if patterns.is_empty() => self.ignored(found, "empty"),
            Some(patterns) => {
                self.out.policy.units.patterns.extend(patterns);
                self.mapped(found, "units.match");
            }
            None => self.undecided(found, "is not a list of names"),
        }
    }
}
