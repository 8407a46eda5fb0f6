//! Several processes of one host that measure at once, as `torchrun` starts them.
#![expect(unsafe_code, reason = "sends signals to child processes")]

use std::{
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, Command, Stdio},
};

use funicular::{Code, policy::profile::Profile};
use serde_json::Value;

use super::{disk, entries, funicular, hop, small};

/// A rank of two, which meet under the name of `dir`.
fn rank(number: usize, arguments: &[&str], dir: &Path) -> Command {
    let mut command = funicular(arguments, dir);
    let run = dir.file_name().expect("a name").to_str().expect("UTF-8").to_owned();
    let number = number.to_string();
    command.env("RANK", &number).env("LOCAL_RANK", &number).env("WORLD_SIZE", "2").env("LOCAL_WORLD_SIZE", "2");
    command.env("TORCHELASTIC_RUN_ID", run);
    command
}

fn started(arguments: &[&str], dir: &Path) -> [Child; 2] {
    let start = |number| rank(number, arguments, dir).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    // The one that is met last starts first.
    let second = start(1).expect("starts");
    [start(0).expect("starts"), second]
}

fn ended(child: Child) -> (Option<i32>, String, String) {
    let output = child.wait_with_output().expect("ends");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn two_ranks_measure_at_once_and_write_one_report() {
    let dir = disk();
    let arguments = small(&["--json", "r.json", "--save", "p.toml", "--force"]);
    let [first, second] = started(&arguments, dir.path()).map(ended);
    assert_eq!((first.0, second.0), (Some(0), Some(0)), "{} {}", first.2, second.2);
    assert!(first.1.contains("2 ranks at once") && first.1.contains("GB/s per rank"), "{}", first.1);
    assert_eq!((second.1.as_str(), second.2.as_str()), ("", ""), "rank 0 speaks for all");
    let mut left = entries(dir.path());
    left.sort();
    assert_eq!(left, ["p.toml", "r.json"]);

    let text = std::fs::read_to_string(dir.path().join("r.json")).expect("written");
    let report: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(report["ranks"], 2);
    for name in ["host_to_device", "bidirectional", "host_memory", "adamw_cpu", "adamw_one_thread", "adamw_and_copies"]
    {
        let figure = &hop(&report, name)["figure"];
        let each: Vec<f64> = figure["per_rank"].as_array().expect(name).iter().filter_map(Value::as_f64).collect();
        let all = figure["bytes_per_second"].as_f64().expect(name);
        // Of two rounds the median is the mean, and the mean of sums is the sum of means.
        assert!(each.len() == 2 && each.iter().all(|&rate| rate > 0.0), "{name}: {figure:#}");
        assert!((each.iter().sum::<f64>() / all - 1.0).abs() < 1e-3, "{name}: {figure:#}");
    }
    assert!(hop(&report, "nvme_read")["figure"]["per_rank"].is_null(), "disks are rank 0's");
    let names = report["hops"].as_array().expect("hops").iter().map(|hop| hop["name"].as_str());
    assert!(names.clone().all(|name| name != Some("train_traffic")));
    let sweeps = report["sweeps"].as_array().expect("sweeps");
    assert!(sweeps.iter().all(|sweep| sweep["name"] == "nvme_read" || sweep["name"] == "nvme_write"), "rank 0's alone");

    let profile = Profile::read(&dir.path().join("p.toml")).expect("a profile");
    let one_thread = hop(&report, "adamw_one_thread")["figure"]["params_per_second"].as_f64().expect("a rate");
    assert_eq!((profile.ranks, profile.memory.adamw_params_one_thread), (Some(2), one_thread / 2.0));
}

#[test]
fn a_rank_that_is_gone_ends_the_other_one() {
    let long = ["bench", "--device", "host", "--quick", "--no-nvme", "--no-sweep", "--seconds", "600"];
    for (gone, signal, code) in [(1, libc::SIGKILL, None), (1, libc::SIGINT, Some(130)), (0, libc::SIGTERM, Some(130))]
    {
        let dir = disk();
        let mut children = started(&long, dir.path());
        // The first line of progress comes when they have met.
        let mut lines = BufReader::new(children[0].stderr.take().expect("a pipe"));
        let mut said = String::new();
        lines.read_line(&mut said).expect("a line");
        assert!(said.contains('%'), "{said}");
        let pid = libc::pid_t::try_from(children[gone].id()).expect("a pid");
        // SAFETY: a signal to our own child.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
        lines.read_to_string(&mut said).expect("UTF-8");
        let [first, second] = children.map(ended);
        let said = [said, second.2];
        let codes = [first.0, second.0];
        assert_eq!((codes[gone], codes[1 - gone]), (code, Some(2)), "{said:?}");
        let named = format!("rank {gone} (process {pid})");
        assert!(said[1 - gone].contains(Code::PeerLost.as_str()) && said[1 - gone].contains(&named), "{said:?}");
        assert!(entries(dir.path()).is_empty());
    }
}

#[test]
fn ranks_of_several_hosts_are_refused() {
    let dir = disk();
    let mut command = rank(0, &["bench", "--device", "host"], dir.path());
    let output = command.env("WORLD_SIZE", "4").output().expect("ends");
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{err}");
    assert!(err.contains(Code::RanksUnsupported.as_str()) && err.contains("several hosts"), "{err}");
}
