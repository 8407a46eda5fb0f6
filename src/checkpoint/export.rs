//! A checkpoint's weights alone, as they are or as fp32 masters, for other programs.

use std::{collections::BTreeMap, path::Path};

use safetensors::Dtype;
use serde::Deserialize;
use serde_json::value::to_raw_value;

use crate::{
    checkpoint::{
        GRAIN,
        contents::{Contents, Found},
        control::Control,
        convert::{Conversion, master},
        folder::Links,
        layout::TensorSpec,
        manifest::{LONGEST_FILE, MANIFEST},
        reader::damaged,
        save::{Request, Save, SaveSource},
        tensors::TensorReader,
        writer::FrameBudget,
    },
    dtype::DType,
    error::{Code, Error, Result},
};

/// Files that are copied beside the weights.
const COPIED: [&str; 2] = ["config.json", "generation_config.json"];
/// Elements are joined through this many bytes.
const SCRATCH: usize = 64 << 10;

/// Writes a checkpoint's weights to `target`: with `fp32` the masters of 16-bit parameters, else the parameters' own types.
///
/// # Errors
/// Those of opening a checkpoint and of saving one.
pub(super) fn export(
    contents: &Contents,
    target: &Path,
    fp32: bool,
    shard: u64,
    budget: &FrameBudget,
    control: &Control,
) -> Result<()> {
    let said = Said::of(contents)?;
    let found: Vec<&Found> = contents.model.values().collect();
    let tensors: Vec<TensorSpec> = found
        .iter()
        .map(|f| TensorSpec {
            name: f.name.clone(),
            dtype: if fp32 { widened(f.dtype) } else { said.dtypes.get(&f.name).map_or(f.dtype, |kind| own(kind)) },
            shape: f.shape.clone(),
            group: 0,
            optimizer: false,
        })
        .collect();
    let request = Request {
        target: target.to_owned(),
        overwrite: false,
        keep: None,
        aliases: said.tied.clone().into_iter().collect(),
        files: copied(contents, &tensors)?,
        training: to_raw_value(
            &serde_json::json!({ "exported_from": contents.path.display().to_string(), "tied": said.tied }),
        )
        .map_err(|e| Error::new(Code::CheckpointValue, format!("what is tied: {e}.")))?,
        shard,
        tensors,
    };
    let save = Save::new(request)?;
    let order: Vec<usize> = save.order().collect();
    let rest = |f: &Found| contents.optimizer.get(&format!("{}.master", f.name)).filter(|_| fp32 && half(f).is_some());
    // Tensors without elements are never asked for.
    let params: Vec<&Found> = order.iter().map(|&i| found[i]).filter(|f| f.start < f.end).collect();
    let rests = params.iter().filter_map(|f| rest(f)).collect();
    let mut source = Tensors {
        specs: save.tensors().iter().map(|t| t.dtype).collect(),
        found: found.clone(),
        joined: found.iter().map(|f| rest(f).is_some()).collect(),
        params: TensorReader::open(contents, params, budget, control)?,
        rests: TensorReader::open(contents, rests, budget, control)?,
        read: false,
    };
    save.run(&mut source, budget, control).map(|_| ())
}

fn widened(dtype: Dtype) -> Dtype {
    if matches!(dtype, Dtype::BF16 | Dtype::F16) { Dtype::F32 } else { dtype }
}

/// What a manifest says of the weights.
#[derive(Default, Deserialize)]
struct Said {
    /// Types of 16-bit parameters of which the file has the fp32 masters.
    #[serde(default)]
    dtypes: BTreeMap<String, String>,
    /// Other names of tensors.
    #[serde(default)]
    tied: BTreeMap<String, String>,
}

impl Said {
    fn of(contents: &Contents) -> Result<Self> {
        let Some(manifest) = &contents.manifest else { return Ok(Self::default()) };
        serde_json::from_str(manifest.training.get()).map_err(|e| {
            let path = contents.path.join(MANIFEST);
            damaged(format!("{}: its part about the training: {e}.", path.display()))
        })
    }
}

fn own(name: &str) -> Dtype {
    if name == "float16" { Dtype::F16 } else { Dtype::BF16 }
}

fn half(found: &Found) -> Option<DType> {
    match found.dtype {
        Dtype::BF16 => Some(DType::Bf16),
        Dtype::F16 => Some(DType::F16),
        _ => None,
    }
}

/// The model's configuration, with the type that its weights have now.
fn copied(contents: &Contents, tensors: &[TensorSpec]) -> Result<Vec<(String, Vec<u8>)>> {
    let mut files = Vec::new();
    for name in COPIED {
        let Some(folder) = contents.folder.as_ref().filter(|folder| folder.has(name)) else { continue };
        let named = |e: std::io::Error| damaged(format!("{}: {e}.", contents.path.join(name).display()));
        let bytes = folder.open_file(name, Links::Cache).and_then(|f| f.read_all(LONGEST_FILE)).map_err(named)?;
        let parsed = serde_json::from_slice::<serde_json::Value>(&bytes);
        let mut config = parsed.map_err(|e| {
            Error::new(Code::CheckpointDamaged, format!("{}: {e}.", contents.path.join(name).display()))
        })?;
        let kinds = [(Dtype::F32, "float32"), (Dtype::BF16, "bfloat16"), (Dtype::F16, "float16")];
        let first = tensors.iter().find_map(|t| kinds.iter().find(|(dtype, _)| *dtype == t.dtype));
        for key in ["dtype", "torch_dtype"] {
            if let (Some(said), Some((_, kind))) = (config.get_mut(key).filter(|v| v.is_string()), first) {
                *said = (*kind).into();
            }
        }
        files.push((name.to_owned(), serde_json::to_vec_pretty(&config).unwrap_or(bytes)));
    }
    Ok(files)
}

/// Reads tensors in the order in which they are written.
struct Tensors<'a> {
    specs: Vec<Dtype>,
    found: Vec<&'a Found>,
    joined: Vec<bool>,
    params: TensorReader<'a>,
    rests: TensorReader<'a>,
    read: bool,
}

impl SaveSource for Tensors<'_> {
    fn next(&mut self, control: &Control) -> Result<Option<u32>> {
        control.check()?;
        Ok(if std::mem::replace(&mut self.read, true) { None } else { Some(0) })
    }

    fn fetch(&mut self, tensor: usize, at: u64, out: &mut [u8]) -> Result<()> {
        let (found, to) = (self.found[tensor], self.specs[tensor]);
        let size = found.shape.iter().map(|&n| n as u64).product::<u64>() * to.bitsize() as u64 / 8;
        let over = at + out.len() as u64 == size;
        match half(found).filter(|_| self.joined[tensor]) {
            Some(dtype) => self.join(dtype, out)?,
            None => {
                let cut = found.dtype == Dtype::F32 && to == Dtype::BF16;
                let conversion = if cut { Some(Conversion::High) } else { Conversion::between(found.dtype, to) };
                let lost = || Error::new(Code::Stale, format!("'{}' cannot become {to}.", found.name));
                self.params.read(conversion.ok_or_else(lost)?, out)?;
            }
        }
        if over {
            self.params.advance();
            if self.joined[tensor] {
                self.rests.advance();
            }
        }
        Ok(())
    }

    fn grain(&self, _tensor: usize) -> usize {
        GRAIN
    }

    fn copied(&mut self, _group: u32) -> Result<()> {
        Ok(())
    }
}

impl Tensors<'_> {
    fn join(&mut self, dtype: DType, out: &mut [u8]) -> Result<()> {
        let rest_size = if dtype == DType::F16 { 4 } else { 2 };
        let (mut params, mut rests) = (vec![0; SCRATCH], vec![0; SCRATCH / 2 * rest_size]);
        for piece in out.chunks_mut(SCRATCH * 2) {
            let n = piece.len() / 4;
            self.params.read(Conversion::Same, &mut params[..2 * n])?;
            self.rests.read(Conversion::Same, &mut rests[..rest_size * n])?;
            master(dtype, &params[..2 * n], Some(&rests[..rest_size * n]), piece);
        }
        Ok(())
    }
}
