"""Models for ``funicular plan`` that only Python can build: on the meta device, without weights."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from funicular.units.classes import unpaged, unpaged_note
from funicular.units.discover import describe, find_units
from funicular.units.dtypes import BY_SHORT_NAME

if TYPE_CHECKING:
    from funicular._core import Param

__all__ = ["units"]


def units(
    source: str, patterns: list[str], dtype: str | None
) -> tuple[list[tuple[str, list[Param], bool]], tuple[int, int, str]]:
    """Return a model's units: name, parameters, and whether the unit's backward reads them.

    Then, of the parameters that cannot be paged, how many there are, how many of them are trained, and what they are.

    Parameters
    ----------
    source : str
        ``module:function`` or ``file.py:function`` that returns the model, or a directory with a Hugging Face ``config.json``.
    patterns : list of str
        ``units.match`` of the policy.
    dtype : str or None
        ``bf16``, ``fp16`` or ``fp32`` for the floating-point parameters; ``None`` keeps the model's own.
    """
    model = _from_config(Path(source), dtype) if Path(source).is_dir() else _from_factory(source)
    if dtype is not None:
        model.to(BY_SHORT_NAME[dtype])
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    multiplied = {
        id(p) for m in model.modules() if not isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)
    }
    found = find_units(model, patterns, plan=True)
    planned = [
        (
            f.name,
            [describe(n, p, p.dtype) for n, p in f.params],
            any(id(p) not in tables - multiplied for _, p in f.params),
        )
        for f in found
    ]
    left = unpaged(model)
    trained = sum(one.numel for one in left if one.trained)
    return planned, (sum(one.numel for one in left), trained, unpaged_note(left) if left else "")


def _from_factory(source: str) -> nn.Module:
    where, _, function = source.rpartition(":")
    if not where or not function:
        raise ValueError("neither a directory, a config.json, a safetensors file nor module:function")
    model = getattr(_module(where), function)
    with torch.device("meta"):
        built = model()
    if not isinstance(built, nn.Module):
        raise TypeError(f"{function}() returned {type(built).__name__}, not a torch.nn.Module")
    return built


def _module(where: str) -> Any:
    if not where.endswith(".py"):
        sys.path.insert(0, str(Path.cwd()))
        try:
            return importlib.import_module(where)
        finally:
            sys.path.remove(str(Path.cwd()))
    spec = importlib.util.spec_from_file_location(Path(where).stem, where)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {where}")
    module = importlib.util.module_from_spec(spec)
    # What the file imports from beside itself, and pickles of its classes, need both.
    sys.path.insert(0, str(Path(where).parent.absolute()))
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _from_config(folder: Path, dtype: str | None) -> nn.Module:
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} has neither safetensors files nor a config.json")
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as e:
        raise ImportError("a config.json needs the package transformers; without it give --params and --layers") from e
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    quantized = getattr(config, "quantization_config", None)
    if quantized and dtype is None:
        method = getattr(quantized, "get", lambda _: None)("quant_method") or "quantization_config"
        raise ValueError(
            f"its weights are quantized ({method}), and only whole ones are trained here: "
            "--dtype bf16 plans the model with weights in bf16"
        )
    # A model is trained in the type that its weights are kept in, unless something else is asked for.
    key = "torch_dtype" if "torch_dtype" in vars(config) else "dtype"  # as transformers before 4.56 calls it
    kept = BY_SHORT_NAME.get(dtype or "", _own(config, key) or torch.float32)
    with torch.device("meta"):
        for kind in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel"):
            if type(config) in getattr(transformers, kind)._model_mapping:
                model: nn.Module = getattr(transformers, kind).from_config(config, **{key: kept})
                return model
    raise ValueError(f"transformers has no model for {type(config).__name__}")


def _own(config: Any, key: str) -> Any:
    """Return the type that a configuration names; a file of a newer transformers has another key, whose word an older one leaves as it is."""
    found = getattr(config, key, None) or vars(config).get("dtype")
    return getattr(torch, found, None) if isinstance(found, str) else found
