"""Several processes that train one model, and their judge: one script runs on N ranks, and in one process as the reference of N ranks.

A script takes a :class:`Ranked` and never asks which of the two it drives. Each rank's notes are compared with the reference's.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import functools
import importlib
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import facts
import forks
import funicular
from children import FOLDERS
from funicular.reference import ReferenceAdamW, backward_of_ranks, mean_of_ranks
from models import CUDA
from twin import SEED, Mismatch, World, difference, same

#: Seconds after which processes hang. Eight busy processes beside them make them ten times as slow.
PATIENCE = 200


class Ended(AssertionError):
    """A rank ended in an error; ``ends`` has each rank's status and what it wrote last."""

    def __init__(self, ends: list[tuple[int | None, str]]) -> None:
        said = "\n".join(f"rank {rank}: status {status}\n{text}" for rank, (status, text) in enumerate(ends))
        super().__init__(said)
        self.ends = ends


class Ranks:
    """Processes that run one function of a module of the tests, ``module:function``, each as one rank, on GPUs each with one of its own.

    ``ready`` is what the process has run before from which they are forked. Unless ``whole_end``, Python's own end
    is left out, except on GPUs.
    """

    def __init__(
        self, size: int, function: str, *arguments: Any, broken: str = "", ready: str = "", whole_end: bool = False
    ) -> None:
        if CUDA and torch.cuda.device_count() < size:
            pytest.skip(f"{size} ranks need {size} GPUs, there are {torch.cuda.device_count()}")
        self.folder = Path(tempfile.mkdtemp(prefix="test-ranks-"))
        (self.folder / "arguments").write_bytes(pickle.dumps((function, arguments, broken)))
        self.processes: list[subprocess.Popen[str]] = []
        for rank in range(size):
            code = f"import sys; sys.path[:0] = {FOLDERS!r}\nimport several; several.child({str(self.folder)!r}, {rank}, {size}, {whole_end})"
            with (self.folder / f"{rank}.said").open("w") as said:
                streams: dict[str, Any] = {"stdout": said, "stderr": said, "stdin": subprocess.DEVNULL}
                self.processes.append(_start(code, ready, streams))

    def said(self, rank: int) -> str:
        """What a rank wrote."""
        return (self.folder / f"{rank}.said").read_text()

    def wait(self, seconds: float = PATIENCE) -> list[tuple[int | None, str]]:
        """Status of each, and what it wrote; None for one that had to be killed. Once one has failed, the others have a few seconds."""
        end = time.monotonic() + seconds
        failed = False
        while any(process.poll() is None for process in self.processes) and time.monotonic() < end:
            if not failed and any(process.poll() not in (None, 0) for process in self.processes):
                failed, end = True, min(end, time.monotonic() + 20)
            time.sleep(0.005)
        late = [process.poll() is None for process in self.processes]
        for process in self.processes:
            process.kill()
            process.wait()
        return [
            (None if hung else process.returncode, self.said(rank))
            for rank, (process, hung) in enumerate(zip(self.processes, late, strict=True))
        ]

    def results(self, seconds: float = PATIENCE) -> list[Any]:
        """What the function returned on each rank; all must end well."""
        try:
            ends = self.wait(seconds)
            if any(status != 0 for status, _ in ends):
                raise Ended(ends)
            return [pickle.loads((self.folder / f"{rank}.result").read_bytes()) for rank in range(len(ends))]
        finally:
            self.end()

    def end(self) -> None:
        """Kill what is left."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _start(code: str, ready: str, streams: dict[str, Any]) -> subprocess.Popen[str]:
    if CUDA:
        # The threads that torch starts for the backwards of several GPUs find its pool of threads broken after a fork.
        return subprocess.Popen([sys.executable, "-c", f"{ready}\n{code}"], **streams)
    return forks.python(code, **streams, **({"ready": ready} if ready else {}))


def run(size: int, function: str, *arguments: Any, broken: str = "", ready: str = "") -> list[Any]:
    """Run a function on ranks; what it returned on each."""
    return Ranks(size, function, *arguments, broken=broken, ready=ready).results()


def child(folder: str, rank: int, size: int, whole_end: bool) -> None:
    """Be one rank."""
    function, arguments, broken = pickle.loads((Path(folder) / "arguments").read_bytes())
    # Before torch's threads start, which read the environment.
    os.environ["RANKS_FOLDER"] = folder
    patience = datetime.timedelta(seconds=PATIENCE)
    backend = "gloo"
    if CUDA:
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(rank)
        torch.use_deterministic_algorithms(True)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=patience)
    module, name = function.split(":")
    faulthandler.dump_traceback_later(PATIENCE - 10)  # what hangs says where
    with mutated(broken):
        result = getattr(importlib.import_module(module), name)(*arguments)
    (Path(folder) / f"{rank}.result").write_bytes(pickle.dumps(pytree.tree_map(kept, result)))
    if not (whole_end or CUDA):
        forks.end()


@contextlib.contextmanager
def mutated(broken: str) -> Iterator[None]:
    """Break a mechanism by name; none for an empty one."""
    if not broken:
        yield
        return
    from mutations import break_

    with break_(broken):
        yield


@dataclass
class Ranked:
    """One side of a comparison: a rank, or the reference of all of them (``rank`` is None)."""

    size: int
    rank: int | None
    world: World
    model: nn.Module = None  # type: ignore[assignment]
    opt: torch.optim.Optimizer = None  # type: ignore[assignment]
    folder: str = ""
    notes: list[tuple[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(SEED)
        ranks = range(self.size)
        self._generators = [torch.Generator().manual_seed(SEED + 1 + rank) for rank in ranks]

    @property
    def offloaded(self) -> bool:
        return self.rank is not None

    @property
    def device(self) -> torch.device:
        """Where the program computes."""
        return self.world.torch_device

    def wrap(self, model: nn.Module, frames: float = 3, **sections: Any) -> nn.Module:
        """Offload it on a rank."""
        if not self.offloaded:
            return model.to(self.device)
        funicular.offload(model, self.world.policy(model, frames, **sections))
        return model

    def adamw(self, params: Any = None, **options: Any) -> torch.optim.Optimizer:
        """This project's AdamW, or the plain optimizer of the same bits."""
        cls = funicular.AdamW if self.offloaded else ReferenceAdamW
        return cls(
            self.model.parameters() if params is None else params, **({"lr": 1e-2, "weight_decay": 0.1} | options)
        )

    def data(self, rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A rank's next normal numbers."""
        return torch.randn(*shape, generator=self._generators[rank]).to(self.device, dtype)

    def tokens(self, rank: int, *shape: int, below: int = 31) -> Tensor:
        """A rank's next indices."""
        return torch.randint(below, shape, generator=self._generators[rank]).to(self.device)

    def backward(self, loss: Callable[[int], Tensor], ranks: Sequence[int] | None = None) -> None:
        """A backward of each of these ranks, of the loss that the function computes for it."""
        taking = range(self.size) if ranks is None else ranks
        if self.rank is None:
            losses = [functools.partial(loss, r) if r in taking else None for r in range(self.size)]
            self.notes.append(("losses", [kept(x) for x in self._all(losses)]))
            return
        own = None
        if self.rank in taking:
            own = loss(self.rank)
            own.backward()
            if self.world.spare != "auto":
                facts.rest(0.02)  # what is begun ahead is made
        self.notes.append(("losses", kept(own)))

    def _all(self, losses: list[Any]) -> list[Tensor | None]:
        return backward_of_ranks(self.model.parameters(), losses)

    def record(self, label: str, value: Any) -> None:
        """Note a tensor or a number that all ranks have alike."""
        self.notes.append((label, kept(value)))

    def alone(self, label: str, value: Any) -> None:
        """Note what rank 0 alone has."""
        value = kept(value)
        ranks = [value, *[None] * (self.size - 1)]
        self.notes.append((f"of rank 0: {label}", ranks if self.rank is None else value))

    def record_grads(self) -> None:
        """Note every parameter's gradient, or that it has none."""
        for name, p in self.model.named_parameters():
            self.record(f"{name}.grad", p.grad)

    def record_weights(self) -> None:
        """Note every parameter, and its states."""
        for name, p in self.model.named_parameters():
            self.record(name, p)
            states = self.opt.state.get(p) if self.opt is not None else None
            for key in ("exp_avg", "exp_avg_sq"):
                self.record(f"{name}.{key}", states[key] if states else None)

    def step(self) -> None:
        """Step and clear."""
        self.opt.step()
        self.opt.zero_grad()


def fully_shard() -> Any:
    """FSDP's function of that name, from where this torch has it."""
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:  # until torch 2.5
        from torch.distributed._composable.fsdp import fully_shard
    return fully_shard


def ordered(bucket: Any) -> Any:
    """A communication hook of DDP: gather all, and take the mean as the reference does."""
    mine = bucket.buffer()
    pieces = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(pieces, mine)
    done: torch.futures.Future[Any] = torch.futures.Future()
    done.set_result(mean_of_ranks(pieces))
    return done


def kept(value: Any) -> Any:
    """A copy of a tensor in host memory; anything else as it is."""
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def play(script: str, options: dict[str, Any], size: int, rank: int | None, world: World) -> list[tuple[str, Any]]:
    """Run a script, ``module:function``, on one side; its notes."""
    torch.set_num_threads(1)
    module, name = script.split(":")
    run = Ranked(size, rank, world)
    getattr(importlib.import_module(module), name)(run, **options)
    if run.model is not None:
        run.record_grads()
        run.record_weights()
    return run.notes


def play_rank(script: str, options: dict[str, Any], world: World) -> list[tuple[str, Any]]:
    """Run a script on this rank."""
    return play(script, options, dist.get_world_size(), dist.get_rank(), world)


def one_is_killed(size: int, victim: int, world: World, where: str) -> None:
    """Have a rank that trains kill itself there; each other one names it, soon."""
    ranks = Ranks(size, "rank_checks:killed", world, where, victim)
    try:
        ends = ranks.wait()  # a rank that waits for long is killed, and has no status
        assert ends[victim][0] == -9
        for rank in {*range(size)} - {victim}:
            assert ends[rank][0] == 0, ends[rank][1]
            code, text = pickle.loads((ranks.folder / f"{rank}.result").read_bytes())
            assert code == "FN-E701", text
            assert f"rank {victim}" in text
    finally:
        ranks.end()


def compare(script: str, size: int, world: World, broken: str = "", whole_end: bool = False, **options: Any) -> None:
    """Run a script on ranks and as their reference, and compare every note of every rank."""
    ranks = Ranks(size, "several:play_rank", script, options, world, broken=broken, whole_end=whole_end)
    try:
        plain = play(script, options, size, None, world)
    except BaseException:
        ranks.end()
        raise
    for rank, notes in enumerate(ranks.results()):
        match(rank, plain, notes)


def match(rank: int, plain: list[tuple[str, Any]], notes: list[tuple[str, Any]]) -> None:
    """Raise :class:`Mismatch` unless a rank noted what the reference says."""
    if [name for name, _ in plain] != [name for name, _ in notes]:
        raise Mismatch(f"rank {rank}: other notes: {[n for n, _ in plain]} and {[n for n, _ in notes]}")
    for i, ((name, a), (_, b)) in enumerate(zip(plain, notes, strict=True)):
        a = a[rank] if name == "losses" or name.startswith("of rank 0:") else a
        if not same(a, b):
            raise Mismatch(f"rank {rank}, note {i}, {name}: {difference(a, b)}")


if __name__ == "__main__":
    sys.exit("import me")
