"""Weights changed, read, copied, saved and loaded by the user, at any moment."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models import WIDTH, Block, Decoder, Stack, stack
from twin import Run, World, case, compare, match

EDITS = {
    "mul": lambda p, t: p.mul_(0.9),
    "add": lambda p, t: p.add_(t, alpha=0.01),
    "copy": lambda p, t: p.copy_(t / 8),
    "fill": lambda p, t: p.fill_(0.01),
    "clamp": lambda p, t: p.clamp_(-0.1, 0.1),
    "init": lambda p, t: nn.init.constant_(p, 0.02),
    "index": lambda p, t: p.__setitem__(0, 0.5),
    "row": lambda p, t: p[1:2].mul_(2),
    "view": lambda p, t: p.view(-1)[::3].zero_(),
    "masked": lambda p, t: p.masked_fill_(t > 1, 0.0),
    "data_mul": lambda p, t: p.data.mul_(0.9),
    "data_copy": lambda p, t: p.data.copy_(t / 8),
    "data_index": lambda p, t: p.data.__setitem__(0, 0.5),
    "data_row": lambda p, t: p.data[1:2].mul_(2),
    "detach_mul": lambda p, t: p.detach().mul_(0.9),
    "out": lambda p, t: torch.mul(p, 0.9, out=p.data),
    "foreach": lambda p, t: torch._foreach_mul_([p], 0.9),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("edit", EDITS)
def test_edit_between_steps(edit, world):
    """Edits reach the next forward, the next update and the master copy."""

    def script(run: Run) -> None:
        run.train(2)
        with torch.no_grad():
            for i in (0, 2, 3):
                p = run.model.layers[i].up.weight
                EDITS[edit](p, run.data(*p.shape))
        run.record_weights()
        run.train(2)

    compare(world, stack(), script)


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("edit", ["mul", "data_mul", "copy", "data_copy", "row"])
def test_edit_of_a_split_master(edit, dtype, world):
    """An edited bf16 weight takes its master along, one that was not edited keeps its remainder."""

    def script(run: Run) -> None:
        run.train(2)
        with torch.no_grad():
            for layer in run.model.layers[::2]:
                p = layer.up.weight
                EDITS[edit](p, run.data(*p.shape, dtype=dtype))
        run.train(2)

    compare(world, lambda: Decoder(dtype=dtype), script)


@case(stack())
def test_assign_data(run: Run):
    """``p.data = t``: the weight takes the values; later steps train on them."""
    run.train(2)
    for i in (0, 3):
        p = run.model.layers[i].down.weight
        p.data = run.data(*p.shape) / 8
    run.record_weights()
    run.train(2)


@case(stack())
def test_edit_between_forward_and_backward(run: Run):
    """Torch refuses the backward if the weight was saved; so do we, and the next step works."""
    loss = run.model(run.data(4, WIDTH)).square().mean()
    with torch.no_grad():
        run.model.layers[2].up.weight.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    run.opt.zero_grad()
    run.train(2)


@case(stack())
def test_edit_between_backward_and_step(run: Run):
    for _ in range(2):
        run.model(run.data(4, WIDTH)).square().mean().backward()
        with torch.no_grad():
            for p in run.model.parameters():
                p.mul_(0.99)
        run.opt.step()
        run.opt.zero_grad()


@case(stack())
def test_edit_right_after_step(run: Run):
    """The update may still be under way when the edit comes."""
    for i in range(4):
        run.train(1, look=False)
        with torch.no_grad():
            run.model.layers[i].up.weight.mul_(0.5)
            run.model.layers[3 - i].up.weight[0].zero_()


class EditsInside(Block):
    """Normalises its weight in forward, before use."""

    def forward(self, x):
        with torch.no_grad():
            self.up.weight.div_(self.up.weight.norm(dim=1, keepdim=True))
        return super().forward(x)


@case(stack(EditsInside))
def test_edit_inside_forward(run: Run):
    run.train(3)
    run.model.eval()
    with torch.no_grad():
        run.record("eval", run.model(run.data(4, WIDTH)))


class EditsAfterUse(Block):
    def forward(self, x):
        y = super().forward(x)
        with torch.no_grad():
            self.up.bias.add_(0.125)  # an addition saves nothing for backward
        return y


@case(stack(EditsAfterUse))
def test_edit_inside_forward_after_use(run: Run):
    run.train(3)


@case(stack())
def test_reads_right_after_step(run: Run):
    """Every way of reading waits for the update."""
    for _ in range(3):
        run.train(1, look=False)
        w = [layer.up.weight for layer in run.model.layers]
        run.record("norms", torch._foreach_norm(w))
        run.record("item", w[0][0, 0].item())
        run.record("list", w[3].tolist()[3])
        run.record("stack", torch.stack(w).sum())
        run.record("detach", w[2].detach())
        run.record("data", w[3].data)
        run.record("clone", w[1].clone())
        run.record("vector", nn.utils.parameters_to_vector(run.model.parameters()))
        run.record("compare", bool((w[1] > 0).any()))
        run.record("dlpack", torch.from_dlpack(w[0].detach()))


@case(stack())
def test_reads_do_not_disturb(run: Run):
    """Shape, type, device and count are the truth at every moment, inside and outside forward."""
    facts = []

    def look(*_):
        facts.append(
            [(p.shape, p.numel(), p.dtype, p.stride(), p.device.type, p.requires_grad) for p in run.model.parameters()]
        )

    run.model.layers[3].register_forward_hook(look)
    run.model.layers[3].register_full_backward_hook(look)
    look()
    run.train(2)
    look()
    assert all(f == facts[0] for f in facts)
    assert facts[0][0][4] == run.device.type
    run.model.layers[3]._forward_hooks.popitem()
    run.model.layers[3]._backward_hooks.popitem()


@case(stack())
def test_vector_to_parameters(run: Run):
    run.train(1)
    vector = nn.utils.parameters_to_vector(run.model.parameters()).detach()
    nn.utils.vector_to_parameters(vector * 0.9, run.model.parameters())
    run.train(2)


@case(stack())
def test_state_dict_right_after_step(run: Run):
    for _ in range(3):
        run.train(1, look=False)
        run.record("state", {k: v.clone() for k, v in run.model.state_dict().items()})


@case(stack())
def test_state_dict_is_live(run: Run):
    """As in torch, its tensors share memory with the weights: a snapshot needs a copy."""
    run.train(1)
    state = copy.deepcopy(run.model.state_dict())
    run.train(2)
    run.record("snapshot", state)
    run.model.load_state_dict(state)
    run.train(2)


@pytest.mark.covering(2)
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_load_state_dict(assign, dtype, world):
    """Loaded after the wrap and after the optimizer's first steps: all tiers take the values."""

    def script(run: Run) -> None:
        run.train(2)
        torch.manual_seed(99)
        other = Decoder(dtype=dtype).to(run.device).state_dict()
        run.model.load_state_dict(other, assign=assign)
        if assign:  # torch makes new parameters: the optimizer must be told
            run.opt = run.adamw()
        run.train(2)

    if assign:
        exact_or_refused(world, lambda: Decoder(dtype=dtype), script)
    else:
        compare(world, lambda: Decoder(dtype=dtype), script)


def exact_or_refused(world: World, build, script) -> None:
    """Exact, or refused by name."""
    import funicular

    try:
        compare(world, build, script)
    except funicular.Error as error:
        assert "FN-E1" in str(error)


@case(stack())
def test_load_part(run: Run):
    run.train(1)
    part = {"layers.2.up.weight": run.data(WIDTH, WIDTH), "out.bias": run.data(WIDTH)}
    missing = run.model.load_state_dict(part, strict=False)
    run.record("missing", sorted(missing.missing_keys))
    run.train(2)


@case(stack())
def test_save_and_load_through_a_file(run: Run):
    run.train(2)
    file = io.BytesIO()
    torch.save(run.model.state_dict(), file)
    run.train(2)
    file.seek(0)
    run.model.load_state_dict(torch.load(file, weights_only=True, map_location=run.device))
    run.train(1)


@case(stack())
def test_loaded_file_fits_a_plain_model(run: Run):
    run.train(2)
    file = io.BytesIO()
    torch.save(run.model.state_dict(), file)
    file.seek(0)
    plain = Stack()
    plain.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
    run.record_weights(plain)


@case(stack())
def test_deepcopy_is_independent(run: Run):
    run.train(2)
    twin = copy.deepcopy(run.model)
    run.train(2)
    run.record_weights(twin)
    assert all(type(p) is nn.Parameter for p in twin.parameters())
    run.record("out", twin(run.data(4, WIDTH)))
    twin(run.data(4, WIDTH)).square().mean().backward()
    run.record("grads", [p.grad for p in twin.parameters()])
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    run.train(1)


@case(lambda: Decoder(tie=True))
def test_deepcopy_keeps_ties(run: Run):
    twin = copy.deepcopy(run.model)
    assert twin.head.weight is twin.embed.weight
    run.record("out", twin.eval()(run.tokens(2, 9)))


@case(stack())
def test_deepcopy_of_a_block_and_of_a_weight(run: Run):
    run.train(1, look=False)
    block = copy.deepcopy(run.model.layers[3])
    weight = copy.deepcopy(run.model.layers[1].up.weight)
    run.train(1)
    run.record_weights(block)
    run.record("weight", weight)
    run.record("out", block(run.data(2, WIDTH)))


@case(Decoder)
def test_pickle(run: Run):
    """A pickled model is a plain resident one."""
    run.train(2, look=False)
    other = pickle.loads(pickle.dumps(run.model))
    run.train(1)
    run.record_weights(other)
    run.record("loss", other.eval()(run.tokens(2, 9)))
    assert type(other) is Decoder


@case(Decoder)
def test_torch_save_model(run: Run):
    run.train(1, look=False)
    file = io.BytesIO()
    torch.save(run.model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    run.record_weights(other)
    run.train(1)


@case(stack())
def test_ema_averaged_model(run: Run):
    ema = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(4):
        run.train(1, look=False)
        ema.update_parameters(run.model)
    run.record_weights(ema.module)
    run.record("out", ema(run.data(4, WIDTH)))


@case(stack())
def test_ema_by_hand(run: Run):
    shadow = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    for _ in range(4):
        run.train(1, look=False)
        with torch.no_grad():
            for name, p in run.model.named_parameters():
                shadow[name].lerp_(p, 0.1)
    run.record("shadow", shadow)


@case(stack())
def test_ema_swap(run: Run):
    """Averaged weights swapped in for evaluation, and out again."""
    shadow = [p.detach().clone() for p in run.model.parameters()]
    for _ in range(3):
        run.train(1, look=False)
        with torch.no_grad():
            torch._foreach_lerp_(shadow, list(run.model.parameters()), 0.2)
            kept = [p.detach().clone() for p in run.model.parameters()]
            for p, s in zip(run.model.parameters(), shadow):
                p.copy_(s)
            run.record("eval", run.model(run.data(4, WIDTH)))
            for p, k in zip(run.model.parameters(), kept):
                p.copy_(k)


@case(stack())
def test_pruning_masks(run: Run):
    masks = [(run.data(*p.shape) > 0).float() for p in run.model.parameters()]
    for _ in range(3):
        with torch.no_grad():
            for p, mask in zip(run.model.parameters(), masks):
                p.mul_(mask)
        run.train(1)


@case(stack())
def test_apply_and_reinit(run: Run):
    run.train(1)

    def reset(module):
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            module.reset_parameters()

    torch.manual_seed(5)
    run.model.apply(reset)
    run.train(2)


@pytest.mark.parametrize("when", ["before", "after"])
def test_master_survives_a_look(when, world):
    """Reading or copying a bf16 weight onto itself does not round its master."""

    def script(run: Run) -> None:
        for _ in range(4):
            run.train(1, look=False)
            if run.offloaded == (when == "before"):
                for p in run.model.parameters():
                    p.detach().sum()
                run.model.state_dict()

    compare(world, lambda: Decoder(dtype=torch.bfloat16), script)


def test_same_seed_same_bits(nvme_world):
    runs = []
    for _ in range(2):
        run = Run(nvme_world, True)
        run.model = run.wrap(Decoder(True))
        run.opt = run.adamw()
        run.train(4)
        run.record_weights()
        runs.append(run.notes)
    match(*runs)
