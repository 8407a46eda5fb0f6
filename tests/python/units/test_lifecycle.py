"""Wrapping, unwrapping, wrapping again, moving, deleting."""

import copy
import gc
import json
import os
import threading
import weakref

import pytest
import torch
from torch import nn

import children
import facts
import funicular
from conftest import DEVICE, PLACEMENTS
from models import WIDTH, Decoder, Stack, stack
from twin import Run, case

pytestmark = pytest.mark.io_engines


@case(stack())
def test_unwrap_and_train_on(run: Run):
    """After unwrap it is a plain resident model; training goes on with new moments."""
    run.train(2)
    if run.offloaded:
        assert funicular.unwrap(run.model) is run.model
        assert all(type(p) is nn.Parameter for p in run.model.parameters())
    run.record_weights()
    run.opt = torch.optim.SGD(run.model.parameters(), lr=0.1)
    run.train(2)


@case(stack())
def test_unwrap_keeps_gradients(run: Run):
    run.model(run.data(4, WIDTH)).square().mean().backward()
    if run.offloaded:
        funicular.unwrap(run.model)
    run.record_grads()
    run.opt = torch.optim.SGD(run.model.parameters(), lr=0.1)
    run.opt.step()


@case(stack())
def test_unwrap_with_an_update_under_way(run: Run):
    run.train(2, look=False)
    if run.offloaded:
        funicular.unwrap(run.model)


@case(lambda: Decoder(tie=True))
def test_unwrap_keeps_ties(run: Run):
    run.train(1)
    if run.offloaded:
        funicular.unwrap(run.model)
    assert run.model.head.weight is run.model.embed.weight


@case(lambda: Decoder(dtype=torch.bfloat16))
def test_wrap_again_with_another_policy(run: Run):
    """Rounded masters start anew, as a new optimizer's would."""
    for frames in (3, 64, 4):
        if run.offloaded and frames != 3:
            funicular.unwrap(run.model)
            run.wrap(run.model, frames)
        run.opt = run.adamw()
        run.train(2)


@case(stack())
def test_backward_of_a_graph_from_before_unwrap(run: Run):
    """Torch's result, or an error by name; never wrong."""
    loss = run.model(run.data(4, WIDTH)).square().mean()
    if run.offloaded:
        funicular.unwrap(run.model)
    try:
        loss.backward()
    except funicular.Error:
        assert run.offloaded
        run.model.zero_grad()
        torch.manual_seed(0)
        pytest.skip("refused by name")


def test_wrap_twice(world):
    run = Run(world, True)
    model = run.wrap(Stack())
    with pytest.raises(funicular.Error, match="FN-E110"):
        funicular.offload(model, world.policy(model))
    model(run.data(4, WIDTH)).mean().backward()


def test_wrap_a_part_or_the_whole(host_world):
    """A model that contains an offloaded one is refused too."""
    run = Run(host_world, True)
    inner = run.wrap(Stack())
    outer = nn.Sequential(inner, nn.Linear(WIDTH, WIDTH))
    with pytest.raises(funicular.Error, match="FN-E110"):
        funicular.offload(outer, host_world.policy(outer))
    with pytest.raises(funicular.Error, match="FN-E110"):
        funicular.offload(inner.layers, host_world.policy(inner))
    inner(run.data(4, WIDTH)).mean().backward()


@pytest.mark.parametrize(
    ("said", "meant"), [("auto", "cuda:3"), ("cuda", "cuda:3"), ("cuda:1", "cuda:1"), ("host", "host")]
)
def test_torchs_current_gpu_is_meant(monkeypatch, said, meant):
    """Where a policy names no GPU: as in programs that call ``torch.cuda.set_device``."""

    class Asked(Exception):
        pass

    def make(units, policy, freed, group):
        raise Asked(json.loads(policy)["device"])

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    monkeypatch.setattr("funicular.offloading.make_engine", make)
    with pytest.raises(Asked, match=meant):
        funicular.offload(Stack(), {"device": said})


@pytest.mark.parametrize(
    "register",
    [
        lambda module, hook: module.register_forward_pre_hook(hook, prepend=True),
        lambda module, hook: module.register_forward_hook(hook, prepend=True),
    ],
    ids=["entering", "leaving"],
)
def test_unwrapped_amid_another_threads_forward(register, world):
    """The window that the other thread enters, or leaves, then is no window any more."""
    model = Stack()
    funicular.offload(model, world.policy(model))
    inside, unwrapped = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        assert unwrapped.wait(60)

    handle = register(model.layers[1], wait)
    thread = threading.Thread(target=model, args=(torch.ones(4, WIDTH, device=world.torch_device),))
    thread.start()
    assert inside.wait(60)
    funicular.unwrap(model)
    unwrapped.set()
    thread.join()
    handle.remove()
    assert all(type(p) is nn.Parameter for p in model.parameters())
    model(torch.ones(4, WIDTH, device=world.torch_device)).sum().backward()


def test_unwrap_of_a_plain_model():
    with pytest.raises(funicular.Error, match="FN-E114"):
        funicular.unwrap(Stack())


def test_stats_of_a_plain_model():
    with pytest.raises(funicular.Error, match="FN-E114"):
        funicular.stats(Stack())


MOVES = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to_dtype": lambda m: m.to(torch.bfloat16),
    "to_meta": lambda m: m.to("meta"),
    "to_empty": lambda m: m.to_empty(device="meta"),
    "block": lambda m: m.layers[2].half(),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("move", MOVES)
def test_moved_after_wrap(move, world):
    """Refused by name, and nothing has changed."""
    run = Run(world, True)
    run.model = run.wrap(Stack())
    run.opt = run.adamw()
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(funicular.Error, match="FN-E115"):
        MOVES[move](run.model)
    assert all(p.dtype == torch.float32 for p in run.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), run.model.state_dict().values()))
    run.train(2)


@case(stack())
def test_moves_that_change_nothing(run: Run):
    run.train(1)
    run.model.to(run.device).float().to(torch.float32)
    run.train(1)


@pytest.mark.gpu
def test_moved_to_the_cpu(host_world):
    run = Run(host_world, True)
    run.model = run.wrap(Stack())
    with pytest.raises(funicular.Error, match="FN-E115"):
        run.model.cpu()


@pytest.mark.gpu
def test_wrapped_from_the_gpu(host_world):
    """A model that is on the GPU already gives its memory back."""
    run = Run(host_world, True)
    before = torch.cuda.memory_allocated()
    run.model = run.wrap(Stack(depth=8).cuda())
    run.opt = run.adamw()
    run.train(2)
    run.opt.zero_grad()
    gc.collect()
    assert torch.cuda.memory_allocated() - before < sum(p.numel() * 4 for p in run.model.parameters()) / 2


def test_delete_frees_everything(world, disk):
    """Model and optimizer gone: frames, arenas, files and descriptors are too."""

    def once() -> weakref.ref:
        run = Run(world, True)
        run.model = run.wrap(Stack())
        run.opt = run.adamw()
        run.train(2)
        return weakref.ref(run.model)

    once()
    gc.collect()
    files, threads = facts.open_files(), len(os.listdir("/proc/self/task"))
    for _ in range(3):
        ref = once()
    gc.collect()
    assert ref() is None
    assert facts.open_files() <= files
    assert len(os.listdir("/proc/self/task")) <= threads
    assert not os.listdir(disk)


def test_weights_outlive_their_model(world):
    """A parameter, a view or a gradient that the user keeps stays valid memory."""
    run = Run(world, True)
    run.model = run.wrap(Stack())
    run.opt = run.adamw()
    run.train(1)
    run.model(run.data(4, WIDTH)).square().mean().backward()
    weight, grad = run.model.layers[0].up.weight, run.model.layers[1].up.weight.grad
    view, copy_of = weight.detach()[3:], weight.detach().clone()
    grad_copy = grad.clone()
    run.model = run.opt = None
    gc.collect()
    assert torch.equal(weight.detach(), copy_of)
    assert torch.equal(view, copy_of[3:])
    assert torch.equal(grad, grad_copy)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_goes_amid_the_modes_of_an_export(world):
    """The last reference goes where it goes: torch.export's modes must see nothing of how a model ends."""

    class Forgetting(nn.Module):
        def forward(self, x):
            kept.clear()
            return x + 1

    kept = [Stack()]
    funicular.offload(kept[0], world.policy(kept[0]))
    opt = funicular.AdamW(kept[0].parameters())
    kept[0](torch.randn(4, WIDTH, device=world.torch_device)).square().mean().backward()
    opt.step()
    weight = kept[0].layers[0].up.weight
    expected, moment = weight.detach().clone(), opt.state[weight]["exp_avg"].clone()
    gone = weakref.ref(kept[0])
    torch.export.export(Forgetting(), (torch.ones(2),), strict=False)
    gc.collect()
    assert gone() is None
    assert torch.equal(weight.cpu(), expected.cpu())
    assert torch.equal(opt.state[weight]["exp_avg"].cpu(), moment.cpu())


def test_optimizer_outlives_its_model(host_world):
    run = Run(host_world, True)
    run.model = run.wrap(Stack())
    run.opt = run.adamw()
    run.train(1)
    run.model = None
    gc.collect()
    run.opt.step()
    run.opt.zero_grad()
    assert "param_groups" in run.opt.state_dict()


def test_address_inside_forward_is_permanent(world):
    """Within a window a parameter lies at the same address every time."""
    run = Run(world, True)
    run.model = run.wrap(Stack())
    run.opt = run.adamw()
    seen: list[int] = []
    run.model.layers[3].register_forward_pre_hook(lambda m, a: seen.append(m.up.weight.data_ptr()))
    run.train(3)
    assert len(set(seen)) == 1


@case()
def test_module_added_after_wrap(run: Run):
    """A new module is the user's own, resident."""
    run.model = run.wrap(Stack())
    run.model.extra = nn.Linear(WIDTH, WIDTH).to(run.device)
    run.opt = run.adamw()
    for _ in range(3):
        run.step(run.model.extra(run.model(run.data(4, WIDTH))).square().mean())


@case()
def test_block_replaced_after_wrap(run: Run):
    run.model = run.wrap(Stack())
    run.opt = run.adamw()
    run.train(1)
    run.model.layers[2] = nn.Linear(WIDTH, WIDTH).to(run.device)
    run.opt = run.adamw()
    run.train(2)


@case()
def test_block_removed_after_wrap(run: Run):
    run.model = run.wrap(Stack())
    del run.model.layers[3]
    run.opt = run.adamw()
    run.train(2)


@case()
def test_embedding_resized_after_wrap(run: Run):
    """As ``resize_token_embeddings`` does: a new module with rows copied from the old."""
    run.model = run.wrap(Decoder())
    old = run.model.embed
    run.model.embed = nn.Embedding(40, WIDTH).to(run.device)
    with torch.no_grad():
        run.model.embed.weight[: old.num_embeddings].copy_(old.weight)
    run.opt = run.adamw()
    run.train(2)


@case(stack())
def test_train_and_eval_flags(run: Run):
    for _ in range(2):
        run.model.eval()
        run.step(run.model(run.data(4, WIDTH)).square().mean())
        run.model.train()
        run.train(1)


@case()
def test_policy_from_a_file(run: Run):
    """The same policy as TOML, and as an object."""
    from pathlib import Path

    import tomllib

    model = Stack()
    if run.offloaded:
        path = Path("/var/tmp") / f"funicular-policy-{os.getpid()}.toml"
        path.write_text(to_toml(run.world.policy(model)))
        assert tomllib.loads(path.read_text())["device"] == run.world.device
        try:
            run.model = funicular.offload(model, str(path))
        finally:
            path.unlink()
    else:
        run.model = run.wrap(model)
    run.opt = run.adamw()
    run.train(2)


def to_toml(policy: dict) -> str:
    import json

    flat = [f"{k} = {json.dumps(v)}" for k, v in policy.items() if not isinstance(v, dict)]
    for name, table in policy.items():
        if isinstance(table, dict):
            flat += [f"[{name}]", *(f"{k} = {json.dumps(v)}" for k, v in table.items())]
    return "\n".join(flat)


@case()
def test_no_policy_at_all(run: Run):
    run.model = Decoder().to(run.device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUNICULAR_DEVICE", DEVICE)  # the machine may have a GPU
        if run.offloaded:
            assert funicular.offload(run.model) is run.model
    run.opt = run.adamw()
    run.train(2)


def test_process_that_never_unwraps(disk: str):
    """It ends without a word."""
    body = """
    model = Stack()
    funicular.offload(model, world.policy(model))
    opt = funicular.AdamW(model.parameters())
    model(torch.ones(4, WIDTH).to(world.torch_device)).mean().backward()
    opt.step()
    kept = list(model.parameters())[0]
    model.itself = [model]  # not even the collector frees it before the end
    """
    status, out, err = children.finish(children.start(body, disk, PLACEMENTS["nvme-threads"], DEVICE))
    assert (status, out, err) == (0, "", "")
    assert not facts.files(disk)
