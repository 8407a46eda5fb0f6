"""How ranks find each other at the start: one host, one memory, one plan."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from funicular import _core, errors
from funicular._core import Engine, __version__
from funicular.errors import Error, RuntimeFailure, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from funicular.ranks.group import Group

__all__ = ["agreed", "compare", "make_engine"]

#: seconds for a rank to fetch the memory that another one has made: both have just spoken to each other
_PATIENCE = 60.0
_WORD = b"funicular"


def _host() -> dict[str, str]:
    """Return what tells one host from another: the system that was booted, and what separates containers on it."""
    found = {"boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip()}
    for space in ("pid", "ipc", "net"):
        with contextlib.suppress(OSError):
            found[space] = str(Path(f"/proc/self/ns/{space}").readlink())
    return found


@contextlib.contextmanager
def agreed(group: Group | None, what: str, *, alike: bool = False) -> Iterator[None]:
    """Have something done on every rank: what fails on one fails on all. Nothing else than that for a process alone.

    Raises
    ------
    Error
        Where another rank failed: ``FN-E721``, or the same as there (``alike``); the rank itself raises what went wrong there.
    """
    if group is None:
        yield
        return
    place = f"what followed when it {what}"
    failed: Exception | None = None
    with group.whole(what):  # an interruption is told at once: the others may not come here
        try:
            yield
        except Exception as error:
            failed = error
    if failed is not None:
        with contextlib.suppress(Error):  # the first one counts
            group.gather((_kind(failed), str(failed) or type(failed).__name__), place)
        raise failed
    for rank, (kind, wrong) in enumerate(group.gather(("", ""), place)):
        if alike and kind:
            code, text = wrong.split(" ", 1)
            raise getattr(errors, kind)(code, f"rank {rank} found: {text}")
        if wrong:
            raise RuntimeFailure("FN-E721", f"rank {rank} failed when it {what}: {wrong}")


def _kind(error: Exception) -> str:
    """Return the name of the class of an error of this project."""
    return next((cls.__name__ for cls in type(error).__mro__ if getattr(errors, cls.__name__, None) is cls), "")


def compare(everyone: list[dict[str, Any]], kind: type[Error], code: str, advice: str) -> None:
    """Compare what ranks say of the same things with what rank 0 says.

    Raises
    ------
    Error
        Of this kind and with ``code``, on all ranks: which rank differs, and in what.
    """
    for rank, said in enumerate(everyone):
        for name in {**said, **everyone[0]}:
            here, first = said.get(name), everyone[0].get(name)
            if here != first:
                raise kind(code, f"{name} is {_short(here)} on rank {rank}, and {_short(first)} on rank 0. {advice}")


def _short(value: Any) -> str:
    text = "missing" if value is None else str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def make_engine(units: list[Any], policy: str, freed: int, group: Group | None) -> Engine:
    """Make the runtime of a model: one for a process alone, or one on each rank over memory that rank 0 makes.

    Raises
    ------
    UsageError
        ``FN-E703`` if the ranks' models, policies or versions differ, ``FN-E704`` if they are on several hosts or share a GPU.
    """
    if group is None:
        return Engine(units, policy, freed)
    compare(group.gather(_host()), UsageError, "FN-E704", "All ranks run on one host, in one container, so far.")
    advice = "All ranks offload the same model with the same policy."
    compare(group.gather(_described(units, policy)), UsageError, "FN-E703", advice)
    _refuse_shared(group.gather(_gpu(json.loads(policy)["device"])))
    engine: Engine | None = None
    try:
        with agreed(group, "made its runtime"):
            if group.rank == 0:
                engine = Engine(units, policy, freed, _core.Ranks(0, group.size, None, None))
        # What rank 0 has found room for is the plan of all ranks.
        resolved = group.gather("" if engine is None else _core.resolved_policy(engine))[0]
        with agreed(group, "took the memory that rank 0 had made"):
            fd = _hand_over(group, None if engine is None else _core.shared_fd(engine))
            if engine is None:
                try:
                    said = json.loads(policy)
                    ours = json.dumps(json.loads(resolved) | {"device": said["device"]})
                    # There the budgets are numbers.
                    grows = said["budget"]["hbm"] in (None, "auto")
                    engine = Engine(units, ours, 0, _core.Ranks(group.rank, group.size, fd, grows))
                finally:
                    os.close(fd)  # the runtime has its own
        assert engine is not None
        group.begin(engine)
        compare(group.gather({"the plan": _core.plan_hash(engine)}, "the plan"), UsageError, "FN-E703", advice)
    except BaseException:
        if engine is not None:
            engine.close()
        raise
    return engine


def _gpu(device: str) -> str:
    """Return what tells one GPU of a host from another; nothing for the host device."""
    if device == "host" or not torch.cuda.is_available():
        return ""
    number = torch.device("cuda" if device == "auto" else device).index or 0
    # torch 2.4 knows no identifier of a device.
    known = getattr(torch.cuda.get_device_properties(number), "uuid", None)
    return str(known or (os.environ.get("CUDA_VISIBLE_DEVICES"), number))


def _refuse_shared(gpus: list[str]) -> None:
    for rank, gpu in enumerate(gpus):
        if bool(gpu) != bool(gpus[0]):
            where = {True: "a GPU", False: "the host"}
            raise UsageError(
                "FN-E704",
                f"rank {rank} computes on {where[bool(gpu)]}, and rank 0 on {where[bool(gpus[0])]}. Say the same kind of device in all policies.",
            )
        if gpu and gpus.index(gpu) != rank:
            raise UsageError(
                "FN-E704",
                f"ranks {gpus.index(gpu)} and {rank} both compute on GPU {gpu}; each needs one of its own. Before funicular.offload call "
                "torch.cuda.set_device with the number in the variable LOCAL_RANK, or name the GPU in each rank's policy.",
            )


def _described(units: list[Any], policy: str) -> dict[str, Any]:
    """Return what must be the same on all ranks before any of them makes a runtime."""
    found: dict[str, Any] = {"the version of funicular": __version__, "the version of torch": str(torch.__version__)}
    found["the number of units"] = len(units)
    for name, params in units:
        for p in params:
            found[f"'{p.name}' of unit '{name}'"] = f"{p.len} of {p.dtype}{'' if p.trained else ', frozen'}"
    sections = json.loads(policy)
    sections.pop("device")  # each has its own
    return found | {f"the policy's {name}": str(value) for name, value in sections.items()}


def _hand_over(group: Group, fd: int | None) -> int:
    """Give the memory that rank 0 has made to all others; returns this rank's descriptor of it."""
    if fd is not None:
        with _listening() as (name, listener):
            group.gather(name)
            for _ in range(group.size - 1):
                _give(listener, fd)
        return fd
    return _fetch(group.gather("")[0])


@contextlib.contextmanager
def _listening() -> Iterator[tuple[str, socket.socket]]:
    """Listen under a random name in the abstract namespace, which leaves no file."""
    name = f"funicular-{secrets.token_hex(16)}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen(64)
        listener.settimeout(_PATIENCE)
        yield name, listener


def _give(listener: socket.socket, fd: int) -> None:
    while True:
        try:
            taker, _ = listener.accept()
        except TimeoutError as error:
            raise RuntimeFailure("FN-E721", f"no rank came for the shared memory within {_PATIENCE:.0f} s.") from error
        with taker:
            if _user_of(taker) == os.geteuid():
                socket.send_fds(taker, [_WORD], [fd])
                return


def _fetch(name: str) -> int:
    with socket.socket(socket.AF_UNIX) as taker:
        taker.settimeout(_PATIENCE)
        try:
            taker.connect(f"\0{name}")
            word, fds, _, _ = socket.recv_fds(taker, len(_WORD), 1)
        except OSError as error:
            raise RuntimeFailure("FN-E721", f"the shared memory cannot be fetched from rank 0: {error}") from error
        if word != _WORD or len(fds) != 1 or _user_of(taker) != os.geteuid():
            for fd in fds:
                os.close(fd)
            raise RuntimeFailure("FN-E721", "what was fetched from rank 0 is not its shared memory.")
        return fds[0]


def _user_of(peer: socket.socket) -> int:
    """Return the user at the other end."""
    packed = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", packed)[1]  # type: ignore[no-any-return]
