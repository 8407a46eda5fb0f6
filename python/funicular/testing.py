"""What a test may look at inside an offloaded model: tests need no other module of the package than the public ones.

What the views show is read when it is asked for. Their names stay; what they read of the package may change with any release.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from funicular import _core
from funicular.checkpoint.facts import decode, encode
from funicular.gradients.clipping import note_norms
from funicular.homes.moved import tensor_over
from funicular.ranks.means import Means
from funicular.ranks.rounds import Rounds
from funicular.ranks.slices import Slice
from funicular.ranks.slices import cut as cut_gradient
from funicular.report.nvtx import Ranges
from funicular.torch_internals import saved_hooks
from funicular.torch_internals.process_groups import environment
from funicular.units.param import ref_of
from funicular.windows import shutdown
from funicular.windows.lookup import offloaded, session_of
from funicular.windows.residents import resident_session

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from funicular.units.param import PagedParam
    from funicular.units.unit import Unit as _Unit
    from funicular.windows.session import Session

__all__ = [
    "Inspected",
    "Parameter",
    "Rounds",
    "Unit",
    "close_all",
    "cut_gradient",
    "environment",
    "exchange",
    "inspect",
    "inspect_parameter",
    "is_offloaded",
    "is_resident",
    "means_of_pieces",
    "note_norms",
    "saved_tensor_hooks",
    "through_manifest",
]


class Parameter:
    """One paged parameter: where its bytes are."""

    def __init__(self, ref: PagedParam) -> None:
        self._ref = ref

    @property
    def name(self) -> str:
        """Its name in the model."""
        return self._ref.name

    @property
    def parameter(self) -> torch.nn.Parameter:
        """The parameter itself."""
        return self._ref.param

    @property
    def unit(self) -> Unit:
        """The unit that it is paged with."""
        return Unit(self._ref.unit)

    @property
    def offset(self) -> int:
        """Bytes before it in its unit."""
        return self._ref.offset

    @property
    def frame(self) -> torch.Tensor:
        """The tensor over its place in the frames."""
        return self._ref.frame

    @property
    def gradient(self) -> torch.Tensor | None:
        """The tensor over its gradient's place; None if it is not trained."""
        return self._ref.grad

    @property
    def home_address(self) -> int:
        """Where its home begins."""
        return self._ref.home_address

    @property
    def frame_address(self) -> int:
        """Where its place in the frames begins."""
        return self._ref.frame_address

    @property
    def gradient_address(self) -> int | None:
        """Where its gradient's place begins; None if it is not trained."""
        storage = self._ref.grad_storage
        return None if storage is None else storage.data_ptr()


class Unit:
    """The parameters that are paged together."""

    def __init__(self, unit: _Unit) -> None:
        self._unit = unit

    @property
    def name(self) -> str:
        """Name of its first module."""
        return self._unit.name

    @property
    def number(self) -> int:
        """What the engine calls it."""
        return self._unit.engine_id

    @property
    def parameters(self) -> list[Parameter]:
        """Its parameters, in order."""
        return [Parameter(ref) for ref in self._unit.params]

    @property
    def neighbours(self) -> list[Unit]:
        """The units that share frames with it."""
        return [Unit(unit) for unit in self._unit.neighbours]

    @property
    def held(self) -> bool:
        """Whether the engine keeps frames for it."""
        return self._unit.held

    @property
    def moving(self) -> bool:
        """Whether its parameters are on their way between home and frames."""
        return self._unit.moving

    @property
    def calls(self) -> int:
        """How many calls of its modules are under way."""
        return self._unit.depth

    @property
    def begun(self) -> bool:
        """Whether its next update was begun in backward."""
        return self._unit.begun_from is not None

    @property
    def in_memory(self) -> bool:
        """Whether a copy of weights that live on NVMe is in host memory now."""
        return self._unit.shadow_filled

    def home_bytes(self) -> torch.Tensor:
        """Return the bytes of its home, on the host."""
        return tensor_over(self._unit.owner.engine.home_buffer(self._unit.engine_id, False))

    def frame_bytes(self) -> torch.Tensor:
        """Return the bytes of its frames, on the compute device."""
        return tensor_over(self._unit.owner.engine.frame_buffer(self._unit.engine_id))


class Inspected:
    """An offloaded model."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def session(self) -> object:
        """What the package keeps of the model: for weak references to it."""
        return self._session

    @property
    def engine(self) -> _core.Engine:
        """The native engine of this model."""
        return self._session.engine

    @property
    def units(self) -> list[Unit]:
        """Its paged units, in order."""
        return [Unit(unit) for unit in self._session.units]

    @property
    def handles(self) -> list[Any]:
        """What hangs on its modules and parameters: each has ``remove()``."""
        return self._session.handles

    def busy(self) -> bool:
        """Whether the calling thread is amid work of the package on this model, as a signal handler may be."""
        return self._session.busy()

    def start_range(self, name: str) -> Any:
        """Start a range as ``log.nvtx`` does; None where ranges are off."""
        return self._session.ranges.start(name)

    def make_memory_up(self, capacity: int, others: int) -> None:
        """Have the memory of the host device be so large, in bytes, and so much of it be others': states move up into the rest."""
        _core.make_memory_up(self._session.engine, capacity, others)

    def give_memory_back(self) -> None:
        """Move all states down, as torch's allocator has it done when it finds no memory."""
        _core.give_memory_back(self._session.engine)

    def record_ranges(self, start: Callable[[str], Any], end: Callable[[Any], Any]) -> None:
        """Give the ranges of ``log.nvtx`` to two functions: ``start`` takes a name, and ``end`` takes what ``start`` returned."""
        self._session.ranges = Ranges(start, end)


def inspect(model: nn.Module) -> Inspected:
    """Look into an offloaded model, or into the one that a module wraps.

    Raises
    ------
    UsageError
        ``FN-E114`` if the model is not offloaded, or is a part of an offloaded one.
    """
    return Inspected(offloaded(model)[1])


def inspect_parameter(tensor: torch.Tensor) -> Parameter | None:
    """Return what is known of a paged parameter, given it or its gradient; None for other tensors."""
    ref = ref_of(tensor)
    return None if ref is None else Parameter(ref)


def is_offloaded(model: nn.Module) -> bool:
    """Whether this very module was given to ``funicular.offload`` and not unwrapped since."""
    return session_of(model) is not None


def is_resident(p: nn.Parameter) -> bool:
    """Whether a parameter of an offloaded model stays on the compute device."""
    return resident_session(p) is not None


def means_of_pieces(model: nn.Module, parts: Sequence[Sequence[torch.Tensor | None]], rank: int) -> list[torch.Tensor]:
    """Return the means that ``rank`` makes of parts of gradients, on the compute device of an offloaded model.

    ``parts``: of each part what each rank has, by rank, of one dimension, or None; one rank at least has some.
    """
    sums: Means | None = None
    whose = []
    for pieces in parts:
        there = [(number, piece) for number, piece in enumerate(pieces) if piece is not None]
        like = there[0][1]
        sums = sums or Means(rank, len(pieces), like.device)
        sums.add(like.dtype, Slice(rank, 0, like.numel()), pieces[rank], [number for number, _ in there])
        whose += [(number, piece) for number, piece in there if number != rank]
    if sums is None:
        return []
    for (number, place), (other, piece) in zip(sums.receives(), whose, strict=True):
        assert number == other
        place.copy_(piece.contiguous().view(torch.uint8))
    return sums.make(inspect(model).engine)


def exchange(model: nn.Module, gradient: torch.Tensor) -> torch.Tensor:
    """Exchange a gradient of one dimension between the ranks that train a model, in equal parts, as those of units are.

    All ranks call it, with as many elements each, a multiple of the number of ranks. Returns this rank's part of the mean.
    """
    session = offloaded(model)[1]
    group = session.group
    assert group is not None
    count = gradient.numel() // group.size
    parts = [Slice(rank, rank * count, count) for rank in range(group.size)]
    sums = Means(group.rank, group.size, gradient.device)
    sums.add(gradient.dtype, parts[group.rank], gradient, range(group.size))
    sends = [(one.owner, gradient[one.start : one.start + count]) for one in parts if one.owner != group.rank]
    group.transfer(sends, sums.receives(), 0)
    return sums.make(session.engine)[0]


def saved_tensor_hooks() -> int:
    """Return 1 if a pair of saved-tensor hooks is on this thread's stack, else 0."""
    return 0 if saved_hooks.top() is None else 1


def through_manifest(extra: Any) -> Any:
    """Return what a load gives of the ``extra`` of a save: through the JSON of a manifest, without files.

    Raises
    ------
    UsageError
        ``FN-E408`` for what a checkpoint cannot hold.
    """
    return decode(json.loads(json.dumps(encode(extra, "extra"))))


def close_all() -> None:
    """Close every offloaded model of this process, as the end of the process does."""
    shutdown._close_all()
