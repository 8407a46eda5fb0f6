"""Weights for and from others: files of other programs into the tiers, and checkpoints into other programs."""

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import begin, build, go_on
from torch import nn

import children
import facts
import funicular
from conftest import PLACEMENTS
from hf_models import MODELS, VOCAB
from models import WIDTH, Decoder, Stack
from twin import Run, World, match, play

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def on_meta(make: Any) -> nn.Module:
    with torch.device("meta"):
        return make()


def offloaded_from(world: World, make: Any, path: Path, **sections: Any) -> Run:
    run = Run(world, True)
    shape = make()
    model = on_meta(make)
    run.model = funicular.offload(model, world.policy(shape, **sections), checkpoint=path)
    assert run.model is model
    run.opt = run.adamw()
    return run


def seen(run: Run) -> list[tuple[str, Any]]:
    """Three steps on data that do not depend on what was before: losses, gradients and weights."""
    run.notes.clear()
    run.generator = torch.Generator().manual_seed(99)
    torch.manual_seed(4)
    run.train(3)
    run.record_weights()
    return list(run.notes)


def train_tokens(run: Run, steps: int = 2) -> None:
    for _ in range(steps):
        tokens = 2 + run.tokens(2, 9, below=VOCAB - 2)
        run.step(run.model(input_ids=tokens, labels=tokens, use_cache=False).loss)


@pytest.mark.covering(1)
@pytest.mark.parametrize("form", ["one file", "shards", "a checkpoint", "no index"])
def test_from_files(form: str, two_worlds: World, tmp_path: Path):
    """Train on from any layout as from the model itself; the model was never there as a whole."""
    plain = Run(two_worlds, False)
    plain.model = build().to(plain.device)
    plain.opt = plain.adamw()
    path = tmp_path / "w"
    weights = {n: p.detach().cpu().clone() for n, p in plain.model.named_parameters()}
    if form == "one file":
        path = tmp_path / "any-name.safetensors"
        save_file(weights, path)
    elif form == "a checkpoint":
        funicular.save(plain.model, None, path)
    else:
        path.mkdir()
        names = list(weights)
        index = {}
        for k in range(3):
            part = {n: weights[n] for n in names[k::3]}
            save_file(part, path / f"model-0000{k + 1}-of-00003.safetensors")
            index |= dict.fromkeys(part, f"model-0000{k + 1}-of-00003.safetensors")
        if form == "shards":
            (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    expected = seen(plain)
    paged = offloaded_from(two_worlds, build, path)
    assert paged.model.head.weight is paged.model.embed.weight
    match(expected, seen(paged))


@pytest.mark.covering(1)
@pytest.mark.parametrize("kind", MODELS)
def test_transformers_from_their_own_files(kind: str, two_worlds: World, tmp_path: Path):
    """``save_pretrained``, then a model on the meta device whose weights stream in; rotary buffers are made anew."""

    def script(run: Run) -> None:
        torch.manual_seed(3)
        MODELS[kind]().save_pretrained(tmp_path / kind, safe_serialization=True, max_shard_size="20KB")
        if run.offloaded:
            run.model = offloaded_from(two_worlds, MODELS[kind], tmp_path / kind).model
        else:
            run.model = type(MODELS[kind]()).from_pretrained(tmp_path / kind).to(run.device)
        run.opt = run.adamw()
        run.model.train()
        torch.manual_seed(4)
        train_tokens(run)

    match(*(play(two_worlds, None, script, side, 3, {}).notes for side in (False, True)))


@pytest.mark.parametrize(
    ("stored", "wanted"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")]
)
def test_types_are_converted_as_torch_does(stored: str, wanted: str, two_worlds: World, tmp_path: Path):
    first, second = getattr(torch, stored), getattr(torch, wanted)
    weights = {n: p.detach().to(first) for n, p in Decoder(dtype=torch.float32).named_parameters()}
    weights["norm.weight"][0] = float("inf")
    save_file(weights, tmp_path / "w.safetensors")
    run = offloaded_from(two_worlds, lambda: Decoder(dtype=second), tmp_path / "w.safetensors")
    for name, p in run.model.named_parameters():
        assert torch.equal(p.detach().cpu(), weights[name].to(second)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_loaded_alone_amid_a_run(dtype: torch.dtype, two_worlds: World, tmp_path: Path):
    """Masters begin anew, as where torch copies the weights."""

    def trained(steps: int) -> Run:
        run = begin(two_worlds, lambda: build(dtype))
        run.train(steps, look=False)
        return run

    source = trained(1)
    funicular.save(source.model, None, tmp_path / "c")
    weights = copy.deepcopy(source.model.state_dict())
    copied = trained(3)
    copied.model.load_state_dict(weights)
    expected = go_on(copied)
    loaded = trained(3)
    funicular.load(tmp_path / "c", loaded.model, random=False)
    match(expected, go_on(loaded))


def test_what_does_not_fit_is_listed(host_world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Missing, mis-shaped and unexpected names; the model stays on the meta device and can be tried again."""
    whole = {n: p.detach() for n, p in Stack().named_parameters()}
    bad = dict(whole)
    del bad["layers.3.up.weight"]
    bad["inp.weight"] = torch.zeros(2, 3)
    bad["layers.9.up.weight"] = torch.zeros(1)
    save_file(bad, tmp_path / "bad.safetensors")
    save_file(whole | {"left.over": torch.zeros(1)}, tmp_path / "good.safetensors")
    model = on_meta(Stack)
    policy = host_world.policy(Stack())
    with pytest.raises(funicular.UsageError) as info:
        funicular.offload(model, policy, checkpoint=tmp_path / "bad.safetensors")
    assert info.value.code == "FN-E407"
    for part in (
        "missing: layers.3.up.weight",
        "unexpected: layers.9.up.weight",
        f"inp.weight [2, 3] instead of [{WIDTH}, {WIDTH}]",
    ):
        assert part in str(info.value)
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(funicular.UsageError, match=r"FN-E404.*pickles"):
        (tmp_path / "p").mkdir()
        (tmp_path / "p" / "pytorch_model.bin").write_bytes(b"x")
        funicular.offload(model, policy, checkpoint=tmp_path / "p")
    with pytest.raises(funicular.UsageError, match="FN-E404"):
        funicular.offload(model, policy, checkpoint=tmp_path / "nowhere")
    data = bytearray((tmp_path / "good.safetensors").read_bytes())
    (tmp_path / "short.safetensors").write_bytes(data[:-5])
    with pytest.raises(funicular.StorageError, match="FN-E406"):
        funicular.offload(model, policy, checkpoint=tmp_path / "short.safetensors")
    assert all(p.is_meta and type(p) is nn.Parameter for p in model.parameters())
    funicular.offload(model, policy, checkpoint=tmp_path / "good.safetensors")
    assert "left.over" in caplog.text
    assert all(torch.equal(p.detach().cpu(), whole[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("meta", [True, False])
def test_a_failure_while_streaming(meta: bool, two_worlds: World, disk: str, tmp_path: Path):
    """Damage found halfway: the model is as it was, nothing stays behind, and the next try works."""
    funicular.save(Stack(), None, tmp_path / "c")
    file = tmp_path / "c" / "model.safetensors"
    whole = file.read_bytes()
    bad = bytearray(whole)
    bad[-7] ^= 4
    file.write_bytes(bad)
    model = on_meta(Stack) if meta else Stack()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(funicular.StorageError, match=r"FN-E406.*model\.safetensors.*checksum"):
        funicular.offload(model, two_worlds.policy(Stack()), checkpoint=tmp_path / "c")
    assert facts.files(disk) == []
    for name, p in model.named_parameters():
        assert type(p) is nn.Parameter
        assert p.is_meta if meta else torch.equal(p, before[name])
    file.write_bytes(whole)
    funicular.offload(model, two_worlds.policy(Stack()), checkpoint=tmp_path / "c")
    saved = load_file(file)
    assert all(torch.equal(p.detach().cpu(), saved[n]) for n, p in model.named_parameters())


def test_meta_without_a_checkpoint(host_world: World):
    with pytest.raises(funicular.UsageError, match="FN-E111"):
        funicular.offload(on_meta(Stack), host_world.policy(Stack()))


class Table(nn.Module):
    """A buffer that no file has and no module can make."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("table", torch.arange(4.0), persistent=False)


def test_a_buffer_that_cannot_be_made(host_world: World, tmp_path: Path):
    save_file({"weight": torch.ones(4)}, tmp_path / "w.safetensors")
    model = on_meta(Table)
    with pytest.raises(funicular.UsageError, match=r"FN-E111.*table"):
        funicular.offload(model, host_world.policy(Table()), checkpoint=tmp_path / "w.safetensors")
    assert model.table.is_meta
    model.table = torch.arange(4.0)
    funicular.offload(model, host_world.policy(Table()), checkpoint=tmp_path / "w.safetensors")


class Rotary(Table):
    """Rotary frequencies, which modules of transformers before 5 compute in their constructor."""

    def __init__(self, found: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        del self.table
        self.config = object()
        self.rope_init_fn = lambda config, device: (found(), 1.0)
        self.register_buffer("inv_freq", torch.arange(4.0), persistent=False)
        self.original_inv_freq = self.inv_freq


def _not_of_the_configuration() -> torch.Tensor:
    raise AttributeError("rope_theta")


def test_frequencies_of_the_configuration(host_world: World, tmp_path: Path):
    """Where the constructor gives its own numbers to the function, as that of Zamba2 and of ModernBERT, they cannot be made."""
    save_file({"weight": torch.ones(4)}, tmp_path / "w.safetensors")
    for found in (_not_of_the_configuration, lambda: torch.arange(2.0), lambda: torch.arange(1.0)):
        model = on_meta(lambda found=found: Rotary(found))
        with pytest.raises(funicular.UsageError, match=r"FN-E111.*inv_freq"):
            funicular.offload(model, host_world.policy(Table()), checkpoint=tmp_path / "w.safetensors")
        assert model.inv_freq.is_meta
        assert model.original_inv_freq.is_meta
    model = on_meta(lambda: Rotary(lambda: torch.arange(4.0)))
    with torch.device("meta"):
        funicular.offload(model, host_world.policy(Table()), checkpoint=tmp_path / "w.safetensors")
    assert torch.equal(model.inv_freq.cpu(), torch.arange(4.0))
    assert torch.equal(model.original_inv_freq.cpu(), torch.arange(4.0))


@pytest.mark.covering(2)
@pytest.mark.parametrize("weights", ["param", "fp32"])
@pytest.mark.parametrize("kind", MODELS)
def test_from_pretrained_gives_the_same_logits(kind: str, weights: str, two_worlds: World, tmp_path: Path):
    """A checkpoint is a model directory for ``transformers``: one file or shards, tied names once."""
    run = Run(two_worlds, True)
    run.model = run.wrap(MODELS[kind]())
    run.opt = run.adamw()
    train_tokens(run)
    funicular.save(run.model, run.opt, tmp_path / "one", weights=weights)
    funicular.save(run.model, run.opt, tmp_path / "many", weights=weights, shard_bytes=20_000)
    run.model.eval()
    batch = {"input_ids": 2 + run.tokens(2, 9, below=VOCAB - 2)}
    if kind == "t5":
        batch["labels"] = batch["input_ids"]
    expected = run.model(**batch).logits.detach().clone()
    auto = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
    for name in ("one", "many"):
        again = auto.from_pretrained(tmp_path / name).to(run.device).eval()
        assert type(again) is type(run.model)
        assert torch.equal(again(**batch).logits, expected), name
    assert len([n for n in os.listdir(tmp_path / "many") if n.startswith("model-")]) > 1


def test_bf16_of_transformers(two_worlds: World, tmp_path: Path):
    """The type is said in the configuration, for weights as they are and for masters."""
    run = Run(two_worlds, True)
    run.model = run.wrap(MODELS["llama"]().to(torch.bfloat16))
    run.opt = run.adamw()
    train_tokens(run)
    for weights, dtype in (("param", torch.bfloat16), ("fp32", torch.float32)):
        funicular.save(run.model, run.opt, tmp_path / weights, weights=weights)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / weights, dtype="auto")
        assert again.dtype == dtype
        for name, p in run.model.named_parameters():
            near = again.get_parameter(name).to(torch.bfloat16).float() - p.detach().cpu().float()
            assert near.abs().max() <= p.detach().cpu().float().abs().max() * 2**-8, name


# ---------------------------------------------------------------------- torch's own formats


def plain_run(world: World, kind: Any = torch.optim.AdamW, **more: Any) -> Run:
    run = Run(world, False)
    run.model = Stack().to(run.device)
    run.opt = kind(run.model.parameters(), lr=1e-2, weight_decay=0.1, **more)
    return run


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_of_torch_training(assign: bool, two_worlds: World, tmp_path: Path):
    """What ``torch.save`` kept of a resident run with ``torch.optim.AdamW`` loads, weights and states."""
    plain = plain_run(two_worlds)
    plain.train(3, look=False)
    torch.save({"model": plain.model.state_dict(), "opt": plain.opt.state_dict()}, tmp_path / "kept.pt")
    kept = torch.load(tmp_path / "kept.pt")
    paged = begin(two_worlds, Stack)
    paged.train(1, look=False)
    parameters = dict(paged.model.named_parameters())
    paged.model.load_state_dict(kept["model"], assign=assign)
    paged.opt.load_state_dict(kept["opt"])
    for name, p in paged.model.named_parameters():
        assert p is parameters[name]
        assert torch.equal(p.detach().cpu(), kept["model"][name].cpu()), name
        states = plain.opt.state[plain.model.get_parameter(name)]
        assert int(paged.opt.state[p]["step"]) == 3
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(paged.opt.state[p][key].cpu(), states[key].cpu()), name
    # From here as this project's AdamW would have gone on from there.
    other = plain_run(two_worlds, funicular.AdamW)
    other.model.load_state_dict(kept["model"])
    other.opt.load_state_dict(kept["opt"])
    match(go_on(other), go_on(paged))


def test_state_dict_for_torch_training(two_worlds: World):
    """The other way: ``torch.optim.AdamW`` takes the states, and goes on within rounding."""
    paged = begin(two_worlds, Stack)
    paged.train(3, look=False)
    plain = plain_run(two_worlds)
    assert not any(plain.model.load_state_dict(paged.model.state_dict()))
    plain.opt.load_state_dict(paged.opt.state_dict())
    for run in (paged, plain):
        run.generator = torch.Generator().manual_seed(3)
        run.train(3, look=False)
    for name, p in paged.model.named_parameters():
        q = plain.model.get_parameter(name)
        assert int(plain.opt.state[q]["step"]) == 6
        assert torch.allclose(p.detach(), q.detach(), rtol=1e-5, atol=1e-6), name


def test_a_checkpoint_of_torch_training(two_worlds: World, tmp_path: Path):
    """``funicular.save`` takes a resident model and ``torch.optim.AdamW`` too; the checkpoint loads into an offloaded one, and back."""
    plain = plain_run(two_worlds)
    plain.train(3, look=False)
    funicular.save(plain.model, plain.opt, tmp_path / "c", extra="torch")
    paged = begin(two_worlds, Stack)
    assert funicular.load(tmp_path / "c", paged.model, paged.opt) == (3, "torch")
    again = plain_run(two_worlds, amsgrad=False)
    funicular.load(tmp_path / "c", again.model, again.opt)
    for name, p in plain.model.named_parameters():
        for model, opt in ((paged.model, paged.opt), (again.model, again.opt)):
            q = model.get_parameter(name)
            assert torch.equal(p.detach(), q.detach()), name
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(plain.opt.state[p][key].cpu(), opt.state[q][key].cpu()), name
    match(go_on(plain), go_on(again))


def test_load_state_dict_that_does_not_fit(two_worlds: World):
    """Strict or not, as torch says it; nothing is detached from the runtime, and training goes on as in plain torch."""

    def script(run: Run) -> None:
        run.train(1, look=False)
        sd = {n: t * 1.5 for n, t in run.model.state_dict().items()}
        del sd["inp.weight"]
        sd["other"] = torch.ones(1)
        for options in ({}, {"assign": True}):
            with pytest.raises(RuntimeError, match="Missing key.*inp.weight"):
                run.model.load_state_dict(sd, **options)
        run.record("keys", str(run.model.load_state_dict(sd, strict=False)))
        run.train(1)
        run.record("keys", str(run.model.load_state_dict(sd, strict=False, assign=True)))
        run.opt.zero_grad()
        run.opt = run.adamw()
        run.train(2)

    match(*(play(two_worlds, Stack, script, side, 3, {}).notes for side in (False, True)))


def test_assign_of_another_type_or_shape_is_refused(host_world: World):
    run = begin(host_world, Stack)
    for bad in (torch.zeros(WIDTH, WIDTH, dtype=torch.float64), torch.zeros(2, 2)):
        sd = {n: t.clone() for n, t in run.model.state_dict().items()} | {"inp.weight": bad}
        with pytest.raises((RuntimeError, funicular.UsageError), match=r"inp\.weight"):
            run.model.load_state_dict(sd, assign=True)
    run.train(1, look=False)


@pytest.mark.parametrize("kind", MODELS)
def test_save_pretrained(kind: str, two_worlds: World, tmp_path: Path):
    """Its files are those of the plain model, and the result loads as a checkpoint's weights."""
    plain, paged = MODELS[kind](), None
    paged = copy.deepcopy(plain)
    funicular.offload(paged, two_worlds.policy(plain))
    plain.save_pretrained(tmp_path / "plain", safe_serialization=True)
    paged.save_pretrained(tmp_path / "paged", safe_serialization=True)
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in ("plain", "paged"))
    match(sorted(a.items()), sorted(b.items()))


MEMORY = """
    import resource
    from safetensors.torch import save_file
    from torch import nn
    from models import Block
    width, depth = 1024, 24
    make = lambda: Stack(lambda: Block(width), depth, width=width)
    with torch.device("meta"):
        model = make()
        shape = make()
    if not os.path.exists({path!r}):
        os.makedirs({path!r})
        for k, (name, p) in enumerate(shape.named_parameters()):
            save_file({{name: torch.full(p.shape, k * 0.01)}}, os.path.join({path!r}, f"model-{{k:05}}.safetensors"))
        sys.exit(0)
    for p in model.parameters():
        p.requires_grad_(False)  # gradients always have a place in host memory
    total = sum(p.numel() * 4 for p in shape.parameters())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    policy = world.policy(shape, budget={{"host": "120MiB", "nvme": "2GiB"}})
    funicular.offload(model, policy, checkpoint={path!r})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    wrong = [n for k, (n, p) in enumerate(model.named_parameters()) if not bool((p == k * 0.01).all())]
    print(total >> 20, peak >> 20, wrong)
"""


@pytest.mark.slow
def test_the_model_never_has_to_fit(disk: str, tmp_path: Path):
    """Resident memory while 193 MiB of weights stream to NVMe stays within the policy's 120 MiB and frames."""
    path = str(Path(disk).parent / f"{Path(disk).name}-weights")
    try:
        placement = PLACEMENTS["nvme-threads"]
        assert children.succeed(MEMORY.format(path=path), disk, placement, "host") == []
        total, peak, wrong = children.succeed(MEMORY.format(path=path), disk, placement, "host")[0].split(" ", 2)
    finally:
        shutil.rmtree(path, ignore_errors=True)
    assert wrong == "[]"
    assert int(total) > 190
    assert int(peak) < 120
