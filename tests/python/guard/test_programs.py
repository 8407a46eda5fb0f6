"""Programs made of an offloaded model: refused by name, and possible from a copy."""

import copy
import io
import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import funicular
from models import CUDA, WIDTH, Stack
from twin import Run, World

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore:The given buffer is not writable:UserWarning"
    ),  # torch's own, in torch.export.load
]

MAKERS = {
    "trace": torch.jit.trace,
    "trace without a check": lambda part, x: torch.jit.trace(part, x, check_trace=False),
    "export": lambda part, x: torch.export.export(part, (x,)).module(),
}
PARTS = {
    "model": lambda model: model,
    "block": lambda model: model.layers[1],
    "linear": lambda model: model.layers[1].up,
}


@pytest.mark.covering(2)
@pytest.mark.parametrize(
    ("maker", "part"),
    [pair for pair in itertools.product(MAKERS, PARTS) if pair != ("export", "linear")],
)
def test_programs(maker: str, part: str, two_worlds: World):
    run = Run(two_worlds, True)
    run.model = run.wrap(Stack())
    run.opt = run.adamw()
    run.train(1, look=False)
    x = run.data(4, WIDTH)
    with pytest.raises(funicular.UsageError, match=r"FN-E126.*copy\.deepcopy\(model\)"):
        MAKERS[maker](PARTS[part](run.model), x)
    # Nothing is left of it.
    run.train(1, look=False)
    plain = copy.deepcopy(PARTS[part](run.model))
    program = MAKERS[maker](plain, x)
    with torch.no_grad():
        assert torch.equal(program(x), PARTS[part](run.model)(x))


def test_other_makers_of_programs(two_worlds: World):
    """Those that record operations, imagine them, or read the source."""
    run = Run(two_worlds, True)
    run.model = run.wrap(torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH) for _ in range(4)]))
    run.opt = run.adamw()
    x = run.data(4, WIDTH)

    def imagine(part: torch.nn.Module) -> None:
        with FakeTensorMode(allow_non_fake_inputs=True):
            part(x)

    makers = (imagine, lambda part: make_fx(part)(x), torch.jit.script)
    for maker, part in itertools.product(makers, (run.model, run.model[1])):
        with pytest.raises(funicular.UsageError, match="FN-E126"):
            maker(part)
        run.step(run.model(x).square().mean())


def test_an_exported_part_of_a_block_holds_the_parameters_themselves(two_worlds: World):
    """A part of a block has no window of its own: its program asks the guard for each parameter, as the part itself does."""
    run = Run(two_worlds, True)
    run.model = run.wrap(Stack())
    run.opt = run.adamw()
    run.train(1, look=False)
    part, x = run.model.layers[1].up, run.data(4, WIDTH)
    exported = torch.export.export(part, (x,))
    program = exported.module()
    assert all(p is q for p, q in zip(program.parameters(), part.parameters(), strict=True))
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(program(x), part(x))
        run.train(1, look=False)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    with torch.no_grad():
        assert torch.equal(torch.export.load(file).module()(x), part(x))


@pytest.mark.skipif(CUDA, reason="a kernel's fault of the device instead")
def test_a_function_that_reads_a_weight(two_worlds: World):
    run = Run(two_worlds, True)
    run.model = run.wrap(Stack())
    weight = run.model.layers[1].up.weight
    with pytest.raises(funicular.UsageError, match="FN-E126"):
        torch.jit.trace(lambda x: x @ weight, run.data(4, WIDTH))
    run.model(run.data(4, WIDTH))
