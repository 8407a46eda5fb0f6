//! `funicular policy`: what the subcommands say, without printing it.

use std::path::{Path, PathBuf};

use super::{
    Policy,
    import::{self, Hints, Imported},
    read_text, schema,
};
use crate::error::{Code, Error, Result};

/// What a subcommand says and how it ends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// For the standard output.
    pub out: String,
    /// For the standard error.
    pub err: String,
    /// Exit code: 0, or 1 after an error.
    pub code: u8,
}

impl From<Result<Self>> for Output {
    fn from(result: Result<Self>) -> Self {
        result.unwrap_or_else(|error| Self { err: format!("{error}\n"), code: 1, ..Self::default() })
    }
}

/// What lies over a file: environment variables, then `--set` arguments.
#[derive(Clone, Debug, Default)]
pub struct Overlay {
    /// Environment variables by name; those that are not for policies are left alone.
    pub env: Vec<(String, String)>,
    /// `key=value`.
    pub sets: Vec<String>,
}

/// Reads a policy as a run would and says whether a run would take it.
pub fn check(file: &Path, overlay: &Overlay) -> Output {
    let checked = || -> Result<Output> {
        let policy = resolve(Some(file), overlay)?;
        policy.check_consistent()?;
        Ok(Output { out: format!("{}: a valid policy\n", file.display()), ..Output::default() })
    };
    checked().into()
}

/// The whole policy that results, every key written out; the defaults without a file.
pub fn show(file: Option<&Path>, overlay: &Overlay) -> Output {
    resolve(file, overlay).and_then(|policy| Ok(Output { out: policy.to_toml()?, ..Output::default() })).into()
}

/// The JSON Schema.
pub fn schema() -> Output {
    Output { out: format!("{:#}\n", schema::json_schema()), ..Output::default() }
}

/// Another system's configuration as a policy file with the three lists as comments. A file that refers to another
/// one is followed once; the path counts from the file's folder, then from the working directory.
pub fn import(file: &Path, hints: Hints) -> Output {
    let imported = || -> Result<Output> {
        let first = read(file, hints)?;
        let (imported, note) = match &first.refers_to {
            None => (first, String::new()),
            Some(path) => {
                let beside = file.parent().map_or_else(|| PathBuf::from(path), |dir| dir.join(path));
                let target = if beside.exists() { beside } else { PathBuf::from(path) };
                (follow(file, &target, hints)?, format!("{} refers to {}\n", file.display(), target.display()))
            }
        };
        let Imported { name, mapped, ignored, undecided, .. } = &imported;
        let sums = format!("{} mapped, {} ignored, {} to decide", mapped.len(), ignored.len(), undecided.len());
        Ok(Output { out: imported.to_string(), err: format!("{note}{name}: {sums}\n"), code: 0 })
    };
    imported().into()
}

/// Imports the file that a configuration names as its DeepSpeed file. Errors quote its text only if it is a DeepSpeed
/// configuration: the user did not name it.
fn follow(from: &Path, target: &Path, hints: Hints) -> Result<Imported> {
    let (from, name) = (from.display(), target.display().to_string());
    let text = read_text(target).map_err(|e| e.because(&format!("{from} names it as its DeepSpeed configuration.")))?;
    import::referred(&text, &name, hints).ok_or_else(|| {
        let what = format!(
            "{from}: names {name} as its DeepSpeed configuration, but that is not JSON with a section zero_optimization; nothing of it is shown."
        );
        Error::new(Code::PolicyFile, what).action("Correct the path; or import that file by itself to see what is wrong.")
    })
}

fn read(file: &Path, hints: Hints) -> Result<Imported> {
    import::any(&read_text(file)?, &file.display().to_string(), hints)
}

/// The policy that a file, or none, becomes under what lies over it.
///
/// # Errors
/// `FN-E501` to `FN-E504`.
pub fn resolve(file: Option<&Path>, overlay: &Overlay) -> Result<Policy> {
    let mut policy = file.map_or_else(|| Ok(Policy::default()), Policy::from_file)?;
    policy = policy.with_env(overlay.env.iter().map(|(name, value)| (name, value)))?;
    for set in &overlay.sets {
        let (key, value) = set.split_once('=').ok_or_else(|| {
            Error::new(Code::PolicyKey, format!("--set {set}: no '=' in it.")).action("Write --set budget.hbm=12GiB.")
        })?;
        policy.set(key.trim(), value)?;
    }
    Ok(policy)
}
