"""The gradients of a model that several ranks train: from autograd's tensors to their owners, and as one mean into memory that all ranks see.

Autograd adds nothing to what is in a gradient's place: that belongs to all ranks. The place is set aside before autograd brings a gradient, which so is
this rank's alone; the owner of each element adds the mean to what is there.

What a rank alone does to a gradient stays its own: zeros stand for a gradient that was cleared in place, and one that is yet to be multiplied is
shown to the program as a copy. At the step every gradient must be what has been exchanged.
"""

from __future__ import annotations

import contextlib
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch

from funicular import _core
from funicular.errors import Error, RuntimeFailure, UsageError
from funicular.gradients.arrival import make_grad, move_out, place_for, rebase
from funicular.gradients.backward import Gradients
from funicular.homes.edits import edit_of_shared
from funicular.ranks import norms
from funicular.ranks.means import Means
from funicular.ranks.on_gpu import Beside, free_memory
from funicular.ranks.page import Page
from funicular.ranks.rounds import CLIPPED, NORM, PIECE, SHARED, STATES, ZEROS, Rounds
from funicular.ranks.slices import cut, flat
from funicular.ranks.stand_ins import guard, let_go, zeros_of
from funicular.torch_internals.autograd import backward_task
from funicular.torch_internals.memory import dense_bytes, stream_of
from funicular.torch_internals.overrides import unguarded

if TYPE_CHECKING:
    from collections.abc import Mapping

    from funicular._core import Engine
    from funicular.ranks.group import Group
    from funicular.ranks.slices import Slice
    from funicular.units.param import PagedParam
    from funicular.units.unit import Unit

__all__ = ["RankGradients"]

#: Devices where units are exchanged within a backward, unless the program runs collectives of its own there, such as those of a SyncBatchNorm
#: (``AT_END``). On the others an exchange blocks the thread; at the end of the backward it blocks nothing.
_EARLY = frozenset(["cuda"])
_EXCHANGE = "the exchange of gradients"
_FAILED = "a backward failed amid the exchange of its gradients, which other ranks have, or wait for. End all ranks, and go on from a checkpoint."
_WORDS = {
    0: "none", SHARED: "one of earlier backwards", ZEROS: "zeros", SHARED | CLIPPED: "one that was clipped",
    ZEROS | CLIPPED: "zeros that were clipped",
}  # fmt: skip


class RankGradients(Gradients):
    """The gradients of one model's units on one of several ranks."""

    def __init__(self, engine: Engine, device: torch.device, group: Group) -> None:
        super().__init__(engine, device, sums_up=False)
        self._group = group
        self._beside = Beside(device)
        self._units: dict[int, Unit] = {}
        self._slices: dict[PagedParam, list[Slice]] = {}
        self._index: dict[PagedParam, int] = {}
        self._rounds: Rounds
        #: threads that have brought gradients in the backward under way: the ends of others' are not its end
        self._bringers: set[int] = set()
        #: what each gradient was that was set aside in the backward under way
        self._aside: dict[PagedParam, int] = {}
        #: whose gradients have come in the backward under way
        self._came: set[PagedParam] = set()
        #: this rank's gradients that were posted, each as the elements in memory
        self._mine: dict[PagedParam, torch.Tensor] = {}
        #: what was exchanged in the backward under way, and may not be in its place yet; and the same of backwards that are over
        self._under_way: set[PagedParam] = set()
        self._landing_elsewhere: set[PagedParam] = set()
        #: collectives that the program had run when the backward under way brought its first gradient
        self._collectives = 0
        #: a backward failed that others have, or may have, taken part in
        self._broken = False

    def know(self, units: list[Unit]) -> None:
        """Take note of the units, before the first backward."""
        super().know(units)
        self._units = {unit.engine_id: unit for unit in units}
        trained = [unit for unit in reversed(units) if unit.trained]
        for unit in trained:
            ranges = [_core.owned(self._engine, unit.engine_id, rank) for rank in range(self._group.size)]
            for index, ref in enumerate(unit.params):
                self._index[ref] = index
                if ref.trainable:
                    mine = [[(first, n) for section, first, n in of if section == ref.section] for of in ranges]
                    self._slices[ref] = cut(ref.start, ref.numel, mine)
        order = [(unit.engine_id, [ref.trainable for ref in unit.params]) for unit in trained]
        self._rounds = Rounds(Page(self._engine, self._group), order, self._states, self._exchange, self._short)

    # ------------------------------------------------------------------ a backward

    def watched(self, task: int, ending: Any) -> None:
        """Take note of a backward, and of what is called at its end."""
        self._check()
        _core.tell_ranks(self._engine, "in a backward")
        self.backwards.begin(task, ending, self._dropped)

    def _dropped(self, _: Any) -> None:
        """Have the other ranks told at once of a backward that has failed; they may wait for its gradients, and the program may go on.

        What is broken already they have been told, or find as this rank did: that they differ.
        """
        if self._rounds.open and not self._broken and self.backwards.all_failed:
            self._broken = True
            with contextlib.suppress(Error):  # of a model that has ended
                _core.fail_rank(self._engine, _FAILED, backward=True)

    def _check(self) -> None:
        self.backwards.prune()
        if self._rounds.open and not self.backwards:
            self._broken = True
        if self._broken:
            _core.fail_rank(self._engine, _FAILED, backward=True)
            raise RuntimeFailure("FN-E723", _FAILED)

    def _give_up(self, why: str) -> None:
        self._broken = True
        _core.fail_rank(self._engine, why)

    def closing(self) -> None:
        """Before this rank ends its model: have the other ranks told of a backward that failed, and what waits for them on a GPU ended."""
        with contextlib.suppress(Error, ImportError):  # Python's own end finds the classes of errors no more
            self._check()

    def before_accumulate(self, ref: PagedParam) -> None:
        """Set what is there aside: autograd brings this rank's gradient of this backward alone."""
        self._check()
        if self._rounds.posted(ref.unit.engine_id):
            self._give_up(f"a gradient of '{ref.name}' came after its exchange")
            raise RuntimeFailure(
                "FN-E724",
                f"a gradient of '{ref.name}' came more often in one backward than in any before, after its unit was exchanged. "
                "Use a parameter as often in the first backward as in later ones.",
            )
        if ref not in self._aside:
            self._aside[ref] = self._state(ref)
            with unguarded():
                ref.param.grad = None

    def about_to_add(self, ref: PagedParam) -> bool:
        """Take note that the backward under way is about to bring a gradient."""
        super().about_to_add(ref)
        return True

    def lift(self, ref: PagedParam) -> bool:
        """As :meth:`before_accumulate`: nothing is added on the device."""
        return False

    def arrived(self, ref: PagedParam | None) -> None:
        """Take note that autograd brought a gradient; look at the one before, whose hooks have all run."""
        assert ref is not None
        self._check()
        self._bringers.add(get_ident())
        if not self._rounds.open:
            self._collectives = self._group.collectives_of_others()
        before = self.backwards.passed()
        self.backwards.added(backward_task(), ref)
        self._came.add(ref)
        self._rounds.arrived(ref.unit.engine_id, self._index[ref], ref.home.nbytes)
        if before and before[-1].unit is not ref.unit and self._device.type in _EARLY:
            with torch.no_grad(), self._group.whole(_EXCHANGE, ends=True):
                self._rounds.look(before[-1].unit.engine_id)

    def _short(self, nbytes: int) -> bool:
        return self._group.collectives_of_others() == self._collectives and free_memory(self._device) < nbytes

    def bring_down(self) -> None:
        """Nothing is on its way between backwards."""

    def backward_ended(self, task: int) -> None:
        """Have all gradients of all ranks in their places, at the end of a backward that is in no other."""
        self._check()
        self.backwards.end(task)
        me = get_ident()
        if me not in self._bringers or self.backwards.of_thread(me):
            return
        self.backwards.passed()
        if self._rounds.open and self._group.collectives_of_others() != self._collectives:
            self._rounds.at_end = True
        with self._group.whole(_EXCHANGE, ends=True):
            with torch.no_grad():
                self._rounds.end()
            self._landed()

    def _landed(self) -> None:
        if self._under_way:
            self._beside.join()
            with self._beside.exchange([]):
                self._landing.finish(stream_of(self._device))
            self._landing_elsewhere |= self._under_way
            self._under_way.clear()
        for ref, state in self._aside.items():
            with unguarded():
                if ref.param.grad is None and state:  # a backward that asked for it and brought none
                    ref.param.grad = ref.grad if state & SHARED else ref.zeros
        self._aside.clear()
        self._came.clear()
        self._bringers.clear()

    def _await_landed(self) -> None:
        """Wait until the other ranks' parts of gradients are in their places, for those who look there. A step does not: it uses this rank's."""
        if self._landing_elsewhere:
            _core.tell_ranks(self._engine, "after a backward, waiting for the gradients of others")
            with self._group.waiting("peers_grads"):
                _core.wait_gradients_landed(self._engine, self._rounds.number)
            self._landing_elsewhere.clear()

    def join(self) -> None:
        """Wait until all ranks are at their step, and take part in backwards that only others have."""
        self._check()
        _core.tell_ranks(self._engine, "at its step, waiting for the other ranks")
        with torch.no_grad():
            while self._rounds.behind():
                with self._group.whole(_EXCHANGE, ends=True):
                    self._rounds.catch_up()
                    self._landed()
                _core.tell_ranks(self._engine, "at its step, waiting for the other ranks")

    # ------------------------------------------------------------------ what a gradient is

    def _state(self, ref: PagedParam) -> int:
        """Return what a gradient is now. A copy that was shown is taken back.

        Raises
        ------
        UsageError
            ``FN-E722`` for one that this rank has changed.
        """
        with unguarded():
            grad = ref.param.grad
            if grad is None:
                return 0
            if grad is not ref.grad and grad is not ref.zeros:
                self.take_back(ref)
            clipped = CLIPPED if ref.factor is not None else 0
            return (ZEROS if ref.param.grad is ref.zeros else SHARED) | clipped

    def take_back(self, ref: PagedParam) -> None:
        """Make a gradient the one in its place again, if it has the same values: a copy was shown to the program, which may have edited it.

        Raises
        ------
        UsageError
            ``FN-E722``.
        """
        with torch.no_grad(), unguarded():
            grad = ref.param.grad
            if grad is None or grad is ref.grad or grad is ref.zeros:
                return
            let_go(ref)
            there = ref.zeros if ref.zeros is not None else ref.grad
            assert there is not None
            same = grad.shape == there.shape and grad.dtype == there.dtype and grad.device == there.device
            if same and grad.layout == torch.strided:
                self._await_landed()
                self._engine.wait_gradients(stream_of(self._device))
                expected = there if ref.factor is None else there * ref.factor
                same = torch.equal(dense_bytes(grad), dense_bytes(expected))
            if not same or grad.layout != torch.strided:
                raise edit_of_shared(f"the gradient of '{ref.name}'")
            ref.param.grad = there

    def settle(self, ref: PagedParam, beside: list[PagedParam]) -> None:
        """Make a gradient in its place valid for the caller; one that is yet to be multiplied is shown as a copy."""
        if ref in self._under_way:
            raise RuntimeFailure(
                "FN-E725",
                f"the gradient of '{ref.name}' was asked for amid the backward in which the ranks exchange it. Look at gradients when the "
                "backward is over.",
            )
        if self.clipping.taken and ref.factor is not None:
            super().settle(ref, beside)  # refuses it
        stream = stream_of(self._device)
        self._await_landed()
        self._engine.settle_update(ref.unit.engine_id, stream)
        self._engine.wait_gradients(stream)
        with torch.no_grad(), unguarded():
            grad = ref.param.grad
            if ref.factor is None or (grad is not None and grad is ref.shown):
                return
            if grad is not None and grad is ref.zeros:
                rebase(grad, grad * ref.factor)
                ref.stand_for_zeros(zeros_of(ref))
            else:
                was_there = grad is ref.grad
                move_out(ref, ref.factor)
                if grad is None or not was_there:
                    return
            # The object stays the gradient, for all that hold it.
            guard(grad, ref)
            ref.show(grad)

    def drop_unfinished(self) -> None:
        """Have no gradient of parameters whose exchange has not ended: parts of it are missing."""
        with unguarded():
            for ref in self._under_way | self._landing_elsewhere:
                ref.param.grad = None
        self._under_way.clear()
        self._landing_elsewhere.clear()

    def clear(self, ref: PagedParam, grad: torch.Tensor) -> bool:
        """Carry out ``p.grad.zero_()``: zeros stand for the gradient, on this rank alone. False for another tensor than the gradient."""
        if grad is ref.zeros:
            ref.forget_norm()
            return True
        with torch.no_grad(), unguarded():
            if ref.param.grad is not grad:
                return False
            self.speculation.drop(ref.unit)
            ref.forget_norm()
            if grad is ref.grad:
                self.settle(ref, [ref])
            # The object stays the gradient, for all that hold it, and views of it see the zeros.
            if grad is ref.shown or any(view() is not None for view in ref.views):
                if grad is ref.grad:
                    move_out(ref)
                grad.zero_()
            else:
                ref.give_gradient(make_grad(ref))
                grad.data = zeros_of(ref)
            guard(grad, ref)
            ref.stand_for_zeros(grad)
            ref.show(None)
        return True

    def to_step(self, grads: Mapping[PagedParam, torch.Tensor]) -> None:
        """Have in their places what the step is to use: zeros are written by those whom they belong to."""
        for ref in grads:
            with torch.no_grad(), unguarded():
                if ref.zeros is not None and ref.param.grad is ref.zeros:
                    assert ref.grad is not None
                    for one in self._slices[ref]:
                        if one.owner == self._group.rank:
                            flat(ref.grad)[one.start : one.start + one.numel].zero_()
                    ref.param.grad = ref.grad
                ref.stand_for_zeros(None)

    # ------------------------------------------------------------------ exchange

    def _states(self, engine_id: int) -> bytes:
        """Return what the gradients of a unit were before this round; those that have come are taken, the places are left by all others."""
        unit = self._units[engine_id]
        _core.tell_ranks(self._engine, f"in the backward of {unit.name}")
        found = []
        for ref in unit.params:
            if not ref.trainable:
                found.append(0)
                continue
            if ref not in self._aside:
                self._aside[ref] = self._state(ref)
            elif ref in self._came:
                self._mine[ref] = self._taken(ref)
            if not self._aside[ref] & SHARED:
                place_for(ref)  # code that holds an old gradient has its values from now on
            wanted = norms.is_wanted(ref, self.clipping.norms, adds=bool(self._aside[ref] & (SHARED | ZEROS)))
            found.append(self._aside[ref] | (NORM if wanted else 0))
        return bytes(found)

    def _taken(self, ref: PagedParam) -> torch.Tensor:
        """Return this rank's gradient, as its elements lie in memory.

        Raises
        ------
        UsageError
            ``FN-E704`` for one that cannot be exchanged.
        """
        with unguarded():
            grad, home = ref.param.grad, ref.home
            if grad is None:
                raise UsageError(
                    "FN-E704",
                    f"a hook has taken the gradient of '{ref.name}' away before the ranks exchanged it. Clear gradients after the step.",
                )
            if grad.layout != torch.strided or grad.dtype != home.dtype or grad.device != home.device:
                raise UsageError(
                    "FN-E704",
                    f"the gradient of '{ref.name}' is {grad.layout} {grad.dtype} on {grad.device}: ranks exchange dense gradients of "
                    f"their parameter's type, {home.dtype} on {home.device}. Use dense gradients (sparse=False), and hooks that keep the type.",
                )
            if grad.requires_grad:
                raise UsageError(
                    "FN-E704",
                    f"the gradient of '{ref.name}' has a graph (create_graph=True), which ranks cannot exchange.",
                )
            grad = grad.detach()
            if grad.stride() != home.stride():
                grad = torch.empty_like(ref.frame).copy_(grad)
            return flat(grad)

    def _exchange(self, engine_id: int, number: int, posts: list[bytes]) -> None:
        """Exchange a unit's gradients; interrupted, it cannot be taken up again."""
        try:
            self._exchange_unit(engine_id, number, posts)
        except BaseException:
            self._broken = True
            raise

    def _exchange_unit(self, engine_id: int, number: int, posts: list[bytes]) -> None:
        """Exchange a unit's gradients, and send the means of this rank's elements to their places."""
        unit = self._units[engine_id]
        self._compare(unit, posts)
        used: list[torch.Tensor] = []
        with self._beside.exchange(used):
            came, means = self._swap(unit, posts, used)
            for ref in came:
                ref.forget_norm()
            whole = [(ref, self._slices[ref]) for ref in came if all(post[self._index[ref]] & NORM for post in posts)]
            if whole:
                norms.take_norms(self._group, unit.engine_id, whole, means, self.clipping.norms)
        _core.gradients_sent(self._engine, unit.engine_id, number)
        for ref in came:
            self._under_way.add(ref)
            if not self._aside[ref] & (SHARED | ZEROS):
                ref.begin_sum()
            ref.note_gradient()
            ref.stand_for_zeros(None)
            let_go(ref)
            with unguarded():
                ref.param.grad = ref.grad
        if len(came) == unit.trained:
            self.speculation.look(unit, stream_of(self._device))

    def _swap(
        self, unit: Unit, posts: list[bytes], used: list[torch.Tensor]
    ) -> tuple[list[PagedParam], dict[PagedParam, list[tuple[Slice, torch.Tensor]]]]:
        """Give the others their parts of this rank's gradients, ``used``, and sum theirs.

        Returns whose gradients have come on any rank, and this rank's parts of their means.
        """
        me = self._group.rank
        sends: list[tuple[int, torch.Tensor]] = []
        summed: list[tuple[PagedParam, Slice]] = []
        sums = Means(me, self._group.size, self._device)
        came: list[PagedParam] = []
        for index, ref in enumerate(unit.params):
            ranks = [rank for rank, post in enumerate(posts) if post[index] & PIECE]
            if not ranks:
                continue
            came.append(ref)
            mine = self._mine.pop(ref, None)
            if mine is not None:
                used.append(mine)
            for one in self._slices[ref]:
                if one.owner == me:
                    summed.append((ref, one))
                    sums.add(ref.home.dtype, one, mine, ranks)
                elif mine is not None:
                    sends.append((one.owner, mine[one.start : one.start + one.numel]))
        self._group.transfer(sends, sums.receives(), unit.engine_id)
        stream = stream_of(self._device)
        means: dict[PagedParam, list[tuple[Slice, torch.Tensor]]] = {}
        for (ref, one), mean in zip(summed, sums.make(self._engine), strict=True):
            total = self._sum(ref, one, mean)
            self._landing.send(ref, total, stream, at=one.start)
            means.setdefault(ref, []).append((one, total))
        self._landing.reap(stream)
        return came, means

    def _sum(self, ref: PagedParam, one: Slice, mean: torch.Tensor) -> torch.Tensor:
        """Return the mean over ranks, added to what is there if that counts."""
        state = self._aside[ref]
        if not state & (SHARED | ZEROS):
            return mean
        with unguarded():
            assert ref.grad is not None
            if state & ZEROS:
                old = torch.zeros_like(mean)
            else:
                self._engine.wait_gradients(stream_of(self._device))
                old = flat(ref.grad)[one.start : one.start + one.numel].clone()
            if state & CLIPPED:
                assert ref.factor is not None
                old.mul_(ref.factor)
            return old.add_(mean)

    def _compare(self, unit: Unit, posts: list[bytes]) -> None:
        """Compare what the gradients were on all ranks before the round.

        Raises
        ------
        RuntimeFailure
            ``FN-E702``, on all ranks.
        """
        for index, ref in enumerate(unit.params):
            for rank, post in enumerate(posts):
                here, first = post[index] & STATES, posts[0][index] & STATES
                if here != first:
                    raise RuntimeFailure(
                        "FN-E702",
                        f"before this backward the gradient of '{ref.name}' was {_WORDS[here]} on rank {rank}, and {_WORDS[first]} on rank 0. "
                        "All ranks take as many backwards between two steps, and clear gradients alike.",
                    )
