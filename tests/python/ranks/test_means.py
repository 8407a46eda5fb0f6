"""The means and norms that ranks make on the compute device, against the reference in plain torch: the same bits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funicular
from funicular import _core
from funicular.reference import mean_of_ranks
from funicular.testing import inspect, means_of_pieces, note_norms
from models import Stack
from twin import World, bits, same

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 6e-8, 6e4, 65504.0, 3e38, -3e38, float("inf"), float("-inf"), float("nan")]


@pytest.fixture
def model(host_world: World) -> Iterator[nn.Module]:
    """An offloaded model, for its runtime."""
    made = Stack(depth=1)
    funicular.offload(made, host_world.policy(made))
    yield made
    funicular.unwrap(made)


def piece(numel: int, dtype: torch.dtype, seed: int, device: torch.device, shift: int = 0) -> Tensor:
    """Ordinary values and special ones, which begin ``shift`` elements after memory of their own."""
    made = torch.Generator().manual_seed(seed)
    values = torch.randn(shift + numel, generator=made) * 10.0 ** torch.randint(-6, 6, (shift + numel,), generator=made)
    special = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (shift + numel,), generator=made)]
    often = torch.randint(4, (shift + numel,), generator=made) == 0
    return torch.where(often, special, values).to(dtype).to(device)[shift:]


def check(model: nn.Module, parts: list[list[Tensor | None]], rank: int) -> None:
    found = means_of_pieces(model, parts, rank)
    assert len(found) == len(parts)
    for pieces, mean in zip(parts, found, strict=True):
        expected = mean_of_ranks(pieces)
        assert expected is not None
        wrong = (bits(mean) != bits(expected)) & ~(mean.isnan() & expected.isnan())
        assert same(mean, expected), f"{int(wrong.sum())} of {mean.numel()} {mean.dtype}, rank {rank} of {len(pieces)}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_means_of_all_and_of_some(model: nn.Module, host_world: World, size: int, dtype: torch.dtype):
    """Odd lengths, addresses that are aligned to an element alone, ranks without a piece, this one among them."""
    chance = random.Random(size)
    for rank in {0, size // 2, size - 1}:
        parts: list[list[Tensor | None]] = []
        for numel in [1, 7, 8, 255, 2048, 2049, 4099, 100_003]:
            has = [chance.random() < 0.7 for _ in range(size)]
            has[chance.randrange(size)] = True
            for which in ([True] * size, has):
                shift = chance.choice([0, 1, 3, 8])
                parts.append([piece(numel, dtype, 9 * r + numel, host_world.torch_device, shift) if w else None for r, w in enumerate(which)])  # fmt: skip
        check(model, parts, rank)


def test_more_parts_than_a_launch_takes(model: nn.Module, host_world: World):
    """Of all types, in turn."""
    device = host_world.torch_device
    parts = [[piece(1 + 37 * i, DTYPES[i % 3], 2 * i + r, device) for r in range(2)] for i in range(200)]
    check(model, [list(pieces) for pieces in parts], 1)


def test_more_pieces_than_any_machine_has(model: nn.Module, host_world: World):
    """One thousand ranks."""
    some = [piece(333, torch.bfloat16, r, host_world.torch_device) for r in range(1000)]
    check(model, [list(some)], 500)


def test_a_large_part(model: nn.Module, host_world: World):
    """More tiles than the grid of any GPU has blocks, beside small parts."""
    device = host_world.torch_device
    sizes = [5, 4_000_001, 3]
    check(model, [[piece(n, torch.bfloat16, n + r, device) for r in range(2)] for n in sizes], 0)


def test_no_parts(model: nn.Module):
    assert means_of_pieces(model, [], 0) == []


def test_the_order_of_ranks_counts(model: nn.Module, host_world: World):
    """The sum is no sum in any order: ranks that change places give other bits."""
    grads = [torch.randn(1000).to(host_world.torch_device) for _ in range(3)]
    assert same(means_of_pieces(model, [grads], 1)[0], mean_of_ranks(grads))
    assert not same(means_of_pieces(model, [[grads[2], grads[1], grads[0]]], 1)[0], mean_of_ranks(grads))


def test_once_rounded(model: nn.Module, host_world: World):
    """A sum beyond fp16 whose mean is not; and a third, which is no product with the reciprocal."""
    big = torch.tensor([6e4]).half().to(host_world.torch_device)
    assert means_of_pieces(model, [[big, big, big]], 0)[0].tolist() == big.tolist()
    numbers = torch.arange(1.0, 1000.0).to(host_world.torch_device)
    assert not same(numbers.cpu() / 3, numbers.cpu() * (torch.ones(()) / 3))
    assert same(means_of_pieces(model, [[numbers, None, None]], 0)[0], (numbers.cpu() / 3).to(numbers.device))


def test_what_is_no_part(model: nn.Module, host_world: World):
    """An error by name, and nothing is touched."""
    engine = inspect(model).engine
    room = torch.full((64,), 7.0, device=host_world.torch_device)
    at = room.data_ptr()
    good: dict[str, Any] = {
        "out": at, "own": at + 64, "others": at + 128, "stride": 16, "count": 2, "before": 1, "len": 4, "dtype": "float32",
    }  # fmt: skip
    wrong: list[tuple[dict[str, Any], int]] = [
        ({}, 0), ({}, 2), ({}, 1025), ({"out": 0}, 3), ({"out": at + 1}, 3), ({"own": at + 2}, 3), ({"others": 0}, 3),
        ({"others": at + 130}, 3), ({"others": 2**64 - 4}, 3), ({"out": 2**64 - 4}, 3), ({"stride": 12}, 3),
        ({"stride": 17}, 3), ({"stride": 2**63}, 3), ({"before": 3}, 3), ({"count": 2**64 - 1}, 3),
        ({"own": 0, "count": 0, "before": 0}, 3), ({"len": 2**49}, 3), ({"len": 2**64 - 1}, 3), ({"dtype": "int8"}, 3),
        ({"dtype": "float64"}, 3),
    ]  # fmt: skip
    for values, ranks in wrong:
        with pytest.raises(funicular.UsageError, match="FN-E108"):
            _core.mean_of_ranks(engine, [_core.MeanPart(**{**good, **values})], ranks, 0)
    assert (room == 7).all()
    assert not engine.failed()
    if host_world.device == "cuda":
        torch.cuda.synchronize()
    _core.mean_of_ranks(engine, [_core.MeanPart(**good)], 3, 0)
    if host_world.device == "cuda":
        torch.cuda.synchronize()
    assert room.tolist() == [7.0] * 64


class Noted:
    """What notes a norm, in place of a parameter."""

    def __init__(self) -> None:
        self.said: list[Any] = ["older"]

    def forget_norm(self) -> None:
        self.said.append("forgotten")

    def note_norm(self, norm: tuple[Tensor, int, str]) -> None:
        self.said.append(norm)


@pytest.mark.parametrize("kind", ["foreach", "single", ""])
def test_norms_of_a_unit(host_world: World, kind: str):
    """Taken together, each norm has the bits of a call of its own; gradients of several types and layouts."""
    device = host_world.torch_device
    grads = []
    for i, numel in enumerate([1, 31, 65_535, 65_536, 65_537, 1_000_003, 7, 300_000]):
        for dtype in DTYPES[: 1 + i % 3]:
            grad = torch.randn(numel, generator=torch.Generator().manual_seed(i)).to(dtype).to(device)
            grads.append(grad if numel % 6 else grad.view(2, -1).t())
    homes = [torch.zeros(1, device=device) for _ in grads]
    for home in homes[::2]:
        home.add_(1)
    refs: list[Any] = [Noted() for _ in grads]
    note_norms(list(zip(refs, grads, homes, strict=True)), kind)
    for ref, grad, home in zip(refs, grads, homes, strict=True):
        assert ref.said[:2] == ["older", "forgotten"]
        if not kind:
            assert len(ref.said) == 2
            continue
        norm, version, how = ref.said[2]
        alone = torch._foreach_norm([grad], 2.0)[0] if kind == "foreach" else torch.linalg.vector_norm(grad, 2)
        assert same(norm, alone)
        assert (version, how) == (home._version, kind)
