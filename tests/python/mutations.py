"""Functions of the product that tests replace by name: mechanisms that they break to show that they would notice, and others to strike at."""

from __future__ import annotations

import contextlib
import pkgutil
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed as dist

from funicular.testing import mean_of_pieces as _mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_send = pkgutil.resolve_name("funicular.gradients.arrival.Landing.send")


def _send_late(*args: Any, **kwargs: Any) -> None:
    if dist.get_rank():
        time.sleep(0.02)
    _send(*args, **kwargs)


_note_norm = pkgutil.resolve_name("funicular.gradients.clipping.note_norm")
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
    "swap_ranks": ("funicular.ranks.gradients.mean", lambda pieces, size: _mean([*pieces[1:], pieces[0]], size)),
    "drop_a_rank": ("funicular.ranks.gradients.mean", lambda pieces, size: _mean(pieces[:-1], size)),
    "divide_twice": ("funicular.ranks.gradients.mean", lambda pieces, size: _mean(pieces, size) / size),
    "round_every_sum": ("funicular.ranks.gradients.mean", lambda pieces, size: sum(pieces[1:], pieces[0]) / size),
    "forget_what_was_there": (
        "funicular.ranks.gradients.RankGradients._sum",
        lambda self, ref, one, pieces: _mean(pieces, self._group.size),
    ),
    # No fault: what GPUs do.
    "exchange_early": ("funicular.ranks.gradients._EARLY", frozenset(["cpu", "cuda"])),
    "land_late": ("funicular.gradients.arrival.Landing.send", _send_late),
    "look_early": ("funicular.ranks.gradients.RankGradients._await_landed", lambda self: None),
    "exchange_norms": ("funicular.ranks.norms.DEVICES", frozenset(["cpu", "cuda"])),
    "halve_norms": (
        "funicular.ranks.norms.note_norm",
        lambda ref, grad, home, kind: _note_norm(ref, grad / 2, home, kind),
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
