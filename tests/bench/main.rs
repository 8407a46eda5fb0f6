//! The program itself: `funicular bench` and `funicular doctor`, on a small scale, and in the situations that go wrong.
#![expect(unsafe_code, reason = "lowers limits of child processes before they start")]

mod limits;
mod ranks;

use std::{
    io::{self, Read},
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use funicular::{Code, policy::profile::Profile};
use serde_json::Value;

/// The program, in a directory on a disk.
fn funicular(arguments: &[&str], dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_funicular"));
    command.args(arguments).current_dir(dir).stdin(Stdio::null()).env("XDG_CONFIG_HOME", dir.join("config"));
    command
}

/// A benchmark that takes about a second.
const SMALL: [&str; 10] =
    ["bench", "--device", "host", "--quick", "--size", "16MiB", "--rounds", "2", "--seconds", "0.3"];

fn small<'a>(more: &[&'a str]) -> Vec<&'a str> {
    SMALL.iter().chain(more).copied().collect()
}

fn disk() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory on a disk")
}

fn run(command: &mut Command) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = command.output().expect("starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (status.code(), text(stdout), text(stderr))
}

/// Text without the ends of its lines, which depend on how long paths are.
fn flat(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn entries(dir: &Path) -> Vec<String> {
    let names = std::fs::read_dir(dir).expect("readable").flatten();
    names.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// What the child does to itself before it becomes the program.
fn before(command: &mut Command, what: impl Fn() -> io::Result<()> + Send + Sync + 'static) -> &mut Command {
    // SAFETY: what the tests pass makes system calls only, as is allowed between fork and exec.
    unsafe { command.pre_exec(what) }
}

/// Lets the child get `errno` from a system call whose flags, in argument `argument`, have all of `flags`.
fn deny(call: libc::c_long, argument: u32, flags: u32, errno: i32) -> io::Result<()> {
    const LOAD: u16 = 0x20;
    const EQUAL: u16 = 0x15;
    const AND: u16 = 0x54;
    const RETURN: u16 = 0x06;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let filter = [
        step(LOAD, 0, 0, 0),
        step(EQUAL, 0, 4, call as u32),
        // The lower half of an argument, on a little-endian machine.
        step(LOAD, 0, 0, 16 + 8 * argument),
        step(AND, 0, 0, flags),
        step(EQUAL, 0, 1, flags),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    // SAFETY: plain numbers, and a program that lives during the call.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) == 0
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn no_io_uring() -> io::Result<()> {
    deny(libc::SYS_io_uring_setup, 0, 0, libc::EPERM)
}

fn no_direct_io() -> io::Result<()> {
    deny(libc::SYS_openat, 2, libc::O_DIRECT as u32, libc::EINVAL)
}

/// 64 KiB of locked memory, and no privilege to lock more.
fn little_memlock() -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: 64 << 10, rlim_max: 64 << 10 };
    // SAFETY: plain numbers; the capability sets are dropped by becoming `nobody`, if we are root at all.
    let done = unsafe {
        libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) == 0
            && (libc::geteuid() != 0 || (libc::setgid(65534) == 0 && libc::setuid(65534) == 0))
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn hop<'a>(report: &'a Value, name: &str) -> &'a Value {
    let hops = report["hops"].as_array().expect("hops");
    hops.iter().rfind(|hop| hop["name"] == name).unwrap_or_else(|| panic!("no {name} in {report:#}"))
}

#[test]
fn everything_is_measured_and_every_output_is_whole() {
    let dir = disk();
    let more = ["--json", "r.json", "--csv", "r.csv", "--html", "r.html", "--save", "p.toml", "--path", "."];
    // Two rounds say too little for a verdict.
    let (code, out, err) = run(&mut funicular(&small(&[&more[..], &["--force"]].concat()), dir.path()));
    assert_eq!(code, Some(0), "{err}");
    let mut left = entries(dir.path());
    left.sort();
    assert_eq!(left, ["p.toml", "r.csv", "r.html", "r.json"], "nothing else is left");

    let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).expect(name);
    let report: Value = serde_json::from_str(&read("r.json")).expect("JSON");
    let measured = [
        "host_to_device",
        "device_to_host",
        "bidirectional",
        "host_memory",
        "adamw_cpu",
        "adamw_one_thread",
        "adamw_and_copies",
    ];
    for name in measured {
        let figure = &hop(&report, name)["figure"];
        let median = figure["bytes_per_second"].as_f64().expect(name);
        let rates: Vec<f64> = figure["rates"].as_array().expect(name).iter().filter_map(Value::as_f64).collect();
        assert!(median > 0.0 && rates.len() == 2 && out.contains(name), "{figure:#} {out}");
        assert!(figure["low"].as_f64() <= Some(median) && Some(median) <= figure["high"].as_f64());
    }
    assert!(hop(&report, "adamw_and_copies")["figure"]["copied_per_second"].as_f64().expect("copies") > 0.0);
    let direct = hop(&report, "nvme_read")["skipped"].is_null();
    for name in ["nvme_read", "nvme_write", "nvme_read_write"] {
        let hop = hop(&report, name);
        assert_eq!(hop["figure"].is_object(), direct, "{hop:#}");
        assert!(!direct || hop["fio"].as_str().expect("a command").starts_with("fio --name=nvme_"));
    }
    if direct {
        for name in ["nvme_to_device", "device_to_nvme", "adamw_nvme", "train_traffic"] {
            let hop = hop(&report, name);
            assert!(hop["limit"]["fraction"].as_f64().expect(name) > 0.0, "{hop:#}");
            assert_eq!(hop["direct"], true);
        }
        let profile = Profile::read(&dir.path().join("p.toml")).expect("a profile");
        assert_eq!(profile.paths.len(), 1);
        let (path, nvme, memory, device) = (&profile.paths[0], &profile.nvme, &profile.memory, &profile.device);
        let all = [
            [path.read, path.write, path.read_write],
            [nvme.read, nvme.write, nvme.read_write],
            [memory.adamw_params, memory.adamw_params_one_thread, memory.adamw_params_beside_copies],
            [memory.bandwidth, nvme.adamw_params, device.bidirectional],
            [device.host_to_device, device.device_to_host, device.bidirectional],
        ];
        assert!(all.as_flattened().iter().all(|&rate| rate > 0.0), "{profile:?}");
    }
    assert!(report["verdict"][0].as_str().expect("a verdict").contains("bound by"));
    assert!(
        report["doubts"].as_array().expect("doubts").iter().any(|why| why.as_str().expect("text").contains("2 rounds"))
    );
    assert!(flat(&out).contains("not to be relied on") && flat(&out).contains("bound by"), "{out}");
    let here = dir.path().to_str().expect("UTF-8");
    assert!(out.lines().all(|line| line.chars().count() <= 100 || line.contains(here)), "{out}");

    let csv = read("r.csv");
    let columns = csv.lines().next().expect("a header").split(',').count();
    assert!(csv.lines().filter(|line| !line.contains('"')).all(|line| line.split(',').count() == columns), "{csv}");
    assert!(csv.contains("\nsweep,adamw_cpu,"), "{csv}");

    let page = read("r.html");
    assert!(page.starts_with("<!doctype html>") && page.ends_with("</html>\n"));
    assert!(page.contains("<svg") && page.contains("bound by"));
    for outside in ["http:", "https:", "src=", "@import", "url(", "<script", "<link"] {
        assert!(!page.contains(outside), "the page needs {outside}");
    }
    // A second run replaces what the first one wrote; but not without --force what plans are made with.
    std::fs::write(dir.path().join("p.toml"), Profile::HEADER).expect("writes");
    let (code, out, err) = run(&mut funicular(&small(&[&more[..], &["--no-sweep"]].concat()), dir.path()));
    assert!(code == Some(3) && err.contains("not saved") && err.contains("p.toml") && err.contains("--force"), "{err}");
    assert!(flat(&out).contains("No verdict is given") && !flat(&out).contains("bound by"), "{out}");
    assert_eq!(read("p.toml"), Profile::HEADER);
    let report: Value = serde_json::from_str(&read("r.json")).expect("JSON");
    assert_eq!(report["verdict"], Value::Array(Vec::new()));
    assert!(report["sweeps"].as_array().expect("sweeps").is_empty(), "this is the second run's");
}

#[test]
fn a_file_of_the_user_is_never_replaced() {
    let dir = disk();
    std::fs::write(dir.path().join("thesis.html"), "three years").expect("writes");
    let (code, _, err) = run(&mut funicular(&small(&["--html", "thesis.html"]), dir.path()));
    assert_eq!(code, Some(2));
    assert!(err.contains(Code::OutputFile.as_str()) && err.contains("thesis.html"), "{err}");
    assert_eq!(std::fs::read_to_string(dir.path().join("thesis.html")).expect("reads"), "three years");
}

#[test]
fn paths_that_cannot_be_measured_are_errors() {
    let dir = disk();
    let refused = |path: &str, code: Code| {
        let (exit, out, err) = run(&mut funicular(&small(&["--path", path]), dir.path()));
        assert_eq!(exit, Some(2), "{out}");
        assert!(err.contains(code.as_str()) && err.contains(path), "{err}");
    };
    refused("missing", Code::PathUnusable);
    // Read-only for everyone, root included.
    refused("/proc/self", Code::PathUnusable);
    refused("/dev/shm", Code::NotADisk);
    let (exit, _, err) = run(&mut funicular(&["bench", "--device", "host", "--size", "4000TiB"], dir.path()));
    assert_eq!(exit, Some(2));
    assert!(err.contains(Code::DiskFull.as_str()) && err.contains("--size"), "{err}");
    assert!(entries(dir.path()).is_empty(), "nothing is left");
    let wrong = [("--size", "64"), ("--device", "gpu"), ("--engine", "aio"), ("--depth", "0"), ("--seconds", "0")];
    for (argument, value) in wrong {
        assert_eq!(run(&mut funicular(&["bench", argument, value], dir.path())).0, Some(2), "{argument} {value}");
    }
    let (exit, _, err) = run(&mut funicular(&["bench", "--size", "1MiB"], dir.path()));
    assert!(exit == Some(2) && err.contains(Code::PolicyValue.as_str()), "{err}");
}

#[test]
fn without_a_disk_the_rest_is_measured() {
    let dir = disk();
    // No time at all is time for a part of each; and the warning is in colour where that is asked for.
    let arguments =
        ["bench", "--device", "host", "--quick", "--no-nvme", "--no-sweep", "--rounds", "1", "--seconds", "1e-9"];
    let (code, out, err) = run(funicular(&arguments, dir.path()).env("CLICOLOR_FORCE", "1").env_remove("NO_COLOR"));
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains("adamw_cpu") && !out.contains("nvme_read "), "{out}");
    assert!(
        out.contains("\x1b[33mThese figures are not to be relied on:\x1b[0m") && out.contains("only 1 round"),
        "{out}"
    );
}

#[test]
fn without_io_uring_the_other_engine_is_measured_and_the_reason_given() {
    let dir = disk();
    let arguments = small(&["--no-sweep", "--json", "r.json"]);
    let (code, out, err) = run(before(&mut funicular(&arguments, dir.path()), no_io_uring));
    assert_eq!(code, Some(0), "{err}");
    let report = std::fs::read_to_string(dir.path().join("r.json")).expect("written");
    let report: Value = serde_json::from_str(&report).expect("JSON");
    if hop(&report, "nvme_read")["figure"].is_object() {
        assert_eq!(hop(&report, "train_traffic")["engine"], "threads");
        assert!(hop(&report, "nvme_read")["fio"].as_str().expect("a command").contains("--ioengine=psync"));
        assert!(flat(&out).contains("FN-W601") && flat(&out).contains("seccomp"), "{out}");
    }
    let forced = small(&["--engine", "io_uring"]);
    let (code, _, err) = run(before(&mut funicular(&forced, dir.path()), no_io_uring));
    assert_eq!(code, Some(2));
    assert!(err.contains(Code::EngineUnavailable.as_str()) && err.contains("EPERM"), "{err}");
    assert_eq!(entries(dir.path()), ["r.json"]);
}

#[test]
fn without_direct_io_no_figure_of_a_disk_is_given() {
    let dir = disk();
    let arguments = small(&["--json", "r.json"]);
    let (code, out, err) = run(before(&mut funicular(&arguments, dir.path()), no_direct_io));
    assert_eq!(code, Some(0), "{err}");
    let report = std::fs::read_to_string(dir.path().join("r.json")).expect("written");
    let report: Value = serde_json::from_str(&report).expect("JSON");
    for name in ["nvme_read", "nvme_write", "nvme_read_write"] {
        let hop = hop(&report, name);
        assert!(hop["figure"].is_null(), "{hop:#}");
        assert!(hop["skipped"].as_str().expect("why").contains("page cache"), "{hop:#}");
    }
    let names: Vec<&str> = report["hops"].as_array().expect("hops").iter().filter_map(|h| h["name"].as_str()).collect();
    assert!(!names.contains(&"train_traffic") && names.contains(&"adamw_cpu"), "{names:?}");
    assert!(report["sweeps"].as_array().expect("sweeps").iter().all(|sweep| sweep["name"] != "nvme_read"));
    assert!(flat(&out).contains("the figure would be memory's"), "{out}");
}

#[test]
fn a_gpu_that_is_not_there_is_an_error_and_not_the_processor() {
    let dir = disk();
    // No machine has so many.
    let (code, out, err) = run(&mut funicular(&["bench", "--quick", "--device", "cuda:99"], dir.path()));
    assert!(code == Some(2) && out.is_empty(), "{out}");
    assert!(err.contains(Code::NoCuda.as_str()), "{err}");
    assert!(entries(dir.path()).is_empty());
    let (code, checks) = examined(&mut funicular(&["doctor", "--json", "--device", "cuda:99"], dir.path()));
    assert_eq!(code, Some(3));
    assert_eq!(check(&checks, "GPU 99")["status"], "FAIL");
}

#[test]
fn with_little_locked_memory_everything_runs() {
    let dir = disk();
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(dir.path(), open).expect("opens it to nobody");
    // The program has to be in reach of the unprivileged user, too.
    let program = tempfile::Builder::new().prefix("funicular-test").tempdir().expect("a directory");
    std::fs::set_permissions(program.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("opens it");
    let copy = program.path().join("funicular");
    std::fs::copy(env!("CARGO_BIN_EXE_funicular"), &copy).expect("copies");
    let mut command = Command::new(copy);
    command.args(small(&["--no-sweep", "--path"])).arg(dir.path()).current_dir("/").stdin(Stdio::null());
    let output = before(&mut command, little_memlock).output();
    let Ok(output) = output else { return };
    let err = String::from_utf8_lossy(&output.stderr);
    if err.contains("Permission denied") {
        // The target folder lies where the user `nobody` may not look.
        return;
    }
    assert!(output.status.success(), "{err}");
    let out = String::from_utf8_lossy(&output.stdout);
    assert!(out.contains("FN-I602") || !out.contains("io_uring"), "{out}");
}

#[test]
fn an_interrupted_run_removes_what_it_made() {
    let dir = disk();
    let long = ["bench", "--device", "host", "--size", "64MiB", "--seconds", "600", "--no-sweep", "--json", "r.json"];
    let mut child = funicular(&long, dir.path()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("starts");
    let begun = Instant::now();
    while entries(dir.path()).is_empty() && begun.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(5));
    }
    let pid = libc::pid_t::try_from(child.id()).expect("a pid");
    // SAFETY: a signal to our own child.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGINT) }, 0);
    let mut err = String::new();
    child.stderr.take().expect("a pipe").read_to_string(&mut err).expect("UTF-8");
    assert_eq!(child.wait().expect("ends").code(), Some(130), "{err}");
    assert!(err.contains(Code::Interrupted.as_str()), "{err}");
    assert!(entries(dir.path()).is_empty(), "{:?}", entries(dir.path()));
}

#[test]
fn fio_runs_beside_it_or_is_said_to_be_missing() {
    let dir = disk();
    let arguments = small(&["--check", "--no-sweep", "--json", "r.json"]);
    let report = || -> Value {
        let text = std::fs::read_to_string(dir.path().join("r.json")).expect("written");
        serde_json::from_str(&text).expect("JSON")
    };
    let (code, out, err) = run(funicular(&arguments, dir.path()).env("PATH", "/nowhere"));
    assert_eq!(code, Some(0), "{err}");
    assert!(flat(&out).contains("fio is not installed"), "{out}");
    assert!(hop(&report(), "nvme_read")["fio_bytes_per_second"].is_null());
    if Command::new("fio").arg("--version").output().is_ok_and(|output| output.status.success()) {
        let (code, _, err) = run(&mut funicular(&arguments, dir.path()));
        assert_eq!(code, Some(0), "{err}");
        let hop = hop(&report(), "nvme_read").clone();
        assert_eq!(hop["fio_bytes_per_second"].as_f64().is_some_and(|rate| rate > 0.0), hop["figure"].is_object());
    }
}

fn examined(command: &mut Command) -> (Option<i32>, Vec<Value>) {
    let (code, out, err) = run(command);
    let report: Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}{err}"));
    (code, report["checks"].as_array().expect("checks").clone())
}

fn check<'a>(checks: &'a [Value], name: &str) -> &'a Value {
    checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("no {name} in {checks:#?}"))
}

#[test]
fn the_doctor_names_an_action_for_every_complaint() {
    let dir = disk();
    let arguments = ["doctor", "--json", "--device", "host"];
    let (code, checks) = examined(&mut funicular(&arguments, dir.path()));
    for check in &checks {
        let well = check["status"] == "OKAY";
        assert!(well || check["action"].as_str().is_some_and(|action| action.len() > 10), "{check:#}");
    }
    let worst = |status: &str| checks.iter().any(|check| check["status"] == status);
    assert_eq!(code, Some(if worst("FAIL") { 2 } else { i32::from(worst("WARN")) }));
    for name in
        ["kernel", "CPUs", "threads", "memory", "cgroup memory", "memlock", "huge pages", "NUMA", "page-lock limit"]
    {
        check(&checks, name);
    }
    assert_eq!(check(&checks, &format!("path {}", dir.path().display()))["status"], "OKAY");
    assert!(entries(dir.path()).is_empty());

    let (code, checks) = examined(before(&mut funicular(&arguments, dir.path()), no_io_uring));
    let ring = check(&checks, "io_uring");
    assert_eq!((code, &ring["status"]), (Some(1), &Value::from("WARN")));
    assert!(ring["action"].as_str().expect("an action").contains("--write-seccomp"), "{ring:#}");

    let (code, checks) = examined(&mut funicular(&["doctor", "--json", "--path", "missing"], dir.path()));
    assert_eq!(code, Some(3));
    let missing = format!("path {}", dir.path().join("missing").display());
    assert!(check(&checks, &missing)["found"].as_str().expect("text").starts_with(Code::PathUnusable.as_str()));
}

#[test]
fn the_doctor_writes_a_seccomp_profile_once() {
    let dir = disk();
    let arguments = ["doctor", "--write-seccomp", "seccomp.json"];
    assert_eq!(run(&mut funicular(&arguments, dir.path())).0, Some(0));
    let text = std::fs::read_to_string(dir.path().join("seccomp.json")).expect("written");
    assert_eq!(text, funicular::doctor::SECCOMP);
    let (code, _, err) = run(&mut funicular(&arguments, dir.path()));
    assert!(code == Some(2) && err.contains(Code::OutputFile.as_str()), "{err}");
}
