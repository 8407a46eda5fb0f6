"""Weights as Hugging Face's files, which other programs read: written through frames, so that nothing is in memory as a whole."""

from __future__ import annotations

import copy
import json
import shutil
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from funicular.checkpoint.save_load import save
from funicular.integrations.settings import MANIFEST
from funicular.units.dtypes import SAFETENSORS

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator
    from typing import BinaryIO

    from torch import nn

__all__ = ["save_pretrained"]

_SHARD = 5_000_000_000


def save_pretrained(model: nn.Module, directory: str | os.PathLike[str], *, shard_bytes: int = _SHARD) -> None:
    """Write what ``model.save_pretrained`` would: the weights and their configuration.

    ``transformers`` 5 keeps some families under other names than their files have, and experts as one tensor; they are
    written as the files have them, one tensor at a time.

    Parameters
    ----------
    model : nn.Module
        Offloaded or not.
    directory : path
        Made by the call. Files of an earlier save there are replaced; others stay.

    Raises
    ------
    UsageError, StorageError, BudgetError
        As :func:`funicular.save`.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    reverse = _reverse(model)
    with tempfile.TemporaryDirectory(prefix=".funicular-model-", dir=target) as folder:
        made = Path(folder) / "model"
        if reverse is None:
            save(model, None, made, shard_bytes=shard_bytes)
        else:
            made.mkdir()
            _write(made, reverse, shard_bytes)
            _write_config(model, made)
        _take_over(made, target)
    if getattr(model, "_auto_class", None) is not None:
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(model, target, config=getattr(model, "config", None))


def _take_over(made: Path, target: Path) -> None:
    """Move the files; the index comes last, and shards of an earlier save go."""
    names = sorted((path.name for path in made.iterdir() if path.name != MANIFEST), key=lambda n: "index" in n)
    for old in [
        *target.glob("model-*-of-*.safetensors"),
        target / "model.safetensors",
        target / "model.safetensors.index.json",
    ]:
        if old.name not in names:
            old.unlink(missing_ok=True)
    for name in names:
        shutil.move(made / name, target / name)


def _write_config(model: Any, folder: Path) -> None:
    config = copy.deepcopy(model.config)
    config.dtype, config.architectures = str(model.dtype).removeprefix("torch."), [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


class _Made(NamedTuple):
    """Tensors of a file that are made together, of some of the model's."""

    #: shape and type by name
    out: dict[str, tuple[tuple[int, ...], torch.dtype]]
    make: Callable[[], dict[str, torch.Tensor]]


def _reverse(model: Any) -> list[_Made] | None:
    """Say how the file's tensors are made of the model's; None if they are the same."""
    mapping = _conversions(model)
    if not mapping:
        return None
    from transformers import core_model_loading as loading

    entries = [entry.reverse_transform() for entry in mapping[::-1]]
    renamings = [entry for entry in entries if isinstance(entry, loading.WeightRenaming)]
    converters = [entry for entry in entries if isinstance(entry, loading.WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    own = _state(model)
    groups: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    for key in sorted(own, key=loading.dot_natural_key):
        name, pattern = loading.rename_source_key(key, renamings, converters, reverse=True)
        if pattern is None:
            groups.setdefault(name, (loading.WeightRenaming(key, name), []))[1].append((key, key))
        else:
            groups.setdefault(name, (copy.deepcopy(by_pattern[pattern]), []))[1].append((key, pattern))
    return [_made(model, own, name, *group) for name, group in groups.items()]


def _conversions(model: Any) -> list[Any]:
    """Return what transformers did to the files of this model when it read them, or would have done."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.modeling_utils import PreTrainedModel
    except ImportError:  # transformers 4 keeps the names
        return []
    if not isinstance(model, PreTrainedModel):
        return []
    found = getattr(model, "_weight_conversions", None)
    if found is None:
        found = get_model_conversion_mapping(model, add_legacy=False)
        # It is not known whether there is a prefix in the files.
        found = [entry for entry in found if type(entry).__name__ != "PrefixChange"]
    return list(found or ())


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of ``state_dict()``, tied ones once."""
    seen, state = set(), {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor
    return state


def _made(model: Any, own: dict[str, torch.Tensor], name: str, converter: Any, sources: list[tuple[str, str]]) -> _Made:
    def convert(read: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        fresh = copy.deepcopy(converter)
        for key, pattern in sources:
            fresh.add_tensor(name, key, pattern, read(own[key]))
        found = fresh.convert(name, model=model, config=model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in found.items()}

    blank = convert(lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"))
    return _Made({key: (tuple(t.shape), t.dtype) for key, t in blank.items()}, lambda: convert(torch.Tensor.detach))


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _shards(groups: list[_Made], shard_bytes: int) -> Iterator[list[_Made]]:
    """Cut into files; what is made together stays together."""
    shard: list[_Made] = []
    filled = 0
    for group in groups:
        size = sum(_size(*out) for out in group.out.values())
        if shard and filled + size > shard_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(group)
        filled += size
    if shard:
        yield shard


def _write(folder: Path, groups: list[_Made], shard_bytes: int) -> None:
    shards = list(_shards(groups, shard_bytes))
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        with (folder / name).open("wb") as file:
            total += _write_shard(file, shard)
        weight_map.update({key: name for group in shard for key in group.out})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_shard(file: BinaryIO, groups: list[_Made]) -> int:
    """Write one file of safetensors, tensor after tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for group in groups:
        for key, (shape, dtype) in group.out.items():
            end = at + _size(shape, dtype)
            header[key] = {"dtype": SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [at, end]}
            at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for group in groups:
        made = group.make()
        for key in group.out:
            value = made.pop(key).contiguous().cpu()
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)
    return at
