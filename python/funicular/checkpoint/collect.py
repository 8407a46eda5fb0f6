"""What of a model and its optimizer belongs into a checkpoint, and where its bytes are now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from funicular._core import MemoryPlace, SavedTensor, UnitPlace
from funicular.checkpoint.entries import added_entries
from funicular.checkpoint.facts import encode
from funicular.checkpoint.options import encode_options
from funicular.errors import UsageError
from funicular.optim.adamw import AdamW
from funicular.optim.states import ParamStates
from funicular.torch_internals.modules import is_persistent, own_buffers, own_parameters
from funicular.units.dtypes import MOMENTS, SAFETENSORS, is_half, name_of, state_dtype
from funicular.units.param import ref_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from funicular.units.param import PagedParam

__all__ = ["Named", "Snapshot", "config_files", "named_tensors", "states_of"]


class Named(NamedTuple):
    """The model's tensors, each under the first of its names, and the other names; what modules add to their state."""

    params: dict[str, nn.Parameter]
    buffers: dict[str, torch.Tensor]
    aliases: dict[str, str]
    entries: dict[str, Any]


def named_tensors(model: nn.Module) -> Named:
    """Return what ``model.state_dict()`` has, by identity.

    Raises
    ------
    UsageError
        ``FN-E408`` if the model's own ``state_dict()`` fails.
    """
    params: dict[str, nn.Parameter] = {}
    buffers: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for key, p in own_parameters(module).items():
            if p is not None:
                _note(dot + key, p, first, params, aliases)
        for key, b in own_buffers(module).items():
            if b is not None and is_persistent(module, key):
                _note(dot + key, b, first, buffers, aliases)
    return Named(params, buffers, aliases, added_entries(model, {**params, **buffers}, aliases))


def _note(name: str, tensor: Any, first: dict[int, str], found: dict[str, Any], aliases: dict[str, str]) -> None:
    known = first.setdefault(id(tensor), name)
    if known == name:
        found[name] = tensor
    else:
        aliases[name] = known


def states_of(opt: torch.optim.Optimizer, p: torch.Tensor) -> tuple[int, Any]:
    """Return how often a parameter was stepped, and its states.

    Raises
    ------
    UsageError
        ``FN-E408`` for states of another optimizer than AdamW, and for entries of the user's own.
    """
    states = opt.state.get(p)
    if isinstance(states, ParamStates):
        if own := states.own_keys():
            raise UsageError(
                "FN-E408",
                f"optimizer.state of a parameter of shape {tuple(p.shape)} has entries of its own ({', '.join(map(repr, own[:5]))}), "
                "which a checkpoint does not hold. Take them out for the save, and keep them by yourself.",
            )
        return states.count, states if states.begun else {}
    if not states:
        return 0, {}
    unknown = set(states) - {"step", *MOMENTS, "master"}
    if unknown or "exp_avg" not in states:
        raise UsageError(
            "FN-E408",
            f"states of {type(opt).__name__} ({', '.join(sorted(map(str, states)))}) cannot be saved. Save the model alone, "
            "with None for the optimizer, and its state_dict() by yourself.",
        )
    return int(states["step"]), states


class Snapshot:
    """Lists of tensors and facts for the core, and what must stay alive until they were written."""

    def __init__(self, *, fp32: bool, capture: bool, device: torch.device | None) -> None:
        self.fp32 = fp32
        #: copy what other code may edit in place before it is read
        self.capture = capture
        self.device = device
        self.tensors: list[SavedTensor] = []
        self.held: list[tuple[str, torch.Tensor, int]] = []
        self.dtypes: dict[str, str] = {}
        self.edited: list[str] = []
        self.steps: dict[str, int] = {}
        self.known: dict[str, Any] = {}

    def changed(self) -> str | None:
        """Return the name of a tensor that was edited since it was listed."""
        return next((name for name, tensor, version in self.held if tensor._version != version), None)

    def _memory(self, name: str, tensor: torch.Tensor, *, capture: bool = False) -> MemoryPlace:
        # What is written are bytes: a conjugate or a negation that torch has put off is done first.
        tensor = tensor.detach().resolve_conj().resolve_neg()
        if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
            raise UsageError(
                "FN-E408", f"'{name}' is a {type(tensor).__name__} on {tensor.device}: not saved. Convert it."
            )
        on_device = tensor.device.type != "cpu" and tensor.device == self.device
        packed = tensor.contiguous() if on_device else tensor.cpu().contiguous()
        if packed.is_inference() or (capture and packed.data_ptr() == tensor.data_ptr()):
            packed = packed.clone()
        self.held.append((name, packed, packed._version))
        return MemoryPlace(packed.data_ptr(), on_device)

    def param(self, name: str, p: nn.Parameter) -> None:
        """List a parameter."""
        ref = ref_of(p)
        like = p if ref is None else ref.home
        dtype = _dtype(name, like)
        place: UnitPlace | MemoryPlace
        if ref is None:
            place = self._memory(name, p)
        elif like.is_contiguous():
            place = _in_unit(ref, "param")
        else:
            place = self._memory(name, p, capture=True)
        half, rest = None, None
        if self.fp32 and is_half(like.dtype):
            self.dtypes[name] = name_of(like.dtype)
            dtype, half, rest = "F32", name_of(like.dtype), self._rest(name, p, ref)
        self.tensors.append(SavedTensor(name, dtype, like.shape, False, place, half, rest))

    def _rest(self, name: str, p: nn.Parameter, ref: PagedParam | None) -> UnitPlace | MemoryPlace | None:
        """Return where a 16-bit parameter's master has what it has beyond the parameter; None where that is nothing."""
        states = ref.states if ref is not None and ref.states is not None else self.known.get(name)
        if not isinstance(states, ParamStates) or states.count == 0 or states.edited:
            return None
        if ref is not None and states.ref is ref:
            return _in_unit(ref, "master") if p.is_contiguous() else self._memory(name, states.fetched("master"))
        return self._memory(name, states["master"])

    def buffer(self, name: str, b: torch.Tensor) -> None:
        """List a buffer; those are small, and change in any forward."""
        place = self._memory(name, b, capture=self.capture)
        self.tensors.append(SavedTensor(name, _dtype(name, b), b.shape, False, place, None, None))

    def entries(self, entries: dict[str, Any]) -> dict[str, Any]:
        """List the tensors among what modules add to their state; returns their names, and the values of the others."""
        values = {}
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                self.buffer(name, value)
            else:
                values[name] = encode(value, f"'{name}' of the model's state_dict()")
        return {"tensors": [name for name in entries if name not in values], "values": values}

    def states(self, name: str, p: nn.Parameter, count: int, states: Any) -> None:
        """List a parameter's states."""
        self.steps[name] = count
        self.known[name] = states
        if not states:
            return
        ref = ref_of(p)
        ours = isinstance(states, ParamStates)
        within = ref is not None and ours and states.ref is ref
        like = p if ref is None else ref.home
        edited = ours and states.edited
        if ours:
            states.keep_edits()
        if edited:
            self.edited.append(name)
        kinds = (*MOMENTS, "master") if is_half(like.dtype) and not edited and not self.fp32 else MOMENTS
        packed = within and like.is_contiguous()
        place: UnitPlace | MemoryPlace
        for kind in kinds:
            key = f"{name}.{kind}"
            if packed:
                assert ref is not None
                place, dtype = _in_unit(ref, kind), SAFETENSORS[state_dtype(kind, like.dtype)]
            elif ours or kind in states:
                tensor = states.fetched(kind) if within else states[kind]
                place, dtype = self._memory(key, tensor), _dtype(name, tensor)
            else:
                continue
            self.tensors.append(SavedTensor(key, dtype, like.shape, True, place, None, None))

    def groups(self, opt: torch.optim.Optimizer, params: dict[str, nn.Parameter]) -> list[Any]:
        """List the states of all groups; returns the groups' options, with parameters by name."""
        names = {id(p): name for name, p in params.items()}
        if isinstance(opt, AdamW):
            opt.settle()
        groups = []
        for index, group in enumerate(opt.param_groups):
            members = []
            for p in group["params"]:
                name = names.get(id(p))
                if name is None:
                    raise UsageError(
                        "FN-E408",
                        f"group {index} of the optimizer has a parameter of shape {tuple(p.shape)} that is not one of the model's. "
                        "Make it part of the model.",
                    )
                members.append(name)
                self.states(name, p, *states_of(opt, p))
            groups.append({"options": encode_options(opt, group, index), "params": members})
        return groups


def _in_unit(ref: PagedParam, kind: str) -> UnitPlace:
    return UnitPlace(ref.unit.engine_id, ref.section, ref.start, kind)


def _dtype(name: str, tensor: torch.Tensor) -> str:
    if tensor.dtype not in SAFETENSORS:
        raise UsageError("FN-E408", f"'{name}' is {tensor.dtype}, which safetensors does not have. Convert it.")
    return SAFETENSORS[tensor.dtype]


def config_files(model: Any, *, fp32: bool) -> Iterator[tuple[str, bytes]]:
    """Yield what ``from_pretrained`` reads besides the weights."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_json_string"):
        return
    said: dict[str, Any] = {"architectures": [type(model).__name__]}
    dtype = getattr(model, "dtype", None)
    if isinstance(dtype, torch.dtype):
        # What transformers 4.55 and older call it; newer ones have a property of that name.
        key = "torch_dtype" if "torch_dtype" in vars(config) else "dtype"
        said[key] = "float32" if fp32 and is_half(dtype) else name_of(dtype)
    if "_attn_implementation_autoset" in vars(config):
        # As `save_pretrained` does there: what loads the model chooses its attention anew.
        said["_attn_implementation_autoset"] = False
    copy = type(config).from_dict({**config.to_dict(), **said})
    yield "config.json", str(copy.to_json_string()).encode()
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        yield "generation_config.json", str(generation.to_json_string()).encode()
