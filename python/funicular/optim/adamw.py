"""AdamW over offloaded (and ordinary) parameters."""

from __future__ import annotations

import functools
import weakref
from collections import defaultdict
from typing import TYPE_CHECKING, Any, overload

import torch

from funicular._core import UnitUpdate, complete
from funicular.errors import UsageError
from funicular.gradients.arrival import is_foreign
from funicular.gradients.clipping import effective_factor
from funicular.optim.hypers import hyper_of, spans_of
from funicular.optim.load_states import Sealed, refuse_options, seal, show, unsealed
from funicular.optim.other_optimizers import label, refuse_meta
from funicular.optim.resident import resident_update
from funicular.optim.shared import refuse_same, refuse_shared
from funicular.optim.state_values import Unusable
from funicular.optim.states import ParamStates
from funicular.optim.taken_over import join, replacing
from funicular.reference import adamw_step
from funicular.units.dtypes import TRAINED, is_half
from funicular.units.param import ref_of
from funicular.windows.lookup import owner_of
from funicular.windows.ranked import agree, whole
from funicular.windows.replaced import check_replaced, refuse_dtensors
from funicular.windows.residents import resident_session
from funicular.windows.shutdown import living
from funicular.windows.signals import refuse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from funicular._core import Hyper, ResidentUpdate, Span
    from funicular.units.param import PagedParam
    from funicular.units.unit import Unit
    from funicular.windows.session import Session

    #: a parameter of a step: its place, its states, its group
    _Member = tuple[PagedParam, ParamStates, dict[str, Any]]

__all__ = ["AdamW"]

#: options of groups that states saved by older versions of torch lack
_LATER_OPTIONS = {
    "amsgrad": False, "maximize": False, "foreach": None, "capturable": False, "differentiable": False, "fused": None,
}  # fmt: skip


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101), with torch's defaults and state format.

    Parameters of offloaded models are updated where their states live, by one fused pass with fp32 masters; ``step``
    returns before the updates have ended, and every read of a parameter waits for that parameter's update. Ordinary
    parameters are stepped by :func:`funicular.reference.adamw_step`: the same bits. docs/arithmetic.md states the
    arithmetic.

    Parameters
    ----------
    params : iterable of parameters or of parameter groups
        As for ``torch.optim.AdamW``; may be given before or after ``funicular.offload``.
    lr : float or torch.Tensor
        Learning rate. It and the next four may be changed between steps in ``param_groups``.
    betas : tuple of float
        Decay of the two moments.
    eps : float
        Added to the denominator.
    weight_decay : float
        Decay of the weights, times the learning rate.
    maximize : bool
        Step upwards.
    foreach : bool or None
        Accepted and ignored, as ``fused`` is.
    fused : bool or None
        Accepted and ignored.

    Raises
    ------
    UsageError
        ``FN-E117`` for ``amsgrad``, ``capturable`` and ``differentiable``, ``FN-E112`` for DTensors.
    """

    #: no step of it changes a parameter without counting
    counts_its_edits = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        for name, asked in {"amsgrad": amsgrad, "capturable": capturable, "differentiable": differentiable}.items():
            if asked:
                raise UsageError("FN-E117", f"AdamW does not support {name}=True. Leave it False.")
        checks = {
            "lr": float(lr) >= 0,
            "eps": eps >= 0,
            "betas": all(0 <= b < 1 for b in betas),
            "weight_decay": weight_decay >= 0,
        }
        for name, right in checks.items():
            if not right:
                raise UsageError("FN-E117", f"AdamW: {name} is out of range.")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": False,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": False,
            "differentiable": False,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; parameters that are distributed over processes are refused with ``FN-E112``."""
        super().add_param_group(param_group)
        try:
            refuse_dtensors(self.param_groups[-1]["params"])
        except UsageError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step with the gradients in ``p.grad``; parameters without one are left alone.

        A closure runs with gradients enabled, as in torch.

        Raises
        ------
        UsageError
            Before anything is changed: ``FN-E116`` for sparse gradients, ``FN-E117`` for options of a group, ``FN-E112`` for
            parameters of other types, ``FN-E130`` for states that cannot be used, ``FN-E131`` for parameters without memory.
        """
        loss = None
        with torch.no_grad():
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            joined = join(self)
            for trained in list(living):
                trained.bring_down()
            runs: dict[int, _SessionStep] = {}
            plain = []
            for p, grad, group, ref, states in self._ready():
                if ref is None:
                    session = resident_session(p)
                    if session is None or not _run_of(runs, session).add_resident(p, grad, group, states):
                        plain.append((p, grad, group, states))
                    continue
                states.attach(ref)
                _run_of(runs, owner_of(ref.unit)).add(ref, grad, group, states)
            with whole(joined, "a step"):
                for session in joined:
                    agree(session, runs[id(session)].units.values() if id(session) in runs else ())
                for run in runs.values():
                    run.go()
            for p, grad, group, states in plain:
                self._step_plain(p, grad, group, states)
        return loss

    def _ready(self) -> list[tuple[torch.nn.Parameter, torch.Tensor, dict[str, Any], PagedParam | None, ParamStates]]:
        """Return what is to be stepped: parameter, gradient, group, place and states. All is looked at before anything changes."""
        params, grads, groups, refs = [], [], [], []
        for group in self.param_groups:
            refuse_options(group)
            for p in group["params"]:
                grad = p.grad  # once: a signal handler, or another thread, may clear it
                if grad is None:
                    if p.is_meta:
                        refuse_meta(self)
                    continue
                if grad.layout != torch.strided:
                    raise UsageError(
                        "FN-E116",
                        "a gradient is sparse. Use dense gradients: sparse=False in the embedding.",
                    )
                ref = ref_of(p)
                if ref is None or not ref.trainable:
                    self._check_ordinary(p)
                    ref = None
                params.append(p)
                grads.append(grad)
                groups.append(group)
                refs.append(ref)
        return list(zip(params, grads, groups, refs, self._take(params), strict=True))

    def _check_ordinary(self, p: torch.nn.Parameter) -> None:
        if p.is_meta:
            refuse_meta(self)
        if p.dtype not in TRAINED:
            raise UsageError(
                "FN-E112",
                f"AdamW cannot step {label(self, p)}, of {p.dtype}. Convert it to fp32, bf16 or fp16, or give it to another "
                "optimizer.",
            )

    def _take(self, params: list[torch.nn.Parameter]) -> list[ParamStates]:
        """Return the states of parameters; ordinary dictionaries, and the states of other parameters, become theirs.

        Raises
        ------
        Unusable
            For states that cannot be used; then nothing was changed.
        """
        found, new = [], []
        for p in params:
            states = self.state.get(p)
            try:
                if type(states) is ParamStates and states.param is p:
                    states.check()
                else:
                    refuse_same(self, p, states)
                    states = ParamStates.made(p, states)
                    new.append((p, states))
            except Unusable as error:
                if ref_of(p) is not None:
                    raise
                raise Unusable(p, error.key, error.why, label(self, p)) from None
            found.append(states)
        if any(states.given for states in found):
            refuse_shared(self, {**self.state, **dict(new)})
            for states in found:
                states.given = False
        if not new:
            return found
        for p, states in new:
            before = self.state.get(p)
            if type(before) is ParamStates and self.state.get(before.param) is not before:
                before.move(states)  # it goes on under its new key, for callers that keep it
            else:
                self.state[p] = states
        return [self.state[p] for p in params]

    def settle(self) -> None:
        """Take ordinary dictionaries in ``state`` as the states of their parameters now, and not at the next step.

        Raises
        ------
        UsageError
            ``FN-E130`` for states that a step could not use; then nothing was changed.
        """
        self._take([p for group in self.param_groups for p in group["params"] if self.state.get(p)])

    def _states(self, p: torch.nn.Parameter) -> ParamStates:
        return self._take([p])[0]

    def _step_plain(
        self, p: torch.nn.Parameter, grad: torch.Tensor, group: dict[str, Any], states: ParamStates
    ) -> None:
        master = states.tensor("master") if is_half(p.dtype) else None
        edited = states.plain_version not in (-1, p._version)
        adamw_step(
            p,
            grad,
            states.tensor("exp_avg"),
            states.tensor("exp_avg_sq"),
            master,
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=states.count + 1,
            maximize=group["maximize"],
            reset_master=edited,
        )
        states.advance(states.count + 1)
        states.plain_version = p._version

    def state_dict(self) -> dict[str, Any]:
        """Return everything, in the format of ``torch.optim.AdamW``; states are copies on the host."""
        # The first hook after torch's own work: those of the user see copies, and what they return is what is returned.
        handle = self.register_state_dict_post_hook(show, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` or ``torch.optim.AdamW.state_dict`` gave.

        Raises
        ------
        UsageError
            Before anything is changed: ``FN-E117`` for options that are not supported, ``FN-E130`` for states that do not fit.
        """
        # The last hook before torch's own work: it has what those of the user returned, and keeps the states from torch's casts.
        handle = self.register_load_state_dict_pre_hook(seal)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what was pickled, copied, or is being loaded."""
        for group in state.get("param_groups", ()):
            for name, value in _LATER_OPTIONS.items():
                group.setdefault(name, value)
            if "decoupled_weight_decay" in group:
                group["decoupled_weight_decay"] = True
        entries = state.get("state", {})
        if not any(isinstance(value, Sealed) for value in entries.values()):
            super().__setstate__(state)
            return
        for group in state["param_groups"]:
            refuse_options(group)
        made, others = unsealed(entries)
        refuse_shared(self, made)
        # Rank 0 writes states of all: none may still be reading those before, nor read them before all are there.
        with replacing(self, made, "loaded optimizer states"):
            super().__setstate__({**state, "state": defaultdict(dict, others)})
            for p, states in made.items():
                self.state[p] = states
                states.install(ref_of(p))


def _run_of(runs: dict[int, _SessionStep], session: Session) -> _SessionStep:
    run = runs.get(id(session))
    if run is None:
        run = runs[id(session)] = _SessionStep(session)
    return run


def _described(
    members: list[tuple[PagedParam, weakref.ref[ParamStates], dict[str, Any]]],
) -> tuple[list[Span], list[Hyper]] | None:
    """Describe a unit's next update, should nothing change until the step and clipping leave the gradients alone; None if it has other states."""
    hypers: dict[Hyper, int] = {}
    found = []
    for ref, there, group in members:
        states = there()
        if states is None or ref.states is not states:
            return None
        index = hypers.setdefault(hyper_of(group, states, None), len(hypers))
        found.append((ref, states, index))
    return spans_of(found), list(hypers)


class _SessionStep:
    """One session's part of a step."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.hypers: dict[Hyper, int] = {}
        #: slots of factors that clipping left pending, by factor and element type
        self.slots: dict[tuple[int, torch.dtype], int] = {}
        self.units: dict[Unit, list[_Member]] = {}
        #: the gradients that the step has seen: others may clear them meanwhile
        self.grads: dict[PagedParam, torch.Tensor] = {}
        self.residents: list[tuple[torch.nn.Parameter, ParamStates]] = []
        self.resident_updates: list[ResidentUpdate] = []

    def add(self, ref: PagedParam, grad: torch.Tensor, group: dict[str, Any], states: ParamStates) -> None:
        self.grads[ref] = grad
        self.units.setdefault(ref.unit, []).append((ref, states, group))

    def add_resident(
        self, p: torch.nn.Parameter, grad: torch.Tensor, group: dict[str, Any], states: ParamStates
    ) -> bool:
        """Add a parameter that is not paged; False if it has to be stepped in plain torch."""
        index = self.hypers.setdefault(hyper_of(group, states, None), len(self.hypers))
        update = resident_update(self.session, p, grad, states, index)
        if update is not None:
            self.residents.append((p, states))
            self.resident_updates.append(update)
        return update is not None

    def _index(self, ref: PagedParam, states: ParamStates, group: dict[str, Any]) -> int:
        """Return which hyperparameters a parameter is updated with, the factor of its gradient among them."""
        return self.hypers.setdefault(hyper_of(group, states, self._slot(ref)), len(self.hypers))

    def _slot(self, ref: PagedParam) -> int | None:
        if ref.factor is None or is_foreign(ref, self.grads[ref]):
            return None
        self.session.gradients.clipping.taken = True
        key = (id(ref.factor), ref.home.dtype)
        if key not in self.slots:
            value = effective_factor(ref.factor, ref.home.dtype)
            self.slots[key] = self.session.engine.factor(value.data_ptr(), self.session.stream())
        return self.slots[key]

    def next_updates(self) -> dict[Unit, Callable[[], tuple[list[Span], list[Hyper]] | None]]:
        """Return what describes the next updates, of units with a spare copy that are stepped as a whole.

        It keeps no states: those that a load replaces are given up only where nothing holds them, and read back else.
        """
        whole = ((u, members) for u, members in self.units.items() if u.spare_copy and len(members) == u.trained)
        weak = ((u, [(ref, weakref.ref(states), group) for ref, states, group in members]) for u, members in whole)
        return {unit: functools.partial(_described, members) for unit, members in weak}

    def go(self) -> None:
        refuse(self.session, "a step")
        started = self.session.ranges.start("step")
        self.session.log.at("the update")
        try:
            while not self._went():
                self.session.gradients.await_readers(self.grads)
        finally:
            self.session.ranges.end(started)

    def _went(self) -> bool:
        gradients = self.session.gradients
        with self.session.lock:
            try:
                if gradients.is_read(self.grads):
                    return False
                gradients.forget_factors(self.grads)
                self._go(self.session)
            finally:
                gradients.clipping.taken = False  # before another thread has the lock
        return True

    def _go(self, session: Session) -> None:
        units = sorted(self.units, key=lambda u: u.engine_id)
        check_replaced(session)
        watched = session.before_step(units)
        updates = []
        refs = []
        followed = []
        for unit in units:
            members = sorted(self.units[unit], key=lambda m: (m[0].section, m[0].start))
            for ref, states, _ in members:
                if states.flush():
                    followed.append(states)
                refs.append(ref)
            self.units[unit] = members
            spans = spans_of([(ref, states, self._index(ref, states, group)) for ref, states, group in members])
            updates.append(UnitUpdate(unit.engine_id, spans, session.gradients.speculation.confirmed(unit)))
        session.gradients.to_step(self.grads)
        counts = [(states, states.count + 1) for members in self.units.values() for _, states, _ in members]
        counts += [(states, states.count + 1) for _, states in self.residents]
        self._submit(session, updates, refs, counts, watched)
        session.after_step(watched)
        for states in followed:
            states.follow()

    def _submit(
        self,
        session: Session,
        updates: list[UnitUpdate],
        refs: list[PagedParam],
        counts: list[tuple[ParamStates, int]],
        watched: list[Unit],
    ) -> None:
        """Take the step as a whole, bookkeeping and all, or not at all, wherever and however often interruptions strike."""
        engine, hypers, stream = session.engine, list(self.hypers), session.stream()
        note = _Note(self, counts, refs, watched)
        at_last = functools.partial(note, last=True)
        session.unnoted = note
        try:
            engine.update(updates, hypers, self.resident_updates, stream, session.waits)
        finally:
            # One call into the core, which no signal can cut in two. A signal handler that reads or saves may have done it already.
            complete(at_last)


class _Note:
    """Takes note of a step once the runtime has taken it. It can be run again, also by a signal handler while it runs."""

    def __init__(
        self, step: _SessionStep, counts: list[tuple[ParamStates, int]], refs: list[PagedParam], watched: list[Unit]
    ) -> None:
        self.step, self.counts, self.refs, self.watched = step, counts, refs, watched
        self.before = step.session.engine.steps()

    def __call__(self, *, last: bool = False) -> None:
        session = self.step.session
        if session.unnoted is not self:
            return
        if session.engine.steps() == self.before:
            if last:  # it was not taken
                session.unnoted = None
            return
        for states, count in self.counts:
            states.advance(count)
        for p, states in self.step.residents:
            torch.autograd.graph.increment_version(p)
            states.plain_version = p._version
        session.stepped(self.refs, self.watched)
        session.gradients.speculation.learn(self.step.units, self.step.next_updates())
        session.unnoted = None
