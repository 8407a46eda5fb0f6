"""The backward under way, hooks of tensors, and transforms of ``torch.func``.

``torch._C._current_graph_task_id``: the number of the backward in which the calling thread is, -1 outside. In its place: hooks on the
outputs and behind the last gradient.

``torch.autograd.graph._engine_run_backward``: the frame in which a thread waits for a backward. Without it such a wait is not told from others.

``Variable._execution_engine.queue_callback``: what runs at the end of a backward; torch's own FSDP and DDP use it.

``torch._C._will_engine_execute_node``: whether the backward under way calls a node. Of a leaf that ``torch.autograd.grad`` is asked about it
raises an error by name. In its place: a hook on the node behind the leaf, which has to be kept.

``torch._C._autograd._get_current_graph_task_keep_graph`` (2.5): whether a backward may be repeated.

``torch._C._functorch``: ``peek_interpreter_stack``, ``is_functorch_wrapped_tensor``, ``get_unwrapped``. ``torch._C._get_tracing_state``: in its
place ``torch.jit.is_tracing``.

``Tensor._backward_hooks``, ``Tensor._post_accumulate_grad_hooks``: a tensor's hooks by key. In their place: the handles alone.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch

from funicular.torch_internals.modes import no_modes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

__all__ = [
    "adds_to",
    "at_end_of_backward",
    "backward_task",
    "graph_is_kept",
    "has_backward_hooks",
    "hooks_of",
    "in_backward",
    "is_wrapped",
    "seen_by_others",
    "unwrapped",
    "waits_for_backward",
]

#: the number of the backward in which the calling thread is; -1 outside
backward_task: Callable[[], int] = torch._C._current_graph_task_id
#: whether a tensor is one that a transform of ``torch.func`` wraps around another, and that other one
is_wrapped: Callable[[torch.Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor
unwrapped: Callable[[torch.Tensor], torch.Tensor] = torch._C._functorch.get_unwrapped
_kept: Callable[[], bool] | None = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)


def in_backward() -> bool:
    """Whether the calling thread runs inside autograd's backward."""
    return backward_task() != -1


class _Told(threading.local):
    """The backward of which this thread was told last whether it adds to gradients, and the answer."""

    task = -1
    adds = True


_told = _Told()


def adds_to(leaf: torch.Tensor) -> bool:
    """Whether the backward under way adds to a leaf's ``grad``.

    That of ``torch.autograd.grad`` does not, though it runs the hooks of a leaf that it is asked about.
    """
    task = backward_task()
    if task == -1:
        return True  # called by hand
    if task != _told.task:
        adds = _is_added_to(leaf)
        if adds is None:
            return False
        _told.task, _told.adds = task, adds
    return _told.adds


def _is_added_to(leaf: torch.Tensor) -> bool | None:
    """Ask autograd about a leaf; None if the backward does not reach it."""
    with torch.inference_mode(mode=False), torch.enable_grad(), no_modes():
        behind = leaf.view_as(leaf).grad_fn
        if behind is None:
            return None  # it was frozen meanwhile
        node: Any = behind.next_functions[0][0]
    try:
        return True if torch._C._will_engine_execute_node(node) else None
    except RuntimeError as error:
        return "autograd.grad()" not in str(error)


def at_end_of_backward(action: Callable[[], None]) -> None:
    """Have something done at the end of the backward under way."""
    torch.autograd.Variable._execution_engine.queue_callback(action)


def waits_for_backward(frame: FrameType | None) -> bool:
    """Whether a thread at this frame has called a backward that is not over, and runs nothing of this package in it."""
    while frame is not None and not frame.f_globals.get("__name__", "").startswith("funicular."):
        if frame.f_code.co_name == "_engine_run_backward":
            return True
        frame = frame.f_back
    return False


def graph_is_kept() -> bool:
    """Whether the backward under way may be repeated; where torch does not say (2.4), what it keeps goes with the graph."""
    return _kept is None or bool(_kept())


def seen_by_others() -> bool:
    """Whether something other than autograd looks at the operations: ``torch.func``, a tracer."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch._C._get_tracing_state() is not None


def has_backward_hooks(tensor: torch.Tensor) -> bool:
    """Whether a tensor has hooks on its gradient."""
    return bool(tensor._backward_hooks)


def hooks_of(p: Any) -> Iterator[dict[int, Any]]:
    """Yield the tables of a parameter's hooks, on its gradient and behind its accumulation."""
    yield from (hooks for hooks in (p._post_accumulate_grad_hooks, p._backward_hooks) if hooks)
