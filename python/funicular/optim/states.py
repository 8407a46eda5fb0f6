"""``optimizer.state[p]`` of ``funicular.AdamW``: a dictionary like torch's, whose tensors live in the runtime's tiers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import torch

from funicular.errors import BudgetError
from funicular.guard.sending import ByValue, spawning
from funicular.optim.state_places import EDITED, MANAGED, Handed, StatePlaces
from funicular.optim.state_values import Unusable, step_count, usable
from funicular.units.dtypes import MOMENTS, has_whole_master, is_half

__all__ = ["ParamStates"]


if TYPE_CHECKING:
    _Dictionary = MutableMapping[Any, Any]
else:

    class _Dictionary(MutableMapping, dict):
        """What others take for a dictionary; its entries are those of the mapping, and none of the dictionary's own."""


class ParamStates(StatePlaces, _Dictionary):
    """``step``, ``exp_avg``, ``exp_avg_sq``, in torch's format, ``master`` of 16-bit weights, and the user's own entries.

    Tensors are fetched when asked for, with the parameter's shape and strides, fp32 on the host. Edits of a fetched tensor count
    from the next step on, however they are made, and a tensor that is kept follows later steps.
    """

    @classmethod
    def of(cls, param: torch.Tensor, given: Mapping[Any, Any], *, loaded: bool = False) -> ParamStates:
        """Take the entries of an ordinary dictionary, for a parameter that need not be the one they were made for.

        ``loaded``: as torch loads states. Moments are cast, and a master goes with any value that the weight has now.

        Raises
        ------
        Unusable
            For states that are incomplete, or that a step of this parameter cannot use.
        """
        new = cls(param)
        ours = (*MOMENTS, "master") if is_half(param.dtype) else MOMENTS
        new._own = {key: value for key, value in given.items() if key not in ("step", *ours)}
        present = [key for key in ("step", *ours) if key in given]
        if not present:
            return new
        for key in MANAGED:
            if key not in given:
                raise Unusable(param, key, f"is missing beside {', '.join(present)}")
        new.count, new.begun, new.given = step_count(param, given["step"]), True, True
        if _is_step(given["step"]) and not loaded:
            new._step = Handed(given["step"])
        new._tensors = {key: usable(param, key, given[key], cast=loaded) for key in ours if key in given}
        if not loaded and not new._has_own_master():
            new._tensors.pop("master", None)
            new.plain_version = EDITED
        return new

    @classmethod
    def made(cls, param: torch.Tensor, given: Any) -> ParamStates:
        """As :meth:`of`, from what stands in ``optimizer.state``; an empty entry has no states yet."""
        if not given:
            return cls(param)
        if not isinstance(given, Mapping):
            raise Unusable(param, "state", f"is a {type(given).__name__}, not a dictionary")
        return cls.of(param, given)

    def _has_own_master(self) -> bool:
        """Whether the master, if any is wanted, is that of the weight as it is now. Every rest goes with every bf16 weight."""
        if not is_half(self.param.dtype):
            return True
        master = self._tensors.get("master")
        if master is None or self.param.is_meta:
            return master is not None
        if not has_whole_master(self.param.dtype):
            return True
        half, weight = master.to(self.param.device, self.param.dtype), self.param.detach()
        return bool(((half == weight) | (half.isnan() & weight.isnan())).all())

    def own_keys(self) -> tuple[Any, ...]:
        """Return the keys of the user's own entries."""
        return tuple(self._own)

    def _is_managed(self, key: Any) -> bool:
        return key in MANAGED or (key == "master" and is_half(self.param.dtype))

    def __getitem__(self, key: Any) -> Any:
        if not self._is_managed(key):
            return self._own[key]
        self._note_step()
        if key == "step" and self.begun and "step" not in self._missing:
            if self._step is None:
                with torch.inference_mode(mode=False):
                    self._step = Handed(torch.tensor(float(self.count), device="cpu"))
            return self._step.tensor
        if key not in self._kinds():
            raise KeyError(key)
        return self.tensor(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        if not self._is_managed(key):
            self._own[key] = value
            return
        if not self.begun:
            self.begun, self._missing = True, set(MANAGED)
            self._edit(True)
        if key == "step":
            self._set_step(value)
        else:
            self._set_tensor(key, value)
        if key == "master":
            self._edit(False)
        self._missing.discard(key)

    def _set_step(self, value: Any) -> None:
        if _is_step(value):
            self._step, self.given = Handed(value), True
        else:
            self.count, self._step = step_count(self.param, value), None

    def _set_tensor(self, key: str, value: Any) -> None:
        if not isinstance(value, torch.Tensor):
            raise Unusable(self.param, key, f"is a {type(value).__name__}, not a tensor")
        if value.layout != torch.strided:
            raise Unusable(self.param, key, f"is a {value.layout} tensor, not a dense one")
        ref, self.given = self.ref, True
        if value.is_inference():
            with torch.inference_mode(mode=False):
                value = value.clone()
        if ref is None:
            self._tensors[key] = value
            return
        before = self._fetched.get(key)
        if before is not None and before.tensor is value:
            return
        if before is not None:
            self._fetched[key] = Handed(value, before.lent)
            return
        try:
            lent = self._counted(ref, key)
        except BudgetError:
            # The memory is the caller's own, and stays theirs.
            lent = 0
        self._fetched[key] = Handed(value, lent)

    def __delitem__(self, key: Any) -> None:
        if not self._is_managed(key):
            del self._own[key]
        elif key not in self._keys():
            raise KeyError(key)
        elif key == "master":
            self._edit(True)
        else:
            self._missing.add(key)

    def clear(self) -> None:
        """Remove everything: the next step starts from zero."""
        self.forget()
        self.plain_version = -1

    def __iter__(self) -> Iterator[Any]:
        return iter(self._keys())

    def __reversed__(self) -> Iterator[Any]:
        return iter(self._keys()[::-1])

    def __len__(self) -> int:
        return len(self._keys())

    def __contains__(self, key: object) -> bool:
        return key in self._keys()

    def __repr__(self) -> str:
        return f"ParamStates({', '.join(map(repr, self._keys()))})"

    def copy(self) -> dict[Any, Any]:
        """Return an ordinary dictionary of the same tensors."""
        return {key: self[key] for key in self._keys()}

    def __or__(self, other: Any) -> Any:
        return self.copy() | other

    def __ror__(self, other: Any) -> Any:
        return other | self.copy()

    def __ior__(self, other: Any) -> ParamStates:
        self.update(other)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[Any, Any]:
        """Return an ordinary dictionary of copies."""
        own = set(self._own)
        return {k: copy.deepcopy(self._own[k], memo) if k in own else self._copied(k) for k in self._keys()}

    def __copy__(self) -> dict[Any, Any]:
        return self.copy()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        copies = self.copies()
        if spawning():  # the copies are gone before the process looks for them
            copies = {k: ByValue(v) if _is_dense(v) else v for k, v in copies.items()}
        return (dict, (copies,))


def _is_dense(value: Any) -> bool:
    return type(value) is torch.Tensor and value.layout is torch.strided


def _is_step(value: Any) -> bool:
    """Whether a tensor can be kept as ``step`` and counted up in place."""
    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and not value.is_inference()
