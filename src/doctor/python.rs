//! The check of torch: its version and CUDA's, without importing it.

use std::{ffi::OsString, path::Path, process::Command, time::Duration};

use crate::doctor::Check;

/// Reads torch/version.py: importing torch takes seconds, and may fail for reasons that are not ours.
const SCRIPT: &str = "import importlib.util as u, os\n\
    s = u.find_spec('torch')\n\
    if s is None: print('none')\n\
    else:\n\
    \x20   scope = {}\n\
    \x20   exec(open(os.path.join(os.path.dirname(s.origin), 'version.py')).read(), scope)\n\
    \x20   print(scope.get('__version__'), scope.get('cuda'))\n";

pub(super) fn torch(relaunch: &[OsString]) -> Check {
    // The wheel's command was started by the interpreter that will train; else take the one in the path.
    let own = relaunch.first().filter(|program| {
        Path::new(program).file_name().is_some_and(|name| name.to_string_lossy().starts_with("python"))
    });
    let python = own.cloned().unwrap_or_else(|| OsString::from("python3"));
    let answer = child(&python);
    found(answer.as_deref().ok(), &python.to_string_lossy(), own.is_some())
}

fn child(python: &OsString) -> Result<String, String> {
    super::child::output(Command::new(python).args(["-c", SCRIPT]), Duration::from_secs(30))
}

fn found(answer: Option<&str>, python: &str, is_own: bool) -> Check {
    let mut words = answer.unwrap_or_default().split_whitespace();
    match (words.next(), words.next()) {
        (Some(version), Some("None")) => Check::okay("torch", format!("{version}, built without CUDA")),
        (Some(version), Some(cuda)) => Check::okay("torch", format!("{version}, CUDA {cuda}")),
        _ if is_own => Check::warn(
            "torch",
            format!("{python} has none"),
            "Install torch 2.4 or later: https://pytorch.org/get-started/locally.",
        ),
        _ => Check::okay("torch", format!("none found by {python}; it is needed for training only")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn versions_are_told_apart_from_their_absence() {
        assert_eq!(found(Some("2.11.0+cu128 12.8\n"), "python", true).found, "2.11.0+cu128, CUDA 12.8");
        assert_eq!(found(Some("2.11.0+cpu None\n"), "python", true).found, "2.11.0+cpu, built without CUDA");
        assert_eq!(found(Some("none\n"), "python", true).status, Status::Warn);
        assert_eq!(found(None, "python3", false).status, Status::Okay);
    }

    #[test]
    fn the_script_is_python() {
        if let Ok(answer) = child(&OsString::from("python3")) {
            assert!(answer.trim() == "none" || answer.split_whitespace().count() == 2, "{answer}");
        }
    }
}
