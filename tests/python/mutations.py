"""Functions of the product that tests replace by name: mechanisms that they break to show that they would notice, and others to strike at."""

from __future__ import annotations

import contextlib
import pkgutil
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from funicular.reference import mean_of_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_send = pkgutil.resolve_name("funicular.gradients.arrival.Landing.send")


def _send_late(*args: Any, **kwargs: Any) -> None:
    if dist.get_rank():
        time.sleep(0.02)
    _send(*args, **kwargs)


def _mean(pieces: list[torch.Tensor], size: int) -> torch.Tensor:
    mean = mean_of_ranks([*pieces, *[None] * (size - len(pieces))])
    assert mean is not None
    return mean


def _sums(mean: Callable[[list[torch.Tensor], int], torch.Tensor]) -> Callable[..., list[torch.Tensor]]:
    """Have a rank make its means by a function of the pieces, ascending by rank, and of the number of all ranks."""

    def make(self: Any, engine: Any) -> list[torch.Tensor]:
        found = []
        for dtype, one, mine, others, at, stride in self._parts:
            begins = [at + i * stride for i in range(len(others))]
            nbytes = one.numel * dtype.itemsize
            pieces = {r: self._room[b : b + nbytes].view(dtype) for r, b in zip(others, begins, strict=True)}
            if mine is not None:
                pieces[self._rank] = mine[one.start : one.start + one.numel]
            found.append(mean([pieces[rank] for rank in sorted(pieces)], self._size).to(dtype))
        return found

    return make


_note_norms = pkgutil.resolve_name("funicular.gradients.clipping.note_norms")
_MAKE = "funicular.ranks.means.Means.make"
#: what is replaced, and by what
MUTATIONS: dict[str, tuple[str, Callable[..., Any]]] = {
    "skip_backward_reload": ("funicular.windows.session.Session.open_for_backward", lambda self, unit: True),
    "drop_gradient": ("funicular.gradients.arrival.Landing.send", lambda self, ref, grad, stream: None),
    "wrong_gate": ("funicular.gradients.arrival.Landing.finish", lambda self, stream: self.reap(stream)),
    "add_to_a_copy_of_what_is_held": (
        "funicular.gradients.sums._is_alone",
        lambda ref: ref.grad is not None and ref.param.grad is ref.grad and ref.factor is None,
    ),
    "round_every_slice": ("funicular.micro_batches.block.is_half", lambda dtype: False),
    "skip_random_restore": ("funicular.micro_batches.replay.Randomness._set", lambda self, state: None),
    "keep_what_was_begun": ("funicular.gradients.speculation.Speculation.drop", lambda self, unit: None),
    # For several ranks: what their owners make of the pieces of all.
    "swap_ranks": (_MAKE, _sums(lambda pieces, size: _mean([*pieces[1:], pieces[0]], size))),
    "drop_a_rank": (_MAKE, _sums(lambda pieces, size: _mean(pieces[:-1], size))),
    "divide_twice": (_MAKE, _sums(lambda pieces, size: _mean(pieces, size) / size)),
    "round_every_sum": (_MAKE, _sums(lambda pieces, size: sum(pieces[1:], pieces[0]) / size)),
    "forget_what_was_there": ("funicular.ranks.gradients.RankGradients._sum", lambda self, ref, one, mean: mean),
    # No fault: what GPUs do.
    "exchange_early": ("funicular.ranks.gradients._EARLY", frozenset(["cpu", "cuda"])),
    "little_memory": ("funicular.ranks.gradients.free_memory", lambda device: 0),
    "land_late": ("funicular.gradients.arrival.Landing.send", _send_late),
    "look_early": ("funicular.ranks.gradients.RankGradients._await_landed", lambda self: None),
    "exchange_norms": ("funicular.ranks.norms.DEVICES", frozenset(["cpu", "cuda"])),
    "halve_norms": (
        "funicular.ranks.norms.note_norms",
        lambda leaving, kind: _note_norms([(ref, grad / 2, home) for ref, grad, home in leaving], kind),
    ),
    "never_fill": ("funicular.micro_batches.skip_last._compute", lambda waiting: None),
}


def wrap(patch: pytest.MonkeyPatch, what: str, around: Callable[[Any], Callable[..., Any]]) -> None:
    """Replace one function, given by its dotted name, by what ``around`` makes of it."""
    patch.setattr(what, around(pkgutil.resolve_name(what)))


@contextlib.contextmanager
def break_(what: str) -> Iterator[None]:
    """Break a mechanism within the context, or several, with a + between their names."""
    names = what.split("+")
    if not MUTATIONS.keys() >= set(names):
        msg = f"unknown mechanism in {what!r}; known: {sorted(MUTATIONS)}"
        raise ValueError(msg)
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(*MUTATIONS[name])
        yield
