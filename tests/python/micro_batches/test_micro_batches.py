"""Blocks over slices of the batch: the bits of the same slices in plain PyTorch, and few bytes over the link."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import funicular
from models import WIDTH, Block, Decoder, DecoderBlock, Stack, stack
from mutations import break_
from sliced import close, compare
from twin import Mismatch, Run, play, same

ROWS = 2
TIERS = pytest.mark.parametrize("tier", ["hbm", "host"])


def decoder(**more):
    return lambda: Decoder(dropout=0.2, **more)


def five_rows(run: Run, steps: int = 3) -> None:
    """The last slice is shorter; dropout draws."""
    for _ in range(steps):
        run.step(run.model(run.tokens(5, 9)))


@pytest.mark.covering(2)
@TIERS
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_train(rows, tier, world):
    compare(world, stack(), lambda run: run.train(3), rows=rows, tier=tier)


@pytest.mark.covering(2)
@TIERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", [False, True])
def test_dropout_and_short_slices(tie, dtype, tier, world):
    compare(world, decoder(tie=tie, dtype=dtype), five_rows, tier=tier)


def test_one_slice_is_plain_torch(world):
    """Where the batch is one slice, nothing differs from the model as it is: recomputation draws the same numbers."""
    plain = play(world, decoder(), five_rows, False, 3, {})
    paged = play(world, decoder(), five_rows, True, 3, {"activations": {"micro_batch": 8}})
    assert all(a[0] == b[0] and same(a[1], b[1]) for a, b in zip(plain.notes, paged.notes, strict=True))


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_close_to_the_whole_batch(rows, host_world):
    close(host_world, stack(), (4, WIDTH), rows)


def test_sums_are_in_fp32(host_world):
    """bf16 gradients summed in bf16 would be others: the comparison can fail."""
    with break_("round_every_slice"), pytest.raises(Mismatch):
        compare(host_world, decoder(dtype=torch.bfloat16), five_rows, rows=1)


def test_random_numbers_are_restored(host_world):
    with break_("skip_random_restore"), pytest.raises(Mismatch):
        compare(host_world, decoder(), five_rows)


def test_autocast(two_worlds):
    def script(run: Run) -> None:
        for _ in range(3):
            with torch.autocast(run.device.type, torch.bfloat16):
                loss = run.model(run.data(5, 3, WIDTH)).float().square().mean()
            run.step(loss)

    compare(two_worlds, stack(), script)


def test_accumulated(two_worlds):
    """Several backwards a step, of batches of several sizes."""

    def script(run: Run) -> None:
        for _ in range(2):
            for rows in (4, 3, 1):
                run.model(run.data(rows, 3, WIDTH)).square().mean().backward()
            run.record_grads()
            run.opt.step()
            run.opt.zero_grad()

    compare(two_worlds, stack(), script)


def test_frozen(two_worlds):
    """Frozen blocks, frozen weights in a block, an input that needs no gradient."""

    def build():
        model = Stack()
        model.inp.requires_grad_(False)
        model.layers[1].requires_grad_(False)
        model.layers[3].up.requires_grad_(False)
        return model

    compare(two_worlds, build, lambda run: run.train(3))


def test_all_frozen_but_the_input(host_world):
    def script(run: Run) -> None:
        run.model.requires_grad_(False)
        x = run.data(4, WIDTH).requires_grad_()
        run.record("dx", torch.autograd.grad(run.model(x).square().mean(), x))

    compare(host_world, stack(), script)


class Masked(DecoderBlock):
    """Takes what Hugging Face blocks take: a mask of the batch, embeddings for all rows, flags."""

    def __init__(self):
        super().__init__(WIDTH, 4, False, 0.1)

    def forward(self, x, mask=None, position_embeddings=None, scale=None, flag=True, options=None):
        cos, sin = position_embeddings
        x = x * cos + x.flip(-1) * sin
        out = super().forward(x if mask is None else x * mask)
        return (out * scale, x.mean(-1), None, flag) if flag else (out,)


class MaskedStack(Stack):
    def forward(self, x):
        mask = (x[..., :1] > -1).float()
        angle = torch.arange(x.size(1), device=x.device, dtype=torch.float32)[None, :, None] / 7
        bias = self.inp.weight[:1, :1]  # shared by all rows, and differentiable
        x = self.inp(x)
        for layer in self.layers:
            x, _, _, flag = layer(x, mask, position_embeddings=(angle.cos(), angle.sin()), scale=bias.exp(), options={"a": [1, None]})  # fmt: skip
            assert flag is True
        return self.out(x)


class Positions(DecoderBlock):
    """Takes where each token stands, as transformers before 5 hands it on."""

    def __init__(self):
        super().__init__(WIDTH, 4, False, 0.1)

    def forward(self, x, cache_position):
        return super().forward(x * (1 + cache_position[:, None] / 7))


class PositionStack(Stack):
    def forward(self, x):
        positions = torch.arange(x.size(1), device=x.device)
        x = self.inp(x)
        for layer in self.layers:
            x = layer(x, cache_position=positions)
        return self.out(x)


def test_positions(two_worlds):
    def script(run: Run) -> None:
        for _ in range(2):
            run.step(run.model(run.data(5, 3, WIDTH)).square().mean())

    compare(two_worlds, lambda: PositionStack(Positions), script)


def test_positions_of_as_many_rows(host_world):
    """Where the sequence is as long as the batch, positions cannot be told from rows."""
    run = Run(host_world, True)
    run.model = run.wrap(PositionStack(Positions), activations={"micro_batch": 2})
    with pytest.raises(funicular.UsageError, match=r"FN-E120.*'cache_position'.*both 3 long"):
        run.model(run.data(3, 3, WIDTH))


def test_arguments_of_every_kind(two_worlds):
    def script(run: Run) -> None:
        for _ in range(2):
            run.step(run.model(run.data(5, 3, WIDTH)).square().mean())

    compare(two_worlds, lambda: MaskedStack(Masked), script, units={"match": ["layers.*"]})


class PassThrough(Block):
    """Gives an argument back, as T5 blocks do."""

    def forward(self, x, y):
        return super().forward(x + y), y


def test_arguments_that_come_back(two_worlds):

    class Two(Stack):
        def forward(self, x):
            x, y = self.inp(x), x * 2
            for layer in self.layers:
                x, z = layer(x, y)
                assert z is y
            return self.out(x), y

    close(two_worlds, lambda: Two(PassThrough), (4, WIDTH), rows=3)


class Inside(Block):
    reentrant = False

    def mlp(self, x):
        return F.dropout(self.down(F.gelu(self.up(x))), 0.2)

    def forward(self, x):
        return x + checkpoint(self.mlp, self.norm(x), use_reentrant=self.reentrant)


class InsideReentrant(Inside):
    reentrant = True


@TIERS
@pytest.mark.covering(2)
@pytest.mark.parametrize("block", [Inside, InsideReentrant], ids=lambda b: b.__name__)
def test_checkpoints_inside(block, tier, two_worlds):
    """The same numbers as without them."""

    class Plain(Block):
        def forward(self, x):
            return x + F.dropout(self.down(F.gelu(self.up(self.norm(x)))), 0.2)

    plain = compare(two_worlds, stack(Plain), lambda run: run.train(3), tier=tier)
    paged = play(two_worlds, stack(block), lambda run: run.train(3), True, 3, {"activations": {"micro_batch": ROWS, "tier": tier}})  # fmt: skip
    assert all(same(a[1], b[1]) for a, b in zip(plain.notes, paged.notes, strict=True))


@TIERS
@pytest.mark.covering(2)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_around(reentrant, tier, two_worlds):
    plain = compare(two_worlds, stack(), lambda run: run.train(3), tier=tier)
    build = stack(call=lambda b, x: checkpoint(b, x, use_reentrant=reentrant))
    paged = play(two_worlds, build, lambda run: run.train(3), True, 3, {"activations": {"micro_batch": ROWS, "tier": tier}})  # fmt: skip
    assert all(same(a[1], b[1]) for a, b in zip(plain.notes, paged.notes, strict=True))
