"""Where the optimizer states of one parameter are: in the runtime's tiers, or ordinary tensors where nothing is offloaded."""

from __future__ import annotations

import contextlib
import sys
import weakref
from typing import TYPE_CHECKING, Any

import torch

from funicular.errors import BudgetError
from funicular.homes.edits import edit_of_shared
from funicular.optim.state_values import (
    Unusable,
    as_torch_loads,
    blank,
    cloned,
    content,
    fits,
    packed,
    step_count,
    usable,
)
from funicular.torch_internals.memory import storage_uses
from funicular.units.dtypes import MOMENTS, has_whole_master, is_half, state_dtype
from funicular.units.param import ref_of
from funicular.windows.lookup import owner_of
from funicular.windows.signals import note_step

if TYPE_CHECKING:
    from collections.abc import Callable

    from funicular.errors import Error
    from funicular.units.param import PagedParam

__all__ = ["EDITED", "MANAGED", "Handed", "StatePlaces"]

MANAGED = ("step", *MOMENTS)
#: a version that no parameter has
EDITED = -2


def _nowhere() -> None:
    return None


class Handed:
    """A tensor in other hands that stands for a state: one that was given out, or one that was assigned."""

    __slots__ = ("behind", "lent", "seen", "tensor", "version")

    def __init__(self, tensor: torch.Tensor, lent: int = 0) -> None:
        self.tensor = tensor
        #: bytes counted in the host budget
        self.lent = lent
        #: version and content when the runtime had the same; None: it has not
        self.version = -1
        self.seen: Any = None
        #: a step has changed the runtime's since
        self.behind = False

    def same(self, param: torch.Tensor) -> None:
        """Take note that the runtime has the same bytes now."""
        self.version, self.seen, self.behind = self.tensor._version, content(param, self.tensor), False

    def edited(self, param: torch.Tensor) -> bool:
        """Whether the tensor has changed since :meth:`same`, counted by torch or not."""
        return self.tensor._version != self.version or content(param, self.tensor) != self.seen

    def held(self) -> bool:
        """Whether anything else has the tensor, or a view of its memory."""
        return any(now > alone for now, alone in zip(self._uses(), _ALONE, strict=True))

    def _uses(self) -> tuple[int, int]:
        return sys.getrefcount(self.tensor), storage_uses(self.tensor.untyped_storage())


#: how a tensor looks that nothing else has
_ALONE = Handed(torch.empty(1, device="cpu"))._uses()


class StatePlaces:
    """The states themselves; :class:`funicular.optim.states.ParamStates` shows them as a dictionary."""

    def __init__(self, param: torch.Tensor) -> None:
        self.param = param
        self.count = 0
        #: there are states: from the first step on
        self.begun = False
        #: a tensor of the user's was given as a state since the last step
        self.given = False
        #: keys that the user removed since
        self._missing: set[str] = set()
        self._ref: Callable[[], PagedParam | None] = _nowhere
        #: version of an ordinary parameter after its last step
        self.plain_version = -1
        #: the states themselves, where they are ordinary tensors
        self._tensors: dict[str, torch.Tensor] = {}
        #: what was fetched or assigned, where they are in the runtime
        self._fetched: dict[str, Handed] = {}
        #: the tensor that was handed out as ``step``
        self._step: Handed | None = None
        #: the user's own entries
        self._own: dict[Any, Any] = {}
        #: why there are no states any more
        self._lost: Error | None = None

    @property
    def ref(self) -> PagedParam | None:
        """The place in the runtime; None for an ordinary parameter, or when the model is gone."""
        return self._ref()

    def _kinds(self) -> tuple[str, ...]:
        """Name the moments and the master that are there."""
        if not self.begun:
            return ()
        found: tuple[str, ...] = MOMENTS
        # What the fp32 master has beyond a 16-bit weight: torch's AdamW has no such state, and ignores it.
        if is_half(self.param.dtype) and not self.edited:
            found = (*MOMENTS, "master") if self.ref is not None or "master" in self._tensors else MOMENTS
        return tuple(key for key in found if key not in self._missing) if self._missing else found

    def _keys(self) -> tuple[Any, ...]:
        step = ("step",) if self.begun and "step" not in self._missing else ()
        return (*step, *self._kinds(), *self._own)

    def in_other_hands(self) -> list[tuple[str, torch.Tensor]]:
        """Return the tensors that stand for states and that the user may have, or have given."""
        found = [*self._tensors.items(), *((name, handed.tensor) for name, handed in list(self._fetched.items()))]
        return found if self._step is None else [*found, ("step", self._step.tensor)]

    # ------------------------------------------------------------------ before and after a step

    def check(self) -> None:
        """Take note of edits of ``step``, and raise if a step cannot use what is here. Changes no state.

        Raises
        ------
        Unusable
            With the key.
        """
        if self._fetched or self._tensors or self._missing or self._step is not None or self._lost is not None:
            self._check()

    def _check(self) -> None:
        if self._lost is not None:
            raise self._lost
        if self._missing:
            self._check_missing()
        if self._step is not None and self.begun:
            self.count = step_count(self.param, self._step.tensor)
        for key, fetched in list(self._fetched.items()):  # a signal handler may step meanwhile, and forget some
            usable(self.param, key, fetched.tensor)
            if fetched.behind and fetched.edited(self.param):
                raise Unusable(self.param, key, "was edited before it had followed an interrupted step. Fetch it again")
        attached = self.ref is not None
        for key in MOMENTS if self.begun and not attached else ():
            if key not in self._tensors:
                raise Unusable(self.param, key, "is gone: it went with the model that was offloaded")
        for key, tensor in list(self._tensors.items()):
            if not fits(self.param, key, tensor):
                usable(self.param, key, tensor)
                if not attached and ref_of(self.param) is None:
                    self._tensors[key] = packed(self.param, key, tensor, self.param.device)

    def _check_missing(self) -> None:
        if self._missing.issuperset(MANAGED):
            self._restart()
            return
        key = next(key for key in MANAGED if key in self._missing)
        raise Unusable(self.param, key, "was removed, and the others are there")

    def flush(self) -> bool:
        """Write edited tensors back; whether any are here."""
        if not self._fetched:
            return False
        ref = self.ref
        if ref is not None:
            for name, fetched in list(self._fetched.items()):  # a signal handler may fetch more
                usable(self.param, name, fetched.tensor, cast=True)
                if fetched.edited(self.param):
                    self._store(ref, name, fetched.tensor)
                    fetched.same(self.param)
        return True

    keep_edits = flush

    def refuse_edits(self) -> None:
        """Refuse edits of states that several processes share, of which each would make them.

        Raises
        ------
        UsageError
            ``FN-E722``.
        """
        for name, fetched in list(self._fetched.items()):
            if fetched.edited(self.param):
                raise edit_of_shared(
                    f"the state '{name}' of '{self.ref.name if self.ref is not None else 'a parameter'}'"
                )

    def advance(self, count: int) -> None:
        """Note a step, and forget fetched tensors that only this mapping holds. Interrupted, it can be run again."""
        self.count = count
        self.begun = True
        if self._step is not None:
            self._show_count()
        if self._fetched:
            self._forget(held=False)
            for fetched in list(self._fetched.values()):
                fetched.behind = True

    def _show_count(self) -> None:
        if self._step is None or not self._step.held():
            self._step = None
            return
        with torch.no_grad():
            self._step.tensor.fill_(self.count)

    def follow(self) -> None:
        """Give the values after a step to tensors that were fetched before it and are kept."""
        ref = self.ref
        for name, fetched in list(self._fetched.items()):
            if fetched.behind and ref is not None:
                with torch.no_grad():
                    fetched.tensor.copy_(self._read(ref, name))
                fetched.same(self.param)

    # ------------------------------------------------------------------ where the bytes are

    def attach(self, ref: PagedParam) -> None:
        """Hand the states over to the runtime; another optimizer's states of the parameter leave it."""
        if self.ref is ref:
            return
        before = ref.states
        if before is not None:
            # Three references: the attribute, this variable and the argument of getrefcount. No caller can ask for the
            # states again.
            if sys.getrefcount(before) <= 3:
                before.forget()
            else:
                before.detach()
        # Edited between its last step and the offload: its master starts anew.
        if "master" in self._tensors and self.plain_version == -1 and not ref.stepped:
            ref.mark_edited(False)
        if self.plain_version not in (-1, ref.version_before, ref.version):
            ref.mark_edited()
        fetched = {}
        for name in (*MOMENTS, "master"):
            if name in self._tensors:
                self._store(ref, name, self._tensors[name])
                fetched[name] = Handed(self._tensors[name], 0)
                fetched[name].same(self.param)
            elif ref.stepped and name in MOMENTS:
                self._store(ref, name, blank(self.param, name, "cpu"))
        # All at once, when everything is in its place.
        there = weakref.ref(ref)
        self._ref, self._tensors, self._fetched, ref.states = there, {}, fetched, self
        self._forget(held=False)

    def detach(self) -> None:
        """Take the states back as ordinary tensors."""
        if self.ref is not None:
            self.take(self.taken())

    def taken(self) -> dict[str, torch.Tensor]:
        """Return what :meth:`detach` leaves of moments and master, as ordinary tensors on the parameter's device."""
        device = self.param.device
        found = {}
        for name in self._kinds():
            fetched = self._fetched.get(name)
            if fetched is None or fetched.behind:
                found[name] = self._copy(name).to(device)
            else:
                found[name] = fetched.tensor if fetched.tensor.is_meta else fetched.tensor.to(device)
        return found

    def take(self, tensors: dict[str, torch.Tensor], lost: Error | None = None) -> None:
        """Leave the runtime with these; without any if they are lost. Interrupted, it can be run again."""
        ref = self.ref
        if ref is None:
            return
        # Edited since its last step: its master goes with no version of it.
        self.plain_version = EDITED if ref.edited else self.param._version
        self._forget(held=True)
        self._lost, self._tensors, self._ref, ref.states = lost, tensors, _nowhere, None

    def move(self, new: StatePlaces) -> None:
        """Become the states of another parameter, made by :meth:`of` from these entries."""
        ref = self.ref
        self._forget(held=True)
        if ref is not None:
            ref.states = None
        self.__dict__.update(new.__dict__)

    def drop_unused(self) -> None:
        """Give back the memory of fetched tensors that only this mapping holds."""
        if all(fetched.held() for fetched in list(self._fetched.values())):
            return
        with contextlib.suppress(Unusable):
            self.flush()
            self._forget(held=False)

    def _forget(self, *, held: bool) -> None:
        """Forget tensors that stand for the runtime's, and have their memory counted no longer; also those others have, if so asked."""
        ref = self.ref
        engine = None if ref is None else ref.unit.owner.engine
        for name, fetched in list(self._fetched.items()):
            # A signal handler may be here too: each is given back once.
            gone = (held or not fetched.held()) and self._fetched.pop(name, None) is fetched
            if gone and engine is not None and fetched.lent:
                engine.returned(fetched.lent)

    def _note_step(self) -> None:
        """Have a step counted that the runtime has taken: a signal handler may ask before it is."""
        ref = self.ref
        if ref is not None and owner_of(ref.unit).unnoted is not None:
            note_step(owner_of(ref.unit))

    @property
    def edited(self) -> bool:
        """Whether the parameter was edited since its last step: its next master starts from it."""
        ref = self.ref
        if ref is not None:
            return ref.edited
        return self.plain_version not in (-1, self.param._version)

    def _edit(self, edited: bool) -> None:
        ref = self.ref
        if ref is not None:
            ref.mark_edited(edited)
        else:
            self.plain_version = EDITED if edited else self.param._version

    def fetched(self, name: str) -> torch.Tensor:
        """Return a state as a tensor of the caller's own, which no budget counts."""
        return self._copy(name)

    def forget(self) -> None:
        """Give up the states: others are about to take their place."""
        ref = self.ref
        self._forget(held=True)
        if ref is not None:
            ref.states = None
        self._tensors, self._own, self._missing = {}, {}, set()
        self._ref, self._lost, self._step = _nowhere, None, None
        self.count, self.begun = 0, False

    def _restart(self) -> None:
        """Have the next step start from zero, the user's own entries aside."""
        own = self._own
        self.forget()
        self._own, self.plain_version = own, -1

    def install(self, ref: PagedParam | None) -> None:
        """Bring what was loaded to where it is to live, in memory of its own."""
        within = ref if ref is not None and ref.trainable else None
        edited = is_half(self.param.dtype) and "master" not in self._tensors
        if self.begun:
            if within is not None:
                self.attach(within)
                self._forget(held=True)
            for name, tensor in list(self._tensors.items()):
                self.put(name, tensor)
            self.loaded(within, self.count, edited=edited)
        self._own = as_torch_loads(self.param, self._own)

    def put(self, name: str, value: torch.Tensor) -> None:
        """Fill a state with what was loaded, where it lives."""
        ref = self.ref
        if ref is not None:
            self._store(ref, name, value)
        else:
            self._tensors[name] = packed(self.param, name, value, "cpu" if self.param.is_meta else self.param.device)

    def loaded(self, ref: PagedParam | None, count: int, *, edited: bool) -> None:
        """Take note that the states were filled where they live: in the runtime, or by :meth:`put` before."""
        self.count, self.begun = count, True
        if ref is None:
            self.plain_version = EDITED if edited else self.param._version
            return
        if ref.states is not None and ref.states is not self:
            ref.states.detach()
        self._ref = weakref.ref(ref)
        ref.states = self
        ref.note_loaded(edited)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a state, which may be edited."""
        if self._lost is not None:
            raise self._lost
        ref = self.ref
        if ref is not None:
            with ref.unit.owner.lock:  # a step of another thread comes before or after
                return self._lend(ref, name).tensor
        if name not in self._tensors:
            if self.begun and name != "master":
                raise Unusable(self.param, name, "is gone: it went with the model that was offloaded")
            tensor = blank(self.param, name, self.param.device)
            if name == "master" and has_whole_master(self.param.dtype):
                tensor.copy_(self.param.detach())
            self._tensors[name] = tensor
        return self._tensors[name]

    def copies(self) -> dict[Any, Any]:
        """Return everything as an ordinary dictionary of the caller's own, which no budget counts."""
        self._note_step()
        return {key: self._copied(key) for key in self._keys()}

    def _copied(self, key: Any) -> Any:
        if key == "step":
            return (
                torch.tensor(float(self.count), device="cpu")
                if self._step is None
                else self._step.tensor.detach().clone()
            )
        return cloned(self._own[key]) if key in self._own else self._copy(key)

    def _copy(self, name: str) -> torch.Tensor:
        ref = self.ref
        if ref is None:
            return self.tensor(name).detach().clone()
        with ref.unit.owner.lock:
            fetched = self._fetched.get(name)
            return self._read(ref, name) if fetched is None or fetched.behind else fetched.tensor.detach().clone()

    def _lend(self, ref: PagedParam, name: str) -> Handed:
        fetched = self._fetched.get(name)
        if fetched is None:
            lent = self._counted(ref, name)
            try:
                fetched = Handed(self._read(ref, name), lent)
                fetched.same(self.param)
            except BaseException:
                ref.unit.owner.engine.returned(lent)
                raise
            self._fetched[name] = fetched
        elif fetched.behind:
            self.follow()
        return fetched

    def _counted(self, ref: PagedParam, name: str) -> int:
        """Have memory for a tensor counted; what was fetched and is not held any more makes room."""
        session = owner_of(ref.unit)
        size = self.param.numel() * state_dtype(name, self.param.dtype).itemsize
        try:
            session.engine.lend(size)
        except BudgetError:
            session.drop_unused()
            session.engine.lend(size)
        return size

    def _read(self, ref: PagedParam, name: str) -> torch.Tensor:
        tensor = blank(self.param, name, "cpu")
        ref.unit.owner.engine.read_state(ref.unit.engine_id, ref.section, name, ref.start, ref.numel, tensor.data_ptr())
        return tensor

    def _store(self, ref: PagedParam, name: str, tensor: torch.Tensor) -> None:
        source = packed(self.param, name, usable(self.param, name, tensor, cast=True), "cpu")
        if not ref.unit.owner.leads:
            # The process that does has other states there from now on.
            ref.unit.owner.engine.drop_speculation(ref.unit.engine_id)
            return
        ref.unit.owner.engine.write_state(
            ref.unit.engine_id, ref.section, name, ref.start, ref.numel, source.data_ptr()
        )
