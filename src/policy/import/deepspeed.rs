//! DeepSpeed's configuration: every offload key, its unit and its traps.
//!
//! Other systems' files (accelerate, Lightning) are first rewritten as this one; `labels` then gives the names that
//! the user wrote.

use super::{
    Hints, Imported, Item,
    aio::Aio,
    report::Found,
    rewrite::{Around, joined},
    rules::{LOOP, OPTIMIZER, PARAM, ROOT, ROOT_LOOP, Rule, Rules, ZERO},
    scalar::{self, Read, bytes},
};
use crate::{
    policy::{
        OptimizerTier, ParamsTier,
        source::{CALLEE, Entry, Node, Source, Value},
        suggest,
    },
    quantities::{ByteCount, Tier},
};

/// Sections that send parameters away from the GPU, and those that send anything.
const PARAMS_AWAY: &[&str] = &["offload_param", "cpu_offload_params"];
const ANY_AWAY: &[&str] = &["offload_param", "cpu_offload_params", "offload_optimizer", "cpu_offload"];

/// An import under way.
pub(super) struct Import<'a> {
    source: &'a Source<'a>,
    pub(super) hints: Hints,
    pub(super) around: Around<'a>,
    pub(super) out: Imported,
    /// Bytes of a parameter: 4 if the file turns half precision off, else 2.
    pub(super) element: u64,
    pub(super) super_offload: bool,
    /// fp16 and bf16 are both on.
    pub(super) two_formats: bool,
    param_tier: Option<Tier>,
    optimizer_tier: Option<Tier>,
    aio: Aio,
    pub(super) root: &'a Node,
}

/// Imports a tree.
pub(super) fn import(source: &Source<'_>, root: &Node, around: Around<'_>) -> Imported {
    let on = |path: [&str; 2]| root.get(path[0]).and_then(|s| s.get(path[1])).map(scalar::flag).and_then(Result::ok);
    let named = ["bf16", "bfloat16", "fp16"].map(|section| on([section, "enabled"]));
    let asked = around.half.is_some_and(|half| half.format.is_some());
    let full = !asked && named.iter().any(Option::is_some) && named.iter().flatten().all(|on| !on.value);
    let on = named.map(|on| on.is_some_and(|on| on.value));
    let super_offload = root
        .get("zero_optimization")
        .and_then(|z| z.get("offload_optimizer")?.get("super_offload"))
        .is_some_and(|node| scalar::flag(node).is_ok_and(|on| on.value));
    let mut import = Import {
        source,
        hints: around.hints,
        around,
        out: Imported::new(source.name()),
        element: if full { 4 } else { 2 },
        super_offload,
        two_formats: (on[0] || on[1]) && on[2],
        param_tier: None,
        optimizer_tier: None,
        aio: Aio::default(),
        root,
    };
    import.walk("", root, ROOT, Import::other_root);
    import.finish();
    import.out.sort();
    import.out
}

impl<'a> Import<'a> {
    // What a key becomes.

    pub(super) fn mapped(&mut self, found: Found<'_>, note: impl Into<String>) {
        let item = self.item(found, note);
        self.out.mapped.push(item);
    }

    pub(super) fn ignored(&mut self, found: Found<'_>, note: impl Into<String>) {
        let item = self.item(found, note);
        self.out.ignored.push(item);
    }

    pub(super) fn undecided(&mut self, found: Found<'_>, note: impl Into<String>) {
        let item = self.item(found, note);
        self.out.undecided.push(item);
    }

    fn item(&self, found: Found<'_>, note: impl Into<String>) -> Item {
        let Some(label) = self.around.labels.iter().find(|label| label.path == found.key) else {
            return Item::new(self.source, found, note);
        };
        let note: String = note.into();
        Item::new(self.source, Found { key: &label.name, ..found }, note + label.remark)
    }

    /// Applies rules to the entries of a table; `other` takes the keys that have none.
    fn walk(&mut self, path: &str, table: &Node, rules: Rules, other: fn(&mut Self, Found<'_>, &str, Rules)) {
        let Value::Table(entries) = &table.value else { return };
        for Entry { key, node, .. } in entries {
            let full = joined(path, key);
            let found = Found { key: &full, node };
            match rules.iter().find(|(name, _)| name == key) {
                Some((_, rule)) => self.apply(*rule, found),
                None => other(self, found, key, rules),
            }
        }
    }

    pub(super) fn apply(&mut self, rule: Rule, found: Found<'_>) {
        match rule {
            Rule::Ignore(why) => self.ignored(found, why),
            Rule::Elements(why) => {
                let note = format!("{}{why}", self.elements_note(found.node));
                self.ignored(found, note);
            }
            Rule::IfThere(_) if matches!(found.node.value, Value::Null | Value::Bool(false)) => {
                self.ignored(found, "off");
            }
            Rule::IfThere(why) => self.undecided(found, why),
            Rule::IfTrue(why) => match scalar::flag(found.node) {
                Ok(Read { value: false, .. }) => self.ignored(found, "off"),
                Ok(Read { value: true, .. }) => self.undecided(found, why),
                Err(fault) => self.undecided(found, fault),
            },
            Rule::Do(read) => read(self, found),
        }
    }

    /// `1e9 elements, 1.9 GiB; ` if it is a number.
    fn elements_note(&self, node: &Node) -> String {
        match scalar::count(node) {
            Ok(Read { value, .. }) => match bytes(value, self.element) {
                Some(bytes) => format!("{value} elements, {bytes}; "),
                None => "no limit; ".to_owned(),
            },
            Err(_) => String::new(),
        }
    }

    fn other_root(&mut self, found: Found<'_>, key: &str, rules: Rules) {
        if ROOT_LOOP.contains(&key) {
            return self.ignored(found, LOOP);
        }
        match key.strip_prefix("argument ") {
            _ if key == CALLEE
                && matches!(&found.node.value, Value::Text(name) if OF_THEIR_ARGUMENTS.contains(&name.as_str())) =>
            {
                return;
            }
            // `ds = json.load(f)`, and then `ds["zero_optimization"] = ...`.
            _ if key == CALLEE => {
                let note = "makes the rest of the configuration, which is not seen: import the file that it reads";
                return self.undecided(Found { key: "made by", ..found }, note);
            }
            Some(_) => return self.ignored(found, "an argument of the call that makes the configuration"),
            None => {}
        }
        if key.starts_with(['_', '/', '#']) || key.contains(' ') || key.contains("comment") {
            return self.ignored(found, "a comment");
        }
        let offload = ZERO.iter().chain(PARAM).chain(OPTIMIZER).any(|(name, _)| *name == key);
        if offload {
            return self.undecided(
                found,
                "DeepSpeed reads this key inside zero_optimization only; move it there and import again",
            );
        }
        match suggest::nearest(key, rules.iter().map(|(name, _)| *name)) {
            Some(near) => self.undecided(found, format!("unknown key (did you mean '{near}'?)")),
            None if speaks_of_offloading(key, found.node) => {
                self.undecided(found, "unknown key that speaks of offloading");
            }
            None => self.ignored(found, "not about offload; belongs to your training loop"),
        }
    }

    fn other_section(&mut self, found: Found<'_>, key: &str, rules: Rules) {
        if key.starts_with(['_', '/', '#']) || key.contains(' ') || key.contains("comment") {
            return self.ignored(found, "a comment");
        }
        let hint = suggest::did_you_mean(key, rules.iter().map(|(name, _)| *name));
        self.undecided(found, format!("unknown key{hint}; DeepSpeed refuses keys that it does not know"));
    }

    fn section(&mut self, found: Found<'_>, rules: Rules) {
        match &found.node.value {
            Value::Table(entries) if entries.is_empty() => self.ignored(found, "empty"),
            Value::Table(_) => self.walk(found.key, found.node, rules, Import::other_section),
            Value::Null => self.ignored(found, "empty"),
            _ => self.undecided(found, "is not a section"),
        }
    }

    pub(super) fn zero(&mut self, found: Found<'_>) {
        match found.node.value {
            Value::Bool(_) => self.undecided(found, "deprecated form; write a section with stage and offload_*"),
            _ => self.section(found, ZERO),
        }
    }

    pub(super) fn offload_param(&mut self, found: Found<'_>) {
        self.offload(found, PARAM, Import::param_device);
    }

    pub(super) fn offload_optimizer(&mut self, found: Found<'_>) {
        self.offload(found, OPTIMIZER, Import::optimizer_device);
    }

    /// A section with a device in it; a flag or a device in its place is what it says.
    fn offload(&mut self, found: Found<'_>, rules: Rules, device: fn(&mut Self, Found<'_>)) {
        match &found.node.value {
            Value::Bool(_) | Value::Text(_) => device(self, found),
            Value::Table(_) if found.node.get("device").is_none() && scalar::elsewhere(found.node).is_none() => {
                self.section(found, rules);
                let key = format!("{}.device", found.key);
                let note =
                    "is missing: DeepSpeed's code takes none for it, its documentation cpu; set the tier in the policy";
                let nothing = Node { span: found.node.span.clone(), value: Value::Null };
                self.undecided(Found { key: &key, node: &nothing }, note);
            }
            _ if let Some(fault) = scalar::elsewhere(found.node) => self.undecided(found, fault),
            _ => self.section(found, rules),
        }
    }

    pub(super) fn stage(&mut self, found: Found<'_>) {
        // `ZERO_3` and the like, as files write it that are read by other programs.
        let named = match &found.node.value {
            Value::Text(text) => text.trim().to_ascii_lowercase().strip_prefix("zero_").and_then(|n| n.parse().ok()),
            _ => None,
        };
        let stage = named.map(Value::Integer).map(Node::made);
        match scalar::count(stage.as_ref().unwrap_or(found.node)) {
            Ok(Read { value: 3, .. }) => {
                self.ignored(found, "parameters are always paged here; nothing is partitioned over ranks")
            }
            Ok(Read { value: stage @ 0..=2, .. }) => {
                let homes = match self.asks_away(PARAMS_AWAY) {
                    _ if stage == 0 && self.asks_away(ANY_AWAY) => {
                        ", states too; offload_* have no effect there in DeepSpeed; the tiers are what they say here: set \"auto\" if that is not meant"
                    }
                    true => {
                        "; offload_param has no effect there in DeepSpeed, and params.tier is what it says here: set \"auto\" if it is not meant"
                    }
                    false => "; here they are paged through budget.hbm: raise it to hold them all, or leave \"auto\"",
                };
                self.undecided(found, format!("stage {stage} keeps all parameters on the GPU{homes}"));
            }
            _ => self.undecided(found, scalar::elsewhere(found.node).unwrap_or("is not a stage from 0 to 3")),
        }
    }

    // Where things live.

    /// True if the file names a device to keep parameters on that is not the GPU.
    /// Whether one of these sections sends something away.
    fn asks_away(&self, sections: &[&str]) -> bool {
        let zero = self.root.get("zero_optimization");
        let asked = sections.iter().filter_map(|section| zero?.get(section));
        asked.map(|node| &node.get("device").unwrap_or(node).value).any(|value| match value {
            Value::Bool(on) => *on,
            Value::Text(word) => ["cpu", "nvme", "true"].contains(&word.trim().to_ascii_lowercase().as_str()),
            _ => false,
        })
    }

    fn device(&mut self, found: Found<'_>) -> Option<Tier> {
        let word = match &found.node.value {
            Value::Null | Value::Bool(false) => "none",
            Value::Bool(true) => "cpu",
            Value::Text(text) => text.trim(),
            _ => "",
        };
        if let Some(fault) = scalar::elsewhere(found.node) {
            self.undecided(found, fault);
            return None;
        }
        if word == "auto" {
            // accelerate puts its own `offload_..._device` there.
            let tier = if found.key.contains("param") { "params.tier" } else { "optimizer.tier" };
            self.undecided(
                found,
                format!("is what your launcher says, such as accelerate's own configuration; set {tier}"),
            );
            return None;
        }
        match word.to_ascii_lowercase().as_str() {
            "none" | "false" => Some(Tier::Hbm),
            "cpu" | "true" => Some(Tier::Host),
            "nvme" => Some(Tier::Nvme),
            _ => {
                let hint = suggest::did_you_mean(word, ["none", "cpu", "nvme"]);
                self.undecided(found, format!("is not one of none, cpu, nvme{hint}"));
                None
            }
        }
    }

    pub(super) fn param_device(&mut self, found: Found<'_>) {
        let Some(tier) = self.device(found) else { return };
        self.param_tier = Some(tier);
        let (tier, note) = match tier {
            Tier::Hbm => {
                (ParamsTier::Auto, "params.tier = \"auto\"; as many stay on the GPU as budget.hbm has room for")
            }
            Tier::Host => (ParamsTier::Host, "params.tier = \"host\""),
            Tier::Nvme => (ParamsTier::Nvme, "params.tier = \"nvme\""),
        };
        self.out.policy.params.tier = tier;
        self.mapped(found, format!("{note}{}", not_a_section(found)));
    }

    pub(super) fn optimizer_device(&mut self, found: Found<'_>) {
        let Some(tier) = self.device(found) else { return };
        self.optimizer_tier = Some(tier);
        let (tier, note) = match tier {
            Tier::Hbm => (OptimizerTier::Auto, "optimizer.tier = \"auto\"; the fastest tier with room"),
            Tier::Host => (OptimizerTier::Host, "optimizer.tier = \"host\""),
            Tier::Nvme => (OptimizerTier::Nvme, "optimizer.tier = \"nvme\""),
        };
        self.out.policy.optimizer.tier = tier;
        self.mapped(found, format!("{note}{}", not_a_section(found)));
    }

    pub(super) fn old_cpu_offload(&mut self, found: Found<'_>) {
        self.old_flag(found, "offload_optimizer", |import| {
            import.optimizer_tier = Some(Tier::Host);
            import.out.policy.optimizer.tier = OptimizerTier::Host;
            "optimizer.tier = \"host\" (deprecated key)"
        });
    }

    pub(super) fn old_cpu_offload_param(&mut self, found: Found<'_>) {
        self.old_flag(found, "offload_param", |import| {
            import.param_tier = Some(Tier::Host);
            import.out.policy.params.tier = ParamsTier::Host;
            "params.tier = \"host\" (deprecated key)"
        });
    }

    /// A deprecated boolean that a newer section replaces.
    fn old_flag(&mut self, found: Found<'_>, newer: &str, set: fn(&mut Self) -> &'static str) {
        let replaced = self.root.get("zero_optimization").and_then(|z| z.get(newer)).is_some();
        match scalar::flag(found.node) {
            Err(fault) => self.undecided(found, fault),
            Ok(_) if replaced => self.ignored(found, format!("deprecated; {newer} is there too and decides")),
            Ok(Read { value: false, .. }) => self.ignored(found, "deprecated, and off"),
            Ok(Read { value: true, .. }) => {
                let note = set(self);
                self.mapped(found, note);
            }
        }
    }

    pub(super) fn nvme_path(&mut self, found: Found<'_>) {
        let (section, _) = found.key.rsplit_once('.').unwrap_or_default();
        let zero = self.root.get("zero_optimization");
        let device = section.rsplit_once('.').and_then(|(_, s)| zero?.get(s)?.get("device"));
        let used = matches!(device, Some(Node { value: Value::Text(t), .. }) if t.trim().eq_ignore_ascii_case("nvme"));
        let Value::Text(path) = &found.node.value else {
            return match found.node.value {
                Value::Null => self.ignored(found, "empty"),
                _ => self.undecided(found, scalar::elsewhere(found.node).unwrap_or("is not a path")),
            };
        };
        if !used {
            return self.ignored(found, "the device beside it is not nvme");
        }
        if scalar::is_auto(found.node) {
            let note = "is what your launcher says; set nvme.paths to a directory on a local disk";
            return self.undecided(found, note);
        }
        let filled_in = scalar::elsewhere(found.node).is_some() || path.contains('$');
        if path.trim().is_empty() || path.starts_with('~') || filled_in {
            return self.undecided(found, "nothing expands this path; set nvme.paths to a directory on a local disk");
        }
        let path = std::path::PathBuf::from(path.trim());
        let paths = &mut self.out.policy.nvme.paths;
        if paths.iter().any(|p| p.components().eq(path.components())) {
            return self.mapped(found, "nvme.paths (the same directory)");
        }
        paths.push(path);
        let note = match paths.len() {
            1 => "nvme.paths".to_owned(),
            n => format!("nvme.paths, number {n}: blocks are striped over all of them, so put them on different disks"),
        };
        self.mapped(found, note);
    }

    pub(super) fn pin_memory(&mut self, found: Found<'_>) {
        match scalar::flag(found.node) {
            Ok(Read { value: true, .. }) => self.ignored(found, "host memory is always page-locked here, at its exact size"),
            Ok(Read { value: false, .. }) => self.undecided(
                found,
                "host memory is always page-locked here, at its exact size (DeepSpeed's default was false before August 2026); set budget.host if the machine must keep more for others",
            ),
            Err(fault) => self.undecided(found, fault),
        }
    }

    // Asynchronous I/O.

    pub(super) fn aio(&mut self, found: Found<'_>) {
        self.read_aio(found, "");
    }

    pub(super) fn nested_aio(&mut self, found: Found<'_>) {
        self.read_aio(found, " (DeepSpeed refuses aio inside zero_optimization; it belongs to the top level)");
    }

    fn read_aio(&mut self, found: Found<'_>, misplaced: &'static str) {
        let Value::Table(entries) = &found.node.value else {
            return self.undecided(found, "is not a section");
        };
        let mut aio = std::mem::take(&mut self.aio);
        for entry in entries {
            aio.read(self, found.key, entry, misplaced);
        }
        self.aio = aio;
    }

    /// What depends on several keys.
    fn finish(&mut self) {
        let aio = std::mem::take(&mut self.aio);
        aio.finish(self);
        let nvme = [self.param_tier, self.optimizer_tier].contains(&Some(Tier::Nvme));
        if nvme && self.out.policy.nvme.paths.is_empty() {
            let note = "a device is nvme and no nvme_path can be used: set nvme.paths to a directory on a local disk";
            self.out.undecided.push(Item::missing(note));
        }
        self.outer_format();
    }
}

/// Calls that make nothing but what their arguments say.
const OF_THEIR_ARGUMENTS: &[&str] = &["dict", "DeepSpeedConfig", "HfDeepSpeedConfig"];

/// What is to be said of a device that stands where DeepSpeed wants a section.
fn not_a_section(found: Found<'_>) -> &'static str {
    match found.key.ends_with("device") {
        true => "",
        false => " (DeepSpeed wants a section with a device here)",
    }
}

/// True for a key whose name says that something is offloaded, and whose value does not say no.
pub(super) fn speaks_of_offloading(key: &str, node: &Node) -> bool {
    let off = match &node.value {
        Value::Null | Value::Bool(false) | Value::Integer(0) => true,
        Value::Text(text) => matches!(text.trim().to_ascii_lowercase().as_str(), "" | "no" | "none" | "false"),
        _ => false,
    };
    !off && key.to_ascii_lowercase().contains("offload")
}

/// `, written as a string`, or nothing.
pub(super) fn remark<T>(read: &Read<T>) -> String {
    read.remark.map_or_else(String::new, |r| format!(", {r}"))
}

/// The largest size that a block may have.
pub(super) const MAX_BLOCK: ByteCount = ByteCount::mib(256);
