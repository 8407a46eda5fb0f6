"""Code that looks at what a parameter is before it uses it: offloaded parameters answer as ordinary ones, or with an error by name."""

import copy
import multiprocessing
import pickle
import queue

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import funicular
from funicular import testing
from models import CUDA, WIDTH, Block, Stack, stack
from mutations import wrap
from twin import Run, case, compare

pytestmark = pytest.mark.io_engines

# ------------------------------------------------------------------ by requires_grad

#: torch folds a batch into one product, or does not, by whether the weight needs a gradient
USES = {
    "linear": lambda x, w, b: F.linear(x, w, b),
    "linear_turned": lambda x, w, b: F.linear(x.transpose(1, 2).contiguous().transpose(1, 2), w, b),
    "matmul": lambda x, w, b: x @ w.t() + b,
    "matmul_turned": lambda x, w, b: torch.matmul(x.transpose(0, 1), w) + b,
    "flat": lambda x, w, b: F.linear(x[0], w, b),
    "vector": lambda x, w, b: torch.mv(w, x[0, 0]) + b,
    "einsum": lambda x, w, b: torch.einsum("bij,kj->bik", x, w) + b,
    "conv": lambda x, w, b: F.conv1d(x.transpose(1, 2), w[:, :, None], b),
    "attention": lambda x, w, b: F.scaled_dot_product_attention(x, w[None].expand(len(x), -1, -1), x @ w),
}


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "enable_grad"])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("frozen", [False, True])
def test_weight_used_outside_of_its_module(use, mode, frozen, host_world):
    def script(run: Run) -> None:
        block = run.model.layers[1]
        x = run.data(2, WIDTH, WIDTH)
        with getattr(torch, mode)():
            run.record("plain order", USES[use](x, block.up.weight, block.up.bias).clone())
            run.record("turned", USES[use](x.transpose(1, 2), block.up.weight, block.up.bias).clone())

    def build() -> nn.Module:
        return stack()().requires_grad_(not frozen)

    compare(host_world, build, script)


# ------------------------------------------------------------------ by has_torch_function


def encoder() -> nn.Module:
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, batch_first=True)
    return nn.TransformerEncoder(layer, 4)


class Alone(nn.Module):
    """Encoder layers that are no units: their weights are used from the outside of the layers' own modules."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, batch_first=True)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor, src_key_padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.first(x, src_key_padding_mask=src_key_padding_mask)
        x, _ = self.attention(x, x, x, key_padding_mask=src_key_padding_mask, need_weights=False)
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.covering(2)
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "enable_grad"])
@pytest.mark.parametrize("build", [encoder, Alone])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_fast_paths_of_transformers(build, mode, masked, world):
    def script(run: Run) -> None:
        x = run.data(2, 5, WIDTH)
        mask = torch.zeros(2, 5, dtype=torch.bool, device=x.device)
        mask[1, 3:] = True
        run.model.eval()
        with getattr(torch, mode)():
            for _ in range(12):  # Python rewrites what it has run often
                out = run.model(x, src_key_padding_mask=mask if masked else None)
                run.record("rows", out.clone())
        run.model.train()
        for module in run.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
        run.step(run.model(x, src_key_padding_mask=mask if masked else None).square().mean())

    def prepared(run: Run) -> None:
        run.opt = run.adamw()
        script(run)

    compare(world, build, prepared)


def test_questions_and_operations_on_one_line(host_world):
    """Only the question is answered; operations beside it wait as ever."""

    def script(run: Run) -> None:
        w = run.model.layers[2].up.weight
        for _ in range(12):
            run.train(1)
            with torch.no_grad():
                asked = (torch.overrides.has_torch_function((w, w)), torch.overrides.has_torch_function_unary(w))
                sums = (w.sum(), torch.overrides.has_torch_function((w.detach() * 2,)), (w + 1).sum())
            assert asked == (False, False)
            run.record("sums", [sums[0], sums[2]])

    compare(host_world, stack(), script)


# ------------------------------------------------------------------ parameters of parameters


def under(run: Run, where: str, act) -> None:
    """Do something outside of a layer's window, or inside of it."""
    if where == "outside":
        act()
        return
    hook = run.model.layers[2].register_forward_pre_hook(lambda *_: act())
    run.model(run.data(4, WIDTH))
    hook.remove()


@pytest.mark.covering(2)
@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("how", ["parameter", "data", "copy", "embedding", "list", "frozen"])
def test_parameter_of_a_parameter(how, where, two_worlds):
    """It has the same memory, is a leaf of its own, and an ordinary parameter."""

    def script(run: Run) -> None:
        run.train(1)
        p = run.model.layers[2].up.weight
        made = []

        def make() -> None:
            made.append(
                {
                    "parameter": lambda: nn.Parameter(p),
                    "data": lambda: nn.Parameter(p.data),
                    "copy": lambda: copy.copy(p),
                    "embedding": lambda: nn.Embedding.from_pretrained(p, freeze=False).weight,
                    "list": lambda: nn.ParameterList([p.detach()])[0],
                    "frozen": lambda: nn.Parameter(p, requires_grad=False),
                }[how]()
            )

        under(run, where, make)
        q = made[0]
        assert type(q) is nn.Parameter
        assert q.requires_grad == (how != "frozen")
        assert q is not p
        run.record("value", q.detach().clone())
        if how != "frozen":
            (q * 2).sum().backward()
            run.record("gradient", q.grad)
            q.grad = None
        with torch.no_grad():
            q.mul_(0.5)
        run.record("edited", p.detach().clone())
        del q
        made.clear()
        run.train(2)

    compare(two_worlds, stack(), script)


def test_class_of_a_parameter(host_world):
    run = Run(host_world, True)
    run.model = run.wrap(Stack())
    kinds = []
    under(run, "inside", lambda: kinds.append(type(run.model.layers[2].up.weight)))
    kinds.append(type(run.model.layers[2].up.weight))
    assert all(issubclass(kind, nn.Parameter) and kind is not nn.Parameter for kind in kinds)
    assert isinstance(run.model.layers[2].up.weight, nn.Parameter)


def test_text_of_a_parameter(two_worlds):
    plain = Stack()
    run = Run(two_worlds, True)
    run.model = run.wrap(Stack())
    run.model.load_state_dict(plain.state_dict())
    plain.to(run.device)
    for trained in (True, False):
        for model in (plain, run.model):
            model.inp.requires_grad_(trained)
        assert [repr(p) for p in run.model.parameters()] == [repr(p) for p in plain.parameters()]
        assert str(run.model.inp.bias) == str(plain.inp.bias)


def test_class_of_a_parameter_makes_ordinary_ones(host_world):
    run = Run(host_world, True)
    run.model = run.wrap(Stack())
    p = run.model.layers[2].up.weight
    made = []
    under(run, "inside", lambda: made.append(type(p)(torch.ones(3))))
    made += [type(p)(torch.ones(3)), type(p)(torch.ones(3), requires_grad=False), type(p)(p)]
    assert all(type(q) is nn.Parameter for q in made)
    assert float(made[0].detach().sum()) == 3
    assert [q.requires_grad for q in made] == [True, True, False, True]


@case(stack(block=lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())))
def test_copied_gradient(run: Run):
    run.model(run.data(4, WIDTH)).sum().backward()
    g = run.model.layers[2][0].weight.grad
    c = copy.copy(g)
    c.mul_(2)
    run.record("both", [g, c])
    run.model.zero_grad()
    run.model(run.data(4, WIDTH)).sum().backward()
    run.record("kept", c)


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    "norm",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
    ],
    ids=["weight", "spectral", "orthogonal", "old_weight", "old_spectral"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_parametrised_after_offload(norm, two_worlds):
    def script(run: Run) -> None:
        torch.manual_seed(5)
        norm(run.model.layers[1][0])
        run.opt = run.adamw()
        for _ in range(3):
            run.step(run.model(run.data(4, WIDTH)).square().mean())
        run.model.eval()
        with torch.no_grad():
            run.record("eval", run.model(run.data(4, WIDTH)))

    compare(two_worlds, stack(block=lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())), script)


# ------------------------------------------------------------------ order in memory


def images(channels: int = 8, kernel: int = 3, layers: int = 5) -> nn.Module:
    return nn.Sequential(*[nn.Conv2d(channels, channels, kernel, padding=kernel // 2) for _ in range(layers)])


@pytest.mark.parametrize("kernel", [1, 3])
def test_memory_format_after_offload(kernel, host_world):
    run = Run(host_world, True)
    run.model = run.wrap(images(kernel=kernel))
    before = {k: (v.clone(), v.stride()) for k, v in run.model.state_dict().items()}
    with pytest.raises(funicular.UsageError, match="FN-E115.*memory_format"):
        run.model.to(memory_format=torch.channels_last)
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, before[name][0]), name
        assert value.stride() == before[name][1], name
    run.model.to(memory_format=torch.contiguous_format)
    run.model.to(torch.float32)
    run.model(torch.randn(2, 8, 5, 5).to(run.device)).sum().backward()


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_data_in_another_order(where, host_world):
    run = Run(host_world, True)
    run.model = run.wrap(stack()())
    p = run.model.layers[2].up.weight
    value = p.detach().clone()
    with pytest.raises(funicular.UsageError, match="FN-E115.*strides"):
        under(run, where, lambda: setattr(p, "data", value.t().contiguous().t() * 2))
    assert torch.equal(p.detach(), value)
    p.data = value * 2
    assert torch.equal(p.detach(), value * 2)


def test_memory_format_before_offload(host_world):
    def build() -> nn.Module:
        return images().to(memory_format=torch.channels_last)

    def script(run: Run) -> None:
        assert run.model[0].weight.is_contiguous(memory_format=torch.channels_last)
        run.opt = run.adamw()
        for _ in range(2):
            run.step(run.model(run.data(2, 8, 5, 5)).square().mean())

    compare(host_world, build, script)


def test_conversion_that_replaces_parameters(host_world):
    run = Run(host_world, True)
    run.model = run.wrap(Stack())
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with pytest.raises(funicular.UsageError, match="FN-E115.*overwrite_module_params"):
            run.model.float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    run.model.float()
    assert testing.inspect(run.model).units[0].parameters[0].parameter is next(run.model.parameters())


# ------------------------------------------------------------------ other processes


def blocks() -> nn.Module:
    """A model that a child process can import."""
    torch.manual_seed(4)
    return nn.Sequential(*[Block() for _ in range(6)])


def _answer(model: nn.Module, optimizer: object, results) -> None:
    x = torch.ones(1, WIDTH)
    grads = [p.grad for p in model.parameters()]
    kinds = sorted({type(p).__name__ for p in model.parameters()})
    results.put((model(x).detach().tolist(), kinds, [None if g is None else g.sum().item() for g in grads]))


@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize("with_grads", [False, True])
def test_model_as_argument_of_a_process(method, with_grads, two_worlds):
    if CUDA:
        pytest.skip("compares on the host")
    context = multiprocessing.get_context(method)

    def answer(run: Run):
        if with_grads:
            run.model(torch.ones(2, WIDTH)).square().mean().backward()
        if not run.offloaded:  # an ordinary model answers there as its pickled copy does here
            here = queue.SimpleQueue()
            _answer(pickle.loads(pickle.dumps(run.model)), None, here)
            return here.get()
        results = context.SimpleQueue()
        process = context.Process(target=_answer, args=(run.model, None, results))
        process.start()
        got = results.get()
        process.join()
        assert process.exitcode == 0
        return got

    plain, paged = Run(two_worlds, False), Run(two_worlds, True)
    plain.model, paged.model = plain.wrap(blocks()), paged.wrap(blocks())
    assert answer(plain) == answer(paged)
    paged.model(torch.ones(2, WIDTH)).sum().backward()  # goes on


class Items(torch.utils.data.Dataset):
    """A dataset that computes with a model in its workers."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> torch.Tensor:
        with torch.no_grad():
            return self.model(torch.full((WIDTH,), float(i)))


@pytest.mark.slow
def test_workers_that_hold_the_model(host_world):
    if CUDA:
        pytest.skip("compares on the host")

    def script(run: Run) -> None:
        run.step(run.model(run.data(4, WIDTH)).square().mean())
        # An ordinary model gives the same items without a worker.
        workers = {"num_workers": 1, "multiprocessing_context": "spawn"} if run.offloaded else {}
        loader = torch.utils.data.DataLoader(Items(run.model), batch_size=2, **workers)
        run.record("items", [batch.clone() for batch in loader])
        run.step(run.model(run.data(4, WIDTH)).square().mean())

    compare(host_world, blocks, script)


def test_classes_of_parameters(host_world):
    """A parameter is of its own classes alone, and a tensor that is marked as a parameter is no offloaded one: not so by itself in torch 2.4."""
    run = Run(host_world, True)
    run.model = run.wrap(blocks())
    parameters = list(run.model.parameters())
    assert all(isinstance(p, nn.Parameter) for p in parameters)
    assert not any(isinstance(p, nn.UninitializedParameter) for p in parameters)
    marked = torch.zeros(2)
    marked._is_param = True
    assert isinstance(marked, nn.Parameter)
    assert not isinstance(marked, type(parameters[0]))


# ------------------------------------------------------------------ compiled functions


def scaled(t):
    return t / t.norm()


# torch's own, at the first import of its compiler on newer Pythons
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("what", ["parameter", "gradient", "list"])
@pytest.mark.parametrize("ran", [False, True])
def test_graphs_that_must_be_whole(what, ran, host_world):
    """An error by name, whether or not the model has run; in parts the function runs."""
    run = Run(host_world, True)
    run.model = run.wrap(Stack())
    p = run.model.layers[1].up.weight
    p.grad = torch.ones_like(p)
    if ran:
        run.model.zero_grad()
        run.model(run.data(4, WIDTH)).sum().backward()
    if what == "gradient" and not ran:
        pytest.skip("an ordinary tensor")
    given = {"parameter": p, "gradient": p.grad, "list": [p, p]}[what]
    function = (lambda ts: ts[0] / ts[1].norm()) if what == "list" else scaled
    torch._dynamo.reset()
    with torch.no_grad():
        with pytest.raises(Exception, match="FN-E127"):
            torch.compile(function, backend="eager", fullgraph=True)(given)
        want = function(given)
        assert torch.equal(torch.compile(function, backend="eager")(given), want)
        whole = torch.compile(scaled, backend="eager", fullgraph=True)
        assert torch.equal(whole(p.detach()), p / p.norm())
        if what == "gradient":
            assert torch.equal(whole(p.grad.clone()), want)
    torch._dynamo.reset()


# ------------------------------------------------------------------ the learned order, steps of other threads


def test_filling_frames_anew_is_no_use(host_world):
    """What brings an edit into frames that others look at leaves what the runtime counts and learns of openings alone."""
    run = Run(host_world, True)
    run.model = run.wrap(Stack())
    run.opt = run.adamw()
    run.train(3)
    engine = testing.inspect(run.model).engine
    before = engine.stats()["prefetch"]
    kept = []
    hook = run.model.layers[0].register_forward_pre_hook(lambda m, _: kept.append(m.up.weight.detach()))
    run.model(run.data(4, WIDTH))
    hook.remove()
    opened = [a - b for a, b in zip(engine.stats()["prefetch"][:3], before[:3], strict=True)]
    with torch.no_grad():
        run.model.layers[0].up.weight.mul_(0.5)
    assert torch.equal(kept[0], run.model.layers[0].up.weight)
    assert [a - b for a, b in zip(engine.stats()["prefetch"][:3], before[:3], strict=True)] == opened


def test_edits_of_other_threads_that_never_end(host_world, monkeypatch):
    """A weight that is edited each time it is about to be saved: an error by name, not torch's about a hook."""
    run = Run(host_world, True)
    run.model = run.wrap(Stack())
    w = run.model.layers[2].up.weight
    tries = []

    def editing(pack):
        def edited(self, tensor):
            tries.append(tensor)
            with torch._C.DisableTorchFunctionSubclass():
                torch.autograd.graph.increment_version(w)
            return pack(self, tensor)

        return edited

    wrap(monkeypatch, "funicular.windows.leases.LeaseHooks.pack", editing)
    with pytest.raises(funicular.UsageError, match="FN-E118"):
        w * w
    monkeypatch.undo()
    assert len(tries) >= 1000
    (w * w).sum().backward()


def test_errors_of_operations_are_raised_at_once(host_world):
    run = Run(host_world, True)
    run.model = run.wrap(Stack())
    with pytest.raises(RuntimeError, match="shape|size"):
        run.model.layers[2].up.weight @ torch.randn(WIDTH + 1, 2).to(run.device)
