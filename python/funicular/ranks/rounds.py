"""In which order ranks exchange the gradients of units, and how a rank without a backward takes part.

A *round* is one backward of all ranks; rounds are numbered alike everywhere. Each rank posts a unit once it has the unit's gradients: a byte
for each parameter. Units are exchanged in one order, and each only when all ranks have posted it, so that no rank waits for data that is not
on its way; what has not come by the end of the backward is posted as missing. If any rank's program runs collectives of its own amid backwards, all
units are exchanged at the end: when a unit is complete on all ranks, some may be before such a collective and some behind it, and two orders of
collectives can hang the GPUs.

Before its step a rank asks whether all others are at theirs. If some have posted for a further round, they are in a backward that this rank
does not have: it takes part without gradients, and asks again.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Protocol

from funicular.errors import RuntimeFailure

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["AT_END", "CLIPPED", "NORM", "PIECE", "SHARED", "STATES", "ZEROS", "Board", "Rounds"]

#: What a parameter's gradient was before the round: none (0), the shared one, or zeros; and whether it is yet to be multiplied.
SHARED, ZEROS, CLIPPED = 1, 2, 4
STATES = SHARED | ZEROS | CLIPPED
#: this rank has a gradient of the parameter
PIECE = 8
#: this rank expects to be asked for the norm of the gradient
NORM = 16
#: the units of this round are exchanged at the end of the backward
AT_END = 32
#: units that may wait for those of other ranks before it is asked whether memory is short
AHEAD = 4


class Board(Protocol):
    """Where ranks post: the runtime's page that all of them see."""

    def post(self, unit: int, number: int, present: bytes) -> None:
        """Post a unit in a round."""

    def posted(self, unit: int, number: int) -> list[bytes] | None:
        """Return what all ranks have posted; None as long as one is missing."""

    def wait(self, unit: int, number: int) -> list[bytes]:
        """Wait until all ranks have posted."""

    def at_step(self, number: int) -> int | None:
        """Wait until all ranks are at their step after so many rounds: None; or the number of a further round that some have begun."""


class Rounds:
    """The rounds of one rank.

    Parameters
    ----------
    units
        Number of each unit, and how many parameters it has, in the order in which units are exchanged. The same on all ranks.
    states
        Returns for a unit, which is about to be posted, what its gradients were before, and whether their norms are expected to be asked
        for: a byte for each parameter.
    exchange
        Exchanges a unit that all have posted.
    short
        Whether there is too little memory to keep so many bytes of gradients. Then each parameter is expected once in the first round, and a rank
        that is ahead of the others waits for them amid its backward.
    """

    def __init__(
        self,
        board: Board,
        units: Sequence[tuple[int, Sequence[bool]]],
        states: Callable[[int], bytes],
        exchange: Callable[[int, int, list[bytes]], None],
        short: Callable[[int], bool] = lambda nbytes: False,
    ) -> None:
        self._board, self._short = board, short
        self._states, self._exchange = states, exchange
        self._order = [unit for unit, _ in units]
        self._trained = {unit: list(trained) for unit, trained in units}
        #: how often each parameter's gradient has come in this round, and at most in any
        self._came = {unit: [0] * len(trained) for unit, trained in units}
        self._most = {unit: [0] * len(trained) for unit, trained in units}
        #: the rounds that are over
        self.number = 0
        #: a backward is under way that has brought a gradient
        self.open = False
        #: set where the program runs collectives amid backwards; counts from the next round on
        self.at_end = False
        self._end = 0
        self._posted: set[int] = set()
        self._at = 0
        #: bytes of units that have come and are not exchanged, and the unit to which the last ones belong
        self._held: Counter[int] = Counter()
        self._last = -1
        #: in the first round: each parameter is expected once
        self._once = False

    def posted(self, unit: int) -> bool:
        """Whether this rank has posted a unit in the round under way: nothing more may come of it."""
        return unit in self._posted

    def arrived(self, unit: int, index: int, nbytes: int = 0) -> None:
        """Take note of a gradient of a parameter, and of its bytes."""
        if unit in self._posted:
            raise RuntimeFailure(
                "FN-E724",
                "a gradient came more often in one backward than in any before, after its unit was exchanged.",
            )
        self.open = True
        self._came[unit][index] += 1
        self._held[unit] += nbytes
        self._last = unit

    def _is_complete(self, unit: int) -> bool:
        """Whether all that can be expected has come: each trained parameter, as often as ever. In the first round that is not known."""
        every = zip(self._trained[unit], self._came[unit], self._most[unit], strict=True)
        return all(not trained or 0 < max(most, self._once) <= came for trained, came, most in every)

    def look(self, *units: int) -> None:
        """Post those of these units that are complete, and exchange what all have posted."""
        if self.number == 0 and not self._once and self._short(self._held.total()):
            self._once = True
            # Of the last one hooks may be about to run.
            units = tuple(unit for unit in self._order if unit != self._last)
        for unit in units:
            if unit not in self._posted and self._is_complete(unit):
                self._post(unit)
        while self._at < len(self._order) and self._order[self._at] in self._posted:
            unit = self._order[self._at]
            posts = self._board.posted(unit, self.number + 1)
            if posts is None and self._is_far_ahead():
                posts = self._board.wait(unit, self.number + 1)
            if posts is None or any(byte & AT_END for post in posts for byte in post[:1]):
                return
            self._next(posts)

    def _is_far_ahead(self) -> bool:
        """Whether this rank's gradients take too much memory while they wait for those of others."""
        waiting = len(self._posted) - self._at
        return waiting > AHEAD and not self._end and self._short(self._held.total())

    def _post(self, unit: int) -> None:
        every = zip(self._states(unit), self._came[unit], strict=True)
        post = bytes(state | self._end | (PIECE if came else 0) for state, came in every)
        self._board.post(unit, self.number + 1, post)
        self._posted.add(unit)

    def _next(self, posts: list[bytes]) -> None:
        unit = self._order[self._at]
        self._at += 1
        self._held.pop(unit, None)
        self._exchange(unit, self.number + 1, posts)

    def end(self) -> bool:
        """End a backward: post what has not come as missing, and exchange all. False if it has brought no gradient."""
        if not self.open:
            return False
        self._finish()
        return True

    def _finish(self) -> None:
        for unit in self._order:
            if unit not in self._posted:
                self._post(unit)
        while self._at < len(self._order):
            self._next(self._board.wait(self._order[self._at], self.number + 1))
        for unit, came in self._came.items():
            self._most[unit] = [max(most, n) for most, n in zip(self._most[unit], came, strict=True)]
            self._came[unit] = [0] * len(came)
        self.number += 1
        self.open = False
        self._end, self._once = AT_END if self.at_end else 0, False
        self._posted.clear()
        self._at = 0

    def behind(self) -> bool:
        """Wait until all ranks are at their step: False; or until some are in a backward that this one does not have, and has to take part in."""
        return self._board.at_step(self.number) is not None

    def catch_up(self) -> None:
        """Take part in a backward that only others have; then it has to be asked again."""
        self._finish()
