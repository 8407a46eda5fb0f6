"""The reference of several ranks is what torch's own DistributedDataParallel computes with a sum in the order of ranks."""

import pytest
import torch
from rank_scripts import as_reference

import several
from funicular.reference import backward_of_ranks, mean_of_ranks
from twin import same


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ddp_with_an_ordered_hook(size: int):
    for single, half, unordered in several.run(size, "rank_scripts:all_with_ddp"):
        for found, dtype in ((single, torch.float32), (half, torch.bfloat16)):
            assert all(same(a, b) for a, b in zip(as_reference(size, dtype), found, strict=True))
        # The order counts: DDP's own sum has other bits, from three ranks on.
        equal = all(same(a, b) for a, b in zip(as_reference(size, torch.float32), unordered, strict=True))
        assert equal == (size == 2)


def test_mean():
    one, two = torch.tensor([1.0, 1.0, 3.0]).bfloat16(), torch.tensor([0.0, 2.0**-8, 3.0]).bfloat16()
    # 1 + 2**-8 is no bf16, half of it is none either: rounded once, to even.
    assert mean_of_ranks([one, two]).tolist() == [0.5, torch.tensor(0.5 + 2.0**-9).bfloat16().item(), 3.0]
    assert mean_of_ranks([None, two, None, None]).tolist() == (two.float() / 4).bfloat16().tolist()
    assert mean_of_ranks([None, None]) is None
    big = torch.tensor([6e4]).half()
    assert mean_of_ranks([big, big, big]).tolist() == big.tolist()  # the sum is beyond fp16
    assert mean_of_ranks([torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([4.0])]).dtype == torch.float32


def test_a_rank_without_a_backward_and_accumulation():
    w = torch.nn.Parameter(torch.ones(2))
    unused = torch.nn.Parameter(torch.ones(2))
    losses = backward_of_ranks([w, unused], [lambda: (w * 2).sum(), None])
    assert losses[1] is None
    assert w.grad.tolist() == [1.0, 1.0]
    backward_of_ranks([w, unused], [lambda: (w * 2).sum(), lambda: (w * 4).sum()])
    assert w.grad.tolist() == [4.0, 4.0]
    assert unused.grad is None
