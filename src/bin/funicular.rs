//! The command line: arguments in, text and an exit code out. What the subcommands say is made in the library.

use std::{io::Write, path::PathBuf, process::ExitCode};

use clap::{Args, Parser, Subcommand};
use funicular::policy::{
    cli::{self, Output, Overlay},
    import::Hints,
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
    /// Check, show and import policy files.
    #[command(subcommand)]
    Policy(PolicyCommand),
}

#[derive(Subcommand)]
enum PolicyCommand {
    /// Read a policy as a run would: exit code 0 if a run would take it.
    Check {
        /// A TOML or JSON policy.
        file: PathBuf,
        #[command(flatten)]
        sets: Sets,
    },
    /// Print the whole policy that results, every key written out.
    Show {
        /// A TOML or JSON policy; the defaults without one.
        file: Option<PathBuf>,
        #[command(flatten)]
        sets: Sets,
    },
    /// Print the JSON Schema of policies.
    Schema,
    /// Turn a DeepSpeed, accelerate or Lightning configuration into a policy.
    Import {
        /// ds_config.json, accelerate's YAML, or Lightning's arguments (.py or JSON).
        file: PathBuf,
        /// The model's hidden size, for sizes that are "auto".
        #[arg(long, value_name = "N")]
        hidden_size: Option<u64>,
    },
}

#[derive(Args)]
struct Sets {
    /// Set a key over the file and the environment; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
}

impl From<Sets> for Overlay {
    fn from(sets: Sets) -> Self {
        let utf8 = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        Self { env: std::env::vars_os().filter_map(utf8).collect(), sets: sets.sets }
    }
}

fn main() -> ExitCode {
    let output = match Arguments::parse().command {
        Command::Policy(command) => policy(command),
    };
    finish(&output)
}

fn policy(command: PolicyCommand) -> Output {
    match command {
        PolicyCommand::Check { file, sets } => cli::check(&file, &sets.into()),
        PolicyCommand::Show { file, sets } => cli::show(file.as_deref(), &sets.into()),
        PolicyCommand::Schema => cli::schema(),
        PolicyCommand::Import { file, hidden_size } => cli::import(&file, Hints { hidden_size }),
    }
}

/// Prints; a reader that went away (`| head`) is no error.
fn finish(output: &Output) -> ExitCode {
    let printed = std::io::stdout().write_all(output.out.as_bytes()).and_then(|()| std::io::stdout().flush());
    let told = std::io::stderr().write_all(output.err.as_bytes());
    match printed.and(told) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => ExitCode::FAILURE,
        _ => ExitCode::from(output.code),
    }
}
