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
            let word = if found.key.ends_with("fp16") { "float16" } else { "bfloat16" };
            let note = format!(
                "is not a section: DeepSpeed wants {{\"enabled\": true}} in it; set params.dtype = \"{word}\" if that is meant"
            );
            return self.undecided(found, scalar::elsewhere(found.node).map_or(note, ToOwned::to_owned));
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
        let format = match found.key.starts_with("fp16") {
            true => ParamsDtype::Float16,
            false => ParamsDtype::Bfloat16,
        };
        let word = format.word();
        match (scalar::flag(found.node), self.around.half) {
            (Ok(on), _) if on.value && self.two_formats => self.undecided(
                found,
                format!(
                    "fp16 and bf16 are both on, which DeepSpeed refuses; for this one set params.dtype = \"{word}\""
                ),
            ),
            (Ok(on), _) if on.value => {
                self.out.policy.params.dtype = format;
                self.mapped(found, format!("params.dtype = \"{word}\""));
            }
            (Ok(_), _) => self.ignored(found, "off: the model's own number format counts"),
            (Err(_), Some(half)) if scalar::is_auto(found.node) => {
                let by = format!("as {} = {} says", half.item.key, half.item.value);
                match half.format {
                    Some(asked) if asked == format => self.mapped(found, format!("params.dtype = \"{word}\", {by}")),
                    _ => self.ignored(found, format!("off, {by}")),
                }
            }
            (Err(_), None) if scalar::is_auto(found.node) => self.undecided(
                found,
                format!("as your trainer is told: set params.dtype = \"{word}\", or convert the model yourself"),
            ),
            (Err(fault), _) => self.undecided(found, fault),
        }
    }

    /// The number format that the file around the configuration asks for: `"auto"` means it, and so does no section at all.
    pub(super) fn outer_format(&mut self) {
        let Some(half) = self.around.half else { return };
        let mut item = half.item.clone();
        let own = |section: &str| {
            self.root.get(section).and_then(|s| s.get("enabled")).map(scalar::flag).and_then(Result::ok)
        };
        let said = |sections: &[&str]| sections.iter().find_map(|s| own(s)).map(|on| on.value);
        let (bf16, fp16) = (said(&["bf16", "bfloat16"]), said(&["fp16"]));
        let against = match half.format {
            Some(ParamsDtype::Float16) => fp16 == Some(false) || bf16 == Some(true),
            Some(_) => bf16 == Some(false) || fp16 == Some(true),
            None => bf16 == Some(true) || fp16 == Some(true),
        };
        let list = if against {
            item.note = "contradicts the DeepSpeed configuration, which was taken".to_owned();
            &mut self.out.undecided
        } else if let Some(format) = half.format {
            self.out.policy.params.dtype = format;
            item.note = format!("params.dtype = \"{}\"", format.word());
            &mut self.out.mapped
        } else {
            item.note = "the model's own number format counts".to_owned();
            &mut self.out.ignored
        };
        list.push(item);
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

    /// What DeepSpeed's engine does to the training itself.
    pub(super) fn engine_feature(&mut self, found: Found<'_>) {
        if enabled(&found.node.value) {
            self.undecided(found, "DeepSpeed does this by itself, and nothing here does: do it in your training loop");
        } else {
            self.ignored(found, "off");
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

/// True if a section, or a part of it, is on.
fn enabled(value: &Value) -> bool {
    match value {
        Value::Bool(on) => *on,
        Value::Table(entries) => entries.iter().any(|Entry { key, node, .. }| match &node.value {
            Value::Table(_) => enabled(&node.value),
            _ => key == "enabled" && scalar::flag(node).is_ok_and(|on| on.value),
        }),
        _ => false,
    }
}
