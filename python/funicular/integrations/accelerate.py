"""accelerate: one call in place of ``prepare`` for a model and its optimizer."""

from __future__ import annotations

import contextlib
import functools
import json
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from funicular.checkpoint.save_load import load, save
from funicular.errors import UsageError
from funicular.integrations.policies import policy_of
from funicular.integrations.settings import (
    MANIFEST,
    check_accelerator,
    check_ranks,
    compare_ranks,
    group_of,
    keep_no_casts,
)
from funicular.offloading import offload
from funicular.optim.adamw import AdamW
from funicular.windows.lookup import session_for
from funicular.windows.ranked import together

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from torch import nn

__all__ = ["prepare"]

#: where ``save_state`` puts an offloaded model with its states, in the folder that it is given
_FOLDER = "funicular"
#: the file that it writes last, once the files of all processes are there
_MARK = "funicular.saved.json"


def prepare(
    accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer, policy: Any = None
) -> tuple[Any, Any]:
    """Offload a model and prepare it with its optimizer; everything else is prepared by the accelerator as ever.

    ``save_state`` and ``load_state`` stream the model and the states through ``funicular.save`` and ``funicular.load``, into a folder of
    their own beside accelerate's files: no second copy of them is made. All processes of the accelerator train the model together
    (docs/ranks.md); ``DistributedDataParallel`` is not put around it.

    Parameters
    ----------
    accelerator : accelerate.Accelerator
        Of one process, or of several on one host.
    model : nn.Module
        Offloaded already, or to be offloaded here.
    optimizer : torch.optim.Optimizer
        ``funicular.AdamW``; made before or after.
    policy : any
        All that ``funicular.offload`` takes, or the path of a DeepSpeed configuration.

    Returns
    -------
    tuple
        The model and the optimizer, as the accelerator returns what it prepares.

    Raises
    ------
    UsageError
        ``FN-E141`` for other optimizers, DeepSpeed and FSDP, and fp16 in several processes. Besides, what ``funicular.offload`` raises.
    """
    check_accelerator(accelerator)
    if not isinstance(optimizer, AdamW):
        raise UsageError(
            "FN-E141",
            f"{type(optimizer).__name__} keeps its states in ordinary memory, and save_state would copy them. Give funicular.AdamW.",
        )
    if session_for(model) is None:
        keep_no_casts(accelerator)
        offload(model, policy_of(policy, accelerator.device), group=group_of(accelerator))
    session = session_for(model)
    assert session is not None
    check_ranks(session, accelerator.num_processes, accelerator.process_index)
    # As for evaluation: nothing that exchanges gradients, which is done already, goes around it. It is where it belongs, too.
    prepared = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    prepared._is_accelerate_prepared = True
    # Not placed: it would move every state to the GPU.
    wrapper = accelerator.prepare_optimizer(optimizer, device_placement=False)
    wrapper._is_accelerate_prepared = True
    _saver_of(accelerator).add(_Prepared(weakref.ref(model), weakref.ref(prepared), weakref.ref(wrapper)))
    return prepared, wrapper


class _Prepared(NamedTuple):
    """A model with its optimizer, of which the accelerator is the owner: what it frees, it frees."""

    model: Callable[[], Any]
    #: what a compiler made of the model, or the model itself
    prepared: Callable[[], Any]
    optimizer: Callable[[], Any]

    def indices(self, models: list[Any]) -> list[int]:
        """Return which of accelerate's models it is: what was prepared, or the model itself, by version of accelerate."""
        mine = [one for one in (self.prepared(), self.model()) if one is not None]
        return [index for index, model in enumerate(models) if any(model is one for one in mine)]


def _saver_of(accelerator: Any) -> _Saver:
    saver = accelerator.__dict__.get("_funicular_saver")
    if saver is None:
        saver = accelerator._funicular_saver = _Saver(accelerator)
    found: _Saver = saver
    return found


class _Saver:
    """Hooks of one accelerator: they take models and their optimizers out of what accelerate saves and loads by itself."""

    def __init__(self, accelerator: Any) -> None:
        self._all: list[_Prepared] = []
        self._models: Callable[[], list[Any]] = lambda: accelerator._models
        self._processes, self._first = accelerator.num_processes, accelerator.is_main_process
        #: the folder of the save under way
        self._folder = Path()
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)
        accelerator.save_state = self._marking(self._without_states(accelerator.save_state, "saved their states"))
        accelerator.load_state = self._without_states(accelerator.load_state, "loaded their states")

    def add(self, new: _Prepared) -> None:
        """Save one more from now on. What the accelerator has freed goes, and so does what was prepared before of the same model."""
        self._all = [one for one in self._alive() if one.indices(self._models()) and one.model() is not new.model()]
        self._all.append(new)

    def _alive(self) -> list[_Prepared]:
        return [one for one in self._all if one.model() is not None and one.optimizer() is not None]

    def _together(self, what: str) -> contextlib.AbstractContextManager[None]:
        alive = self._alive()
        return together(session_for(alive[0].model()) if alive else None, what)

    def _take_out(self, models: list[Any], of: list[Any]) -> list[tuple[str, _Prepared]]:
        """Take what is saved here out of accelerate's list, and return it with the names of its folders.

        Raises
        ------
        UsageError
            ``FN-E408`` for a model that accelerate has not: its optimizer would be saved without its states.
        """
        found, places = [], []
        for number, one in enumerate(self._alive()):
            mine = one.indices(models)
            if not mine:
                raise UsageError(
                    "FN-E408",
                    f"the accelerator does not know {type(one.model()).__name__} any more (free_memory, clear). Prepare it again, or call "
                    "funicular.save.",
                )
            places += mine
            found.append((f"{_FOLDER}_{number}" if number else _FOLDER, one))
        for place in sorted(places, reverse=True):
            of.pop(place)
        return found

    def _save(self, models: list[Any], weights: list[Any], output_dir: str) -> None:
        found = self._take_out(models, weights)
        self._folder = Path(output_dir)
        # What is written over does not count until it is whole again.
        with self._together("saved the model"):
            if self._first:
                (self._folder / _MARK).unlink(missing_ok=True)
            for name, one in found:
                save(one.model(), one.optimizer().optimizer, self._folder / name, overwrite=True)

    def _marking(self, call: Any) -> Any:
        """Have the last file say that the save has ended, and how many processes took part."""

        @functools.wraps(call)
        def marking(*args: Any, **kwargs: Any) -> Any:
            found = call(*args, **kwargs)
            with self._together("marked the folder as whole"):
                if self._first:
                    (self._folder / _MARK).write_text(json.dumps({"processes": self._processes}) + "\n")
            return found

        return marking

    def _load(self, models: list[Any], input_dir: str) -> None:
        folder = Path(input_dir)
        found = self._take_out(models, models)
        for name, one in found:
            if not (folder / name / MANIFEST).exists():
                raise UsageError(
                    "FN-E404",
                    f"{input_dir} has no folder {name} for {type(one.model()).__name__}: it was saved without funicular, or with fewer "
                    "offloaded models. Load its model.safetensors by funicular.offload(model, policy, checkpoint=...); states of optimizers "
                    "cannot be taken over.",
                )
        if found and not (folder / _MARK).exists():
            raise UsageError(
                "FN-E404",
                f"{input_dir} has no {_MARK}: its save did not end, and its files may be of two saves. Load an earlier one; funicular.load "
                f"reads the model and the states in its folder {_FOLDER}, which are of one save.",
            )
        if found and self._first:
            compare_ranks(folder, json.loads((folder / _MARK).read_text())["processes"], self._processes)
        for name, one in found:
            # accelerate has the random states in files of its own.
            load(folder / name, one.model(), one.optimizer().optimizer, random=False)

    def _without_states(self, call: Any, what: str) -> Any:
        """Have optimizers answer with a mark instead of their states, and take that mark back; no rank goes on before all are done."""

        @functools.wraps(call)
        def without(*args: Any, **kwargs: Any) -> Any:
            with contextlib.ExitStack() as marked:
                for one in self._alive():
                    marked.enter_context(_marked(one.optimizer()))
                marked.enter_context(self._together(what))
                return call(*args, **kwargs)

        return without


@contextlib.contextmanager
def _marked(optimizer: Any) -> Iterator[None]:
    optimizer.state_dict = lambda: {"funicular": f"the states are in the folder '{_FOLDER}'"}
    optimizer.load_state_dict = lambda state: None
    try:
        yield
    finally:
        del optimizer.state_dict, optimizer.load_state_dict
