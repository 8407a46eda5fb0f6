"""The table of number formats: which of them AdamW trains, what each is called, and what is kept beside a parameter of each."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = [
    "BY_NAME",
    "BY_SHORT_NAME",
    "MOMENTS",
    "SAFETENSORS",
    "TRAINED",
    "Format",
    "has_whole_master",
    "is_half",
    "master_dtype",
    "name_of",
    "state_bytes",
    "state_dtype",
]


class Format(NamedTuple):
    """A format in which parameters are trained."""

    dtype: torch.dtype
    #: what policies, the core and manifests call it
    name: str
    #: what the command line calls it
    short_name: str
    #: in which format the fp32 master of a 16-bit parameter is kept: an integer one holds what the master has beyond the parameter
    master: torch.dtype | None


TRAINED = {
    one.dtype: one
    for one in (
        Format(torch.float32, "float32", "fp32", None),
        Format(torch.bfloat16, "bfloat16", "bf16", torch.int16),
        Format(torch.float16, "float16", "fp16", torch.float32),
    )
}
BY_NAME = {one.name: dtype for dtype, one in TRAINED.items()}
BY_SHORT_NAME = {one.short_name: dtype for dtype, one in TRAINED.items()}

#: names of formats in safetensors
SAFETENSORS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
}  # fmt: skip

#: AdamW's states beside the master: of every parameter, in fp32
MOMENTS = ("exp_avg", "exp_avg_sq")


def name_of(dtype: torch.dtype) -> str:
    """Return what the core calls a format, also one that is not trained."""
    return str(dtype).removeprefix("torch.")


def is_half(dtype: torch.dtype) -> bool:
    """Whether parameters of a format are trained with a master beside them."""
    return master_dtype(dtype) is not None


def master_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """Return the format in which a 16-bit parameter's master is kept; None for other parameters."""
    known = TRAINED.get(dtype)
    return None if known is None else known.master


def has_whole_master(dtype: torch.dtype) -> bool:
    """Whether the master of such parameters is kept as a value of its own, and not as what it has beyond the parameter."""
    master = master_dtype(dtype)
    return master is not None and master.is_floating_point


def state_dtype(state: str, dtype: torch.dtype) -> torch.dtype:
    """Return the format of a state of a parameter of some format."""
    return torch.float32 if state in MOMENTS else master_dtype(dtype) or torch.float32


def state_bytes(dtype: torch.dtype) -> int:
    """Return the bytes of AdamW's states for one element of a parameter; 0 for formats that are not trained."""
    if dtype not in TRAINED:
        return 0
    master = master_dtype(dtype)
    return sum(state_dtype(state, dtype).itemsize for state in MOMENTS) + (0 if master is None else master.itemsize)
