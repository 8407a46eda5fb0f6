//! An estimate of the memory that activations take, from the sizes of a transformer's blocks.
//!
//! What torch keeps of each token for the backward of common blocks: norms keep their input and what they make of it, attention
//! (by a fused kernel, which keeps no matrix of scores) queries, keys, values and its output, the feed-forward part what it
//! multiplies. `tests/python/tools/test_plan.py` compares it with what models of transformers keep.

use std::{fmt, path::Path};

use serde::Serialize;
use serde_json::Value;

use super::source::Shape;
use crate::{policy::read_text, quantities::ByteCount};

/// Bytes per token and entry of the vocabulary at the start of the backward, beside the logits themselves: logits in fp32, what
/// the loss keeps, and its gradient.
const LOSS: u64 = 12;

/// Sizes of a transformer as far as its activations depend on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    layers: u64,
    hidden: u64,
    /// Width of keys, and of values.
    keys: u64,
    /// Width of the feed-forward part, of all experts that a token passes.
    inner: u64,
    /// How many tensors of that width are kept.
    inner_kept: u64,
    /// Whether norms compute in fp32.
    rms: bool,
    vocab: u64,
}

/// The tokens of one forward, and how they pass.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    /// Tokens.
    pub tokens: u64,
    /// Whether blocks are computed again in the backward: then their inputs are kept, and one block's activations.
    pub recompute: bool,
    /// Micro-batches of the blocks, if they take any; they are computed again then.
    pub micro_batch: Option<MicroBatched>,
    /// Bytes of an element in the model's type.
    pub element: u64,
}

/// Blocks that run in micro-batches.
#[derive(Clone, Copy, Debug)]
pub struct MicroBatched {
    /// Tokens of one of them.
    pub tokens: u64,
    /// Whether their inputs wait in host memory.
    pub inputs_away: bool,
}

/// The estimate.
#[derive(Clone, Debug, Serialize)]
pub struct Activations {
    /// In all, at the start of the backward.
    pub bytes: u64,
    /// Of them what blocks keep.
    pub blocks: u64,
    /// Of them logits and loss.
    pub head: u64,
    /// For so many tokens at a time.
    pub tokens: u64,
    /// Whether blocks are computed again.
    pub recompute: bool,
    /// Whether they run in micro-batches.
    pub micro_batches: bool,
    /// What it was estimated from.
    pub from: String,
    /// What the GPU has beside the budget of its tier, where both are known.
    pub beside: Option<u64>,
}

impl Blocks {
    /// The sizes that a Hugging Face `config.json` in `folder` gives; none without one, or where it names no sizes.
    #[must_use]
    pub fn read(folder: &Path) -> Option<Self> {
        let config: Value = serde_json::from_str(&read_text(&folder.join("config.json")).ok()?).ok()?;
        // Models of text and images keep the text model's sizes in a part of their own.
        Self::of(&config).or_else(|| Self::of(config.get("text_config")?))
    }

    fn of(config: &Value) -> Option<Self> {
        // Larger numbers are nonsense, and products of these stay far below what 64 bits hold.
        let known = |names: &[&str]| {
            let found = names.iter().find_map(|name| config.get(name)?.as_u64());
            found.filter(|n| (1..1 << 24).contains(n))
        };
        let (layers, hidden) =
            (known(&["num_hidden_layers", "n_layer", "num_layers"])?, known(&["hidden_size", "n_embd", "d_model"])?);
        let heads = known(&["num_attention_heads", "n_head"]).unwrap_or(1);
        let head = known(&["head_dim"]).unwrap_or(hidden / heads);
        let dense = known(&["intermediate_size", "n_inner", "ffn_dim", "d_ff"]).unwrap_or(4 * hidden);
        let experts = known(&["num_experts_per_tok"]).unwrap_or(1);
        let rms = config.get("rms_norm_eps").is_some();
        Some(Self {
            layers,
            hidden,
            keys: head * known(&["num_key_value_heads"]).unwrap_or(heads),
            inner: experts * known(&["moe_intermediate_size"]).unwrap_or(dense),
            inner_kept: match config.get("activation_function").and_then(Value::as_str) {
                // Models with such norms multiply two projections, one of them behind an activation.
                _ if rms => 4,
                // Computed step by step.
                Some("gelu_new" | "gelu_fast") => 5,
                _ => 2,
            },
            rms,
            vocab: known(&["vocab_size"]).unwrap_or(0),
        })
    }

    /// Those of a decoder of that shape.
    #[must_use]
    pub fn of_shape(shape: &Shape) -> Self {
        let hidden = shape.width();
        let (layers, vocab) = (shape.layers, shape.vocab);
        Self { layers, hidden, keys: hidden, inner: 4 * hidden, inner_kept: 2, rms: true, vocab }
    }

    /// The estimate for one forward and the start of its backward.
    #[must_use]
    pub fn estimate(&self, pass: Pass, from: &str, beside: Option<u64>) -> Activations {
        let e = pass.element;
        // Two norms: the input (in fp32, where they compute in that), what is normed, and what comes out.
        let norms = 2 * self.hidden * if self.rms { 4 + 2 * e } else { 2 * e };
        // Queries, the output, and the same in the layout that the projection wants.
        let attention = e * (3 * self.hidden + 2 * self.keys);
        let forward = e * self.inner * self.inner_kept;
        let block = norms + attention + forward;
        let inputs = (self.layers * e * self.hidden).saturating_mul(pass.tokens);
        let blocks = match pass.micro_batch {
            Some(part) => {
                // What one block takes at a time, and gives, is there all the same.
                let inputs = if part.inputs_away { inputs.min(2 * e * self.hidden * pass.tokens) } else { inputs };
                inputs.saturating_add(part.tokens.saturating_mul(block))
            }
            None if pass.recompute => inputs.saturating_add(pass.tokens.saturating_mul(block)),
            None => pass.tokens.saturating_mul(self.layers.saturating_mul(block)),
        };
        let head = pass.tokens.saturating_mul(self.vocab * (e + LOSS));
        Activations {
            bytes: blocks.saturating_add(head),
            blocks,
            head,
            tokens: pass.tokens,
            recompute: pass.recompute,
            micro_batches: pass.micro_batch.is_some(),
            from: from.to_owned(),
            beside,
        }
    }
}

impl Activations {
    /// What the GPU has beside the budget of its tier, where it is less than they take.
    #[must_use]
    pub fn too_large_for(&self) -> Option<ByteCount> {
        self.beside.filter(|&beside| beside < self.bytes).map(ByteCount)
    }
}

impl fmt::Display for Activations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let again = match (self.micro_batches, self.recompute) {
            (true, _) => ", with blocks in micro-batches",
            (false, true) => ", with blocks computed again",
            (false, false) => "",
        };
        write!(
            f,
            "Activations: about {} for {} tokens at a time, an estimate from {}{again}; logits and loss are {} of it.",
            ByteCount(self.bytes),
            self.tokens,
            self.from,
            ByteCount(self.head)
        )?;
        match (self.too_large_for(), self.beside) {
            (Some(beside), _) => {
                let fewer = match (self.micro_batches, self.recompute) {
                    (true, _) => "",
                    (false, true) => " activations.micro_batch,",
                    (false, false) => " --recompute, activations.micro_batch,",
                };
                write!(
                    f,
                    " Beside budget.hbm the GPU has {beside}: take fewer tokens at a time,{fewer} or a smaller budget.hbm."
                )
            }
            (None, Some(beside)) => write!(f, " Beside budget.hbm the GPU has {}.", ByteCount(beside)),
            (None, None) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA: &str = r#"{"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "vocab_size": 32000}"#;

    fn of(text: &str) -> Option<Blocks> {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("config.json"), text).expect("writes");
        Blocks::read(dir.path())
    }

    #[test]
    fn sizes_are_read_from_configurations_of_several_kinds() {
        let llama = of(LLAMA).expect("sizes");
        assert_eq!((llama.keys, llama.inner, llama.inner_kept), (1024, 11008, 4));
        assert_eq!(of(&format!("{{\"text_config\": {LLAMA}}}")), Some(llama));
        let gpt2 = of(
            r#"{"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "activation_function": "gelu_new"}"#,
        )
        .expect("sizes");
        assert_eq!((gpt2.keys, gpt2.inner, gpt2.inner_kept), (768, 3072, 5));
        for none in ["{}", "[", r#"{"hidden_size": -1, "num_hidden_layers": 4}"#, r#"{"hidden_size": 1e30}"#] {
            assert_eq!(of(none), None, "{none}");
        }
        assert_eq!(Blocks::read(Path::new("/nonexistent")), None);
    }

    #[test]
    fn fewer_are_kept_where_blocks_are_computed_again() {
        let llama = of(LLAMA).expect("sizes");
        let pass = Pass { tokens: 4096, recompute: false, micro_batch: None, element: 2 };
        let all = llama.estimate(pass, "config.json", None);
        let again = llama.estimate(Pass { recompute: true, ..pass }, "config.json", Some(1 << 40));
        assert!((20..30).contains(&(all.blocks >> 30)), "{all}: 7 B models keep about 24 GiB of 4096 tokens");
        assert!(again.blocks < all.blocks / 10 && again.head == all.head, "{again}");
        assert!(again.to_string().contains("an estimate from config.json, with blocks computed again"), "{again}");
        assert!(again.to_string().ends_with("the GPU has 1.0 TiB."), "{again}");
        let tight = llama.estimate(pass, "config.json", Some(1));
        let advice = "take fewer tokens at a time, --recompute, activations.micro_batch, or a smaller budget.hbm.";
        assert!(tight.to_string().ends_with(advice), "{tight}");
        let tight = llama.estimate(Pass { recompute: true, ..pass }, "config.json", Some(1));
        assert!(tight.to_string().ends_with("at a time, activations.micro_batch, or a smaller budget.hbm."), "{tight}");
    }

    #[test]
    fn micro_batches_keep_inputs_and_a_part_of_one_block() {
        let llama = of(LLAMA).expect("sizes");
        let pass = Pass { tokens: 4096, recompute: true, micro_batch: None, element: 2 };
        let whole = llama.estimate(pass, "config.json", None);
        let inputs = 32 * 2 * 4096 * 4096;
        let sliced = |tokens, inputs_away| {
            let micro_batch = Some(MicroBatched { tokens, inputs_away });
            llama.estimate(Pass { recompute: false, micro_batch, ..pass }, "config.json", Some(1))
        };
        assert_eq!(sliced(4096, false).blocks, whole.blocks);
        assert_eq!(sliced(1024, false).blocks - inputs, (whole.blocks - inputs) / 4);
        assert_eq!(sliced(1024, false).blocks - sliced(1024, true).blocks, inputs / 32 * 30);
        let text = sliced(1024, false).to_string();
        assert!(text.contains("with blocks in micro-batches;") && text.contains("at a time, or a smaller"), "{text}");
    }
}
