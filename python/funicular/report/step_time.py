"""The time of a step: compute, stalls by cause, and what binds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from funicular._core import _Raw

__all__ = ["PEERS", "StepTime", "step_time"]

#: Of a step's time: where stalls are less, it is bound by compute.
COMPUTE_BOUND = 0.1
#: Of a step's time: where updates are waited for longer, copies are late because updates are.
CHAINED = 0.01

#: Causes of waits for other ranks.
PEERS = ("peers_grads", "peers_step", "peers_update")
#: What a wait is for tells which resource is late, but for updates: they pass through several.
_RESOURCES = {
    "nvme_read": "nvme_read",
    "nvme_write": "nvme_write",
    "copy": "host_to_device",
    "grads": "device_to_host",
    "exchange": "exchange",
    **dict.fromkeys(PEERS, "peers"),
}
#: What makes each resource less of a bound.
_ADVICE = {
    "compute": "a faster device, or fewer blocks computed again in the backward",
    "host_to_device": "a larger budget.hbm, or more tokens per step",
    "device_to_host": "a larger budget.hbm, or more tokens per step",
    "nvme_read": "another drive in nvme.paths, a larger budget.host, or more tokens per step",
    "nvme_write": "another drive in nvme.paths, a larger budget.host, or more tokens per step",
    "cpu_update": 'more budget.threads, optimizer.where = "auto" with a GPU, or more tokens per step',
    "gpu_update": "a larger budget.hbm, or more tokens per step",
    "exchange": "more tokens per step, or several backwards of one step in micro-batches (activations.micro_batch)",
    "peers": "batches that cost the same on all ranks, and processors and links that are as free on each",
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
        """Name the resource that the step waited for most; ``compute`` where stalls are at most 10 % of it."""
        if self.stalled <= COMPUTE_BOUND * self.seconds:
            return "compute"
        waited = self.waited
        return max(waited, key=lambda resource: waited[resource])

    @property
    def waited(self) -> dict[str, float]:
        """Seconds that the step waited, by resource.

        An update passes through a processor, and states on disk through the disk: it is bound by what was busy most of these. Where
        updates are waited for, the copies that come after them are a stage of the same chain: a faster link alone would move the
        wait to the stage before it. Most of the wait may be for copies then, each of them begun when its update was over.
        """
        chained = self.stalls["update"] > CHAINED * self.seconds
        stages = (*_UPDATE_STAGES, "host_to_device") if chained else _UPDATE_STAGES
        stage = max(stages, key=lambda link: self.busy[link])
        waited: dict[str, float] = {}
        for cause, seconds in self.stalls.items():
            resource = stage if cause == "update" or (chained and cause == "copy") else _RESOURCES[cause]
            waited[resource] = waited.get(resource, 0.0) + seconds
        return waited

    @property
    def gains(self) -> dict[str, float]:
        """Seconds that a step would be shorter if one resource were twice as fast, at most; the most helpful first.

        No resource saves more than half of what it is busy, nor more than what is waited for it; and a step stays as long as what
        is busy longest beside compute. Of other ranks (``peers``) it is what is waited for them.
        """
        gains = {
            resource: seconds if resource == "peers" else min(seconds, self.busy[resource] / 2)
            for resource, seconds in self.waited.items()
        }
        longest = max(self.busy.values(), default=0.0)
        gains["compute"] = max(0.0, min(self.compute / 2, self.seconds - longest))
        return dict(sorted(gains.items(), key=lambda gain: -gain[1]))

    @property
    def bound(self) -> str:
        """Say what binds, and how much of the step that is."""
        binding, share = self.binding, self._percent(self.compute)
        if binding == "compute":
            return f"compute ({share} of the step)"
        return f"{binding} ({self._percent(self.waited[binding])} of the step waits for it, {share} is compute)"

    @property
    def advice(self) -> str:
        """Say what to change about what is waited for most, and what it would gain; empty where nothing is waited for."""
        waited = self.waited
        resource = max(waited, key=lambda one: waited[one])
        gain = self.gains[resource]
        if gain <= 0.005 * self.seconds:
            return ""
        what = "other ranks that are never late" if resource == "peers" else f"{resource} twice as fast"
        return f"{what} would save at most {gain:.4f} s ({self._percent(gain)}): {_ADVICE[resource]}"

    def to_dict(self) -> dict[str, float]:
        """Return the figures with the names that docs/stats.md lists."""
        return {
            "seconds": self.seconds,
            "compute_seconds": self.compute,
            "stall_seconds": self.stalled,
            **{f"stall_seconds/{cause}": seconds for cause, seconds in self.stalls.items()},
            **{f"busy_seconds/{link}": seconds for link, seconds in self.busy.items()},
        }

    def _percent(self, seconds: float) -> str:
        return f"{100 * seconds / self.seconds:.0f} %" if self.seconds > 0 else "0 %"

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
