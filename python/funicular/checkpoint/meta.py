"""Models on the meta device: shapes without weights, which come from a directory of safetensors."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from funicular.checkpoint.collect import named_tensors
from funicular.checkpoint.restore import Loader, compare_model
from funicular.checkpoint.source import Source
from funicular.errors import UsageError
from funicular.report.log import Progress
from funicular.torch_internals.memory import make_subclass, swap
from funicular.torch_internals.modules import is_persistent, own_buffers, own_parameters
from funicular.units.classes import pageable

if TYPE_CHECKING:
    from funicular.units.cast import Cast
    from funicular.windows.session import Session

__all__ = ["Weights"]

_log = logging.getLogger("funicular")
_HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
#: what files of weights are that are not safetensors
_FORMATS = {
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt", ".pkl"), "a pickle, which can run code"),
    ".gguf": "GGUF", ".h5": "HDF5", ".msgpack": "Flax's", ".npz": "NumPy's", ".onnx": "ONNX",
}  # fmt: skip


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
        _check_path(path)
        self.source = Source(Path(path), own=False)
        self._before: list[tuple[dict[str, Any], str, Any]] = []
        #: parameters that were given memory, each with its class and the tensor that has what it was
        self._exchanged: list[tuple[torch.Tensor, type, torch.Tensor]] = []
        #: what was there before, by parameter: should loading fail, the model is as it was
        self.values = {id(p): p.data for p in model.parameters() if not p.is_meta}
        for name, p in model.named_parameters():
            if p.is_meta and not pageable(p):
                raise UsageError(
                    "FN-E111",
                    f"'{name}' is a {type(p).__name__} on the meta device, which cannot be paged. Make it on a real device.",
                )
        self.source.convert_for(model)
        unexpected = compare_model(self.source, model, named_tensors(model), exact=False)
        if unexpected:
            _log.warning("FN-W407 %s has %s, which the model does not have.", path, unexpected)

    def materialise(self) -> None:
        """Give everything on the meta device memory, of which nothing is touched before it is filled."""
        _make_buffers(self.model, self._before)
        made: dict[int, Any] = {}
        for module in self.model.modules():
            for table in (own_parameters(module), own_buffers(module)):
                for name, tensor in table.items():
                    if tensor is None or not tensor.is_meta:
                        continue
                    if id(tensor) not in made:
                        made[id(tensor)] = self._made(tensor)
                    if made[id(tensor)] is not tensor:
                        self._before.append((table, name, tensor))
                        table[name] = made[id(tensor)]

    def _made(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor with memory: a parameter stays the object that it is, for an optimizer that has it already."""
        trained = isinstance(tensor, nn.Parameter)
        dtype = self._cast.dtype_of(tensor) if trained else tensor.dtype
        empty = torch.empty_like(tensor, device="cpu", dtype=dtype)
        if not trained:
            return empty
        new: torch.Tensor = _like(tensor, empty)
        self._exchanged.append((tensor, type(tensor), new))
        if swap(tensor, new):
            return tensor
        self._exchanged.pop()
        return new

    def undo(self) -> None:
        """Put what was on the meta device back."""
        for table, name, tensor in self._before:
            table[name] = tensor
        self._before.clear()
        while self._exchanged:
            tensor, kind, new = self._exchanged.pop()
            tensor.__class__ = kind
            for name in ("_funicular_ref", "_funicular_inside"):
                tensor.__dict__.pop(name, None)
            if not tensor.is_meta and not swap(tensor, new):
                _put_in_place(self.model, tensor, new)

    def fill(self, session: Session) -> None:
        """Stream everything into the tiers."""
        told = Progress("FN-I406 loading %s", self.source.path)
        loader = Loader(self.source, self.model, named_tensors(self.model), session)
        loader.model()
        session.loading = True
        try:
            with told:
                loader.run(told.at)
        finally:
            session.loading = False
        if self.source.conversion is not None:
            self.source.conversion.done()
        told.end("FN-I407 loaded %s in %.1f s", self.source.path, told.seconds)


def _like(p: Any, data: torch.Tensor) -> Any:
    """Return a parameter of another one's class and with its attributes."""
    made = make_subclass(type(p), data, p.requires_grad)
    made.__dict__.update(p.__dict__)
    return made


def _check_path(path: str | os.PathLike[str]) -> None:
    """Raise for what is often given in place of a directory: a name on a hub, and pickles.

    Raises
    ------
    UsageError
        ``FN-E404``.
    """
    text, where = os.fspath(path), Path(path)
    if not where.exists() and _HUB_NAME.fullmatch(text) and ("/" not in text or not where.parent.is_dir()):
        raise UsageError(
            "FN-E404",
            f"there is no directory '{text}'. If it is a name on the Hugging Face hub, download it first: "
            f"checkpoint=huggingface_hub.snapshot_download('{text}').",
        )
    if where.suffix in _FORMATS and where.is_file():
        raise UsageError(
            "FN-E404",
            f"{text} is no file of safetensors but {_FORMATS[where.suffix]}. Load it into the model and write that with "
            "model.save_pretrained(directory), or with safetensors.torch.save_model(model, 'model.safetensors').",
        )


def _put_in_place(model: nn.Module, tensor: torch.Tensor, other: torch.Tensor) -> None:
    for module in model.modules():
        for name, p in own_parameters(module).items():
            if p is tensor:
                own_parameters(module)[name] = other


def _make_buffers(model: nn.Module, before: list[tuple[dict[str, Any], str, Any]]) -> None:
    """Have a Hugging Face model compute buffers that no file has, such as rotary frequencies."""
    initialisers: dict[str, Any] = {}
    for prefix, module in model.named_modules():
        # A part that is a model itself makes what its modules need: that of the nearest one, as transformers does.
        above = initialisers.get(prefix.rpartition(".")[0]) if prefix else None
        initialise = initialisers[prefix] = getattr(module, "_init_weights", above)
        lacking = [
            n for n, b in own_buffers(module).items() if b is not None and b.is_meta and not is_persistent(module, n)
        ]
        for name in lacking:
            b = own_buffers(module)[name]
            assert b is not None
            before.append((own_buffers(module), name, b))
            own_buffers(module)[name] = torch.full(b.shape, _mark(b.dtype), dtype=b.dtype, device="cpu")
        if lacking and initialise is not None:
            # Its parameters are on the meta device still: initialising those does nothing. On the CPU, wherever the caller has tensors made,
            # as in the constructor: a GPU rounds powers and sines in another way.
            with torch.no_grad(), torch.device("cpu"):
                initialise(module)
        if "inv_freq" in lacking:
            _make_frequencies(module, before)
        for name in lacking:
            b = own_buffers(module)[name]
            assert b is not None
            if b.numel() > 0 and bool(_is_mark(b).any()):
                raise UsageError(
                    "FN-E111",
                    f"buffer '{prefix}.{name}' is on the meta device, and not in the checkpoint. Build the model with real buffers: "
                    "only parameters need to be on the meta device.",
                )


def _make_frequencies(module: Any, before: list[tuple[dict[str, Any], str, Any]]) -> None:
    """Compute rotary frequencies as the constructor does: transformers before 5 does it nowhere else."""
    compute, config, there = (getattr(module, name, None) for name in ("rope_init_fn", "config", "inv_freq"))
    if compute is None or config is None or there is None or not bool(there.isnan().any()):
        return
    try:
        with torch.no_grad(), torch.device("cpu"):
            found, _ = compute(config, torch.device("cpu"))
    except Exception:  # the constructor gives it other arguments
        return
    if found.shape != there.shape:
        return  # as well
    there.copy_(found)
    first = vars(module).get("original_inv_freq")
    if first is not None and first.is_meta:
        before.append((vars(module), "original_inv_freq", first))
        module.original_inv_freq = there


def _mark(dtype: torch.dtype) -> Any:
    return float("nan") if dtype.is_floating_point else True if dtype == torch.bool else torch.iinfo(dtype).min


def _is_mark(b: torch.Tensor) -> torch.Tensor:
    return b.isnan() if b.dtype.is_floating_point else b == _mark(b.dtype)
