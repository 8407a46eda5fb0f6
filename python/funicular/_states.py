"""Optimizer states of one parameter: in the runtime's tiers, or as ordinary tensors where the model is not offloaded."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from funicular._model import ParamRef

__all__ = ["ParamStates"]

MOMENTS = ("exp_avg", "exp_avg_sq")


def _master_dtype(dtype: torch.dtype) -> torch.dtype | None:
    return {torch.bfloat16: torch.int16, torch.float16: torch.float32}.get(dtype)


def _nowhere() -> None:
    return None


class ParamStates(MutableMapping[str, Any]):
    """``optimizer.state[p]``: ``step``, ``exp_avg``, ``exp_avg_sq``, in torch's format, and ``master`` of 16-bit weights.

    Tensors are fetched when asked for, with the parameter's shape and strides, fp32 on the host; edits of a fetched tensor
    count from the next step on.
    """

    def __init__(self, param: torch.nn.Parameter) -> None:
        self.param = param
        self.count = 0
        self._ref: Callable[[], ParamRef | None] = _nowhere
        #: version of an ordinary parameter after its last step
        self.plain_version = -1
        #: ordinary: the states themselves; offloaded: what was fetched since the last step, with its version then
        self._tensors: dict[str, tuple[torch.Tensor, int]] = {}

    @property
    def ref(self) -> ParamRef | None:
        """The place in the runtime; None for an ordinary parameter, or when the model is gone."""
        return self._ref()

    # ------------------------------------------------------------------ where the bytes are

    def attach(self, ref: ParamRef) -> None:
        """Hand the states over to the runtime; another optimizer's states of the parameter leave it."""
        if self.ref is ref:
            return
        if ref.states is not None:
            ref.states.detach()
        tensors, self._tensors = self._tensors, {}
        self._ref = weakref.ref(ref)
        ref.states = self
        for name in (*MOMENTS, "master"):
            if name in tensors:
                self._store(name, tensors[name][0])
            elif ref.stepped and name in MOMENTS:
                self._store(name, self._blank(name))

    def detach(self) -> None:
        """Take the states back as ordinary tensors."""
        if self.ref is None:
            return
        if self.count > 0:
            tensors = {name: self.tensor(name) for name in self._keys() if name != "step"}
            self._tensors = {name: (t.to(self.param.device), t._version) for name, t in tensors.items()}
        self.ref.states = None
        self._ref = _nowhere

    def flush(self) -> None:
        """Write edited tensors back, and forget what was fetched."""
        if self.ref is None:
            return
        for name, (tensor, version) in self._tensors.items():
            if tensor._version != version:
                self._store(name, tensor)
        self._tensors.clear()

    def tensor(self, name: str) -> torch.Tensor:
        """Return a state."""
        if name not in self._tensors:
            tensor = self._blank(name)
            if self.ref is not None:
                ref = self.ref
                ref.unit.session.engine.read_state(
                    ref.unit.engine_id, ref.section, name, ref.start, ref.numel, tensor.data_ptr()
                )
            elif name == "master" and self.param.dtype == torch.float16:
                tensor.copy_(self.param.detach())
            self._tensors[name] = (tensor, tensor._version)
        return self._tensors[name][0]

    def _blank(self, name: str) -> torch.Tensor:
        dtype = torch.float32 if name in MOMENTS else _master_dtype(self.param.dtype)
        device = "cpu" if self.ref is not None else self.param.device
        return torch.empty_strided(self.param.size(), self.param.stride(), dtype=dtype, device=device).zero_()

    def _store(self, name: str, tensor: torch.Tensor) -> None:
        assert self.ref is not None
        ref = self.ref
        packed = self._blank(name).copy_(tensor)
        ref.unit.session.engine.write_state(
            ref.unit.engine_id, ref.section, name, ref.start, ref.numel, packed.data_ptr()
        )

    # ------------------------------------------------------------------ as a mapping

    def __getitem__(self, key: str) -> Any:
        if self.count == 0:
            raise KeyError(key)
        if key == "step":
            return torch.tensor(float(self.count))
        if key not in self:
            raise KeyError(key)
        return self.tensor(key)

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "step":
            self.count = int(value)
            return
        if key not in (*MOMENTS, "master"):
            raise KeyError(key)
        if self.ref is not None:
            self._tensors.pop(key, None)
            self._store(key, value)
        else:
            self._tensors[key] = (self._blank(key).copy_(value), 0)

    def __delitem__(self, key: str) -> None:
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys())

    def __len__(self) -> int:
        return len(self._keys())

    def __contains__(self, key: object) -> bool:
        return key in self._keys()

    def _keys(self) -> tuple[str, ...]:
        if self.count == 0:
            return ()
        # What the fp32 master has beyond a 16-bit weight: torch's AdamW has no such state, and ignores it.
        half = _master_dtype(self.param.dtype) is not None
        return ("step", *MOMENTS, "master") if half else ("step", *MOMENTS)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        """Return an ordinary dictionary of copies."""
        return {key: value.clone() for key, value in self.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return (dict, ({key: value.clone() for key, value in self.items()},))
