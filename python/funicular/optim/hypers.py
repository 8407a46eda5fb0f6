"""What a step is to do, as the runtime takes it: its numbers, and the elements that they hold for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from funicular._core import ALIGN_ELEMENTS, Hyper, Span

if TYPE_CHECKING:
    from funicular.optim.states import ParamStates
    from funicular.units.param import PagedParam

__all__ = ["hyper_of", "spans_of"]


def hyper_of(group: dict[str, Any], states: ParamStates, slot: int | None) -> Hyper:
    """Return the numbers with which the next step of a parameter is made; ``slot``: where the factor of its gradient is."""
    beta1, beta2 = group["betas"]
    return Hyper(
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        step=states.count + 1,
        maximize=bool(group["maximize"]),
        slot=slot,
    )


def spans_of(members: list[tuple[PagedParam, ParamStates, int]]) -> list[Span]:
    """Merge neighbours with the same hyperparameters: padding between them is zero and stays zero."""
    #: section, first element, end, which hyperparameters, master starts anew
    merged: list[tuple[int, int, int, int, bool]] = []
    for ref, states, hyper in members:
        # The fp16 master is the weight itself, and starts from it.
        reset = ref.edited or not states.begun
        start, end = ref.start, ref.start + ref.numel
        if merged:
            section, first, last, before, was_reset = merged[-1]
            padded = first + -(-(last - first) // ALIGN_ELEMENTS) * ALIGN_ELEMENTS
            if (section, padded, before, was_reset) == (ref.section, start, hyper, reset):
                merged[-1] = (section, first, end, hyper, reset)
                continue
        merged.append((ref.section, start, end, hyper, reset))
    return [Span(section, start, end - start, hyper, reset) for section, start, end, hyper, reset in merged]
