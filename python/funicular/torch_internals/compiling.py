"""What keeps the runtime's own work out of the graphs of ``torch.compile``.

``Module.compile()`` compiles the call of a module with its hooks. What opens windows cannot be traced: every block would be
torn into pieces around it. So their forward is compiled instead.

``torch._compile._disable_dynamo``: as ``torch.compiler.disable``, without loading the compiler. ``torch._dynamo.trace_rules.add`` and
``torch._dynamo.utils.counters``: in their place nothing, functions of this package would be compiled with the caller's.
``torch._dynamo.config.traceable_tensor_subclasses``: classes of tensors that torch before ``nontraceable_tensor_subclasses`` takes into a graph. In
its place nothing: functions over parameters are compiled in pieces, or not at all, and run as they are.
``torch._dynamo.variables``: ``build_torch_function_fn``, ``UserFunctionVariable``, ``torch._dynamo.export``: how that torch takes a class without an
override, and where it begins to export. In their place: blocks that use weights by functions are not compiled.
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
from funicular.torch_internals.overrides import NO_OVERRIDE

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from torch import nn

__all__ = [
    "captured",
    "compilations",
    "compile_forward",
    "compiling",
    "in_compiled_call",
    "keep_out",
    "not_captured",
    "scripted",
    "traced",
    "untraced",
    "untraced_itself",
]

_F = TypeVar("_F", bound="Callable[..., Any]")
_kept_out: set[str] = set()
#: classes of parameters and gradients
_traced: set[type[torch.Tensor]] = set()
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


def traced(*classes: type[torch.Tensor]) -> None:
    """Have ``torch.compile`` take tensors of these classes into graphs, as it takes those of the classes below them."""
    _traced.update(classes)


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
        config: Any = sys.modules["torch._dynamo"].config
        if not hasattr(config, "nontraceable_tensor_subclasses"):  # later ones take all but those
            config.traceable_tensor_subclasses = config.traceable_tensor_subclasses | _traced
            _allow_no_override()
            _refuse_exports()


def _allow_no_override() -> None:
    """Have classes with the override that is none compiled as those without one; torch looks for the function behind each override."""
    from torch._dynamo import variables

    builder, torch_function = (
        importlib.import_module(f"{variables.__name__}.{name}") for name in ("builder", "torch_function")
    )
    make: Any = variables.UserFunctionVariable
    real: Any = getattr(torch_function, "build_torch_function_fn", None)
    if real is None:
        return

    def build(tx: Any, value: Any, source: Any) -> Any:
        if value.__torch_function__ is NO_OVERRIDE:
            return make(_as_without)
        return real(tx, value, source)

    for room in (torch_function, builder):
        vars(room)["build_torch_function_fn"] = build


def _refuse_exports() -> None:
    """Refuse to export what has windows: this compiler reads the source of modules, and has no word by which a module could know of it."""
    dynamo: Any = sys.modules["torch._dynamo"]
    real = dynamo.export

    @functools.wraps(real)
    def export(f: Any, *args: Any, **kwargs: Any) -> Any:
        if (
            isinstance(f, torch.nn.Module)
            and any(isinstance(p, tuple(_traced)) for p in f.parameters())
            and any(map(_is_hooked, f.modules()))
        ):
            raise not_captured()
        return real(f, *args, **kwargs)

    dynamo.export = export


def _is_hooked(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks.values()
    return any(type(h).__module__.startswith("funicular.") for h in hooks) or any(
        k.startswith("_funicular") for k in vars(module)
    )


def _as_without(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **(kwargs or {}))


# torch.compile is to read it, although it leaves the functions of this package alone.
_as_without.__code__ = _as_without.__code__.replace(co_filename="<funicular>")


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
    return any(_mode_of(key) is not None for key in _recording) and not compiling()


def compiling() -> bool:
    """Whether modes are those of ``torch.compile``, which runs a function's graph over imagined tensors before it runs the graph."""
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
