"""Optimizer states of one parameter: in the runtime's tiers, or as ordinary tensors where the model is not offloaded."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

import torch

from funicular._amid import note_step
from funicular._errors import BudgetError
from funicular._model import storage_uses

if TYPE_CHECKING:
    from funicular._errors import Error
    from funicular._model import ParamRef

__all__ = ["ParamStates"]

MOMENTS = ("exp_avg", "exp_avg_sq")


def _master_dtype(dtype: torch.dtype) -> torch.dtype | None:
    return {torch.bfloat16: torch.int16, torch.float16: torch.float32}.get(dtype)


def _element_size(name: str, dtype: torch.dtype) -> int:
    return 2 if name == "master" and dtype == torch.bfloat16 else 4


_EDITED = -2


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
        #: bytes of fetched tensors, counted in the host budget
        self._lent = 0
        #: why there are none any more
        self._lost: Error | None = None

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
        # Edited between its last step and the offload: its master starts anew.
        ref.edited |= self.plain_version not in (-1, ref.version_before)
        for name in (*MOMENTS, "master"):
            if name in self._tensors:
                self._store(ref, name, self._tensors[name][0])
            elif ref.stepped and name in MOMENTS:
                self._store(ref, name, self._blank(name, "cpu"))
        # All at once, when everything is in its place.
        there = weakref.ref(ref)
        self._ref, self._tensors, ref.states = there, {}, self

    def detach(self) -> None:
        """Take the states back as ordinary tensors."""
        if self.ref is not None:
            self.take(self.taken())

    def taken(self) -> dict[str, torch.Tensor]:
        """Return what :meth:`detach` leaves, all but the count, as ordinary tensors on the parameter's device."""
        device = self.param.device
        return {name: self._copy(name).to(device) for name in self._keys() if name != "step"}

    def take(self, tensors: dict[str, torch.Tensor], lost: Error | None = None) -> None:
        """Leave the runtime with these; without any if they are lost. Interrupted, it can be run again."""
        ref = self.ref
        if ref is None:
            return
        kept = {name: (t, t._version) for name, t in tensors.items()}
        # Edited since its last step: no version is the one that the master goes with.
        self.plain_version = _EDITED if ref.edited else -1
        engine, lent = ref.unit.session.engine, self._lent
        self._lent = 0
        engine.returned(lent)
        self._lost, self._tensors, self._ref, ref.states = lost, kept, _nowhere, None

    def flush(self) -> None:
        """Write edited tensors back."""
        ref = self.ref
        if ref is not None:
            for name, (tensor, version) in list(self._tensors.items()):  # a signal handler may fetch more
                if tensor._version != version:
                    self._store(ref, name, tensor)

    def advance(self, count: int) -> None:
        """Note a step, and forget what was fetched before it. Interrupted, it can be run again."""
        self.count = count
        if self.ref is not None:
            self._forget()

    def drop_unused(self) -> None:
        """Give back the memory of what was fetched and nobody but this mapping holds."""
        held = any(storage_uses(t.untyped_storage()) > 2 or sys.getrefcount(t) > 3 for t, _ in self._tensors.values())
        if self._tensors and not held:
            self.flush()
            self._forget()

    def _forget(self) -> None:
        ref, lent = self.ref, self._lent
        engine = None if ref is None else ref.unit.session.engine
        self._lent = 0
        if engine is not None:
            engine.returned(lent)
        self._tensors.clear()

    def _note_step(self) -> None:
        """Have a step counted that the runtime has taken: a signal handler may ask before it is."""
        ref = self.ref
        if ref is not None and ref.unit.session.unnoted is not None:
            note_step(ref.unit.session)

    @property
    def edited(self) -> bool:
        """Whether the parameter was edited since its last step: its next master starts from it."""
        ref = self.ref
        if ref is not None:
            return ref.edited
        return self.plain_version not in (-1, self.param._version)

    def keep_edits(self) -> None:
        """Write edited tensors back, and keep what was fetched: later edits count too."""
        ref = self.ref
        if ref is None:
            return
        for name, (tensor, version) in list(self._tensors.items()):
            if tensor._version != version:
                self._store(ref, name, tensor)
                self._tensors[name] = (tensor, tensor._version)

    def fetched(self, name: str) -> torch.Tensor:
        """Return a state as a tensor of the caller's own, which no budget counts."""
        return self._copy(name)

    def forget(self) -> None:
        """Give up the states: others are about to take their place."""
        ref = self.ref
        self._forget()
        if ref is not None:
            ref.states = None
        self._ref = _nowhere
        self._lost = None
        self.count = 0

    def loaded(self, ref: ParamRef | None, count: int, *, edited: bool) -> None:
        """Take note that the states were filled where they live: in the runtime, or by ``self[name] = ...`` before."""
        self.count = count
        if ref is None:
            self.plain_version = -2 if edited else self.param._version
            return
        if ref.states is not None and ref.states is not self:
            ref.states.detach()
        self._ref = weakref.ref(ref)
        ref.states = self
        ref.stepped = True
        ref.edited = edited

    def tensor(self, name: str) -> torch.Tensor:
        """Return a state."""
        if self._lost is not None:
            raise self._lost
        if name not in self._tensors:
            ref = self.ref
            if ref is not None:
                self._lend(ref, self.param.numel() * _element_size(name, self.param.dtype))
                tensor = self._fetched(ref, name)
            else:
                tensor = self._blank(name, self.param.device)
                if name == "master" and self.param.dtype == torch.float16:
                    tensor.copy_(self.param.detach())
            self._tensors[name] = (tensor, tensor._version)
        return self._tensors[name][0]

    def copies(self) -> dict[str, torch.Tensor]:
        """Return everything as tensors of the caller's own, which no budget counts."""
        self._note_step()
        return {name: self["step"] if name == "step" else self._copy(name) for name in self._keys()}

    def _copy(self, name: str) -> torch.Tensor:
        ref = self.ref
        if ref is None or name in self._tensors:
            return self.tensor(name).detach().clone()
        return self._fetched(ref, name)

    def _lend(self, ref: ParamRef, size: int) -> None:
        """Have memory for a fetched tensor counted; what was fetched and is not held any more makes room."""
        session = ref.unit.session
        engine = session.engine
        try:
            engine.lend(size)
            self._lent += size
        except BudgetError:
            session.drop_unused()
            engine.lend(size)
            self._lent += size

    def _fetched(self, ref: ParamRef, name: str) -> torch.Tensor:
        tensor = self._blank(name, "cpu")
        ref.unit.session.engine.read_state(
            ref.unit.engine_id, ref.section, name, ref.start, ref.numel, tensor.data_ptr()
        )
        return tensor

    def _blank(self, name: str, device: torch.device | str) -> torch.Tensor:
        dtype = torch.float32 if name in MOMENTS else _master_dtype(self.param.dtype)
        return torch.empty_strided(self.param.size(), self.param.stride(), dtype=dtype, device=device).zero_()

    def _store(self, ref: ParamRef, name: str, tensor: torch.Tensor) -> None:
        packed = self._blank(name, "cpu").copy_(tensor)
        ref.unit.session.engine.write_state(
            ref.unit.engine_id, ref.section, name, ref.start, ref.numel, packed.data_ptr()
        )

    # ------------------------------------------------------------------ as a mapping

    def __getitem__(self, key: str) -> Any:
        self._note_step()
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
        ref = self.ref
        if ref is not None:
            self._store(ref, key, value)
            self._tensors.pop(key, None)
        else:
            self._tensors[key] = (self._blank(key, self.param.device).copy_(value), 0)

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
        return self.copies()

    def __reduce__(self) -> tuple[Any, ...]:
        return (dict, (self.copies(),))
