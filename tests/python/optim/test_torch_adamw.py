"""``funicular.AdamW`` beside ``torch.optim.AdamW``: values, states, schedulers, groups."""

import copy

import pytest
import torch
from torch import Tensor, nn

import funicular
from models import CUDA, WIDTH, Decoder, Stack
from twin import Run, World, compare

OPTIONS = {
    "plain": {"lr": 1e-3, "weight_decay": 0.0},
    "decay": {"lr": 3e-4, "weight_decay": 0.1},
    "betas": {"lr": 1e-3, "betas": (0.8, 0.95), "weight_decay": 0.05},
    "small beta1": {"lr": 1e-3, "betas": (0.3, 0.9)},
    "eps": {"lr": 1e-2, "eps": 1e-3},
    "maximize": {"lr": 1e-4, "maximize": True},
}
#: torch's implementations differ from each other by as much as from this project's
TORCH = [{"foreach": False}, {"foreach": True}, {"fused": True}]


def close(a: Tensor, b: Tensor, relative: float = 1e-6) -> bool:
    return bool((a.double() - b.double()).norm() <= relative * a.double().norm())


def batches(count: int, seed: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    device = "cuda" if CUDA else "cpu"
    return [torch.randint(31, (2, 9), generator=generator).to(device) for _ in range(count)]


def pair(world: World, build=lambda: Decoder(depth=3, dropout=0.0)) -> tuple[nn.Module, nn.Module]:
    """The same model twice, plain and offloaded."""
    torch.manual_seed(11)
    plain = build()
    paged = copy.deepcopy(plain)
    funicular.offload(paged, world.policy(paged))
    return plain.to(world.torch_device), paged


def train(model: nn.Module, opt: torch.optim.Optimizer, data: list[Tensor]) -> list[float]:
    losses = []
    for tokens in data:
        loss = model(tokens)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses


def train_together(runs: list[tuple[nn.Module, torch.optim.Optimizer]], data: list[Tensor]) -> list[list[float]]:
    """The losses of each. Every optimizer gets the gradients of the first model.

    With gradients of their own the runs would drift: two right optimizers round differently, other weights have other gradients, and
    50 steps multiply the difference by a factor that depends on the processor's kernels. With the same gradients each step adds
    a few roundings of 2**-24 and multiplies nothing: 50 steps stay within 1e-6 on every processor.
    """
    losses: list[list[float]] = [[] for _ in runs]
    for tokens in data:
        for (model, _), seen in zip(runs, losses, strict=True):
            loss = model(tokens)
            loss.backward()
            seen.append(loss.item())
        for other, _ in runs[1:]:
            for p, q in zip(runs[0][0].parameters(), other.parameters(), strict=True):
                q.grad.copy_(p.grad)
        for _, opt in runs:
            opt.step()
            opt.zero_grad()
    return losses


def apart(plain: nn.Module, paged: nn.Module) -> float:
    """The largest distance between two weights, as part of them."""
    pairs = zip(plain.parameters(), paged.parameters(), strict=True)
    return max(float((a.detach().double() - b.detach().double()).norm() / a.detach().double().norm()) for a, b in pairs)


def assert_close(plain: nn.Module, paged: nn.Module, relative: float = 1e-6) -> None:
    for (name, a), b in zip(plain.named_parameters(), paged.parameters(), strict=True):
        assert close(a.detach(), b.detach(), relative), name


@pytest.mark.covering(1)
@pytest.mark.parametrize("options", OPTIONS)
def test_fifty_steps(options, two_worlds):
    """Losses and weights stay within 1e-6 relative."""
    plain, paged = pair(two_worlds)
    adamw = [torch.optim.AdamW, funicular.AdamW]
    runs = [(m, kind(m.parameters(), **OPTIONS[options])) for m, kind in zip((plain, paged), adamw, strict=True)]
    a, b = train_together(runs, batches(50))
    assert_close(plain, paged)
    assert close(torch.tensor(a), torch.tensor(b))


@pytest.mark.parametrize("kind", TORCH, ids=str)
def test_all_of_torchs_implementations(kind, host_world):
    """No further from each than 1e-6 and what lies between it and torch's plainest: on a GPU the fused one is 1e-6 from that."""
    plain, paged = pair(host_world)
    plainest = copy.deepcopy(plain)
    runs = [(plain, torch.optim.AdamW(plain.parameters(), lr=1e-3, **kind))]
    runs += [(plainest, torch.optim.AdamW(plainest.parameters(), lr=1e-3, foreach=False))]
    train_together([*runs, (paged, funicular.AdamW(paged.parameters(), lr=1e-3))], batches(50))
    assert apart(plainest, paged) <= 1e-6
    assert apart(plain, paged) <= 1e-6 + apart(plain, plainest)


def test_the_comparison_can_fail(host_world):
    """Another weight decay, or one step less, is far outside the bound."""
    data = batches(50)
    plain, paged = pair(host_world)
    train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.01), data)
    train(paged, funicular.AdamW(paged.parameters(), lr=1e-3, weight_decay=0.011), data)
    with pytest.raises(AssertionError):
        assert_close(plain, paged)
    plain, paged = pair(host_world)
    train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-3), data)
    train(paged, funicular.AdamW(paged.parameters(), lr=1e-3), data[:-1])
    with pytest.raises(AssertionError):
        assert_close(plain, paged)


@pytest.mark.parametrize("direction", ["from torch", "to torch"])
def test_states_change_hands(direction, two_worlds):
    """A run that was begun with one optimizer goes on with the other."""
    data = batches(24)
    # A state that went wrong is far outside of either; on a GPU the runs drift by themselves.
    relative = 1e-5 if CUDA else 1e-6
    reference, paged = pair(two_worlds)
    other = copy.deepcopy(reference)
    options = {"lr": 1e-3, "weight_decay": 0.05, "betas": (0.8, 0.95)}
    train(reference, torch.optim.AdamW(reference.parameters(), **options), data)

    opt_paged = funicular.AdamW(paged.parameters(), **options)
    opt_other = torch.optim.AdamW(other.parameters(), **options)
    if direction == "from torch":
        train(other, opt_other, data[:12])
        paged.load_state_dict(other.state_dict())
        opt_paged.load_state_dict(opt_other.state_dict())
        train(paged, opt_paged, data[12:])
        assert_close(reference, paged, relative)
    else:
        train(paged, opt_paged, data[:12])
        other.load_state_dict(paged.state_dict())
        opt_other.load_state_dict(opt_paged.state_dict())
        train(other, opt_other, data[12:])
        assert_close(reference, other, relative)


def test_state_dicts_have_one_shape(two_worlds):
    """Keys, types, shapes and groups are torch's; a tensor is as close as the weights are."""
    data = batches(4)
    plain, paged = pair(two_worlds)
    opt_plain, opt_paged = torch.optim.AdamW(plain.parameters()), funicular.AdamW(paged.parameters())
    assert opt_paged.state_dict()["state"] == opt_plain.state_dict()["state"] == {}
    train(plain, opt_plain, data)
    train(paged, opt_paged, data)
    a, b = opt_plain.state_dict(), opt_paged.state_dict()
    assert a["state"].keys() == b["state"].keys()
    assert [g["params"] for g in a["param_groups"]] == [g["params"] for g in b["param_groups"]]
    assert set(b["param_groups"][0]) <= set(a["param_groups"][0])
    for key, states in a["state"].items():
        assert states.keys() == b["state"][key].keys()
        for name, value in states.items():
            got = b["state"][key][name]
            assert type(got) is Tensor
            assert (got.shape, got.dtype) == (value.shape, value.dtype), name
            assert close(value.cpu(), got, 1e-5), name


def test_a_state_dict_is_a_copy(two_worlds):
    """Later steps change neither what was saved nor, through it, anything else; and it can be saved and loaded."""
    data = batches(8)
    _, paged = pair(two_worlds)
    opt = funicular.AdamW(paged.parameters())
    train(paged, opt, data[:4])
    saved, kept = opt.state_dict(), copy.deepcopy(opt.state_dict())
    train(paged, opt, data[4:])
    for key, states in kept["state"].items():
        assert all(torch.equal(v, saved["state"][key][k]) for k, v in states.items())
        assert not torch.equal(states["exp_avg"], opt.state_dict()["state"][key]["exp_avg"])


def test_resumed_equals_uninterrupted(two_worlds, tmp_path):
    """Through ``torch.save``; in fp32 every bit is the same, since the weights are the masters."""
    data = batches(8)
    _, straight = pair(two_worlds)
    opt = funicular.AdamW(straight.parameters(), lr=1e-2)
    train(straight, opt, data[:4])
    torch.save({"model": straight.state_dict(), "opt": opt.state_dict()}, tmp_path / "it.pt")
    train(straight, opt, data[4:])

    torch.manual_seed(12)
    resumed = Decoder(depth=3, dropout=0.0)
    funicular.offload(resumed, two_worlds.policy(resumed))
    opt_resumed = funicular.AdamW(resumed.parameters(), lr=1.0)
    loaded = torch.load(tmp_path / "it.pt", weights_only=True)
    resumed.load_state_dict(loaded["model"])
    opt_resumed.load_state_dict(loaded["opt"])
    assert opt_resumed.param_groups[0]["lr"] == 1e-2
    train(resumed, opt_resumed, data[4:])
    for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_states_read_and_written_by_name(two_worlds):
    """``opt.state[p]`` shows torch's names; what is written there counts in the next step."""
    data = batches(6)
    plain, paged = pair(two_worlds)
    opt_plain, opt_paged = torch.optim.AdamW(plain.parameters()), funicular.AdamW(paged.parameters())
    train(plain, opt_plain, data[:3])
    train(paged, opt_paged, data[:3])
    p, q = plain.layers[1].up.weight, paged.layers[1].up.weight
    assert set(opt_paged.state[q]) == {"step", "exp_avg", "exp_avg_sq"}
    assert int(opt_paged.state[q]["step"]) == 3
    assert opt_paged.state[q]["exp_avg"].shape == q.shape
    with torch.no_grad():
        for opt, w in ((opt_plain, p), (opt_paged, q)):
            opt.state[w]["exp_avg"].zero_()
            opt.state[w]["exp_avg_sq"].mul_(4.0)
            opt.state[w]["exp_avg_sq"] = opt.state[w]["exp_avg_sq"] + 1e-6
    train_together([(plain, opt_plain), (paged, opt_paged)], data[3:])
    assert_close(plain, paged)
    assert close(opt_plain.state[p]["exp_avg"].cpu(), opt_paged.state[q]["exp_avg"], 1e-5)


def test_a_fetched_state_follows_later_steps(two_worlds):
    """As in torch, where it is the state itself; a copy stays what it was."""
    data = batches(4)
    _, paged = pair(two_worlds)
    opt = funicular.AdamW(paged.parameters())
    train(paged, opt, data[:2])
    weight = paged.layers[0].up.weight
    moment, count = opt.state[weight]["exp_avg"], opt.state[weight]["step"]
    before = moment.clone()
    train(paged, opt, data[2:])
    assert not torch.equal(moment, before)
    assert int(count) == 4
    assert torch.equal(copy.deepcopy(opt).state_dict()["state"][0]["exp_avg"], opt.state_dict()["state"][0]["exp_avg"])
    assert torch.equal(opt.state[weight]["exp_avg"], moment)


SCHEDULERS = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=20),  # cycles beta1 too
    "warm-up": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=4), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        [4],
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(scheduler, host_world):
    """Every step takes what the scheduler has written into the groups."""

    def script(run: Run) -> None:
        schedule = SCHEDULERS[scheduler](run.opt)
        for _ in range(8):
            run.train(1, look=False)
            schedule.step()
            run.record("lr", run.opt.param_groups[0]["lr"])

    compare(host_world, lambda: Decoder(dropout=0.0), script)


def groups_of(model: nn.Module) -> list[dict]:
    norms = [p for p in model.parameters() if p.dim() < 2]
    rest = [p for p in model.parameters() if p.dim() >= 2]
    return [
        {"params": rest[::2]},
        {"params": rest[1::2], "lr": 1e-2, "betas": (0.5, 0.9), "maximize": True},
        {"params": norms, "weight_decay": 0.0, "eps": 1e-4},
    ]


def test_groups(two_worlds):
    """Parameters of one unit belong to different groups; each has its own hyperparameters."""
    data = batches(50)
    plain, paged = pair(two_worlds)
    opt_plain, opt_paged = torch.optim.AdamW(groups_of(plain), lr=1e-3), funicular.AdamW(groups_of(paged), lr=1e-3)
    train_together([(plain, opt_plain), (paged, opt_paged)], data)
    assert_close(plain, paged)


def test_groups_exactly(two_worlds):
    def script(run: Run) -> None:
        run.model = run.wrap(Decoder())
        run.opt = run.adamw(groups_of(run.model))
        run.train(3)
        run.opt.param_groups[2]["lr"] = 0.0
        run.train(2)

    compare(two_worlds, None, script)


def test_group_added_later(host_world):
    """Unfrozen parameters join with a step count of their own."""

    def script(run: Run) -> None:
        run.model = run.wrap(Stack())
        run.opt = run.adamw(run.model.layers.parameters())
        run.train(3)
        run.model.zero_grad()
        run.opt.add_param_group({"params": [*run.model.inp.parameters(), *run.model.out.parameters()], "lr": 1e-3})
        run.train(3)
        run.record("count", float(run.opt.state[run.model.inp.weight]["step"]))

    compare(host_world, None, script)


def test_two_optimizers(host_world):
    """One for each half of the model, stepping at different rates."""

    def script(run: Run) -> None:
        run.model = run.wrap(Stack())
        halves = [run.adamw(run.model.layers[i::2].parameters(), lr=10.0 ** -(2 + i)) for i in range(2)]
        for i in range(4):
            run.model(run.data(4, WIDTH)).square().mean().backward()
            for opt in halves[: 1 + i % 2]:
                opt.step()
            run.record_grads()
            run.model.zero_grad()
            run.record_weights()

    compare(host_world, None, script)


def test_learning_rate_as_a_tensor(host_world):
    def script(run: Run) -> None:
        run.model = run.wrap(Stack())
        run.opt = run.adamw(lr=torch.tensor(1e-2))
        run.train(2)
        run.opt.param_groups[0]["lr"].mul_(0.5)
        run.train(2)

    compare(host_world, None, script)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_unwrap_keeps_states(dtype, two_worlds):
    """The same optimizer goes on, resident, and in half precision with its masters: not one bit differs."""

    def script(run: Run) -> None:
        run.train(3)
        if run.offloaded:
            funicular.unwrap(run.model)
            moment = run.opt.state[run.model.layers[1].up.weight]["exp_avg"]
            assert type(moment) is Tensor
            assert moment.device.type == run.device.type
        run.train(3)

    compare(two_worlds, lambda: Decoder(dtype=dtype), script)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_optimizer_from_before_offload(dtype, two_worlds):
    """Steps, then offload, then the same optimizer's states move into the tiers."""

    def script(run: Run) -> None:
        run.model = Decoder(dtype=dtype, dropout=0.0).to(run.device)
        run.opt = run.adamw()
        run.train(2)
        if run.offloaded:
            run.wrap(run.model)
        run.train(3)

    compare(two_worlds, None, script)


def test_wrapped_again_goes_on(two_worlds):
    """Budgets change in the middle of a run; the optimizer does not notice."""

    def script(run: Run) -> None:
        run.train(2)
        for frames in (8, 3):
            if run.offloaded:
                funicular.unwrap(run.model)
                run.wrap(run.model, frames)
            run.train(2)

    compare(two_worlds, lambda: Decoder(dtype=torch.bfloat16), script)


def test_torch_adamw_over_an_offloaded_model(two_worlds):
    """Torch's own optimizer sees ordinary parameters and gradients: slower, and right."""

    def script(run: Run) -> None:
        run.model = run.wrap(Stack())
        run.opt = torch.optim.AdamW(run.model.parameters(), lr=1e-2, foreach=False)
        run.train(3)

    compare(two_worlds, None, script)
