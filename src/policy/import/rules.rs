//! Every key of a DeepSpeed configuration and what becomes of it.

use super::{deepspeed::Import, report::Found};

/// What to do with a key.
#[derive(Clone, Copy)]
pub(super) enum Rule {
    /// It has no meaning here, because.
    Ignore(&'static str),
    /// A size in elements without meaning here, because.
    Elements(&'static str),
    /// It changes what is computed only when true: this is to be decided.
    IfTrue(&'static str),
    /// It changes what is computed where it is there: this is to be decided.
    IfThere(&'static str),
    /// Read by code.
    Do(fn(&mut Import<'_>, Found<'_>)),
}

pub(super) type Rules = &'static [(&'static str, Rule)];

pub(super) const LOOP: &str = "belongs to your training loop";
const RANKS: &str = "about communication between ranks";
const BLOCKS: &str = "the pool here is made of blocks of one size and is never too small for a parameter";
const PLANNER: &str = "decided from the learned order of use";
const ALWAYS: &str = "always done here";

pub(super) const ROOT: Rules = &[
    ("zero_optimization", Rule::Do(|to, found| to.zero(found))),
    ("aio", Rule::Do(|to, found| to.aio(found))),
    ("bf16", Rule::Do(|to, found| to.half(found))),
    ("bfloat16", Rule::Do(|to, found| to.half(found))),
    ("fp16", Rule::Do(|to, found| to.half(found))),
    ("optimizer", Rule::Do(|to, found| to.optimizer(found))),
    ("data_types", Rule::Do(|to, found| to.data_types(found))),
    ("activation_checkpointing", Rule::Do(|to, found| to.checkpointing(found))),
    ("amp", Rule::Do(|to, found| to.engine_feature(found))),
    ("compression_training", Rule::Do(|to, found| to.engine_feature(found))),
    ("curriculum_learning", Rule::Do(|to, found| to.engine_feature(found))),
    ("data_efficiency", Rule::Do(|to, found| to.engine_feature(found))),
    ("hybrid_engine", Rule::Do(|to, found| to.engine_feature(found))),
    ("pipeline", Rule::Do(|to, found| to.engine_feature(found))),
    ("progressive_layer_drop", Rule::Do(|to, found| to.engine_feature(found))),
    ("weight_quantization", Rule::Do(|to, found| to.engine_feature(found))),
    ("zero_force_ds_cpu_optimizer", Rule::Ignore("the update has its own kernels here")),
    ("zero_allow_untested_optimizer", Rule::Ignore("the optimizer is your own object here")),
    (
        "gradient_clipping",
        Rule::Ignore("belongs to your training loop: call clip_grad_norm_ between backward and step"),
    ),
    ("gradient_accumulation_steps", Rule::Ignore("belongs to your training loop: call backward as often before step")),
];

/// Keys of the root that are known and are not about offload; others that look like a slip need a decision.
pub(super) const ROOT_LOOP: &[&str] = &[
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "steps_per_print",
    "wall_clock_breakdown",
    "scheduler",
    "dump_state",
    "prescale_gradients",
    "gradient_predivide_factor",
    "sparse_gradients",
    "communication_data_type",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "comet",
    "flops_profiler",
    "comms_logger",
    "sparse_attention",
    "checkpoint",
    "elasticity",
    "autotuning",
    "eigenvalue",
    "tensor_parallel",
    "sequence_parallel_size",
    "compile",
    "memory_breakdown",
    "seq_parallel_communication_data_type",
    "disable_allgather",
    "fp32_allreduce",
    "moe",
    "torch_autocast",
    "load_universal_checkpoint",
    "use_data_before_expert_parallelism",
    "graph_harvesting",
    "zero_allow_comm_data_type_fp32",
];

pub(super) const ZERO: Rules = &[
    ("stage", Rule::Do(|to, found| to.stage(found))),
    ("offload_param", Rule::Do(|to, found| to.offload_param(found))),
    ("offload_optimizer", Rule::Do(|to, found| to.offload_optimizer(found))),
    ("aio", Rule::Do(|to, found| to.nested_aio(found))),
    ("cpu_offload", Rule::Do(|to, found| to.old_cpu_offload(found))),
    ("cpu_offload_param", Rule::Do(|to, found| to.old_cpu_offload_param(found))),
    ("cpu_offload_params", Rule::Do(|to, found| to.old_cpu_offload_param(found))),
    ("cpu_offload_use_pin_memory", Rule::Do(|to, found| to.pin_memory(found))),
    ("sub_group_size", Rule::Do(|to, found| to.sub_group(found))),
    ("stage3_max_live_parameters", Rule::Do(|to, found| to.max_live(found))),
    ("max_live_parameters", Rule::Do(|to, found| to.max_live(found))),
    ("stage3_prefetch_bucket_size", Rule::Do(|to, found| to.prefetch(found))),
    ("prefetch_bucket_size", Rule::Do(|to, found| to.prefetch(found))),
    ("leaf_module", Rule::Do(|to, found| to.leaf_module(found))),
    ("stage3_max_reuse_distance", Rule::Elements(PLANNER)),
    ("max_reuse_distance", Rule::Elements(PLANNER)),
    (
        "stage3_param_persistence_threshold",
        Rule::Elements("small parameters are paged together with their unit, so none need to stay"),
    ),
    (
        "param_persistence_threshold",
        Rule::Elements("small parameters are paged together with their unit, so none need to stay"),
    ),
    ("stage3_model_persistence_threshold", Rule::Elements("what budget.hbm has room for stays")),
    ("model_persistence_threshold", Rule::Elements("what budget.hbm has room for stays")),
    ("stage3_module_granularity_threshold", Rule::Elements("modules are grouped into units by themselves")),
    ("module_granularity_threshold", Rule::Elements("modules are grouped into units by themselves")),
    ("stage3_gather_16bit_weights_on_model_save", Rule::Ignore("whole weights are always saved here")),
    ("stage3_gather_fp16_weights_on_model_save", Rule::Ignore("deprecated; whole weights are always saved here")),
    ("gather_16bit_weights_on_model_save", Rule::Ignore("whole weights are always saved here")),
    ("stage3_use_all_reduce_for_fetch_params", Rule::Ignore(RANKS)),
    ("stage3_allgather_sequential", Rule::Ignore(RANKS)),
    ("save_muon_momentum_buffer_in_memory", Rule::IfTrue("only AdamW has a kernel here")),
    ("reduce_bucket_size", Rule::Elements(RANKS)),
    ("allgather_bucket_size", Rule::Elements(RANKS)),
    ("reduce_scatter", Rule::Ignore(RANKS)),
    ("allgather_partitions", Rule::Ignore(RANKS)),
    ("use_multi_rank_bucket_allreduce", Rule::Ignore(RANKS)),
    ("round_robin_gradients", Rule::Ignore(RANKS)),
    ("overlap_comm", Rule::Ignore("transfers always overlap with compute here")),
    ("contiguous_gradients", Rule::Ignore("gradients always have one segment per unit here")),
    ("zero_hpz_partition_size", Rule::Ignore(RANKS)),
    ("zero_quantized_weights", Rule::Ignore(RANKS)),
    ("zero_quantized_nontrainable_weights", Rule::Ignore(RANKS)),
    ("zero_quantized_gradients", Rule::Ignore(RANKS)),
    ("zeropp_loco_param", Rule::Ignore(RANKS)),
    (
        "zenflow",
        Rule::IfThere(
            "ZenFlow updates most parameters steps later; here every step updates all, and is hidden as far as it can be",
        ),
    ),
    ("mics_shard_size", Rule::Ignore(RANKS)),
    ("mics_hierarchical_params_gather", Rule::Ignore(RANKS)),
    ("elastic_checkpoint", Rule::Ignore("checkpoints here are by parameter name and load on any number of GPUs")),
    ("load_from_fp32_weights", Rule::Ignore("masters are always exact here")),
    ("ignore_unused_parameters", Rule::Ignore("unused parameters are never an error here")),
    ("legacy_stage1", Rule::Ignore("deprecated; about partitioning over ranks")),
    ("memory_efficient_linear", Rule::Ignore("any module works as it is here")),
    ("override_module_apply", Rule::Ignore("the model is wrapped after it is built here")),
    ("enable_sanity_checks", Rule::Ignore("checks are always on here")),
    ("pipeline_loading_checkpoint", Rule::Ignore("loading always streams here")),
    ("log_trace_cache_warnings", Rule::Ignore("a wrong guess of the order is counted here, never an error")),
];

pub(super) const PARAM: Rules = &[
    ("device", Rule::Do(|to, found| to.param_device(found))),
    ("nvme_path", Rule::Do(|to, found| to.nvme_path(found))),
    ("pin_memory", Rule::Do(|to, found| to.pin_memory(found))),
    ("buffer_count", Rule::Ignore(BLOCKS)),
    ("buffer_size", Rule::Elements(BLOCKS)),
    ("max_in_cpu", Rule::Do(|to, found| to.max_in_cpu(found))),
];

pub(super) const OPTIMIZER: Rules = &[
    ("device", Rule::Do(|to, found| to.optimizer_device(found))),
    ("nvme_path", Rule::Do(|to, found| to.nvme_path(found))),
    ("pin_memory", Rule::Do(|to, found| to.pin_memory(found))),
    ("buffer_count", Rule::Ignore(BLOCKS)),
    ("buffer_size", Rule::Elements(BLOCKS)),
    ("fast_init", Rule::Ignore(ALWAYS)),
    ("pipeline_read", Rule::Ignore("reads always overlap with the update here")),
    ("pipeline_write", Rule::Ignore("writes always overlap with the update here")),
    ("pipeline", Rule::Ignore("DeepSpeed derives it and refuses it as an input; reads and writes always overlap here")),
    ("ratio", Rule::Do(|to, found| to.ratio(found))),
    ("super_offload", Rule::IfTrue("there is no such mode here; the planner weighs the measured link")),
    ("cpuadam_cores_perc", Rule::Do(|to, found| to.cores(found))),
];
