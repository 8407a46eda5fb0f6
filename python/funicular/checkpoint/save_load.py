"""Saving and loading checkpoints: a directory of safetensors that any program can read, and a manifest."""

from __future__ import annotations

import json
import logging
import operator
import os
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from funicular import _core
from funicular.checkpoint.collect import Snapshot, config_files, named_tensors
from funicular.checkpoint.facts import decode, encode, random_states, set_random_states
from funicular.checkpoint.partial import check_whole, mark_partial, mark_whole
from funicular.checkpoint.quiesce import between_steps, preserve_aliased, quiesce
from funicular.checkpoint.restore import Loader, compare_groups, compare_model, take_groups
from funicular.checkpoint.source import Source
from funicular.checkpoint.training import check_options, check_states, check_training
from funicular.checkpoint.under_way import ended, finish, prune, started
from funicular.errors import Error, UsageError
from funicular.optim.taken_over import give_way
from funicular.ranks.meeting import agreed
from funicular.report.log import Progress, note
from funicular.torch_internals.memory import stream_of
from funicular.torch_internals.modules import uncompiled
from funicular.windows import signals
from funicular.windows.lookup import session_for
from funicular.windows.ranked import meet, whole

if TYPE_CHECKING:
    from torch import nn

    from funicular.windows.session import Session

__all__ = ["Loaded", "SaveHandle", "load", "load_weights", "save"]

_log = logging.getLogger("funicular")

#: the last save of each model
_last: weakref.WeakKeyDictionary[nn.Module, SaveHandle] = weakref.WeakKeyDictionary()
#: what makes an optimizer's steps wait
_hooks: weakref.WeakKeyDictionary[torch.optim.Optimizer, torch.utils.hooks.RemovableHandle] = (
    weakref.WeakKeyDictionary()
)


class SaveHandle:
    """A save under way. It goes on whether or not the handle is kept; its error is raised here, or by the next save."""

    def __init__(self, path: Path, core: _core.Save | None) -> None:
        self.path = path
        #: None where another rank writes it
        self._core = core
        self._told = core is None
        if core is not None:
            started(core, path)

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._core is None or self._core.done()

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes done, and bytes in all."""
        return (0, 0) if self._core is None else self._core.progress()

    def cancel(self) -> None:
        """Give it up: nothing of it is kept, earlier checkpoints stay. At once if it has ended."""
        if self._core is not None:
            self._core.cancel()

    def wait(self) -> None:
        """Wait until the checkpoint is there, durable and under its name.

        Raises
        ------
        StorageError
            ``FN-E401`` without space, ``FN-E403`` when the disk or the system refuses. Training can go on.
        RuntimeFailure
            ``FN-E411`` if a tensor was changed before it was read, ``FN-E412`` after :meth:`cancel`.
        """
        if self._core is None:
            return
        told = Progress("FN-I404 saving %s", self.path)
        try:
            with told:
                while (notes := self._core.wait(told.pause)) is None:
                    told.at(*self.progress)
        except Error:
            self._told = True
            ended(self._core)
            raise
        if not self._told:
            self._told = True
            ended(self._core)
            for text in notes:
                note(text)
            told.end("FN-I405 saved %s: %.2f GB", self.path, self.progress[1] / 1e9)

    def _raise_untold(self) -> None:
        if self.done() and not self._told:
            self.wait()


class Loaded(NamedTuple):
    """What a checkpoint says besides tensors."""

    #: the largest number of steps that a parameter has had
    step: int
    #: what was given to :func:`save`
    extra: Any


@torch.inference_mode(mode=False)
def save(
    model: nn.Module,
    opt: torch.optim.Optimizer | None,
    path: str | os.PathLike[str],
    *,
    extra: Any = None,
    wait: bool = True,
    keep: int | None = None,
    overwrite: bool = False,
    weights: str = "param",
    shard_bytes: int = 5_000_000_000,
) -> SaveHandle:
    """Save a model, its optimizer and the random states at ``path``, a directory.

    Of several ranks (docs/ranks.md) rank 0 writes it, and alone may call; for the others the call does nothing.

    The weights are sharded safetensors with an index, as ``from_pretrained`` takes them; tied tensors are stored once. The
    states are safetensors too, by parameter name. Gradients are not saved. The directory appears whole or not at all.

    Parameters
    ----------
    model : nn.Module
        Offloaded or not, or a module that wraps one offloaded model.
    opt : Optimizer or None
        ``funicular.AdamW`` or ``torch.optim.AdamW``; ``None`` saves the model alone.
    path : path
        The checkpoint's directory, made by the call; its parents too.
    extra : any
        Numbers, text, and lists, tuples and dicts of them: a scheduler's ``state_dict()``, a position in the data. They come
        back equal and of the same types.
    wait : bool
        False: return at once. What is saved is the state at the call, however long the writing takes: a step waits for
        parameters that it is about to overwrite and that were not read yet. An earlier save is waited for.
    keep : int or None
        Then keep so many checkpoints of the sequence of ``path``: itself, and those of the highest steps beside it whose names
        differ from its own in their last number only. Others of the sequence are removed.
    overwrite : bool
        Replace a checkpoint at ``path``; nothing else is ever replaced. Files that the user put into it stay there.
    weights : str
        ``"param"``: in the parameters' types. ``"fp32"``: 16-bit parameters as their fp32 masters.
    shard_bytes : int
        Bytes of a file of tensors at most; a tensor is never cut.

    Raises
    ------
    UsageError
        ``FN-E402`` if something is there, ``FN-E408`` for what cannot be saved, ``FN-E114`` for a part of an offloaded model.
    StorageError
        ``FN-E401`` and ``FN-E403``, here or, with ``wait=False``, from the handle and the next save.
    BudgetError
        ``FN-E409`` if the host budget leaves too little for the frames (128 KiB at least).
    """
    model = uncompiled(model)
    session = session_for(model)
    if weights not in ("param", "fp32"):
        raise UsageError("FN-E408", f"weights={weights!r}. Say 'param' or 'fp32'.")
    if keep is not None:
        keep = _count("keep", keep, "Keep at least the checkpoint that is being saved")
    shard_bytes = _count("shard_bytes", shard_bytes, "Say how many bytes a file of tensors may have")
    prune()
    before = _last.get(model)
    if before is not None:
        before._raise_untold()
    check_whole(model)
    ranks = None if session is None else session.group
    if ranks is not None and ranks.rank != 0:
        return SaveHandle(Path(path), None)
    if session is None:
        handle = _begin(None, model, opt, Path(path), extra, wait, keep, overwrite, weights, shard_bytes)
    else:
        # As in a signal handler: what is under way goes on afterwards.
        amid = signals.under_way(session)
        with session.lock:
            if amid:
                signals.look(session)
            else:
                quiesce(session)
            handle = _begin(session, model, opt, Path(path), extra, wait, keep, overwrite, weights, shard_bytes)
            if not wait:
                preserve_aliased(session)
                if amid:
                    signals.await_reads(session)
    if wait:
        try:
            handle.wait()
        except BaseException:
            handle.cancel()
            raise
    else:
        _last[model] = handle
    return handle


def _count(name: str, value: Any, advice: str) -> int:
    """Return a whole number of at least one, as the core takes it."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise UsageError("FN-E408", f"{name}={value!r:.100}. {advice}: a whole number, 1 at least.")
    return min(number, 2**63 - 1)


def _begin(
    session: Session | None,
    model: nn.Module,
    opt: torch.optim.Optimizer | None,
    path: Path,
    extra: Any,
    wait: bool,
    keep: int | None,
    overwrite: bool,
    weights: str,
    shard_bytes: int,
) -> SaveHandle:
    fp32 = weights == "fp32"
    named = named_tensors(model)
    for name in (*named.params, *named.buffers, *named.aliases):
        encode(name, f"the name {name!r}")
    device = None if session is None else session.device
    snapshot = Snapshot(fp32=fp32, capture=not wait, device=device)
    training: dict[str, Any] = {"extra": encode(extra, "extra")}
    if opt is not None:
        training["optimizer"] = type(opt).__name__
        training["groups"] = snapshot.groups(opt, named.params)
    for name, p in named.params.items():
        snapshot.param(name, p)
    for name, b in named.buffers.items():
        snapshot.buffer(name, b)
    entries = snapshot.entries(named.entries)
    training |= {
        "step": max(snapshot.steps.values(), default=0),
        "steps": snapshot.steps,
        "edited": snapshot.edited,
        "dtypes": snapshot.dtypes,
        "weights": weights,
        "tied": named.aliases,
        "entries": entries,
        "model": type(model).__name__,
        "torch": str(torch.__version__),
        "random": random_states(),
        "policy": None if session is None else session.policy.to_dict(),
    }
    read = threading.Event()

    def changed() -> str | None:
        name = snapshot.changed()
        read.set()
        return name

    request = _core.SaveRequest(
        path=os.fspath(path),
        overwrite=overwrite,
        keep=keep,
        tensors=snapshot.tensors,
        aliases=list(named.aliases.items()),
        files=list(config_files(model, fp32=fp32)),
        training=json.dumps(training),
        shard=shard_bytes,
    )
    engine, stream = (None, 0) if session is None else (session.engine, stream_of(session.device))
    core = _core.save(engine, request, changed, stream)
    if session is not None:
        session.saving = core
    if opt is not None and not wait and snapshot.held:
        _step_after(opt, read, core)
    return SaveHandle(path, core)


def _step_after(opt: torch.optim.Optimizer, read: threading.Event, core: _core.Save) -> None:
    """Have the next steps wait until ordinary tensors were read."""

    def hook(*_: Any) -> None:
        while not read.wait(0.05) and not core.done():
            pass

    # Removed by the next save: a hook that removes itself would disturb those that come after it.
    before = _hooks.pop(opt, None)
    if before is not None:
        before.remove()
    _hooks[opt] = opt.register_step_pre_hook(hook)


@torch.inference_mode(mode=False)
def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    opt: torch.optim.Optimizer | None = None,
    *,
    random: bool = True,
) -> Loaded:
    """Load a checkpoint into a model and an optimizer, wherever their bytes live now.

    Everything but the tensors' bytes is compared before anything is touched. If there is something to lose (the optimizer
    has stepped, or the model is not offloaded), the bytes are compared with their checksums first too; else while they are
    loaded. A save of this process to the same path is waited for. Of several ranks all call it; random states are rank 0's alone.

    Parameters
    ----------
    path : path
        The checkpoint's directory.
    model : nn.Module
        With the names, shapes and types of the saved one; any policy and device, or not offloaded.
    opt : Optimizer or None
        With the groups of the saved one. ``None`` loads the model alone; the masters of its weights begin anew.
    random : bool
        Set the random generators as they were.

    Returns
    -------
    Loaded
        The step, and ``extra``.

    Raises
    ------
    UsageError
        ``FN-E404`` if there is no checkpoint, ``FN-E405`` another version of the format, ``FN-E407`` another model, ``FN-E114`` a part of
        an offloaded model.
    StorageError
        ``FN-E406`` if a file is missing, truncated or damaged. If that was found while loading, the model refuses to run
        (``FN-E410``) until a load succeeds.
    BudgetError
        ``FN-E409``.
    """
    model = uncompiled(model)
    session = session_for(model)
    ranks = None if session is None else session.group
    if ranks is not None:
        finish(path)  # the last save, by rank 0: it has ended before any rank looks
        meet(session, f"a load of {os.fspath(path)}")
    with agreed(ranks, f"looked at {os.fspath(path)}", alike=True):
        source = Source(Path(path), own=True)
        said = check_training(source)
        named = named_tensors(model)
        compare_model(source, model, named, exact=True)
        groups = [] if opt is None else compare_groups(source, opt, named)
        if opt is not None:
            check_states(source, named, groups)
            check_options(source, opt)
        # A model that is not offloaded runs in torch's own code, which does not know of half a load.
        if session is None or (opt is not None and any(len(states) > 0 for states in opt.state.values())):
            source.core.verify(*((0, 1) if ranks is None else (ranks.rank, ranks.size)))
    if session is None:
        try:
            _fill(source, model, named, None, opt, groups)
        except BaseException as error:
            mark_partial(model, opt, f"loading {source.path} failed halfway ({error}).")
            raise
        mark_whole(model)
    else:
        _fill_offloaded(source, model, named, session, opt, groups)
    if opt is not None:
        take_groups(source, opt)
    if random and "random" in said and (ranks is None or ranks.rank == 0):
        set_random_states(said["random"])
    return Loaded(said["step"], decode(said["extra"]))


def load_weights(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Load what other programs saved, any directory of the model's safetensors, into a model that one process has offloaded.

    Names are converted as ``from_pretrained`` does, and floating-point types as torch does. Masters begin anew.

    Raises
    ------
    UsageError
        ``FN-E404`` if there are no files, ``FN-E407`` if names are missing or shapes differ. Nothing was loaded then.
    """
    model = uncompiled(model)
    session = session_for(model)
    assert session is not None
    source = Source(Path(path), own=False)
    source.convert_for(model)
    named = named_tensors(model)
    unexpected = compare_model(source, model, named, exact=False)
    if unexpected:
        _log.warning("FN-W407 %s has %s, which the model does not have.", path, unexpected)
    _fill_offloaded(source, model, named, session, None, [])
    if source.conversion is not None:
        source.conversion.done()


def _fill_offloaded(
    source: Source, model: nn.Module, named: Any, session: Session, opt: Any, groups: list[list[str]]
) -> None:
    between_steps(session)
    give_way(opt)
    with session.lock:
        kept, session.partial = session.partial, ""
        try:
            quiesce(session)
            if session.group is not None:
                # A save on this rank: after the meeting others overwrite what it has yet to read.
                signals.await_reads(session)
        except BaseException:
            session.partial = kept
            raise
        with whole([session], "a load"):
            # None changes what another still reads.
            meet(session, "a load, before it changes anything")
            _fill(source, model, named, session, opt, groups)


def _fill(
    source: Source, model: nn.Module, named: Any, session: Session | None, opt: Any, groups: list[list[str]]
) -> None:
    loader = Loader(source, model, named, session)
    loader.model()
    total = sum(p.numel() * p.element_size() for p in named.params.values())
    told = Progress("FN-I406 loading %s", source.path)
    try:
        if session is not None:
            session.loading = True
        if opt is not None:
            loader.optimizer(opt, groups)
        with told:
            loader.run(told.at)
    except BaseException as error:
        if session is not None:
            session.partial = f"loading {source.path} failed halfway ({error})."
        raise
    finally:
        if session is not None:
            session.loading = False
    told.end("FN-I407 loaded %s: weights of %.2f GB in %.1f s", source.path, total / 1e9, told.seconds)
