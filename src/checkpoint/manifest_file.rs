//! The manifest in the directory of a checkpoint.

use std::{io::Error as OsError, path::Path};

use crate::{
    checkpoint::{
        folder::{Folder, Links},
        manifest::{LONGEST, MANIFEST, Manifest},
        refused::reading,
    },
    error::{Code, Error, Result},
};

const LS: &str = "`funicular checkpoint ls` lists the checkpoints in a directory.";

/// Reads and checks the manifest of the checkpoint at `path`.
///
/// # Errors
/// `FN-E404` if there is none, `FN-E405`, `FN-E406`.
pub fn read_manifest(path: &Path) -> Result<Manifest> {
    let none = |why: String, e: &OsError| {
        Error::new(Code::CheckpointMissing, format!("{}: {why}.", path.display()))
            .errno(e.raw_os_error().unwrap_or(0))
            .action(reading(e, LS))
    };
    let folder = Folder::open(path).map_err(|e| none(e.to_string(), &e))?;
    manifest_of(&folder, Links::Cache)
}

/// Reads and checks the manifest in an open directory.
pub(super) fn manifest_of(folder: &Folder, links: Links) -> Result<Manifest> {
    let read = folder.open_file(MANIFEST, links).and_then(|file| file.read_all(LONGEST));
    let bytes = read.map_err(|e| {
        let text = format!("{}: no readable {MANIFEST} in it: {e}.", folder.path().display());
        Error::new(Code::CheckpointMissing, text).errno(e.raw_os_error().unwrap_or(0)).action(reading(&e, LS))
    })?;
    Manifest::decode(&bytes, &folder.path().join(MANIFEST))
}
