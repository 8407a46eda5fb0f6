"""Models on the meta device: shapes without weights, which come from a directory of safetensors."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from funicular._errors import UsageError
from funicular._gather import named_tensors
from funicular._restore import Loader, Source, compare_model

if TYPE_CHECKING:
    import os

    from funicular._cast import Cast
    from funicular._session import Session

__all__ = ["Weights"]

_log = logging.getLogger("funicular")


class Weights:
    """The weights for a model, in a checkpoint or any directory of its safetensors.

    Raises
    ------
    UsageError
        ``FN-E404`` if there are none, ``FN-E407`` if names are missing or shapes differ, ``FN-E111`` for buffers that are not
        in them and cannot be made anew.
    """

    def __init__(self, model: nn.Module, path: str | os.PathLike[str], cast: Cast) -> None:
        self.model, self._cast = model, cast
        self.source = Source(Path(path), own=False)
        self._before: list[tuple[dict[str, Any], str, Any]] = []
        #: what was there before, by parameter: should loading fail, the model is as it was
        self.values = {id(p): p.data for p in model.parameters() if not p.is_meta}
        unexpected = compare_model(self.source, named_tensors(model), exact=False)
        if unexpected:
            _log.warning("FN-W407 %s has %s, which the model does not have.", path, unexpected)

    def materialise(self) -> None:
        """Give everything on the meta device memory, of which nothing is touched before it is filled."""
        _make_buffers(self.model, self._before)
        made: dict[int, Any] = {}
        for module in self.model.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is None or not tensor.is_meta:
                        continue
                    if id(tensor) not in made:
                        trained = isinstance(tensor, nn.Parameter)
                        dtype = self._cast.dtype_of(tensor) if trained else tensor.dtype
                        empty = torch.empty_like(tensor, device="cpu", dtype=dtype)
                        made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if trained else empty
                    self._before.append((table, name, tensor))
                    table[name] = made[id(tensor)]

    def undo(self) -> None:
        """Put what was on the meta device back."""
        for table, name, tensor in self._before:
            table[name] = tensor
        self._before.clear()

    def fill(self, session: Session) -> None:
        """Stream everything into the tiers."""
        began = last = time.monotonic()

        def told(done: int) -> None:
            nonlocal last
            if time.monotonic() - last > 5:
                last = time.monotonic()
                _log.info("FN-I406 loading %s: %.1f GB in %.0f s", self.source.path, done / 1e9, last - began)

        loader = Loader(self.source, named_tensors(self.model), session)
        loader.model()
        loader.run(told)
        _log.info("FN-I407 loaded %s in %.1f s", self.source.path, time.monotonic() - began)


def _make_buffers(model: nn.Module, before: list[tuple[dict[str, Any], str, Any]]) -> None:
    """Have a Hugging Face model compute buffers that no file has, such as rotary frequencies."""
    initialise = getattr(model, "_init_weights", None)
    for prefix, module in model.named_modules():
        lacking = [
            n
            for n, b in module._buffers.items()
            if b is not None and b.is_meta and n in module._non_persistent_buffers_set
        ]
        for name in lacking:
            b = module._buffers[name]
            assert b is not None
            before.append((module._buffers, name, b))
            module._buffers[name] = torch.full(b.shape, _mark(b.dtype), dtype=b.dtype)
        if lacking and initialise is not None:
            # Its parameters are on the meta device still: initialising those does nothing.
            with torch.no_grad():
                initialise(module)
        for name in lacking:
            b = module._buffers[name]
            assert b is not None
            if b.numel() > 0 and bool(_is_mark(b).any()):
                raise UsageError(
                    "FN-E111",
                    f"buffer '{prefix}.{name}' is on the meta device, and not in the checkpoint. Build the model with real buffers: "
                    "only parameters need to be on the meta device.",
                )


def _mark(dtype: torch.dtype) -> Any:
    return float("nan") if dtype.is_floating_point else True if dtype == torch.bool else torch.iinfo(dtype).min


def _is_mark(b: torch.Tensor) -> torch.Tensor:
    return b.isnan() if b.dtype.is_floating_point else b == _mark(b.dtype)
