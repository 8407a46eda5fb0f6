"""Functions of torch's by what they ask of a parameter or a gradient."""

from __future__ import annotations

from typing import Any

import torch

from funicular.torch_internals.operations import (
    EDITING_EACH,
    FOREACH_MUL,
    FOREACH_NORM,
    SAYING_NOTHING,
    TYPED_STORAGE,
    USE_COUNT,
    ZEROING,
    schemas_of,
)

__all__ = [
    "BACKWARDS",
    "BY_TENSOR",
    "CLIPPING",
    "CONSTANT",
    "DATA_GET",
    "DATA_SET",
    "GRADIENTS",
    "HARMLESS",
    "ITSELF",
    "NUMPY",
    "RAW",
    "RESHAPING",
    "TAKING",
    "edits",
    "written",
]

#: untyped: descriptors of the class are looked at, not values
_T: Any = torch.Tensor


def _getters(*names: str) -> list[Any]:
    return [getattr(_T, n).__get__ for n in names if hasattr(_T, n)]


#: What says nothing about the values: runs without waiting.
HARMLESS: frozenset[Any] = frozenset(
    [
        *_getters(
            "shape", "dtype", "device", "requires_grad", "grad", "grad_fn", "is_leaf", "ndim", "layout", "names",
            "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "is_mkldnn", "is_mps",
            "is_xpu", "is_xla", "is_ipu", "is_vulkan", "is_sparse_csr", "itemsize", "nbytes", "output_nr", "retains_grad",
            "name", "is_maia", "is_mtia", "is_ort", "is_hpu",
        ),
        *SAYING_NOTHING, _T.requires_grad.__set__, _T.grad.__set__, _T.grad.__delete__,
        _T.size, _T.stride, _T.numel, _T.nelement, _T.dim, _T.ndimension, _T.element_size, _T.is_floating_point,
        _T.is_complex, _T.is_contiguous, _T.storage_offset, _T.register_hook, _T.register_post_accumulate_grad_hook,
        _T.requires_grad_, _T.__hash__, _T.__len__, _T.get_device, _T.is_signed, _T.is_inference, _T.has_names,
        torch.is_floating_point, torch.is_complex, torch.numel, torch.is_tensor, _T.__dlpack_device__,
        torch.result_type, torch.can_cast, torch.promote_types,
    ]
)  # fmt: skip
#: What reads, sets or clears a parameter's gradient. Two threads that do this at once may end the process in torch: one after the other.
GRADIENTS: frozenset[Any] = frozenset([_T.grad.__get__, _T.grad.__set__, _T.grad.__delete__])
DATA_GET = _T.data.__get__
DATA_SET = _T.data.__set__


def _known(*names: str) -> list[Any]:
    return [getattr(_T, n) for n in names if hasattr(_T, n)]


NUMPY: frozenset[Any] = frozenset([_T.numpy, _T.__array__])
_STORAGES: frozenset[Any] = frozenset(_known("untyped_storage", "storage", TYPED_STORAGE))
#: What gives out the memory itself, past all that torch counts.
RAW: frozenset[Any] = frozenset([DATA_GET, _T.data_ptr, _T.__dlpack__, *NUMPY, *_STORAGES])
#: What has the same result on a tensor that needs no gradient.
CONSTANT: frozenset[Any] = frozenset(
    [DATA_GET, *_STORAGES, *_known("detach", "data_ptr", "item", "tolist", "__bool__", "equal", "isfinite", "isnan")]
)
#: What asks for the parameter itself: its place in autograd, or an error that says that it has one.
ITSELF: frozenset[Any] = frozenset([_T.__dlpack__, *NUMPY, *_known("retain_grad", "backward", "detach_", "is_shared")])
#: What would give a parameter another memory or another shape, in place.
RESHAPING = (
    USE_COUNT, "as_strided_", "rename_", "resize_", "resize_as_", "share_memory_", "squeeze_", "swapaxes_", "swapdims_",
    "t_", "transpose_", "unsqueeze_",
)  # fmt: skip
#: What a gradient's place must not be given out for: the gradient moves to ordinary memory before.
TAKING: frozenset[Any] = frozenset([_T.data_ptr, _T.__dlpack__, *NUMPY, *_STORAGES, DATA_SET, *_known(*RESHAPING)])
#: What ``clip_grad_norm_`` and ``zero_grad`` consist of.
CLIPPING: frozenset[Any] = frozenset([FOREACH_NORM, FOREACH_MUL, torch.linalg.vector_norm, _T.mul_, *ZEROING])
#: What edits each tensor of its first argument, a list, by itself, and returns nothing.
BY_TENSOR: frozenset[Any] = frozenset(EDITING_EACH)
#: What runs a backward, and frees what was saved for it: it cannot be run again.
BACKWARDS: frozenset[Any] = frozenset([_T.backward, torch.autograd.backward, torch.autograd.grad])


def edits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Arguments that a call is going to edit, as far as that is known before it; for those who refuse it."""
    found = [*written(func, args, kwargs), *([kwargs["out"]] if "out" in kwargs else [])]
    return [*found, args[0]] if func is _T.__setitem__ or func == DATA_SET else found


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Arguments that an operation says it writes to."""
    schemas = schemas_of(func)
    if schemas is None:
        name = getattr(func, "__name__", "")
        return [args[0]] if args and name.endswith("_") and not name.endswith("__") else []
    names = {(i, a.name) for s in schemas for i, a in enumerate(s.arguments) if a.alias_info and a.alias_info.is_write}
    return [args[i] for i, _ in names if i < len(args)] + [kwargs[n] for _, n in names if n in kwargs]
