//! A save from begin to end, for any source of bytes.

use std::{collections::BTreeSet, path::PathBuf};

use serde_json::value::RawValue;

use crate::{
    checkpoint::{
        control::Control,
        directory::{Workspace, write_file},
        folder::is_plain,
        layout::{Shard, TensorSpec, arrange, index},
        leftovers::sweep,
        manifest::{FileFacts, LONGEST, LONGEST_FILE, MANIFEST, Manifest, PIECE, ShardFacts, hex, sum},
        series::prune,
        tensors::Pieces,
        writer::{FrameBudget, Writer},
    },
    error::{Code, Error, Result},
    io::free_bytes,
    quantities::{ByteCount, round_up},
};

/// What shall be saved, and where.
#[derive(Debug)]
pub struct Request {
    /// The checkpoint's directory.
    pub target: PathBuf,
    /// Whether an earlier checkpoint there is replaced.
    pub overwrite: bool,
    /// How many checkpoints of this series are kept.
    pub keep: Option<usize>,
    /// The tensors.
    pub tensors: Vec<TensorSpec>,
    /// Other names of the model's tensors: `(name, name of the tensor)`.
    pub aliases: Vec<(String, String)>,
    /// Small files: name and contents.
    pub files: Vec<(String, Vec<u8>)>,
    /// What the wrapper wants to find again.
    pub training: Box<RawValue>,
    /// Bytes of a shard at most.
    pub shard: u64,
}

/// Where the bytes come from. Tensors are asked for group by group, each tensor from its begin to its end.
pub trait SaveSource {
    /// The group to be written next, once it may be read; none when all were.
    ///
    /// # Errors
    /// The error that keeps the group from being read; `FN-E412`.
    fn next(&mut self, control: &Control) -> Result<Option<u32>>;

    /// What will be fetched of that group: these tensors, with their bytes, in this order.
    ///
    /// # Errors
    /// The error that keeps the tensors from being read.
    fn expect(&mut self, _tensors: &mut dyn Iterator<Item = (usize, u64)>) -> Result<()> {
        Ok(())
    }

    /// Fills `out` with a tensor's bytes from byte `at` on.
    ///
    /// # Errors
    /// From the tier.
    fn fetch(&mut self, tensor: usize, at: u64, out: &mut [u8]) -> Result<()>;

    /// Bytes of a tensor that are best fetched at a time: what lies in memory is summed while it is still in the cache.
    fn grain(&self, tensor: usize) -> usize;

    /// All bytes of the group were fetched: it may be overwritten.
    ///
    /// # Errors
    /// If it was changed meanwhile.
    fn copied(&mut self, group: u32) -> Result<()>;
}

/// A save that has its place.
#[derive(Debug)]
pub struct Save {
    request: Request,
    workspace: Workspace,
    shards: Vec<Shard>,
}

impl Save {
    /// Lays the files out, looks whether there is room, and takes a private directory.
    ///
    /// # Errors
    /// `FN-E401`, `FN-E402`, `FN-E403`, `FN-E408`; nothing stays behind.
    pub fn new(request: Request) -> Result<Self> {
        let most = request.shard;
        let mut shards = arrange("model", &request.tensors, false, most, &request.aliases)?;
        shards.extend(arrange("optimizer", &request.tensors, true, most, &[])?);
        check_readable(&request, &shards)?;
        let workspace = Workspace::create(&request.target, request.overwrite)?;
        let small: usize = request.files.iter().map(|(_, bytes)| bytes.len()).sum();
        let need = shards.iter().map(|s| round_up(s.bytes, 4096)).sum::<u64>() + small as u64 + (1 << 20);
        let free = || free_bytes(workspace.path());
        if free()? < need {
            // What an earlier save left behind may take the space that is missing.
            sweep(workspace.target());
            let free = free()?;
            if free < need {
                let (place, need, free) = (workspace.target().display(), ByteCount(need), ByteCount(free));
                return Err(Error::new(
                    Code::CheckpointSpace,
                    format!("a checkpoint at {place} needs {need}, {free} are free; nothing was written."),
                )
                .errno(libc::ENOSPC)
                .action("Free space, or save to another disk."));
            }
        }
        Ok(Self { request, workspace, shards })
    }

    /// The tensors.
    pub fn tensors(&self) -> &[TensorSpec] {
        &self.request.tensors
    }

    /// The tensors' indices, in the order in which those of one group are asked for.
    pub fn order(&self) -> impl Iterator<Item = usize> + '_ {
        self.shards.iter().flat_map(|s| s.tensors.iter().map(|&(i, _)| i))
    }

    /// Writes everything and gives the checkpoint its name. Returns notes for the user.
    ///
    /// # Errors
    /// `FN-E401`, `FN-E403`, `FN-E412`, or what `source` fails with; nothing stays behind.
    pub fn run(self, source: &mut dyn SaveSource, budget: &FrameBudget, control: &Control) -> Result<Vec<String>> {
        let Self { request, workspace, shards } = self;
        let mut notes = sweep(workspace.target());
        control.expect(shards.iter().map(|s| s.bytes).sum());
        let mut manifest = Manifest::new(request.training);
        let sums = write_shards(&shards, &request.tensors, &workspace, source, budget, control)?;
        let mut files = request.files;
        files.extend(indices(&shards, &request.tensors));
        for (name, bytes) in files {
            write_file(workspace.path(), &name, &bytes)?;
            manifest.files.push(FileFacts { bytes: bytes.len() as u64, checksum: hex(sum(&bytes)), name });
        }
        manifest.shards = shards.iter().map(|shard| facts(shard, &request.tensors, &sums)).collect();
        write_file(workspace.path(), MANIFEST, &manifest.encode())?;
        control.check()?;
        let target = workspace.target().to_owned();
        notes.extend(workspace.publish()?);
        if let Some(keep) = request.keep {
            notes.extend(prune(&target, keep));
        }
        Ok(notes)
    }
}

/// Whether a load could read what is to be written: names of files, each once, and sizes.
fn check_readable(request: &Request, shards: &[Shard]) -> Result<()> {
    let refused = |text: String, action: &str| Err(Error::new(Code::CheckpointValue, text).action(action));
    let mut names = BTreeSet::from([MANIFEST.to_owned()]);
    names.extend(shards.iter().map(|s| s.name.clone()));
    for (name, bytes) in request.files.iter().chain(&indices(shards, &request.tensors)) {
        if !is_plain(name) || !names.insert(name.clone()) {
            return refused(format!("a file of a checkpoint cannot be called '{name}'."), "Give it another name.");
        }
        if bytes.len() as u64 > LONGEST_FILE {
            let text = format!("{name} would have {} bytes, {LONGEST_FILE} are allowed.", bytes.len());
            return refused(text, "Save fewer tensors, or a smaller configuration.");
        }
    }
    // Per tensor its name and what stands around it, per piece its checksum.
    let tensors = request.tensors.iter().map(|t| 6 * t.name.len() as u64 + 64 + t.bytes().div_ceil(PIECE) * 40);
    let need = request.training.get().len() as u64 + tensors.sum::<u64>() + 1024 * (names.len() as u64 + 1);
    if need > LONGEST {
        let (need, most) = (ByteCount(need), ByteCount(LONGEST));
        return refused(format!("{MANIFEST} would need {need}, {most} are allowed."), "Give less in `extra`.");
    }
    Ok(())
}

/// Writes all tensors, group by group; their checksums, by tensor.
fn write_shards(
    shards: &[Shard],
    tensors: &[TensorSpec],
    workspace: &Workspace,
    source: &mut dyn SaveSource,
    budget: &FrameBudget,
    control: &Control,
) -> Result<Vec<Vec<u64>>> {
    let files: Vec<(&str, u64)> = shards.iter().map(|s| (s.name.as_str(), s.bytes)).collect();
    let mut writer = Writer::create(workspace.path(), &files, budget, control)?;
    for (k, shard) in shards.iter().enumerate() {
        writer.seek(k as u32, 0)?;
        writer.put(&shard.header)?;
    }
    let groups = tensors.iter().map(|t| t.group as usize + 1).max().unwrap_or(0);
    let mut places: Vec<Vec<(u32, usize, u64)>> = vec![Vec::new(); groups];
    for (k, shard) in shards.iter().enumerate() {
        for &(tensor, at) in &shard.tensors {
            places[tensors[tensor].group as usize].push((k as u32, tensor, at));
        }
    }
    let mut sums = vec![Vec::new(); tensors.len()];
    while let Some(group) = source.next(control)? {
        let places = places.get(group as usize).map_or(&[][..], |of_group| of_group);
        source.expect(&mut places.iter().map(|&(_, tensor, _)| (tensor, tensors[tensor].bytes())))?;
        for &(file, tensor, offset) in places {
            sums[tensor] = write_tensor(&mut writer, source, (file, offset), tensor, tensors[tensor].bytes())?;
        }
        source.copied(group)?;
    }
    writer.finish()?;
    Ok(sums)
}

fn write_tensor(
    writer: &mut Writer<'_>,
    source: &mut dyn SaveSource,
    (file, offset): (u32, u64),
    tensor: usize,
    bytes: u64,
) -> Result<Vec<u64>> {
    let mut pieces = Pieces::new(PIECE);
    writer.seek(file, offset)?;
    let (mut at, grain) = (0, source.grain(tensor));
    while at < bytes {
        let room = writer.room()?;
        let n = room.len().min((bytes - at) as usize).min(grain);
        source.fetch(tensor, at, &mut room[..n])?;
        pieces.feed(&room[..n]);
        writer.advance(n);
        at += n as u64;
    }
    pieces.end();
    Ok(pieces.sums)
}

fn indices(shards: &[Shard], tensors: &[TensorSpec]) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    for (optimizer, stem) in [(false, "model"), (true, "optimizer")] {
        let of_set: Vec<&Shard> = shards.iter().filter(|s| s.optimizer == optimizer).collect();
        if of_set.len() > 1 {
            files.push((format!("{stem}.safetensors.index.json"), index(&of_set, tensors)));
        }
    }
    files
}

fn facts(shard: &Shard, tensors: &[TensorSpec], sums: &[Vec<u64>]) -> ShardFacts {
    let of = |i: usize| (tensors[i].name.clone(), sums[i].iter().map(|&s| hex(s)).collect());
    ShardFacts {
        name: shard.name.clone(),
        bytes: shard.bytes,
        optimizer: shard.optimizer,
        header: hex(sum(&shard.header)),
        tensors: shard.tensors.iter().map(|&(i, _)| of(i)).collect(),
    }
}
