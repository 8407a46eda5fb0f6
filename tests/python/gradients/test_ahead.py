"""Updates that begin during backward: the same bits for all that may happen between backward and step, and used where nothing happens."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import facts
import funicular
from conftest import DEVICE, PLACEMENTS, make_world
from funicular import testing
from models import CUDA, WIDTH, stack
from mutations import break_, wrap
from step_scripts import SCRIPTS, clipping, gradients_held, loss_of, plain_steps, read_between
from twin import Mismatch, Run, World, compare

SPARE = {"spare": "32MiB"}


@pytest.fixture(params=["host", "states-only", "nvme-threads", "nvme-io_uring", "nvme-gradients"])
def ahead_world(request: pytest.FixtureRequest, disk: str, io_uring: bool) -> World:
    """All in host memory; on disk the states, all but gradients with each engine, and all."""
    if request.param in PLACEMENTS:
        return make_world(request.param, disk, io_uring)
    return World(DEVICE, (disk,), "host", "nvme")


@pytest.mark.covering(1, times=2)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
def test_same_bits(ahead_world, script):
    compare(ahead_world, stack(), script, optimizer=SPARE)


SUMS = [script for script in SCRIPTS if script.__name__ in {
    "accumulation", "clipped_accumulation", "other_rhythm", "gradients_kept", "skipped_step", "gradient_through_an_alias", "step_twice",
}]  # fmt: skip


@pytest.mark.parametrize("faults", ["sums:up", "sums:up,states:delay=3ms"])
@pytest.mark.parametrize("script", [*SUMS, gradients_held], ids=lambda s: s.__name__)
def test_sums_of_gradients_that_are_brought_up(host_world, script, faults):
    compare(host_world, stack(), script, optimizer=SPARE, debug={"faults": faults})


def test_a_copy_of_a_gradient_that_is_held_is_noticed(host_world):
    sections = {"optimizer": SPARE, "debug": {"faults": "sums:up"}}
    with break_("add_to_a_copy_of_what_is_held"), pytest.raises(Mismatch):
        compare(host_world, stack(), gradients_held, **sections)


@pytest.mark.covering(1)
@pytest.mark.parametrize("script", [plain_steps, clipping, read_between], ids=lambda s: s.__name__)
def test_two_groups(ahead_world, script):
    """Units whose parameters have different hyperparameters."""

    def grouped(run: Run) -> None:
        decay = [p for p in run.model.parameters() if p.dim() > 1]
        rest = [p for p in run.model.parameters() if p.dim() < 2]
        run.opt = run.adamw([{"params": rest, "weight_decay": 0.0}, {"params": decay, "weight_decay": 0.3}])
        script(run)

    compare(ahead_world, stack(), grouped, optimizer=SPARE)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(ahead_world, dtype):
    def script(run: Run) -> None:
        for step in range(5):
            run.model(run.data(4, WIDTH).to(dtype)).float().square().mean().backward()
            run.record("norm", torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-2 if step % 2 else 1e3))
            run.opt.step()
            run.opt.zero_grad()

    compare(ahead_world, lambda: stack()().to(dtype), script, optimizer=SPARE)


def run_offloaded(world, steps: int, between=lambda model: None, backwards: int = 1, **sections) -> tuple[int, int]:
    model = stack()()
    funicular.offload(model, world.policy(model, **sections))
    opt = funicular.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        for _ in range(backwards):
            model(torch.randn(4, WIDTH, device=world.torch_device)).square().mean().backward()
        between(model)
        opt.step()
        opt.zero_grad()
    for p in model.parameters():  # its last update is over
        p.detach().sum()
    stats = funicular.stats(model)
    funicular.unwrap(model)
    return stats.ahead.used, stats.ahead.in_vain


def test_what_was_begun_is_used(ahead_world):
    """All units but in the first step, which teaches; how much of each was done by then depends on the machine."""
    used, in_vain = run_offloaded(ahead_world, 6, lambda model: settle(), optimizer=SPARE)
    assert used >= 5, "hardly anything was foreseen"
    assert in_vain == 0


def clip_above_the_norm(model) -> None:
    settle()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)


@pytest.mark.parametrize("faults", ["", "sums:up"])
@pytest.mark.parametrize("between", [lambda model: settle(), clip_above_the_norm], ids=["unclipped", "within_the_norm"])
@pytest.mark.parametrize("backwards", [2, 4])
def test_what_was_begun_in_the_last_of_several_backwards_is_used(host_world, backwards, between, faults):
    sections = {"optimizer": SPARE, "debug": {"faults": faults}}
    used, in_vain = run_offloaded(host_world, 6, between, backwards, **sections)
    assert used >= 5, "hardly anything was foreseen"
    # In the first two steps it is not known yet how many backwards there are, and that norms are wanted.
    assert in_vain <= 2 * 8


def test_checkpointed_blocks_and_tied_weights_of_several_backwards(host_world):
    """Reentrant checkpoints run a backward of their own for each block; tied weights have two gradients in each."""

    def build() -> torch.nn.Module:
        model = stack(call=lambda block, x: checkpoint(block, x, use_reentrant=True))()
        model.layers[3].up.weight = model.layers[2].up.weight
        return model

    def script(run: Run) -> None:
        for step in range(6):
            for _ in range(1 + step // 2):
                loss_of(run).backward()
            run.record("norm", torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e9))
            if run.offloaded:
                begun.append([unit.begun for unit in testing.inspect(run.model).units])
            run.opt.step()
            run.opt.zero_grad()

    for faults in ("", "sums:up"):
        begun: list[list[bool]] = []
        compare(host_world, build, script, optimizer=SPARE, debug={"faults": faults})
        # Every second step has as many backwards as the one before. On a GPU a unit's last sums may still be on their way up.
        assert CUDA or [all(units) for units in begun[1::2]] == [True] * 3, begun


def settle(seconds: float = 0.05) -> None:
    """Give the runner the time that a GPU's backward would."""
    facts.rest(seconds)


def test_nothing_is_begun_without_spare_frames(ahead_world):
    assert run_offloaded(ahead_world, 3, lambda model: settle(), optimizer={"spare": "0B"}) == (0, 0)


def test_a_touched_gradient_is_in_vain(ahead_world):
    def touch(model):
        settle()
        for p in model.parameters():
            p.grad.mul_(1.0)

    used, in_vain = run_offloaded(ahead_world, 4, touch, optimizer=SPARE)
    assert used == 0
    assert in_vain > 0


def test_a_load_reads_no_states_back(host_world: World, monkeypatch: pytest.MonkeyPatch):
    """What was learned for the next update keeps no states: those that a load replaces are nobody's then."""
    read = []

    def counted(original):
        def detach(states):
            read.append(states)
            return original(states)

        return detach

    wrap(monkeypatch, "funicular.optim.state_places.StatePlaces.detach", counted)
    run = Run(host_world, True)
    run.model = run.wrap(stack()(), optimizer=SPARE)
    run.opt = run.adamw()
    for _ in range(3):
        loss_of(run).backward()
        if run.opt.state:
            run.opt.load_state_dict(run.opt.state_dict())
        run.opt.step()
        run.opt.zero_grad()
    assert not read
