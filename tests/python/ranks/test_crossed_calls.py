"""Ranks that wait for each other in different calls are told so at once, and waits for ranks can be interrupted."""

from pathlib import Path

import pytest
import torch

import several
from models import CUDA
from twin import World

#: a rank without a batch is at its step while others are in the backward
TRAINING = ("in a backward for gradients of '", "at its step after backward ")
#: where rank 1 waits, and where the others may
PLACES: dict[str, tuple[str, tuple[str, ...]]] = {
    "load and backward": ("in 'a load of ", TRAINING),
    "step and load": ("at its step after backward 1", ("in 'a load of ",)),
    "unwrap and backward": ("in 'funicular.unwrap'", TRAINING),
    "load and unwrap": ("in 'a load of ", ("in 'funicular.unwrap'",)),
    "offload and backward": ("in 'funicular.offload' of another model", TRAINING),
    **dict.fromkeys(
        ("two models", "the first", "the second"), ("after backward 1 of one model", ("after backward 1 of another",))
    ),
    "two backwards": ("of one model", ("of another",)),
}


def test_ranks_in_different_calls(host_world: World, tmp_path: Path):
    found = several.run(3, "crossed_checks:crossed", str(tmp_path), host_world)
    for rank, said in enumerate(found):
        for name, text in said.items():
            assert text.startswith("FN-E706 rank "), f"rank {rank}, {name}: {text}"
            assert "rank 1 (process " in text
            odd, others = PLACES[name.removesuffix(", again")]
            assert odd in text, f"rank {rank}, {name}: {text}"
            assert any(place in text for place in others), f"rank {rank}, {name}: {text}"


def test_a_wait_that_is_interrupted(host_world: World):
    """By Ctrl-C, after which the call is made again; and by handlers that return."""
    (*first, one), (*second, two) = several.run(2, "crossed_checks:interrupted_waits", host_world)
    assert first == ["at a step", "in offload", "nothing", True]
    assert second == ["nothing", True]
    assert torch.equal(one, two)


@pytest.mark.skipif(CUDA, reason="in the thread of a GPU's backward Python looks at no signals")
def test_an_exchange_that_is_interrupted(host_world: World):
    """The other rank is told, also where it waits in torch for what does not come."""
    first, second = several.run(2, "crossed_checks:interrupted_exchanges", host_world)
    for (said, after), (own, then) in zip(first, second, strict=True):
        assert own == "KeyboardInterrupt"
        assert then.startswith("FN-E7")
        assert said.startswith("FN-E701 rank 1 ")
        assert "KeyboardInterrupt amid the exchange of gradients" in said
        assert after.startswith("FN-E7")


def test_collectives_of_the_program_amid_backwards(host_world: World):
    """Units are exchanged at the end then, so that the order of all collectives is the same on all ranks, and the numbers are the same."""
    kinds = [
        several.run(2, "crossed_checks:amid_backward", host_world, own, broken="exchange_early")
        for own in (False, True)
    ]
    early, late = ([sent for sent, _ in ranks] for ranks in kinds)
    assert all(sent[0] == 0 for sent in early), "nothing is expected to come in the first backward"
    assert all(any(sent) for sent in zip(*(sent[1:] for sent in early), strict=True)), early
    assert not any(any(sent) for sent in late), late
    for _, weights in (*kinds[0], *kinds[1]):
        assert all(map(torch.equal, weights, kinds[0][0][1]))


def test_two_models_in_one_backward(host_world: World):
    """Exchanges of another model are to a model what collectives of the program are."""
    for sent in several.run(2, "crossed_checks:beside_another", host_world, broken="exchange_early"):
        assert sent == [0, 0, 0, 0]
