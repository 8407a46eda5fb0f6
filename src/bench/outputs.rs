//! The files the benchmark writes for others: JSON, CSV, the page and the profile.
//!
//! O1: a file that is not ours is never replaced, and that is found out before anything is measured.
//! O2: a file appears whole, or not at all.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    path::{Path, PathBuf},
};

use crate::{
    bench::{
        html,
        report::{Group, Hop, MARK, Report, fastest, find},
    },
    error::{Code, Error, Result},
    policy::profile::{DeviceRates, MemoryRates, NvmeRates, PathRates, Profile},
};

/// How far into a file its mark is looked for.
const HEAD: u64 = 400;
/// First line of the CSV, by which it is known as ours.
const COLUMNS: &str = "kind,name,place,block,depth,threads,engine,direct,bytes_per_second,low,high,spread,p50_us,p99_us,\
    params_per_second,bytes,rounds,copied_per_second,limit_by,limit_bytes_per_second,fraction,fio_bytes_per_second,skipped";

/// Which files are wanted.
#[derive(Clone, Debug, Default)]
pub struct Outputs {
    /// The report.
    pub json: Option<PathBuf>,
    /// One row per hop and per point of a sweep.
    pub csv: Option<PathBuf>,
    /// The page.
    pub html: Option<PathBuf>,
    /// The rates for the planner.
    pub profile: Option<PathBuf>,
}

impl Outputs {
    fn all(&self) -> impl Iterator<Item = &PathBuf> {
        [&self.json, &self.csv, &self.html, &self.profile].into_iter().flatten()
    }

    /// Whether all of them can be written.
    ///
    /// # Errors
    /// `FN-E606` naming the first that cannot.
    pub fn check(&self) -> Result<()> {
        self.all().try_for_each(|file| check(file))
    }

    /// Writes them; gives their names.
    ///
    /// # Errors
    /// `FN-E606`.
    pub fn write(&self, report: &Report) -> Result<Vec<PathBuf>> {
        let texts = [
            (&self.json, json as fn(&Report) -> Result<String>),
            (&self.csv, |report| Ok(csv(report))),
            (&self.html, |report| Ok(html::page(report))),
            (&self.profile, |report| profile(report).to_toml()),
        ];
        let mut written = Vec::new();
        for (file, text) in texts {
            let Some(file) = file else { continue };
            check(file)?;
            replace(file, &text(report)?).map_err(|e| refused(file, &e.to_string()))?;
            written.push(file.clone());
        }
        Ok(written)
    }
}

fn check(file: &Path) -> Result<()> {
    let Ok(open) = File::open(file) else {
        if file.symlink_metadata().is_ok() {
            return Err(refused(file, "it exists and cannot be read"));
        }
        let folder = folder(file);
        // The profile's own folder is made when it is written.
        let there = folder.is_dir() || folder.file_name().is_some_and(|name| name == "funicular");
        return if there { Ok(()) } else { Err(refused(file, "its folder does not exist")) };
    };
    let mut head = Vec::new();
    let read = open.take(HEAD).read_to_end(&mut head);
    let head = String::from_utf8_lossy(&head);
    if read.is_ok() && (head.contains(MARK) || head.starts_with(COLUMNS) || head.is_empty()) {
        return Ok(());
    }
    Err(refused(file, "it exists and was not written by funicular bench"))
}

fn folder(file: &Path) -> PathBuf {
    match file.parent() {
        Some(parent) if parent != Path::new("") => parent.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

fn refused(file: &Path, why: &str) -> Error {
    Error::new(Code::OutputFile, format!("{}: {why}.", file.display())).action("Name another file, or remove that one.")
}

/// Writes beside and renames.
fn replace(file: &Path, text: &str) -> std::io::Result<()> {
    let folder = folder(file);
    fs::create_dir_all(&folder)?;
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let beside = folder.join(format!(".{name}.{:016x}", crate::io::random()));
    let mut open = OpenOptions::new().write(true).create_new(true).open(&beside)?;
    let done = open.write_all(text.as_bytes()).and_then(|()| open.sync_all()).and_then(|()| fs::rename(&beside, file));
    done.inspect_err(|_| drop(fs::remove_file(&beside)))
}

/// The report as JSON.
///
/// # Errors
/// `FN-E606` if it cannot be expressed.
pub fn json(report: &Report) -> Result<String> {
    let text = serde_json::to_string_pretty(report);
    text.map(|text| text + "\n").map_err(|e| Error::new(Code::OutputFile, format!("the report as JSON: {e}.")))
}

/// The report as CSV: rates in bytes per second, empty where there is nothing to say.
pub fn csv(report: &Report) -> String {
    let mut out = format!("{COLUMNS}\n");
    let mut row = |cells: [String; 23]| {
        let quoted = cells.map(|cell| {
            if cell.contains([',', '"', '\n']) { format!("\"{}\"", cell.replace('"', "\"\"")) } else { cell }
        });
        out += &quoted.join(",");
        out.push('\n');
    };
    fn text<T: ToString>(value: Option<T>) -> String {
        value.map_or_else(String::new, |value| value.to_string())
    }
    for hop in &report.hops {
        let (figure, limit) = (hop.figure.as_ref(), hop.limit.as_ref());
        let number = |of: fn(&super::report::Figure) -> f64| text(figure.map(of));
        row([
            "hop".to_owned(),
            hop.name.clone(),
            hop.place.clone(),
            text(hop.block),
            text(hop.depth),
            String::new(),
            text(hop.engine.as_ref()),
            text(hop.direct),
            number(|f| f.bytes_per_second),
            number(|f| f.low),
            number(|f| f.high),
            number(|f| f.spread),
            number(|f| f.p50_us),
            number(|f| f.p99_us),
            text(figure.and_then(|f| f.params_per_second)),
            text(figure.map(|f| f.bytes)),
            text(figure.map(|f| f.rates.len())),
            text(figure.and_then(|f| f.copied_per_second)),
            text(limit.map(|l| &l.by)),
            text(limit.map(|l| l.bytes_per_second)),
            text(limit.map(|l| l.fraction)),
            text(hop.fio_bytes_per_second),
            text(hop.skipped.as_ref()),
        ]);
    }
    for sweep in &report.sweeps {
        for series in &sweep.series {
            for &(x, rate) in &series.points {
                let mut cells: [String; 23] = Default::default();
                cells[0] = "sweep".to_owned();
                cells[1].clone_from(&sweep.name);
                match (sweep.over, series.label.strip_prefix("depth ")) {
                    ("threads", _) => (cells[1], cells[5]) = (series.label.clone(), x.to_string()),
                    (_, Some(depth)) => (cells[3], cells[4]) = (x.to_string(), depth.to_owned()),
                    _ => (cells[1], cells[3]) = (series.label.clone(), x.to_string()),
                }
                cells[8] = rate.to_string();
                row(cells);
            }
        }
    }
    out
}

/// The rates that the planner reads.
pub fn profile(report: &Report) -> Profile {
    let rate = |name: &str| report.hop(name).map_or(0.0, Hop::rate);
    let mut paths: Vec<PathRates> = Vec::new();
    let singles = report.hops.iter().filter(|hop| hop.group == Group::Nvme && !hop.place.starts_with("striped over"));
    for hop in singles.filter(|hop| hop.figure.is_some()) {
        let known = paths.iter().position(|path| path.path == hop.place);
        let at = known.unwrap_or_else(|| {
            paths.push(PathRates { path: hop.place.clone(), ..PathRates::default() });
            paths.len() - 1
        });
        match hop.name.as_str() {
            "nvme_read" => paths[at].read = hop.rate(),
            "nvme_write" => paths[at].write = hop.rate(),
            _ => paths[at].read_write = hop.rate(),
        }
    }
    let figure = |name: &str| find(&report.hops, name).and_then(|hop| hop.figure.as_ref());
    let params = |name: &str| figure(name).and_then(|figure| figure.params_per_second).unwrap_or(0.0);
    let beside = figure("adamw_and_copies").and_then(|figure| figure.copied_per_second);
    Profile {
        version: 1,
        measured: report.date.clone(),
        host: report.machine.host.clone(),
        ranks: report.ranks,
        device: DeviceRates {
            name: report.machine.device.clone(),
            host_to_device: rate("host_to_device"),
            device_to_host: rate("device_to_host"),
            bidirectional: rate("bidirectional"),
            adamw_params: params("adamw_gpu"),
            memory: rate("device_memory"),
        },
        memory: MemoryRates {
            bandwidth: fastest(&report.hops, "host_memory").map_or(0.0, Hop::rate),
            adamw_params: params("adamw_cpu"),
            adamw_params_one_thread: params("adamw_one_thread") / f64::from(report.ranks.unwrap_or(1)),
            adamw_params_beside_copies: params("adamw_and_copies"),
            copies_beside_adamw: beside.unwrap_or(0.0),
            threads: report.machine.cpus,
        },
        nvme: NvmeRates {
            read: rate("nvme_read"),
            write: rate("nvme_write"),
            read_write: rate("nvme_read_write"),
            adamw_params: params("adamw_nvme"),
        },
        paths,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_somebody_else_is_not_replaced_and_ours_is() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("out");
        check(&file).expect("it does not exist");
        for ours in [
            COLUMNS,
            "{\n  \"made_by\": \"funicular bench\",",
            Profile::HEADER,
            "<!doctype html>\n<!-- funicular bench",
        ] {
            fs::write(&file, ours).expect("writes");
            check(&file).expect(ours);
        }
        fs::write(&file, "my thesis").expect("writes");
        assert_eq!(check(&file).expect_err("not ours").code(), Code::OutputFile);
        assert_eq!(check(dir.path()).expect_err("a directory").code(), Code::OutputFile);
        assert_eq!(check(&dir.path().join("none/out")).expect_err("no folder").code(), Code::OutputFile);
        replace(&file, "new").expect("writes");
        assert_eq!(fs::read_to_string(&file).expect("reads"), "new");
        assert_eq!(fs::read_dir(dir.path()).expect("readable").count(), 1);
    }
}
