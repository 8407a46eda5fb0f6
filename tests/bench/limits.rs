//! What only root can arrange: small and strange file systems, cgroups, a switched-off io_uring. Where it cannot be
//! arranged, a test says why and checks nothing.

#![expect(unsafe_code, reason = "moves child processes into mount namespaces and cgroups before they start")]
#![expect(clippy::print_stderr, reason = "says why it checks nothing")]

use std::{
    ffi::CString,
    fs, io,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
};

use funicular::Code;

use super::{before, check, disk, entries, examined, flat, funicular, no_io_uring, run, small};

fn is_root() -> bool {
    // SAFETY: no arguments.
    unsafe { libc::geteuid() == 0 }
}

fn well(program: &str, arguments: &[&str]) -> bool {
    let output = Command::new(program).args(arguments).output();
    let ended_well = output.as_ref().is_ok_and(|output| output.status.success());
    if !ended_well {
        eprintln!("not run: {program} {arguments:?}: {output:?}");
    }
    ended_well
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// An ext4 file system in a file, mounted; gone when dropped.
struct Ext4 {
    at: PathBuf,
    _dir: tempfile::TempDir,
}

impl Ext4 {
    /// Of `mib`; `direct`: the loop device goes around the page cache. None where that is not possible.
    fn mounted(mib: u64, options: &str, direct: bool) -> Option<Self> {
        if !is_root() {
            eprintln!("not run: only root mounts file systems");
            return None;
        }
        let dir = disk();
        let (image, at) = (dir.path().join("image"), dir.path().join("mount"));
        fs::File::create(&image).and_then(|file| file.set_len(mib << 20)).expect("an empty image");
        fs::create_dir(&at).expect("a mount point");
        if !well("mkfs.ext4", &["-q", "-F", text(&image)])
            || !well("mount", &["-o", &format!("loop,{options}"), text(&image), text(&at)])
        {
            return None;
        }
        let mounted = Self { at, _dir: dir };
        let name = Command::new("losetup").args(["-n", "-O", "NAME", "-j", text(&image)]).output().expect("losetup");
        let name = String::from_utf8(name.stdout).expect("UTF-8");
        if direct && !well("losetup", &["--direct-io=on", name.trim()]) {
            return None;
        }
        Some(mounted)
    }

    fn left(&self) -> Vec<String> {
        entries(&self.at).into_iter().filter(|name| name != "lost+found").collect()
    }
}

impl Drop for Ext4 {
    /// The kernel lets go of a ring's files a moment after the process that had it is gone.
    fn drop(&mut self) {
        let unmounted = || Command::new("umount").arg(&self.at).output().is_ok_and(|output| output.status.success());
        for _ in 0..500 {
            if unmounted() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        well("umount", &["--lazy", text(&self.at)]);
    }
}

#[test]
fn a_full_disk_is_named_with_what_is_needed_and_what_is_free() {
    let Some(disk) = Ext4::mounted(64, "rw", true) else { return };
    let path = ["--path", text(&disk.at)];
    let refused = |more: &[&str]| {
        let (code, out, err) =
            run(&mut funicular(&[&["bench", "--device", "host", "--quick"], more, &path].concat(), &disk.at));
        assert_eq!(code, Some(2), "{out}");
        assert!(err.contains(Code::DiskFull.as_str()) && err.contains(text(&disk.at)) && err.contains("free"), "{err}");
    };
    refused(&[]);
    refused(&["--size", "16MiB"]);
    assert!(disk.left().is_empty(), "{:?}", disk.left());
    let mut hog = fs::File::create(disk.at.join("hog")).expect("a file");
    while io::Write::write_all(&mut hog, &[1; 4096]).is_ok() {}
    refused(&["--size", "16MiB"]);
    let (code, checks) =
        examined(&mut funicular(&[&["doctor", "--json", "--device", "host"], &path[..]].concat(), &disk.at));
    let path = check(&checks, &format!("path {}", disk.at.display()));
    assert_eq!((code, &path["status"]), (Some(3), &"FAIL".into()));
    assert!(path["found"].as_str().expect("text").starts_with(Code::DiskFull.as_str()), "{path:#}");
    assert_eq!(disk.left(), ["hog"]);
}

#[test]
fn direct_io_that_works_and_still_goes_through_the_page_cache_gives_no_figure() {
    let Some(disk) = Ext4::mounted(768, "data=journal", true) else { return };
    let (code, out, err) = run(&mut funicular(&small(&["--no-sweep", "--path", text(&disk.at)]), &disk.at));
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains("FN-W604") && flat(&out).contains("sends it through the page cache"), "{out}");
    assert!(flat(&out).contains("the figure would be memory's") && !out.contains("\ntrain_traffic "), "{out}");
    let (_, checks) = examined(&mut funicular(&["doctor", "--json", "--device", "host"], &disk.at));
    assert_eq!(check(&checks, "  direct I/O")["status"], "WARN");
    assert!(disk.left().is_empty());
}

#[test]
fn a_loop_device_is_measured_only_around_the_page_cache() {
    for direct in [false, true] {
        let Some(disk) = Ext4::mounted(768, "rw", direct) else { return };
        let (code, out, err) = run(&mut funicular(&small(&["--no-sweep", "--path", text(&disk.at)]), &disk.at));
        assert_eq!(code, Some(0), "{err}");
        assert_eq!(flat(&out).contains("is a file behind the page cache"), !direct, "{out}");
        assert_eq!(out.contains("\ntrain_traffic "), direct, "{out}");
    }
}

#[test]
fn a_path_that_is_mounted_read_only_is_named() {
    if !is_root() {
        return eprintln!("not run: only root mounts file systems");
    }
    let dir = disk();
    let at = text(dir.path());
    if !well("mount", &["--bind", at, at]) || !well("mount", &["-o", "remount,ro,bind", at]) {
        return;
    }
    let (code, _, err) = run(&mut funicular(&small(&["--path", at]), dir.path()));
    let (doctor, checks) =
        examined(&mut funicular(&["doctor", "--json", "--device", "host", "--path", at], dir.path()));
    assert!(well("umount", &[at]));
    assert_eq!((code, doctor), (Some(2), Some(3)));
    assert!(err.contains(Code::PathUnusable.as_str()) && err.contains("Read-only file system"), "{err}");
    assert!(err.contains("mounted read-only") && err.contains("Use another path"), "{err}");
    assert_eq!(check(&checks, &format!("path {at}"))["status"], "FAIL");
}

/// Makes the child see `/proc/sys/kernel/io_uring_disabled` say 2, and io_uring refuse as it does then. The real switch
/// would hit every process of this machine.
#[test]
fn an_io_uring_that_is_switched_off_is_told_from_one_that_is_blocked() {
    const SWITCH: &std::ffi::CStr = c"/proc/sys/kernel/io_uring_disabled";
    if !is_root() || !Path::new("/proc/sys/kernel/io_uring_disabled").exists() {
        return eprintln!("not run: it needs root, and a kernel that has the switch");
    }
    let dir = disk();
    let off = dir.path().join("off");
    fs::write(&off, "2\n").expect("writes");
    let path = CString::new(off.as_os_str().as_bytes()).expect("a path");
    let switched_off = move || {
        // SAFETY: C strings that live during the calls; the mounts are the child's own.
        let done = unsafe {
            let (none, root) = (std::ptr::null(), c"/".as_ptr());
            libc::unshare(libc::CLONE_NEWNS) == 0
                && libc::mount(none, root, none, libc::MS_REC | libc::MS_PRIVATE, none.cast()) == 0
                && libc::mount(path.as_ptr(), SWITCH.as_ptr(), none, libc::MS_BIND, none.cast()) == 0
        };
        if done { no_io_uring() } else { Err(io::Error::last_os_error()) }
    };
    let mut command = funicular(&["doctor", "--json", "--device", "host"], dir.path());
    if before(&mut command, switched_off).output().is_err() {
        return eprintln!("not run: this sandbox allows no mounts");
    }
    let (code, checks) = examined(&mut command);
    let ring = check(&checks, "io_uring");
    assert_eq!((code, &ring["status"]), (Some(1), &"WARN".into()));
    assert!(ring["found"].as_str().expect("text").contains("kernel.io_uring_disabled=2"), "{ring:#}");
    let action = ring["action"].as_str().expect("an action");
    assert!(action.contains("sysctl -w") && !action.contains("seccomp"), "{action}");
}

/// A memory cgroup of one's own; gone when dropped.
struct Group(PathBuf);

impl Group {
    fn limited(bytes: u64) -> Option<Self> {
        let name = format!("funicular-bench-test-{}-{bytes}", std::process::id());
        // Version 1, then version 2 where the root hands the controller down.
        let tried = [("memory", "memory.limit_in_bytes"), ("", "memory.max")].map(|(hierarchy, file)| {
            let group = Path::new("/sys/fs/cgroup").join(hierarchy).join(&name);
            fs::create_dir(&group)?;
            let limited = fs::write(group.join(file), bytes.to_string());
            limited.map(|()| group.clone()).inspect_err(|_| drop(fs::remove_dir(&group)))
        });
        let found = tried.iter().find_map(|group| group.as_ref().ok()).map(|group| Self(group.clone()));
        if found.is_none() {
            eprintln!("not run: no memory cgroup can be made here: {tried:?}");
        }
        found
    }

    /// Starts a command in it.
    fn holding<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        let procs = CString::new(self.0.join("cgroup.procs").as_os_str().as_bytes()).expect("a path");
        before(command, move || {
            // SAFETY: a C string that lives during the calls; "0" is the calling process.
            let done = unsafe {
                let file = libc::open(procs.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
                file >= 0 && libc::write(file, c"0".as_ptr().cast(), 1) == 1
            };
            if done { Ok(()) } else { Err(io::Error::last_os_error()) }
        })
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The last process of it is gone a moment after it was waited for.
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

#[test]
fn a_cgroup_of_8_gib_is_seen_and_kept() {
    let Some(group) = Group::limited(8 << 30) else { return };
    let dir = disk();
    let (_, checks) = examined(group.holding(&mut funicular(&["doctor", "--json", "--device", "host"], dir.path())));
    let limit = check(&checks, "cgroup memory");
    assert!(limit["found"].as_str().expect("text").starts_with("limit 8.0 GiB"), "{limit:#}");
    let (code, out, err) = run(group.holding(&mut funicular(&small(&["--no-sweep"]), dir.path())));
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains("adamw_cpu"), "{out}");
}

#[test]
fn a_cgroup_that_is_too_small_is_an_error_and_not_a_kill() {
    let Some(group) = Group::limited(96 << 20) else { return };
    let dir = disk();
    let (code, out, err) = run(group.holding(&mut funicular(&["bench", "--device", "host", "--quick"], dir.path())));
    assert_eq!(code, Some(2), "{out}{err}");
    assert!(err.contains(Code::HostAlloc.as_str()) && err.contains("384"), "{err}");
    let (code, checks) = examined(group.holding(&mut funicular(&["doctor", "--json", "--device", "host"], dir.path())));
    assert_eq!((code, &check(&checks, "cgroup memory")["status"]), (Some(1), &"WARN".into()));
    assert!(entries(dir.path()).is_empty());
}

#[test]
fn a_path_of_somebody_else_is_named() {
    if !is_root() {
        return eprintln!("not run: only root becomes somebody else");
    }
    let (dir, program) = (disk(), tempfile::tempdir().expect("a directory"));
    let copy = program.path().join("funicular");
    fs::copy(env!("CARGO_BIN_EXE_funicular"), &copy).expect("copies");
    fs::set_permissions(program.path(), fs::Permissions::from_mode(0o755)).expect("opens it");
    let mut command = Command::new(copy);
    command.args(small(&["--path"])).arg(dir.path()).current_dir("/");
    std::os::unix::process::CommandExt::uid(&mut command, 65534);
    let Ok(output) = command.output() else { return eprintln!("not run: nobody may not start programs here") };
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{err}");
    assert!(err.contains(Code::PathUnusable.as_str()) && err.contains("Permission denied"), "{err}");
}
