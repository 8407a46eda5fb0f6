"""What is saved comes back: equal, of the same type, to the last bit; or the save says that it cannot."""

import math
import os
import random
import struct
from collections import Counter, OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_checkpoint import begin
from torch import nn

import funicular
from funicular import testing
from models import Stack
from twin import World

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
KEYS = st.text() | st.integers() | st.booleans() | st.none() | st.tuples(st.integers(), st.text())
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.dictionaries(KEYS, inner, max_size=4).map(OrderedDict)
        | st.dictionaries(KEYS, inner, max_size=4).map(Counter)
    ),
    max_leaves=12,
)


def small() -> nn.Module:
    return nn.Linear(2, 2)


def same(a: Any, b: Any) -> bool:
    """Equal in value, type, order, sign and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a.items(), b.items(), strict=True))
    return bool(a == b)


@settings(deadline=None)
@given(VALUES)
def test_extra_survives_json(value: Any):
    assert same(value, testing.through_manifest(value))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(VALUES)
def test_extra_survives_a_checkpoint(tmp_path: Path, value: Any):
    model = small()
    funicular.save(model, None, tmp_path / "c", extra=value, overwrite=True)
    assert same(value, funicular.load(tmp_path / "c", model).extra)


def test_numbers(tmp_path: Path):
    """Doubles of all magnitudes, among them those that a parser without exact rounding changes."""
    chance = random.Random(3)
    xs = [struct.unpack("d", struct.pack("Q", chance.getrandbits(64)))[0] for _ in range(4000)]
    xs += [chance.random() for _ in range(4000)]
    xs += [
        0.0,
        -0.0,
        math.inf,
        -math.inf,
        math.nan,
        5e-324,
        1.7976931348623157e308,
        0.1,
        0.30000000000000004,
        1e22,
        1.0,
    ]
    extra = {"floats": xs, "ints": [2**63, -(2**63), 2**64, -(2**64) - 1, 10**5000, 0, -1], "kinds": [1, 1.0, True]}
    model = small()
    opt = torch.optim.AdamW(model.parameters(), lr=0.1 * 0.9**7, betas=(0.9000000000000001, 0.9990000000000001))
    group = dict(opt.param_groups[0])
    state = random.getstate()
    random.gauss(0, 1)
    drawn = random.getstate()
    funicular.save(model, opt, tmp_path / "c", extra=extra)
    random.setstate(state)
    opt.param_groups[0].update(lr=1.0, betas=(0.5, 0.5))
    loaded = funicular.load(tmp_path / "c", model, opt).extra
    assert same(extra, loaded)
    assert all(same(group[k], opt.param_groups[0][k]) for k in ("lr", "betas", "eps", "weight_decay"))
    assert random.getstate() == drawn


def test_schedules_with_numbered_milestones(tmp_path: Path):
    model = small()
    opt = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.MultiStepLR(opt, [2, 4])
    funicular.save(model, opt, tmp_path / "c", extra=schedule.state_dict())
    assert same(schedule.state_dict()["milestones"], funicular.load(tmp_path / "c", model, opt).extra["milestones"])


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


Point = namedtuple("Point", "x y")


class Kind(int):
    pass


def doubled(levels: int) -> Any:
    """A few lists that JSON would write 2**levels times."""
    value: Any = [0]
    for level in range(levels):
        value = [value, value] if level % 2 else {"a": value, "b": value}
    return value


LOOP: list[Any] = []
LOOP.append(LOOP)
REFUSED: dict[str, Any] = {
    "deep": nested(126),
    "deeper": nested(900),
    "part of itself": LOOP,
    "twice part of itself": [LOOP, LOOP],
    "lists that stand at countless places": doubled(60),
    "a subclass of int": Kind(3),
    "a named tuple": {"p": Point(1, 2)},
    "a default dict": defaultdict(list, a=[1]),
    "a set": {1, 2},
    "bytes": b"x",
    "complex": 1j,
    "no Unicode": "\ud83d\ude00",
    "a key that is no Unicode": {"\udc80": 1},
    "a key of another kind": {frozenset(): 1},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_come_back_as_something_else_is_refused(what: str, tmp_path: Path):
    with pytest.raises(funicular.UsageError, match="FN-E408.*extra"):
        funicular.save(small(), None, tmp_path / "c", extra=REFUSED[what])
    assert os.listdir(tmp_path) == []


def test_the_deepest_that_is_saved_is_loaded(tmp_path: Path):
    model = small()
    for depth in (99, 100):
        funicular.save(model, None, tmp_path / "c", extra=nested(depth), overwrite=True)
        assert funicular.load(tmp_path / "c", model).extra == nested(depth)


def test_what_stands_at_several_places_is_saved_at_each(tmp_path: Path):
    model, value = small(), doubled(12)
    funicular.save(model, None, tmp_path / "c", extra=value)
    assert funicular.load(tmp_path / "c", model).extra == value


# ---------------------------------------------------------------------- options of groups

OPTIONS: dict[str, Any] = {
    "lr": [math.nan, math.inf, 0, True, 3, 5e-324, torch.tensor(0.1), torch.tensor([1e-3], dtype=torch.float64)],
    "betas": [[0.8, 0.9], (0.0, 1 - 2**-53)],
    "weight_decay": [-1e-3, math.inf],
    "mine": [[1, (2,)], "text", None, {"a": math.nan}, nested(50)],
    "also_mine": [7],
}


@pytest.mark.parametrize("kind", [torch.optim.AdamW, funicular.AdamW])
def test_options_that_are_saved_are_loaded(kind: Any, tmp_path: Path):
    """Into an optimizer that has others of another kind."""
    for key, values in OPTIONS.items():
        for value in values:
            model = small()
            opt, other = kind(model.parameters()), kind(model.parameters())
            opt.param_groups[0][key] = value
            funicular.save(model, opt, tmp_path / "c", overwrite=True)
            if key not in other.defaults:
                other.param_groups[0][key] = 0.5
            funicular.load(tmp_path / "c", model, other)
            want = float(value) if isinstance(value, torch.Tensor) else value
            assert same(other.param_groups[0][key], want), (key, value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", "fast"), ("lr", 10**400), ("lr", None), ("eps", [1e-8]), ("betas", 0.9), ("betas", (0.9,)), ("betas", (1.0, 0.9)),
        ("betas", (0.9, math.nan)), ("weight_decay", torch.zeros(2)), ("mine", torch.zeros(2)), ("mine", torch.tensor(1.0)),
    ],
)  # fmt: skip
def test_options_that_no_load_would_take(key: str, value: Any, tmp_path: Path):
    model = small()
    opt = funicular.AdamW(model.parameters())
    opt.param_groups[0][key] = value
    with pytest.raises(funicular.UsageError, match=f"FN-E408.*{key}"):
        funicular.save(model, opt, tmp_path / "c")
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------- tensors

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16,
]  # fmt: skip


def holding(**tensors: torch.Tensor) -> nn.Module:
    module = small()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module


def bits(tensor: torch.Tensor) -> bytes:
    plain = tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return bytes(plain.reshape(-1).view(torch.uint8).tolist()) if plain.numel() else b""


@st.composite
def any_tensor(draw: st.DrawFn) -> torch.Tensor:
    """Any type, any shape of up to three dimensions, dense, cut, turned or expanded, with bits of any kind."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    size = torch.empty((), dtype=dtype).element_size() * max(math.prod(shape), 0)
    raw = draw(st.binary(min_size=size, max_size=size))
    if dtype == torch.bool:
        raw = bytes(b & 1 for b in raw)
    flat = torch.frombuffer(bytearray(raw), dtype=dtype) if size else torch.empty(0, dtype=dtype)
    tensor = flat.reshape(shape)
    how = draw(st.sampled_from(["dense", "cut", "turned", "expanded"]))
    if how == "cut" and tensor.dim() and tensor.shape[0] > 1:
        tensor = tensor[::2]
    elif how == "turned" and tensor.dim() > 1:
        tensor = tensor.transpose(0, -1)
    elif how == "expanded":
        tensor = tensor.unsqueeze(0).expand(3, *tensor.shape)
    return tensor


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(any_tensor())
def test_tensors_survive(tmp_path: Path, tensor: torch.Tensor):
    funicular.save(holding(t=tensor), None, tmp_path / "c", overwrite=True)
    empty = holding(t=torch.zeros(tensor.shape, dtype=torch.uint8).to(tensor.dtype))
    funicular.load(tmp_path / "c", empty)
    assert bits(empty.t) == bits(tensor)


@pytest.mark.parametrize("offloaded", [False, True])
def test_what_torch_has_put_off_is_done(offloaded: bool, host_world: World, tmp_path: Path):
    """A conjugate and a negation are bits of the tensor, not of its memory."""
    z = torch.tensor([1 + 2j, 3 - 4j])
    run = begin(host_world, lambda: Stack(depth=1), offloaded)
    run.model.register_buffer("conjugate", z.conj())
    run.model.register_buffer("negative", z.conj().imag)
    assert run.model.conjugate.is_conj()
    assert run.model.negative.is_neg()
    funicular.save(run.model, None, tmp_path / "c")
    run.model.conjugate, run.model.negative = torch.zeros(2, dtype=torch.complex64), torch.zeros(2)
    funicular.load(tmp_path / "c", run.model)
    assert run.model.conjugate.tolist() == [1 - 2j, 3 + 4j]
    assert run.model.negative.tolist() == [-2, 4]


@pytest.mark.parametrize("name", ["format", "a/b", "größe", " ", "\u0000", "x" * 5000, "a" + "\n" + "b"])
def test_names(name: str, tmp_path: Path):
    model = holding(**{name: torch.arange(3.0)})
    funicular.save(model, None, tmp_path / "c")
    model._buffers[name].zero_()
    funicular.load(tmp_path / "c", model)
    assert model._buffers[name].tolist() == [0, 1, 2]


def test_tied_names_do_not_hide_the_format(tmp_path: Path):
    from safetensors import safe_open

    model = small()
    model.register_parameter("format", model.weight)
    funicular.save(model, None, tmp_path / "c")
    with safe_open(tmp_path / "c" / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
    funicular.load(tmp_path / "c", model)


UNREADABLE: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "the name of the format's own entry": lambda: {"__metadata__": torch.ones(1)},
    "a name that is no Unicode": lambda: {"\ud800": torch.ones(1)},
    "complex of 16 bytes": lambda: {"t": torch.ones(1, dtype=torch.complex128)},
    "complex of 4 bytes": lambda: {"t": torch.ones(1, dtype=torch.complex32)},
    "another float of 8 bits": lambda: {"t": torch.ones(1).to(torch.float8_e4m3fnuz)},
    "quantized": lambda: {"t": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)},
    "sparse": lambda: {"t": torch.ones(2).to_sparse()},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", UNREADABLE)
def test_tensors_that_no_load_could_read(what: str, tmp_path: Path):
    with pytest.raises(funicular.UsageError, match="FN-E408"):
        funicular.save(holding(**UNREADABLE[what]()), None, tmp_path / "c")
    assert os.listdir(tmp_path) == []
