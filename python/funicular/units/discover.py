"""Finding the units of a model: the blocks of the largest ModuleList, the rest grouped."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from funicular import _core
from funicular.errors import UsageError
from funicular.units.classes import is_dtensor, pageable
from funicular.units.dtypes import TRAINED, name_of

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Found", "describe", "find_units"]


class Found(NamedTuple):
    """A unit: its name, its named parameters, and the modules whose forward uses them."""

    name: str
    params: list[tuple[str, nn.Parameter]]
    modules: list[nn.Module]


def find_units(model: nn.Module, patterns: list[str], *, plan: bool = False) -> list[Found]:
    """Cut a model into units.

    Parameters
    ----------
    model : nn.Module
        The model, on any device; on meta only to plan it.
    patterns : list of str
        Glob patterns of the names of modules that are units; empty: the blocks of the largest ``ModuleList``
        or ``Sequential``.
    plan : bool
        Nothing is going to be paged, so parameters need no weights.

    Raises
    ------
    UsageError
        ``FN-E123`` for TorchScript modules, ``FN-E111`` for parameters without weights, ``FN-E112`` for types and layouts that
        cannot be paged, ``FN-E113`` for parameters that share storage.
    """
    if not plan:
        _check_modules(model)
    names = _parameter_names(model, plan=plan)
    if not plan:
        _check_storages(names)
    blocks = _named_blocks(model, patterns) if patterns else _largest_list(model)
    found: list[Found] = []
    taken: set[int] = set()
    rest: list[tuple[str, nn.Parameter]] = []
    # In the order of the model, so that neighbours in use are neighbours in the ring.
    block_of = {id(p): i for i, (_, block) in reversed(list(enumerate(blocks))) for p in block.parameters()}
    done: set[int] = set()
    for name, p in names:
        index = block_of.get(id(p))
        if index is None:
            rest.append((name, p))
        elif index not in done:
            found.extend(_group(rest, taken))
            rest = []
            done.add(index)
            block_name, block = blocks[index]
            params = [(n, q) for n, q in names if block_of.get(id(q)) == index and id(q) not in taken]
            taken.update(id(q) for _, q in params)
            found.append(Found(block_name, params, [block]))
    found.extend(_group(rest, taken))
    return found


def describe(name: str, p: nn.Parameter, dtype: torch.dtype) -> _core.Param:
    """Describe a parameter in some format to the core."""
    return _core.Param(name, p.numel(), name_of(dtype), dtype.itemsize, p.requires_grad)


def _check_modules(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and next(module.parameters(), None) is not None:
            raise UsageError(
                "FN-E123",
                f"'{name or type(module).__name__}' is a TorchScript module, which uses its weights where no hook sees it. Offload "
                "the module that it was made from, or keep it out of the model that is offloaded.",
            )


def _parameter_names(model: nn.Module, *, plan: bool) -> list[tuple[str, nn.Parameter]]:
    names = []
    for name, p in model.named_parameters():
        if not (plan and p.is_meta):
            _check(name, p)
        if pageable(p):
            names.append((name, p))
    return names


def _check(name: str, p: nn.Parameter) -> None:
    if is_dtensor(p):
        raise UsageError(
            "FN-E112",
            f"'{name}' is a DTensor, which is distributed over processes. Offload a model of ordinary parameters: "
            "fully_shard, parallelize_module and distribute_tensor cannot be combined with funicular.",
        )
    if nn.parameter.is_lazy(p):
        raise UsageError("FN-E112", f"'{name}' is not initialised yet. Run one forward before offloading.")
    if p.is_meta:
        raise UsageError(
            "FN-E111",
            f"'{name}' is on the meta device and has no weights to load. Materialise the model (to_empty and an "
            "initialisation, or from_pretrained) before offloading.",
        )
    if not p.is_leaf:
        raise UsageError("FN-E112", f"'{name}' is computed from other tensors. Make it an nn.Parameter of its own.")
    if not pageable(p):
        return  # it stays where it is
    if p.is_inference():
        raise UsageError(
            "FN-E112",
            f"'{name}' was made under torch.inference_mode() and cannot be trained. Make the model outside of it, or offload "
            "copy.deepcopy(model), made outside of it: the copy has ordinary parameters.",
        )
    if p.layout != torch.strided:
        raise UsageError("FN-E112", f"'{name}' has layout {p.layout}; only dense parameters can be paged.")
    if p.requires_grad and p.dtype not in TRAINED:
        raise UsageError(
            "FN-E112",
            f"'{name}' is trained in {p.dtype}, which AdamW has no kernel for. Use float32, bfloat16 or float16, or freeze it.",
        )
    if p.numel() > 0 and not _dense(p):
        raise UsageError(
            "FN-E113",
            f"'{name}' is a slice with gaps, is expanded or overlaps itself (shape {tuple(p.shape)}, strides {p.stride()}). Make it of "
            "tensor.contiguous().",
        )


def _dense(p: torch.Tensor) -> bool:
    """Whether every element has its own place and no place is skipped."""
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(p.stride(), p.shape, strict=True) if sz > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _check_storages(names: list[tuple[str, nn.Parameter]]) -> None:
    seen: dict[int, list[tuple[int, int, str]]] = {}
    for name, p in names:
        if p.numel() == 0:
            continue
        storage = p.untyped_storage()
        start = int(p.storage_offset()) * p.element_size()
        seen.setdefault(storage.data_ptr(), []).append((start, start + p.numel() * p.element_size(), name))
    for ranges in seen.values():
        ranges.sort()
        for (_, end, a), (start, _, b) in itertools.pairwise(ranges):
            if start < end:
                raise UsageError(
                    "FN-E113",
                    f"'{a}' and '{b}' share memory without being the same parameter. Tie them by assigning one parameter to "
                    "both modules, or give one its own memory with .clone().",
                )


def _largest_list(model: nn.Module) -> list[tuple[str, nn.Module]]:
    best: list[tuple[str, nn.Module]] = []
    best_size = 0
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1:
            blocks = [(f"{name}.{n}" if name else n, child) for n, child in module.named_children()]
            size = sum(p.numel() for p in module.parameters())
            # The outermost list wins over the lists inside its blocks.
            if size > best_size:
                best, best_size = blocks, size
    return best


def _named_blocks(model: nn.Module, patterns: list[str]) -> list[tuple[str, nn.Module]]:
    blocks: list[tuple[str, nn.Module]] = []
    named = list(model.named_modules())
    for (name, module), matches in zip(named, _core.match_names(patterns, [name for name, _ in named]), strict=True):
        inside = any(name.startswith(f"{outer}.") for outer, _ in blocks)
        if name and not inside and matches:
            blocks.append((name, module))
    if not blocks:
        raise UsageError(
            "FN-E506",
            f"no module matches units.match = {patterns}. Names of modules look like "
            f"{[n for n, _ in list(model.named_modules())[1:6]]}.",
        )
    return blocks


def _group(rest: list[tuple[str, nn.Parameter]], taken: set[int]) -> Iterator[Found]:
    group: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, p in rest:
        if id(p) in taken:
            continue
        taken.add(id(p))
        bytes_ = p.numel() * p.element_size()
        # So that one tensor is never paged for another's sake.
        if group and size + bytes_ > _core.REST_BYTES:
            yield Found(group[0][0], group, [])
            group, size = [], 0
        group.append((name, p))
        size += bytes_
    if group:
        yield Found(group[0][0], group, [])
