//! The command line, for the program and for the wheel's `funicular` alike: arguments in, an exit code out.
//!
//! What subcommands say is made in the layers below; printing is done here only.
#![expect(clippy::print_stderr, reason = "the command line talks to a person")]

mod errors;
mod exit;
mod plan;
mod terminal;
mod values;

use std::{
    ffi::OsString,
    io::{IsTerminal, Write, stderr, stdout},
    path::PathBuf,
    rc::Rc,
    time::{Duration, Instant},
};

use clap::{Args, Parser, Subcommand};

pub use plan::Loader;
pub use terminal::coloured;
use terminal::{columns, error_for_terminal, for_terminal, look_of_stdout};

use self::{
    exit::{COULD_NOT_TELL, INTERRUPTED},
    values::{Sets, device, engine, seconds, size},
};
use crate::{
    bench::{self, Crew, Interrupt, Outputs, Place, Progress},
    checkpoint::{Control, cli as checkpoint},
    device::DeviceChoice,
    doctor,
    error::{Code, Error, Result},
    io::EngineChoice,
    policy::{
        cli::{self as policy_cli, Output},
        import::Hints,
        profile::Profile,
    },
    quantities::ByteCount,
    runtime::measure::trace_merge,
    text::{printable, printable_lines},
};

/// Train models larger than the GPU's memory.
#[derive(Parser)]
#[command(name = "funicular", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measure what this machine can do: disks, links, memory, and all at once. Exit code 0; 2 for an error; 3 if nothing was measured, or
    /// if --save was asked for and nothing was saved, because the figures are not to be relied on; 130 after Ctrl-C.
    Bench(Box<BenchArguments>),
    /// Look at this machine and say what is in the way. Exit code 0, 1 (warnings), 3 (failures) or 2 (an error).
    Doctor(DoctorArguments),
    /// Say what a model needs and how long a step takes, before it runs. Exit code 0 if it fits, 1 if not, 2 after an error.
    Plan(Box<plan::PlanArguments>),
    /// Check, show and import policy files.
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// List, check and export checkpoints.
    #[command(subcommand)]
    Checkpoint(CheckpointCommand),
    /// Put traces of several ranks together.
    #[command(subcommand)]
    Trace(TraceCommand),
    /// Say what a code such as FN-E202 means and what to do; list all codes without one. Exit code 2 if there is no such code.
    Errors {
        /// A code of an error, a warning or a fact.
        code: Option<String>,
    },
    /// Lock memory for the device until that is refused, and print how many bytes it was.
    #[command(hide = true)]
    PageLock {
        #[arg(long, value_parser = device)]
        device: DeviceChoice,
        #[arg(long)]
        up_to: u64,
    },
}

#[derive(Args)]
struct BenchArguments {
    /// A directory on a drive to measure; may be repeated, one per drive. The working directory without one.
    #[arg(long = "path", value_name = "DIR")]
    paths: Vec<PathBuf>,
    /// Leave out everything that needs a disk.
    #[arg(long, conflicts_with = "paths")]
    no_nvme: bool,
    /// auto, host, cuda or cuda:N.
    #[arg(long, default_value = "auto", value_parser = device)]
    device: DeviceChoice,
    /// auto, io_uring or threads.
    #[arg(long, default_value = "auto", value_parser = engine)]
    engine: EngineChoice,
    /// Under 20 seconds instead of under two minutes: fewer and shorter rounds.
    #[arg(long)]
    quick: bool,
    /// Run fio beside the NVMe hops, on the same files, with the same blocks and depth. Its time comes on top.
    #[arg(long)]
    check: bool,
    /// Size of the file on each path; it is removed at the end, and on Ctrl-C.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    size: Option<ByteCount>,
    /// Size of one read or write.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    block: Option<ByteCount>,
    /// Reads and writes in flight per path.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    depth: Option<u32>,
    /// Threads of AdamW and the triad.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    threads: Option<u32>,
    /// Rounds per hop, of which the median is shown.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// Seconds for all rounds together; then nothing is left out when the disk is slow.
    #[arg(long, value_name = "S", value_parser = seconds)]
    seconds: Option<Duration>,
    /// Leave out the sweeps.
    #[arg(long)]
    no_sweep: bool,
    /// Write the report as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write one row per hop and per point of a sweep.
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Write one self-contained page with curves and bars.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write the rates for the planner, into FILE or funicular/profile.toml in your configuration folder.
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    save: Option<Option<PathBuf>>,
    /// Give a verdict, and save, although other load or far-apart rounds say that the figures are not to be relied on.
    #[arg(long)]
    force: bool,
}

#[derive(Args)]
struct DoctorArguments {
    /// Directories that are to be paged to. The working directory without one.
    #[arg(long = "path", value_name = "DIR")]
    paths: Vec<PathBuf>,
    /// auto, host, cuda or cuda:N.
    #[arg(long, default_value = "auto", value_parser = device)]
    device: DeviceChoice,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Write a seccomp profile for containers that allows io_uring, and do nothing else. It denies what Docker's own
    /// profile is known for denying, and allows the rest: use it where you trust what runs in the container.
    #[arg(long, value_name = "FILE")]
    write_seccomp: Option<PathBuf>,
}

#[derive(Subcommand)]
enum PolicyCommand {
    /// Read a policy as a run would, and look whether this machine can run it. Exit code 0 if so, 1 if the policy is wrong, 2
    /// if that cannot be told, 3 if the policy is valid and this machine cannot run it.
    Check {
        /// A TOML or JSON policy, or a preset.
        file: PathBuf,
        #[command(flatten)]
        sets: Sets,
    },
    /// Print the whole policy that results, every key written out.
    Show {
        /// A TOML or JSON policy, or a preset; the defaults without one.
        file: Option<PathBuf>,
        #[command(flatten)]
        sets: Sets,
    },
    /// Print the JSON Schema of policies.
    Schema,
    /// Turn another system's configuration into a policy. Exit code 1 if it is broken or of no format that is known, 2 if it
    /// cannot be read.
    Import {
        /// DeepSpeed's, accelerate's, Lightning's or FSDP's configuration, a training file that names one, or a script with one.
        file: PathBuf,
        /// The model's hidden size, for sizes that are "auto".
        #[arg(long, value_name = "N")]
        hidden_size: Option<u64>,
    },
}

#[derive(Subcommand)]
enum CheckpointCommand {
    /// List the checkpoints at a path: steps, sizes, whether they are complete. Exit code 1 if one is not, 2 after an error.
    Ls {
        /// A checkpoint, or a directory of checkpoints.
        path: PathBuf,
    },
    /// Read all of a checkpoint and compare it with its checksums. Exit code 1 if anything differs, 2 after an error.
    Verify {
        /// A checkpoint.
        path: PathBuf,
    },
    /// Write the weights alone, for other programs: safetensors as Hugging Face's loaders take them.
    Export {
        /// A checkpoint.
        path: PathBuf,
        /// A directory that does not exist yet.
        target: PathBuf,
        /// 16-bit parameters as their fp32 masters.
        #[arg(long)]
        fp32: bool,
        /// Size of a file at most.
        #[arg(long, value_name = "SIZE", value_parser = size, default_value = "5GB")]
        shard: ByteCount,
    },
}

#[derive(Subcommand)]
enum TraceCommand {
    /// Write the traces of all ranks of a run as one, a process for each rank. Exit code 1 if they are not that, 2 after an error.
    Merge {
        /// What the ranks wrote, such as trace.rank0.json and trace.rank1.json.
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// The file to write. Only an earlier trace is replaced.
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
    },
}

/// Runs the command line. `arguments` are those after the program's name; `relaunch` is the command that starts this
/// program again, for probes in a child process: the program itself, or `[sys.executable, "-m", "funicular"]`.
/// `loader` builds models that only Python can. Returns the exit code.
pub fn run(arguments: impl IntoIterator<Item = OsString>, relaunch: &[OsString], loader: Option<Loader<'_>>) -> i32 {
    let named = std::iter::once(OsString::from("funicular")).chain(arguments);
    let arguments = match Arguments::try_parse_from(named) {
        Ok(arguments) => arguments,
        Err(e) => {
            // Help and version are no errors; clap knows where each belongs.
            let (text, code) = (e.render().to_string(), e.exit_code());
            let output = match e.use_stderr() {
                true => Output { err: text, ..Output::default() },
                false => Output { out: for_terminal(&text), ..Output::default() },
            };
            return if said(&output) == 0 { code } else { COULD_NOT_TELL.into() };
        }
    };
    match arguments.command {
        Command::Bench(arguments) => finish(bench(*arguments)),
        Command::Doctor(arguments) => finish(examine(arguments, relaunch)),
        Command::Plan(arguments) => said(&plan::run(*arguments, loader)),
        Command::Policy(command) => said(&policy(command)),
        Command::Checkpoint(command) => finish(checkpoints(command)),
        Command::Trace(command) => finish(trace(&command)),
        Command::Errors { code } => said(&errors::run(code.as_deref())),
        Command::PageLock { device, up_to } => finish(
            doctor::page_lock(device, ByteCount(up_to))
                .and_then(|locked| print(&format!("{}\n", locked.0)).map(|()| 0)),
        ),
    }
}

fn checkpoints(command: CheckpointCommand) -> Result<i32> {
    let (text, good) = match command {
        CheckpointCommand::Ls { path } => checkpoint::list(&path)?,
        CheckpointCommand::Verify { path } => match checkpoint::verify(&path, &Control::default()) {
            // Damage that is seen before a tensor is read.
            Err(error) if error.code() == Code::CheckpointDamaged => (format!("{error}\n"), false),
            verified => verified?,
        },
        CheckpointCommand::Export { path, target, fp32, shard } => {
            (checkpoint::export(&path, &target, fp32, shard.0, &Control::default())?, true)
        }
    };
    print(&text)?;
    Ok(i32::from(!good))
}

fn trace(command: &TraceCommand) -> Result<i32> {
    let TraceCommand::Merge { files, output } = command;
    match trace_merge::merge(files, output) {
        Ok((ranks, events)) => {
            print(&format!("{events} events of {ranks} ranks in {}\n", output.display())).map(|()| 0)
        }
        Err(error) if error.code() == Code::RankTraces && error.os_error().is_none() => {
            eprintln!("{}", error_for_terminal(&error.to_string()));
            Ok(1)
        }
        Err(error) => Err(error),
    }
}

fn policy(command: PolicyCommand) -> Output {
    match command {
        PolicyCommand::Check { file, sets } => policy_cli::check(&file, &sets.into(), doctor::obstacles),
        PolicyCommand::Show { file, sets } => policy_cli::show(file.as_deref(), &sets.into()),
        PolicyCommand::Schema => policy_cli::schema(),
        PolicyCommand::Import { file, hidden_size } => policy_cli::import(&file, Hints { hidden_size }),
    }
}

fn said(output: &Output) -> i32 {
    let told = stderr().write_all(error_for_terminal(&printable_lines(&output.err)).as_bytes()).is_ok();
    match print(&output.out) {
        Ok(()) if told => output.code.into(),
        _ => COULD_NOT_TELL.into(),
    }
}

/// Prints text that may come from files, with control characters escaped; a closed pipe (`| head`) is no error.
fn print(text: &str) -> Result<()> {
    print_inked(&printable_lines(text))
}

/// Prints what is safe to print already.
fn print_inked(text: &str) -> Result<()> {
    match stdout().write_all(text.as_bytes()).and_then(|()| stdout().flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::new(Code::OutputFile, format!("the standard output: {e}.")))
        }
        _ => Ok(()),
    }
}

fn finish(result: Result<i32>) -> i32 {
    result.unwrap_or_else(|error| {
        eprintln!("{}", error_for_terminal(&error.to_string()));
        if error.code() == Code::Interrupted { INTERRUPTED } else { COULD_NOT_TELL.into() }
    })
}

fn examine(arguments: DoctorArguments, relaunch: &[OsString]) -> Result<i32> {
    if let Some(file) = arguments.write_seccomp {
        let written = std::fs::OpenOptions::new().write(true).create_new(true).open(&file);
        written.and_then(|mut open| open.write_all(doctor::SECCOMP.as_bytes())).map_err(|e| {
            Error::new(Code::OutputFile, format!("{}: {e}.", file.display())).action("Name a file that does not exist.")
        })?;
        eprintln!("{0}: for docker run --security-opt seccomp={0}", printable(&file.display().to_string()));
        return Ok(0);
    }
    let paths = or_here(arguments.paths);
    let options = doctor::Options { paths, device: arguments.device, relaunch: relaunch.to_vec() };
    let checks = doctor::examine(&options);
    print(&if arguments.json { doctor::json(&checks) } else { for_terminal(&doctor::text(&checks)) })?;
    Ok(doctor::exit_code(&checks))
}

/// The paths, made absolute so that reports and profiles still mean something elsewhere; the working directory if none.
fn or_here(paths: Vec<PathBuf>) -> Vec<PathBuf> {
    let paths = if paths.is_empty() { vec![PathBuf::from(".")] } else { paths };
    paths.into_iter().map(|path| std::path::absolute(&path).unwrap_or(path)).collect()
}

/// One benchmark, of this process or of all ranks that `torchrun` has started.
fn bench(arguments: BenchArguments) -> Result<i32> {
    let Some(place) = Place::here()? else { return measure(arguments, None, &interruptible()?) };
    let interrupt = interruptible()?;
    let crew = Rc::new(Crew::meet(&place, &interrupt)?);
    measure(arguments, Some((&place, &crew)), &interrupt).inspect_err(|error| crew.fail(error))
}

fn measure(arguments: BenchArguments, among: Option<(&Place, &Rc<Crew>)>, interrupt: &Interrupt) -> Result<i32> {
    let profile = match arguments.save {
        None => None,
        Some(Some(file)) => Some(file),
        Some(None) => Some(Profile::default_path().ok_or_else(|| {
            Error::new(Code::OutputFile, "--save: there is no home directory.").action("Name a file: --save FILE.")
        })?),
    };
    let mut outputs = Outputs { json: arguments.json, csv: arguments.csv, html: arguments.html, profile };
    outputs.check()?;
    let paths = if arguments.no_nvme { Vec::new() } else { or_here(arguments.paths) };
    let mut options = bench::Options::new(paths, arguments.quick);
    options.device = arguments.device;
    options.engine = arguments.engine;
    options.check = arguments.check;
    options.threads = arguments.threads;
    options.file = arguments.size.unwrap_or(options.file);
    options.file_limited = arguments.size.is_none();
    options.block = arguments.block.unwrap_or(options.block);
    options.depth = arguments.depth.unwrap_or(options.depth);
    options.rounds = arguments.rounds.unwrap_or(options.rounds);
    options.force = arguments.force;
    if let Some(seconds) = arguments.seconds {
        options.time = seconds;
        // A time that the user gives replaces the limit; sweeps become shorter with it.
        options.limit = Duration::MAX;
        options.point = options.point.min(options.time / 40);
    }
    if arguments.no_sweep {
        options.point = Duration::ZERO;
    }
    if let Some((place, crew)) = among {
        (options.ranks, options.device) = (place.size(), place.device(options.device)?);
        if !place.leads() {
            options.paths = Vec::new();
            return bench::follow(&options, crew, interrupt).map(|()| 0);
        }
    }
    let mut progress = OnStderr::new();
    let report = bench::run(&options, among.map(|(_, crew)| crew), interrupt, &mut progress);
    progress.clear();
    let report = report?;
    print_inked(&bench::text(&report, look_of_stdout()))?;
    let in_doubt = report.is_empty() || !report.doubts.is_empty() && !arguments.force;
    let not_saved = outputs.profile.take_if(|_| in_doubt);
    for file in outputs.write(&report)? {
        eprintln!("written: {}", printable(&file.display().to_string()));
    }
    if let Some(file) = &not_saved {
        let file = printable(&file.display().to_string()).into_owned();
        let why = match report.is_empty() {
            true => "nothing was measured.",
            false => "the figures are not to be relied on. --force saves them all the same.",
        };
        eprintln!("{}", error_for_terminal(&format!("not saved: {file}: {why}")));
    }
    Ok(exit::of_bench(report.is_empty(), not_saved.is_some()))
}

/// The first Ctrl-C (or SIGTERM) asks the benchmark to stop and clean up; the second ends the process at once.
fn interruptible() -> Result<Interrupt> {
    let interrupt = Interrupt::default();
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        let flag = std::sync::Arc::clone(&interrupt.0);
        let second =
            signal_hook::flag::register_conditional_shutdown(signal, INTERRUPTED, std::sync::Arc::clone(&flag));
        second.and_then(|_| signal_hook::flag::register(signal, flag)).map_err(|e| {
            Error::new(Code::NoThread, format!("signal {signal} cannot be handled: {e}."))
                .action("Run it from a shell.")
        })?;
    }
    Ok(interrupt)
}

/// One line that is written over on a terminal; a line now and then elsewhere.
struct OnStderr {
    terminal: bool,
    last: Option<Instant>,
}

impl OnStderr {
    fn new() -> Self {
        Self { terminal: stderr().is_terminal(), last: None }
    }

    fn clear(&self) {
        if self.terminal {
            let _ = write!(stderr(), "\r\x1b[K");
        }
    }
}

impl Progress for OnStderr {
    fn at(&mut self, done: f64, what: &str) {
        let every = Duration::from_millis(if self.terminal { 50 } else { 5000 });
        if self.last.is_some_and(|last| last.elapsed() < every) {
            return;
        }
        self.last = Some(Instant::now());
        let line = format!("{:3.0} % {}", done * 100.0, printable(what));
        // A closed terminal is no reason to stop measuring.
        let _ = if self.terminal {
            // A line that breaks cannot be written over.
            let line: String =
                line.chars().take(columns(&stderr()).map_or(usize::MAX, |columns| columns - 1)).collect();
            write!(stderr(), "\r\x1b[K{line}")
        } else {
            writeln!(stderr(), "{line}")
        };
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn words_are_read_strictly() {
        assert_eq!(device("cuda:3"), Ok(DeviceChoice::Cuda(3)));
        assert!(device("gpu").is_err() && device("cuda:x").is_err() && engine("aio").is_err());
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        assert!(["0", "-1", "nan", "inf", "1e-30", "soon"].iter().all(|text| seconds(text).is_err()));
        assert_eq!(size("64MiB"), Ok(ByteCount::mib(64)));
        assert!(size("64").is_err_and(|why| why.contains("64")));
    }
}
