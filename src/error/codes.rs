//! All codes: what they mean, and what to do. docs/errors.md and `funicular errors` are made of this.

/// Family of an error: decides the Python exception class it becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// A mistake in arguments or policy: `ValueError`.
    Usage,
    /// A budget that does not hold what is asked: `MemoryError`.
    Budget,
    /// Disk and file trouble: `OSError`.
    Storage,
    /// Device trouble or a broken invariant: `RuntimeError`.
    Runtime,
}

/// A code of any kind, as it is looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// `FN-E201` and the like.
    pub code: &'static str,
    /// Its family, or `Warning` or `Fact`.
    pub family: &'static str,
    /// One line of explanation.
    pub meaning: &'static str,
    /// What to do; empty where there is nothing.
    pub action: &'static str,
}

macro_rules! codes {
    ($($name:ident = $text:literal, $family:ident, $doc:literal, $action:literal;)*) => {
        /// Stable codes of errors.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Code { $(#[doc = $doc] $name,)* }
        impl Code {
            /// All codes, in order.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];
            /// `FN-E201` and the like.
            pub const fn as_str(self) -> &'static str { match self { $(Self::$name => $text,)* } }
            /// One line of explanation.
            pub const fn summary(self) -> &'static str { match self { $(Self::$name => $doc,)* } }
            /// Its family.
            pub const fn family(self) -> Family { match self { $(Self::$name => Family::$family,)* } }
        }
        /// What is to be said of every error, in order.
        const ERRORS: &[Entry] = &[$(Entry { code: $text, family: stringify!($family), meaning: $doc, action: $action },)*];
    };
}

codes! {
    NoCuda = "FN-E001", Runtime, "no CUDA driver, or no device of that number",
        "Check `nvidia-smi` and `CUDA_VISIBLE_DEVICES`. Without a GPU, keep the model on the CPU: everything works there.";
    Cuda = "FN-E002", Runtime, "a CUDA call failed",
        "The message names the call. After an illegal address or a similar fault the process must end; run again with `debug.poison = true` and `CUDA_LAUNCH_BLOCKING=1` to find where it comes from.";
    NoCompiler = "FN-E003", Runtime, "CUDA's run-time compiler is missing or refuses a kernel",
        "Install a CUDA build of torch, which brings `libnvrtc` along; one rank may keep the update on the CPU instead: `[optimizer] where = \"cpu\"`.";
    Stale = "FN-E101", Runtime, "bytes of another generation than expected: a bug of funicular",
        "Nothing wrong was computed: this stopped it. Report it with the message and the policy.";
    Stuck = "FN-E102", Runtime, "nothing moved for too long; the message says what was waited for",
        "If it waited for a disk, look for errors in the system's log (`dmesg`). If not, report it with the message.";
    Forked = "FN-E103", Runtime, "used in a forked child; the runtime belongs to its parent",
        "Start workers with `spawn` or `forkserver`, or do not touch the offloaded model in them. Data-loader workers that never touch it are fine. A child forked after its parent offloaded cannot offload a model of its own either. Told on standard error by a process that ends by SIGSEGV: it read a raw address of its parent's; give it a copy made before the fork.";
    Closed = "FN-E104", Runtime, "used after it was closed, or after an earlier failure",
        "Look for the first error in the log: this one only follows it. Wrap the model again.";
    Panicked = "FN-E105", Runtime, "a worker thread panicked: a bug of funicular",
        "Report it with the message.";
    Interrupted = "FN-E106", Runtime, "a wait was interrupted by a signal, or a signal handler asked for what it must not",
        "Nothing: training can go on with the next forward. A handler may read weights and states and call `funicular.save`; for the rest, set a flag in it and look at that between steps.";
    NoThread = "FN-E107", Runtime, "the system refused a thread",
        "Raise `ulimit -u` or the container's limit on processes, or lower what the message names (`budget.threads`, `nvme.queue_depth`).";
    Argument = "FN-E108", Usage, "a number or name given to the core is out of range",
        "The message names it. Nothing was done. Only programs that call `funicular._core` by themselves see this; if yours does not, report it.";
    Wrapped = "FN-E110", Usage, "the model is offloaded already",
        "Call `funicular.offload` once for the outermost module, or `funicular.unwrap` first.";
    MetaWeights = "FN-E111", Usage, "a parameter on the meta device has no weights to load",
        "Materialise it and load its weights before the call.";
    UnsupportedParam = "FN-E112", Usage, "a parameter cannot be paged or stepped: its type, layout, size or origin",
        "Use fp32, bf16 or fp16 and a dense layout, or keep that module out of the model that is offloaded. Models of DTensors are for `torch.optim`; one made under `inference_mode` becomes ordinary by `copy.deepcopy`.";
    AliasedParam = "FN-E113", Usage, "parameters share storage in a way that cannot be paged",
        "Tie whole parameters (the same object under two names), not overlapping views.";
    NotOffloaded = "FN-E114", Usage, "the model is not offloaded",
        "Call `funicular.offload(model, policy)` before, and give that model or a module that wraps it, not a part of it.";
    Moved = "FN-E115", Usage, "an offloaded parameter cannot change device, type, shape or memory",
        "Do it before `funicular.offload`, or after `funicular.unwrap`. Send clones of weights to other processes. `fully_shard` and `parallelize_module` cannot be combined with it.";
    SparseGrad = "FN-E116", Usage, "sparse gradients are not supported",
        "Build the embedding with `sparse=False`.";
    OptimizerOption = "FN-E117", Usage, "an optimizer option is not supported",
        "The message names the option; leave it out.";
    LostEdit = "FN-E118", Usage, "a weight was edited where the edit cannot count",
        "Edit the parameter itself, under `torch.no_grad()`, not a view or its memory taken before, while its module runs.";
    GradInUse = "FN-E119", Runtime, "something looks at an old gradient in a way that cannot be followed",
        "Keep `p.grad.clone()` instead.";
    BlockCut = "FN-E120", Usage, "what a block takes or gives cannot be cut along the batch",
        "The message names the argument or output. Give it the batch as first dimension, or 1 if it is the same for all rows; with a cache of keys, pass `use_cache=False`. Or set `[activations] micro_batch = \"off\"`.";
    BlockEffect = "FN-E121", Usage, "a block in micro-batches does more than compute its outputs",
        "The message says what: it changes a buffer, a weight or an argument in place, or keeps a tensor with its graph. Return such tensors, or set `[activations] micro_batch = \"off\"`.";
    BlockTwice = "FN-E122", Usage, "a block in micro-batches cannot be differentiated twice",
        "Leave out `create_graph=True`, or set `[activations] micro_batch = \"off\"`.";
    Scripted = "FN-E123", Usage, "a TorchScript module cannot be paged",
        "Offload the module that it was made from, or keep it out of the model that is offloaded.";
    Captured = "FN-E126", Usage, "an offloaded model cannot be traced or exported",
        "Export `copy.deepcopy(model)`, or call `funicular.unwrap(model)` first.";
    FullGraph = "FN-E127", Usage, "a function compiled with `fullgraph=True` was given an offloaded parameter or its gradient",
        "Give it `p.detach()` and `p.grad.clone()`, or leave `fullgraph=True` out: then it runs in parts. Blocks that are compiled are not concerned.";
    OptimizerState = "FN-E130", Usage, "a state of the optimizer cannot be used by a step",
        "The message names parameter and entry. Nothing was stepped: put the entry right in `opt.state[p]`, or start anew with `opt.state.pop(p)`.";
    OptimizerParam = "FN-E131", Usage, "an optimizer holds parameters without memory",
        "The model has others in their place. Make the optimizer anew, from `model.parameters()`.";
    MovedByOthers = "FN-E140", Usage, "another library moves the model's weights, or replicates them",
        "Load the model without `device_map`, remove accelerate's hooks, and leave out `nn.DataParallel` and FSDP: `funicular.offload` places weights itself.";
    TrainerSetting = "FN-E141", Usage, "a trainer's setting does not go with an offloaded model",
        "The message names the setting, and what to say in its place.";
    HbmBudget = "FN-E201", Budget, "the compute tier's budget is too small",
        "Raise `[budget] hbm` to at least what the message says, or make the units smaller with `[units] match`.";
    HostBudget = "FN-E202", Budget, "the host budget is too small",
        "Raise `[budget] host` to at least what the message says, or put more on disk: `[optimizer] tier = \"nvme\"`.";
    NvmeBudget = "FN-E203", Budget, "the NVMe budget is too small",
        "Raise `[budget] nvme` to at least what the message says.";
    HostAlloc = "FN-E204", Budget, "the system refused memory",
        "Lower `[budget] host`, or raise the limit that the message names (container, `ulimit -l`).";
    ReadBudget = "FN-E205", Budget, "reading parameters or optimizer states outside of a step needs more host memory than is allowed",
        "Raise `[budget] host`, or read fewer at once and drop them before the next. `state_dict()` of an optimizer needs none of the budget: its copies are yours.";
    IoFailed = "FN-E301", Storage, "a read or write failed",
        "The message gives file, offset and error number. Check the disk and the system's log.";
    Corrupted = "FN-E302", Storage, "bytes read are not the bytes written",
        "Do not trust this disk or its path: check it, then go on from the last checkpoint.";
    CheckpointSpace = "FN-E401", Storage, "not enough free space for a checkpoint",
        "The message says what is needed and what is free. Nothing was written; earlier checkpoints are whole. Free space, or save to another disk; where the message says that no more files fit, remove files.";
    CheckpointExists = "FN-E402", Usage, "a checkpoint would replace what is there",
        "Name another path. `overwrite=True` replaces an earlier checkpoint that its manifest proves, never anything else.";
    CheckpointWrite = "FN-E403", Storage, "a checkpoint cannot be written there",
        "The message gives the path and the system's reason: read-only, permissions, a failing disk. Earlier checkpoints are whole, and training can go on.";
    CheckpointMissing = "FN-E404", Usage, "there is no checkpoint at that path",
        "Check the path. Download models of a hub first, and convert pickles to safetensors. `funicular checkpoint ls` lists what is there; a save that was killed leaves nothing under its name.";
    CheckpointVersion = "FN-E405", Usage, "a checkpoint of another version of the format",
        "Load it with the version of funicular that the manifest names, and save it anew.";
    CheckpointDamaged = "FN-E406", Storage, "a checkpoint is not what was written",
        "The message names file and tensor. Load an earlier checkpoint; check the disk.";
    CheckpointMismatch = "FN-E407", Usage, "a checkpoint of another model or optimizer",
        "The message lists names that are missing, unexpected, or of another shape or type.";
    CheckpointValue = "FN-E408", Usage, "something cannot be part of a checkpoint",
        "The message names it. `extra` and `get_extra_state` take what JSON can hold; other optimizers' states are saved by themselves.";
    CheckpointMemory = "FN-E409", Budget, "saving or loading needs more host memory than is left of the budget",
        "Raise `[budget] host` by what the message says.";
    CheckpointPartial = "FN-E410", Runtime, "a load failed halfway, and the model holds parts of two states",
        "Load a whole checkpoint; until then nothing runs, so that nothing wrong is computed.";
    CheckpointChanged = "FN-E411", Runtime, "something was changed while it was being saved",
        "Nothing was kept of that save. Do not edit resident tensors before the save has ended, or save with `wait=True`.";
    CheckpointCancelled = "FN-E412", Runtime, "a save was given up",
        "It was interrupted, or its model was closed before it had ended. Earlier checkpoints are whole.";
    PolicySyntax = "FN-E501", Usage, "the policy file cannot be parsed",
        "The message gives line and column.";
    PolicyKey = "FN-E502", Usage, "unknown key in the policy",
        "The message gives the line and the nearest known key.";
    PolicyValue = "FN-E503", Usage, "a value in the policy is not of the right kind",
        "The message gives the line and what is allowed. Sizes need a unit: `\"24 GiB\"`.";
    PolicyFile = "FN-E504", Usage, "a policy, a profile or a configuration to import cannot be read",
        "Check the path and its permissions. It must be a regular file.";
    PlannedModel = "FN-E505", Usage, "the model to plan cannot be read or built",
        "Give `funicular plan` a directory with `config.json` or safetensors files, a function that returns the model as `module:function`, or `--params` and `--layers`. Download models of a hub first.";
    UnitsMatch = "FN-E506", Usage, "no module of the model matches `units.match`",
        "Give patterns of names of the model's modules, such as `model.layers.*`; `funicular plan --units` lists the units. Without the key, blocks are found by themselves.";
    ImportFormat = "FN-E507", Usage, "a configuration of another system in a format that is not known",
        "The message names the formats that `funicular policy import` knows. Give it the file that has the settings, or write the policy by hand.";
    EngineUnavailable = "FN-E601", Storage, "the requested I/O engine does not work here",
        "Use `[nvme] engine = \"auto\"` or `\"threads\"`. Docker's default profile forbids io_uring.";
    NoDirectIo = "FN-E602", Storage, "direct I/O was required and does not work here",
        "Put the NVMe path on a local ext4 or xfs, not on an overlay or a network mount.";
    NotADisk = "FN-E603", Usage, "an NVMe path is in memory, not on a disk",
        "`/tmp` and `/dev/shm` are often in memory; name a folder on a disk in `[nvme] paths`.";
    PathUnusable = "FN-E604", Usage, "an NVMe path is missing or cannot be written",
        "Create the folder, or give yourself the right to write there. The message says so where a limit is the reason (`ulimit -n`, `ulimit -f`).";
    DiskFull = "FN-E605", Storage, "not enough free space on an NVMe path",
        "Free the space, inodes or quota that the message names, or add a path.";
    OutputFile = "FN-E606", Storage, "a file to be written exists and is not ours, or cannot be written",
        "Name another file, or remove that one. `funicular bench` replaces only files that it wrote itself, `log.trace` only traces.";
    RankTraces = "FN-E607", Usage, "files are not the traces of all ranks of one run",
        "Give `funicular trace merge` the files that all ranks of one run wrote for the same steps, such as `trace.rank0.json` and `trace.rank1.json`, when all have ended.";
    PeerLost = "FN-E701", Runtime, "another rank is gone: it was killed, failed, or closed its model while this one needed it",
        "The message names the rank, its process and where it was. Look at that rank's own output first: this error only follows it. Start all ranks again from the last checkpoint, on any number of ranks.";
    RanksDiffer = "FN-E702", Runtime, "ranks that train one model do different things",
        "The message names the ranks and what differs. Nothing of such a step was made. All ranks must take the same steps with the same hyperparameters, and make the same edits.";
    RanksUnlike = "FN-E703", Usage, "ranks have different models, policies or versions",
        "The message says what differs. Offload the same model with the same policy and the same version of funicular on all ranks.";
    RanksUnsupported = "FN-E704", Usage, "something that is not possible with several ranks yet",
        "The message names it, and what to do in its place.";
    RankFailed = "FN-E705", Runtime, "this rank gave up, and told the others",
        "The message says why. Start all ranks again from the last checkpoint.";
    RanksCrossed = "FN-E706", Runtime, "ranks wait for each other in different calls, which would last for ever",
        "The message names two ranks and the calls. Have all ranks make the same calls in the same order: `offload`, backward and step, `load`, `unwrap`; with several models the models in one order. Start all ranks again from the last checkpoint.";
    RanksGroup = "FN-E720", Usage, "what was given as `group` is no group of ranks that can train a model",
        "Give `None`, a `ProcessGroup`, a `DeviceMesh` of one dimension, or `\"single\"` for a model of this process alone.";
    RanksStart = "FN-E721", Runtime, "another rank failed in what all do together",
        "The message names the rank and what went wrong there: at the start, in a load, or in a save that the others wait for.";
    RanksEdit = "FN-E722", Usage, "an edit of a weight or a gradient that is the same memory for all ranks",
        "Each rank would make it. Edit weights before `funicular.offload` or load a checkpoint; clip gradients with `clip_grad_norm_`, and clear them with `zero_grad`.";
    RanksBroken = "FN-E723", Runtime, "a backward failed amid the exchange of its gradients",
        "End all ranks and go on from a checkpoint. The error of that backward came before this one.";
    RanksLate = "FN-E724", Runtime, "a gradient came after its unit's gradients had been exchanged",
        "Use a parameter as often in the first backward as in later ones: a unit is exchanged when each of its gradients has come as often as ever before.";
    RanksAmid = "FN-E725", Runtime, "a gradient was asked for amid the backward in which ranks exchange it",
        "Look at gradients when `backward` has returned. A hook on a parameter may look at that parameter's own gradient, which is this rank's.";
}

/// An entry for a line of the log, whose code is written where the line is made.
const fn line(code: &'static str, meaning: &'static str, action: &'static str) -> Entry {
    let family = if code.as_bytes()[3] == b'W' { "Warning" } else { "Fact" };
    Entry { code, family, meaning, action }
}

/// Warnings and facts in the log, in order.
const LINES: &[Entry] = &[
    line(
        "FN-W112",
        "parameters that cannot be paged stay where they are, in no budget",
        "Nothing, if there is room for them. Else keep such layers (quantised ones, for instance) small, or use plain parameters.",
    ),
    line(
        "FN-W130",
        "the states of another optimizer than `funicular.AdamW` are ordinary tensors in no budget",
        "Nothing, if there is room. `funicular.AdamW` keeps its states where `optimizer.tier` says.",
    ),
    line(
        "FN-W140",
        "weights were frozen after `funicular.offload`, which had set aside gradients and states for them",
        "Freeze weights, and wrap the model by PEFT, before `offload`: a frozen parameter needs 2 bytes then, not 14.",
    ),
    line(
        "FN-W208",
        "what other processes take, and this run, is nearly all memory that there is",
        "Lower `[budget] host`, or run one after the other.",
    ),
    line(
        "FN-W209",
        "with `pressure.action = \"demote\"`, units live one tier lower than asked",
        "Nothing, or raise the budget that the message names. `funicular plan` says what that would gain.",
    ),
    line(
        "FN-W210",
        "the GPU takes no part in updates",
        "Install a CUDA build of torch, which brings `libnvrtc` along. Until then the processor updates alone: slower, never wrong.",
    ),
    line(
        "FN-W211",
        "what other processes of this machine plan to take cannot be known",
        "Leave room for them with `[budget] reserve`, if there are any.",
    ),
    line(
        "FN-W212",
        "two models of one process have the same budgets, and each may take them in full",
        "Divide one policy between them with `funicular.integrations.policies.divided`. Nothing, if the machine is meant to hold both.",
    ),
    line(
        "FN-W301",
        "a model is unwrapped after a failure",
        "Load a checkpoint. Weights in host memory are, element by element, as before or as after the step that failed.",
    ),
    line(
        "FN-W308",
        "steps of `log.trace_steps` did not come, or none is named",
        "Name steps that come. What was traced until then is in the file.",
    ),
    line(
        "FN-W309",
        "traces of several ranks were not merged (`log.trace`)",
        "The message says why. Each rank's trace is in a file of its own: run the command of the message when all ranks have ended.",
    ),
    line(
        "FN-W402",
        "what a save left behind, or an old checkpoint, could not be removed",
        "The message gives path and reason. Remove it by hand.",
    ),
    line(
        "FN-W403",
        "a directory stays: it holds files that no save wrote",
        "Move these files, and remove the directory.",
    ),
    line(
        "FN-W404",
        "the last save to a path failed, and an earlier checkpoint is read",
        "Look at the reason that the message gives, and save again.",
    ),
    line(
        "FN-W407",
        "a directory of weights has tensors that the model does not have",
        "Check that it is of this model. They are left out.",
    ),
    line(
        "FN-W408",
        "a checkpoint lacks what the model's `state_dict()` has besides parameters and buffers",
        "These entries stay as they are. Set them, if that matters.",
    ),
    line(
        "FN-W409",
        "a trainer's checkpoint is left out because its save did not end",
        "Nothing: an earlier one is resumed. The next save to that place replaces it.",
    ),
    line(
        "FN-W410",
        "a trainer's checkpoint was saved by another number of ranks",
        "Weights and states are exact. Start as many ranks as saved it if the order of the data and random numbers matter.",
    ),
    line(
        "FN-W507",
        "a configuration of another system was imported, and some of its keys are left to you",
        "`funicular policy import FILE` lists them. Write what you decide into the policy.",
    ),
    line(
        "FN-W601",
        "io_uring does not work here, and threads take its place",
        "The message says how to allow it: Docker needs `--security-opt`, some systems `kernel.io_uring_disabled = 0`.",
    ),
    line(
        "FN-W604",
        "direct I/O was refused; reads and writes go through the page cache",
        "Put the NVMe path on a local ext4 or xfs. `[nvme] direct = \"required\"` makes this an error.",
    ),
    line(
        "FN-W605",
        "an NVMe path is on a network or virtual file system",
        "Name a folder on a local drive; `funicular bench --path` measures it.",
    ),
    line(
        "FN-W606",
        "two NVMe paths are on the same file system",
        "Name one path for each drive: two on one are no faster.",
    ),
    line(
        "FN-W607",
        "the file system of an NVMe path cannot reserve space",
        "Keep an eye on its free space: a full disk is noticed only when it happens.",
    ),
    line(
        "FN-W720",
        "weights of a rank differ from those of rank 0, which count",
        "Seed all ranks alike before the model is made, or load the same weights everywhere.",
    ),
    line(
        "FN-W721",
        "ranks have not called `funicular.offload` that others wait for",
        "The message names them. All ranks of a group call it together; `group=\"single\"` is a model of one process alone.",
    ),
    line(
        "FN-W722",
        "a launcher started several processes, and `torch.distributed` has not begun",
        "Call `torch.distributed.init_process_group()` before `funicular.offload`, or say `group=\"single\"`.",
    ),
    line(
        "FN-W723",
        "`DistributedDataParallel` is around a model that each rank has offloaded for itself",
        "The host holds weights, gradients and states once for each rank. Leave `DistributedDataParallel` and `group=\"single\"` out to hold them once.",
    ),
    line("FN-I301", "how far `funicular.offload` has come", ""),
    line("FN-I302", "a model has been offloaded; where its weights live", ""),
    line(
        "FN-I303",
        "how far the first step has come; it learns the order of the units and may read everything from disk",
        "",
    ),
    line("FN-I304", "how long the first step took", ""),
    line("FN-I306", "a trace has been written (`log.trace`)", ""),
    line("FN-I307", "what the last steps took, and what bound them (`log.every`)", ""),
    line(
        "FN-I308",
        "optimizer states stay where they were planned, as this torch cannot ask for memory back (`budget.hbm = \"auto\"`)",
        "",
    ),
    line("FN-I309", "optimizer states have moved into free memory of the GPU, or out of it; why", ""),
    line("FN-I310", "the traces of all ranks have been merged (`log.trace`)", ""),
    line("FN-I401", "what a save that did not end had left behind was removed, or given its name", ""),
    line("FN-I402", "a checkpoint was removed, as `keep` asks", ""),
    line("FN-I403", "a save is waited for: its path is read, or the process ends", ""),
    line("FN-I404", "how far a save has come", ""),
    line("FN-I405", "a save has ended well", ""),
    line("FN-I406", "how far a load has come", ""),
    line("FN-I407", "a load has ended well", ""),
    line(
        "FN-I602",
        "I/O buffers are used without being registered with the kernel, a little slower",
        "Raise the limit of locked memory (`ulimit -l`), if that matters.",
    ),
    line("FN-I605", "files that a dead run had left on an NVMe path were removed", ""),
];

/// All entries: errors, then warnings, then facts.
pub fn entries() -> impl Iterator<Item = &'static Entry> {
    ERRORS.iter().chain(LINES)
}
