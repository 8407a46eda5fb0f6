//! fio, the tool that people check disks with: the command that does what a hop did, and its figure.

use std::{process::Command, time::Duration};

use serde_json::Value;

use crate::{
    bench::disk::Mix,
    error::{Code, Error, Result},
};

/// A run of fio.
#[derive(Clone, Debug)]
pub struct Fio {
    /// What it does.
    pub mix: Mix,
    /// Bytes of one block.
    pub block: usize,
    /// Blocks in flight.
    pub depth: usize,
    /// Our engine's name.
    pub engine: &'static str,
    /// Whether our engine registered its buffers.
    pub registered: bool,
    /// Bytes of each file.
    pub file_bytes: u64,
}

impl Fio {
    /// Its arguments, over files of these names. With several, blocks go round-robin over them.
    pub fn arguments(&self, files: &[String], time: Duration) -> Vec<String> {
        let Self { mix, block, depth, engine, registered, file_bytes } = self;
        let mut arguments = vec![
            format!("--name={}", mix.name()),
            format!("--filename={}", files.join(":")),
            format!("--rw={}", mix.fio()),
            format!("--bs={block}"),
            format!("--size={}", file_bytes * files.len().max(1) as u64),
            "--direct=1".to_owned(),
            "--overwrite=1".to_owned(),
            "--time_based=1".to_owned(),
            // As our clock, fio's starts when the queue is full. A run of 0 ms would have no end.
            format!("--ramp_time={}ms", (time.as_millis() / 5).max(50)),
            format!("--runtime={}ms", time.as_millis().max(50)),
        ];

        arguments.extend(match *engine {
            // An engine's own options come after its name.
            "io_uring" => ["--ioengine=io_uring".to_owned(), format!("--iodepth={depth}")]
                .into_iter()
                .chain(["--fixedbufs=1", "--registerfiles=1"].map(str::to_owned).into_iter().filter(|_| *registered))
                .collect(),
            _ => vec![
                "--ioengine=psync".to_owned(),
                "--thread=1".to_owned(),
                format!("--numjobs={}", (*depth).min(16)),
                "--group_reporting=1".to_owned(),
            ],
        });
        arguments
    }

    /// The command for a person, over a new file in each directory.
    pub fn command(&self, dirs: &[String]) -> String {
        let files: Vec<String> = dirs.iter().map(|dir| format!("{dir}/fio.tmp")).collect();
        let mut words = self.arguments(&files, Duration::from_secs(10));
        words.push("--unlink=1".to_owned());
        let quoted = words.iter().map(|word| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_=./:,+@%".contains(c);
            if word.chars().all(plain) { word.clone() } else { format!("'{}'", word.replace('\'', r"'\''")) }
        });
        format!("fio {}", quoted.collect::<Vec<_>>().join(" "))
    }

    /// Runs it and gives its bytes per second. Its buffers lie on huge pages as ours do: requests of 4 KiB pages have
    /// more segments than many (virtual) disks take at once.
    ///
    /// # Errors
    /// `FN-E301` when fio fails or says something else than expected.
    pub fn run(&self, files: &[String], time: Duration) -> Result<f64> {
        let failed = |why: String| {
            Error::new(Code::IoFailed, format!("fio, for comparison with {}: {why}.", self.mix.name()))
                .action("Run its command by hand, or leave out --check.")
        };
        let output = Command::new("fio")
            .env("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
            .args(self.arguments(files, time))
            .args(["--output-format=json", "--allow_file_create=0"])
            .output()
            .map_err(|e| failed(e.to_string()))?;
        if !output.status.success() {
            return Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
        }
        parse(&String::from_utf8_lossy(&output.stdout)).ok_or_else(|| failed("its report cannot be read".to_owned()))
    }
}

/// Whether there is a fio to run.
pub fn installed() -> bool {
    Command::new("fio").arg("--version").output().is_ok_and(|output| output.status.success())
}

/// Bytes per second, reads and writes together, of fio's JSON report. Warnings may stand before it.
pub fn parse(text: &str) -> Option<f64> {
    let report: Value = serde_json::from_str(text.get(text.find('{')?..)?).ok()?;
    let jobs = report.get("jobs")?.as_array()?;
    let rate = |job: &Value, side: &str| job.get(side).and_then(|s| s.get("bw_bytes")).and_then(Value::as_f64);
    let total: f64 = jobs.iter().flat_map(|job| [rate(job, "read"), rate(job, "write")]).flatten().sum();
    (total > 0.0).then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read_and_anything_else_is_not() {
        let report =
            r#"{"jobs": [{"read": {"bw_bytes": 1500}, "write": {"bw_bytes": 500}}, {"read": {"bw_bytes": 1}}]}"#;
        assert_eq!(parse(&format!("fio: a warning\n{report}")), Some(2001.0));
        for other in ["", "fio: failed", "{}", r#"{"jobs": []}"#, r#"{"jobs": [{"read": {"bw_bytes": 0}}]}"#] {
            assert_eq!(parse(other), None, "{other}");
        }
    }

    #[test]
    fn the_command_is_one_a_shell_takes() {
        let fio = Fio {
            mix: Mix::Both,
            block: 1 << 20,
            depth: 32,
            engine: "io_uring",
            registered: true,
            file_bytes: 1 << 30,
        };
        let command = fio.command(&["/mnt/it's here".to_owned(), "/b".to_owned()]);
        assert!(
            command.starts_with("fio --name=nvme_read_write '--filename=/mnt/it'\\''s here/fio.tmp:/b/fio.tmp'"),
            "{command}"
        );
        assert!(command.contains("--rw=rw --bs=1048576 --size=2147483648 --direct=1"), "{command}");
        assert!(command.contains("--ioengine=io_uring --iodepth=32 --fixedbufs=1 --registerfiles=1"), "{command}");
        let threads = Fio { engine: "threads", registered: false, ..fio };
        assert!(threads.command(&[]).contains("--ioengine=psync --thread=1 --numjobs=16"));
    }
}
