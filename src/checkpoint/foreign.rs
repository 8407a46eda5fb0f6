//! Models that other programs wrote: which files of a directory are the model's, and what an index says of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::{
    checkpoint::{
        folder::{Folder, Links, is_plain},
        manifest::{LONGEST_FILE, complete},
        reader::damaged,
    },
    error::{Code, Error, Result},
};

/// The index that Hugging Face's loaders read where there are several shards.
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// An index: the file of each tensor.
pub(super) struct Indexed {
    pub(super) path: PathBuf,
    /// The file of each tensor.
    pub(super) map: BTreeMap<String, String>,
}

impl Indexed {
    /// Reads an index; its names are those of files in its directory, and no shard is left out.
    pub(super) fn read(bytes: &[u8], path: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let named = |why: String| damaged(format!("{}: {why}.", path.display()));
        let index: Index = serde_json::from_slice(bytes).map_err(|e| named(e.to_string()))?;
        let read = Self { path: path.to_owned(), map: index.weight_map };
        let files = read.files();
        if files.is_empty() {
            return Err(named("it names no file".into()));
        }
        if let Some(bad) = files.iter().find(|name| !is_plain(name)) {
            return Err(named(format!("it names '{bad}', which is not the name of a file in its directory")));
        }
        complete(files.iter().map(String::as_str)).map_err(named)?;
        Ok(read)
    }

    /// The files that it names.
    pub(super) fn files(&self) -> BTreeSet<String> {
        self.map.values().cloned().collect()
    }
}

/// The names of a model's files, and its index if it has one.
pub(super) fn model_files(folder: &Folder) -> Result<(Vec<String>, Option<Indexed>)> {
    let path = folder.path();
    let unreadable = |e: std::io::Error| damaged(format!("{}: {e}.", path.join(INDEX).display()));
    if folder.has(INDEX) {
        let bytes = folder.open_file(INDEX, Links::Any).and_then(|f| f.read_all(LONGEST_FILE)).map_err(unreadable)?;
        let index = Indexed::read(&bytes, &path.join(INDEX))?;
        return Ok((index.files().into_iter().collect(), Some(index)));
    }
    let names = folder.names().map_err(|e| damaged(format!("{}: {e}.", path.display())))?;
    let extension = |name: &OsStr| Path::new(name).extension().map(|x| x.to_string_lossy().into_owned());
    let of = |wanted: &str| names.iter().filter(|n| extension(n).as_deref() == Some(wanted)).collect::<Vec<_>>();
    let files: Vec<String> = of("safetensors").iter().map(|n| n.to_string_lossy().into_owned()).collect();
    if files.iter().any(|name| name == "model.safetensors") {
        return Ok((vec!["model.safetensors".to_owned()], None));
    }
    if files.is_empty() {
        let action = if ["bin", "pt", "pth"].iter().any(|x| !of(x).is_empty()) {
            "It holds pickles, which can run code: convert them with model.save_pretrained(path, safe_serialization=True)."
        } else {
            "Name a directory with model.safetensors, or with model.safetensors.index.json and its shards."
        };
        let text = format!("{}: no .safetensors in it.", path.display());
        return Err(Error::new(Code::CheckpointMissing, text).action(action));
    }
    complete(files.iter().map(String::as_str)).map_err(|why| damaged(format!("{}: {why}.", path.display())))?;
    Ok((files, None))
}
