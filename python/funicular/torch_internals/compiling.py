"""What keeps the runtime's own work out of the graphs of ``torch.compile``.

``Module.compile()`` compiles the call of a module with its hooks. What opens windows cannot be traced: every block would be
torn into pieces around it. So their forward is compiled instead.

``torch._compile._disable_dynamo``: as ``torch.compiler.disable``, without loading the compiler. ``torch._dynamo.trace_rules.add`` and
``torch._dynamo.utils.counters``: in their place nothing, functions of this package would be compiled with the caller's.
``torch._dynamo.eval_frame._TorchDynamoContext``: what ``Module.compile`` was asked for. Without it a warning says what to write.
``torch._C._get_tracing_state``: in its place ``torch.jit.is_tracing``.
``torch._C._get_dispatch_mode`` and ``_TorchDispatchModeKey``: whether operations are recorded (``make_fx``) or only imagined
(``FakeTensorMode``). In their place nothing: torch's own error of such modes.
``torch._guards.TracingContext``: whether such modes are ``torch.compile``'s own. In its place nothing.
``torch/jit/_recursive.py``: the file of ``torch.jit.script`` that asks a module's hooks for their names. In its place: torch's own error.
``torch.compiler.is_exporting`` is public, and 2.4 lacks it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import logging
import sys
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch._compile
import torch.compiler

from funicular.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from torch import nn

__all__ = [
    "captured",
    "compilations",
    "compile_forward",
    "in_compiled_call",
    "keep_out",
    "not_captured",
    "scripted",
    "untraced",
    "untraced_itself",
]

_F = TypeVar("_F", bound="Callable[..., Any]")
_kept_out: set[str] = set()
#: torch 2.4 cannot tell
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", bool)
#: where the wrapper of compiled functions lies
_WRAPPER = "torch/_dynamo/eval_frame.py"
#: where ``torch.jit.script`` looks at hooks
_SCRIPTS = "torch/jit/_recursive.py"
_log = logging.getLogger("funicular")
_tracing: Any = getattr(torch._guards, "TracingContext", None)
_mode_of: Callable[[Any], Any] = getattr(torch._C, "_get_dispatch_mode", lambda key: None)
_recording: list[Any] = [
    key
    for name in ("FAKE", "PROXY")
    if (key := getattr(getattr(torch._C, "_TorchDispatchModeKey", None), name, None)) is not None
]


def untraced(function: _F) -> _F:
    """Keep a function, and what it calls, out of every graph: what it does happens at each call."""
    disable: Any = torch._compile._disable_dynamo
    return cast("_F", disable(function))


def keep_out(*, load: bool = False) -> None:
    """Have ``torch.compile`` leave the functions of this package alone: none is compiled, none becomes part of a graph.

    ``load`` loads the compiler for that, as the first forward would: a model that is compiled as a whole is traced before that.
    """
    if "funicular" in _kept_out:
        return
    if load:
        with contextlib.suppress(ImportError):
            importlib.import_module("torch._dynamo.trace_rules")
    rules: Any = sys.modules.get("torch._dynamo.trace_rules")
    if rules is not None:
        rules.add("funicular")
        _kept_out.add("funicular")


def untraced_itself(function: _F) -> _F:
    """Keep a function out of every graph, but not what it calls; it is refused where torch would make a program of the model.

    Raises
    ------
    UsageError
        ``FN-E126`` under ``torch.export``, ``torch.jit.trace``, ``make_fx`` and ``FakeTensorMode``.
    """
    disable: Any = torch._compile._disable_dynamo
    disabled = disable(function, recursive=False)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if captured():
            raise not_captured()
        return disabled(*args, **kwargs)

    return cast("_F", call)


def captured() -> bool:
    """Whether this thread runs a model in order to make a program of it that outlives the call."""
    if torch._C._get_tracing_state() is not None or _is_exporting():
        return True
    return any(_mode_of(key) is not None for key in _recording) and not _compiling()


def _compiling() -> bool:
    """Whether the modes are those of ``torch.compile``, which runs a function's graph over imagined tensors before it runs the graph."""
    return _tracing is not None and _tracing.try_get() is not None


def scripted() -> bool:
    """Whether what called the caller is ``torch.jit.script``, which reads the source of modules and of their hooks."""
    return sys._getframe(2).f_code.co_filename.endswith(_SCRIPTS)


def not_captured() -> UsageError:
    """Return what is raised then: the program would keep the addresses of weights that move, or copies of none."""
    return UsageError(
        "FN-E126",
        "an offloaded model cannot be traced or exported: the program would read its weights past the runtime. Export "
        "copy.deepcopy(model), which is an ordinary model, or call funicular.unwrap(model) first.",
    )


def compilations() -> int:
    """How many frames ``torch.compile`` has compiled in this process so far."""
    utils: Any = sys.modules.get("torch._dynamo.utils")
    return 0 if utils is None else int(utils.counters["frames"]["total"])


def compile_forward(module: nn.Module, compiled: Any) -> bool:
    """Compile a module's forward in place of its call, with the backend and options of ``compiled``; False if that fails."""
    context = _context(compiled)
    if context is None:
        _log.warning(
            "%s was compiled with .compile(), which takes the runtime's hooks into the graph: slow. Use "
            "block.forward = torch.compile(block.forward).",
            type(module).__name__,
        )
        return False
    module.forward = context(module.forward)
    return True


def _context(compiled: Any) -> Any:
    """Return what ``torch.compile`` made with its options, which compiles any function; None if this torch hides it."""
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")
    kind = getattr(dynamo, "_TorchDynamoContext", None)
    context = inspect.getclosurevars(compiled).nonlocals.get("self") if inspect.isfunction(compiled) else None
    return context if kind is not None and isinstance(context, kind) else None


def in_compiled_call() -> bool:
    """Whether a function that was given to ``torch.compile`` has called this one: a frame of its wrapper did."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith(_WRAPPER):
            return True
        frame = frame.f_back
    return False
