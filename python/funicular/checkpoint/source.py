"""A checkpoint that was opened, and what it says of itself."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from funicular import _core
from funicular.checkpoint.conversion import Conversion
from funicular.checkpoint.facts import decode
from funicular.checkpoint.under_way import finish
from funicular.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import nn

    from funicular.checkpoint.conversion import Made

__all__ = ["Found", "Source"]


class Found(NamedTuple):
    """A tensor of a checkpoint."""

    dtype: str
    shape: tuple[int, ...]


class Source:
    """An opened checkpoint and what it says of itself."""

    def __init__(self, path: Path, *, own: bool) -> None:
        self.path, self.own = path, own
        finish(path)
        self.core = _core.Checkpoint(str(path), own)
        self.model = {name: Found(dtype, tuple(shape)) for name, dtype, shape in self.core.tensors(False)}
        self.optimizer = {name: Found(dtype, tuple(shape)) for name, dtype, shape in self.core.tensors(True)}
        said = self.core.training()
        self.training: dict[str, Any] = {} if said is None else _training_of(path, said)
        #: types of 16-bit parameters of which the file has the fp32 masters
        self.masters: dict[str, str] = self.training.get("dtypes", {})
        #: what modules added to their state: names of tensors, and values
        said = self.training.get("entries", {"tensors": [], "values": {}})
        try:
            self.entries = [str(name) for name in said["tensors"]]
            self.values: dict[str, Any] = {name: decode(value) for name, value in said["values"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise StorageError(
                "FN-E406", f"{path}: what its manifest says of added entries is not what a save writes."
            ) from error

        #: what the file calls the model's tensors, and what of the model is made of others
        self.names = {name: name for name in self.model}
        self.conversion: Conversion | None = None

    def convert_for(self, model: nn.Module) -> None:
        """Have the file's tensors converted as transformers does for this model, if it is one of its own."""
        if not self.training:
            self.conversion = Conversion.of(model, {name: found.shape for name, found in self.model.items()})
        if self.conversion is not None:
            self.names = self.conversion.names

    def name_of(self, name: str, aliases: dict[str, str]) -> str | None:
        """Return the name under which the file has a tensor of the model."""
        return next((self.names[n] for n in _names(name, aliases) if n in self.names), None)

    def made(self, name: str, aliases: dict[str, str]) -> tuple[str, Made] | None:
        """Return under which of its names a tensor of the model is made of others, and of which."""
        made = {} if self.conversion is None else self.conversion.made
        return next(((n, made[n]) for n in _names(name, aliases) if n in made), None)


def _names(name: str, aliases: dict[str, str]) -> Iterator[str]:
    yield name
    yield from (alias for alias, first in aliases.items() if first == name)


def _training_of(path: Path, text: str) -> dict[str, Any]:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StorageError(
            "FN-E406", f"{path}: what funicular.json says of the training cannot be read ({error})."
        ) from None
    if not isinstance(said, dict) or not isinstance(said.get("dtypes", {}), dict):
        raise StorageError("FN-E406", f"{path}: what funicular.json says of the training is not what a save writes.")
    return said
