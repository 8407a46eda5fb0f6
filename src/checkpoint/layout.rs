//! Which tensor lies where: shards in the format of safetensors, with headers padded so that data starts at a block.

use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};

use crate::{
    checkpoint::manifest::LONGEST_FILE,
    error::{Code, Error, Result},
    io::ALIGNMENT,
    quantities::round_up,
};

/// The key under which the format keeps metadata, not a tensor.
const METADATA: &str = "__metadata__";

/// A tensor to be written.
#[derive(Clone, Debug)]
pub struct TensorSpec {
    /// Its key in the file.
    pub name: String,
    /// Element type in the file.
    pub dtype: Dtype,
    /// Its shape; rows last.
    pub shape: Vec<usize>,
    /// What is written together: tensors of one group lie together as far as alignment allows.
    pub group: u32,
    /// Whether it belongs to the optimizer's files rather than to the model's.
    pub optimizer: bool,
}

impl TensorSpec {
    /// Bytes of its data.
    pub fn bytes(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product::<u64>() * self.dtype.bitsize() as u64 / 8
    }
}

/// One file of tensors.
#[derive(Clone, Debug)]
pub(super) struct Shard {
    /// File name.
    pub name: String,
    /// The first bytes of the file, a whole number of blocks.
    pub header: Vec<u8>,
    /// Bytes in all.
    pub bytes: u64,
    /// Index of each tensor and its offset in the file, in the order of the file.
    pub tensors: Vec<(usize, u64)>,
    /// Whether it belongs to the optimizer.
    pub optimizer: bool,
}

/// Cuts the tensors of one set into shards of `most` bytes of data at most (a larger tensor gets a shard of its own) and
/// places them. `metadata` goes into every header.
///
/// # Errors
/// `FN-E408` for two tensors of one name.
pub(super) fn arrange(
    stem: &str,
    tensors: &[TensorSpec],
    optimizer: bool,
    most: u64,
    metadata: &[(String, String)],
) -> Result<Vec<Shard>> {
    let mut order: Vec<usize> = (0..tensors.len()).filter(|&i| tensors[i].optimizer == optimizer).collect();
    order.sort_by_key(|&i| tensors[i].group);
    let mut cuts: Vec<Vec<usize>> = Vec::new();
    let mut bytes = 0;
    for i in order {
        let more = tensors[i].bytes();
        match cuts.last_mut() {
            Some(cut) if bytes + more <= most => cut.push(i),
            _ => {
                cuts.push(vec![i]);
                bytes = 0;
            }
        }
        bytes += more;
    }
    let count = cuts.len();
    let name = |k: usize| match count {
        1 => format!("{stem}.safetensors"),
        _ => format!("{stem}-{:05}-of-{count:05}.safetensors", k + 1),
    };
    cuts.into_iter().enumerate().map(|(k, cut)| shard(name(k), tensors, cut, optimizer, metadata)).collect()
}

fn shard(
    name: String,
    tensors: &[TensorSpec],
    mut order: Vec<usize>,
    optimizer: bool,
    metadata: &[(String, String)],
) -> Result<Shard> {
    let invalid = |e: &dyn std::fmt::Display| Error::new(Code::CheckpointValue, format!("{name}: {e}."));
    if order.iter().any(|&i| tensors[i].name == METADATA) {
        return Err(invalid(&"a tensor cannot be called '__metadata__', which means another thing in the format")
            .action("Give that parameter or buffer another name."));
    }
    // The format has no gaps: tensors are aligned to their element because wider ones come first.
    order.sort_by_key(|&i| (std::cmp::Reverse(tensors[i].dtype.bitsize()), tensors[i].group));
    let mut at = 0;
    let mut infos = Vec::with_capacity(order.len());
    for &i in &order {
        let end = at + tensors[i].bytes() as usize;
        let info = TensorInfo { dtype: tensors[i].dtype, shape: tensors[i].shape.clone(), data_offsets: (at, end) };
        infos.push((tensors[i].name.clone(), info));
        at = end;
    }
    // Last, so that no tied tensor of that name hides what loaders look for.
    let format = [("format".to_owned(), "pt".to_owned())];
    let notes = Some(metadata.iter().chain(&format).cloned().collect());
    let described = Metadata::new(notes, infos).map_err(|e| invalid(&e))?;
    if described.offset_keys().len() != order.len() {
        return Err(invalid(&"two tensors have the same name"));
    }
    let json = serde_json::to_vec(&described).map_err(|e| invalid(&e))?;
    let length = round_up(8 + json.len() as u64, ALIGNMENT as u64) as usize;
    if length as u64 - 8 > LONGEST_FILE {
        let text = format!("its header would have {length} bytes, the format allows {LONGEST_FILE}");
        return Err(invalid(&text).action("Lower shard_bytes, so that a file has fewer tensors."));
    }
    let mut header = Vec::with_capacity(length);
    header.extend_from_slice(&(length as u64 - 8).to_le_bytes());
    header.extend_from_slice(&json);
    header.resize(length, b' ');
    let placed = order.iter().zip(starts(tensors, &order, length as u64)).map(|(&i, at)| (i, at)).collect();
    Ok(Shard { name, bytes: (length + at) as u64, header, tensors: placed, optimizer })
}

fn starts<'a>(tensors: &'a [TensorSpec], order: &'a [usize], first: u64) -> impl Iterator<Item = u64> + 'a {
    order.iter().scan(first, |at, &i| {
        let start = *at;
        *at += tensors[i].bytes();
        Some(start)
    })
}

/// The index that Hugging Face's loaders read where there are several shards.
pub(super) fn index(shards: &[&Shard], tensors: &[TensorSpec]) -> Vec<u8> {
    let places = shards.iter().flat_map(|s| s.tensors.iter().map(move |&(i, _)| (i, &s.name)));
    let map: serde_json::Map<String, serde_json::Value> =
        places.clone().map(|(i, file)| (tensors[i].name.clone(), file.as_str().into())).collect();
    let total: u64 = places.map(|(i, _)| tensors[i].bytes()).sum();
    let index = serde_json::json!({ "metadata": { "total_size": total }, "weight_map": map });
    serde_json::to_vec_pretty(&index).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, dtype: Dtype, n: usize, group: u32) -> TensorSpec {
        TensorSpec { name: name.into(), dtype, shape: vec![n], group, optimizer: false }
    }

    #[test]
    fn shards_follow_groups_and_tensors_are_aligned() {
        let tensors = [
            spec("a", Dtype::BF16, 3, 0),
            spec("b", Dtype::F32, 5, 0),
            spec("c", Dtype::I64, 1, 1),
            spec("d", Dtype::BOOL, 7, 2),
            spec("e", Dtype::F32, 1000, 2),
        ];
        let one = arrange("model", &tensors, false, 1 << 20, &[]).expect("places");
        assert_eq!(one.len(), 1);
        assert_eq!(one[0].name, "model.safetensors");
        assert_eq!(one[0].header.len() % ALIGNMENT, 0);
        for &(i, at) in &one[0].tensors {
            assert_eq!(at % (tensors[i].dtype.bitsize() as u64 / 8), 0, "{}", tensors[i].name);
        }
        let many = arrange("model", &tensors, false, 40, &[]).expect("places");
        let names: Vec<_> = many.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(names.len(), 3);
        assert_eq!(names[1], "model-00002-of-00003.safetensors");
        assert_eq!(many[2].tensors.len(), 1, "what is larger than a shard has its own");
    }

    #[test]
    fn a_header_is_what_the_format_says() {
        let tensors = [spec("x", Dtype::F32, 4, 0), spec("empty", Dtype::F32, 0, 0)];
        let shard = &arrange("model", &tensors, false, 1 << 20, &[("k".into(), "v".into())]).expect("places")[0];
        let mut file = shard.header.clone();
        file.resize(shard.bytes as usize, 0);
        let read = safetensors::SafeTensors::deserialize(&file).expect("valid");
        assert_eq!(read.tensor("x").expect("there").data().len(), 16);
        let (_, metadata) = safetensors::SafeTensors::read_metadata(&file).expect("valid");
        assert_eq!(metadata.metadata().as_ref().and_then(|m| m.get("format")).map(String::as_str), Some("pt"));
    }

    #[test]
    fn what_no_loader_could_read_is_refused() {
        let tensors = [spec("__metadata__", Dtype::F32, 4, 0)];
        let error = arrange("model", &tensors, false, 1 << 20, &[]).expect_err("another meaning");
        assert_eq!(error.code(), Code::CheckpointValue);
        let tensors = [spec("x", Dtype::F32, 4, 0)];
        let tied = [("format".to_owned(), "x".to_owned())];
        let shard = &arrange("model", &tensors, false, 1 << 20, &tied).expect("places")[0];
        assert!(String::from_utf8_lossy(&shard.header).contains(r#""format":"pt""#));
    }

    #[test]
    fn one_name_twice_is_refused() {
        let tensors = [spec("x", Dtype::F32, 4, 0), spec("x", Dtype::F32, 4, 0)];
        let error = arrange("model", &tensors, false, 1 << 20, &[]).expect_err("twice");
        assert_eq!(error.code(), Code::CheckpointValue);
    }
}
