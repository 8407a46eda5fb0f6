"""A Llama-3 8 B shape of transformers without a policy, on a GPU that is held to fewer bytes than it has; JSON lines.

``python benches/small_card.py --card 80e9`` on a machine with a larger GPU and transformers: another process holds the rest of its memory, as far as
programs can tell. First forward and backward alone, with weights and gradients on the GPU; then the same model offloaded, clipped in every step,
and with two backwards a step whose norm is not reached. Steps are timed by events, and those before ``--warmup`` not counted: states move up into
free memory meanwhile.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import subprocess
import sys
from typing import Any

import torch
from torch import nn

import funicular

SEQ, ROWS = 2048, 4
SHAPE: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 8192, "use_cache": False, "attn_implementation": "sdpa",
}  # fmt: skip


def build() -> nn.Module:
    """The model on the GPU, with a checkpoint at each layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    torch.set_default_dtype(torch.float32)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def measure(what: str, model: nn.Module, opt: Any, backwards: int, norm: float, args: argparse.Namespace) -> float:
    """Print the seconds of a step, and return their median."""
    generator = torch.Generator().manual_seed(1)
    warmup = args.warmup if opt is not None else 3
    ends = []
    for _ in range(warmup + args.steps):
        for _ in range(backwards):
            ids = torch.randint(SHAPE["vocab_size"], (ROWS, SEQ), generator=generator).cuda()
            (model(input_ids=ids, labels=ids).loss / backwards).backward()
        if opt is None:
            model.zero_grad()
        else:
            nn.utils.clip_grad_norm_(model.parameters(), norm)
            opt.step()
            opt.zero_grad()
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        ends.append(end)
    torch.cuda.synchronize()
    seconds = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(ends)][warmup - 1 :]
    middle = statistics.median(seconds)
    line = {"what": what, "backwards": backwards, "tokens": ROWS * SEQ, "norm": norm, "seconds": round(middle, 4)}
    print(json.dumps(line | {"fastest": round(min(seconds), 4), "slowest": round(max(seconds), 4)}), flush=True)
    return middle


def main() -> None:
    """Run both workloads alone and offloaded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", type=float, default=80e9, help="bytes of the card, what every program takes included")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=24)
    parser.add_argument("--hold", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.hold:
        total = torch.cuda.mem_get_info()[1]
        held = torch.empty(max(int(total - args.card) - (600 << 20), 1), dtype=torch.uint8, device="cuda")
        print(held.numel(), flush=True)
        sys.stdin.read()  # until the other process ends
        return
    command = [sys.executable, __file__, "--hold", "--card", str(args.card)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        free = (holder.stdout.readline(), torch.cuda.mem_get_info()[0])[1]
        print(json.dumps({"gpu": torch.cuda.get_device_name(), "card": args.card, "free": free}), flush=True)
        model = build()
        alone = [measure("forward and backward alone", model, None, backwards, 0.0, args) for backwards in (1, 2)]
        model.zero_grad()
        funicular.offload(model)
        gc.collect()
        torch.cuda.empty_cache()
        opt = funicular.AdamW(model.parameters(), lr=1e-5)
        for backwards, norm in ((1, 0.01), (2, 1e9)):
            seconds = measure("offloaded", model, opt, backwards, norm, args)
            print(
                json.dumps({"backwards": backwards, "of_alone": round(alone[backwards - 1] / seconds, 3)}), flush=True
            )
        stats = funicular.stats(model)
        print(json.dumps({"budgets_gib": {name: round(one.peak / 2**30, 1) for name, one in stats.budgets.items()}}))
        print(json.dumps({"ahead": vars(stats.ahead), "binding": stats.binding}))


if __name__ == "__main__":
    main()
