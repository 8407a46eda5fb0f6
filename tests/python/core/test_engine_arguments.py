"""Numbers that no unit, section, phase or copy has, given to every call of the core: an error by name, and the runtime goes on."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import funicular
from funicular import _core, testing
from funicular._core import Hyper, MemoryPlace, Span, UnitPlace
from funicular._core import ResidentUpdate as Resident
from funicular._core import UnitUpdate as Update
from models import WIDTH, Stack
from twin import Run, World, compare

HUGE = [2**31, 2**63, 2**64 - 1, 2**64, -1]
GOOD_SPAN = Span(0, 0, 128, 0, False)
GOOD_HYPER = Hyper(1e-3, 0.9, 0.999, 1e-8, 0.0, 1, False, None)
#: wrong values of arguments, by name
BAD: dict[str, list[Any]] = {
    "unit": [99, *HUGE],
    "in_phase": [3, 255, 256, -1],
    "seq": [10**9, 2**64 - 1, 2**64, -1],
    "offset": HUGE,
    "len": HUGE,
    "start": HUGE,
    "section": [7, *HUGE],
    "state": ["param", "grad", "", "nothing"],
    "src": [0, 2**64, -1],
    "dst": [0, 2**64, -1],
    "bytes": HUGE[2:],
    "least": HUGE[1:],
    "part": [(2**40, 4), (0, 2**40), (2**64 - 1, 2), (-1, 4), (0, 2**64)],
    "split": ["nobody", ""],
    "path": ["/none/at/all.json"],
    "updates": [
        [Update(99, [GOOD_SPAN], False)],
        [Update(0, [], False)],
        [Update(0, [Span(7, 0, 128, 0, False)], False)],
        [Update(0, [Span(2**63, 0, 128, 0, False)], False)],
        [Update(0, [Span(0, 2**63, 2**63, 0, False)], False)],
        [Update(0, [Span(0, 2**64 - 1, 128, 0, False)], False)],
        [Update(0, [Span(0, 0, 2**40, 0, False)], False)],
        [Update(0, [Span(0, 0, 128, 5, False)], False)],
        [Update(0, [GOOD_SPAN, GOOD_SPAN], False)],
        [Update(0, [GOOD_SPAN], False), Update(0, [GOOD_SPAN], False)],
        [Update(1, [GOOD_SPAN], False), Update(0, [GOOD_SPAN], False)],
    ],
    "update": [
        Update(99, [GOOD_SPAN], False),
        Update(0, [], False),
        Update(0, [Span(7, 0, 128, 0, False)], False),
        Update(0, [Span(0, 2**63, 2**63, 0, False)], False),
        Update(0, [Span(0, 0, 128, 5, False)], False),
    ],
    "hypers": [
        [],
        [Hyper(1e-3, 0.9, 0.999, 1e-8, 0.0, 0, False, None)],
        [Hyper(1e-3, 0.9, 0.999, 1e-8, 0.0, 1, False, 2**31)],
    ],
    "residents": [
        [Resident(0, 0, 0, 0, 0, 128, "float32", 0, False)],
        [Resident(1, 1, 0, 1, 1, 0, "float32", 9, False)],
        [Resident(1, 1, 0, 1, 1, 0, "int8", 0, False)],
    ],
}
#: arguments that any value is right for
ANY = {"stream", "wait", "on_device", "on", "wanted", "keep"}


def good(name: str, buffer: torch.Tensor) -> Any:
    values: dict[str, Any] = {
        "unit": 0, "in_phase": 0, "seq": 0, "offset": 0, "len": 4, "start": 0, "section": 0, "state": "exp_avg",
        "src": buffer.data_ptr(), "dst": buffer.data_ptr(), "bytes": 1, "least": 1, "wanted": 1, "split": "processor",
        "path": "/none/at/all.json", "updates": [Update(0, [GOOD_SPAN], False)], "update": Update(0, [GOOD_SPAN], False),
        "hypers": [GOOD_HYPER], "residents": [], "stream": 0, "wait": False, "on_device": True, "on": False,
        "part": None, "keep": True,
    }  # fmt: skip
    return values[name]


def methods() -> Iterator[tuple[str, list[str]]]:
    for name, method in inspect.getmembers(_core.Engine):
        if not name.startswith("_") and callable(method):
            yield name, [p for p in inspect.signature(method).parameters if p != "self"]


def calls() -> Iterator[tuple[str, str, int]]:
    for name, parameters in methods():
        for parameter in parameters:
            for index in range(len(BAD.get(parameter, []))):
                yield name, parameter, index


def test_every_argument_is_known():
    """A new call of the core is tried too."""
    unknown = {p for _, parameters in methods() for p in parameters} - BAD.keys() - ANY
    assert not unknown
    assert len(list(methods())) > 35


def test_every_call_with_bad_numbers(two_worlds: World):
    """An error by name, of this package or of Python's for what is no number of that kind; then training goes on, bit by bit."""

    def script(run: Run) -> None:
        run.model = run.wrap(Stack())
        run.opt = run.adamw()
        run.train(2)
        if run.offloaded:
            torment(run)
        run.train(2)

    compare(two_worlds, None, script)


def torment(run: Run) -> None:
    engine = testing.inspect(run.model).engine
    buffer = torch.zeros(64, device=run.device)
    tried = 0
    for name, parameter, index in calls():
        signature = [p for p in inspect.signature(getattr(engine, name)).parameters]
        arguments = {p: good(p, buffer) for p in signature}
        arguments[parameter] = BAD[parameter][index]
        said = f"{name}({parameter}={arguments[parameter]!r})"
        try:
            getattr(engine, name)(*arguments.values())
        except funicular.Error as error:
            # Where there is nothing to fill or to write, nothing is wrong.
            assert error.code in ("FN-E108", "FN-E202", "FN-E205", "FN-E606"), f"{said}: {error}"
        except (OverflowError, TypeError):
            pass
        else:
            raise AssertionError(f"{said} was taken")
        tried += 1
    assert tried > 150
    assert not engine.failed()


def test_places_of_a_save_and_of_a_load(host_world: World, tmp_path: Path):
    run = Run(host_world, True)
    run.model = run.wrap(Stack())
    run.opt = run.adamw()
    run.train(1, look=False)
    engine = testing.inspect(run.model).engine
    for place in [
        (99, 0, 0, "param"),
        (2**40, 0, 0, "param"),
        (0, 9, 0, "param"),
        (0, 0, 2**63, "param"),
        (0, 0, 2**64 - 1, "param"),
        (0, 0, 0, "master"),
        (0, 0, 0, "nothing"),
        None,
    ]:
        for shape in [(4,), (2**40,), (2**40, 2**40)]:
            if place == (0, 0, 0, "param") and shape == (4,):
                continue
            where = MemoryPlace(0, False) if place is None else UnitPlace(*place)
            tensors = [_core.SavedTensor("w", "F32", shape, False, where, None, None)]
            request = _core.SaveRequest(str(tmp_path / "c"), False, None, tensors, [], [], json.dumps({}), 10**9)
            with pytest.raises(funicular.UsageError, match="FN-E108"):
                _core.save(engine, request, lambda: None, 0)
    assert not list(tmp_path.iterdir())
    funicular.save(run.model, run.opt, tmp_path / "c")
    checkpoint = _core.Checkpoint(str(tmp_path / "c"), True)
    for item in [
        (99, 0, "param", 0, 4),
        (0, 9, "param", 0, 4),
        (0, 0, "param", 2**63, 2**63),
        (0, 0, "param", 2**64 - 1, 4),
        (0, 0, "master", 0, 4),
        (0, 0, "nothing", 0, 4),
    ]:
        with pytest.raises(funicular.UsageError, match="FN-E108"):
            unit, section, state, start, len_ = item
            place = UnitPlace(unit, section, start, state)
            _core.restore(engine, checkpoint, [_core.RestoredState(place, len_, False, None, False)], 0, None)
    with pytest.raises(funicular.UsageError, match="FN-E108"):
        checkpoint.read([_core.ReadBuffer(0, 4 * WIDTH, "F32", False, "inp.bias", None)])
    with pytest.raises(funicular.UsageError, match="FN-E108"):
        _core.preserve(engine, 99)
    with pytest.raises(funicular.UsageError, match="FN-E108"):
        _core.digest(0, 4)
    run.train(1, look=False)
    run.model.zero_grad()


def test_units_that_cannot_be(host_world: World):
    policy = funicular.Policy.load(host_world.policy(Stack())).to_json()
    for numel, dtype, size in [(2**63, "float32", 4), (2**64 - 1, "bfloat16", 2), (2**50, "int8", 1), (4, "int8", 0)]:
        with pytest.raises(funicular.UsageError, match="FN-E1(08|12)"):
            _core.Engine([("u", [_core.Param("w", numel, dtype, size, True)])], policy)


def test_a_wait_for_no_number_of_seconds(host_world: World, tmp_path: Path):
    run = Run(host_world, True)
    run.model = run.wrap(Stack())
    handle = funicular.save(run.model, None, tmp_path / "c", wait=False)
    for seconds in (float("nan"), float("-inf"), -1.0):
        handle._core.wait(seconds)
    assert handle._core.wait(float("inf")) is not None
    handle.wait()
