"""What a checkpoint says of a training besides tensors, as JSON: options, the user's extra, random states."""

from __future__ import annotations

import base64
import math
import random
import sys
from typing import Any

import torch

from funicular._errors import UsageError

__all__ = ["decode", "encode", "random_states", "set_random_states"]


def encode(value: Any, where: str) -> Any:
    """Return what JSON can hold of a value, so that :func:`decode` gives the value back.

    Raises
    ------
    UsageError
        ``FN-E408`` for anything but None, bool, int, float, str, and lists, tuples and dicts of them.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**63 else {"__int__": str(int(value))}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"__float__": str(float(value))}
    if isinstance(value, list):
        return [encode(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, tuple):
        return {"__tuple__": [encode(v, f"{where}[{i}]") for i, v in enumerate(value)]}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str) or key.startswith("__"):
                raise UsageError("FN-E408", f"{where}: the key {key!r} cannot be kept as JSON. Use words as keys.")
        return {key: encode(v, f"{where}[{key!r}]") for key, v in value.items()}
    raise UsageError(
        "FN-E408",
        f"{where} is a {type(value).__name__}, which JSON cannot hold. Give numbers, text, lists and dicts, "
        "such as scheduler.state_dict(); save tensors with safetensors.",
    )


def decode(value: Any) -> Any:
    """Return what was given to :func:`encode`."""
    if isinstance(value, list):
        return [decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    if "__int__" in value:
        return int(value["__int__"])
    if "__float__" in value:
        return float(value["__float__"])
    if "__tuple__" in value:
        return tuple(decode(v) for v in value["__tuple__"])
    return {key: decode(v) for key, v in value.items()}


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode()


def _state(text: str) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)


def random_states() -> dict[str, Any]:
    """Return the states of torch's, Python's and (if it is imported) NumPy's global random generators."""
    states: dict[str, Any] = {"torch": _text(torch.get_rng_state()), "python": encode(random.getstate(), "random")}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = [_text(s) for s in torch.cuda.get_rng_state_all()]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, *rest = numpy.random.get_state()
        states["numpy"] = encode([str(kind), keys.tolist(), *rest], "numpy.random")
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Set what :func:`random_states` gave, as far as it exists here."""
    torch.set_rng_state(_state(states["torch"]))
    random.setstate(decode(states["python"]))
    if "cuda" in states and torch.cuda.is_available():
        for index, text in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(_state(text), index)
    if "numpy" in states:
        import numpy as np

        kind, keys, *rest = decode(states["numpy"])
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
