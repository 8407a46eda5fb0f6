"""Loading: compares a checkpoint with a model and its optimizer, then has the core fill the tiers."""

from __future__ import annotations

import functools
import logging
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from funicular import _core
from funicular._core import ReadBuffer, RestoredState, UnitPlace
from funicular.checkpoint.entries import hand_back
from funicular.checkpoint.facts import decode
from funicular.checkpoint.quiesce import homes_changed
from funicular.errors import UsageError
from funicular.optim.states import ParamStates
from funicular.ranks.meeting import agreed
from funicular.ranks.slices import dealt
from funicular.torch_internals.overrides import unguarded
from funicular.units.dtypes import MOMENTS, SAFETENSORS, TRAINED, is_half, name_of, state_dtype
from funicular.units.param import ref_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from funicular.checkpoint.collect import Named
    from funicular.checkpoint.conversion import Made
    from funicular.checkpoint.source import Source
    from funicular.units.param import PagedParam
    from funicular.windows.session import Session

__all__ = ["Loader", "compare_groups", "compare_model", "take_groups"]

#: ordinary tensors are filled through buffers of about this many bytes at a time
_BATCH = 64 << 20
_TYPES = {name: dtype for dtype, name in SAFETENSORS.items()}
#: formats that are converted into each other
_FLOATS = frozenset(SAFETENSORS[dtype] for dtype in TRAINED)
_log = logging.getLogger("funicular")


def _list(title: str, found: list[str]) -> list[str]:
    if not found:
        return []
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return [f"{title}: {', '.join(name[:300] for name in found[:5])}{more}"]


def compare_model(source: Source, model: nn.Module, named: Named, *, exact: bool) -> str:
    """Compare names, shapes and types of the model's tensors.

    Parameters
    ----------
    exact : bool
        Types must be those of the model (or their fp32 masters), and nothing may be left over; else floating-point types are
        converted, and what the model does not have is returned.

    Raises
    ------
    UsageError
        ``FN-E407`` with everything that differs.
    """
    missing, shaped, typed = [], [], []
    used = set()
    for name, tensor in {**named.params, **named.buffers}.items():
        own = SAFETENSORS.get(tensor.dtype, "")
        made = source.made(name, named.aliases)
        if made is not None:
            of = [key for _, key in made[1].sources]
            used.update(of)
            if made[1].shapes[made[0]] != tuple(tensor.shape):
                shaped.append(f"{name} {list(made[1].shapes[made[0]])} instead of {list(tensor.shape)}")
            bad = [k for k in of if not _fits(source.model[k].dtype, own, "", tensor.dtype, exact=exact)]
            typed += [f"{key} {source.model[key].dtype} instead of {own}" for key in bad]
            continue
        key = source.name_of(name, named.aliases)
        if key is None:
            missing.append(name)
            continue
        used.add(key)
        found = source.model[key]
        if found.shape != tuple(tensor.shape):
            shaped.append(f"{name} {list(found.shape)} instead of {list(tensor.shape)}")
        elif not _fits(found.dtype, own, source.masters.get(key, ""), tensor.dtype, exact=exact):
            typed.append(f"{name} {found.dtype} instead of {own}")
    used.update(source.entries if source.training else named.entries)
    used.update(source.names[alias] for alias in named.aliases if alias in source.names)
    unexpected = [n for n in source.model if n not in used]
    more = _list("unexpected", unexpected)
    missing += [name for name in source.entries if name not in source.model]
    said = [
        *_list("missing", missing),
        *(more if exact else []),
        *_list("of another shape", shaped),
        *_list("of another type", typed),
    ]
    if said:
        said += [] if exact else more
        said += _untied(model, missing)
        raise UsageError("FN-E407", f"{source.path} is of another model. {'; '.join(said)}. Nothing was loaded.")
    return "".join(more)


def _untied(model: nn.Module, missing: list[str]) -> list[str]:
    """Say what to call where names are missing because a tie was lost, as on the meta device."""
    tied = getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ()
    if not callable(getattr(model, "tie_weights", None)):
        return []
    lost = [name for name in missing if any(name == key or name.endswith(f".{key}") for key in tied)]
    if not lost:
        return []
    return [
        f"{', '.join(lost)} should be tied, which models made on the meta device may lose: call model.tie_weights() first"
    ]


def _fits(found: str, own: str, master_of: str, dtype: torch.dtype, *, exact: bool) -> bool:
    if found == own and not master_of:
        return True
    if master_of:
        return name_of(dtype) == master_of
    return not exact and found in _FLOATS and own in _FLOATS


def compare_groups(source: Source, opt: torch.optim.Optimizer, named: Named) -> list[list[str]]:
    """Compare the optimizer's groups with the checkpoint's; returns the names of each group's parameters.

    Raises
    ------
    UsageError
        ``FN-E407`` if they differ, ``FN-E408`` for parameters outside of the model.
    """
    groups = source.training.get("groups")
    if groups is None:
        raise UsageError("FN-E407", f"{source.path} has no optimizer. Load it with None for the optimizer.")
    names = {id(p): name for name, p in named.params.items()}
    own = [[names.get(id(p), "") for p in group["params"]] for group in opt.param_groups]
    if any("" in group for group in own):
        raise UsageError("FN-E408", "the optimizer has parameters that are not the model's. Make them part of it.")
    stateful = any(source.training["steps"].values())
    if stateful and not all("betas" in group for group in opt.param_groups):
        raise UsageError(
            "FN-E407",
            f"{source.path} has states of {source.training['optimizer']}, which {type(opt).__name__} does not use. Load it with such an "
            "optimizer, or with None for the optimizer. Nothing was loaded.",
        )
    saved = [group["params"] for group in groups]
    if [sorted(g) for g in own] != [sorted(g) for g in saved]:
        flat = {n for g in own for n in g}, {n for g in saved for n in g}
        said = [*_list("missing", sorted(flat[0] - flat[1])), *_list("unexpected", sorted(flat[1] - flat[0]))]
        what = (
            "; ".join(said)
            or f"{len(saved)} groups of {[len(g) for g in saved]} parameters, not {[len(g) for g in own]}"
        )
        raise UsageError("FN-E407", f"{source.path} is of another optimizer. {what}. Nothing was loaded.")
    return own


def take_groups(source: Source, opt: torch.optim.Optimizer) -> None:
    """Give the groups the options that they had."""
    for group, saved in zip(opt.param_groups, source.training["groups"], strict=True):
        options = decode(saved["options"])
        for key, value in options.items():
            if isinstance(group.get(key), torch.Tensor):
                group[key].fill_(value)
            else:
                group[key] = value


class _Ordinary(NamedTuple):
    """A tensor of the file that goes through a buffer of the host to wherever ``take`` puts it."""

    name: str
    optimizer: bool
    shape: torch.Size
    dtype: torch.dtype
    #: which half of an fp32 master, if it is one
    half: str | None
    take: Callable[[torch.Tensor], None]
    #: the parameter that it is, if its home is the same memory for all ranks
    shared: PagedParam | None = None


def _of(told: Callable[[int, int], None], total: int, done: int) -> None:
    told(done, total)


class Loader:
    """Fills a model, and an optimizer, from a checkpoint that was compared with them."""

    def __init__(self, source: Source, model: nn.Module, named: Named, session: Session | None) -> None:
        self.source = source
        self._model = model
        self.named = named
        self.session = session
        self._group = None if session is None else session.group
        self.items: list[RestoredState] = []
        self.ordinary: list[_Ordinary] = []
        #: what is made of several tensors, and where it goes
        self.made: dict[str, tuple[Made, dict[str, torch.Tensor]]] = {}
        self.after: list[Callable[[], None]] = []

    def model(self) -> None:
        """List the model's tensors."""
        for name, p in self.named.params.items():
            if self._is_made(name, p):
                continue
            key = self.source.name_of(name, self.named.aliases)
            assert key is not None
            ref = ref_of(p)
            half = key in self.source.masters
            if ref is not None and p.is_contiguous():
                self.items.append(RestoredState(_place(ref, "param"), ref.numel, False, key, half))
            else:
                self._ordinary(
                    key, False, p, "param" if half else None, _copier(p), None if self._group is None else ref
                )
        for name, b in self.named.buffers.items():
            if self._is_made(name, b):
                continue
            key = self.source.name_of(name, self.named.aliases)
            assert key is not None
            self._ordinary(key, False, b, None, _copier(b))

    def _is_made(self, name: str, tensor: torch.Tensor) -> bool:
        made = self.source.made(name, self.named.aliases)
        if made is not None:
            self.made.setdefault(made[1].first, (made[1], {}))[1][made[0]] = tensor
        return made is not None

    def _make(self, made: Made, targets: dict[str, torch.Tensor]) -> None:
        """Make parameters of several tensors of the file."""
        assert self.source.conversion is not None
        dtype = next(iter(targets.values())).dtype

        read = {key: torch.empty(self.source.model[key].shape, dtype=dtype, device="cpu") for _, key in made.sources}
        self.source.core.read([_buffer(t, key) for key, t in read.items()])
        # Each is given away, so that what is merged can go.
        found = self.source.conversion.convert(made, read.pop)
        with torch.no_grad():
            for name, target in targets.items():
                target.copy_(found[name])

    def _ordinary(
        self,
        name: str,
        optimizer: bool,
        like: torch.Tensor,
        half: str | None,
        take: Callable[[torch.Tensor], None],
        shared: PagedParam | None = None,
    ) -> None:
        self.ordinary.append(_Ordinary(name, optimizer, like.shape, like.dtype, half, take, shared))

    def optimizer(self, opt: torch.optim.Optimizer, groups: list[list[str]]) -> None:
        """List the states of the parameters of all groups."""
        steps = {name: int(self.source.training["steps"].get(name, 0)) for group in groups for name in group}
        options = {p: group for group in opt.param_groups for p in group["params"]}
        before = dict(opt.state)
        opt.state.clear()
        busy = {
            ref.unit
            for name, count in steps.items()
            if self._has_states(name, count) and (ref := ref_of(self.named.params[name])) is not None
        }
        for name, count in steps.items():
            p = self.named.params[name]
            ref = ref_of(p)
            there = self._has_states(name, count)
            old = before.get(p)
            if isinstance(old, ParamStates):
                old.forget()
            states: Any = opt._states(p) if hasattr(opt, "_states") else {}
            within = ref is not None and ref.trainable and isinstance(states, ParamStates)
            if ref is not None and within and p.is_contiguous():
                if ref.unit in busy:
                    self._in_unit(name, p, ref, there=there)
            elif there:
                if within:
                    states.attach(ref)
                self._beside(name, p, states)
            if not there:
                opt.state.pop(p, None)
                continue
            if isinstance(states, ParamStates):
                edited = name in self.source.training["edited"] or not self._has_master(name, p)
                self.after.append(_noter(states, ref if within else None, count, edited))
            else:
                states["step"] = _step_of(options[p], p, count)
                opt.state[p] = states

    def _has_states(self, name: str, count: int) -> bool:
        """Whether there are states: someone may have set the count of a stepped parameter to 0."""
        return count > 0 or f"{name}.{MOMENTS[0]}" in self.source.optimizer

    def _in_unit(self, name: str, p: nn.Parameter, ref: Any, *, there: bool) -> None:
        for kind in MOMENTS:
            tensor = f"{name}.{kind}" if there else None
            self.items.append(RestoredState(_place(ref, kind), ref.numel, True, tensor, False))
        if is_half(p.dtype):
            saved = f"{name}.master"
            if there and saved in self.source.optimizer:
                self.items.append(RestoredState(_place(ref, "master"), ref.numel, True, saved, False))
            else:
                key = self.source.name_of(name, self.named.aliases)
                whole = there and key in self.source.masters
                tensor = key if whole else None
                self.items.append(RestoredState(_place(ref, "master"), ref.numel, False, tensor, whole))

    def _beside(self, name: str, p: nn.Parameter, states: Any) -> None:
        """States that are ordinary tensors, or lie in a unit with other strides."""
        key = self.source.name_of(name, self.named.aliases)
        for kind in MOMENTS:
            like = torch.empty(p.shape, dtype=state_dtype(kind, p.dtype), device="meta")
            self._ordinary(f"{name}.{kind}", True, like, None, _setter(states, kind, p))
        if is_half(p.dtype) and isinstance(states, ParamStates):
            like = torch.empty(p.shape, dtype=state_dtype("master", p.dtype), device="meta")
            if f"{name}.master" in self.source.optimizer:
                self._ordinary(f"{name}.master", True, like, None, _setter(states, "master", p))
            elif key in self.source.masters:
                self._ordinary(str(key), False, like, "master", _setter(states, "master", p))

    def _has_master(self, name: str, p: torch.Tensor) -> bool:
        key = self.source.name_of(name, self.named.aliases)
        return not is_half(p.dtype) or f"{name}.master" in self.source.optimizer or key in self.source.masters

    def run(self, told: Callable[[int, int], None]) -> None:
        """Fill everything that was listed, and give modules back what they had added to their state.

        ``told`` is told how many bytes are read of how many.
        """
        self._run(told)
        if self._entries():
            # A module wrote to parameters that it was not given: they are loaded once more.
            self._run(told)

    def _entries(self) -> bool:
        """Give modules back what they had added to their state; returns whether parameters were written to."""
        given: dict[str, Any] = dict(self.source.values)
        model = self.source.model
        foreign = [
            n for n in self.named.entries if n in model and model[n].dtype in _TYPES and not self.source.training
        ]
        read = {
            name: torch.empty(model[name].shape, dtype=_TYPES[model[name].dtype], device="cpu")
            for name in (*self.source.entries, *foreign)
        }
        if read:
            self.source.core.read([_buffer(t, name) for name, t in read.items()])
        given |= {name: tensor.to(self._device_of(name)) for name, tensor in read.items()}
        lacking = [name for name in self.named.entries if name not in given]
        if lacking:
            _log.warning(
                "FN-W408 %s lacks what the model's state_dict() has besides parameters and buffers: %s. They stay as they are.",
                self.source.path, ", ".join(lacking[:5]),
            )  # fmt: skip
        if not given:
            return False
        with unguarded():
            before = [p._version for p in self.named.params.values()]
        hand_back(self._model, given, str(self.source.path))
        with unguarded():
            return before != [p._version for p in self.named.params.values()]

    def _device_of(self, name: str) -> torch.device | str:
        own = self.named.entries.get(name)
        if isinstance(own, torch.Tensor) and not own.is_meta:
            return own.device
        return "cpu" if self.session is None else self.session.device

    def _size(self, items: list[RestoredState]) -> int:
        """Bytes of these in the files."""
        files = (self.source.model, self.source.optimizer)
        found = [files[item.optimizer].get(item.tensor or "") for item in items]
        return sum(math.prod(one.shape) * _TYPES[one.dtype].itemsize for one in found if one is not None)

    def _run(self, told: Callable[[int, int], None]) -> None:
        if self.items:
            assert self.session is not None
            # Ranks have the same memory, and each fills a part of it.
            mine = dealt([item.place.unit for item in self.items], self._group)
            with agreed(self._group, "loaded its part of the weights and states", alike=True):
                items = [item for item, own in zip(self.items, mine, strict=True) if own]
                size = self._size(items)
                at = functools.partial(_of, told, size)
                _core.restore(self.session.engine, self.source.core, items, self.session.stream(), at)
            refs = [ref for p in self.named.params.values() if (ref := ref_of(p)) is not None]
            homes_changed(self.session, refs)
        with agreed(self._group, "loaded what takes a way of its own", alike=True):
            others = self._run_ordinary()
        # What other ranks have put into homes is an edit here as it is there.
        for ref in others:
            with unguarded():
                torch.autograd.graph.increment_version(ref.param)
            ref.unit.owner.edited(ref)
        for note in self.after:
            note()

    def _run_ordinary(self) -> list[PagedParam]:
        """Fill what goes through buffers; returns the parameters that other ranks fill."""
        others: list[PagedParam] = []
        batch: list[tuple[_Ordinary, torch.Tensor]] = []
        size = 0
        for one, mine in zip(self.ordinary, dealt(self.ordinary, self._group), strict=True):
            if one.shared is not None and not mine:
                others.append(one.shared)
                continue
            batch.append((one, torch.empty(one.shape, dtype=one.dtype, device="cpu")))
            size += batch[-1][1].nbytes
            if size > _BATCH:
                self._fill(batch)
                batch, size = [], 0
        self._fill(batch)
        for (made, targets), mine in zip(self.made.values(), dealt(self.made, self._group), strict=True):
            refs = [ref for t in targets.values() if (ref := ref_of(t)) is not None]
            if mine or len(refs) < len(targets):  # a buffer is each rank's own
                self._make(made, targets)
            else:
                others += refs
        return others

    def _fill(self, batch: list[tuple[_Ordinary, torch.Tensor]]) -> None:
        self.source.core.read([_buffer(t, one.name, one.optimizer, one.half) for one, t in batch])
        with torch.no_grad():
            for one, t in batch:
                one.take(t)


def _buffer(t: torch.Tensor, name: str, optimizer: bool = False, half: str | None = None) -> ReadBuffer:
    return ReadBuffer(t.data_ptr(), t.nbytes, SAFETENSORS[t.dtype], optimizer, name, half)


def _place(ref: PagedParam, kind: str) -> UnitPlace:
    return UnitPlace(ref.unit.engine_id, ref.section, ref.start, kind)


def _copier(target: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def take(t: torch.Tensor) -> None:
        if target.is_inference():
            with torch.inference_mode():
                target.copy_(t)
        else:
            target.copy_(t)

    return take


def _setter(states: Any, kind: str, p: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def take(t: torch.Tensor) -> None:
        if isinstance(states, ParamStates):
            states.put(kind, t)
        else:
            # As torch loads states: in the type of their parameter.
            states[kind] = t.to(device=p.device, dtype=p.dtype if p.is_floating_point() else t.dtype)

    return take


def _step_of(group: dict[str, Any], p: torch.Tensor, count: int) -> torch.Tensor:
    """Return a count as torch's optimizers keep it: beside the parameter where kernels read it."""
    near = group.get("capturable") or group.get("fused")
    return torch.tensor(float(count), device=p.device if near else "cpu")


def _noter(states: ParamStates, ref: Any, count: int, edited: bool) -> Callable[[], None]:
    return lambda: states.loaded(ref, count, edited=edited)
