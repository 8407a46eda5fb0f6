"""Where code asks torch whether a tensor has an override, to choose between two ways of its own.

``nn.TransformerEncoder`` takes its fast path, with other values in padded rows, only where no weight has one. The guard of a
parameter only waits: to such a question the answer is no, as for an ordinary parameter.

``has_torch_function`` and its two variants of ``torch.overrides``, by name in the byte code of those who ask. In their place: the guard is told of,
and fast paths of torch are not taken.
"""

from __future__ import annotations

import dis
import functools
import itertools
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from types import CodeType

__all__ = ["calls_in"]

_QUESTIONS = frozenset({"has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"})


@functools.cache
def calls_in(code: CodeType) -> frozenset[int]:
    """Return the offsets at which code calls one of torch's questions, as far as that is plain from the code.

    Where the arguments contain jumps it is not: such code is told of the guard, as before.
    """
    instructions = list(dis.get_instructions(code))
    return frozenset(
        offset for i, it in enumerate(instructions) if it.argval in _QUESTIONS for offset in _call_of(instructions, i)
    )


def _call_of(instructions: list[dis.Instruction], loaded: int) -> list[int]:
    """Return the offsets of the call of what one instruction loads.

    It is the first call after which the stack is no higher than before its arguments. Python 3.11 makes some calls at the
    instruction before that, once it has run the code often.
    """
    height = 0
    for before, it in itertools.pairwise(instructions[loaded:]):
        if it.opcode in dis.hasjrel or it.opcode in dis.hasjabs or it.opname.startswith(("YIELD", "RETURN")):
            return []
        height += dis.stack_effect(it.opcode, it.arg if it.opcode >= dis.HAVE_ARGUMENT else None, jump=False)
        if it.opname.startswith("CALL") and height <= 0:
            return [it.offset, before.offset] if before.opname == "PRECALL" else [it.offset]
    return []


# Known from the start: a signal that struck while torch asks for the first time would be lost.
for _module in (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention):
    calls_in(_module.forward.__code__)
