"""The plain-torch reference: the split restores, the step agrees with torch's, the golden file is its output."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]


def load(name: str, path: Path) -> ModuleType:
    """A module by its file: the package itself needs the compiled extension, this does not."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))  # it may add to it, as a script
        spec.loader.exec_module(module)
    return module


reference = load("reference", ROOT / "python" / "funicular" / "reference.py")
golden = load("make_adamw_golden", ROOT / "tests" / "data" / "make_adamw_golden.py")


def test_split_restores_every_high_half_at_every_edge():
    high = torch.arange(1 << 16, dtype=torch.int64).view(-1, 1) << 16
    low = torch.tensor([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF])
    bits = (high | low).flatten().to(torch.int32)
    x = bits.view(torch.float32)
    expected = torch.where(x.isnan(), 0x7FC00000, bits)
    param, rest = reference.split_master(x)
    assert torch.equal(reference.join_master(param, rest).view(torch.int32), expected)
    # Half up in magnitude; torch rounds ties to even, and agrees everywhere else.
    tie = (bits & 0xFFFF) == 0x8000
    same = param.view(torch.int16) == x.to(torch.bfloat16).view(torch.int16)
    assert torch.all(same | tie | x.isnan())
    assert not torch.all(same | x.isnan())


@pytest.mark.parametrize("beta1", [0.9, 0.3, 0.0])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    "how", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=["single", "foreach", "fused"]
)
def test_fifty_steps_stay_within_a_millionth_of_torch(how, maximize, beta1):
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(4096, generator=generator) * 0.02
    options = {"lr": 1e-3, "betas": (beta1, 0.95), "weight_decay": 0.1, "maximize": maximize}
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    our_adamw = reference.ReferenceAdamW([ours], **options)
    their_adamw = torch.optim.AdamW([theirs], **options, **how)
    for _ in range(50):
        ours.grad = torch.randn(4096, generator=generator) * 0.01
        theirs.grad = ours.grad.clone()
        our_adamw.step()
        their_adamw.step()
    assert not torch.equal(ours, start)
    scale = theirs.detach().abs().max().item()
    assert (ours - theirs).abs().max().item() <= 1e-6 * scale
    for name in ("exp_avg", "exp_avg_sq"):
        expected = their_adamw.state[theirs][name]
        assert (our_adamw.state[ours][name] - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_parameter_follows_the_fp32_one(dtype):
    generator = torch.Generator().manual_seed(4)
    narrow = torch.nn.Parameter((torch.randn(500, generator=generator)).to(dtype))
    wide = torch.nn.Parameter(narrow.detach().float())
    adamws = [reference.ReferenceAdamW([p], lr=1e-4) for p in (narrow, wide)]
    for _ in range(30):
        narrow.grad = torch.randn(500, generator=generator).to(dtype)
        wide.grad = narrow.grad.float()
        for adamw in adamws:
            adamw.step()
    state = adamws[0].state[narrow]
    if dtype == torch.bfloat16:
        assert torch.equal(reference.join_master(narrow.detach(), state["master"]), wide.detach())
    else:
        assert torch.equal(state["master"], wide.detach())
        assert torch.equal(narrow.detach(), wide.detach().to(dtype))
    with torch.no_grad():
        narrow.fill_(2.0)
        wide.fill_(2.0)
    for adamw in adamws:
        adamw.step()
    held = reference.join_master(narrow.detach(), state["master"]) if dtype == torch.bfloat16 else state["master"]
    assert torch.equal(held, wide.detach()), "an edit does not start the master anew"


def test_norm_is_right_and_sees_every_nonfinite():
    x = torch.randn(30_000, generator=torch.Generator().manual_seed(5))
    assert math.isclose(reference.norm_sq(x), float((x.double() ** 2).sum()), rel_tol=1e-13)
    assert reference.norm_sq(x[:0]) == 0.0
    assert math.isfinite(reference.norm_sq(torch.full((9000,), torch.finfo(torch.float32).max)))
    for bad in (math.inf, -math.inf, math.nan):
        x[29_999] = bad
        assert not math.isfinite(reference.norm_sq(x))


def test_the_golden_file_is_what_the_reference_gives():
    held = golden.GOLDEN.read_bytes()
    assert golden.again(held) == held, "run python tests/data/make_adamw_golden.py"
    cases = len(golden.DTYPES) * len(golden.CASES)
    assert int.from_bytes(held[8:12], "little") == cases
    assert len(held) == len(golden.golden()), "run python tests/data/make_adamw_golden.py"
