"""Modes that see every operation, and the stacks that they lie on.

``torch.utils._python_dispatch.TorchDispatchMode``, and of ``torch._C`` the push, pop and length of the stack of such modes and of that of
function modes. They are built in: an interruption strikes before they are called, or after they have done everything. In their place:
entering and leaving the modes, as ``with`` does. ``_disable_current_modes`` and ``torch._C.DisableTorchFunction`` take all modes off for a
while.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["TorchDispatchMode", "depths", "no_modes", "pop", "pop_functions", "push", "push_functions"]

push, pop = torch._C._push_on_torch_dispatch_stack, torch._C._pop_torch_dispatch_stack
push_functions, pop_functions = torch._C._push_on_torch_function_stack, torch._C._pop_torch_function_stack


def depths() -> tuple[int, int]:
    """How many modes are on this thread's two stacks: those of operations, and those of functions."""
    return torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()


@contextlib.contextmanager
def no_modes() -> Iterator[None]:
    """Have operations of this thread seen by no mode: for a finalizer, which the garbage collector may run amid the caller's mode."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield
