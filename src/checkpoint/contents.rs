//! What a directory of safetensors holds: a checkpoint of this project, or any model in that format.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use safetensors::{Dtype, tensor::Metadata};

use crate::{
    checkpoint::{
        directory::read_manifest,
        manifest::{MANIFEST, Manifest, ShardFacts, hex, sum},
        reader::damaged,
    },
    error::{Code, Error, Result},
};

/// The largest header that the format allows.
const LONGEST_HEADER: u64 = 100_000_000;
const INDEX: &str = "model.safetensors.index.json";

/// A tensor in a file.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its key.
    pub name: String,
    /// Index of its file.
    pub file: u32,
    /// Element type in the file.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<usize>,
    /// First byte in the file.
    pub start: u64,
    /// The byte after its last.
    pub end: u64,
    /// Checksums of its pieces, if they are known.
    pub sums: Option<Vec<u64>>,
}

/// All tensors of a directory.
#[derive(Debug)]
pub struct Contents {
    /// The directory, or the one file.
    pub path: PathBuf,
    /// Its files of tensors.
    pub files: Vec<PathBuf>,
    /// The model's tensors, by name.
    pub model: BTreeMap<String, Found>,
    /// The optimizer's tensors, by name.
    pub optimizer: BTreeMap<String, Found>,
    /// Set if it is a checkpoint of this project.
    pub manifest: Option<Manifest>,
    /// Bytes of a tensor under one checksum.
    pub piece: u64,
}

impl Contents {
    /// Opens a checkpoint and checks everything but the tensors' bytes.
    ///
    /// # Errors
    /// `FN-E404` if there is none, `FN-E405`, `FN-E406` if a file is missing, of another size, or differs.
    pub fn checkpoint(path: &Path) -> Result<Self> {
        let manifest = read_manifest(path)?;
        let mut contents = Self::empty(path, manifest.piece.max(1));
        for file in &manifest.files {
            let bytes = std::fs::read(path.join(&file.name)).map_err(|e| missing(&path.join(&file.name), &e))?;
            if hex(sum(&bytes)) != file.checksum {
                return Err(damaged(format!("{}: its checksum differs.", path.join(&file.name).display())));
            }
        }
        for shard in &manifest.shards {
            contents.add_shard(&path.join(&shard.name), Some(shard))?;
        }
        contents.manifest = Some(manifest);
        Ok(contents)
    }

    /// Opens a checkpoint, or any directory of a model's safetensors (one file, or several with or without an index), or
    /// one such file.
    ///
    /// # Errors
    /// As [`Self::checkpoint`].
    pub fn open(path: &Path) -> Result<Self> {
        if path.join(MANIFEST).exists() {
            return Self::checkpoint(path);
        }
        let mut contents = Self::empty(path, u64::MAX);
        for file in model_files(path)? {
            contents.add_shard(&file, None)?;
        }
        Ok(contents)
    }

    fn empty(path: &Path, piece: u64) -> Self {
        let (files, model, optimizer) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
        Self { path: path.to_owned(), files, model, optimizer, manifest: None, piece }
    }

    fn add_shard(&mut self, path: &Path, facts: Option<&ShardFacts>) -> Result<()> {
        let (header, bytes) = read_header(path)?;
        let named = |why: String| damaged(format!("{}: {why}.", path.display()));
        if let Some(facts) = facts {
            if bytes != facts.bytes {
                return Err(named(format!("{bytes} bytes, of {} that were written", facts.bytes)));
            }
            if hex(sum(&header)) != facts.header {
                return Err(named("the checksum of its header differs".into()));
            }
        }
        let described: Metadata = serde_json::from_slice(&header[8..]).map_err(|e| named(e.to_string()))?;
        let data = header.len() as u64;
        if data + described.data_len() as u64 != bytes {
            return Err(named(format!("{bytes} bytes, its header describes {}", data + described.data_len() as u64)));
        }
        let file = self.files.len() as u32;
        self.files.push(path.to_owned());
        for (name, info) in described.tensors() {
            let sums = facts.map(|f| piece_sums(f, &name, info.data_offsets, self.piece)).transpose().map_err(named)?;
            let (start, end) = (data + info.data_offsets.0 as u64, data + info.data_offsets.1 as u64);
            let set = if facts.is_some_and(|f| f.optimizer) { &mut self.optimizer } else { &mut self.model };
            let found =
                Found { name: name.clone(), file, dtype: info.dtype, shape: info.shape.clone(), start, end, sums };
            if set.insert(name.clone(), found).is_some() {
                return Err(named(format!("'{name}' is in an earlier file too")));
            }
        }
        Ok(())
    }
}

fn piece_sums(
    facts: &ShardFacts,
    name: &str,
    (start, end): (usize, usize),
    piece: u64,
) -> std::result::Result<Vec<u64>, String> {
    let sums = facts.tensors.get(name).ok_or_else(|| format!("'{name}' is not in the manifest"))?;
    let expected = ((end - start) as u64).div_ceil(piece);
    if sums.len() as u64 != expected {
        return Err(format!("'{name}' has {} checksums, not {expected}", sums.len()));
    }
    sums.iter().map(|s| u64::from_str_radix(s, 16).map_err(|_| format!("'{s}' is no checksum"))).collect()
}

/// The length and the header, and the bytes of the file.
fn read_header(path: &Path) -> Result<(Vec<u8>, u64)> {
    let failed = |e: std::io::Error| missing(path, &e);
    let mut file = File::open(path).map_err(failed)?;
    let bytes = file.metadata().map_err(failed)?.len();
    let mut length = [0; 8];
    let short = || damaged(format!("{}: {bytes} bytes, which is no file of tensors.", path.display()));
    file.read_exact(&mut length).map_err(|_| short())?;
    let n = u64::from_le_bytes(length);
    if n > LONGEST_HEADER || n + 8 > bytes {
        return Err(short());
    }
    let mut header = vec![0; n as usize + 8];
    header[..8].copy_from_slice(&length);
    file.read_exact(&mut header[8..]).map_err(failed)?;
    Ok((header, bytes))
}

/// The files of a model that somebody else wrote.
fn model_files(path: &Path) -> Result<Vec<PathBuf>> {
    if path.is_file() {
        return Ok(vec![path.to_owned()]);
    }
    if let Ok(text) = std::fs::read(path.join(INDEX)) {
        let index: serde_json::Value =
            serde_json::from_slice(&text).map_err(|e| damaged(format!("{}: {e}.", path.join(INDEX).display())))?;
        let map = index["weight_map"].as_object();
        let names: BTreeSet<&str> = map.into_iter().flat_map(|m| m.values()).filter_map(|v| v.as_str()).collect();
        return Ok(names.into_iter().map(|name| path.join(name)).collect());
    }
    let entries = std::fs::read_dir(path).map_err(|e| missing(path, &e))?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
    files.sort();
    let pickles = files.iter().any(|f| f.extension().is_some_and(|x| x == "bin" || x == "pt" || x == "pth"));
    files.retain(|f| f.extension().is_some_and(|x| x == "safetensors"));
    if let Some(one) = files.iter().find(|f| f.file_name().is_some_and(|n| n == "model.safetensors")) {
        return Ok(vec![one.clone()]);
    }
    if files.is_empty() {
        let action = if pickles {
            "It holds pickles, which can run code: convert them with model.save_pretrained(path, safe_serialization=True)."
        } else {
            "Name a directory with model.safetensors, or with model.safetensors.index.json and its shards."
        };
        let text = format!("{}: no .safetensors in it.", path.display());
        return Err(Error::new(Code::CheckpointMissing, text).action(action));
    }
    Ok(files)
}

fn missing(path: &Path, e: &std::io::Error) -> Error {
    if e.kind() == std::io::ErrorKind::NotFound && path.extension().is_some() {
        return damaged(format!("{} is missing.", path.display())).errno(libc::ENOENT);
    }
    Error::new(Code::CheckpointMissing, format!("{}: {e}.", path.display()))
        .errno(e.raw_os_error().unwrap_or(0))
        .action("Check the path and its permissions.")
}
