"""``funicular.AdamW`` is a torch optimizer: groups, schedulers, state, closures, other optimizers beside it."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

import funicular
from models import WIDTH, Decoder, Stack, stack
from twin import Run, case, compare


def groups(model: nn.Module) -> list[dict]:
    """Decay for matrices, none for the rest, a rate of its own for the output."""
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if p.ndim > 1 and "out" not in n], "weight_decay": 0.3},
        {"params": [p for n, p in named if p.ndim <= 1 and "out" not in n], "weight_decay": 0.0, "betas": (0.5, 0.9)},
        {"params": [p for n, p in named if "out" in n], "lr": 1e-3, "eps": 1e-3},
    ]


@case()
def test_groups(run: Run):
    run.model = run.wrap(Stack())
    run.opt = run.adamw(groups(run.model))
    run.train(3)
    run.record("lr", [g["lr"] for g in run.opt.param_groups])


@case()
def test_groups_changed_between_steps(run: Run):
    run.model = run.wrap(Stack())
    run.opt = run.adamw(groups(run.model))
    for i in range(4):
        run.opt.param_groups[0]["lr"] = 1e-2 / (i + 1)
        run.opt.param_groups[1]["weight_decay"] = 0.1 * i
        run.opt.param_groups[2]["betas"] = (0.9 - 0.1 * i, 0.99)
        run.train(1)


SCHEDULERS = {
    "lambda": lambda o: schedulers.LambdaLR(o, lambda i: 1 / (i + 1)),
    "step": lambda o: schedulers.StepLR(o, 2),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 5),
    "onecycle": lambda o: schedulers.OneCycleLR(o, 1e-2, total_steps=8),  # moves beta1 too
    "warmup": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=2), schedulers.ExponentialLR(o, 0.5)], [2]
    ),
    "plateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.filterwarnings("ignore::UserWarning:torch.optim.lr_scheduler")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name, host_world):
    def script(run: Run) -> None:
        scheduler = SCHEDULERS[name](run.opt)
        for _ in range(5):
            run.train(1)
            scheduler.step(1.0) if name == "plateau" else scheduler.step()
            run.record("lr", [float(g["lr"]) for g in run.opt.param_groups])

    compare(host_world, stack(), script)


@case()
def test_learning_rate_as_a_tensor(run: Run):
    run.model = run.wrap(Stack())
    run.opt = run.adamw(lr=1e-2)
    run.opt.param_groups[0]["lr"] = torch.tensor(0.03125)
    run.train(2)


@case()
def test_add_param_group(run: Run):
    run.model = run.wrap(Stack())
    run.opt = run.adamw(run.model.layers.parameters())
    run.train(2)
    run.opt.add_param_group({"params": [*run.model.inp.parameters(), *run.model.out.parameters()], "lr": 3e-3})
    run.train(2)


@case()
def test_named_parameters(run: Run):
    run.model = run.wrap(Stack())
    run.opt = run.adamw(run.model.named_parameters())
    run.train(2)
    assert run.opt.param_groups[0]["param_names"][0] == "inp.weight"


@case()
def test_some_parameters_only(run: Run):
    """The others get gradients and stay."""
    run.model = run.wrap(Stack())
    run.opt = run.adamw(run.model.layers[1:3].parameters())
    run.train(3)


@case()
def test_parameters_of_no_model(run: Run):
    """Parameters that are not paged may be in the same optimizer."""
    run.model = run.wrap(Stack())
    temperature = nn.Parameter(torch.ones(3, device=run.device))
    run.opt = run.adamw([*run.model.parameters(), temperature])
    for _ in range(3):
        run.step((run.model(run.data(4, WIDTH)) * temperature.mean()).square().mean())
    run.record("temperature", temperature)


@case()
def test_optimizer_before_wrap(run: Run):
    model = Stack() if run.offloaded else Stack().to(run.device)
    run.opt = run.adamw(model.parameters())
    run.model = run.wrap(model)
    run.train(3)


@case()
def test_two_optimizers(run: Run):
    """Each over its own half, stepped in turn."""
    run.model = run.wrap(Stack())
    halves = [run.adamw(run.model.layers[:3].parameters()), run.adamw(run.model.layers[3:].parameters(), lr=1e-3)]
    for i in range(4):
        run.opt = halves[i % 2]
        run.train(1)


@case()
def test_optimizer_replaced(run: Run):
    """A new optimizer starts from zero moments and from the current weights."""
    run.model = run.wrap(Decoder(dtype=torch.bfloat16))
    for lr in (1e-2, 1e-3):
        run.opt = run.adamw(lr=lr)
        run.train(2)


@case()
def test_same_parameter_twice_is_refused_as_in_torch(run: Run):
    run.model = run.wrap(Stack())
    p = run.model.inp.weight
    with pytest.raises(ValueError, match="more than one parameter group"):
        run.adamw([{"params": [p]}, {"params": [p]}])
    run.opt = run.adamw()
    run.train(1)


@case(stack())
def test_closure(run: Run):
    x = run.data(4, WIDTH)

    def closure():
        run.opt.zero_grad()
        loss = run.model(x).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        run.record("loss", run.opt.step(closure))


@case(stack())
def test_sharpness_aware(run: Run):
    """SAM: climb by the gradient, take the gradient there, return, step."""
    for _ in range(3):
        x = run.data(4, WIDTH)
        run.model(x).square().mean().backward()
        with torch.no_grad():
            climbs = [p.grad * (0.05 / (p.grad.norm() + 1e-12)) for p in run.model.parameters()]
            for p, e in zip(run.model.parameters(), climbs):
                p.add_(e)
        run.opt.zero_grad()
        loss = run.model(x).square().mean()
        run.record("loss", loss)
        loss.backward()
        with torch.no_grad():
            for p, e in zip(run.model.parameters(), climbs):
                p.sub_(e)
        run.record_grads()
        run.opt.step()
        run.opt.zero_grad()


@case(stack())
def test_torch_optimizer_over_homes(run: Run):
    """Another optimizer updates the weights in place."""
    run.opt = torch.optim.SGD(run.model.parameters(), lr=0.1, momentum=0.9)
    run.train(3)
    run.opt = torch.optim.SGD(run.model.parameters(), lr=0.1, foreach=False)
    run.train(2)


@case(stack())
def test_lookahead(run: Run):
    slow = [p.detach().clone() for p in run.model.parameters()]
    for _ in range(2):
        run.train(2, look=False)
        with torch.no_grad():
            for s, p in zip(slow, run.model.parameters()):
                s.lerp_(p, 0.5)
                p.copy_(s)


@case(stack())
def test_step_hooks(run: Run):
    calls = []
    run.opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    run.opt.register_step_post_hook(lambda *_: calls.append("post"))
    run.train(2)
    run.record("calls", calls)


@case(stack())
def test_state_of_a_parameter(run: Run):
    """Moments can be read at any time, and waited for."""
    for _ in range(2):
        run.train(1, look=False)
        for i in (0, 3):
            state = run.opt.state[run.model.layers[i].up.weight]
            run.record("exp_avg", state["exp_avg"])
            run.record("exp_avg_sq", state["exp_avg_sq"])
            run.record("step", float(state["step"]))


def moments(opt: torch.optim.Optimizer) -> dict:
    state = opt.state_dict()["state"]
    return {i: {k: s[k] for k in ("exp_avg", "exp_avg_sq")} | {"step": float(s["step"])} for i, s in state.items()}


@case(stack())
def test_state_dict(run: Run):
    run.train(3, look=False)
    run.record("moments", moments(run.opt))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resume(dtype, world):
    """Model and optimizer saved, made anew, loaded: training goes on as if nothing had been."""

    def script(run: Run) -> None:
        run.train(2)
        file = io.BytesIO()
        torch.save({"model": run.model.state_dict(), "opt": run.opt.state_dict()}, file)
        file.seek(0)
        loaded = torch.load(file, map_location=run.device)
        run.model = run.opt = None
        run.model = run.wrap(Decoder(dtype=dtype))
        run.opt = run.adamw()
        run.model.load_state_dict(loaded["model"])
        run.opt.load_state_dict(loaded["opt"])
        run.train(2)

    compare(world, lambda: Decoder(dtype=dtype), script)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masters_loaded_after_an_edit(dtype, world):
    """They go with the weights as those are then; an edit after that starts a master anew."""

    def script(run: Run) -> None:
        run.train(2)
        saved = copy.deepcopy(run.opt.state_dict())
        run.train(1)
        with torch.no_grad():
            run.model.layers[1].up.weight.mul_(1.25)
        run.opt.load_state_dict(saved)
        with torch.no_grad():
            run.model.layers[2].up.weight.mul_(1.25)
        run.train(2)

    compare(world, lambda: Decoder(dtype=dtype), script)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resume_equals_going_on(dtype, nvme_world):
    """The offloaded run alone: two steps, saved and resumed, two more, against four."""
    runs = []
    for resume in (False, True):
        run = Run(nvme_world, True)
        run.model = run.wrap(Decoder(dtype=dtype, dropout=0.0))
        run.opt = run.adamw()
        run.train(2)
        if resume:
            saved = copy.deepcopy((run.model.state_dict(), run.opt.state_dict()))
            run.model = run.wrap(Decoder(dtype=dtype, dropout=0.0))
            run.opt = run.adamw()
            run.model.load_state_dict(saved[0])
            run.opt.load_state_dict(saved[1])
        run.train(2)
        run.record_weights()
        runs.append(run.notes)
    assert len(runs[0]) == len(runs[1])
    for (name, a), (_, b) in zip(*runs):
        assert a is b is None or torch.equal(a, b), name


def test_state_goes_to_torch_and_back(host_world):
    """The state has torch.optim.AdamW's shape: either can carry on from the other's."""
    run = Run(host_world, True)
    run.model = run.wrap(Stack())
    run.opt = run.adamw(lr=1e-3)
    run.train(2)
    plain = Stack().to(run.device)
    plain.load_state_dict(run.model.state_dict())
    opt = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.1)
    opt.load_state_dict(copy.deepcopy(run.opt.state_dict()))  # torch would share the tensors
    for _ in range(2):
        x = run.data(4, WIDTH)
        for model, o in ((run.model, run.opt), (plain, opt)):
            o.zero_grad()
            model(x).square().mean().backward()
            o.step()
    for (name, a), b in zip(run.model.named_parameters(), plain.parameters()):
        assert (a - b).norm() <= 1e-6 * b.norm(), name
    run.opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    run.train(1)


OPTIONS = [{"amsgrad": True}, {"differentiable": True}, {"capturable": True}]


@pytest.mark.parametrize("option", OPTIONS, ids=lambda o: next(iter(o)))
def test_refused_options(option):
    """Named, with its code; nothing else happens."""
    model = Stack()
    with pytest.raises((funicular.Error, TypeError), match=next(iter(option))) as caught:
        funicular.AdamW(model.parameters(), **option)
    if "amsgrad" in option:
        assert isinstance(caught.value, funicular.Error)
        assert "FN-E117" in str(caught.value)


@pytest.mark.parametrize(
    "option", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1e-8}, {"weight_decay": -0.1}], ids=str
)
def test_invalid_options(option):
    with pytest.raises(ValueError, match="(?i)invalid|FN-E"):
        funicular.AdamW(Stack().parameters(), **option)


def test_is_an_optimizer(host_world):
    run = Run(host_world, True)
    run.model = run.wrap(Stack())
    run.opt = run.adamw()
    assert isinstance(run.opt, torch.optim.Optimizer)
    assert set(run.opt.param_groups[0]) >= {"params", "lr", "betas", "eps", "weight_decay", "maximize"}
    assert "AdamW" in repr(run.opt)
