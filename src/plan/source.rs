//! Models without their weights: from a count of parameters, or from the headers of safetensors files.

use std::{collections::BTreeMap, io::Read, path::Path};

use serde::Deserialize;
use serde_json::Value;

use crate::{
    dtype::DType,
    error::{Code, Error, Result},
    model::{ParamSpec, UnitSpec},
    policy::{Pattern, open_regular},
};

/// What is not part of a block is cut into units of about this many bytes, by the wrapper too.
pub const REST_BYTES: u64 = 64 << 20;
/// Largest header of a safetensors file that is read: the format allows no larger one.
const MAX_HEADER: u64 = 100_000_000;

/// A unit, and whether its backward reads its parameters.
#[derive(Clone, Debug)]
pub struct PlannedUnit {
    /// What is paged together.
    pub spec: UnitSpec,
    /// False for embeddings.
    pub backward: bool,
}

/// Parameters of classes that cannot be paged: they stay where they are, in no tier and no budget.
#[derive(Clone, Debug, Default)]
pub struct Unpaged {
    /// Parameters.
    pub params: u64,
    /// Of them trained.
    pub trained: u64,
    /// Their names, classes and bytes; empty where there are none.
    pub text: String,
}

/// A model of so many parameters.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Parameters in all.
    pub params: u64,
    /// Blocks.
    pub layers: u64,
    /// Entries of the vocabulary.
    pub vocab: u64,
    /// Width; found from the others without one.
    pub hidden: Option<u64>,
}

/// A number such as `7B`, `1.35B`, `350M`.
///
/// # Errors
/// What is wrong with it.
pub fn parse_count(text: &str) -> std::result::Result<u64, String> {
    let wrong = || format!("\"{text}\" is no count of parameters such as 7B, 1.35B or 350M");
    let text = text.trim();
    let (digits, scale) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 1e3),
        Some((at, 'M' | 'm')) => (&text[..at], 1e6),
        Some((at, 'B' | 'b')) => (&text[..at], 1e9),
        Some((at, 'T' | 't')) => (&text[..at], 1e12),
        _ => (text, 1.0),
    };
    let number: f64 = digits.parse().map_err(|_| wrong())?;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked to be in range")]
    if (1.0..1e15).contains(&(number * scale)) { Ok((number * scale).round() as u64) } else { Err(wrong()) }
}

impl Shape {
    /// A decoder of that shape: embedding, equal blocks, head.
    ///
    /// # Errors
    /// `FN-E503` when the embeddings alone have more parameters.
    pub fn units(&self, dtype: DType) -> Result<Vec<PlannedUnit>> {
        let hidden = self.width();
        let table = hidden * self.vocab;
        let blocks = self.params.checked_sub(2 * table).filter(|&b| b >= self.layers && self.layers > 0);
        let Some(blocks) = blocks else {
            let what = format!(
                "{} parameters leave nothing for {} layers beside two tables of {} x {hidden}.",
                self.params, self.layers, self.vocab
            );
            return Err(Error::new(Code::PolicyValue, what).action("Give --vocab and --hidden of the model."));
        };
        let unit = |name: String, numel, backward| PlannedUnit {
            spec: UnitSpec {
                params: vec![ParamSpec { name: format!("{name}.weight"), numel, dtype, trainable: true }],
                name,
            },
            backward,
        };
        let mut units = vec![unit("embed".to_owned(), table, false)];
        for layer in 0..self.layers {
            // The remainder is in the first ones, so that the sum is exact.
            let numel = blocks / self.layers + u64::from(layer < blocks % self.layers);
            units.push(unit(format!("layers.{layer}"), numel, true));
        }
        units.push(unit("lm_head".to_owned(), table, true));
        Ok(units)
    }

    /// Its width.
    pub fn width(&self) -> u64 {
        self.hidden.unwrap_or_else(|| self.solve())
    }

    /// The width at which blocks of twelve squares and two tables have the parameters asked for.
    fn solve(&self) -> u64 {
        #[expect(clippy::cast_precision_loss, reason = "a width has few digits")]
        let (n, l, v) = (self.params as f64, self.layers as f64, self.vocab as f64);
        let root = ((v * v + 12.0 * l * n).sqrt() - v) / (12.0 * l);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "positive and small")]
        let hidden = root as u64;
        hidden.max(1)
    }
}

/// A tensor in a safetensors header.
#[derive(Deserialize)]
struct Tensor {
    dtype: String,
    shape: Vec<u64>,
}

/// The tensors of all safetensors files of a directory, or of the one file named. None where there are none.
///
/// # Errors
/// `FN-E505` for a file that is none.
pub fn safetensors(path: &Path) -> Result<Option<Vec<ParamSpec>>> {
    let is = |file: &Path| file.extension().is_some_and(|e| e == "safetensors");
    let mut files = vec![];
    if path.is_dir() {
        let entries = std::fs::read_dir(path).map_err(|e| unreadable(path, &e.to_string()))?;
        files.extend(entries.flatten().map(|e| e.path()).filter(|f| is(f)));
        files.sort();
    } else if is(path) {
        files.push(path.to_path_buf());
    }
    let mut tensors = BTreeMap::new();
    for file in &files {
        for (name, tensor) in header(file)? {
            if name != "__metadata__" {
                let tensor: Tensor = serde_json::from_value(tensor).map_err(|e| unreadable(file, &e.to_string()))?;
                let numel = tensor.shape.iter().try_fold(1_u64, |product, &length| product.checked_mul(length));
                // So that sums of bytes stay numbers, too.
                let numel = numel.filter(|&numel| numel < 1 << 50).ok_or_else(|| {
                    unreadable(file, &format!("'{name}' has the shape {:?}, more than any file holds", tensor.shape))
                })?;
                tensors.insert(name, (tensor, numel));
            }
        }
    }
    let param = |(name, (t, numel)): (String, (Tensor, u64))| ParamSpec {
        name,
        numel,
        dtype: dtype(&t.dtype),
        trainable: dtype(&t.dtype).trainable(),
    };
    Ok((!files.is_empty()).then(|| tensors.into_iter().map(param).collect()))
}

fn unreadable(path: &Path, why: &str) -> Error {
    Error::new(Code::PlannedModel, format!("{}: {why}.", path.display()))
        .action("Give a directory with config.json or safetensors files, a factory as module:function, or --params.")
}

fn header(file: &Path) -> Result<serde_json::Map<String, Value>> {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut open = open_regular(file)?;
        let mut size = [0; 8];
        open.read_exact(&mut size)?;
        let mut text = Vec::new();
        open.take(u64::from_le_bytes(size).min(MAX_HEADER)).read_to_end(&mut text)?;
        Ok(text)
    };
    let text = read().map_err(|e| unreadable(file, &e.to_string()))?;
    serde_json::from_slice(&text).map_err(|e| unreadable(file, &format!("no safetensors header: {e}")))
}

fn dtype(name: &str) -> DType {
    match name {
        "F32" => DType::F32,
        "BF16" => DType::Bf16,
        "F16" => DType::F16,
        "F64" | "I64" | "U64" => DType::Opaque { size: 8 },
        "I32" | "U32" => DType::Opaque { size: 4 },
        "I16" | "U16" => DType::Opaque { size: 2 },
        _ => DType::Opaque { size: 1 },
    }
}

/// Cuts named parameters into units, as the wrapper does with modules: by the patterns, or along the numbered list that
/// holds the most; the rest before and after it.
///
/// # Errors
/// `FN-E506` when no name matches.
pub fn cut(params: Vec<ParamSpec>, patterns: &[Pattern]) -> Result<Vec<PlannedUnit>> {
    let list = largest_list(&params);
    let block = |name: &str| -> Option<String> {
        if patterns.is_empty() {
            let list = list.as_deref()?;
            let number = name.strip_prefix(list)?.split('.').next().filter(|n| n.parse::<u32>().is_ok())?;
            return Some(format!("{list}{number}"));
        }
        let mut prefixes = name.match_indices('.').map(|(at, _)| &name[..at]);
        prefixes.find(|prefix| patterns.iter().any(|p| p.matches(prefix))).map(ToOwned::to_owned)
    };
    let mut blocks: BTreeMap<(u64, String), Vec<ParamSpec>> = BTreeMap::new();
    let (mut before, mut after) = (Vec::new(), Vec::new());
    for param in params {
        match block(&param.name) {
            Some(name) => {
                let number = name.rsplit('.').next().and_then(|n| n.parse().ok()).unwrap_or(0);
                blocks.entry((number, name)).or_default().push(param);
            }
            None if embeds(&param.name) => before.push(param),
            None => after.push(param),
        }
    }
    if blocks.is_empty() && !patterns.is_empty() {
        let names: Vec<&str> = patterns.iter().map(Pattern::as_str).collect();
        let what = format!("no module of the model matches units.match = {names:?}.");
        return Err(Error::new(Code::UnitsMatch, what).action("Give patterns of its modules' names."));
    }
    let mut units = grouped(before, false);
    units.extend(
        blocks.into_iter().map(|((_, name), params)| PlannedUnit { spec: UnitSpec { name, params }, backward: true }),
    );
    units.extend(grouped(after, true));
    Ok(units)
}

/// Whether a tensor of that name is a table of embeddings, used before the blocks.
fn embeds(name: &str) -> bool {
    let parts = || name.split('.');
    parts().any(|p| p.contains("embed") || ["wte", "wpe", "shared"].contains(&p))
        && !parts().any(|p| p.contains("norm"))
}

/// The prefix, dot included, of the numbered modules with the most elements.
fn largest_list(params: &[ParamSpec]) -> Option<String> {
    let mut sizes: BTreeMap<String, u64> = BTreeMap::new();
    for param in params {
        // The outermost list wins over the lists inside its blocks.
        let parts: Vec<&str> = param.name.split('.').collect();
        if let Some(at) = parts.iter().position(|p| p.parse::<u32>().is_ok()) {
            *sizes.entry(parts[..at].iter().map(|p| format!("{p}.")).collect()).or_default() += param.numel;
        }
    }
    sizes.into_iter().max_by_key(|(_, size)| *size).map(|(prefix, _)| prefix)
}

fn grouped(params: Vec<ParamSpec>, backward: bool) -> Vec<PlannedUnit> {
    let mut units: Vec<PlannedUnit> = Vec::new();
    let mut size = 0;
    for param in params {
        let bytes = param.numel * param.dtype.size() as u64;
        if units.is_empty() || size + bytes > REST_BYTES {
            units.push(PlannedUnit { spec: UnitSpec { name: param.name.clone(), params: vec![] }, backward });
            size = 0;
        }
        size += bytes;
        if let Some(unit) = units.last_mut() {
            unit.spec.params.push(param);
        }
    }
    units
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_read() {
        assert_eq!(parse_count("7B"), Ok(7_000_000_000));
        assert_eq!(parse_count("1.35b"), Ok(1_350_000_000));
        assert_eq!(parse_count("350M"), Ok(350_000_000));
        for wrong in ["", "B", "seven", "-1B", "0", "1e30B", "nan"] {
            assert!(parse_count(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_only_looks_like_a_model_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let write = |name: &str, header: &str| {
            let path = dir.path().join(name);
            let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
            std::fs::write(&path, bytes).expect("writes");
            path
        };
        let shape =
            |shape: &str| format!("{{\"a\": {{\"dtype\": \"F32\", \"shape\": {shape}, \"data_offsets\": [0, 0]}}}}");
        let right = safetensors(&write("right.safetensors", &shape("[2, 3]"))).expect("reads").expect("is one");
        assert_eq!(right[0].numel, 6);
        for wrong in ["[4294967296, 4294967296]", "[9007199254740993]"] {
            let error = safetensors(&write("large.safetensors", &shape(wrong))).expect_err("more than any file holds");
            assert!(error.code() == Code::PlannedModel && error.to_string().contains("'a' has the shape"), "{error}");
        }
        for (name, target) in [("null.safetensors", "/dev/zero"), ("full.safetensors", "/dev/full")] {
            let link = dir.path().join(name);
            std::os::unix::fs::symlink(target, &link).expect("links");
            let error = safetensors(&link).expect_err("a device");
            assert!(error.to_string().contains("not a regular file"), "{error}");
        }
    }

    #[test]
    fn a_shape_has_the_parameters_asked_for() {
        let shape = Shape { params: 7_000_000_000, layers: 32, vocab: 32_000, hidden: None };
        let units = shape.units(DType::Bf16).expect("fits");
        let sum: u64 = units.iter().flat_map(|u| &u.spec.params).map(|p| p.numel).sum();
        assert_eq!((units.len(), sum), (34, 7_000_000_000));
        let hidden = units[0].spec.params[0].numel / 32_000;
        assert!((4000..4200).contains(&hidden), "{hidden}: Llama 7B has 4096");
        let error = Shape { hidden: Some(200_000), ..shape }.units(DType::Bf16).expect_err("too wide");
        assert_eq!(error.code(), Code::PolicyValue);
    }

    #[test]
    fn names_are_cut_as_modules_are() {
        let param =
            |name: &str| ParamSpec { name: name.to_owned(), numel: 1 << 20, dtype: DType::Bf16, trainable: true };
        let mut names = vec!["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"];
        let blocks: Vec<String> =
            (0..11).flat_map(|i| ["q", "k"].map(|n| format!("model.layers.{i}.{n}.weight"))).collect();
        names.extend(blocks.iter().map(String::as_str));
        let units = cut(names.iter().map(|n| param(n)).collect(), &[]).expect("cuts");
        let got: Vec<&str> = units.iter().map(|u| u.spec.name.as_str()).collect();
        assert_eq!(got[..3], ["model.embed_tokens.weight", "model.layers.0", "model.layers.1"]);
        assert_eq!(got[11..], ["model.layers.10", "lm_head.weight"]);
        assert!(!units[0].backward && units[12].backward && units[12].spec.params.len() == 2);
        let pattern = |p| [Pattern::new(p).expect("a pattern")];
        let units = cut(names.iter().map(|n| param(n)).collect(), &pattern("model.layers.*.q")).expect("cuts");
        assert!(units.iter().any(|u| u.spec.name == "model.layers.10.q"));
        assert!(cut(vec![param("a.b")], &pattern("x")).is_err());
    }
}
