"""Classes of parameters and gradients outside their windows.

Outside its window a parameter is a view of its home, which background updates change and which may live on NVMe. The
guard makes every access wait for what is pending first. Inside windows parameters have their plain class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.utils._foreach_utils
from torch import nn

from funicular._clip import NOTHING, recognised
from funicular._errors import RuntimeFailure
from funicular._leases import pop, push
from funicular._model import READING, ref_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from funicular._model import ParamRef

__all__ = ["GuardedGrad", "GuardedParameter"]

#: untyped: descriptors of the class are looked at, not values
_T: Any = torch.Tensor


def _getters(*names: str) -> list[Any]:
    return [getattr(_T, n).__get__ for n in names if hasattr(_T, n)]


#: What says nothing about the values: runs without waiting.
HARMLESS: frozenset[Any] = frozenset(
    [
        *_getters(
            "shape", "dtype", "device", "requires_grad", "grad", "grad_fn", "is_leaf", "ndim", "layout", "names",
            "_version", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "is_mkldnn", "is_mps",
            "is_xpu", "is_xla", "is_ipu", "is_vulkan", "is_sparse_csr", "itemsize", "nbytes", "output_nr", "retains_grad",
            "_backward_hooks", "_post_accumulate_grad_hooks", "name", "_base", "is_maia", "is_mtia", "is_ort", "is_hpu",
        ),
        _T.requires_grad.__set__, _T.grad.__set__, _T.grad.__delete__, _T._backward_hooks.__set__,
        _T._post_accumulate_grad_hooks.__set__,
        _T.size, _T.stride, _T.numel, _T.nelement, _T.dim, _T.ndimension, _T.element_size, _T.is_floating_point,
        _T.is_complex, _T.is_contiguous, _T.storage_offset, _T.register_hook, _T.register_post_accumulate_grad_hook,
        _T.requires_grad_, _T.__hash__, _T.__len__, _T.get_device, _T.is_signed, _T.is_inference, _T.has_names,
        torch.is_floating_point, torch.is_complex, torch.numel, torch.is_tensor, _T.__dlpack_device__,
        torch.result_type, torch.can_cast, torch.promote_types,
    ]
)  # fmt: skip
_DATA_GET = _T.data.__get__
_DATA_SET = _T.data.__set__
_ALIASES: frozenset[Any] = frozenset(
    [_DATA_GET, _T.data_ptr, _T.untyped_storage, _T.numpy, _T.__dlpack__, _T.__array__]
    + [f for f in (getattr(_T, "storage", None), getattr(_T, "_typed_storage", None)) if f is not None]
)


def _guarded(items: Iterable[Any], kind: type, found: list[Any]) -> list[Any]:
    for item in items:
        if isinstance(item, kind):
            found.append(item)
        elif isinstance(item, (list, tuple)):
            _guarded(item, kind, found)
        elif isinstance(item, dict):
            _guarded(item.values(), kind, found)
    return found


def _living(p: torch.Tensor) -> ParamRef:
    ref = ref_of(p)
    if ref is None:
        raise RuntimeFailure(
            "FN-E104", "the offloaded model of this parameter is gone. Keep the model, or unwrap it first."
        )
    return ref


def _leased(refs: list[ParamRef], func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call, with what autograd saves of the parameters packed as leases."""
    if not refs or not torch.is_grad_enabled():
        return func(*args, **kwargs)
    pair = refs[0].unit.session.leases.pair()
    if pair is None:
        return func(*args, **kwargs)
    try:
        push(*pair)
        return func(*args, **kwargs)
    finally:
        pop()


def _settle_params(refs: list[ParamRef], *, alias: bool = False) -> None:
    for session in dict.fromkeys(ref.unit.session for ref in refs):
        session.access([ref for ref in refs if ref.unit.session is session], alias=alias)


def _settle_grads(args: Iterable[Any]) -> None:
    for g in _guarded(args, GuardedGrad, []):
        ref = ref_of(g)
        if ref is not None:
            ref.unit.session.access_grad(ref)


class GuardedParameter(nn.Parameter):
    """A parameter outside its window."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in HARMLESS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        params = _guarded(kwargs.values(), cls, _guarded(args, cls, []))
        refs = [_living(p) for p in params]
        if func is torch._has_compatible_shallow_copy_type and refs and isinstance(args[1], torch.Tensor):
            # `module.to(...)` and its kin ask before they move a parameter or replace it.
            refs[0].unit.session.check_replacement(refs[0], args[1])
        _settle_params(refs, alias=func in _ALIASES)
        _settle_grads(args)
        if func == _DATA_SET and refs and args and args[0] is params[0]:
            refs[0].unit.session.replace_data(refs[0], args[1])
            return None
        reading = {ref.unit for ref in refs}
        try:
            READING.append(reading)
            with torch._C.DisableTorchFunctionSubclass():
                result = _leased(refs, func, args, kwargs)
                for ref, p in zip(refs, params, strict=True):
                    if p._version != ref.version:
                        ref.unit.session.edited(ref)
        finally:
            READING.remove(reading)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """Return an ordinary, independent parameter on the same device."""
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        copy = nn.Parameter(self.detach().clone(memory_format=torch.preserve_format), self.requires_grad)
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, proto: Any) -> Any:
        """Pickle as an ordinary parameter holding a copy."""
        copy: Any = nn.Parameter(self.detach().clone(), self.requires_grad)
        return copy.__reduce_ex__(proto)

    def __repr__(self) -> str:  # type: ignore[override]
        return "Parameter containing:\n" + repr(self.detach())


class GuardedGrad(torch.Tensor):
    """A gradient in its pinned segment."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in HARMLESS:
            known = recognised(func, args, kwargs, cls)
            if known is not NOTHING:
                return known
            _settle_grads(args)
            _settle_grads(kwargs.values())
            _settle_params([_living(p) for p in _guarded(args, GuardedParameter, [])])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """Return an ordinary, independent tensor."""
        if id(self) not in memo:
            memo[id(self)] = self.detach().clone()
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, proto: Any) -> Any:
        """Pickle as an ordinary tensor."""
        copy: Any = self.detach().clone()
        return copy.__reduce_ex__(proto)


def _known_to_foreach() -> None:
    """Let torch take its foreach paths for guarded tensors, so that norms over them have the bits of ordinary ones."""
    known = getattr(torch.utils._foreach_utils, "_foreach_supported_types", None)
    if isinstance(known, list):
        known.extend(cls for cls in (GuardedParameter, GuardedGrad) if cls not in known)


_known_to_foreach()
