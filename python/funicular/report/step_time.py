"""The time of a step: compute, stalls by cause, and what binds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from funicular._core import _Raw

__all__ = ["StepTime", "step_time"]

#: Of a step's time: where stalls are less, it is bound by compute.
COMPUTE_BOUND = 0.05
#: Of a step's time: where updates are waited for longer, copies are late because updates are.
CHAINED = 0.01

#: What a wait is for tells which resource is late, but for updates: they pass through several.
_RESOURCES = {
    "nvme_read": "nvme_read",
    "nvme_write": "nvme_write",
    "copy": "host_to_device",
    "grads": "device_to_host",
}
_UPDATE_STAGES = ("cpu_update", "gpu_update", "nvme_read", "nvme_write")


@dataclass(frozen=True)
class StepTime:
    """What the time of a step went to, in seconds. Compute and stalls are the compute stream's own: on a GPU by its timestamps."""

    #: from the end of the step before to its own, by the host's clock
    seconds: float
    #: what the compute stream did not wait for the runtime: kernels, and all that the program does between steps
    compute: float
    #: what it waited, by cause
    stalls: dict[str, float]
    #: what each link, or the update, was busy meanwhile
    busy: dict[str, float]

    @property
    def stalled(self) -> float:
        """All stalls together."""
        return sum(self.stalls.values())

    @property
    def binding(self) -> str:
        """Name the resource that the step waited for most; ``compute`` where stalls are less than 5 % of it.

        An update passes through a processor, and states on disk through the disk: it is bound by what was busy most of these. Where
        updates are waited for, the copies that come after them are a stage of the same chain: a faster link alone would move the
        wait to the stage before it. Most of the wait may be for copies then, each of them begun when its update was over.
        """
        if self.stalled <= COMPUTE_BOUND * self.seconds:
            return "compute"
        chained = self.stalls["update"] > CHAINED * self.seconds
        stages = (*_UPDATE_STAGES, "host_to_device") if chained else _UPDATE_STAGES
        stage = max(stages, key=lambda link: self.busy[link])
        waited: dict[str, float] = {}
        for cause, seconds in self.stalls.items():
            resource = stage if cause == "update" or (chained and cause == "copy") else _RESOURCES[cause]
            waited[resource] = waited.get(resource, 0.0) + seconds
        return max(waited, key=lambda resource: waited[resource])

    def __str__(self) -> str:
        waited = ", ".join(f"{cause} {seconds:.4f}" for cause, seconds in self.stalls.items() if seconds >= 5e-5)
        stalls = f" ({waited})" if waited else ""
        return f"{self.seconds:.4f} s = compute {self.compute:.4f} + stalls {self.stalled:.4f}{stalls}"


def step_time(raw: _Raw, which: Literal["time", "last"], steps: int) -> StepTime | None:
    """Return one step of what the core counted over several; none where there was none."""
    if steps == 0:
        return None
    wall, compute, stalls, busy = raw[which]
    scale = 1e-9 / steps
    return StepTime(
        wall * scale,
        compute * scale,
        {name: nanos * scale for name, nanos in zip(raw["stalls"], stalls, strict=True)},
        {name: nanos * scale for name, nanos in zip(raw["links"], busy, strict=True)},
    )
