//! What `funicular checkpoint` says.

use std::{
    fmt::Write,
    path::{Path, PathBuf},
};

use crate::{
    checkpoint::{
        contents::{Contents, Found},
        control::Control,
        export::export as write_weights,
        leftovers::{PREFIX, leftovers},
        manifest::{MANIFEST, Manifest},
        manifest_file::read_manifest,
        tensors::verify as read_all,
        writer::FrameBudget,
    },
    error::{Code, Error, Result},
    io::EngineOptions,
    quantities::ByteCount,
    schedule::placement::{SAVE_FRAME, SAVE_FRAMES},
    text::printable,
};

fn budget() -> FrameBudget {
    FrameBudget { engine: EngineOptions::default(), direct: true, frames: SAVE_FRAMES, frame: SAVE_FRAME }
}

/// A table of the checkpoints at `path`: itself one, or a directory of some. The flag says whether all are complete.
///
/// # Errors
/// `FN-E404` if there are none.
pub fn list(path: &Path) -> Result<(String, bool)> {
    let is_one = |path: &Path| path.join(MANIFEST).symlink_metadata().is_ok();
    let mut found: Vec<PathBuf> = if is_one(path) {
        vec![path.to_owned()]
    } else {
        let entries = std::fs::read_dir(path).map_err(|e| {
            Error::new(Code::CheckpointMissing, format!("{}: {e}.", path.display())).action("Check the path.")
        })?;
        let public = |e: &std::fs::DirEntry| !e.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes());
        entries.flatten().filter(public).map(|e| e.path()).filter(|p| is_one(p)).collect()
    };
    let left = leftovers(path);
    if found.is_empty() && left.is_empty() {
        return Err(Error::new(Code::CheckpointMissing, format!("{}: no checkpoint in it.", path.display()))
            .action("Name a checkpoint, or a directory of checkpoints."));
    }
    found.sort();
    let mut rows = vec![["name", "step", "saved (UTC)", "weights", "in all", "state"].map(str::to_owned)];
    let mut whole = true;
    for path in &found {
        let name = path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned());
        let (manifest, state) = match Contents::checkpoint(path) {
            Ok(contents) => (contents.manifest, "complete".to_owned()),
            // Removed since it was listed.
            Err(_) if path.symlink_metadata().is_err() => continue,
            Err(e) => {
                whole = false;
                (read_manifest(path).ok(), e.to_string())
            }
        };
        rows.push(match manifest {
            Some(manifest) => row(name, &manifest, state),
            None => [name, "?".into(), "?".into(), "?".into(), "?".into(), state],
        });
    }
    let mut text = table(&rows);
    for one in left {
        let path = one.path().display();
        let _ = writeln!(text, "{path}: left behind by a save that did not end; the next save removes it");
    }
    Ok((text, whole))
}

fn row(name: String, manifest: &Manifest, state: String) -> [String; 6] {
    let step = manifest.step().map_or_else(|| "-".to_owned(), |s| s.to_string());
    [
        name,
        step,
        utc(manifest.created / 1_000_000_000),
        ByteCount(manifest.bytes(Some(false))).to_string(),
        ByteCount(manifest.bytes(None)).to_string(),
        state,
    ]
}

fn table(rows: &[[String; 6]]) -> String {
    let rows: Vec<[String; 6]> =
        rows.iter().map(|row| row.each_ref().map(|cell| printable(cell).into_owned())).collect();
    let width = |k: usize| rows.iter().map(|r| r[k].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..6).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:width$}  ");
        }
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

/// Seconds since 1970 as a date and a time (the days of the proleptic Gregorian calendar, counted from 0000-03-01).
fn utc(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let date = day - (153 * month + 2) / 5 + 1;
    let (month, year) = if month < 10 { (month + 3, year) } else { (month - 9, year + 1) };
    format!(
        "{:04}-{month:02}-{date:02} {:02}:{:02}:{:02}",
        year + era * 400,
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

/// Reads everything; a line per thing that is wrong. The flag says whether nothing is.
///
/// # Errors
/// `FN-E404`, `FN-E405`, `FN-E406` for what keeps it from being read at all.
pub fn verify(path: &Path, control: &Control) -> Result<(String, bool)> {
    let contents = Contents::open(path)?;
    let mut all: Vec<&Found> = contents.model.values().chain(contents.optimizer.values()).collect();
    all.sort_by_key(|f| (f.file, f.start));
    let (count, bytes) = (all.len(), all.iter().map(|f| f.end - f.start).sum());
    control.expect(bytes);
    let wrong = read_all(&contents, all, &budget(), control)?;
    let mut text = String::new();
    for error in &wrong {
        let _ = writeln!(text, "{}", printable(&error.to_string()));
    }
    let kept = if contents.manifest.is_some() { "all checksums agree" } else { "no checksums to compare with" };
    let said = if wrong.is_empty() { kept.to_owned() } else { format!("{} damaged", wrong.len()) };
    let _ = writeln!(text, "{}: {count} tensors, {}: {said}", path.display(), ByteCount(bytes));
    Ok((text, wrong.is_empty()))
}

/// Writes the weights alone; returns the text for the user.
///
/// # Errors
/// Those of opening a checkpoint and of saving one.
pub fn export(path: &Path, target: &Path, fp32: bool, shard: u64, control: &Control) -> Result<String> {
    let contents = Contents::open(path)?;
    write_weights(&contents, target, fp32, shard, &budget(), control)?;
    Ok(format!("{}: {} tensors\n", target.display(), contents.model.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_right() {
        assert_eq!(utc(0), "1970-01-01 00:00:00");
        assert_eq!(utc(951_782_399), "2000-02-28 23:59:59");
        assert_eq!(utc(951_782_400), "2000-02-29 00:00:00");
        assert_eq!(utc(1_795_616_723), "2026-11-25 14:25:23");
    }
}
