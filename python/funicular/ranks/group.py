"""Which processes train a model together."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import time
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from funicular import _core
from funicular.errors import Error, RuntimeFailure, UsageError
from funicular.ranks.apart import Apart
from funicular.ranks.on_gpu import Guard, connect
from funicular.torch_internals.memory import stream_of
from funicular.torch_internals.process_groups import collectives, default_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from funicular._core import Engine

__all__ = ["Group", "resolve"]

_R = TypeVar("_R")
_log = logging.getLogger("funicular")
#: How long a rank may be behind the others when it calls ``offload``. Later waits for slow ranks are the runtime's, and end by no clock.
_PATIENCE = datetime.timedelta(hours=6)
#: Connections of models that are gone, by the group of all processes and the members. torch would make new ones under the name of the old.
#: Each has a number.
_free: dict[tuple[int, ...], list[_Connections]] = {}
#: how often some ranks have offloaded a model, by the members
_begun: dict[tuple[int, ...], int] = {}
#: seconds for the runtime to name the rank whose end has cut a connection
_TELLING = 3.0
#: seconds between two looks for ranks that are to call ``offload``, and until the first line of the log about them
_LOOK, _SILENCE = 0.02, 30.0
#: the groups whose models are in use: ranks may wait in calls of these for one that has gone on to another
_living: weakref.WeakSet[Group] = weakref.WeakSet()


class _Connections(NamedTuple):
    world: Any
    number: int
    #: for words between ranks, and for gradients in host memory, of any kind of group that the caller has
    control: Any
    #: between their GPUs, if a model has computed there
    gpus: Any = None


class Group:
    """The ranks that train one model. Numbers count within the group."""

    def __init__(self, group: Any) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        #: bytes of gradients that were sent
        self.sent = 0
        #: exchanges of gradients that this rank had a part in
        self._exchanges = 0
        #: the runtime of this rank, once there is one: it knows which ranks are dead
        self.runtime: Engine | None = None
        self._device = torch.device("cpu")
        self._members: list[int] = dist.get_process_group_ranks(group)
        self._apart = Apart()
        self._connections = _connect(self._members, self._apart)
        self._guard: Guard | None = None
        self._left = False

    def begin(self, runtime: Engine) -> None:
        """Take note of this rank's runtime: from now on ranks wait for each other there, before they speak."""
        self.runtime = runtime
        _core.enlist(runtime)
        _living.add(self)
        if (where := runtime.device()) != "host":
            device = self._device = torch.device(where)
            gpus = self._connections.gpus
            if gpus is None:
                gpus = self._speak(lambda: connect(self._members, device, _PATIENCE), "the connection of their GPUs")
                self._connections = self._connections._replace(gpus=gpus)
            self._guard = Guard(runtime, gpus)

    def collectives_of_others(self) -> int:
        """Return how many collectives the program has begun between devices of the model's kind, and its other models exchanges of gradients."""
        exchanges = sum(group._exchanges for group in list(_living) if group is not self)
        return exchanges + collectives(self._device, (self._connections.control, self._connections.gpus))

    def gather(self, what: Any, place: str = "") -> list[Any]:
        """Return what each rank gives, by rank. All ranks call it, with the same ``place``, which messages name."""

        def exchange() -> list[Any]:
            found: list[Any] = [None] * self.size
            dist.all_gather_object(found, what, group=self._connections.control)
            return found

        return self._speak(exchange, place)

    def gather_bytes(self, what: bytes, place: str) -> list[bytes]:
        """Return what each rank gives, by rank: bytes, as many on each."""

        def exchange() -> list[bytes]:
            mine = torch.frombuffer(bytearray(what), dtype=torch.uint8)
            found = [torch.empty_like(mine) for _ in range(self.size)]
            dist.all_gather(found, mine, group=self._connections.control)
            return [bytes(one.numpy()) for one in found]

        return self._speak(exchange, place)

    def _speak(self, exchange: Callable[[], _R], place: str) -> _R:
        with self.waiting("peers_step"):
            if self.runtime is not None:
                # Connections know neither who is slow nor who waits elsewhere.
                _core.meet(self.runtime, place)
            with self._connected():
                return self._apart.run(exchange, self._look)

    def _look(self) -> None:
        if self.runtime is not None:
            _core.check_peers(self.runtime, False)

    def transfer(
        self, sends: Sequence[tuple[int, torch.Tensor]], receives: Sequence[tuple[int, torch.Tensor]], unit: int
    ) -> None:
        """Send and receive bytes of a unit; between two ranks in the order of the lists. Returns when all have come."""
        near = all(t.device.type == "cpu" for _, t in (*sends, *receives))
        group = self._connections.control if near else self._connections.gpus
        pairs = [(dist.isend, sends), (dist.irecv, receives)]
        ops = [
            dist.P2POp(
                way, tensor if tensor.dtype is torch.uint8 else tensor.view(torch.uint8), self._members[rank], group
            )
            for way, parts in pairs
            for rank, tensor in parts
        ]
        if self._device.type != "cpu" and self.runtime is not None:
            with self.waiting("peers_grads", unit):
                _core.meet_on_devices(self.runtime, stream_of(self._device), bool(ops))
        if not ops:
            return

        def exchange() -> None:
            for work in dist.batch_isend_irecv(ops):
                work.wait()

        self._exchanges += 1
        self.sent += sum(part.nbytes for _, part in sends)
        both_ways = sum(part.nbytes for _, part in (*sends, *receives))
        with self._connected(), self.waiting("exchange", unit, both_ways):
            if near:
                self._apart.run(exchange, self._look)
            else:
                exchange()

    @contextlib.contextmanager
    def waiting(self, cause: str, unit: int | None = None, nbytes: int = 0) -> Iterator[None]:
        """Count the time within as waited for other ranks, or for bytes of theirs, by ``cause`` (docs/stats.md)."""
        runtime = self.runtime
        if runtime is None or runtime.failed():
            yield
            return
        stream = stream_of(self._device)
        since = _core.begin_wait(runtime, stream, cause, unit)
        try:
            yield
        finally:
            with contextlib.suppress(Error):  # of a model that has ended meanwhile
                _core.end_wait(runtime, stream, cause, unit, since, nbytes)

    @contextlib.contextmanager
    def whole(self, what: str, *, ends: bool = False) -> Iterator[None]:
        """Do what the other ranks count on from now on: where it is interrupted, they are told at once, and the model ends on all of them.

        ``ends``: it cannot be done again after an error of this package either. All ranks find by themselves that they differ (``FN-E702``).
        """
        try:
            yield
        except Error as error:
            if ends and error.code != "FN-E702":
                self._tell_failure(f"amid {what}: {error}")
            raise
        except BaseException as error:
            self._tell_failure(f"{type(error).__name__} amid {what}.")
            raise

    def _tell_failure(self, why: str) -> None:
        if self.runtime is not None:
            with contextlib.suppress(Error):
                _core.fail_rank(self.runtime, why)
                self._look()  # the caller is told by what is raised here

    def refuse_offload(self, missing: list[int]) -> None:
        """Raise if ranks that are to call ``offload`` wait for this one in a call of this model, or if the model has failed.

        Raises
        ------
        RuntimeFailure
            ``FN-E706``, and what the model has failed by.
        """
        if self.runtime is None or self.runtime.failed():
            return
        for rank, member in enumerate(self._members):
            if member in missing:
                _core.refuse_call_elsewhere(self.runtime, rank, "in 'funicular.offload' of another model")

    def close(self) -> None:
        """Leave the connections to the next model; before the runtime ends. All ranks end their models in the same order."""
        if self._left:
            return
        self._left = True
        _living.discard(self)
        whole = self._guard is None or self._guard.close()
        if dist.is_initialized() and not self._apart.left and whole:
            _free.setdefault(tuple(self._members), []).append(self._connections._replace(world=dist.group.WORLD))

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        """Turn what torch says of a connection that is cut into the error of a rank that is gone."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            raise self._lost(error) from error

    def _lost(self, error: BaseException) -> RuntimeFailure:
        """Return the error of a connection that another rank's end has cut; the runtime knows better, a moment later."""
        if not dist.is_initialized():
            return RuntimeFailure(
                "FN-E701",
                "torch.distributed.destroy_process_group() was called while a model is trained by several ranks. Call funicular.unwrap, or "
                "let go of the model, first.",
            )
        end = time.monotonic() + _TELLING
        while self.runtime is not None and time.monotonic() < end:
            _core.check_peers(self.runtime, True)
            time.sleep(0.05)
        return RuntimeFailure("FN-E701", f"the connection to another rank is lost: {error}")


def _await_all(members: list[int], free: int) -> bool:
    """Wait until all members have called ``offload``: nothing that torch offers for it can be interrupted.

    Returns whether all have the connection of the same number, ``free``, that no model uses.

    Raises
    ------
    RuntimeFailure
        ``FN-E701`` if the process that keeps the store is gone, ``FN-E706`` if one that is waited for waits for this rank.
    """
    number = _begun.get(tuple(members), 0) + 1
    key = f"funicular/{'-'.join(map(str, members))}/{number}/"
    own = f"{key}{dist.get_rank()}"
    said = time.monotonic()
    try:
        store = default_store()
        store.set(own, str(free).encode())
        try:
            while missing := [rank for rank in members if not store.check([f"{key}{rank}"])]:
                for group in list(_living):
                    group.refuse_offload(missing)
                if time.monotonic() - said > _SILENCE:
                    said = time.monotonic()
                    _tell_missing(missing)
                time.sleep(_LOOK)
        except BaseException:
            store.delete_key(own)  # the next call of ``offload`` is this one again
            raise
        _begun[tuple(members)] = number
        return free > 0 and {int(store.get(f"{key}{rank}")) for rank in members} == {free}
    except Error:
        raise
    except RuntimeError as error:
        raise RuntimeFailure(
            "FN-E701", f"a process that other ranks need to find each other, mostly that of rank 0, is gone: {error}"
        ) from error


def _tell_missing(missing: list[int]) -> None:
    who = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    _log.warning(
        "FN-W721 waiting for ranks to call funicular.offload: %s (numbers of the default group). If this process is to train alone, "
        'say offload(..., group="single").',
        who,
    )


def _connect(members: list[int], apart: Apart) -> _Connections:
    """Return connections between some ranks that no other model uses."""
    left = _free.setdefault(tuple(members), [])
    left[:] = [one for one in left if one.world is dist.group.WORLD]
    found = left.pop(0) if left else None
    if _await_all(members, 0 if found is None else found.number) and found is not None:
        return found
    options: dict[str, Any] = {"timeout": _PATIENCE, "backend": "gloo", "use_local_synchronization": True}
    control = apart.run(lambda: dist.new_group(members, **options), lambda: None)
    return _Connections(dist.group.WORLD, _begun[tuple(members)], control)


def resolve(group: Any) -> Group | None:
    """Return the ranks that train together; None for a process that trains alone.

    Raises
    ------
    UsageError
        ``FN-E720`` for what is no group, has several dimensions, or is a group of other ranks.
    """
    if isinstance(group, str) and group == "single":
        return None
    if not dist.is_available() or not dist.is_initialized():
        if group is None:
            _tell_unconnected()
            return None
        raise _refusal(group, "torch.distributed has not begun. Call torch.distributed.init_process_group() first")
    if group is None:
        group = dist.group.WORLD
    elif hasattr(group, "get_group") and hasattr(group, "ndim"):
        if group.ndim != 1:
            names = group.mesh_dim_names or ()
            raise _refusal(
                group, f"it is a mesh of {group.ndim} dimensions {names}. Give the one of data parallelism: mesh['dp']"
            )
        group = group.get_group()
    elif not isinstance(group, dist.ProcessGroup):
        raise _refusal(group, 'give None, a ProcessGroup, a DeviceMesh of one dimension, or "single"')
    if dist.get_rank(group) < 0:
        raise _refusal(group, "this process is not one of its ranks")
    return None if dist.get_world_size(group) == 1 else Group(group)


def _tell_unconnected() -> None:
    """Say so where a launcher has started several processes that do not know of each other yet."""
    size = os.environ.get("WORLD_SIZE", "")
    if size.isdecimal() and int(size) > 1 and "RANK" in os.environ:
        _log.warning(
            "FN-W722 WORLD_SIZE is %s, and torch.distributed has not begun: each process trains a model of its own. To train one "
            'together call torch.distributed.init_process_group() before funicular.offload; else say group="single".',
            size,
        )


def _refusal(group: Any, why: str) -> UsageError:
    return UsageError("FN-E720", f"group={group!r:.100}: {why}.")
