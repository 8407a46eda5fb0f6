//! `funicular policy`: what the subcommands say, without printing it.

use std::path::{Path, PathBuf};

use super::{
    Policy,
    import::{self, Hints, Imported},
    read::read_text,
    schema,
};
use crate::error::{Code, Error, Result};

/// What a subcommand says and how it ends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// For the standard output.
    pub out: String,
    /// For the standard error.
    pub err: String,
    /// Exit code: 0, 1 for "no", 2 if that could not be told, 3 for a valid policy that this machine cannot run.
    pub code: u8,
}

impl From<Result<Self>> for Output {
    fn from(result: Result<Self>) -> Self {
        result.unwrap_or_else(|error| Self { err: format!("{error}\n"), code: 2, ..Self::default() })
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

/// What is wrong with a file is a "no"; a file that cannot be read says nothing of what is in it.
fn answer(result: Result<Output>) -> Output {
    result.unwrap_or_else(|error| {
        let code = if error.code() == Code::PolicyFile { 2 } else { 1 };
        Output { err: format!("{error}\n"), code, ..Output::default() }
    })
}

/// What keeps a machine from running a policy.
#[derive(Debug, Default)]
pub struct Obstacles {
    /// What is in the way.
    pub certain: Vec<Error>,
    /// What could not be found out.
    pub unknown: Vec<Error>,
}

/// Reads a policy as a run would and says whether a run would take it: the policy by itself, then on the machine that
/// `look` looks at.
pub fn check(file: &Path, overlay: &Overlay, look: impl Fn(&Policy) -> Obstacles) -> Output {
    let checked = || -> Result<Output> {
        let policy = resolve(Some(file), overlay)?;
        policy.check_consistent()?;
        let Obstacles { certain, unknown } = look(&policy);
        let (verdict, code) = match (certain.is_empty(), unknown.is_empty()) {
            (true, true) => ("a valid policy", 0),
            (true, false) => ("a valid policy; whether this machine can run it could not be told", 2),
            (false, _) => ("a valid policy, but this machine cannot run it as it is", 3),
        };
        let err = certain.iter().chain(&unknown).map(|error| format!("{error}\n")).collect();
        Ok(Output { out: format!("{}: {verdict}\n", file.display()), err, code })
    };
    answer(checked())
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
/// one is followed once; the path counts from the file's folder, then from the working directory, then from each folder
/// above the file: training files name others from the root of their repository.
pub fn import(file: &Path, hints: Hints) -> Output {
    let imported = || -> Result<Output> {
        let text = read_text(file).map_err(|e| {
            // What is no text has advice of its own.
            if e.os_error().is_none() {
                return e;
            }
            let error = Error::new(e.code(), e.message()).action("Give the path of another system's configuration.");
            error.errno(e.os_error())
        })?;
        let first = import::any(&text, &file.display().to_string(), hints)?;
        let (imported, note) = match first.refers_to.clone() {
            None => (first, String::new()),
            Some(path) => {
                let target = referred(file, &path);
                let note = format!("{} refers to {}\n", file.display(), target.display());
                (follow(first, &target, hints)?, note)
            }
        };
        let Imported { name, mapped, ignored, undecided, .. } = &imported;
        let sums = format!("{} mapped, {} ignored, {} to decide", mapped.len(), ignored.len(), undecided.len());
        Ok(Output { out: imported.to_string(), err: format!("{note}{name}: {sums}\n"), code: 0 })
    };
    answer(imported())
}

/// Where a path leads that a file names.
fn referred(file: &Path, path: &str) -> PathBuf {
    let whole = std::path::absolute(file).unwrap_or_else(|_| file.to_path_buf());
    let above = file.ancestors().chain(whole.ancestors()).skip(2).map(|folder| folder.join(path));
    let beside = file.parent().map_or_else(|| PathBuf::from(path), |folder| folder.join(path));
    [beside.clone(), PathBuf::from(path)].into_iter().chain(above).find(|target| target.is_file()).unwrap_or(beside)
}

/// Imports the file that a configuration names as its DeepSpeed file. Errors quote its text only if it is a DeepSpeed
/// configuration: the user did not name it.
fn follow(outer: Imported, target: &Path, hints: Hints) -> Result<Imported> {
    let (from, name) = (outer.name.clone(), target.display().to_string());
    let system = if outer.refers_to_fsdp { "FSDP" } else { "DeepSpeed" };
    let text = read_text(target).map_err(|e| {
        let cause = e.message().strip_prefix(&format!("{name}: ")).unwrap_or(e.message());
        let what = format!("{from} names {name} as its {system} configuration, and it cannot be read: {cause}");
        let error = Error::new(e.code(), what).action("Put the file there, or import it by itself.");
        error.errno(e.os_error())
    })?;
    import::referred(&text, &name, outer, hints).ok_or_else(|| {
        let has = if system == "FSDP" { "keys of FSDP's" } else { "a section zero_optimization" };
        let what = format!(
            "{from}: names {name} as its {system} configuration, but that is not JSON with {has}; nothing of it is shown."
        );
        Error::new(Code::ImportFormat, what).action("Correct the path; or import that file by itself to see what is wrong.")
    })
}

/// The policy that a file, a preset or nothing becomes under what lies over it.
///
/// # Errors
/// `FN-E501` to `FN-E504`.
pub fn resolve(file: Option<&Path>, overlay: &Overlay) -> Result<Policy> {
    let mut policy = match (file, file.and_then(Path::to_str)) {
        (None, _) => Policy::default(),
        (_, Some(name)) => Policy::named(name)?,
        (Some(file), None) => Policy::from_file(file)?,
    };
    policy = policy.with_env(overlay.env.iter().map(|(name, value)| (name, value)))?;
    for set in &overlay.sets {
        let (key, value) = set.split_once('=').ok_or_else(|| {
            Error::new(Code::PolicyKey, format!("--set {set}: no '=' in it.")).action("Write --set budget.hbm=12GiB.")
        })?;
        policy.set(key.trim(), value)?;
    }
    Ok(policy)
}
