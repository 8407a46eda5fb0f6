//! Every key of a policy: its kind, its unit and what it means. The JSON Schema and the table in docs/policy.md come
//! from here; tests keep it in step with the Rust types.

use serde_json::{Value, json};

use super::{Policy, words};

/// One key.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// Dotted path; `override[]` stands for an item of the list.
    pub path: &'static str,
    /// What it takes.
    pub kind: Kind,
    /// What it means, one sentence or two.
    pub doc: &'static str,
}

/// What a key takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The schema's version.
    Version,
    /// `auto`, `host`, `cuda` or `cuda:N`.
    Device,
    /// A size with a unit, or `"auto"`.
    AutoSize,
    /// A size with a unit.
    Size,
    /// A number from 1 to 4096, or `"auto"`.
    AutoCount,
    /// A number from 1 to 4096, or `"off"`.
    OffCount,
    /// A whole number from 0.
    Count,
    /// True or false.
    Bool,
    /// One of these words.
    Word(&'static [&'static str]),
    /// Any text.
    Text,
    /// A pattern of names.
    Pattern,
    /// A list of patterns.
    Patterns,
    /// A list of directories.
    Paths,
    /// A list of step numbers.
    Steps,
}

const fn key(path: &'static str, kind: Kind, doc: &'static str) -> Key {
    Key { path, kind, doc }
}

/// Every key, in the order of the file.
pub const KEYS: &[Key] = &[
    key("version", Kind::Version, "Version of this schema. Defaults never change within a version."),
    key(
        "device",
        Kind::Device,
        "The compute tier: `cuda` is torch's current GPU, `host` the processor, `auto` the GPU if there is one.",
    ),
    key("budget.hbm", Kind::AutoSize, "Memory of the compute device for paged parameters, in bytes."),
    key(
        "budget.host",
        Kind::AutoSize,
        "Page-locked host memory for everything the runtime keeps there. `auto`: what the machine and the cgroup allow, less the reserve.",
    ),
    key("budget.nvme", Kind::AutoSize, "Space on all NVMe paths together. `auto`: what is needed, if it is free."),
    key(
        "budget.threads",
        Kind::AutoCount,
        "Threads of the CPU optimizer. `auto`: the CPUs this process may use (affinity and cgroup quota).",
    ),
    key(
        "budget.reserve",
        Kind::AutoSize,
        "Host memory left to others when `budget.host` is `auto`. `auto`: 8 % of what is available, at least 512MiB, at most 16GiB.",
    ),
    key(
        "nvme.paths",
        Kind::Paths,
        "Directories on local disks, striped by block. One per disk; relative ones start at the working directory. Empty: no NVMe tier.",
    ),
    key(
        "nvme.engine",
        Kind::Word(words::Engine::WORDS),
        "What moves bytes: `auto` takes io_uring where it works and threads elsewhere; a named engine that does not work is an error.",
    ),
    key("nvme.block", Kind::Size, "Size of one read or write and of a stripe: a power of two from 4KiB to 256MiB."),
    key(
        "nvme.queue_depth",
        Kind::AutoCount,
        "Reads and writes in flight per path, of several ranks together. `auto`: 32.",
    ),
    key(
        "nvme.direct",
        Kind::Word(words::Direct::WORDS),
        "Direct I/O past the page cache: `auto` where the file system takes it, `required` or an error, `off` never.",
    ),
    key("nvme.checksums", Kind::Bool, "Verify an XXH3 checksum of every segment read back."),
    key(
        "params.tier",
        Kind::Word(words::ParamsTier::WORDS),
        "Home of the parameters. `auto`: host memory while it lasts, then NVMe.",
    ),
    key(
        "params.dtype",
        Kind::Word(words::ParamsDtype::WORDS),
        "Number format that floating-point parameters are converted to when the model is offloaded, buffers not; `keep`: the model's own. Gradients have it too; masters and moments are fp32.",
    ),
    key(
        "optimizer.tier",
        Kind::Word(words::OptimizerTier::WORDS),
        "Home of the optimizer's states. `auto`: the fastest tier with room. `hbm` keeps the whole unit on the compute device.",
    ),
    key(
        "optimizer.spare",
        Kind::AutoSize,
        "Host memory for second places of parameters and states, so that updates run during backward. `auto`: half of what everything else leaves of `budget.host`; `0B`: none. States on NVMe have theirs on NVMe, where `budget.nvme` has room.",
    ),
    key(
        "optimizer.where",
        Kind::Word(words::UpdateOn::WORDS),
        "What updates the parameters whose home is the host or NVMe: `cpu`; `gpu`, through which the states pass; `auto`: both, as fast as each is seen to be. The bits are the same.",
    ),
    key(
        "gradients.tier",
        Kind::Word(words::GradientsTier::WORDS),
        "Home of the gradients of what is paged. `auto`: host memory, and NVMe only for units whose gradients make the model too large for it.",
    ),
    key(
        "units.match",
        Kind::Patterns,
        "Names of the modules that are paged as a whole. Empty: the blocks of the largest list of modules, and the rest grouped.",
    ),
    key(
        "override[].match",
        Kind::Pattern,
        "Units or parameters that this entry is for. The first entry that matches wins.",
    ),
    key("override[].params", Kind::Word(words::ParamsTier::WORDS), "Home of their parameters."),
    key("override[].optimizer", Kind::Word(words::OptimizerTier::WORDS), "Home of their optimizer states."),
    key(
        "prefetch.window",
        Kind::AutoSize,
        "Bytes fetched ahead of the unit that computes. `auto`: what the compute budget leaves.",
    ),
    key(
        "activations.micro_batch",
        Kind::OffCount,
        "Rows of the batch that a block takes at a time; only its inputs are kept for the backward, which runs it again. `off`: blocks run as they are.",
    ),
    key(
        "activations.tier",
        Kind::Word(words::ActivationsTier::WORDS),
        "Where the inputs of blocks that run in micro-batches wait for their backward.",
    ),
    key("debug.poison", Kind::Bool, "Fill released memory with NaN, so that a stale read cannot go unnoticed."),
    key(
        "debug.sync",
        Kind::Bool,
        "Nothing runs ahead: every transfer and update has ended when its call returns. Slow, for looking for faults.",
    ),
    key("debug.faults", Kind::Text, "Faults to inject, for tests only."),
    key(
        "log.level",
        Kind::Word(words::Level::WORDS),
        "The least level that comes to standard error where the program has set up no logging; the logger `funicular` itself is left alone.",
    ),
    key("log.every", Kind::Count, "One line of facts every so many steps; 0: none."),
    key("log.trace", Kind::Text, "File for a Chrome/Perfetto trace; empty: none. Only an earlier trace is replaced."),
    key("log.trace_steps", Kind::Steps, "The steps to trace, such as `[3, 4]`."),
    key(
        "log.nvtx",
        Kind::Bool,
        "NVTX ranges around forward and backward of every unit and around steps, for Nsight Systems; on a GPU only.",
    ),
    key(
        "pressure.action",
        Kind::Word(words::Pressure::WORDS),
        "When a budget does not hold what the tiers ask for: `refuse` stops with an error before anything is taken, `demote` places what does not fit one tier lower and says so.",
    ),
];

const SIZE: &str = r"^\s*[0-9]+(\.[0-9]+)?\s*(B|KiB|MiB|GiB|TiB|kB|KB|MB|GB|TB)\s*$";

/// The key of a dotted path.
pub fn find(path: &str) -> Option<&'static Key> {
    KEYS.iter().find(|k| k.path == path)
}

/// All dotted paths outside of `override`.
pub(crate) fn paths() -> Vec<&'static str> {
    KEYS.iter().map(|k| k.path).filter(|p| !p.contains('[')).collect()
}

impl Kind {
    /// The JSON Schema of a value of this kind.
    fn json_schema(self) -> Value {
        let size = json!({"type": "string", "pattern": SIZE, "examples": ["4GiB", "512MiB", "1.5GB"]});
        let count = json!({"type": "integer", "minimum": 1, "maximum": 4096});
        let list = |item: Value| json!({"type": "array", "items": item});
        match self {
            Self::Version => json!({"const": super::VERSION}),
            Self::Device => json!({"type": "string", "pattern": "^(auto|host|cuda(:[0-9]+)?)$"}),
            Self::AutoSize => json!({"anyOf": [{"const": "auto"}, size]}),
            Self::Size => size,
            Self::AutoCount => json!({"anyOf": [{"const": "auto"}, count]}),
            Self::OffCount => json!({"anyOf": [{"const": "off"}, count]}),
            Self::Count => json!({"type": "integer", "minimum": 0, "maximum": u32::MAX}),
            Self::Bool => json!({"type": "boolean"}),
            Self::Word(words) => json!({"enum": words}),
            Self::Text => json!({"type": "string"}),
            Self::Pattern => json!({"type": "string", "minLength": 1}),
            Self::Patterns => list(json!({"type": "string", "minLength": 1})),
            Self::Paths => list(json!({"type": "string", "minLength": 1, "pattern": "^[^~]"})),
            Self::Steps => list(json!({"type": "integer", "minimum": 0})),
        }
    }

    /// In words, for the table of the documentation.
    fn words(self) -> String {
        match self {
            Self::Version => "1".to_owned(),
            Self::Device => "`auto`, `host`, `cuda`, `cuda:N`".to_owned(),
            Self::AutoSize => "size or `auto`".to_owned(),
            Self::Size => "size".to_owned(),
            Self::AutoCount => "1 to 4096 or `auto`".to_owned(),
            Self::OffCount => "1 to 4096 or `off`".to_owned(),
            Self::Count => "number".to_owned(),
            Self::Bool => "true, false".to_owned(),
            Self::Word(words) => words.iter().map(|w| format!("`{w}`")).collect::<Vec<_>>().join(", "),
            Self::Text => "text".to_owned(),
            Self::Pattern => "pattern".to_owned(),
            Self::Patterns => "list of patterns".to_owned(),
            Self::Paths => "list of paths".to_owned(),
            Self::Steps => "list of numbers".to_owned(),
        }
    }
}

/// The JSON Schema (draft 2020-12) of a policy, for editors and other programs.
pub fn json_schema() -> Value {
    let mut root = object("A policy of funicular: what may be used, and what lives where.");
    root["$schema"] = json!("https://json-schema.org/draft/2020-12/schema");
    root["title"] = json!("funicular policy");
    let defaults = default_json();
    for key in KEYS {
        let mut schema = key.kind.json_schema();
        schema["description"] = json!(key.doc);
        if let Some(rest) = key.path.strip_prefix("override[].") {
            let list = &mut root["properties"]["override"];
            if list.is_null() {
                let mut item = object("Homes for units or parameters by name.");
                item["required"] = json!(["match"]);
                item["minProperties"] = json!(2);
                *list = json!({"type": "array", "items": item, "default": []});
            }
            list["items"]["properties"][rest] = schema;
            continue;
        }
        schema["default"] = defaults.pointer(&format!("/{}", key.path.replace('.', "/"))).cloned().unwrap_or_default();
        match key.path.split_once('.') {
            Some((section, leaf)) => {
                let table = &mut root["properties"][section];
                if table.is_null() {
                    *table = object(&format!("Section [{section}]."));
                }
                table["properties"][leaf] = schema;
            }
            None => root["properties"][key.path] = schema,
        }
    }
    root
}

fn object(description: &str) -> Value {
    json!({"type": "object", "additionalProperties": false, "description": description, "properties": {}})
}

fn default_json() -> Value {
    serde_json::to_value(Policy::default()).unwrap_or_default()
}

/// The table of keys that docs/policy.md contains.
pub fn markdown() -> String {
    let defaults = default_json();
    let mut out = String::from("| key | takes | default | meaning |\n|---|---|---|---|\n");
    for key in KEYS {
        let default = defaults.pointer(&format!("/{}", key.path.replace('.', "/")));
        let default = default.map_or_else(|| "none".to_owned(), |v| format!("`{v}`"));
        out += &format!("| `{}` | {} | {default} | {} |\n", key.path, key.kind.words(), key.doc);
    }
    out
}
