//! Which format a table is of, by its keys.

use super::rules::{PARAM, ROOT, ROOT_LOOP, ZERO};
use crate::policy::source::{CALLEE, Node, Value};

/// A format that can be imported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// DeepSpeed's configuration.
    DeepSpeed,
    /// What belongs into its section `zero_optimization`, by itself.
    Zero,
    /// accelerate's file.
    Accelerate,
    /// The arguments of accelerate's `DeepSpeedPlugin`.
    Plugin,
    /// The arguments of Hugging Face's Trainer, and the training files of axolotl, LLaMA-Factory and others made of them.
    Trainer,
    /// Arguments of Lightning's strategies, or of its `Trainer` and `Fabric`.
    Lightning,
    /// Settings of FSDP.
    Fsdp,
}

/// What an error calls all of them.
pub(super) const KNOWN: &str =
    "those of DeepSpeed, accelerate, the Hugging Face Trainer (axolotl, LLaMA-Factory), Lightning and FSDP";

impl Kind {
    /// What notes call it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::DeepSpeed | Self::Zero => "DeepSpeed configuration",
            Self::Accelerate | Self::Plugin => "accelerate configuration",
            Self::Trainer => "training configuration",
            Self::Lightning => "Lightning configuration",
            Self::Fsdp => "FSDP configuration",
        }
    }

    /// The format of a table, or of a text that names a strategy under the key `strategy`.
    pub(super) fn of(node: &Node) -> Option<Self> {
        let Value::Table(_) = &node.value else { return None };
        let called = called(node);
        if let Some(kind) = by_call(called, node) {
            return Some(kind);
        }
        let is = |key: &str, of: fn(&Value) -> bool| node.get(key).is_some_and(|n| of(&n.value));
        let table = |value: &Value| matches!(value, Value::Table(_));
        let plugin = node.get("deepspeed_config").is_some_and(is_plugin);
        let launcher = ACCELERATE_OWN.iter().filter(|key| node.get(key).is_some()).count();
        if plugin || launcher > 1 || (launcher == 1 && ["deepspeed_config", "fsdp_config"].iter().any(|k| is(k, table)))
        {
            return Some(Self::Accelerate);
        }
        if is_deepspeed(node) {
            return Some(Self::DeepSpeed);
        }
        if ["deepspeed", "fsdp", "fsdp_config"].iter().any(|key| node.get(key).is_some()) && !is_switch(node) {
            return Some(Self::Trainer);
        }
        if is_plugin(node) {
            return Some(Self::Plugin);
        }
        if is_lightning(node) {
            return Some(Self::Lightning);
        }
        if is_zero(node) {
            return Some(Self::Zero);
        }
        if FSDP_OFFLOAD.iter().chain(FSDP_OWN).any(|key| node.get(key).is_some()) {
            return Some(Self::Fsdp);
        }
        (TRAINER_OWN.iter().filter(|key| node.get(key).is_some()).count() > 2).then_some(Self::Trainer)
    }
}

/// What a table is an instance of, if it says so: a call of Python, Hydra's `_target_`, LightningCLI's `class_path`.
pub(super) fn called(node: &Node) -> &str {
    match node.get(CALLEE).or_else(|| node.get("class_path")).map(|n| &n.value) {
        Some(Value::Text(name)) => name,
        _ => "",
    }
}

fn by_call(name: &str, node: &Node) -> Option<Kind> {
    let class = name.rsplit('.').next().unwrap_or_default();
    Some(match class {
        "DeepSpeedStrategy" | "FSDPStrategy" | "DDPFullyShardedNativeStrategy" => Kind::Lightning,
        "DeepSpeedPlugin" if is_plugin(node) => Kind::Plugin,
        "DeepSpeedPlugin" => Kind::Lightning,
        "FullyShardedDataParallelPlugin" | "FullyShardedDataParallel" | "FSDP" | "fully_shard" => Kind::Fsdp,
        "Accelerator"
            if ["deepspeed_plugin", "deepspeed_plugins", "fsdp_plugin"].iter().any(|key| node.get(key).is_some()) =>
        {
            Kind::Accelerate
        }
        "Trainer" | "Fabric" if node.get("strategy").is_some() => Kind::Lightning,
        // DeepSpeed's own `deepspeed.initialize(config=...)`.
        "initialize"
            if name.starts_with("deepspeed.") && node.get("config").or(node.get("config_params")).is_some() =>
        {
            Kind::Lightning
        }
        "DeepSpeedConfig" | "HfDeepSpeedConfig" if is_deepspeed(node) => Kind::DeepSpeed,
        class if class.ends_with("TrainingArguments") && node.get("deepspeed").or(node.get("fsdp")).is_some() => {
            Kind::Trainer
        }
        _ => return None,
    })
}

/// `deepspeed: true` is a switch of scripts that have accelerate's keys beside it.
fn is_switch(node: &Node) -> bool {
    matches!(node.get("deepspeed"), Some(Node { value: Value::Bool(_), .. })) && is_plugin(node)
}

fn is_plugin(node: &Node) -> bool {
    PLUGIN_OWN.iter().any(|key| node.get(key).is_some())
        // Lightning writes `offload_params_device` beside it.
        || (node.get("offload_optimizer_device").is_some() && !is_lightning(node))
}

pub(super) fn is_deepspeed(node: &Node) -> bool {
    let section = |key: &str| matches!(node.get(key), Some(Node { value: Value::Table(_), .. }));
    let switch = |key: &str| node.get(key).is_some_and(|n| n.get("enabled").is_some());
    let aio = node.get("aio").is_some_and(|n| n.get("block_size").or(n.get("queue_depth")).is_some());
    let flag = matches!(node.get("zero_optimization"), Some(Node { value: Value::Bool(_), .. })) && !is_lightning(node);
    let own = DEEPSPEED_OWN.iter().filter(|key| node.get(key).is_some()).count();
    let halves = ["fp16", "bf16", "bfloat16"].iter().filter(|key| switch(key)).count();
    section("zero_optimization") || section("zero_optimisation") || flag || aio || own + halves > 1
}

fn is_zero(node: &Node) -> bool {
    let device = |key: &str| node.get(key).is_some_and(|n| n.get("device").is_some());
    let staged = node.get("stage").is_some() && ZERO.iter().filter(|(key, _)| node.get(key).is_some()).count() > 1;
    staged || device("offload_param") || device("offload_optimizer")
}

fn is_lightning(node: &Node) -> bool {
    let strategy = match node.get("strategy") {
        Some(Node { value: Value::Text(name), .. }) => name.starts_with("deepspeed") || name.starts_with("fsdp"),
        Some(inner @ Node { value: Value::Table(_), .. }) => Kind::of(inner) == Some(Kind::Lightning),
        _ => false,
    };
    let beside = node.get("strategy").is_some() && TRAINER_OF_LIGHTNING.iter().any(|key| node.get(key).is_some());
    strategy || beside || LIGHTNING_OWN.iter().any(|key| node.get(key).is_some())
}

/// True for a key of the root of DeepSpeed's configuration.
pub(super) fn is_root_key(key: &str) -> bool {
    ROOT.iter().any(|(name, _)| *name == key) || ROOT_LOOP.contains(&key)
}

/// True for a key of its section `zero_optimization`.
pub(super) fn is_zero_key(key: &str) -> bool {
    ZERO.iter().any(|(name, _)| *name == key) && PARAM.iter().all(|(name, _)| *name != key)
}

/// Keys that only accelerate's file has.
const ACCELERATE_OWN: &[&str] = &[
    "compute_environment",
    "distributed_type",
    "machine_rank",
    "main_training_function",
    "num_machines",
    "num_processes",
    "rdzv_backend",
    "downcast_bf16",
    "same_network",
];

/// Keys that only accelerate's plugin has.
const PLUGIN_OWN: &[&str] = &[
    "zero_stage",
    "offload_param_device",
    "offload_optimizer_nvme_path",
    "offload_param_nvme_path",
    "zero3_init_flag",
    "zero3_save_16bit_model",
    "deepspeed_config_file",
    "hf_ds_config",
];

/// Keys that make a DeepSpeed configuration when there are two of them.
const DEEPSPEED_OWN: &[&str] = &[
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "prescale_gradients",
    "communication_data_type",
    "activation_checkpointing",
    "gradient_clipping",
    "gradient_accumulation_steps",
];

/// Keys that only Lightning's strategy has.
const LIGHTNING_OWN: &[&str] =
    &["offload_parameters", "offload_params_device", "params_buffer_count", "optimizer_buffer_count", "remote_device"];

const TRAINER_OF_LIGHTNING: &[&str] = &["accelerator", "devices", "max_epochs", "precision", "num_nodes", "max_steps"];

/// Keys that turn FSDP's offload on.
pub(super) const FSDP_OFFLOAD: &[&str] = &["fsdp_offload_params", "offload_params", "fsdp_cpu_offload_params"];

/// Keys that only accelerate's settings of FSDP have.
const FSDP_OWN: &[&str] = &[
    "fsdp_auto_wrap_policy",
    "fsdp_backward_prefetch",
    "fsdp_sharding_strategy",
    "fsdp_state_dict_type",
    "fsdp_transformer_layer_cls_to_wrap",
];

/// Keys of training files, of which three make one.
const TRAINER_OWN: &[&str] = &[
    "base_model",
    "model_name_or_path",
    "output_dir",
    "per_device_train_batch_size",
    "micro_batch_size",
    "learning_rate",
    "num_train_epochs",
    "num_epochs",
    "finetuning_type",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "lr_scheduler_type",
    "lr_scheduler",
    "logging_steps",
    "save_steps",
    "sequence_len",
    "cutoff_len",
    "do_train",
    "warmup_ratio",
    "bf16",
    "fp16",
];
