"""What a checkpoint says of a training besides tensors, as JSON: options, the user's extra, random states."""

from __future__ import annotations

import base64
import importlib.util
import itertools
import math
import random
import struct
import sys
from collections import Counter, OrderedDict
from typing import Any

import torch

from funicular.errors import UsageError

__all__ = ["check_random_states", "decode", "encode", "random_states", "set_random_states"]

#: levels of JSON that are kept; readers have limits, some at 128
_DEEPEST = 100
#: values that are written again because what holds them stands at several places
_MOST_REPEATED = 1_000_000
#: dicts that are kept as pairs of keys and values, where JSON's objects would change their keys or their type
_DICTS: dict[type, str] = {dict: "__dict__", OrderedDict: "__ordered__", Counter: "__counter__"}


def encode(value: Any, where: str, depth: int = 0) -> Any:
    """Return what JSON can hold of a value, so that :func:`decode` gives the value back: equal, and of the same type.

    Parameters
    ----------
    value : any
        What is to be kept.
    where : str
        What errors call it.
    depth : int
        Levels of JSON around it.

    Raises
    ------
    UsageError
        ``FN-E408`` for anything but None, bool, int, float, str, and lists, tuples, dicts, ``OrderedDict`` and ``Counter`` of
        them; for text that is not Unicode, for more than 100 levels, and for containers that are repeated a million times.
    """
    if depth > _DEEPEST:
        raise UsageError(
            "FN-E408", f"{where[:80]}...: nested more than {_DEEPEST} levels deep, or part of itself. Flatten it."
        )
    kind = type(value)
    if depth == 0:
        _check_repeats(value, where)
    if value is None or kind is bool:
        return value
    if kind is str:
        return _encode_text(value, where)
    if kind is int:
        # Hexadecimal: Python limits the length of decimal numbers.
        return value if -(2**63) <= value < 2**63 else {"__int__": hex(value)}
    if kind is float or _is_numpy_float(value):
        return _encode_float(float(value))
    if kind is list:
        return [encode(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)]
    if kind is tuple:
        return {"__tuple__": [encode(v, f"{where}[{i}]", depth + 2) for i, v in enumerate(value)]}
    tag = _DICTS.get(kind)
    if tag is None:
        raise UsageError("FN-E408", _refusal(value, where))
    if kind is dict and all(type(key) is str and not key.startswith("__") for key in value):
        return {_encode_text(key, where): encode(v, f"{where}[{key!r}]", depth + 1) for key, v in value.items()}
    pairs = [
        [encode(k, f"{where}: a key", depth + 3), encode(v, f"{where}[{k!r}]", depth + 3)] for k, v in value.items()
    ]
    return {tag: pairs}


def _check_repeats(value: Any, where: str) -> None:
    """Refuse containers that hold the same ones again and again: JSON writes each as often as it is reached."""
    sizes: dict[int, int] = {}
    entries = 0

    def size(item: Any, depth: int) -> int:
        nonlocal entries
        kind = type(item)
        if kind is not list and kind is not tuple and kind not in _DICTS:
            return 1
        if id(item) not in sizes:
            sizes[id(item)] = 1  # of one that is part of itself; it is too deep
            inner = item if kind not in _DICTS else itertools.chain(item.keys(), item.values())
            if depth <= _DEEPEST:
                total = 1 + sum(size(i, depth + 1) for i in inner)
                entries += 1 + (len(item) if kind not in _DICTS else 2 * len(item))
                sizes[id(item)] = total
        return sizes[id(item)]

    if size(value, 0) > entries + _MOST_REPEATED:
        raise UsageError(
            "FN-E408",
            f"{where[:80]}: the same lists or dicts stand in it at more than {_MOST_REPEATED} places, and JSON would have each of them "
            "as often. Save each once, and their places as numbers.",
        )


def _encode_text(value: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            "FN-E408", f"{where} is text that is not Unicode ({error}). Give bytes as numbers or as base64."
        ) from None
    return value


def _encode_float(value: float) -> Any:
    if math.isfinite(value):
        return value
    if math.isinf(value):
        return {"__float__": str(value)}
    return {"__float__": "nan" if _bits(value) == _bits(math.nan) else _bits(value)}


def _bits(value: float) -> str:
    return "0x" + struct.pack(">d", value).hex()


def _is_numpy_float(value: Any) -> bool:
    return isinstance(value, float) and type(value).__module__ == "numpy"


def _refusal(value: Any, where: str) -> str:
    name = type(value).__name__
    for base in (bool, int, float, str, list, tuple, dict):
        if isinstance(value, base):
            return f"{where} is a {name}, which would be loaded as a plain {base.__name__}. Give {base.__name__}(...) of it."
    return (
        f"{where} is a {name}, which JSON cannot hold. Give numbers, text, lists and dicts, "
        "such as scheduler.state_dict(); save tensors with safetensors."
    )


def decode(value: Any) -> Any:
    """Return what was given to :func:`encode`.

    Raises
    ------
    ValueError, TypeError, KeyError
        For what :func:`encode` does not return.
    """
    if isinstance(value, list):
        return [decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((tag, inner),) = value.items()
        if tag.startswith("__"):
            return _decode_tagged(tag, inner)
    if any(key.startswith("__") for key in value):
        raise ValueError(f"keys {', '.join(sorted(value))[:200]}")
    return {key: decode(v) for key, v in value.items()}


def _decode_tagged(tag: str, inner: Any) -> Any:
    if tag == "__int__":
        return int(inner, 0)
    if tag == "__float__":
        return struct.unpack(">d", bytes.fromhex(inner[2:]))[0] if inner.startswith("0x") else float(inner)
    if not isinstance(inner, list):
        raise TypeError(f"{tag} of a {type(inner).__name__}")
    if tag == "__tuple__":
        return tuple(decode(v) for v in inner)
    kind = next((kind for kind, name in _DICTS.items() if name == tag), None)
    if kind is None:
        raise ValueError(f"the tag {tag[:200]}")
    return kind({decode(k): decode(v) for k, v in inner})


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode()


def _state(text: str) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8, device="cpu")


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


def check_random_states(states: dict[str, Any]) -> None:
    """Try what :func:`set_random_states` sets on generators of its own.

    Raises
    ------
    ValueError, TypeError, KeyError, RuntimeError
        For what cannot be set.
    """
    torch.Generator().set_state(_state(states["torch"]))
    random.Random().setstate(decode(states["python"]))
    if "cuda" in states and torch.cuda.is_available():
        for text in states["cuda"][: torch.cuda.device_count()]:
            torch.Generator(device="cuda").set_state(_state(text))
    if (numpy := _numpy_state(states)) is not None:
        import numpy as np

        np.random.RandomState().set_state(numpy)


def set_random_states(states: dict[str, Any]) -> None:
    """Set what :func:`random_states` gave, as far as it exists here."""
    torch.set_rng_state(_state(states["torch"]))
    random.setstate(decode(states["python"]))
    if "cuda" in states and torch.cuda.is_available():
        for index, text in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(_state(text), index)
    if (numpy := _numpy_state(states)) is not None:
        import numpy as np

        np.random.set_state(numpy)


def _numpy_state(states: dict[str, Any]) -> Any:
    if "numpy" not in states or importlib.util.find_spec("numpy") is None:
        return None
    import numpy as np

    kind, keys, *rest = decode(states["numpy"])
    return (kind, np.array(keys, dtype=np.uint32), *rest)
