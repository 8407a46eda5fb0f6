"""What a step can use as an optimizer state: its checks, and copies of values for other owners."""

from __future__ import annotations

from typing import Any

import torch

from funicular.errors import UsageError
from funicular.homes.digests import digest
from funicular.units.dtypes import MOMENTS, TRAINED, state_dtype
from funicular.units.param import ref_of

__all__ = [
    "Unusable",
    "as_torch_loads",
    "blank",
    "cloned",
    "content",
    "fits",
    "packed",
    "step_count",
    "usable",
]


class Unusable(UsageError):
    """A state that the next step cannot use. Nothing was changed.

    Attributes
    ----------
    key : str
        Which entry of ``optimizer.state[param]``.
    why : str
        What is wrong with it.
    """

    def __init__(self, param: torch.Tensor, key: str, why: str, name: str | None = None) -> None:
        if name is None:
            ref = ref_of(param)
            name = f"a parameter of shape {tuple(param.shape)}" if ref is None else f"'{ref.name}'"
        self.param, self.key, self.why = param, key, why
        super().__init__(
            "FN-E130",
            f"the optimizer's state of {name}: '{key}' {why}. Put it right in optimizer.state, or start this parameter's states "
            "anew with optimizer.state.pop(param). Nothing was stepped.",
        )


def blank(param: torch.Tensor, name: str, device: torch.device | str) -> torch.Tensor:
    """Return a state of zeros with a parameter's shape and strides."""
    # The caller may be in inference mode; the states are no inference tensors.
    with torch.inference_mode(mode=False), torch.no_grad():
        return torch.empty_strided(
            param.size(), param.stride(), dtype=state_dtype(name, param.dtype), device=device
        ).zero_()


def packed(param: torch.Tensor, name: str, value: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Return a copy of a state as the runtime and the kernels take it: its own type, the parameter's strides."""
    with torch.inference_mode(mode=False), torch.no_grad():
        return blank(param, name, device).copy_(value)


def fits(param: torch.Tensor, name: str, value: torch.Tensor) -> bool:
    """Whether a tensor can be updated in place beside its parameter."""
    return (
        value.layout == torch.strided
        and value.shape == param.shape
        and value.dtype == state_dtype(name, param.dtype)
        and value.device == param.device
        and (value.stride() == param.stride() or param.numel() <= 1)
        and not value.is_inference()
    )


def usable(param: torch.Tensor, key: str, value: Any, *, cast: bool = False) -> torch.Tensor:
    """Return a state if a step can use it.

    Parameters
    ----------
    cast : bool
        Any floating-point type will do for a moment, as when torch loads states; else one that fp32 holds exactly.

    Raises
    ------
    Unusable
        For another shape, a type that cannot be converted, or a tensor without memory on the host or the parameter's device.
    """
    if not isinstance(value, torch.Tensor):
        raise Unusable(param, key, f"is a {type(value).__name__}, not a tensor")
    if value.layout != torch.strided or value.is_meta or value.device.type not in ("cpu", param.device.type):
        raise Unusable(
            param, key, f"is a {value.layout} tensor on {value.device}, not a dense one beside the parameter"
        )
    if value.shape != param.shape:
        raise Unusable(param, key, f"has the shape {tuple(value.shape)}, the parameter {tuple(param.shape)}")
    right = state_dtype(key, param.dtype)
    # What is trained is what fp32 holds exactly.
    if value.dtype == right or (key in MOMENTS and (value.is_floating_point() if cast else value.dtype in TRAINED)):
        return value
    raise Unusable(param, key, f"is of {value.dtype}, which does not become {right} without loss")


def step_count(param: torch.Tensor, value: Any) -> int:
    """Return the number of steps that a value of ``"step"`` says.

    Raises
    ------
    Unusable
        For anything but one whole number that is not negative.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise Unusable(param, "step", f"is {value!r}, not a number") from None
    if not 0 <= number < 2**53 or number != int(number):
        raise Unusable(param, "step", f"is {number}, not a whole number of steps")
    return int(number)


def content(param: torch.Tensor, tensor: torch.Tensor) -> tuple[int, tuple[int, ...], torch.dtype]:
    """Return what changes with any edit of a tensor: a digest of its bytes, its shape and its type."""
    plain = tensor.detach()
    if plain.stride() != param.stride() or plain.shape != param.shape:
        plain = plain.contiguous()
    return digest(plain), tuple(tensor.shape), tensor.dtype


def as_torch_loads(param: torch.Tensor, value: Any) -> Any:
    """Return a copy of an entry of the user's own; tensors get the parameter's type and device, as torch has it."""
    if isinstance(value, torch.Tensor):
        dtype = param.dtype if param.is_floating_point() else value.dtype
        return value.detach().to(device="cpu" if param.is_meta else param.device, dtype=dtype, copy=True)
    if isinstance(value, dict):
        return {key: as_torch_loads(param, v) for key, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(as_torch_loads(param, v) for v in value)
    return value


def cloned(value: Any) -> Any:
    """Return a value with copies of its tensors, within dicts, lists and tuples too; other objects are the same ones."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) is dict:
        return {key: cloned(v) for key, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(cloned(v) for v in value)
    return value
