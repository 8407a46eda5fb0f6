"""What other libraries' savers see of an offloaded model: they tell shared tensors by their storages, and pickle whole storages."""

import io

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import nn

import funicular
from models import WIDTH, Stack, stack
from twin import Run, case, compare


def shared(tensors: dict[str, torch.Tensor]) -> list[set[str]]:
    """Names that share a storage, as safetensors, huggingface_hub and accelerate find them: by device, address and size."""
    found: dict[tuple[object, ...], set[str]] = {}
    for name, t in tensors.items():
        storage = t.untyped_storage()
        if storage.nbytes() > 0:
            found.setdefault((t.device, storage.data_ptr(), storage.nbytes()), set()).add(name)
    return sorted((names for names in found.values() if len(names) > 1), key=min)


def overlapping(tensors: dict[str, torch.Tensor]) -> list[tuple[str, str]]:
    """Pairs of names whose storages overlap without being one."""
    ends = sorted(
        (t.untyped_storage().data_ptr(), t.untyped_storage().data_ptr() + t.untyped_storage().nbytes(), name)
        for name, t in tensors.items()
        if t.untyped_storage().nbytes() > 0
    )
    return [(a[2], b[2]) for i, a in enumerate(ends) for b in ends[i + 1 :] if a[:2] != b[:2] and b[0] < a[1]]


def whole(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether each tensor begins its storage and fills it."""
    return all(t.storage_offset() == 0 and t.untyped_storage().nbytes() == t.nbytes for t in tensors.values())


def check(tensors: dict[str, torch.Tensor]) -> None:
    assert whole(tensors)
    assert shared(tensors) == []
    assert overlapping(tensors) == []


class Mixed(nn.Module):
    """Formats and sizes side by side in one unit, one of them without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(3, 5))
        self.none = nn.Parameter(torch.randn(0, 4))
        self.brief = nn.Parameter(torch.randn(WIDTH, 3).to(torch.bfloat16))
        self.frozen = nn.Parameter(torch.arange(7), requires_grad=False)
        self.turned = nn.Parameter(torch.randn(WIDTH, 4).t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.a.sum() + self.brief.float().sum() + self.none.sum() + (self.turned @ x.t()).sum() / 100


class Tied(nn.Module):
    """A head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.head = nn.Linear(WIDTH, 31, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedding(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@case(stack(Mixed))
def test_formats_side_by_side(run: Run):
    run.train(2)
    run.record("eval", run.model(run.data(4, WIDTH)))


@pytest.mark.parametrize("build", [stack(), stack(Mixed)], ids=["stack", "mixed"])
def test_storages_of_weights(build, world):
    """Outside of windows and inside, in hooks, after steps, by every name that gives out memory."""
    run = Run(world, True)
    run.model = run.wrap(build())
    run.opt = run.adamw()
    seen = []

    def look(*_: object) -> None:
        state = run.model.state_dict()
        check(state)
        check({name: p.data for name, p in run.model.named_parameters()})
        check({name: p.detach() for name, p in run.model.named_parameters()})
        check({name: p for name, p in run.model.named_parameters()})
        seen.append(len(state))

    look()
    hooks = [layer.register_forward_pre_hook(look) for layer in run.model.layers]
    hooks += [layer.register_forward_hook(look) for layer in run.model.layers]
    hooks += [run.model.layers[1].register_full_backward_hook(look)]
    loss = run.model(run.data(4, WIDTH)).square().mean()
    loss.backward()
    for hook in hooks:
        hook.remove()
    run.opt.step()
    look()
    assert len(seen) == 3 + 2 * len(run.model.layers)
    assert len(set(seen)) == 1


def test_storages_of_gradients(world):
    run = Run(world, True)
    run.model = run.wrap(Stack())
    run.model(run.data(4, WIDTH)).square().mean().backward()
    check({name: p.grad for name, p in run.model.named_parameters()})
    check({name: p.grad.detach() for name, p in run.model.named_parameters()})


def size_of(obj: object) -> int:
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return len(buffer.getvalue())


def test_files_hold_no_other_bytes(world):
    """``torch.save`` writes whole storages: of one weight, of one layer's, of a gradient, of a view."""

    def sizes(offloaded: bool) -> list[int]:
        run = Run(world, offloaded)
        run.model = run.wrap(Stack())
        run.model(run.data(4, WIDTH)).square().mean().backward()
        layer = run.model.layers[2]
        found = [
            size_of(layer.norm.bias.detach()),
            size_of({"w": layer.norm.weight.data, "v": layer.up.weight.detach()[1:]}),
            size_of(layer.norm.bias.grad),
            size_of(layer.norm.bias.grad.detach()),
            size_of(layer.norm.bias),
            size_of({k: v for k, v in run.model.state_dict().items() if "norm" in k}),
            size_of(run.model.state_dict()),
        ]
        inside = layer.register_forward_pre_hook(lambda *_: found.append(size_of(layer.norm.state_dict())))
        run.model(run.data(4, WIDTH))
        inside.remove()
        return found

    plain, offloaded = sizes(False), sizes(True)
    for a, b in zip(plain, offloaded, strict=True):
        assert abs(a - b) <= 256, (plain, offloaded)  # names of classes


def test_safetensors_keep_every_tensor(world, tmp_path):
    run = Run(world, True)
    run.model = run.wrap(stack(Mixed)())
    run.model(run.data(4, WIDTH)).square().mean().backward()
    path = str(tmp_path / "model.safetensors")
    save_model(run.model, path)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(run.model.state_dict())


def test_safetensors_there_and_back(world, tmp_path):
    def script(run: Run) -> None:
        run.train(1)
        path = str(tmp_path / f"{run.offloaded}.safetensors")
        save_model(run.model, path)
        run.train(2)
        load_model(run.model, path)
        run.record_weights()
        run.train(1)

    compare(world, stack(), script)


def test_tied_weights_are_one(world, tmp_path):
    """As in plain PyTorch: one storage, one tensor in the file, two names after loading."""

    def script(run: Run) -> None:
        state = run.model.state_dict()
        assert shared(state) == [{"embedding.weight", "head.weight"}]
        assert whole(state)
        assert overlapping(state) == []
        path = str(tmp_path / f"{run.offloaded}.safetensors")
        save_model(run.model, path)
        with safe_open(path, "pt") as file:
            assert len(file.keys()) == len(state) - 1
        with torch.no_grad():
            run.model.head.weight.zero_()
        load_model(run.model, path)
        run.record("logits", run.model(torch.arange(8, device=run.data(1).device)))

    compare(world, Tied, script)


class Buffer(nn.Module):
    """Two parameters that are parts of one buffer."""

    def __init__(self) -> None:
        super().__init__()
        flat = torch.randn(2, WIDTH, WIDTH) / 8
        self.first, self.second = nn.Parameter(flat[0]), nn.Parameter(flat[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.first + x @ self.second


def test_parts_of_one_buffer(world):
    """Each gets memory of its own, as by ``.clone()``: nothing is left of the buffer to save."""
    compare(world, stack(Buffer), lambda run: run.train(2))
    run = Run(world, True)
    run.model = run.wrap(stack(Buffer)())
    check(run.model.state_dict())


@pytest.mark.parametrize("library", ["accelerate", "huggingface_hub"])
def test_savers_of_hugging_face(library, world, tmp_path):
    pytest.importorskip(library)
    run = Run(world, True)
    run.model = run.wrap(Stack())
    run.opt = run.adamw()
    run.train(1)
    if library == "accelerate":
        from accelerate import Accelerator

        Accelerator(cpu=world.device != "cuda").save_model(run.model, str(tmp_path))
    else:
        from huggingface_hub import save_torch_model

        save_torch_model(run.model, str(tmp_path))
    with safe_open(str(tmp_path / "model.safetensors"), "pt") as file:
        assert set(file.keys()) == set(run.model.state_dict())
        for name, value in run.model.state_dict().items():
            assert torch.equal(file.get_tensor(name), value.cpu()), name


def test_weights_outlive_their_model(world):
    """What ``state_dict`` gave keeps its bytes alive by itself, one weight at a time."""
    run = Run(world, True)
    model = run.wrap(Stack())
    want = model.layers[3].up.weight.detach().clone()
    kept = model.layers[3].up.weight.detach()
    funicular.unwrap(model)
    assert torch.equal(kept, want)
