"""Blocks in micro-batches beside what users do with a model: hooks, copies, threads, budgets, interruptions."""

import copy
import functools
import gc
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import facts
import funicular
from funicular import testing
from models import CUDA, WIDTH, Block, Decoder, Linear, Stack, stack
from sliced import close, compare
from twin import Run, bits, play, same

TIERS = pytest.mark.parametrize("tier", ["hbm", "host"])


def test_hooks_of_the_user_see_the_whole_batch_once(host_world):
    """Hooks of the block, and of its weights: once per pass, with whole shapes and whole gradients."""
    seen = []

    def script(run: Run) -> None:
        block = run.model.layers[2]
        block.register_forward_pre_hook(lambda m, a: seen.append(("pre", tuple(a[0].shape))))
        block.register_forward_hook(lambda m, a, o: seen.append(("post", tuple(o.shape))) or o * 2)
        block.up.weight.register_hook(lambda g: seen.append("grad") or g * 0.5)
        block.up.weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
        run.train(2)

    compare(host_world, stack(), script)
    once = [("pre", (4, WIDTH)), ("post", (4, WIDTH)), "grad", "accumulated"]
    assert seen == once * 4


def test_full_backward_hooks(host_world):
    def script(run: Run) -> None:
        block = run.model.layers[2]
        block.register_full_backward_hook(lambda m, gi, go: (gi[0] * 0.5,))
        run.train(2)

    compare(host_world, stack(), script)


@TIERS
def test_weights_cross_the_link_once_per_pass(tier, host_world):
    """However many rows: one window per block and pass. Frames for one block, so nothing stays."""

    def bytes_up(rows, batch):
        run = Run(host_world, True)
        run.model = run.wrap(Stack(), frames=2, activations={"micro_batch": rows, "tier": tier} if rows else {"micro_batch": "off"})  # fmt: skip
        run.opt = run.adamw()
        for _ in range(3):
            run.step(run.model(run.data(batch, WIDTH)).square().mean(), look=False)
        stats = funicular.stats(run.model)
        assert stats.home_uses == 0
        funicular.unwrap(run.model)
        opened = stats.prefetch.hits + stats.prefetch.late + stats.prefetch.demand
        return opened, stats.links["host_to_device"].bytes

    opened, whole = bytes_up(None, 16)
    for rows in (1, 16):
        again, moved = bytes_up(rows, 16)
        assert again == opened
        # What is fetched ahead in vain depends on the moment.
        assert moved <= 1.25 * whole


def test_activations_paged_are_counted(two_worlds):
    run = Run(two_worlds, True)
    run.model = run.wrap(Stack(), activations={"micro_batch": 2, "tier": "host"})
    run.opt = run.adamw()
    before = funicular.stats(run.model).budgets["host"].used
    for _ in range(3):
        run.step(run.model(run.data(5, WIDTH)).square().mean(), look=False)
    stats = funicular.stats(run.model)
    # Four blocks, five rows, fp32.
    once = 4 * 5 * WIDTH * 4
    # Where copies have a stream of their own, the last two of a forward are still there when its backward begins.
    assert (stats.activations.bytes_out, stats.activations.bytes_in) == (
        3 * once,
        3 * (once * 2 // 4 if CUDA else once),
    )
    assert stats.activations.waiting == 0
    assert stats.budgets["host"].used - before == stats.activations.reserved > once
    assert f"{stats.activations.bytes_out / 1e9:.3f} GB out" in str(stats)


def test_memory_for_activations_does_not_grow(host_world):
    run = Run(host_world, True)
    run.model = run.wrap(Stack(), activations={"micro_batch": 2, "tier": "host"})
    run.opt = run.adamw()
    loss = None
    for _ in range(30):
        # The last loss is alive while the next forward runs.
        loss = run.model(run.data(4, 50, WIDTH)).square().mean()
        loss.backward()
        run.opt.step()
        run.opt.zero_grad()
    assert funicular.stats(run.model).activations.reserved <= (64 if CUDA else 1) << 20
    assert loss is not None


def test_a_budget_without_room_says_so(host_world):
    run = Run(host_world, True)
    model = Stack()
    need = 16 * sum(p.numel() for p in model.parameters()) + (2 << 20)
    run.model = run.wrap(model, activations={"micro_batch": 2, "tier": "host"}, budget={"host": f"{need}B"})
    with pytest.raises(funicular.BudgetError, match=r"FN-E202 .*wait in host memory.*budget\.host"):
        run.model(run.data(4, 4096, WIDTH))
    run.opt = run.adamw()
    run.train(1)


def test_a_view_that_a_hook_keeps_stays_right(host_world):
    """A hook inside a block keeps its input: the memory is not filled with other rows."""
    kept = []

    def script(run: Run) -> None:
        run.model.layers[1].norm.register_forward_hook(
            lambda m, a, o: kept.append((a[0].detach(), a[0].detach().clone()))
        )
        run.train(2)

    run = play(host_world, stack(), script, True, 3, {"activations": {"micro_batch": 2, "tier": "host"}})
    assert run.notes
    assert all(torch.equal(bits(a), bits(b)) for a, b in kept)


def test_retained_graph_and_second_backward(two_worlds):
    def script(run: Run) -> None:
        for _ in range(2):
            loss = run.model(run.tokens(5, 9))
            loss.backward(retain_graph=True)
            run.record_grads()
            loss.backward()
            run.record_grads()
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                loss.backward()
            run.opt.step()
            run.opt.zero_grad()

    for tier in ("hbm", "host"):
        compare(two_worlds, lambda: Decoder(dropout=0.2), script, tier=tier)


def test_only_some_gradients_are_asked_for(host_world):
    def script(run: Run) -> None:
        loss = run.model(run.data(4, WIDTH)).square().mean()
        run.record("some", torch.autograd.grad(loss, [run.model.layers[1].up.weight, run.model.inp.weight]))
        run.record_grads()
        run.model(run.data(4, WIDTH)).square().mean().backward(inputs=[run.model.layers[2].down.weight])
        run.record_grads()
        run.opt.step()
        run.opt.zero_grad()

    compare(host_world, stack(), script)


def test_eval_and_no_grad_run_whole(host_world):
    calls = []

    class Counts(Block):
        def forward(self, x):
            calls.append(len(x))
            return super().forward(x)

    run = Run(host_world, True)
    run.model = run.wrap(Stack(Counts, depth=2), activations={"micro_batch": 2})
    run.model.eval()
    with torch.no_grad():
        run.model(run.data(5, WIDTH))
    assert calls == [5, 5]
    run.model(run.data(5, WIDTH)).sum().backward()
    assert calls == [5, 5, 2, 2, 1, 2, 2, 1, 1, 2, 2, 1, 2, 2]
    run.model.train()
    with torch.no_grad():
        run.model(run.data(5, WIDTH))
    assert calls[14:] == [2, 2, 1, 2, 2, 1]


def test_a_block_called_with_other_weights(host_world):
    """``functional_call`` lends the model weights of the caller's: they get the gradients."""

    def script(run: Run) -> None:
        lent = {n: p.detach().clone().requires_grad_() for n, p in run.model.named_parameters()}
        out = torch.func.functional_call(run.model, lent, (run.data(4, WIDTH),))
        run.record("grads", torch.autograd.grad(out.square().mean(), list(lent.values())))
        run.record_grads()
        run.train(1)

    # On both sides whole: the plain one is not cut at all.
    plain = play(host_world, stack(), script, False, 3, {})
    paged = play(host_world, stack(), script, True, 3, {"activations": {"micro_batch": 8}})
    assert all(same(a[1], b[1]) for a, b in zip(plain.notes, paged.notes, strict=True))


class Held(Block):
    """Uses weights that it holds in a list: no module lends them."""

    def __init__(self):
        super().__init__()
        self.held = [self.up.weight]

    def forward(self, x):
        return x + self.down(F.gelu(self.norm(x) @ self.held[0].t() + self.up.bias))


def test_weights_held_elsewhere(host_world):
    """Their gradients arrive slice by slice, and none is lost."""
    close(host_world, stack(Held), (4, WIDTH))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x):
        return x + self.rnn(x)[0]


# cuDNN's, on a GPU: weights of a storage each are no single piece (docs/limits.md)
@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single:UserWarning")
def test_recurrent_blocks(host_world, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # as matrix products have it
    close(host_world, stack(Recurrent, depth=3), (4, 3, WIDTH))


def test_forward_that_the_user_replaces(host_world):
    """Before or after ``offload``: what the block's forward is when it is called is what runs, in slices."""
    rows = []

    def through(forward, layer, x):
        rows.append(len(x))
        return forward(layer, x)

    def script(run: Run) -> None:
        run.train(1)
        if run.offloaded:
            for layer in run.model.layers:
                layer.forward = functools.partial(through, type(layer).forward, layer)
        run.train(1)
        if run.offloaded:
            for layer in run.model.layers:
                del layer.forward
        run.train(1)

    compare(host_world, stack(), script)
    assert rows == [2] * 16


def test_copies_and_unwrapped_models_are_plain(host_world):
    run = Run(host_world, True)
    run.model = run.wrap(Stack(call=call_block), activations={"micro_batch": 2})
    x = run.data(4, WIDTH)
    want = run.model(x)
    for other in (copy.deepcopy(run.model), pickle.loads(pickle.dumps(run.model)), funicular.unwrap(run.model)):
        got = other(x)
        assert torch.allclose(got, want, atol=1e-5)
        got.sum().backward()
        assert "Sliced" not in graph_of(got)
    assert "_call_impl" not in run.model.layers[0].__dict__


def call_block(block, x):
    return block(x)


def graph_of(t):
    names, todo = set(), [t.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None:
            names.add(type(node).__name__)
            todo += [n for n, _ in node.next_functions]
    return " ".join(names)


def test_a_dropped_model_leaves_nothing(two_worlds):
    """No cycle through the blocks: memory and files go with the last user."""

    def once():
        run = Run(two_worlds, True)
        run.model = run.wrap(Stack(), activations={"micro_batch": 2, "tier": "host"})
        run.opt = run.adamw()
        run.train(2)
        return weakref.ref(run.model), weakref.ref(testing.inspect(run.model).session)

    once()
    gc.collect()
    files, threads = facts.open_files(), facts.threads()
    model, session = once()
    assert model() is None
    gc.collect()  # optimizers of torch are cycles
    assert session() is None
    assert facts.open_files() <= files
    assert facts.threads() <= threads
    assert not any(facts.files(path) for path in two_worlds.paths)


def test_two_threads(host_world):
    """One after the other through each block; gradients of both arrive."""
    run = Run(host_world, True)
    run.model = run.wrap(Stack(), activations={"micro_batch": 1})
    x = run.data(4, WIDTH)
    run.model(x).sum().backward()
    want = [p.grad.clone() for p in run.model.parameters()]
    run.model.zero_grad()
    params = list(run.model.parameters())
    errors = []

    def work():
        try:
            for _ in range(3):
                torch.autograd.grad(run.model(x).sum(), params)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
    run.model(x).sum().backward()
    assert all(torch.equal(p.grad, w) for p, w in zip(run.model.parameters(), want, strict=True))


def test_interrupted_in_the_middle(two_worlds):
    """An exception in some slice, forward or backward; then training goes on as if it had not been."""

    class Fails(Linear):
        fail = 0

        def forward(self, x):
            type(self).fail -= 1
            if type(self).fail == 0:
                raise KeyboardInterrupt
            return super().forward(x)

    class Block2(Block):
        def __init__(self):
            super().__init__()
            self.up = Fails(WIDTH, WIDTH, bias=True)

    def script(run: Run) -> None:
        run.train(1)
        if run.offloaded:
            for at in (9, 16):
                Fails.fail = at
                with pytest.raises(KeyboardInterrupt):
                    run.model(torch.ones(4, WIDTH, device=run.device)).sum().backward()
                run.opt.zero_grad()
        run.train(2)

    for tier in ("hbm", "host"):
        compare(two_worlds, stack(Block2), script, tier=tier)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_frames_are_not_taken_for_edited(how, rows, host_world, monkeypatch):
    """The runtime's own ways past the version counters must not cost a look at every weight in every window."""
    touched = []
    monkeypatch.setattr("funicular.guard.classes.touch", lambda ref: touched.append(ref.name))
    run = Run(host_world, True)
    run.model = run.wrap(Stack(), activations={"micro_batch": rows or "off"})
    run.opt = run.adamw()
    if how == "compiled":
        for block in run.model.layers:
            block.forward = torch.compile(block.forward, backend="aot_eager")
        run.train(1)
        touched.clear()  # a compiler looks once
    run.train(2)
    assert touched == []
