"""Writes adamw_golden.bin from python/funicular/reference.py; tests/adamw_golden.rs compares its bits.

Run from the repository's root: python tests/data/make_adamw_golden.py

Little endian. Header: `FNADAMW1`, u32 number of cases. Each case: u32 type (0 fp32, 1 bf16, 2 fp16), u32 length n,
u32 step, u32 flags (1 maximize, 2 reset_master), f64 lr, beta1, beta2, eps, weight_decay, grad_scale, clip and norm_sq of
the gradient; n elements of grad; param, master, exp_avg, exp_avg_sq before the step; the same four after it.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python" / "funicular"))

import reference

GOLDEN = ROOT / "tests" / "data" / "adamw_golden.bin"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MASTERS = {torch.bfloat16: torch.int16, torch.float16: torch.float32}
LENGTH = 37
# fmt: off
SPECIALS = [
    0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x00800000, 0x3F800000, 0xBF800000, 0x3F808000,
    0x3F7F8000, 0x477FEFFF, 0x5F800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F8000, 0x7F800000, 0xFF800000, 0x7FC00000,
    0xFFA12345,
]
# fmt: on
# lr, beta1, beta2, eps, weight_decay, grad_scale, clip, step, maximize, reset_master
CASES = [
    (1e-3, 0.9, 0.999, 1e-8, 1e-2, 1.0, 1.0, 1, False, False),
    (3e-4, 0.9, 0.95, 1e-8, 0.1, 0.3125, 1.0, 1234, False, False),
    (1e-2, 0.0, 0.5, 0.0, 0.0, 1 / 3, 0.734375, 2, True, False),
    (1e-3, 0.4, 0.999, 1e-6, 0.5, 1.0, 0.051, 7, False, True),
]


def random_values(count: int, generator: torch.Generator) -> torch.Tensor:
    """fp32 of ordinary size, with a special pattern or any pattern at all in one place of four."""
    values = torch.randn(count, generator=generator) * 10.0 ** torch.randint(-6, 3, (count,), generator=generator)
    bits = values.view(torch.int32).tolist()
    kinds = torch.randint(0, 8, (count,), generator=generator).tolist()
    picks = torch.randint(0, 1 << 32, (count,), generator=generator, dtype=torch.int64).tolist()
    for i, (kind, pick) in enumerate(zip(kinds, picks, strict=True)):
        if kind < 2:
            word = SPECIALS[pick % len(SPECIALS)] if kind == 0 else pick
            bits[i] = word - (1 << 32) if word >= 1 << 31 else word
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32)


def random_arrays(dtype: torch.dtype, count: int, seed: int) -> dict[str, torch.Tensor | None]:
    """A gradient, a parameter and its state."""
    generator = torch.Generator().manual_seed(seed)
    values = [random_values(count, generator) for _ in range(5)]
    master = values[2] if dtype != torch.bfloat16 else values[2].view(torch.int32).to(torch.int16)
    return {
        "grad": values[0].to(dtype),
        "param": values[1].to(dtype),
        "master": None if dtype == torch.float32 else master,
        "exp_avg": values[3],
        "exp_avg_sq": torch.where(torch.arange(count) % 5 > 0, values[4].abs(), values[4]),
    }


def raw(tensor: torch.Tensor | None) -> bytes:
    """The bytes of a tensor."""
    return b"" if tensor is None else bytes(tensor.contiguous().view(torch.uint8).tolist())


def one_case(dtype: torch.dtype, case: tuple[float, ...], seed: int) -> bytes:
    """A case as bytes, with numbers of its own."""
    arrays = random_arrays(dtype, LENGTH, seed)
    grad = arrays.pop("grad")
    assert grad is not None
    if seed % 2:  # half of the norms are finite
        grad = torch.where(grad.isfinite(), grad, 1.0).to(dtype)
    return written(dtype, case, grad, arrays)


def written(
    dtype: torch.dtype, case: tuple[float, ...], grad: torch.Tensor, arrays: dict[str, torch.Tensor | None]
) -> bytes:
    """A case as bytes: what goes in, and what the reference makes of it."""
    lr, beta1, beta2, eps, weight_decay, grad_scale, clip, step, maximize, reset_master = case
    norm = reference.norm_sq(grad)
    flags = int(maximize) | int(reset_master) << 1
    out = struct.pack("<4I", DTYPES.index(dtype), grad.numel(), int(step), flags)
    out += struct.pack("<8d", lr, beta1, beta2, eps, weight_decay, grad_scale, clip, norm)
    out += raw(grad) + b"".join(map(raw, arrays.values()))
    reference.adamw_step(
        arrays["param"],
        grad,
        arrays["exp_avg"],
        arrays["exp_avg_sq"],
        arrays["master"],
        lr=lr,
        betas=(beta1, beta2),
        eps=eps,
        weight_decay=weight_decay,
        step=int(step),
        maximize=bool(maximize),
        grad_scale=grad_scale,
        clip=clip,
        reset_master=bool(reset_master),
    )
    return out + b"".join(map(raw, arrays.values()))


def golden() -> bytes:
    """The whole file. Its numbers are torch's random ones, whose last bits depend on the processor."""
    cases = [one_case(d, case, 100 * i + j) for i, d in enumerate(DTYPES) for j, case in enumerate(CASES)]
    return b"FNADAMW1" + struct.pack("<I", len(cases)) + b"".join(cases)


def again(data: bytes) -> bytes:
    """The file once more: the reference's results from the numbers that stand in it."""
    count, at = struct.unpack_from("<I", data, 8)[0], 12
    out = data[:at]
    for _ in range(count):
        kind, length, step, flags = struct.unpack_from("<4I", data, at)
        numbers = struct.unpack_from("<8d", data, at + 16)
        at += 16 + 64
        dtype = DTYPES[kind]
        arrays: dict[str, torch.Tensor | None] = {}
        types = {"grad": dtype, "param": dtype, "master": MASTERS.get(dtype)}
        for name in ("grad", "param", "master", "exp_avg", "exp_avg_sq"):
            one = types.get(name, torch.float32)
            arrays[name] = (
                None if one is None else torch.frombuffer(bytearray(data), dtype=one, count=length, offset=at)
            )
            at += 0 if one is None else length * one.itemsize
        # The same four after the step.
        at += sum(tensor.nbytes for name, tensor in arrays.items() if tensor is not None and name != "grad")
        grad = arrays.pop("grad")
        assert grad is not None
        case = (*numbers[:7], step, bool(flags & 1), bool(flags & 2))
        out += written(dtype, case, grad, arrays)
    return out


if __name__ == "__main__":
    GOLDEN.write_bytes(golden())
