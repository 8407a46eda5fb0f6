"""Which units ranks exchange when, with simulated ranks; and how gradients are cut, without any."""

import itertools
import random
import threading

import pytest

import funicular
from funicular.testing import Rounds, cut_gradient

#: seconds after which simulated ranks hang
PATIENCE = 30


class Board:
    """A page for simulated ranks, which are threads."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.posts: dict[tuple[int, int], dict[int, bytes]] = {}
        self.steps: dict[int, int] = {}
        self.ended: set[tuple[int, int]] = set()
        self.changed = threading.Condition()

    def of(self, rank: int) -> "Page":
        return Page(self, rank)


class Page:
    """The board as one rank uses it."""

    def __init__(self, board: Board, rank: int) -> None:
        self.board, self.rank, self.steps = board, rank, 0

    def post(self, unit: int, number: int, present: bytes) -> None:
        with self.board.changed:
            mine = self.board.posts.setdefault((unit, number), {})
            assert self.rank not in mine, "posted twice"
            mine[self.rank] = present
            self.board.changed.notify_all()

    def posted(self, unit: int, number: int) -> list[bytes] | None:
        with self.board.changed:
            found = self.board.posts.get((unit, number), {})
            return [found[rank] for rank in range(self.board.size)] if len(found) == self.board.size else None

    def wait(self, unit: int, number: int) -> list[bytes]:
        with self.board.changed:
            assert self.board.changed.wait_for(lambda: self.posted(unit, number) is not None, PATIENCE), "hangs"
        found = self.posted(unit, number)
        assert found is not None
        return found

    def at_step(self, number: int) -> int | None:
        board = self.board

        def begun() -> bool:
            return any(n > number for _, n in board.posts)

        with board.changed:
            board.steps[self.rank] = self.steps
            board.changed.notify_all()
            here = (self.steps, number)

            def together() -> bool:
                return all(board.steps.get(rank, -1) >= self.steps for rank in range(board.size))

            assert board.changed.wait_for(lambda: together() or begun(), PATIENCE), "hangs"
            if here not in board.ended and begun():
                del board.steps[self.rank]
                return number + 1
            board.ended.add(here)  # the others may have gone on by the time this rank looks
            self.steps += 1
            return None


def simulate(size: int, seed: int) -> list[list[tuple[int, int, list[bytes]]]]:
    """Train on simulated ranks: random gradients in random order, some ranks without some backwards. What each rank has exchanged."""
    chance = random.Random(seed)
    units = [
        (unit, [chance.random() < 0.8 for _ in range(chance.randint(1, 3))]) for unit in range(chance.randint(1, 4))
    ]
    board = Board(size)
    seen: list[list[tuple[int, int, list[bytes]]]] = [[] for _ in range(size)]
    plans = [[[chance.random() < 0.8 for _ in range(chance.randint(1, 3))] for _ in range(4)] for _ in range(size)]
    errors: list[BaseException] = []

    def rank(me: int) -> None:
        mine = random.Random(seed * 100 + me)

        def exchange(unit: int, number: int, posts: list[bytes]) -> None:
            assert len(board.posts[unit, number]) == size, "exchanged before all had posted"
            seen[me].append((number, unit, posts))

        rounds = Rounds(board.of(me), units, lambda unit: bytes(len(dict(units)[unit])), exchange)
        try:
            for backwards in plans[me]:
                for has in backwards:
                    arrivals = [(unit, i) for unit, trained in units for i, t in enumerate(trained) if t]
                    mine.shuffle(arrivals)
                    for unit, i in arrivals[: mine.randint(0, len(arrivals))] if has else []:
                        if not rounds.posted(unit):
                            rounds.arrived(unit, i)
                            rounds.look(unit)
                    rounds.end()
                while rounds.behind():
                    rounds.catch_up()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=rank, args=(me,), daemon=True) for me in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    if errors:
        raise errors[0]
    return seen


@pytest.mark.parametrize("seed", range(40))
def test_all_ranks_exchange_the_same(seed: int):
    size = 2 + seed % 3
    seen = simulate(size, seed)
    assert all(one == seen[0] for one in seen)
    for number, group in itertools.groupby(seen[0], key=lambda entry: entry[0]):
        assert sorted(unit for _, unit, _ in group) == list(range(len({u for _, u, _ in seen[0]}))), number


class Alone:
    """A page with one rank, which notes in what order it posts."""

    def __init__(self) -> None:
        self.order: list[tuple[int, int]] = []
        self.last: dict[tuple[int, int], bytes] = {}

    def post(self, unit: int, number: int, present: bytes) -> None:
        self.order.append((unit, number))
        self.last[unit, number] = present

    def posted(self, unit: int, number: int) -> list[bytes] | None:
        return [self.last[unit, number]]

    wait = posted

    def at_step(self, number: int) -> int | None:
        return None


def test_a_unit_goes_as_soon_as_it_is_complete_but_for_the_first_round():
    page, exchanged = Alone(), []
    rounds = Rounds(
        page, [(0, [True]), (1, [True, False])], lambda unit: bytes(2 - (unit == 0)), lambda *e: exchanged.append(e[:2])
    )
    for number in (1, 2):
        rounds.arrived(1, 0)
        rounds.look(1)
        assert ((1, number) in page.order) == (number == 2)
        assert (1, number) not in exchanged  # the other is first in the order
        rounds.arrived(0, 0)
        rounds.look(0)
        assert ((0, number) in exchanged) == (number == 2)
        assert rounds.end()
        assert exchanged[-2:] == [(0, number), (1, number)]
    assert not rounds.end()
    assert not rounds.behind()


def test_where_memory_is_short_the_first_round_expects_each_parameter_once():
    page, exchanged = Alone(), []
    units = [(unit, [True]) for unit in range(4)]
    rounds = Rounds(page, units, lambda unit: bytes(1), lambda *e: exchanged.append(e[0]), lambda nbytes: nbytes > 20)
    for unit in (0, 1, 2, 3):
        rounds.arrived(unit, 0, 10)
        rounds.look(*range(max(unit - 1, 0), unit))
        assert exchanged == ([] if unit < 2 else list(range(unit))), "20 bytes are not too many"
    with pytest.raises(funicular.RuntimeFailure, match="FN-E724"):
        rounds.arrived(0, 0, 10)
    assert rounds.end()
    assert exchanged == [0, 1, 2, 3]


def test_a_rank_that_is_far_ahead_waits_where_memory_is_short():
    """Six units wait for the other rank; with the seventh it waits for the oldest, and for no other."""
    board = Board(2)
    exchanged: list[int] = []
    units = [(unit, [True]) for unit in range(8)]
    short = False
    rounds = Rounds(board.of(0), units, lambda unit: bytes(1), lambda *e: exchanged.append(e[0]), lambda nbytes: short)

    def backward(first: int, last: int) -> None:
        for unit in range(first, last):
            rounds.arrived(unit, 0, 10)
            rounds.look(unit)

    for unit, _ in units:
        board.of(1).post(unit, 1, bytes([8]))
    backward(0, 8)
    rounds.end()
    exchanged.clear()
    backward(0, 6)
    assert exchanged == [], "there is memory"
    short = True
    ahead = threading.Thread(target=backward, args=(6, 7))
    ahead.start()
    ahead.join(0.2)
    assert ahead.is_alive()
    for unit in range(3):
        board.of(1).post(unit, 2, bytes([8]))
    ahead.join(PATIENCE)
    assert not ahead.is_alive()
    assert exchanged == [0, 1, 2]
    for unit in range(3, 8):
        board.of(1).post(unit, 2, bytes([8]))
    backward(7, 8)
    rounds.end()
    assert exchanged == list(range(8))


def test_a_parameter_used_twice_is_waited_for():
    page = Alone()
    rounds = Rounds(page, [(0, [True])], lambda unit: bytes(1), lambda *_: None)
    for _ in range(2):
        rounds.arrived(0, 0)
    rounds.end()
    rounds.arrived(0, 0)
    rounds.look(0)
    assert page.order == [(0, 1)]
    rounds.arrived(0, 0)
    rounds.look(0)
    assert page.order == [(0, 1), (0, 2)]
    with pytest.raises(RuntimeError, match="FN-E724"):
        rounds.arrived(0, 0)


def owners(chance: random.Random, length: int, size: int) -> list[list[tuple[int, int]]]:
    """Cut a section at random places into parts of ranks; some have none."""
    cuts = sorted(chance.randint(0, length) for _ in range(size - 1))
    ends = [*cuts, length]
    return [[(start, end - start)] if end > start else [] for start, end in zip([0, *cuts], ends, strict=True)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_cut_by_owners(size: int):
    """However a section is cut, each element of a parameter has the owner that its place in the section has."""
    chance = random.Random(size)
    for _ in range(30):
        length = chance.randint(1, 300)
        start = chance.randint(0, length - 1)
        numel = chance.randint(0, length - start)
        ranges = owners(chance, length, size)
        found = [None] * numel
        for owner, first, n in cut_gradient(start, numel, ranges):
            assert found[first : first + n] == [None] * n
            found[first : first + n] = [owner] * n
        place = [owner for owner, of in enumerate(ranges) for _, n in of for _ in range(n)]
        assert found == place[start : start + numel]


def test_an_element_without_an_owner():
    with pytest.raises(ValueError, match="elements 3"):
        cut_gradient(0, 8, [[(0, 3)], [(4, 4)]])
    with pytest.raises(ValueError, match="elements 3"):
        cut_gradient(0, 8, [[(0, 3)], [(2, 6)]])
