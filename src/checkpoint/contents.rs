//! What a directory of safetensors holds: a checkpoint of this project, or any model in that format.
//!
//! The files are untrusted input. Names are checked before anything is opened (see [`crate::checkpoint::folder`]), sizes are
//! those of the files, and all files are open before anything is read: what is read is one generation of the checkpoint.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::Duration,
};

use safetensors::{Dtype, tensor::Metadata};

use crate::{
    checkpoint::{
        folder::{Folder, Links, Opened},
        foreign::{INDEX, Indexed, model_files},
        leftovers::PREFIX,
        manifest::{FileFacts, LONGEST_FILE, MANIFEST, Manifest, ShardFacts, hex, sum},
        manifest_file::manifest_of,
        reader::damaged,
        refused::reading,
    },
    error::{Code, Error, Result},
};

/// How often a directory is opened anew because another process exchanged it meanwhile.
const ATTEMPTS: u32 = 1000;
/// How often a path is looked for while it may be exchanged in two steps, and how long in between.
const LOOKS: u32 = 20;
const PAUSE: Duration = Duration::from_millis(10);

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
    pub files: Vec<Opened>,
    /// The model's tensors, by name.
    pub model: BTreeMap<String, Found>,
    /// The optimizer's tensors, by name.
    pub optimizer: BTreeMap<String, Found>,
    /// Set if it is a checkpoint of this project.
    pub manifest: Option<Manifest>,
    /// Bytes of a tensor under one checksum.
    pub piece: u64,
    /// The directory; none for one file.
    pub(super) folder: Option<Folder>,
}

impl Contents {
    /// Opens a checkpoint and checks everything but the tensors' bytes.
    ///
    /// # Errors
    /// `FN-E404` if there is none, `FN-E405`, `FN-E406` if a file is missing, of another size, or differs.
    pub fn checkpoint(path: &Path) -> Result<Self> {
        one_generation(path, Self::of_checkpoint)
    }

    /// Opens a checkpoint, or any directory of a model's safetensors (one file, or several with or without an index), or
    /// one such file.
    ///
    /// # Errors
    /// As [`Self::checkpoint`].
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() || !path.exists() {
            return one_generation(path, |folder| {
                if folder.has(MANIFEST) { Self::of_checkpoint(folder) } else { Self::of_others(folder) }
            });
        }
        let mut contents = Self::empty(path, u64::MAX);
        contents.add_shard(Opened::by_path(path).map_err(|e| missing(path, &e))?, None)?;
        Ok(contents)
    }

    fn of_checkpoint(folder: Folder) -> Result<Self> {
        let manifest = manifest_of(&folder, Links::Cache)?;
        let mut contents = Self::empty(folder.path(), manifest.piece.max(1));
        let mut index = None;
        for file in &manifest.files {
            let bytes = read_small(&folder, file)?;
            if file.name == INDEX {
                index = Some(Indexed::read(&bytes, &folder.path().join(INDEX))?);
            }
        }
        for shard in &manifest.shards {
            contents.add_shard(open_in(&folder, &shard.name, Links::Cache)?, Some(shard))?;
        }
        if let Some(index) = index {
            compare(&index, &contents)?;
        }
        contents.manifest = Some(manifest);
        contents.folder = Some(folder);
        Ok(contents)
    }

    fn of_others(folder: Folder) -> Result<Self> {
        let mut contents = Self::empty(folder.path(), u64::MAX);
        let (names, index) = model_files(&folder)?;
        for name in names {
            contents.add_shard(open_in(&folder, &name, Links::Any)?, None)?;
        }
        if let Some(index) = index {
            compare(&index, &contents)?;
        }
        contents.folder = Some(folder);
        Ok(contents)
    }

    fn empty(path: &Path, piece: u64) -> Self {
        let (files, model, optimizer) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
        Self { path: path.to_owned(), files, model, optimizer, manifest: None, piece, folder: None }
    }

    fn add_shard(&mut self, opened: Opened, facts: Option<&ShardFacts>) -> Result<()> {
        let named = |why: String| damaged(format!("{}: {why}.", opened.path.display()));
        let (header, bytes) = read_header(&opened)?;
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
        let end = data.saturating_add(described.data_len() as u64);
        if end != bytes {
            return Err(named(format!("{bytes} bytes, its header describes {end}")));
        }
        let tensors = described.tensors();
        if let Some(lost) = facts.and_then(|f| f.tensors.keys().find(|name| !tensors.contains_key(*name))) {
            return Err(named(format!("'{lost}' is in the manifest and not in the file")));
        }
        let file = self.files.len() as u32;
        for (name, info) in tensors {
            let sums = facts.map(|f| piece_sums(f, &name, info.data_offsets, self.piece)).transpose().map_err(named)?;
            let (start, end) = (data + info.data_offsets.0 as u64, data + info.data_offsets.1 as u64);
            let set = if facts.is_some_and(|f| f.optimizer) { &mut self.optimizer } else { &mut self.model };
            let found =
                Found { name: name.clone(), file, dtype: info.dtype, shape: info.shape.clone(), start, end, sums };
            if set.insert(name.clone(), found).is_some() {
                return Err(named(format!("'{name}' is in an earlier file too")));
            }
        }
        self.files.push(opened);
        Ok(())
    }
}

/// Opens a directory and reads it, again if another process exchanged it meanwhile: then files were missing from the
/// generation that was opened first.
fn one_generation(path: &Path, read: impl Fn(Folder) -> Result<Contents>) -> Result<Contents> {
    for _ in 0..ATTEMPTS {
        let folder = Folder::open(path).or_else(|e| look_again(path, e)).map_err(|e| missing_directory(path, &e))?;
        let id = folder.id();
        match read(folder) {
            Err(_) if !id.is_at(path) => {}
            other => return other,
        }
    }
    Err(damaged(format!("{}: other processes replace it faster than it can be opened.", path.display())))
}

/// A checkpoint that is exchanged in two steps has no name in between.
fn look_again(path: &Path, mut e: std::io::Error) -> std::io::Result<Folder> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let saving = |entry: std::fs::DirEntry| entry.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes());
    for _ in 0..LOOKS {
        let exchanged = std::fs::read_dir(parent).is_ok_and(|entries| entries.flatten().any(saving));
        if e.kind() != std::io::ErrorKind::NotFound || !exchanged {
            break;
        }
        std::thread::sleep(PAUSE);
        match Folder::open(path) {
            Ok(folder) => return Ok(folder),
            Err(again) => e = again,
        }
    }
    Err(e)
}

/// Every tensor that an index names is in the file that it says.
fn compare(index: &Indexed, contents: &Contents) -> Result<()> {
    for (name, file) in &index.map {
        let found = contents.model.get(name).map(|f| contents.files[f.file as usize].path.file_name());
        if found.flatten() != Some(OsStr::new(file)) {
            return Err(damaged(format!("{}: '{name}' is not in {file}.", index.path.display())));
        }
    }
    Ok(())
}

/// Reads a small file and compares it with the manifest.
fn read_small(folder: &Folder, facts: &FileFacts) -> Result<Vec<u8>> {
    let opened = open_in(folder, &facts.name, Links::Cache)?;
    let named = |why: String| damaged(format!("{}: {why}.", opened.path.display()));
    let bytes = opened.bytes().map_err(|e| missing(&opened.path, &e))?;
    if bytes != facts.bytes {
        return Err(named(format!("{bytes} bytes, of {} that were written", facts.bytes)));
    }
    let read = opened.read_all(LONGEST_FILE).map_err(|e| named(e.to_string()))?;
    if hex(sum(&read)) == facts.checksum { Ok(read) } else { Err(named("its checksum differs".into())) }
}

fn open_in(folder: &Folder, name: &str, links: Links) -> Result<Opened> {
    folder.open_file(name, links).map_err(|e| missing(&folder.path().join(name), &e))
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
fn read_header(opened: &Opened) -> Result<(Vec<u8>, u64)> {
    let failed = |e: std::io::Error| missing(&opened.path, &e);
    let bytes = opened.bytes().map_err(failed)?;
    let mut length = [0; 8];
    let short = || damaged(format!("{}: {bytes} bytes, which is no file of tensors.", opened.path.display()));
    opened.file.read_exact_at(&mut length, 0).map_err(|_| short())?;
    let n = u64::from_le_bytes(length);
    if n > LONGEST_FILE || n + 8 > bytes {
        return Err(short());
    }
    let mut header = vec![0; n as usize + 8];
    header[..8].copy_from_slice(&length);
    opened.file.read_exact_at(&mut header[8..], 8).map_err(failed)?;
    Ok((header, bytes))
}

fn missing_directory(path: &Path, e: &std::io::Error) -> Error {
    Error::new(Code::CheckpointMissing, format!("{}: {e}.", path.display()))
        .errno(e.raw_os_error().unwrap_or(0))
        .action(reading(e, "Check the path; `funicular checkpoint ls` lists the checkpoints in a directory."))
}

/// A file that cannot be opened: `FN-E406` unless the system or the process is at its limits.
fn missing(path: &Path, e: &std::io::Error) -> Error {
    let code = match e.raw_os_error() {
        Some(libc::EACCES | libc::EPERM | libc::EMFILE | libc::ENFILE) => Code::CheckpointMissing,
        _ => Code::CheckpointDamaged,
    };
    let action = reading(e, "Load another checkpoint; `funicular checkpoint verify` says which are whole.");
    let why = if e.kind() == std::io::ErrorKind::NotFound { "is missing".to_owned() } else { format!("{e}") };
    let text = format!("{}: {why}.", path.display());
    Error::new(code, text).errno(e.raw_os_error().unwrap_or(0)).action(action)
}
