//! `funicular plan`: arguments, and from them a model, a machine and a plan.

use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args};

use super::{
    terminal::for_terminal,
    values::{Sets, size},
};
use crate::{
    dtype::DType,
    error::{Code, Error, Result},
    machine::HostLimits,
    model::ParamSpec,
    plan::{
        self, Activations, Compute, Machine, PlannedUnit, Unpaged,
        activations::{Blocks, MicroBatched, Pass},
        source::{self, Shape, parse_count},
    },
    policy::{
        ActivationsTier, MicroBatch, ParamsDtype, Policy,
        cli::{Output, Overlay, resolve},
        profile::Profile,
    },
    quantities::ByteCount,
};

/// Builds a model that only Python can: `module:function`, or a directory with a config.json. The text, the patterns of
/// `units.match`, and the type to build it in.
pub type Loader<'a> = &'a dyn Fn(&str, &[String], Option<&str>) -> Result<(Vec<PlannedUnit>, Unpaged)>;

#[derive(Args)]
#[command(group(ArgGroup::new("planned").args(["model", "params"]).required(true)))]
pub(super) struct PlanArguments {
    /// module:function or file.py:function that builds the model, a directory with config.json or safetensors files, or one of
    /// these files. Nothing is loaded: models are built on the meta device.
    #[arg(value_name = "MODEL")]
    model: Option<String>,
    /// A decoder of so many parameters instead, such as 7B.
    #[arg(long, value_name = "N", value_parser = parse_count, requires = "layers")]
    params: Option<u64>,
    /// Its blocks.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=100_000))]
    layers: Option<u64>,
    /// Its vocabulary.
    #[arg(long, value_name = "N", default_value = "32000")]
    vocab: u64,
    /// Its width; found from the others without one.
    #[arg(long, value_name = "N")]
    hidden: Option<u64>,
    /// Type of its parameters: bf16, fp16 or fp32. bf16 with --params; else what the model says.
    #[arg(long, value_parser = ["bf16", "fp16", "fp32"])]
    dtype: Option<String>,
    /// A TOML or JSON policy; all automatic without one.
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    #[command(flatten)]
    sets: Sets,
    /// Rates of the machine, as funicular bench --save writes them; those of this machine without one.
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
    /// Memory free on the GPU of the machine planned for, or none.
    #[arg(long, value_name = "SIZE")]
    gpu: Option<String>,
    /// Host memory that the machine planned for has available.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    ram: Option<ByteCount>,
    /// Size of its drives together.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    disk: Option<ByteCount>,
    /// Its CPUs.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    cpus: Option<u32>,
    /// Tokens of a step.
    #[arg(long, value_name = "N", default_value = "0", hide_default_value = true)]
    tokens: u64,
    /// Rows of a forward, each of --seq tokens, in place of --tokens.
    #[arg(long, value_name = "N", requires = "seq", conflicts_with = "tokens", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    batch: Option<u64>,
    /// Tokens of a row.
    #[arg(long, value_name = "N", requires = "batch", value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    seq: Option<u64>,
    /// Arithmetic that the model sustains there, per second, such as 400e12.
    #[arg(long, value_name = "X", default_value = "0", hide_default_value = true)]
    flops: f64,
    /// Seconds of a step's forward and backward on a machine that holds the model, in place of tokens and flops.
    #[arg(long, value_name = "S")]
    compute_seconds: Option<f64>,
    /// Blocks are computed again in the backward.
    #[arg(long)]
    recompute: bool,
    /// Forwards and backwards before each update.
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    passes: u32,
    /// Processes of one host that train the model together, each with such a GPU and with tokens of its own.
    #[arg(long, value_name = "N", default_value = "1", hide_default_value = true,
        value_parser = clap::value_parser!(u64).range(1..=1024))]
    ranks: u64,
    /// A line for each unit.
    #[arg(long)]
    units: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl PlanArguments {
    /// The decoder that counts describe, if the model is given so.
    fn shape(&self) -> Option<Shape> {
        let (params, layers) = (self.params?, self.layers?);
        Some(Shape { params, layers, vocab: self.vocab, hidden: self.hidden })
    }
}

/// Plans; exit code 0 if the model fits, 1 if not, 2 if that cannot be told.
pub(super) fn run(arguments: PlanArguments, loader: Option<Loader<'_>>) -> Output {
    planned(arguments, loader).into()
}

fn planned(mut arguments: PlanArguments, loader: Option<Loader<'_>>) -> Result<Output> {
    arguments.model = arguments.model.map(directory_of);
    let overlay = Overlay::from(arguments.sets.clone());
    let mut policy = resolve(arguments.policy.as_deref(), &overlay)?;
    let machine = machine(&arguments, &policy)?;
    if arguments.disk.is_some() && policy.nvme.paths.is_empty() {
        // A drive to plan with; where it will be mounted does not matter.
        policy.nvme.paths = vec![PathBuf::from("/nvme")];
    }
    if let Some(disk) = arguments.disk
        && policy.budget.nvme.given().is_none()
    {
        policy.budget.nvme = crate::policy::Auto::Set(disk);
    }
    policy.check_consistent()?;
    let (units, unpaged) = model(&arguments, &policy, loader)?;
    let tokens = match (arguments.batch, arguments.seq) {
        (Some(batch), Some(seq)) => batch * seq * u64::from(arguments.passes),
        _ => arguments.tokens,
    };
    let compute = Compute {
        tokens,
        flops: if tokens > 0 { arguments.flops } else { 0.0 },
        seconds: arguments.compute_seconds,
        recompute: arguments.recompute,
        passes: arguments.passes,
    };
    let mut plan = plan::plan(&units, &policy, &machine, compute)?;
    plan.params += unpaged.params;
    plan.trained += unpaged.trained;
    let activations = activations(&arguments, &policy, &units, &machine, &plan, compute);
    plan.expect(machine.gpu, activations);
    if plan.activations.is_none() && tokens > 0 {
        plan.notes.push(
            "Activations are not estimated: that takes a config.json with num_hidden_layers and hidden_size, or --params."
                .to_owned(),
        );
    }
    if !unpaged.text.is_empty() {
        plan.notes.push(format!("Not paged, in no budget: {}.", unpaged.text));
    }
    let code = u8::from(!plan.fits);
    let out = if arguments.json {
        serde_json::to_string_pretty(&plan)
            .map(|text| text + "\n")
            .map_err(|e| Error::new(Code::OutputFile, format!("the plan as JSON: {e}.")))?
    } else {
        for_terminal(&plan::text(&plan, arguments.units))
    };
    Ok(Output { out, err: String::new(), code })
}

/// A `config.json` stands for its directory.
fn directory_of(model: String) -> String {
    let path = Path::new(&model);
    match path.parent() {
        Some(parent) if path.ends_with("config.json") && path.is_file() => {
            Path::new(".").join(parent).display().to_string()
        }
        _ => model,
    }
}

/// An estimate of the activations of one forward, where its tokens and the sizes of the blocks are known.
fn activations(
    arguments: &PlanArguments,
    policy: &Policy,
    units: &[PlannedUnit],
    machine: &Machine,
    plan: &plan::Plan,
    compute: Compute,
) -> Option<Activations> {
    let tokens = compute.tokens / u64::from(compute.passes);
    let (blocks, from) = match arguments.shape() {
        Some(shape) => (Blocks::of_shape(&shape), "--params and --layers"),
        None => (Blocks::read(Path::new(arguments.model.as_deref()?))?, "config.json"),
    };
    let params = units.iter().flat_map(|unit| &unit.spec.params);
    let element = params.max_by_key(|p| p.numel).map_or(2, |p| p.dtype.size() as u64);
    let hbm = plan.tiers.iter().find(|tier| tier.tier == "hbm").and_then(|tier| tier.budget);
    let beside = machine.gpu.zip(hbm).map(|(gpu, hbm)| gpu.0.saturating_sub(hbm));
    let micro_batch = match policy.activations.micro_batch {
        MicroBatch::Off => None,
        MicroBatch::Rows(rows) => {
            // Of a batch that is not given, all: no estimate is below what is needed.
            let share = arguments.batch.map_or(tokens, |batch| tokens / batch * u64::from(rows).min(batch));
            Some(MicroBatched { tokens: share, inputs_away: policy.activations.tier == ActivationsTier::Host })
        }
    };
    let pass = Pass { tokens, recompute: compute.recompute, micro_batch, element };
    (tokens > 0).then(|| blocks.estimate(pass, from, beside))
}

/// The machine that the arguments describe, else this one.
fn machine(arguments: &PlanArguments, policy: &Policy) -> Result<Machine> {
    let elsewhere = arguments.profile.is_some() || arguments.gpu.is_some() || arguments.ram.is_some();
    let mut limits = HostLimits::read()?;
    if let Some(ram) = arguments.ram {
        limits = HostLimits { mem_total: ram, mem_available: ram, cgroup: None, ..limits };
    }
    limits.cpus = arguments.cpus.unwrap_or(limits.cpus);
    let profile = match &arguments.profile {
        Some(file) => Some(Profile::read(file)?),
        None if elsewhere => None,
        None => Profile::default_path().filter(|f| f.exists()).map(|f| Profile::read(&f)).transpose()?,
    };
    let gpu = match arguments.gpu.as_deref() {
        Some("none") => None,
        Some(text) => Some(size(text).map_err(|e| Error::new(Code::PolicyValue, format!("--gpu: {e}.")))?),
        None if elsewhere => {
            let on_host = policy.device == crate::policy::DeviceChoice::Host
                || profile.as_ref().is_some_and(|p| p.device.name == "host");
            policy.budget.hbm.given().filter(|_| !on_host)
        }
        None => crate::device::open(plan::device_here(policy))?.free_memory()?,
    };
    let ranks = usize::try_from(arguments.ranks).unwrap_or(1);
    Ok(Machine { gpu, limits, disk: arguments.disk, profile, ranks })
}

fn dtype(word: &str) -> DType {
    match word {
        "fp32" => DType::F32,
        "fp16" => DType::F16,
        _ => DType::Bf16,
    }
}

fn model(
    arguments: &PlanArguments,
    policy: &Policy,
    loader: Option<Loader<'_>>,
) -> Result<(Vec<PlannedUnit>, Unpaged)> {
    let alone = |units: Vec<PlannedUnit>| (units, Unpaged::default());
    let asked = arguments.dtype.as_deref().or(match policy.params.dtype {
        ParamsDtype::Keep => None,
        ParamsDtype::Float32 => Some("fp32"),
        ParamsDtype::Bfloat16 => Some("bf16"),
        ParamsDtype::Float16 => Some("fp16"),
    });
    if let Some(shape) = arguments.shape() {
        return shape.units(dtype(asked.unwrap_or("bf16"))).map(alone);
    }
    let text = arguments.model.as_deref().unwrap_or_default();
    let path = Path::new(text);
    if path.exists()
        && let Some(params) = source::safetensors(path)?
    {
        let cast = |p: ParamSpec| match asked {
            Some(word) if p.dtype.trainable() => ParamSpec { dtype: dtype(word), ..p },
            _ => p,
        };
        return source::cut(params.into_iter().map(cast).collect(), &policy.units.patterns).map(alone);
    }
    if !path.exists() && !text.contains(':') {
        let what = format!("there is no '{text}': a model is a directory, a safetensors file, or module:function.");
        let named = text.matches('/').count() < 2 && !text.starts_with(['/', '.', '~']);
        let file =
            path.extension().is_some_and(|end| ["json", "safetensors", "py", "bin", "pt"].iter().any(|e| end == *e));
        if !named || file {
            let next = "Give the path of a directory with a config.json or safetensors files.";
            return Err(Error::new(Code::PlannedModel, what).action(next));
        }
        return Err(Error::new(Code::PlannedModel, what).action(format!(
            "If it is a name on the Hugging Face hub, fetch what describes it and plan that: `hf download {text} config.json --local-dir \
             {0}`, then `funicular plan {0}`.",
            path.file_name().map_or_else(|| "DIR".into(), |name| name.to_string_lossy())
        )));
    }
    if path.is_file() && path.extension().is_some_and(|end| end == "json") {
        let what = format!("{text}: a model's configuration is read under the name config.json alone.");
        return Err(Error::new(Code::PlannedModel, what)
            .action("Put it into a directory of its own as config.json, and give that directory."));
    }
    let Some(loader) = loader else {
        return Err(Error::new(Code::PlannedModel, format!("{text}: only Python can build this model."))
            .action("Use `python -m funicular plan`, a directory with safetensors files, or --params and --layers."));
    };
    let patterns: Vec<String> = policy.units.patterns.iter().map(|p| p.as_str().to_owned()).collect();
    loader(text, &patterns, asked)
}
