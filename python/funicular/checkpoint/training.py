"""What a checkpoint says of the training, checked as a whole before anything is changed: files are untrusted input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from funicular.checkpoint.facts import check_random_states, decode
from funicular.checkpoint.options import unusable_option
from funicular.errors import StorageError
from funicular.optim.adamw import AdamW
from funicular.optim.load_states import refuse_options
from funicular.units.dtypes import MOMENTS, SAFETENSORS, TRAINED, is_half

if TYPE_CHECKING:
    import torch

    from funicular.checkpoint.collect import Named
    from funicular.checkpoint.source import Source

__all__ = ["check_options", "check_states", "check_training"]

#: steps that a float64 counts exactly
_MOST_STEPS = 2**53
#: names of the formats that have masters
_HALVES = {one.name for dtype, one in TRAINED.items() if is_half(dtype)}
#: formats in which a file may have moments
_MOMENTS_IN = {"F64", *(SAFETENSORS[dtype] for dtype in TRAINED)}
#: what a file of weights alone leaves out
_EXPORTED: dict[str, Any] = {"step": 0, "steps": {}, "edited": [], "dtypes": {}, "tied": {}, "extra": None}


def check_training(source: Source) -> dict[str, Any]:
    """Return what a checkpoint says of the training, once all of it is of the right kind.

    Raises
    ------
    StorageError
        ``FN-E406`` that names what is not.
    """
    said = source.training
    try:
        if "exported_from" in said:
            said = {**_EXPORTED, **said}
        _check(said)
    except (
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        AttributeError,
        RuntimeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise _damaged(source, f"{type(error).__name__}: {str(error)[:300]}") from None
    return said


def _damaged(source: Source, what: str) -> StorageError:
    return StorageError(
        "FN-E406",
        f"{source.path}: what funicular.json says of the training is not what a save writes ({what}). Nothing was loaded. "
        "Load another checkpoint.",
    )


def _check(said: dict[str, Any]) -> None:
    _expect("step", said["step"], _is_count)
    _expect("steps", said["steps"], lambda v: type(v) is dict and all(map(_is_count, v.values())))
    _expect("edited", said["edited"], _are_names)
    _expect("dtypes", said["dtypes"], lambda v: type(v) is dict and set(v.values()) <= _HALVES)
    _expect("tied", said["tied"], lambda v: type(v) is dict and _are_names(list(v.values())))
    groups = said.get("groups")
    _expect("groups", groups, lambda v: v is None or type(v) is list)
    for index, group in enumerate(groups or []):
        _expect(f"group {index}", group["params"], _are_names)
        _expect(
            f"the options of group {index}", decode(group["options"]), lambda v: type(v) is dict and "params" not in v
        )
    decode(said["extra"])
    if "random" in said or "exported_from" not in said:
        check_random_states(said["random"])


def _expect(what: str, value: Any, right: Any) -> None:
    if not right(value):
        raise ValueError(f"{what} is {str(value)[:100]}")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST_STEPS


def _are_names(value: Any) -> bool:
    return type(value) is list and all(type(name) is str for name in value)


def check_states(source: Source, named: Named, groups: list[list[str]]) -> None:
    """Compare the optimizer's tensors with the parameters that were stepped.

    Raises
    ------
    StorageError
        ``FN-E406`` for states that are missing or of another shape.
    """
    steps = source.training.get("steps", {})
    for name in (name for group in groups for name in group if steps.get(name, 0)):
        shape = tuple(named.params[name].shape)
        for kind in MOMENTS:
            found = source.optimizer.get(f"{name}.{kind}")
            if found is None or found.shape != shape or found.dtype not in _MOMENTS_IN:
                has = "missing" if found is None else f"{found.dtype} {list(found.shape)}, not {list(shape)}"
                raise _damaged(source, f"'{name}' has had {steps[name]} steps, and '{name}.{kind}' is {has}")
        rest = source.optimizer.get(f"{name}.master")
        if rest is not None and rest.shape != shape:
            raise _damaged(source, f"'{name}.master' is {list(rest.shape)}, not {list(shape)}")


def check_options(source: Source, opt: torch.optim.Optimizer) -> None:
    """Look whether the optimizer can step with the groups' options.

    Raises
    ------
    StorageError
        ``FN-E406`` for an option that no step can use.
    UsageError
        ``FN-E117`` for one that ``funicular.AdamW`` does not support.
    """
    for index, saved in enumerate(source.training["groups"]):
        options = decode(saved["options"])
        if (why := unusable_option(opt, options)) is not None:
            raise _damaged(source, f"{why} of group {index}")
        if isinstance(opt, AdamW):
            refuse_options(options)
