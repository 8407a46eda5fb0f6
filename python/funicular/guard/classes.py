"""Classes of parameters and gradients, and what happens when an operation meets one of them.

Outside its window a parameter is a view of its home, which background updates change and which may live on NVMe. The
guard makes every access wait for what is pending first. Inside, it is plain for the threads that are inside, and guarded for
all others: they use the home.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.checkpoint
from torch import nn

from funicular._core import ThreadSwitch
from funicular.errors import RuntimeFailure, UsageError
from funicular.guard.arguments import collect_ids, needs_grad, refuse_edit, swapped
from funicular.guard.sending import packed, spawning
from funicular.guard.torch_functions import (
    BACKWARDS,
    BY_TENSOR,
    CLIPPING,
    CONSTANT,
    DATA_GET,
    DATA_SET,
    GRADIENTS,
    HARMLESS,
    ITSELF,
    NUMPY,
    RAW,
    RESHAPING,
    TAKING,
    written,
)
from funicular.homes.edits import check_conversion, note, replace_data, touch
from funicular.torch_internals.autograd import backward_task
from funicular.torch_internals.memory import make_subclass, number_of
from funicular.torch_internals.operations import IS_PARAM, MAY_BECOME, PARAMETER_KIND, USE_COUNT, known_to_foreach
from funicular.torch_internals.overrides import NO_OVERRIDE, override, unguarded
from funicular.torch_internals.questions import calls_in
from funicular.torch_internals.saved_hooks import pop, push
from funicular.torch_internals.sending import reduce_tensor, send_by
from funicular.units.param import link, ref_of
from funicular.units.unit import GRADIENTS_UNDER_WAY, UNDER_WAY, Access

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from funicular.units.param import PagedParam

__all__ = ["GuardedGrad", "GuardedParameter", "WindowParameter", "install"]

_T: Any = torch.Tensor
#: Makes parameters of tensors; of tensors whose class it does not know, by ``detach``.
_NEW_PARAMETER = nn.Parameter.__new__.__code__
_NO_GRAPH = (
    "FN-E127 a function compiled with fullgraph=True was given an offloaded parameter outside of its module, or its gradient. Both "
    "wait for transfers, which a graph cannot. Give it p.detach() and p.grad.clone(), or leave fullgraph=True out."
)
#: how many edits of other threads may keep a weight from being saved for the backward
_TRIES = 1000


def _find(items: Iterable[Any], params: list[Any], grads: list[Any]) -> None:
    for item in items:
        if isinstance(item, GuardedParameter):
            params.append(item)
        elif isinstance(item, GuardedGrad):
            grads.append(item)
        elif isinstance(item, (list, tuple)):
            _find(item, params, grads)
        elif isinstance(item, dict):
            _find(item.values(), params, grads)


def _living(p: torch.Tensor) -> PagedParam:
    ref = ref_of(p)
    if ref is None:
        raise RuntimeFailure(
            "FN-E104", "the offloaded model of this parameter is gone. Keep the model, or unwrap it first."
        )
    return ref


def _leased(refs: list[PagedParam], func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call, with what autograd saves of the parameters packed as leases."""
    if not refs or not torch.is_grad_enabled():
        return func(*args, **kwargs)
    leases = refs[0].unit.owner.leases
    pair = leases.pair_outside()
    if pair is None:
        return func(*args, **kwargs)
    for _ in range(_TRIES):
        leases.local.packed = False
        before = [ref.param._version for ref in refs]
        try:
            push(*pair)
            return func(*args, **kwargs)
        except RuntimeError:
            # If another thread's step counts an edit while a weight is being saved, torch blames the hook for it.
            edited = [ref.param._version for ref in refs] != before
            if not edited or not leases.local.packed or func in BACKWARDS or written(func, args, kwargs):
                raise
        finally:
            pop()
    raise UsageError(
        "FN-E118",
        f"'{refs[0].name}' was edited by other threads each of {_TRIES} times that an operation was about to save it for its backward. "
        "Let the optimizers of other threads step when the forward is over.",
    )


def _operate(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation that meets guarded tensors."""
    if func in HARMLESS:
        if func in GRADIENTS and (ref := ref_of(args[0])) is not None:
            with ref.unit.owner.lock, unguarded():
                return func(*args, **kwargs)
        with unguarded():
            return func(*args, **kwargs)
    params: list[Any] = []
    grads: list[Any] = []
    _find(args, params, grads)
    _find(kwargs.values(), params, grads)
    if not grads:
        return _call(func, args, kwargs, params)
    refs = [ref for ref in map(ref_of, grads) if ref is not None]
    if func in BACKWARDS:  # too long for a step that waits until its gradient's place is not looked at
        swap: dict[int, Any] = {id(grad): grad.clone() for grad in grads}
        return _call(func, swapped(args, swap), swapped(kwargs, swap), params)
    paged = {ref.unit for ref in refs if ref.unit.grads_on_nvme}
    if func in BY_TENSOR and len(paged) > 1 and not kwargs and not any(isinstance(a, (list, tuple)) for a in args[1:]):
        return _in_turn(func, args, kwargs)
    use = Access()
    use.look_at(refs)
    try:
        GRADIENTS_UNDER_WAY.append(use)
        return _operate_on_grads(func, args, kwargs, params, grads, refs)
    finally:
        GRADIENTS_UNDER_WAY.remove(use)


def _in_turn(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run an operation that edits each tensor of a list by itself: unit by unit, as memory may not hold the gradients of all."""
    parts: dict[Any, list[Any]] = {}
    for tensor in args[0]:
        ref = ref_of(tensor) if isinstance(tensor, GuardedGrad) else None
        parts.setdefault(None if ref is None else ref.unit, []).append(tensor)
    for part in parts.values():
        func(part, *args[1:], **kwargs)


def _operate_on_grads(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    params: list[Any],
    grads: list[Any],
    refs: list[PagedParam],
) -> Any:
    owners = _settle_grads(func, args, kwargs, grads, refs)
    result = _call(func, args, kwargs, params)
    if owners:
        with unguarded():
            if torch.is_grad_enabled() and needs_grad(result) and not written(func, args, kwargs):
                # The graph that was made may keep the gradients until after the next ones.
                swap = {id(grad): grad.clone() for grad in grads}
                args, kwargs, result = swapped(args, swap), swapped(kwargs, swap), None
            else:
                _adopt(result, owners)
                return result
        result = _call(func, args, kwargs, params)
    return result


def _call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], params: list[Any]) -> Any:
    if params:
        return _call_on_params(func, args, kwargs, params)
    with unguarded():
        return func(*args, **kwargs)


def _call_on_params(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], params: list[Any]) -> Any:
    refs = [_living(p) for p in params]
    if func is MAY_BECOME and isinstance(args[1], torch.Tensor):
        # `module.to(...)` and its kin ask before they move a parameter or replace it.
        check_conversion(refs[0], args[1])
    outside = [ref for ref in refs if not ref.unit.is_inside()]
    use = Access()
    try:
        UNDER_WAY.append(use)
        plain = func in CONSTANT or (not torch.is_grad_enabled() and func not in ITSELF)
        swap: dict[int, Any] = {}
        back: dict[int, Any] = {}
        for owner in dict.fromkeys(ref.unit.owner for ref in outside):
            mine = [ref for ref in outside if ref.unit.owner is owner]
            if owner.shared:
                refuse_edit(func, args, kwargs, {id(ref.param): f"'{ref.name}'" for ref in mine})
            for ref in owner.access(mine, use, raw=func in RAW, plain=plain):
                swap[id(ref.param)] = ref.stand_in
                back[id(ref.stand_in)] = ref.param
        if func == DATA_SET and args[0] is params[0] and not refs[0].unit.is_inside():
            replace_data(refs[0], args[1])
            return None
        if func is _T.data_ptr:
            for ref in outside:
                ref.unit.expose()
        args, kwargs = swapped(args, swap), swapped(kwargs, swap)
        if func in NUMPY and outside and not params[0].requires_grad:
            # The array keeps the tensor that it is made of: its life shows that the home is looked at.
            args = (outside[0].home.detach(), *args[1:])
        with unguarded():
            before = {ref: ref.param._version for ref in refs}
            result = _leased(refs, func, args, kwargs)
            writes = _count_writes(func, args, kwargs, before)
        for owner in dict.fromkeys(ref.unit.owner for ref in outside):
            note(owner, {ref: before[ref] for ref in outside if ref.unit.owner is owner}, writes=writes)
        return swapped(result, back) if back else result
    finally:
        UNDER_WAY.remove(use)
        for unit in use.themselves:
            unit.owner.close_left(unit)


def _count_writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], before: dict[PagedParam, int]) -> bool:
    """Count the edits of operations that forget to: fused optimizers, kernels of the user's; returns whether it writes."""
    stored = written(func, args, kwargs)
    if not stored:
        return "out" in kwargs or func is _T.__setitem__
    flat: set[int] = set()
    collect_ids(stored, flat)
    for ref, version in before.items():
        if ref.param._version == version and not flat.isdisjoint((id(ref.param), id(ref.stand_in))):
            torch.autograd.graph.increment_version(ref.param)
    return True


def _settle_grads(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], grads: list[Any], refs: list[PagedParam]
) -> list[PagedParam]:
    """Make gradients valid for the caller; returns those whose places are looked at."""
    for owner in dict.fromkeys(ref.unit.owner for ref in refs):
        if owner.shared:
            names = {id(g): f"the gradient of '{ref.name}'" for g in grads if (ref := ref_of(g)) is not None}
            refuse_edit(func, args, kwargs, names)
        owner.access_grads([ref for ref in refs if ref.unit.owner is owner])
    if func not in TAKING:
        return refs
    for ref in refs:
        ref.unit.owner.move_out(ref)
    return []


def _clipped(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], guarded: type[torch.Tensor]
) -> Any:
    """Have one of the operations of ``clip_grad_norm_`` answered from what is known; ``NotImplemented`` if it has to be run."""
    tensors = args[0] if isinstance(args[0], (list, tuple)) else args[:1]
    refs = (ref_of(tensor) for tensor in tensors if type(tensor) is guarded)
    ref = next((ref for ref in refs if ref is not None), None)
    return NotImplemented if ref is None else ref.unit.owner.clip(func, args, kwargs, guarded)


def _adopt(result: Any, refs: list[PagedParam]) -> None:
    """Guard the views of gradients' places among the results of an operation on gradients."""
    if isinstance(result, (list, tuple)):
        for item in result:
            _adopt(item, refs)
    elif type(result) is torch.Tensor and result.layout == torch.strided:
        try:
            storage = result.untyped_storage()
        except (RuntimeError, NotImplementedError):
            return  # a wrapper without memory
        for ref in refs:
            if ref.grad_storage is not None and number_of(ref.grad_storage) == number_of(storage):
                result.__class__ = GuardedGrad
                link(result, ref)
                ref.add_view(result)
                return


def _refusal(ref: PagedParam, what: str) -> UsageError:
    return UsageError(
        "FN-E115",
        f"'{ref.name}' is offloaded: its memory and shape cannot be changed by {what}. "
        "Copy values into it with copy_, or call funicular.unwrap(model) first.",
    )


class GuardedParameter(nn.Parameter, metaclass=PARAMETER_KIND):  # type: ignore[metaclass]
    """A parameter outside its window."""

    @override(_NO_GRAPH)
    def __torch_function__(cls: type, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = _operate(func, args, kwargs)
        if func is _T.detach and sys._getframe(2).f_code is _NEW_PARAMETER:
            return _parameter_over(args[0], result, sys._getframe(2).f_locals["cls"])
        return result

    def __new__(cls, data: Any = None, requires_grad: bool = True) -> Any:
        """Return an ordinary parameter: code makes parameters of the class that one has."""
        return _ordinary(cls)(data, requires_grad)

    @property
    def _is_param(self) -> bool:
        return IS_PARAM

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        kind = self.__dict__.pop("_funicular_becomes", None)
        if kind is not None:
            self.__class__ = kind

    def __copy__(self) -> nn.Parameter:
        """Return an ordinary parameter over the same memory, as torch does."""
        return nn.Parameter(self, self.requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """Return an ordinary, independent parameter on the same device."""
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        kind = _ordinary(type(self))
        copy: nn.Parameter = kind(self.detach().clone(memory_format=torch.preserve_format), self.requires_grad)
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, proto: Any) -> Any:
        """Pickle as an ordinary parameter holding a copy."""
        copy: Any = nn.Parameter(self.detach().clone(), self.requires_grad)
        copy.__dict__.update((k, v) for k, v in self.__dict__.items() if not k.startswith("_funicular_"))
        return packed(copy) if spawning() else copy.__reduce_ex__(proto)

    def __repr__(self) -> str:  # type: ignore[override]
        return "Parameter containing:\n" + repr(self.detach().requires_grad_(self.requires_grad))

    # torch asks no guard about these two.
    def as_subclass(self, cls: Any) -> Any:
        """As in torch."""
        return _T.as_subclass(self.view_as(self), cls)

    def set_(self, source: Any = None, *geometry: Any) -> Any:
        """Take the values of another tensor; anything else is refused with ``FN-E115``."""
        if not isinstance(source, torch.Tensor) or geometry:
            raise _refusal(_living(self), "set_")
        self.data = source
        return self


def _ordinary(cls: type) -> Any:
    """Return the class that parameters of a guarded class have when they are not offloaded."""
    return getattr(cls, "_funicular_class", nn.Parameter)


def _parameter_over(p: GuardedParameter, tensor: torch.Tensor, kind: type[nn.Parameter]) -> Any:
    """Return what ``nn.Parameter(p)`` asks ``detach`` for: something of p's class, until it is marked as a parameter."""
    alias: Any = make_subclass(nn.Parameter, tensor, p.requires_grad)
    # As torch: of a subclass of its own, whichever class was called.
    alias._funicular_becomes = kind if _ordinary(type(p)) is nn.Parameter else _ordinary(type(p))
    alias.__class__ = type(p)
    return alias


def _refuse(name: str) -> None:
    def refused(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise _refusal(_living(self), "torch.utils.swap_tensors" if name == USE_COUNT else name)

    refused.__name__ = name
    refused.__doc__ = "Refused with ``FN-E115``."
    setattr(GuardedParameter, name, refused)


for _name in RESHAPING:
    _refuse(_name)


#: torch's own, which detaches what it saves and edits nothing
_CHECKPOINT = torch.utils.checkpoint.__file__


def _touch(p: torch.Tensor, *, by_address: bool) -> None:
    """Note that a frame is about to be reached past the version counter.

    On a GPU raw addresses are asked for by every kernel of a compiler's, and telling what it did takes a pass over the frame and
    waits for the device: there only ``.data`` is watched, and everything under ``debug.poison``.
    """
    ref = ref_of(p)
    if ref is None or not ref.unit.is_inside():
        return
    owner = ref.unit.owner
    if not by_address or owner.device.type == "cpu" or owner.poison:
        touch(ref)


def _touching(name: str) -> Any:
    original = getattr(_T, name)

    def touching(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and sys._getframe(1).f_code.co_filename != _CHECKPOINT:
            if name == "detach" and sys._getframe(1).f_code is _NEW_PARAMETER:
                return _parameter_over(self, self.data, sys._getframe(1).f_locals["cls"])
            _touch(self, by_address=True)
        return original(self, *args, **kwargs)

    touching.__name__ = name
    touching.__doc__ = original.__doc__
    return touching


class WindowParameter(GuardedParameter):
    """A parameter inside its window: an ordinary one, but for what reaches its memory past the version counter."""

    # None for the threads inside, the guard for all others. torch.compile finds the former on the class.
    __torch_function__ = ThreadSwitch(
        "_funicular_inside",
        NO_OVERRIDE,
        GuardedParameter.__torch_function__,
        # Functions of torch's that are written in Python ask the class, once an instance has said that there is something to ask.
        torch.overrides.__file__,
        calls_in,
        backward_task,
    )

    @property
    def data(self) -> torch.Tensor:
        """As in torch."""
        if torch.compiler.is_compiling():
            return _T.detach(self)  # type: ignore[no-any-return]
        _touch(self, by_address=False)
        return DATA_GET(self)  # type: ignore[no-any-return]

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        DATA_SET(self, value)

    detach, data_ptr, __dlpack__ = _touching("detach"), _touching("data_ptr"), _touching("__dlpack__")
    untyped_storage, storage = _touching("untyped_storage"), _touching("storage")

    def numpy(self, *, force: bool = False) -> Any:
        """As in torch; the array keeps a tensor, whose life shows that the memory is looked at."""
        return _T.numpy(self if self.requires_grad and not force else self.detach(), force=force)

    def __array__(self, dtype: Any = None) -> Any:
        """As in torch."""
        return _T.__array__(self if self.requires_grad else self.detach(), dtype)


class GuardedGrad(torch.Tensor):
    """A gradient in its pinned segment, or a view of one."""

    @override(_NO_GRAPH)
    def __torch_function__(cls: type, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        known = _clipped(func, args, kwargs, cls) if func in CLIPPING and args else NotImplemented
        return _operate(func, args, kwargs) if known is NotImplemented else known

    def _own(self) -> Any:
        """Move to ordinary memory, and be an ordinary tensor."""
        ref = ref_of(self)
        if ref is not None:
            ref.unit.owner.access_grad(ref)
            ref.unit.owner.move_out(ref)
        return self

    # torch asks no guard about these two.
    def as_subclass(self, cls: Any) -> Any:
        """As in torch."""
        return _T.as_subclass(self._own(), cls)

    def set_(self, *args: Any) -> Any:
        """As in torch."""
        return _T.set_(self._own(), *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """Return an ordinary, independent tensor."""
        if id(self) not in memo:
            memo[id(self)] = self.clone()
        return memo[id(self)]  # type: ignore[no-any-return]

    def __copy__(self) -> torch.Tensor:
        """Return an ordinary tensor over the same memory, as torch does."""
        return _T.detach(self._own())  # type: ignore[no-any-return]

    def __reduce_ex__(self, proto: Any) -> Any:
        """Pickle as an ordinary tensor."""
        copy: Any = self.clone()
        return packed(copy) if spawning() else copy.__reduce_ex__(proto)


def _send(grad: GuardedGrad) -> Any:
    """Send an ordinary tensor with the same bytes to another process, as torch sends tensors."""
    copy = grad.clone()
    return packed(copy) if spawning() else reduce_tensor(copy)


def install() -> None:
    """Tell torch of these classes: what sends gradients, and that its foreach paths are right for all of them."""
    # As torch does for its own classes: on a GPU a storage cannot be sent, only a tensor.
    send_by(GuardedGrad, _send)
    known_to_foreach((GuardedParameter, WindowParameter, GuardedGrad))
