"""Training a decoder offloaded gives the bits of training it plainly."""

import pytest
import torch

import facts
import funicular
from conftest import DEVICE, PLACEMENTS
from models import WIDTH, Decoder, Stack, stack
from twin import Run, World, compare, unit_bytes

pytestmark = pytest.mark.io_engines

CHECKPOINT = ["none", "reentrant", "saved_tensors"]
TIERS = [("host", "host"), ("host", "nvme"), ("nvme", "nvme")]


def micro_batches(count: int, steps: int = 3, look: bool = True):
    """``steps`` steps of ``count`` backward passes each."""

    def script(run: Run) -> None:
        for _ in range(steps):
            for _ in range(count):
                loss = run.model(run.tokens(2, 9)) / count
                run.record("loss", loss)
                loss.backward()
            if look:
                run.record_grads()
            run.opt.step()
            run.opt.zero_grad()

    return script


@pytest.mark.covering(2)
@pytest.mark.parametrize("tiers", TIERS, ids="/".join)
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("ckpt", CHECKPOINT)
@pytest.mark.parametrize("matmul", [False, True], ids=["linear", "matmul"])
def test_decoder(matmul, ckpt, accumulate, tiers, disk):
    world = World(DEVICE, (disk,), *tiers)
    compare(world, lambda: Decoder(matmul, ckpt), micro_batches(accumulate))


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("matmul", [False, True], ids=["linear", "matmul"])
def test_dtypes(matmul, tie, dtype, world):
    compare(world, lambda: Decoder(matmul, tie=tie, dtype=dtype), micro_batches(2))


@pytest.mark.parametrize(
    "options",
    [
        {"betas": (0.8, 0.95)},
        {"eps": 1e-4},
        {"weight_decay": 0.0},
        {"lr": 0.0},
        {"maximize": True},
        {"betas": (0.0, 0.0)},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_options(options, dtype, host_world):
    def script(run: Run) -> None:
        run.model = run.wrap(Decoder(dtype=dtype))
        run.opt = run.adamw(**options)
        run.train(4)

    compare(host_world, None, script)


@pytest.mark.covering(1)
@pytest.mark.parametrize("look", [True, False], ids=["looking", "unwatched"])
def test_steady_state(look, world):
    """Twenty steps; unwatched, nothing ever waits but the mechanism itself."""
    compare(world, Decoder, lambda run: run.train(20, look))


def test_everything_fits(world):
    compare(world, Decoder, lambda run: run.train(4), frames=64)


def test_one_block_at_a_time(world):
    """The smallest compute tier that is accepted, found by asking."""
    frames = smallest(world)
    assert frames < 6
    compare(world, lambda: Decoder(True), lambda run: run.train(4), frames=frames)
    compare(world, lambda: Decoder(True, "reentrant"), lambda run: run.train(2), frames=frames)


def smallest(world: World) -> float:
    for frames in (1, 1.5, 2, 2.5, 3, 4, 5):
        model = Decoder(True)
        try:
            funicular.offload(model, world.policy(model, frames))
        except funicular.Error as error:
            assert "FN-E201" in str(error)
        else:
            funicular.unwrap(model)
            return frames
    raise AssertionError("no budget was accepted")


def test_many_blocks_few_frames(world):
    compare(world, stack(depth=24), lambda run: run.train(3))


def test_mixed_sizes(world):
    """Blocks of different sizes share frames cut for the largest."""

    def build() -> Stack:
        model = Stack(depth=6)
        for i in (1, 4):
            model.layers[i].up = torch.nn.Linear(WIDTH, WIDTH, bias=False)
            model.layers[i].down = torch.nn.Identity()
        return model

    compare(world, build, lambda run: run.train(3))


def test_whole_model_is_one_unit(world):
    """No ModuleList at all."""

    def build() -> torch.nn.Module:
        model = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh(), torch.nn.Linear(WIDTH, WIDTH))
        model.width = WIDTH
        return model

    compare(world, build, lambda run: run.train(3))


def test_bits_do_not_depend_on_placement(disk, io_uring):
    """The same losses for every placement, engine and budget."""
    results = []
    for name, placement in PLACEMENTS.items():
        if placement["engine"] == "io_uring" and not io_uring:
            continue
        for frames in (FEW, 64):
            world = World(DEVICE, (disk,), **placement)
            run = compare(world, lambda: Decoder(True), lambda run: run.train(2), frames=frames)
            results.append((name, [v for k, v in run.notes if k == "loss"]))
    for name, losses in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0][1], losses)), name


FEW = 3


def test_pages(world):
    """With a tight budget bytes really move: at least the model up twice a step, and its gradients down."""

    def script(run: Run) -> None:
        run.train(4)
        if run.offloaded:
            total = sum(unit_bytes(run.model))
            assert facts.moved(run.model, "host_to_device") > 4 * total
            if run.world.params == "nvme":
                assert facts.moved(run.model, "nvme_write") > total

    compare(world, stack(depth=10), script)


def test_close_to_torch(two_worlds):
    """Fifty fp32 steps stay within 1e-6 relative of torch.optim.AdamW."""
    options = {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.05}
    results = []
    for offloaded in (False, True):
        run = Run(two_worlds, offloaded)
        run.model = run.wrap(Decoder(dropout=0.0))
        run.opt = run.adamw(**options) if offloaded else torch.optim.AdamW(run.model.parameters(), **options)
        run.train(50, look=False)
        run.record_weights()
        results.append(run.notes)
    for (name, a), (_, b) in zip(*results, strict=True):
        scale = a.double().norm()
        assert (a.double() - b.double()).norm() <= 1e-6 * scale, name


def test_plain_gradients_without_optimizer(world):
    """A wrapped model needs no optimizer of this project to give gradients."""

    def script(run: Run) -> None:
        run.model = run.wrap(Decoder(True))
        for _ in range(3):
            loss = run.model(run.tokens(2, 9))
            run.record("loss", loss)
            loss.backward()
        run.record_grads()

    compare(world, None, script)
