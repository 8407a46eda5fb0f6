"""What modules add to ``state_dict()`` themselves is part of a checkpoint: saved beside the parameters, given back on load."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import funicular
from models import WIDTH
from twin import Run, World


class Scaled(nn.Module):
    """A tensor that is neither parameter nor buffer, added by an override."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.scale = torch.rand(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale.to(x.dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "scale"] = self.scale

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if prefix + "scale" in state_dict:
            self.scale = state_dict.pop(prefix + "scale")
        super()._load_from_state_dict(state_dict, prefix, *args)


class Hooked(nn.Module):
    """The same by hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.scale = torch.rand(WIDTH)
        hooked: Any = self
        hooked._register_state_dict_hook(
            lambda module, state, prefix, _: state.update({f"{prefix}scale": module.scale})
        )
        hooked._register_load_state_dict_pre_hook(self.take)

    def take(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
        self.scale = state.pop(f"{prefix}scale", self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale.to(x.dtype)


class Extra(nn.Module):
    """Values that JSON can hold, by ``get_extra_state``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.extra: Any = {"scale": torch.rand(1).item(), "shape": (1, 2), "none": None}

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.extra["scale"]

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


class ExtraTensor(Extra):
    """A tensor by ``get_extra_state``."""

    def get_extra_state(self) -> Any:
        return torch.tensor([self.extra["scale"]], dtype=torch.float64)

    def set_extra_state(self, state: Any) -> None:
        self.extra["scale"] = state.item()


class Defaults(Scaled):
    """Fills in weights that it misses in what it is given: they must not take the place of those that were loaded."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state_dict.setdefault(prefix + "inner.weight", torch.zeros(WIDTH, WIDTH))
        super()._load_from_state_dict(state_dict, prefix, *args)
        with torch.no_grad():
            self.inner.weight.copy_(state_dict[prefix + "inner.weight"])


def stack(kind: Callable[[], nn.Module], seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*[kind() for _ in range(4)]).to(dtype)


def after(run: Run) -> list[float]:
    """Losses of three steps on the same data."""
    losses = []
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(5, WIDTH, device=run.device, dtype=next(run.model.parameters()).dtype)
        loss = (run.model(x).float() - 1).pow(2).mean()
        loss.backward()
        run.opt.step()
        run.opt.zero_grad()
        losses.append(loss.item())
    return losses


def trained(
    world: World, kind: Callable[[], nn.Module], seed: int, offloaded: bool = True, dtype: Any = torch.float32
) -> Run:
    run = Run(world, offloaded)
    model = stack(kind, seed, dtype)
    for module in model:
        if isinstance(getattr(module, "scale", None), Tensor):
            module.scale = module.scale.to(run.device)
    run.model = run.wrap(model)
    run.opt = funicular.AdamW(run.model.parameters(), lr=1e-2)
    return run


@pytest.mark.covering(2)
@pytest.mark.parametrize("offloaded", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Scaled, Hooked, Extra, ExtraTensor, Defaults])
def test_what_modules_add_comes_back(kind: Any, dtype: torch.dtype, offloaded: bool, two_worlds: World, tmp_path: Path):
    """Another model goes on from the checkpoint with the same bits, masters of 16-bit weights included."""
    first = trained(two_worlds, kind, 1, offloaded, dtype)
    after(first)
    funicular.save(first.model, first.opt, tmp_path / "c")
    other = trained(two_worlds, kind, 2, offloaded, dtype)
    funicular.load(tmp_path / "c", other.model, other.opt)
    assert after(other) == after(first)
    if isinstance(other.model[0], Extra) and not isinstance(other.model[0], ExtraTensor):
        assert [m.extra for m in other.model] == [m.extra for m in first.model]


def test_tensors_lie_beside_the_parameters(host_world: World, tmp_path: Path):
    """The file has what ``state_dict()`` has, for programs that read it without this project."""
    run = trained(host_world, Scaled, 1)
    funicular.save(run.model, None, tmp_path / "c")
    state, saved = run.model.state_dict(), load_file(tmp_path / "c" / "model.safetensors")
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[name].cpu(), saved[name]) for name in state)
    plain = stack(Scaled, 2)
    plain.load_state_dict(saved)
    assert torch.equal(plain[1].scale, run.model[1].scale.cpu())


def test_entries_stream_into_a_model_on_the_meta_device(host_world: World, tmp_path: Path):
    run = trained(host_world, Scaled, 1)
    funicular.save(run.model, None, tmp_path / "c")
    torch.save(run.model.state_dict(), tmp_path / "not used")
    with torch.device("meta"):
        empty = stack(Scaled, 2)
    funicular.offload(empty, host_world.policy(stack(Scaled, 1)), checkpoint=tmp_path / "c")
    x = torch.ones(2, WIDTH, device=run.device)
    assert torch.equal(empty(x), run.model(x))


class Object(Extra):
    def get_extra_state(self) -> Any:
        return object()


class Failing(Extra):
    def get_extra_state(self) -> Any:
        raise KeyError("not ready")


@pytest.mark.parametrize(("kind", "says"), [(Object, "_extra_state.*object"), (Failing, "not ready")])
def test_what_cannot_be_saved_is_named(kind: Any, says: str, host_world: World, tmp_path: Path):
    run = trained(host_world, kind, 1)
    with pytest.raises(funicular.UsageError, match=f"FN-E408.*{says}"):
        funicular.save(run.model, None, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []
    after(run)


class Untaken(Scaled):
    """Adds a tensor that it does not take back."""

    _load_from_state_dict = nn.Module._load_from_state_dict  # type: ignore[assignment]


def test_a_tensor_that_nobody_takes_is_an_error(host_world: World, tmp_path: Path):
    """As ``load_state_dict`` says it; a tensor that is equal needs no module to take it."""
    run = trained(host_world, Untaken, 1)
    funicular.save(run.model, None, tmp_path / "c")
    funicular.load(tmp_path / "c", run.model)
    other = trained(host_world, Untaken, 2)
    with pytest.raises(funicular.UsageError, match=r"FN-E407.*0\.scale"):
        funicular.load(tmp_path / "c", other.model)


def test_a_checkpoint_without_the_entries_says_so(host_world: World, tmp_path: Path, caplog: Any):
    run = trained(host_world, Scaled, 1)
    funicular.save(run.model, None, tmp_path / "c")
    before = run.model[0].scale.clone()
    plain = stack(nn.Identity, 1)
    for at in range(4):
        plain[at] = nn.Module()
        plain[at].inner = nn.Linear(WIDTH, WIDTH)
    funicular.save(plain, None, tmp_path / "p")
    funicular.load(tmp_path / "p", run.model)
    assert "FN-W408" in caplog.text
    assert torch.equal(run.model[0].scale, before)


def test_models_that_add_nothing_are_saved_as_ever(host_world: World, tmp_path: Path):
    run = trained(host_world, lambda: nn.Linear(WIDTH, WIDTH), 1)
    funicular.save(run.model, None, tmp_path / "c")
    manifest = json.loads((tmp_path / "c" / "funicular.json").read_text())
    assert "scale" not in json.dumps(manifest)


class Buffers(nn.Module):
    """A buffer of each kind; one of them made under ``inference_mode``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("kept", torch.rand(3))
        self.register_buffer("left", torch.rand(3), persistent=False)
        with torch.inference_mode():
            self.register_buffer("inferred", torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_buffers(host_world: World, tmp_path: Path):
    """Persistent ones are saved and loaded, the others are not."""
    run, other = trained(host_world, Buffers, 1), trained(host_world, Buffers, 2)
    left = other.model[0].left.clone()
    funicular.save(run.model, None, tmp_path / "c")
    funicular.load(tmp_path / "c", other.model)
    for name in ("kept", "inferred"):
        assert torch.equal(getattr(other.model[0], name), getattr(run.model[0], name)), name
    assert torch.equal(other.model[0].left, left)
    assert "0.left" not in load_file(tmp_path / "c" / "model.safetensors")
