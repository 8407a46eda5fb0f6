"""Switching off what classes of tensors and modes override: the runtime's own work on parameters asks no guard.

``torch._C.DisableTorchFunctionSubclass`` switches ``__torch_function__`` of classes off, and ``torch._C.DisableTorchFunction`` that of modes
too. torch's documentation of subclasses uses the first; a torch without it has another switch, which goes here.

``torch._C._AutoDispatchBelowADInplaceOrView``: operations record no graph and count no edit. In its place: ``torch.no_grad`` and
``torch.autograd._unsafe_preserve_version_counter``.

``torch._C._disabled_torch_function_impl``: ``__torch_function__`` of a class that overrides nothing. C++ compares with it, so that nothing can
take its place but its new name.

``torch._dynamo.graph_break``: ends a graph with a message; where it takes none (torch 2.4), so does a call of a function that the compiler leaves
alone, whose name is the message. In its place: the graph ends with the compiler's own.

The first three are the classes themselves, without a wrapper: they stand in the hottest paths.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from funicular._core import BoundUnlessAsked
from funicular.torch_internals.questions import calls_in

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["NO_OVERRIDE", "below_autograd", "override", "unguarded", "without_functions"]

unguarded = torch._C.DisableTorchFunctionSubclass
without_functions = torch._C.DisableTorchFunction
below_autograd: Any = torch._C._AutoDispatchBelowADInplaceOrView
NO_OVERRIDE: Any = torch._C._disabled_torch_function_impl


def override(no_graph: str) -> Callable[[Callable[[type, Any, tuple[Any, ...], dict[str, Any]], Any]], Any]:
    """Decorate what is to be a class's ``__torch_function__``; code that only asks whether there is one does not see it.

    Parameters
    ----------
    no_graph : str
        What a caller reads who compiles a function without graph breaks.
    """
    return functools.partial(_override, no_graph)


@functools.cache
def _breaks_with_a_message() -> bool:
    """Whether ``torch._dynamo.graph_break`` takes one, which that of torch 2.4 does not. Looked up in its source: to import it takes a second."""
    spec = importlib.util.find_spec("torch._dynamo")
    source = None if spec is None or spec.origin is None else Path(spec.origin).with_name("decorators.py")
    return source is not None and source.is_file() and "def graph_break(msg" in source.read_text("utf-8")


def _override(no_graph: str, real: Callable[[type, Any, tuple[Any, ...], dict[str, Any]], Any]) -> Any:
    told = _breaks_with_a_message()

    def end() -> None:
        pass

    end.__qualname__ = no_graph

    def __torch_function__(
        cls: type,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if torch.compiler.is_compiling():
            if told:
                torch._dynamo.graph_break(msg=no_graph)
            else:
                end()
                torch._dynamo.graph_break()
        return real(cls, func, args, kwargs or {})

    # torch.compile is to read this function, although it leaves those of this package alone.
    __torch_function__.__code__ = __torch_function__.__code__.replace(co_filename="<funicular>")
    get = BoundUnlessAsked(__torch_function__, NO_OVERRIDE, calls_in)
    # Still a class method: torch.compile looks for one.
    return type("classmethod", (classmethod,), {"__get__": get})(__torch_function__)
