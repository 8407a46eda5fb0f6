"""Budgets of several models that one process offloads: each keeps to its own, so that the same sizes for two are counted twice."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from funicular.windows.shutdown import living

if TYPE_CHECKING:
    import torch

    from funicular.policy import Policy
    from funicular.windows.session import Session

__all__ = ["counted_twice", "warn_of_equal_budgets"]

_log = logging.getLogger("funicular")
_TIERS = ("hbm", "host", "nvme")


def counted_twice(policy: Policy, device: torch.device | None, other: Session) -> str:
    """Name the sizes that a policy and that of an offloaded model have in common, if all of their sizes are the same.

    Parameters
    ----------
    device : torch.device or None
        Where the policy's model computes, if that is known: memory of two GPUs is not counted twice.
    other : Session
        The session of the offloaded model.

    Returns
    -------
    str
        Such as ``"budget.hbm = 18GiB, budget.host = 48GiB"``; empty where nothing is counted twice. ``"auto"`` is not: it is what the
        machine has left.
    """
    mine, its = ([str(getattr(p.budget, tier)) for tier in _TIERS] for p in (policy, other.policy))
    if mine != its:
        return ""
    apart = device is not None and device != other.device
    sizes = {tier: size for tier, size in zip(_TIERS, mine, strict=True) if size != "auto"}
    return ", ".join(f"budget.{tier} = {size}" for tier, size in sizes.items() if not (apart and tier == "hbm"))


def warn_of_equal_budgets(session: Session) -> None:
    """Say that another offloaded model of this process has the same budgets (``FN-W212``), such as those of the same file."""
    for other in list(living):
        model = None if other.held is None else other.held.model()
        if other is session or other.closed or model is None:
            continue
        sizes = counted_twice(session.policy, session.device, other)
        if sizes:
            _log.warning(
                "FN-W212 another model of this process (%s) was offloaded with the same budgets, and each keeps to its own: %s may be "
                "taken twice. To have both keep to one policy, divide it before they are offloaded: mine, its = "
                "funicular.integrations.policies.divided(policy, model, other).",
                type(model).__name__,
                sizes,
            )
            return
