"""``torch.compile`` of blocks and of whole models: the bits of the plain model, one graph per class, nothing compiled twice."""

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config
from torch import nn
from torch._dynamo.utils import counters

import children
import conftest
import funicular
import sliced
from funicular import testing
from models import WIDTH, Block, Decoder, Stack, stack
from twin import Run, World, compare, play

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.timeout(1200),
]
SLICES = pytest.mark.parametrize("rows", [None, 2], ids=["whole", "micro-batches"])


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def by_forward(block: nn.Module, backend: str) -> None:
    block.forward = torch.compile(block.forward, backend=backend)


def by_module(block: nn.Module, backend: str) -> None:
    block.compile(backend=backend)


HOW = pytest.mark.parametrize("how", [by_forward, by_module], ids=lambda f: f.__name__)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def breaks() -> int:
    return sum(counters["graph_break"].values())


class Watched:
    """Trains; after two steps nothing is compiled any more."""

    def __init__(self, build, how=None, before=False, backend="aot_eager", blocks=lambda m: list(m.layers)):
        self.build, self.how, self.before, self.backend, self.blocks = build, how, before, backend, blocks
        self.graphs = self.breaks = 0

    def compile(self, model: nn.Module) -> nn.Module:
        for block in self.blocks(model):
            self.how(block, self.backend)
        return model

    def model(self, offloaded: bool) -> nn.Module:
        return self.compile(self.build()) if offloaded and self.before else self.build()

    def __call__(self, run: Run) -> None:
        if run.offloaded and not self.before:
            self.compile(run.model)
        run.train(2)
        seen = counters["frames"]["total"]
        run.train(4)
        assert counters["frames"]["total"] == seen, "compiled again in a later step"
        if run.offloaded:
            self.graphs, self.breaks = graphs(), breaks()


def both(world: World, watched: Watched, rows: int | None, **sections) -> Run:
    """Plain and in eager mode on one side, offloaded and compiled on the other."""
    if rows is not None:
        sections["activations"] = {"micro_batch": rows} | sections.get("activations", {})

    def script(run: Run) -> None:
        model = watched.model(run.offloaded)
        if rows is not None and not run.offloaded:
            sliced.slice_blocks(model, watched.blocks(model), rows)
        run.model = run.wrap(model, **sections)
        run.opt = run.adamw()
        watched(run)

    return compare(world, None, script)


@SLICES
@HOW
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_blocks(before, how, rows, host_world):
    """One graph for the class of all blocks, forward and recomputation of every slice; windows stay outside."""
    watched = Watched(stack(), how, before)
    both(host_world, watched, rows)
    assert (watched.graphs, watched.breaks) == (1, 0)


@SLICES
def test_blocks_whose_weights_lie_on_disk(rows, nvme_world):
    watched = Watched(stack(), by_forward)
    both(nvme_world, watched, rows, activations={"tier": "hbm" if rows is None else "host"})
    assert (watched.graphs, watched.breaks) == (1, 0)


def test_two_classes_of_blocks(host_world):
    class Other(Block):
        def forward(self, x):
            return super().forward(x) * 0.5

    class Mixed(Stack):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Other() if i % 2 else Block() for i in range(6))

    watched = Watched(Mixed, by_forward)
    both(host_world, watched, None)
    assert (watched.graphs, watched.breaks) == (2, 0)


@SLICES
def test_attention_blocks(rows, host_world):
    watched = Watched(lambda: Decoder(dropout=0.0), by_forward)
    both(host_world, watched, rows)
    assert (watched.graphs, watched.breaks) == (1, 0)


@SLICES
def test_weights_used_from_home(rows, host_world):
    """A view that is kept holds frames: other units are used from their homes, and the graph does not care."""

    def script(run: Run) -> None:
        if run.offloaded:
            for block in run.model.layers:
                by_forward(block, "aot_eager")
        run.train(2)
        seen, kept = graphs(), []
        handle = run.model.layers[0].register_forward_pre_hook(lambda m, a: kept.append(m.up.weight.detach().view(-1)))
        run.train(2)
        handle.remove()
        kept.clear()
        run.train(1)
        if run.offloaded:
            assert funicular.stats(run.model).home_uses > 0
            if rows is not None:
                assert (seen, graphs()) == (1, 1)

    if rows is None:
        compare(host_world, stack(), script, frames=2)
    else:
        sliced.compare(host_world, stack(), script, rows=rows)


@SLICES
def test_evaluation_in_between(rows, host_world):
    def script(run: Run) -> None:
        if run.offloaded:
            for block in run.model.layers:
                by_forward(block, "aot_eager")
        for _ in range(4):
            run.train(1)
            run.model.eval()
            with torch.no_grad():
                run.record("eval", run.model(run.data(4, WIDTH)))
            run.model.train()

    if rows is None:
        compare(host_world, stack(), script)
    else:
        sliced.compare(host_world, stack(), script, rows=rows)


@pytest.mark.slow
@SLICES
def test_inductor(rows, host_world):
    """With the compiler of torch: the bits of the resident model compiled the same way."""

    def train(run: Run) -> None:
        for block in run.model.layers:
            by_forward(block, "inductor")
        run.train(3)

    sections = {} if rows is None else {"activations": {"micro_batch": 4}}
    # Both are traced and turned into C++ anew; what comes of equal C++ is kept.
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        plain = play(host_world, stack(), train, False, 3, {})
        counters.clear()
        torch._dynamo.reset()
        paged = play(host_world, stack(), train, True, 3, sections)
    assert graphs() == 1
    for (name, a), (_, b) in zip(plain.notes, paged.notes, strict=True):
        assert not isinstance(a, torch.Tensor) or torch.equal(a, b), name


@pytest.mark.parametrize("how", ["torch.compile", "model.compile"])
@SLICES
def test_whole_model(rows, how, nvme_world):
    """Graphs break where windows open and close: blocks of a class still share one, and nothing is compiled again.

    In micro-batches the blocks themselves run as they are.
    """

    def script(run: Run) -> None:
        call = run.model
        if run.offloaded and how == "torch.compile":
            call = torch.compile(run.model, backend="aot_eager")
        elif run.offloaded:
            run.model.compile(backend="aot_eager")
        for step in range(5):
            if step == 2:
                seen = counters["frames"]["total"]
            run.step(call(run.data(4, WIDTH)).square().mean())
        assert counters["frames"]["total"] == seen

    if rows is None:
        compare(nvme_world, stack(), script)
        assert graphs() == 1
    else:
        sliced.compare(nvme_world, stack(), script, rows=rows)


@pytest.mark.parametrize("first", ["offload", "compile"])
def test_whole_model_before_any_other_call(first: str, host_world: World):
    """In a process of its own: what an earlier forward has told the compiler is not known there."""
    body = f"""
    import torch._dynamo
    model = Stack(depth=3)
    compiled = [torch.compile(model, backend="eager")] if {first == "compile"} else []
    funicular.offload(model, world.policy(model))
    compiled.append(torch.compile(model, backend="eager"))
    compiled[0](torch.ones(2, WIDTH)).sum().backward()
    print(all(p.grad is not None for p in model.parameters()))
    """
    assert children.succeed(body, host_world.paths[0], conftest.PLACEMENTS["host"]) == ["True"]


class ByFunction(Block):
    """Uses a weight without the module that has it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.linear(x, self.up.weight)[..., :WIDTH])


@SLICES
def test_blocks_that_use_weights_themselves(rows, host_world):
    """Also in torch 2.4, which makes a graph per block, and in micro-batches more."""

    def script(run: Run) -> None:
        if run.offloaded:
            for block in run.model.layers:
                by_forward(block, "eager")
        run.train(3)

    if rows is None:
        compare(host_world, stack(block=ByFunction), script)
    else:
        sliced.compare(host_world, stack(block=ByFunction), script, rows=rows)
    assert graphs() > 0
    assert rows is not None or (graphs() <= len(stack()().layers) and breaks() == 0)


def test_parts_of_blocks(host_world):
    """Modules inside of a unit, compiled by the user: no hook is there."""

    def script(run: Run) -> None:
        if run.offloaded:
            for block in run.model.layers:
                block.up.compile(backend="aot_eager")
        run.train(4)

    compare(host_world, stack(), script)
    assert (graphs(), breaks()) == (1, 0)


def test_after_a_compiler_that_failed(host_world):
    """It leaves its way of running Python behind, in which a call costs more references: no gradient is taken for one that is kept."""

    def fails(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> None:
        raise NotImplementedError

    run = Run(host_world, True)
    run.model = run.wrap(stack()())
    run.opt = run.adamw()
    for block in run.model.layers:
        by_forward(block, "eager")
    run.train(1)
    torch._dynamo.reset()
    for block in run.model.layers:
        block.forward = torch.compile(type(block).forward.__get__(block), backend=fails)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        run.train(1)
    for block in run.model.layers:
        del block.forward
    run.opt.zero_grad()
    run.model(run.data(4, WIDTH)).square().mean().backward()
    assert all(testing.inspect_parameter(p.grad).gradient is p.grad for p in run.model.parameters())


def test_unwrapped(host_world):
    """Compiled blocks go on without the runtime; their weights have another class then, so once more for the class."""

    def script(run: Run) -> None:
        if run.offloaded:
            for block in run.model.layers:
                by_module(block, "aot_eager")
        run.train(2)
        if run.offloaded:
            funicular.unwrap(run.model)
        run.train(2)

    compare(host_world, stack(), script)
    assert graphs() == 2
