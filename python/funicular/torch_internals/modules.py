"""What ``nn.Module`` keeps: its tables of parameters, buffers and hooks, and what calls it.

``_parameters``, ``_buffers``, ``_non_persistent_buffers_set``: what is the module's own, by name. In their place:
``named_parameters(recurse=False)``, and ``setattr`` to replace one.

``_call_impl`` and ``_compiled_call_impl``: what ``Module.__call__`` calls, and what ``Module.compile`` puts before it. Hooks, which have public
names, do not hear of Ctrl-C.

``_forward_pre_hooks``, ``_forward_hooks``, what marks some of them, and ``_load_state_dict_pre_hooks``: hooks by key. In their place: the
handles alone.

``_register_load_state_dict_pre_hook``: in its place ``register_load_state_dict_pre_hook``, which 2.4 lacks.

``_save_to_state_dict``, ``_state_dict_hooks``, ``_state_dict_pre_hooks``, ``_metadata`` of a state dictionary and ``Module._version``: what may
add entries to ``state_dict()``. In their place: make one always, and compare.

``_orig_mod`` of what ``torch.compile`` returns: the module that it was given.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = [
    "CALL",
    "adds_entries",
    "call_of",
    "class_call",
    "compiled_call_of",
    "hook_tables",
    "is_persistent",
    "on_load",
    "own_buffers",
    "own_parameters",
    "pre_hooks",
    "set_compiled_call",
    "state_dict_of",
    "uncompiled",
]

#: a module's own parameters and buffers, by name
own_parameters: Callable[[nn.Module], dict[str, Any]] = operator.attrgetter("_parameters")
own_buffers: Callable[[nn.Module], dict[str, Any]] = operator.attrgetter("_buffers")
#: what ``__call__`` calls, and what ``compile`` has put before that
call_of: Callable[[nn.Module], Any] = operator.attrgetter("_call_impl")
compiled_call_of: Callable[[nn.Module], Any] = operator.attrgetter("_compiled_call_impl")
#: the hooks that run before a module's forward, by key
pre_hooks: Callable[[nn.Module], Mapping[int, Any]] = operator.attrgetter("_forward_pre_hooks")
#: attribute of a module under which something else may be called in place of its class's own
CALL = "_call_impl"


def class_call(module: nn.Module) -> Any:
    """Return what the class of a module has under :data:`CALL`."""
    return type(module)._call_impl


def set_compiled_call(module: nn.Module, call: Any) -> None:
    """Put something before what ``__call__`` calls; None takes it away."""
    module._compiled_call_impl = call


def is_persistent(module: nn.Module, buffer: str) -> bool:
    """Whether a buffer of a module belongs into its ``state_dict()``."""
    return buffer not in module._non_persistent_buffers_set


def hook_tables(module: nn.Module) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield the tables of a module's hooks, by key, each with those that mark some of them."""
    yield module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)
    yield module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)
    yield module._load_state_dict_pre_hooks, ()


def on_load(module: nn.Module, hook: Any) -> Any:
    """Register a hook that ``load_state_dict`` runs before it fills a module; returns its handle."""
    hooked: Any = module
    return hooked._register_load_state_dict_pre_hook(hook, with_module=True)


def adds_entries(module: nn.Module) -> bool:
    """Whether a module may add entries to ``state_dict()``: it overrides what makes them, or has hooks that may."""
    cls, own = type(module), module.__dict__
    return (
        cls._save_to_state_dict is not nn.Module._save_to_state_dict
        or cls.get_extra_state is not nn.Module.get_extra_state
        or cls.state_dict is not nn.Module.state_dict
        or bool(own.keys() & {"_save_to_state_dict", "get_extra_state", "state_dict"})
        or bool(module._state_dict_hooks)
        or bool(getattr(module, "_state_dict_pre_hooks", None))
    )


def state_dict_of(model: nn.Module, entries: Mapping[str, Any]) -> Any:
    """Return entries as ``load_state_dict`` takes them, with the versions that a model's modules have."""
    offered: Any = OrderedDict(entries)
    offered._metadata = OrderedDict((name, {"version": m._version}) for name, m in model.named_modules())
    return offered


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` was given, or a module that was not compiled."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, torch.nn.Module) else model
