"""Uses of ``optimizer.state`` that torch allows, each a function of one side of a comparison."""

import copy
import pickle
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

WIDE = 16


class Side:
    """A model, an optimizer and a parameter that belongs to no model: plain with torch's AdamW, or with this project's."""

    def __init__(self, kind: type, wrap: Callable[[nn.Module], nn.Module]) -> None:
        torch.manual_seed(3)
        self.kind, self.wrap = kind, wrap
        self.model = wrap(nn.Sequential(*[nn.Linear(WIDE, WIDE) for _ in range(4)]))
        self.extra = nn.Parameter(torch.randn(3, WIDE))
        self.opt = self.made()
        self.losses: list[float] = []
        self.generator = torch.Generator().manual_seed(4)

    def made(self) -> Any:
        groups = [{"params": list(self.model.parameters())}, {"params": [self.extra], "weight_decay": 0.1}]
        return self.kind(groups, lr=1e-2)

    def params(self) -> list[Any]:
        return [p for group in self.opt.param_groups for p in group["params"]]

    def loss(self) -> Tensor:
        x = torch.randn(5, WIDE, generator=self.generator)
        return (self.model(x) - 1).square().mean() + (self.model(self.params()[-1]) + 1).square().mean()

    def go(self, steps: int = 2) -> None:
        for _ in range(steps):
            loss = self.loss()
            loss.backward()
            self.opt.step()
            self.opt.zero_grad()
            self.losses.append(loss.item())

    def each(self, edit: Callable[[Any], Any]) -> None:
        """Train, edit the states of all parameters, train."""
        self.go(3)
        for p in self.params():
            edit(self.opt.state[p])
        self.go(3)


def assigned(side: Side) -> None:
    side.go(3)
    for p in side.params():
        side.opt.state[p] = {k: v.clone() for k, v in side.opt.state[p].items()}
    side.go(3)


def assigned_from_a_copy(side: Side) -> None:
    side.go(3)
    for p in side.params():
        side.opt.state[p] = copy.deepcopy(side.opt.state[p])
    side.go(3)


def container_replaced(side: Side) -> None:
    side.go(3)
    side.opt.state = defaultdict(dict, {p: dict(s) for p, s in side.opt.state.items()})
    side.go(3)


def container_plain(side: Side) -> None:
    side.go(3)
    side.opt.state = defaultdict(dict, {p: {**s} for p, s in side.opt.state.items()})
    side.go(1)
    side.opt.state.clear()
    side.go(2)


def deep_copied(side: Side) -> None:
    side.go(3)
    side.model, side.opt = copy.deepcopy((side.model, side.opt))
    side.go(3)


def pickled(side: Side) -> None:
    side.go(3)
    states = pickle.loads(pickle.dumps([side.opt.state[p] for p in side.params()]))
    side.opt.state.clear()
    for p, s in zip(side.params(), states, strict=True):
        side.opt.state[p] = s
    side.go(3)


def seeded(side: Side) -> None:
    """From another optimizer's states, of torch's own class."""
    other = Side(torch.optim.AdamW, lambda model: model)
    other.go(4)
    side.go(1)
    for p, q in zip(side.params(), other.params(), strict=True):
        side.opt.state[p] = {k: v.clone() for k, v in other.opt.state[q].items()}
    side.go(3)


def seeded_before_the_first_step(side: Side) -> None:
    for p in side.params():
        moments = {"exp_avg": torch.full_like(p, 0.1), "exp_avg_sq": torch.full_like(p, 0.2)}
        side.opt.state[p] = {"step": torch.tensor(7.0), **moments}
    side.go(3)


def filled_key_by_key(side: Side) -> None:
    for p in side.params():
        state = side.opt.state[p]
        state["step"] = torch.tensor(2.0)
        state["exp_avg"] = torch.full_like(p, 0.1)
        state["exp_avg_sq"] = torch.full_like(p, 0.2)
    side.go(3)


def assigned_and_kept(side: Side) -> None:
    """What was assigned is the state: edits of the tensor count later too."""
    side.go(2)
    kept = [{k: v.clone() for k, v in side.opt.state[p].items()} for p in side.params()]
    for p, state in zip(side.params(), kept, strict=True):
        side.opt.state[p] = state
    side.go(2)
    for state in kept:
        state["exp_avg"].mul_(0.5)
        state["exp_avg_sq"].data.mul_(2)
    side.go(2)


def exchanged(side: Side) -> None:
    """Two parameters of one shape exchange their states."""
    side.go(2)
    a, b = side.model[0].weight, side.model[1].weight
    state = side.opt.state
    state[a], state[b] = state[b], state[a]
    side.go(2)


def grown(side: Side) -> None:
    side.go(2)
    old = side.params()[-1]
    state = side.opt.state.pop(old)
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.cat([state[name], torch.zeros(2, WIDE)])
    new = nn.Parameter(torch.cat([old.detach(), torch.ones(2, WIDE)]))
    side.opt.param_groups[1]["params"] = [new]
    side.opt.state[new] = state
    side.go(2)
    state["exp_avg"].zero_()
    side.go(2)


def deleted(side: Side) -> None:
    side.go(2)
    for p in side.params()[::2]:
        del side.opt.state[p]
    side.go(2)


def popped_and_put_back(side: Side) -> None:
    side.go(2)
    for p in side.params()[::2]:
        state = side.opt.state.pop(p)
        state["exp_avg"].mul_(0.5)
        side.opt.state[p] = state
    side.go(2)


def kept_from_before(side: Side) -> None:
    """Tensors, views, arrays and counts that were taken some steps ago."""
    side.go(1)
    states = [side.opt.state[p] for p in side.params()]
    tensors, views = [s["exp_avg"] for s in states], [s["exp_avg_sq"].view(-1) for s in states]
    counts = [s["step"] for s in states]
    side.go(2)
    side.losses += [float(t.double().norm()) for t in tensors] + [float(c) for c in counts]
    for t, v, c in zip(tensors, views, counts, strict=True):
        t.mul_(0.5)
        v.detach().numpy()[::2] *= 2
        c.sub_(1)
    side.go(2)


def group_added(side: Side) -> None:
    side.go(1)
    more = nn.Parameter(torch.ones(WIDE))
    side.opt.add_param_group({"params": [more], "lr": 1e-3, "maximize": True})
    for _ in range(2):
        (side.loss() + (more * 0.5).square().sum()).backward()
        side.opt.step()
        side.opt.zero_grad(set_to_none=False)
    side.opt.zero_grad()
    side.losses.append(float(more.detach().sum()))
    side.opt.param_groups[2]["params"] = []
    side.opt.param_groups.pop()
    side.go(1)


def closures(side: Side) -> None:
    def closure() -> Tensor:
        side.opt.zero_grad()
        loss = side.loss()
        loss.backward()
        return loss

    def silent() -> None:
        closure()

    with torch.no_grad():
        side.losses += [float(side.opt.step(closure)) for _ in range(2)]
        assert side.opt.step(silent) is None
    side.losses.append(float(side.opt.step(closure).detach()))


def scaled(side: Side) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for i in range(4):
        loss = scaler.scale(side.loss() * (float("inf") if i == 1 else 1.0))
        loss.backward()
        scaler.step(side.opt)
        scaler.update()
        side.opt.zero_grad()


def scheduled(side: Side) -> None:
    for group in side.opt.param_groups:
        group["lr"] = torch.tensor(1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(side.opt, lambda n: 0.5**n)
    for _ in range(3):
        side.go(1)
        scheduler.step()


def loaded(side: Side) -> None:
    """Into a new optimizer, with entries of the user's own."""
    side.go(2)
    for p in side.params():
        side.opt.state[p]["slow"] = p.detach().clone()
        side.opt.state[p]["note"] = {"n": 3, "all": [p.detach().clone()]}
    side.opt.state["global"] = 5
    saved = copy.deepcopy(side.opt.state_dict())
    side.opt = side.made()
    side.opt.load_state_dict(saved)
    assert side.opt.state["global"] == 5
    del side.opt.state["global"]
    side.losses += [float(side.opt.state[p]["slow"].sum()) for p in side.params()]
    side.losses += [float(side.opt.state[p]["note"]["all"][0].sum()) for p in side.params()]
    side.go(2)


def own_entries(side: Side) -> None:
    """Kept through steps and copies; a moving average that the user keeps up."""
    side.go(1)
    for p in side.params():
        side.opt.state[p]["mean"] = p.detach().clone()
        side.opt.state[p][0] = "text"
    for _ in range(2):
        side.go(1)
        for p in side.params():
            side.opt.state[p]["mean"].lerp_(p.detach(), 0.5)
    side.losses += [float(side.opt.state[p]["mean"].double().norm()) for p in side.params()]
    for states in (copy.deepcopy(side.opt.state[side.params()[0]]), side.opt.state_dict()["state"][0]):
        assert states[0] == "text"
        assert sorted(map(str, states)) == ["0", "exp_avg", "exp_avg_sq", "mean", "step"]


def looked_at(side: Side) -> None:
    """Lengths, membership, order, before the first step and after."""
    first = side.params()[0]
    assert len(side.opt.state) == 0
    assert first not in side.opt.state
    assert dict(side.opt.state[first]) == {}
    side.go(1)
    states = side.opt.state[first]
    assert isinstance(states, dict)
    assert list(states) == list(states.keys()) == ["step", "exp_avg", "exp_avg_sq"]
    assert len(states) == len(dict(states)) == len({**states}) == len(states.copy()) == len(states | {}) == 3
    assert "exp_avg" in states
    assert "master" not in states
    assert states.get("slow") is None
    assert states.setdefault("exp_avg", None) is states["exp_avg"]
    with pytest.raises(KeyError):
        states["slow"]
    assert len(side.opt.state) == len(side.params())
    assert all(p is q for p, q in zip(side.opt.state, side.params(), strict=True))


def rebound(state: Any) -> None:
    state["exp_avg"].data = state["exp_avg"] * 0


EDITS: dict[str, Callable[[Any], Any]] = {
    "counted": lambda s: s["exp_avg"].zero_(),
    "data": lambda s: s["exp_avg"].data.zero_(),
    "numpy": lambda s: s["exp_avg"].numpy().fill(0),
    "view": lambda s: s["exp_avg_sq"].view(-1)[1:].data.mul_(4),
    "rebound": rebound,
    "cleared": lambda s: s.clear(),
    "popped": lambda s: [s.pop(k) for k in list(s)],
    "step zeroed": lambda s: s["step"].zero_(),
    "step in data": lambda s: s["step"].data.fill_(10),
    "step replaced": lambda s: s.__setitem__("step", torch.tensor(5.0)),
    "replaced": lambda s: s.__setitem__("exp_avg", s["exp_avg"] * 0.5),
    "replaced, edited later": lambda s: s.update(exp_avg=torch.zeros_like(s["exp_avg"])) or s["exp_avg"].add_(0.01),
    "updated": lambda s: s.update({"exp_avg_sq": s["exp_avg_sq"] * 2, "step": torch.tensor(2.0)}),
    "merged": lambda s: s.__ior__({"exp_avg": s["exp_avg"] * 0.5}),
    "taken out, put back": lambda s: s.update(exp_avg=s.pop("exp_avg") * 0.5),
    "other strides": lambda s: s.update(exp_avg=s["exp_avg"].clone().t().contiguous().t()),
}
USES: dict[str, Callable[[Side], None]] = {
    f.__name__: f
    for f in (
        assigned, assigned_from_a_copy, container_replaced, container_plain, deep_copied, pickled, seeded,
        seeded_before_the_first_step, filled_key_by_key, assigned_and_kept, exchanged, grown, deleted, popped_and_put_back,
        kept_from_before, group_added, closures, scaled, scheduled, loaded, own_entries, looked_at,
    )
} | {f"edit: {name}": lambda side, edit=edit: side.each(edit) for name, edit in EDITS.items()}  # fmt: skip
