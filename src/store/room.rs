//! The files of a store: one on each path, of full size from the start.

use std::{path::PathBuf, sync::Arc};

use crate::{
    error::Result,
    io::{DirectIo, IoFile, allocate, device_number, probe_directory, scratch_file},
    store::run_dir::RunDir,
};

/// A path, as the store keeps it.
pub(super) struct StorePath {
    /// Removed as it is dropped; another process's where that has made the file.
    pub(super) _run_dir: Option<RunDir>,
    pub(super) label: Arc<str>,
}

/// Paths, the open files there, and what the user should know.
pub(super) type Room = (Vec<StorePath>, Vec<IoFile>, Vec<String>);

/// A run directory and a file of full size on each path.
pub(super) fn make_room(dirs: Vec<PathBuf>, direct: DirectIo, file_bytes: &[u64]) -> Result<Room> {
    let (mut paths, mut files, mut notes) = (Vec::new(), Vec::new(), Vec::new());
    let mut devices: Vec<(u64, PathBuf, u64)> = Vec::new();
    for (dir, &bytes) in dirs.iter().zip(file_bytes) {
        let probe = probe_directory(dir, direct)?;
        notes.extend(probe.notes);
        let (run_dir, swept) = RunDir::create(dir, probe.file_system)?;
        notes.extend(swept);
        let device = device_number(dir)?;
        let file = scratch_file(run_dir.path(), probe.direct)?;
        let label: Arc<str> = run_dir.path().join("data").to_string_lossy().into();
        files.push(IoFile::new(file, Arc::clone(&label), probe.direct));
        paths.push(StorePath { _run_dir: Some(run_dir), label });
        match devices.iter_mut().find(|(known, ..)| *known == device) {
            Some((_, first, total)) => {
                notes.push(format!(
                    "FN-W606 {} and {} are on the same file system: two paths there are no faster than one.",
                    first.display(),
                    dir.display()
                ));
                *total += bytes;
            }
            None => devices.push((device, dir.clone(), bytes)),
        }
    }
    for (_, dir, need) in &devices {
        let free = crate::io::free_bytes(dir)?;
        if *need > free {
            return Err(crate::io::disk_full(dir, *need, free));
        }
    }
    for ((file, &bytes), dir) in files.iter().zip(file_bytes).zip(&dirs) {
        if !allocate(file.file(), bytes, dir)? {
            notes.push(format!(
                "FN-W607 {}: this file system cannot reserve space; a full disk will be noticed only when it happens.",
                dir.display()
            ));
        }
    }
    Ok((paths, files, notes))
}
