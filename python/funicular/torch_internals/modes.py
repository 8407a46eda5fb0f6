"""Modes that see every operation, and the stacks that they lie on.

``torch.utils._python_dispatch.TorchDispatchMode``, and of ``torch._C`` the push, pop and length of the stack of such modes and of that of
function modes. They are built in: an interruption strikes before they are called, or after they have done everything. In their place:
entering and leaving the modes, as ``with`` does.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["TorchDispatchMode", "depths", "pop", "pop_functions", "push", "push_functions"]

push, pop = torch._C._push_on_torch_dispatch_stack, torch._C._pop_torch_dispatch_stack
push_functions, pop_functions = torch._C._push_on_torch_function_stack, torch._C._pop_torch_function_stack


def depths() -> tuple[int, int]:
    """How many modes are on this thread's two stacks: those of operations, and those of functions."""
    return torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()
