//! The program `funicular`; see [`funicular::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    let relaunch = std::env::current_exe().map(|program| vec![program.into_os_string()]).unwrap_or_default();
    let code = funicular::cli::run(std::env::args_os().skip(1), &relaunch, None);
    ExitCode::from(u8::try_from(code).unwrap_or(2))
}
