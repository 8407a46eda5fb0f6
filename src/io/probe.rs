//! Chooses the engine by trying it, and says why.

use std::sync::Arc;

use super::{
    EngineChoice, EngineOptions, IoCompletion, IoEngine, IoFile, Sink,
    threads::Threads,
    uring::{Refused, Uring},
};
use crate::{
    error::{Code, Error, Result},
    memory::HostRegion,
};

/// An engine at work, and what its user should know.
pub struct OpenedEngine {
    /// The engine.
    pub engine: Box<dyn IoEngine>,
    /// Why it fell back, what is slower than it could be; each a full line with its code.
    pub notes: Vec<String>,
}

impl std::fmt::Debug for OpenedEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenedEngine").field("engine", &self.engine.kind()).field("notes", &self.notes).finish()
    }
}

/// Starts an engine over `files`, whose indices are the [`super::FileId`]s. `regions` is the memory that leases lie in:
/// io_uring registers it where the limit of locked memory allows. Completions go to `sink`; see [`Sink`] for its duties.
///
/// # Errors
/// `FN-E601` when the engine that was asked for does not work here.
pub fn open_engine(
    options: &EngineOptions,
    files: Vec<IoFile>,
    regions: &[Arc<HostRegion>],
    sink: impl Fn(IoCompletion) + Send + Sync + 'static,
) -> Result<OpenedEngine> {
    let sink: Sink = Arc::new(sink);
    let mut notes = Vec::new();
    let mut files = files;
    if options.choice != EngineChoice::Threads {
        match Uring::start(options, files, regions, Arc::clone(&sink)) {
            Ok((engine, notes)) => return Ok(OpenedEngine { engine: Box::new(engine), notes }),
            Err((refused, returned)) => {
                let (cause, remedy) = explain(&refused, io_uring_disabled());
                if options.choice == EngineChoice::IoUring {
                    return Err(Error::new(Code::EngineUnavailable, format!("io_uring does not work here: {cause}."))
                        .errno(refused.errno)
                        .action(format!("{remedy} Or set nvme.engine = \"auto\".")));
                }
                let threads = options.threads.min(options.queue_depth).max(1);
                notes.push(format!(
                    "FN-W601 io_uring unavailable: {cause}. Using engine 'threads' ({threads}). To enable: {remedy}"
                ));
                files = returned;
            }
        }
    }
    let engine = Box::new(Threads::start(options, files, sink)?);
    Ok(OpenedEngine { engine, notes })
}

/// Cause and remedy of a refusal. `disabled` is the sysctl `kernel.io_uring_disabled`, if the kernel has it.
fn explain(refused: &Refused, disabled: Option<u32>) -> (String, &'static str) {
    let Refused { call, errno } = *refused;
    let (why, remedy) = match (errno, disabled) {
        (libc::EPERM | libc::EACCES, Some(2)) => {
            ("switched off by sysctl kernel.io_uring_disabled=2", "sysctl -w kernel.io_uring_disabled=0 as root.")
        }
        (libc::EPERM | libc::EACCES, Some(1)) => (
            "sysctl kernel.io_uring_disabled=1 allows it only to kernel.io_uring_group",
            "Add this user to that group, or sysctl -w kernel.io_uring_disabled=0 as root.",
        ),
        (libc::EPERM | libc::EACCES, Some(0) | None) => (
            "blocked by a seccomp profile, as Docker's and containerd's default ones do (the sysctl allows it)",
            "Run the container with a seccomp profile that allows io_uring_setup, io_uring_enter and io_uring_register \
             (docker run --security-opt seccomp=PROFILE.json).",
        ),
        (libc::ENOSYS, _) => (
            "this kernel, or the sandbox around it, has no io_uring",
            "Use Linux 5.6 or later with CONFIG_IO_URING, outside gVisor.",
        ),
        (libc::EINVAL, _) => ("this kernel is too old for what is needed", "Use Linux 5.6 or later."),
        (libc::ENOMEM, _) => (
            "the limit of locked memory (RLIMIT_MEMLOCK) is used up",
            "Raise it: ulimit -l unlimited, docker run --ulimit memlock=-1, or LimitMEMLOCK=infinity.",
        ),
        (libc::EMFILE | libc::ENFILE, _) => ("too many open files", "Raise the limit: ulimit -n."),
        _ => ("the kernel refused", "See dmesg."),
    };
    (format!("{} from {call} ({why})", errno_name(errno)), remedy)
}

fn errno_name(errno: i32) -> String {
    match errno {
        libc::EPERM => "EPERM".to_owned(),
        libc::EACCES => "EACCES".to_owned(),
        libc::ENOSYS => "ENOSYS".to_owned(),
        libc::ENOMEM => "ENOMEM".to_owned(),
        libc::EINVAL => "EINVAL".to_owned(),
        other => std::io::Error::from_raw_os_error(other).to_string(),
    }
}

fn io_uring_disabled() -> Option<u32> {
    std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_its_cause_and_remedy() {
        let text = |errno, disabled| {
            let (cause, remedy) = explain(&Refused { call: "io_uring_setup", errno }, disabled);
            format!("{cause} {remedy}")
        };
        assert!(text(libc::EPERM, Some(0)).contains("EPERM from io_uring_setup (blocked by a seccomp profile"));
        assert!(text(libc::EPERM, None).contains("seccomp"));
        assert!(text(libc::EPERM, Some(2)).contains("kernel.io_uring_disabled=2"));
        assert!(text(libc::EPERM, Some(1)).contains("io_uring_group"));
        assert!(text(libc::ENOSYS, None).contains("Linux 5.6"));
        assert!(text(libc::ENOMEM, Some(0)).contains("memlock"));
    }
}
