"""Pre-train an encoder-decoder on a corpus of Megatron's memory-mapped format (a pair of .bin and .idx, as CPM-2 has it), in a loop of its own.

``--data PREFIX`` reads an existing pair; without it a small one is made of Python's standard library. The model has the shapes of CPM-2 (11 B
parameters); ``--hidden``, ``--inner``, ``--heads`` and ``--layers`` make it smaller. fp32 or bf16 with fp32 masters, clipping at 1.0, linear warm-up and
linear decay. A run that is started again goes on from its last checkpoint, with the same bits.
"""

from __future__ import annotations

import argparse
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import T5Config, T5ForConditionalGeneration

import funicular
from hf_finetune import bytes_of_python

MAGIC = b"MMIDIDX\x00\x00"
#: the format's numbers for types of elements
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


class Indexed:
    """A corpus of sequences in ``PREFIX.bin``, where each begins and how long it is in ``PREFIX.idx``; neither is read as a whole."""

    def __init__(self, prefix: Path) -> None:
        index = prefix.with_name(prefix.name + ".idx")
        with index.open("rb") as file:
            if file.read(9) != MAGIC:
                raise SystemExit(f"{index} is no index of Megatron's memory-mapped format.")
            version, code, sequences, _documents = struct.unpack("<QBQQ", file.read(25))
            if version != 1 or code not in DTYPES:
                raise SystemExit(
                    f"{index} has version {version} and type {code}; known are version 1 and types {sorted(DTYPES)}."
                )
            at = file.tell()
        raw = np.memmap(index, mode="r", dtype=np.uint8)
        self.sizes = np.frombuffer(raw, np.int32, sequences, at)
        self.places = np.frombuffer(raw, np.int64, sequences, at + self.sizes.nbytes)
        self.dtype = np.dtype(DTYPES[code])
        self.tokens = np.memmap(prefix.with_name(prefix.name + ".bin"), mode="r", dtype=self.dtype)

    def __len__(self) -> int:
        return len(self.sizes)

    def row(self, number: int, length: int) -> torch.Tensor:
        """Return so many tokens, from a place of the corpus that belongs to this number; they may run into the next sequence."""
        draw = np.random.default_rng(number)
        start = int(self.places[draw.integers(len(self))]) // self.dtype.itemsize
        start = min(start, len(self.tokens) - length)
        return torch.from_numpy(self.tokens[start : start + length].astype(np.int64))


def write_small(prefix: Path, size: int = 1 << 20, length: int = 1024) -> None:
    """Write a pair of files of Python's standard library, a token for each byte."""
    tokens = bytes_of_python(size).numpy().astype(np.uint16)
    sizes = np.full(-(-len(tokens) // length), length, np.int32)
    sizes[-1] = len(tokens) - length * (len(sizes) - 1)
    places = (np.cumsum(sizes, dtype=np.int64) - sizes) * tokens.itemsize
    tokens.tofile(prefix.with_name(prefix.name + ".bin"))
    with prefix.with_name(prefix.name + ".idx").open("wb") as file:
        file.write(MAGIC + struct.pack("<QBQQ", 1, 8, len(sizes), len(sizes) + 1))
        for part in (sizes, places, np.arange(len(sizes) + 1, dtype=np.int64)):
            file.write(part.tobytes())


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the pair's name without .bin and .idx")
    parser.add_argument("--out", type=Path, default=Path("indexed"), help="checkpoints, and the small corpus")
    parser.add_argument("--policy", default="host", help="a file, or a preset's name")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--rows", type=int, default=4, help="pairs of sequences in one forward")
    parser.add_argument("--passes", type=int, default=2, help="forwards and backwards before each step")
    parser.add_argument(
        "--lengths", type=int, nargs=2, default=(512, 256), help="tokens for the encoder and for the decoder"
    )
    parser.add_argument("--vocab", type=int, default=26240)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=10240)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--layers", type=int, default=24, help="of the encoder, and as many of the decoder")
    return parser.parse_args()


def build(options: argparse.Namespace) -> Any:
    """Return the model: relative positions, gated feed-forwards, as CPM-2 has them."""
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=options.vocab, d_model=options.hidden, d_kv=options.hidden // options.heads, d_ff=options.inner, num_layers=options.layers,
        num_heads=options.heads, feed_forward_proj="gated-gelu", tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0, use_cache=False,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if options.dtype == "fp32" else torch.bfloat16)
    try:
        model = T5ForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def main() -> Any:
    """Train."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.data is None:
        options.data = options.out / "corpus"
        if not (options.out / "corpus.idx").exists():
            write_small(options.data)
    corpus = Indexed(options.data)

    model = funicular.offload(build(options), options.policy)
    opt = funicular.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    up = torch.optim.lr_scheduler.LinearLR(opt, 1 / max(options.warmup, 1), total_iters=options.warmup)
    down = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, total_iters=max(options.steps - options.warmup, 1))
    schedule = torch.optim.lr_scheduler.SequentialLR(opt, [up, down], [options.warmup])

    first = 0
    saved = sorted(options.out.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    if saved:
        extra = funicular.load(saved[-1], model, opt).extra
        first = extra["step"]
        schedule.load_state_dict(extra["schedule"])

    encoder, decoder = options.lengths
    for step in range(first, options.steps):
        total = 0.0
        for number in range(options.passes):
            begin = (step * options.passes + number) * options.rows
            rows = torch.stack([corpus.row(begin + i, encoder + decoder) for i in range(options.rows)]).to(model.device)
            loss = model(input_ids=rows[:, :encoder], labels=rows[:, encoder:].contiguous()).loss / options.passes
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        schedule.step()
        print(
            f"step {step + 1}: loss {total:.6f}, norm {float(norm):.4f}, rate {opt.param_groups[0]['lr']:.2e}",
            flush=True,
        )
        if (step + 1) % options.save_every == 0:
            extra = {"step": step + 1, "schedule": schedule.state_dict()}
            funicular.save(model, opt, options.out / f"step-{step + 1}", extra=extra, keep=2)
    return model


if __name__ == "__main__":
    model = main()
