"""Facts about a run: what moved, what was waited for, what is in use."""

from __future__ import annotations

import html
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from funicular import _core
from funicular.report.step_time import PEERS, StepTime, step_time
from funicular.windows.lookup import offloaded

if TYPE_CHECKING:
    from torch import nn

    from funicular.windows.session import Session

__all__ = [
    "Ahead",
    "Budget",
    "Grown",
    "Link",
    "Moved",
    "Paged",
    "Prefetch",
    "Ranked",
    "Stats",
    "StepTime",
    "Updated",
    "stats",
]


@dataclass(frozen=True)
class Link:
    """What went over one link, or through the CPU's update, since the model was offloaded."""

    bytes: int
    #: time during which something was under way
    seconds: float

    @property
    def gb_per_s(self) -> float:
        """Rate while busy, in 1e9 bytes per second."""
        return self.bytes / self.seconds / 1e9 if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Budget:
    """One tier: bytes allowed, in use, and at most in use so far."""

    limit: int | None
    used: int
    peak: int


@dataclass(frozen=True)
class Prefetch:
    """How window openings went."""

    hits: int
    late: int
    demand: int
    wasted: int
    conflicts: int


@dataclass(frozen=True)
class Ahead:
    """Units whose update began during backward: used by the step, or made in vain; those whose weights were made first, their states later."""

    used: int
    in_vain: int
    weights_first: int


@dataclass(frozen=True)
class Updated:
    """Parameters of paged units that were updated, by the processor and by the GPU, all steps together."""

    cpu: int
    gpu: int


@dataclass(frozen=True)
class Moved:
    """Optimizer states of one unit that moved into free memory of the compute device, or out of it."""

    #: steps taken before it
    step: int
    unit: str
    bytes: int
    #: up: ``room``; down: ``short`` (too little was free), ``asked`` (torch found no memory, or its cache was emptied), ``written``
    #: (a load or the program writes them), ``off``
    why: str


@dataclass(frozen=True)
class Grown:
    """Optimizer states in memory of the compute device that was free (``budget.hbm = "auto"``), in bytes."""

    #: there now, and at most so far; part of ``budgets["hbm"]``
    taken: int
    peak: int
    #: moved there and back, all steps together
    up: int
    down: int
    #: times that the device had no memory after all
    refused: int
    #: what is left free
    margin: int
    #: the last moves, in order
    moves: tuple[Moved, ...] = ()


@dataclass(frozen=True)
class Paged:
    """Block inputs that waited in host memory (``activations.tier = "host"``), in bytes."""

    bytes_out: int = 0
    bytes_in: int = 0
    #: waiting for their backward now
    waiting: int = 0
    #: host memory taken for them, part of the host budget
    reserved: int = 0


@dataclass(frozen=True)
class Ranked:
    """One process among those that train the model together (docs/ranks.md)."""

    rank: int
    size: int
    #: bytes of gradients sent to other ranks
    sent: int
    #: seconds that the compute stream waited for other ranks: the stalls ``peers_grads``, ``peers_step`` and ``peers_update``
    waited: float


@dataclass(frozen=True)
class Stats:
    """A snapshot; numbers count from the moment the model was offloaded."""

    device: str
    engine: str | None
    threads: int
    steps: int
    links: dict[str, Link]
    #: seconds the compute stream waited, by cause, since the first window
    stalls: dict[str, float]
    #: the mean of the steps so far, without the first, which learns the order, unless it is the only one; none before a step is over
    step: StepTime | None
    #: the last step that is over on the device
    last: StepTime | None
    #: steps in the mean
    timed: int
    #: measurements that are missing: too many were under way, or a CUDA graph was being captured
    lost: int
    prefetch: Prefetch
    ahead: Ahead
    #: parameters updated, by who did it
    updated: Updated
    #: units used from their home because their frames were held
    home_uses: int
    #: reads of parameters outside their windows
    stray_reads: int
    budgets: dict[str, Budget]
    grown: Grown
    activations: Paged
    #: bytes of parameters that cannot be paged, by device: they are in no budget
    unpaged: dict[str, int]
    #: seconds since the model was offloaded
    seconds: float
    #: None for a process that trains alone
    ranks: Ranked | None = None

    @property
    def stall_seconds(self) -> float:
        """All stalls together."""
        return sum(self.stalls.values())

    @property
    def binding(self) -> str:
        """Name the resource that binds the steps so far; see :attr:`StepTime.binding`. ``compute`` before a step is over."""
        return "compute" if self.step is None else self.step.binding

    def to_dict(self) -> dict[str, int | float | str | None]:
        """Return the figures under flat names, which docs/stats.md lists: for dashboards, logs and JSON.

        The names are the same at any time; what is not known is ``None``: a step before one is over, a tier without a limit.
        """
        figures: dict[str, int | float | str | None] = {"device": self.device, "engine": self.engine}
        figures |= {"binding": self.binding, "threads": self.threads, "seconds": self.seconds}
        figures |= {"steps": self.steps, "timed": self.timed, "lost": self.lost}
        unknown = StepTime(0.0, 0.0, dict.fromkeys(self.stalls, 0.0), dict.fromkeys(self.links, 0.0)).to_dict()
        for name, step in (("step", self.step), ("last", self.last)):
            values = dict.fromkeys(unknown) if step is None else step.to_dict()
            figures |= {f"{name}/{key}": value for key, value in values.items()}
        for name, link in self.links.items():
            figures |= {f"links/{name}/bytes": link.bytes, f"links/{name}/seconds": link.seconds}
        figures |= {f"stalls/{cause}": seconds for cause, seconds in self.stalls.items()}
        groups: dict[str, Any] = {f"budgets/{tier}": budget for tier, budget in self.budgets.items()}
        groups |= {"prefetch": self.prefetch, "ahead": self.ahead, "updated": self.updated}
        groups |= {"activations": self.activations, "grown": self.grown}
        for name, group in groups.items():
            figures |= {f"{name}/{key}": value for key, value in asdict(group).items() if key != "moves"}
        figures |= {"home_uses": self.home_uses, "stray_reads": self.stray_reads}
        of_ranks = dict.fromkeys(("rank", "size", "sent", "waited")) if self.ranks is None else asdict(self.ranks)
        figures |= {f"ranks/{key}": value for key, value in of_ranks.items()}
        return figures | {"unpaged_bytes": sum(self.unpaged.values())}

    def _repr_html_(self) -> str:
        """Return what ``print`` shows, for notebooks."""
        return f'<pre style="line-height: 1.3">{html.escape(str(self))}</pre>'

    def __str__(self) -> str:
        lines = [f"funicular on {self.device}, {self.steps} steps, I/O engine {self.engine or 'none'}"]
        lines += [
            f"  {name:16} {link.bytes / 1e9:10.3f} GB {link.gb_per_s:8.2f} GB/s busy {link.seconds:8.2f} s"
            for name, link in self.links.items()
            if link.bytes
        ]
        waited = ", ".join(f"{cause} {seconds:.2f} s" for cause, seconds in self.stalls.items() if seconds >= 0.005)
        lines.append(f"  stalls           {waited or 'none'}")
        r = self.ranks
        if r is not None:
            lines.append(
                f"  ranks            rank {r.rank} of {r.size}: {r.sent / 1e9:.3f} GB of gradients sent, "
                f"{self.stalls['exchange']:.2f} s in their exchange, waited {r.waited:.2f} s for others"
            )
        if self.step is not None:
            lines.append(f"  step             {self.step}")
            lines.append(f"  bound by         {self.step.bound}")
            gain, _, change = self.step.advice.partition(": ")
            if gain:
                lines += [f"  to gain          {gain}:", f"                   {change}"]
        p = self.prefetch
        lines.append(f"  windows          {p.hits} hits, {p.late} late, {p.demand} demand, {p.conflicts} from home")
        if self.ahead.used or self.ahead.in_vain:
            lines.append(
                f"  ahead            {self.ahead.used} updates begun in backward and used, {self.ahead.in_vain} in vain"
            )
        if self.ahead.weights_first:
            lines.append(f"  weights first    {self.ahead.weights_first} updates, whose states followed later")
        if self.updated.gpu:
            cpu, gpu = self.updated.cpu / 1e9, self.updated.gpu / 1e9
            lines.append(f"  updated          {cpu:.3f} G parameters by the CPU, {gpu:.3f} G by the GPU")
        a = self.activations
        if a.bytes_out:
            lines.append(f"  activations      {a.bytes_out / 1e9:.3f} GB out, {a.bytes_in / 1e9:.3f} GB in")
        g = self.grown
        if g.up:
            lines.append(
                f"  grown            {g.taken / 1e9:.3f} GB of states in free memory of the device; {g.down / 1e9:.3f} GB moved down"
            )
        for tier, b in self.budgets.items():
            limit = "unlimited" if b.limit is None else f"{b.limit / 2**20:.1f} MiB"
            lines.append(f"  {tier:16} {b.used / 2**20:.1f} MiB used, {b.peak / 2**20:.1f} MiB peak of {limit}")
        for device, size in self.unpaged.items():
            lines.append(f"  not paged        {size / 2**20:.1f} MiB of parameters on {device}, in no budget")
        return "\n".join(lines)


def stats(model: nn.Module) -> Stats:
    """Return what has happened so far to an offloaded model, or to the one that a module wraps.

    Raises
    ------
    UsageError
        ``FN-E114`` if the model is not offloaded, or is a part of an offloaded one.
    """
    _, session = offloaded(model)
    raw = session.engine.stats()
    timed, lost = raw["timed"]
    hits, late, demand, wasted, conflicts = raw["prefetch"]
    unpaged: dict[str, int] = {}
    for one in session.held.unpaged:
        unpaged[one.device] = unpaged.get(one.device, 0) + one.bytes
    return Stats(
        device=session.engine.device(),
        engine=raw["engine"],
        threads=raw["threads"],
        steps=raw["steps"],
        links={name: Link(moved, busy / 1e9) for name, (moved, busy) in raw["links"].items()},
        stalls={name: nanos / 1e9 for name, nanos in raw["stalls"].items()},
        step=step_time(raw, "time", timed),
        last=step_time(raw, "last", min(timed, 1)),
        timed=timed,
        lost=lost,
        prefetch=Prefetch(hits, late, demand, wasted, conflicts),
        ahead=Ahead(*raw["ahead"]),
        updated=Updated(*raw["updated"]),
        home_uses=raw["home_uses"],
        stray_reads=session.strays,
        budgets={tier: Budget(limit, used, peak) for tier, (limit, used, peak) in raw["budgets"].items()},
        grown=_grown(_core.grown(session.engine)),
        activations=Paged() if session.activations is None else Paged(*session.activations.totals()),
        unpaged=unpaged,
        seconds=time.monotonic() - session.started,
        ranks=_ranked(session, raw["stalls"]),
    )


def _ranked(session: Session, stalls: dict[str, int]) -> Ranked | None:
    group = session.group
    if group is None:
        return None
    return Ranked(group.rank, group.size, group.sent, sum(stalls[cause] for cause in PEERS) / 1e9)


def _grown(raw: dict[str, Any]) -> Grown:
    moves = tuple(Moved(step, unit, size, why) for _, step, unit, size, why in raw.pop("moves"))
    return Grown(moves=moves, **raw)
