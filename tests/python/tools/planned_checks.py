"""What ranks run in tests of ``funicular plan``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

import funicular


def trained(source: str, policy: dict[str, Any]) -> tuple[funicular.Stats, funicular.Stats]:
    """Figures of a rank before and after four steps of the model that ``source`` builds."""
    space: dict[str, Any] = {}
    exec(source, space)
    model = funicular.offload(space["build"](), policy)
    opt = funicular.AdamW(model.parameters(), lr=1e-3)
    x = torch.randint(0, 1000, (4, 8), generator=torch.Generator().manual_seed(dist.get_rank()))

    def steps(n: int) -> funicular.Stats:
        for _ in range(n):
            model(x).square().mean().backward()
            opt.step()
            opt.zero_grad()
        # What all ranks make is made.
        for p in model.parameters():
            p.detach().sum()
        return funicular.stats(model)

    return steps(3), steps(4)
