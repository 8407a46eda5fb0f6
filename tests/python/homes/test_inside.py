"""Weights edited or looked at inside a forward past torch's version counters, and views that outlive it."""

import numpy as np
import pytest
import torch
from test_aliases import before, pointer_to, scale

from models import WIDTH, Block, stack
from twin import Run, case, compare, loud


class EditsInside(Block):
    """Edits a weight in forward in a way that no counter shows."""

    how = None

    def forward(self, x):
        type(self).how(self.up.weight)
        return super().forward(x)


INSIDE = {
    "data_clamp": lambda w: w.data.clamp_(-0.1, 0.1),
    "data_mul": lambda w: w.data.mul_(0.9),
    "data_index": lambda w: w.data.__setitem__(0, 0.25),
    "detach_data": lambda w: w.detach().data.mul_(0.9),
    "numpy": lambda w: np.multiply(w.detach().numpy(), 0.5, out=w.detach().numpy()),
    "data_ptr": lambda w: scale(pointer_to(w)),
    "set_data": lambda w: setattr(w, "data", w.data * 0.9),
    "dlpack": lambda w: torch.from_dlpack(w.detach()).mul_(0.9),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("how", INSIDE)
def test_edit_inside_forward(how, world):
    """Before use, in every forward: exact."""
    if world.device == "cuda" and how in {"numpy", "data_ptr"}:
        pytest.skip("the CPU's")

    class Edits(EditsInside):
        pass

    Edits.how = staticmethod(INSIDE[how])

    def script(run: Run) -> None:
        run.train(3)
        run.model.eval()
        with torch.no_grad():
            run.record("eval", run.model(run.data(4, WIDTH)))

    compare(world, stack(Edits), script)


@pytest.mark.covering(2)
@pytest.mark.parametrize("how", ["mul_", "data", "numpy"])
@pytest.mark.parametrize("phase", ["train", "eval"])
def test_view_kept_from_inside_forward(how, phase, world):
    """A view taken in a forward stays the weight: it shows later steps, and edits through it count."""
    if world.device == "cuda" and how == "numpy":
        pytest.skip("numpy sees only the CPU")

    def script(run: Run) -> None:
        kept = []
        hook = run.model.layers[2].register_forward_hook(lambda m, *_: kept.append(m.up.weight.detach()))
        if phase == "train":
            run.train(1)
        else:
            with torch.no_grad():
                run.model(run.data(4, WIDTH))
        hook.remove()
        del hook
        (view,) = kept
        run.record("view", view)
        for _ in range(3):
            if how == "mul_":
                view.mul_(0.5)
            elif how == "data":
                view.data.mul_(0.5)
            else:
                a = view.numpy()
                a *= 0.5
                del a
            run.record("weights", [p.detach().clone() for p in run.model.parameters()])
            run.train(1)
            run.record("view", view)
        run.train(1)
        run.record("view", view)

    compare(world, stack(), script)


@case(stack())
def test_view_kept_from_a_backward_hook(run: Run):
    kept = []
    hook = run.model.layers[2].up.weight.register_hook(lambda g: kept.append(run.model.layers[2].up.weight.detach()))
    run.train(1)
    hook.remove()
    for _ in range(2):
        run.record("view", kept[0])
        kept[0].mul_(0.5)
        run.record_weights()
        run.train(1)
    del kept[:]


@case(stack())
def test_home_view_edited_inside_forward(run: Run):
    """Taken before, edited by a counted operation while the block computes, before the weight is used."""
    view = run.model.layers[2].up.weight.detach()
    hook = before(run.model.layers[1], lambda: view.mul_(0.9))
    with torch.no_grad():
        run.record("eval", run.model(run.data(4, WIDTH)))
    hook.remove()
    hook = before(run.model.layers[0], lambda: view.mul_(0.9))
    run.train(2)
    hook.remove()


@pytest.mark.parametrize("counted", [True, False])
def test_home_view_edited_under_its_own_window(counted, world):
    """The block computes from its frames: exact, or an error by name."""

    def script(run: Run) -> None:
        view = run.model.layers[2].up.weight.detach()
        hook = before(run.model.layers[2], lambda: (view if counted else view.data).mul_(0.9))
        try:
            run.train(2)
        finally:
            hook.remove()

    assert loud(world, stack(), script) in {"exact", "refused"}
