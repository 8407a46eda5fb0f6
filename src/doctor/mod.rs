//! `funicular doctor`: what this machine offers, what is in the way, and what to do about it.
//!
//! C1: everything is found out by doing it, where that is possible. C2: every WARN and FAIL names the next action.
//! C3: what could take this process down is tried in a child process, and every child has a time limit.

mod check;
pub mod child;
mod disks;
pub mod drive;
pub mod facts;
mod gpu;
mod host;
mod policy;
mod python;

pub use check::{Check, Options, Status};
pub use gpu::page_lock;
pub use policy::obstacles;

/// A seccomp profile for containers that allows io_uring and denies what Docker's own profile is known for denying.
pub const SECCOMP: &str = include_str!("seccomp.json");

/// All checks, in the order in which they are shown.
pub fn examine(options: &Options) -> Vec<Check> {
    let mut checks = host::checks();
    checks.extend(gpu::checks(options));
    for path in &options.paths {
        checks.extend(disks::checks(path));
    }
    checks.push(disks::io_uring());
    checks.push(python::torch(&options.relaunch));
    checks
}

/// The exit code: 0 all is well, 1 something could be better, 3 something does not work. 2 is for what could not be looked at.
pub fn exit_code(checks: &[Check]) -> i32 {
    match checks.iter().map(|check| check.status).max() {
        Some(Status::Fail) => 3,
        Some(Status::Warn) => 1,
        _ => 0,
    }
}

/// The checks for a terminal.
pub fn text(checks: &[Check]) -> String {
    let width = checks.iter().map(|check| check.name.chars().count()).max().unwrap_or(0) + 4;
    let mut out = format!("funicular {}\n", env!("CARGO_PKG_VERSION"));
    for Check { name, status, found, action } in checks {
        let dots = ".".repeat(width.saturating_sub(name.chars().count()));
        out += &format!("{name} {dots} {} {found}\n", status.tag());
        if let Some(action) = action {
            out += &format!("{:>1$}-> {action}\n", "", width + 2);
        }
    }
    let count = |status| checks.iter().filter(|check| check.status == status).count();
    out + &format!("{} okay, {} to improve, {} failed\n", count(Status::Okay), count(Status::Warn), count(Status::Fail))
}

/// The checks as JSON.
pub fn json(checks: &[Check]) -> String {
    let report = serde_json::json!({
        "made_by": "funicular doctor",
        "version": env!("CARGO_PKG_VERSION"),
        "date": facts::utc_now(),
        "exit": exit_code(checks),
        "checks": checks,
    });
    format!("{report:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Code, Error};

    #[test]
    fn the_worst_check_decides_and_every_complaint_has_an_action() {
        let okay = Check::okay("kernel", "6.1");
        let warn = Check::warn("huge pages", "never", "Switch them on.");
        let fail = Check::failed("path /x", &Error::new(Code::NotADisk, "/x is tmpfs."));
        assert_eq!(exit_code(std::slice::from_ref(&okay)), 0);
        assert_eq!(exit_code(&[okay.clone(), warn.clone()]), 1);
        let all = [okay, warn, fail];
        assert_eq!(exit_code(&all), 3);
        let text = text(&all);
        assert!(text.contains("kernel ........ [OKAY] 6.1\n"), "{text}");
        assert!(text.contains("huge pages .... [WARN] never\n"), "{text}");
        assert!(text.contains("[FAIL] FN-E603 /x is tmpfs.\n"), "{text}");
        assert_eq!(text.matches("-> ").count(), 2);
        assert!(text.ends_with("1 okay, 1 to improve, 1 failed\n"));
        let json: serde_json::Value = serde_json::from_str(&json(&all)).expect("JSON");
        assert_eq!(json["checks"][1]["status"], "WARN");
        assert_eq!(json["exit"], 3);
    }

    #[test]
    fn the_seccomp_profile_allows_io_uring_and_is_json() {
        let profile: serde_json::Value = serde_json::from_str(SECCOMP).expect("JSON");
        assert_eq!(profile["defaultAction"], "SCMP_ACT_ALLOW");
        let denied = profile["syscalls"][0]["names"].as_array().expect("names");
        assert!(denied.iter().any(|name| name == "kexec_load"));
        assert!(denied.iter().all(|name| !name.as_str().expect("a name").starts_with("io_uring")));
    }
}
