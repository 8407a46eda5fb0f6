"""Ranks that do different things, or what several ranks cannot do yet: a named error on all of them, and nothing is changed."""

import pytest
import torch
from rank_scripts import WIDE
from torch import nn

import funicular
import several
from models import CUDA
from several import Ranks
from twin import World


def both(function: str, *arguments: object) -> tuple[list[str], list[str]]:
    """What two ranks say."""
    first, second = several.run(2, f"rank_checks:{function}", *arguments)
    return first, second


def test_another_learning_rate(host_world: World):
    for said, same, after in both("other_rate", host_world):
        assert "FN-E702" in said
        assert "lr 0.02" in said
        assert "on rank 1" in said
        assert same == "True"
        assert after == "nothing"


def test_parameters_that_came_later(host_world: World):
    for trained, evaluated, frozen in both("added", host_world):
        assert trained.startswith("FN-E704 'extra.weight' is trained and came into the model after funicular.offload")
        assert evaluated == frozen == "nothing"


def test_another_limit_of_the_norm(host_world: World):
    for (said,) in both("other_clip", host_world):
        assert "FN-E702" in said
        # A GPU's factor is known when the step has been posted.
        assert ("the factor of clipping" if CUDA else "gradient times") in said


def test_another_model_policy_or_type(host_world: World):
    for said in both("other_model", host_world):
        model, ordinary, policy, still, dtype, also = said
        assert "FN-E703" in model
        assert "out.weight" in model
        assert "FN-E703" in policy
        assert "debug" in policy
        assert "FN-E703" in dtype
        assert "bfloat16" in dtype or "bf16" in dtype
        assert ordinary == still == also == "True"


def test_a_late_rank_is_named(host_world: World):
    said, other = several.run(2, "rank_checks:late", host_world)
    assert "FN-W721" in said[0]
    assert "offload: 1 (" in said[0]
    assert not other


def test_ranks_that_do_not_know_of_each_other(
    host_world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Each trains a model of its own, as ever, and says so."""
    model = nn.Linear(4, 4)
    policy = host_world.policy(model)
    funicular.unwrap(funicular.offload(model, policy))
    assert "FN-W722" not in caplog.text
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    funicular.unwrap(funicular.offload(model, policy, group="single"))
    assert "FN-W722" not in caplog.text
    funicular.unwrap(funicular.offload(model, policy))
    assert "FN-W722" in caplog.text


def test_other_initial_weights(host_world: World):
    (own, first, told), (other, second, told_too) = several.run(2, "rank_checks:other_weights", host_world)
    assert torch.equal(own, first)
    assert not torch.equal(own, other)
    assert torch.equal(first, second)
    assert not told
    assert "inp.weight" in told_too[0]


def test_edits(host_world: World):
    for *said, same, step in both("edits", host_world):
        for line in said:
            assert "FN-E722" in line, line
        assert same == "True"
        assert step == "nothing"


def test_a_gradient_that_one_rank_has_replaced(host_world: World):
    first, second = both("replaced_gradient", host_world)
    for own, other in zip(first, second, strict=True):
        assert "FN-E722" in own
        assert "out.weight" in own
        assert "FN-E702" in other
        assert "rank 0" in other


def test_an_edit_inside_a_forward(host_world: World):
    for said, same, after in both("edit_inside", host_world):
        assert "FN-E722" in said
        assert same == "True"
        assert after == "nothing"


def test_gradients_cleared_on_one_rank(host_world: World):
    for (said,) in several.run(2, "crossed_checks:different_backwards", host_world):
        assert "FN-E702" in said
        assert "none on rank 1, and one of earlier backwards on rank 0" in said


def test_other_backwards_found_one_after_another(host_world: World):
    """Where units are exchanged early: the rank that comes last is told of the difference, and not that the first one has failed."""
    for (said,) in several.run(2, "crossed_checks:different_in_turn", host_world, broken="exchange_early"):
        assert said.startswith("FN-E702 before this backward "), said


def test_a_look_amid_the_exchange(host_world: World):
    """Where units are exchanged early. The rank that posts last exchanges at once."""
    found = [said for (said,) in several.run(2, "failing_checks:hooked", host_world, "look", broken="exchange_early")]
    assert any("FN-E725" in said for said in found), found
    assert all("FN-E725" in said or said == "nothing" for said in found), found


def test_a_backward_that_fails_amid_the_exchange(host_world: World):
    found = [said for (said,) in several.run(2, "failing_checks:hooked", host_world, "raise")]
    assert any("FN-E723" in said for said in found), found
    assert all("FN-E7" in said for said in found), found  # the other rank may be told by this one


def test_a_gradient_that_comes_too_late(host_world: World):
    found = [said for (said,) in several.run(2, "failing_checks:used_again", host_world, broken="exchange_early")]
    assert any("FN-E724" in said for said in found), found
    assert all("FN-E7" in said for said in found), found


def test_what_exchanges_gradients_or_moves_weights_itself(host_world: World):
    """Around an offloaded model, in one, and as the model; another one trains on."""
    around = {"DistributedDataParallel": "FN-E704"}
    for said, after in several.run(2, "rank_checks:sharing", host_world):
        assert said.pop("DTensor, in it").startswith("FN-E112 'out.weight' is a DTensor")
        for name, text in said.items():
            kind, where = name.split(", ")
            code = (
                around.get(kind, "FN-E140") if where == "around" else "FN-E140" if kind == "DataParallel" else "FN-E704"
            )
            assert text.startswith(code), f"{name}: {text}"
            assert where == "around" or kind in text, f"{name}: {text}"
            assert where == "around" or (kind in ("FSDPModule", "FullyShardedDataParallel")) == (
                "Build the model without it" in text
            ), f"{name}: {text}"
        assert after == "nothing"


def test_ranks_on_one_gpu(host_world: World):
    for said in several.run(2, "rank_checks:on_one_gpu", host_world):
        assert said.startswith("FN-E704 ranks 0 and 1 both compute on GPU GPU-7")
        assert "set_device" in said


@pytest.mark.parametrize("size", [1, 2])
def test_fsdp_is_refused_by_name(size: int, host_world: World):
    """Of one rank and of several, before anything is touched; of a model that is not offloaded any more it is FSDP as ever."""
    for said, same, after, name in several.run(size, "rank_checks:sharded_by_fsdp", host_world):
        for kind, text in said.items():
            assert text.startswith(f"FN-E140 {kind.split(' ')[0]} (FSDP) would cut"), f"{kind}: {text}"
            assert "funicular.unwrap(model)" in text
        assert same
        assert after == "nothing"
        assert name.startswith("FSDP")


@pytest.mark.parametrize("what", ["params", "gradients"])
def test_on_nvme(what: str, states_world: World):
    """States may live there, and nothing else."""
    first, second = several.run(2, "rank_checks:refused_policy", states_world, {what: {"tier": "nvme"}})
    assert "FN-E704 several ranks can have states on NVMe" in first[0]
    assert f"{what}.tier" in first[0]
    assert "FN-E721 rank 0 failed when it made its runtime: FN-E704" in second[0]
    assert first[1] == second[1] == "True"


def test_single(host_world: World):
    """Each rank by itself: as it was before ranks exchanged anything."""
    (one, mean, ranks, said), (other, also, _, nothing) = several.run(2, "rank_checks:alone_each", host_world)
    assert ranks is None
    (line,) = [line for line in said if "FN-W" in line]
    assert line.startswith("FN-W723 ")
    assert not [line for line in nothing if "FN-W" in line]
    assert not torch.equal(one, other)
    assert torch.equal(mean, also)
    assert torch.equal(mean, (one + other) / 2)


def test_a_group_of_one(host_world: World):
    """As without a group."""
    ((ranks, alone),) = several.run(1, "rank_checks:group_of_one", host_world)
    assert ranks is None
    assert alone == "FN-E720"


@pytest.mark.parametrize("group", [7, "double", nn.Linear(1, 1)], ids=str)
def test_what_is_no_group(group: object, host_world: World):
    model = nn.Linear(WIDE, WIDE)
    with pytest.raises(funicular.UsageError, match="FN-E720"):
        funicular.offload(model, host_world.policy(model), group=group)
    assert type(model.weight) is nn.Parameter


def test_what_is_said_of_ranks(host_world: World):
    for rank, found in enumerate(several.run(2, "rank_checks:sharded", host_world)):
        assert (found["ranks"].rank, found["ranks"].size) == (rank, 2)
        assert found["ranks"].sent > 0
        assert f"rank {rank} of 2" in found["text"]
        assert found["flat"]["ranks/size"] == 2


def test_a_rank_that_ends_is_no_hang(host_world: World):
    """The harness tells of a rank that fails; the others end in a named error."""
    ranks = Ranks(2, "rank_checks:one_raises", host_world)
    with pytest.raises(several.Ended) as caught:
        ranks.results()
    assert "ZeroDivisionError" in caught.value.ends[1][1]
    assert "FN-E70" in caught.value.ends[0][1]
