"""``funicular plan``: models without weights, and whether what it says is what a run does."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import facts
import forks
import funicular
import several

MIB = 1 << 20
_FACTORY = """
import torch
from torch import nn
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(1000, 256)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256)) for _ in range(6))
        self.head = nn.Linear(256, 1000, bias=False)
    def forward(self, x):
        x = self.embed(x)
        for b in self.blocks:
            x = x + b(x)
        return self.head(x)
def build():
    return Model()
def tied():
    model = Model()
    model.head.weight = model.embed.weight
    return model
def nothing():
    return 3
def needs_weights():
    return torch.load("weights.pt")
"""


def plan(*arguments: str, cwd: Path | None = None, code: int = 0) -> Any:
    """The plan as JSON; the text on the standard error where it ends with another code than 0 and prints none."""
    env = {**os.environ, "FUNICULAR_DEVICE": "host", "XDG_CONFIG_HOME": "/nonexistent"}
    process = forks.plan([*arguments, "--json"], cwd=cwd, env=env)
    out, err = process.communicate()
    assert process.returncode == code, out + err
    return json.loads(out) if out else err


@pytest.fixture
def factory(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(_FACTORY)
    return tmp_path


def test_a_factory_is_planned_without_weights(factory: Path) -> None:
    built = plan("mine:build", cwd=factory)
    by_file = plan("mine.py:build", "--dtype", "bf16", cwd=factory)
    assert built["params"] == 2 * 1000 * 256 + 6 * (2 * 256 * 1024 + 1024 + 256)
    assert [u["name"] for u in built["units"]] == ["embed.weight", *(f"blocks.{i}" for i in range(6)), "head.weight"]
    assert by_file["units"][1]["params"] == built["units"][1]["params"] // 2
    assert plan("mine:tied", cwd=factory)["params"] == built["params"] - 1000 * 256
    # Biases of 256 elements are padded where they live; a count of parameters has no padding.
    assert built["trained"] == built["params"]


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("mine:nothing", "int, not a torch.nn.Module"),
        ("mine:needs_weights", "weights.pt"),
        ("mine:missing", "missing"),
        ("nowhere:build", "nowhere"),
        (".", "config.json"),
        ("mine", "module:function"),
        ("meta-llama/Llama-3.1-8B", "hf download meta-llama/Llama-3.1-8B config.json --local-dir Llama-3.1-8B"),
    ],
)
def test_what_cannot_be_built_is_named(factory: Path, source: str, part: str) -> None:
    said = plan(source, cwd=factory, code=2)
    assert said.startswith("FN-E505")
    assert part in said
    assert "Traceback" not in said
    # A directory has no function to correct.
    assert ("Name a function" in said) == (":" in source)


def test_a_directory_that_cannot_be_planned_is_explained(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    for config, part in (
        ({"model_type": "of_mine", "auto_map": {}}, "does not recognize this architecture"),
        ({"hidden_size": 64}, "model_type"),
        ({**LLAMA, "quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized (gptq)"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        said = plan(str(tmp_path), code=2)
        assert part in said
        assert "build the model with a function" in said
        assert said.count("\n") == 1, said
    assert plan(str(tmp_path), "--dtype", "bf16", "--ram", "8GiB")["fits"]


def test_activations_are_estimated_or_the_plan_says_why_not(factory: Path) -> None:
    note = "Activations are not estimated"
    assert any(note in said for said in plan("mine:build", "--tokens", "64", cwd=factory)["notes"])
    assert not any(note in said for said in plan("mine:build", cwd=factory)["notes"])
    shape = ["--params", "1B", "--layers", "4", "--ram", "64GiB", "--batch", "8", "--seq", "512"]
    whole, sliced = plan(*shape, "--recompute"), plan(*shape, "--set", "activations.micro_batch=2")
    assert not any(note in said for said in whole["notes"])
    assert sliced["activations"]["blocks"] < whole["activations"]["blocks"]
    assert sliced["activations"]["head"] == whole["activations"]["head"]


def test_a_hugging_face_directory(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 512,
        "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(config))
    by_config = plan(str(tmp_path), "--ram", "8GiB")
    assert by_config["params"] == 2 * 512 * 64 + 3 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    assert [u["name"] for u in by_config["units"]][1:4] == [f"model.layers.{i}" for i in range(3)]
    # The same model by the headers of its weights.
    safetensors = pytest.importorskip("safetensors.torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    safetensors.save_file(model.to(torch.bfloat16).state_dict(), tmp_path / "model.safetensors")
    by_header = plan(str(tmp_path), "--ram", "8GiB")
    assert (by_header["params"], by_header["tiers"]) == (by_config["params"], by_config["tiers"])
    assert [u["name"] for u in by_header["units"]][1:4] == [f"model.layers.{i}" for i in range(3)]


LLAMA = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "vocab_size": 512}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 128, "n_layer": 3, "n_head": 4, "vocab_size": 512, "activation_function": "gelu_new",
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_activations_are_near_what_a_model_keeps(config: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    found = transformers.AutoConfig.from_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_config(found).to(torch.bfloat16).train()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.base_model(torch.zeros(2, 128, dtype=torch.long), use_cache=False)
    size = sum(t.untyped_storage().nbytes() for t in kept.values())
    planned = plan(str(tmp_path), "--ram", "8GiB", "--batch", "2", "--seq", "128", "--passes", "3")["activations"]
    assert planned["tokens"] == 256
    assert planned["from"] == "config.json"
    assert planned["blocks"] == pytest.approx(size, rel=0.1)
    assert planned["bytes"] == planned["blocks"] + planned["head"]
    assert plan(str(tmp_path), "--ram", "8GiB")["activations"] is None


def test_what_does_not_fit_says_by_how_much_and_what_helps() -> None:
    machine = ("--gpu", "24GB", "--ram", "64GB", "--cpus", "16")
    short = plan("--params", "7B", "--layers", "32", *machine, code=1)
    assert not short["fits"]
    assert short["refusal"].startswith("FN-E202")
    assert len(short["ways"]) >= 2
    fits = plan("--params", "7B", "--layers", "32", *machine, "--disk", "1TB")
    assert fits["fits"]
    for tier in fits["tiers"]:
        most = max(tier[when] for when in ("steady", "init", "step", "checkpoint"))
        assert tier["budget"] is None or most <= tier["budget"], tier


def test_times_need_rates_and_name_what_binds(tmp_path: Path) -> None:
    model = ("--params", "7B", "--layers", "32", "--gpu", "24GB", "--ram", "64GB", "--disk", "1TB", "--cpus", "16")
    assert plan(*model)["step"] is None
    (tmp_path / "profile.toml").write_text(
        'version = 1\nhost = "a"\n[device]\nname = "a GPU"\nhost_to_device = 25e9\ndevice_to_host = 25e9\n'
        "[memory]\nadamw_params = 1e9\nthreads = 16\n[nvme]\nread = 6e9\nwrite = 5e9\nread_write = 7e9\n"
    )
    timed = plan(*model, "--profile", str(tmp_path / "profile.toml"), "--tokens", "16384", "--flops", "100e12")
    step = timed["step"]
    compute = 6 * (7e9 - 4096 * 32000) * 16384 / 100e12
    assert step["compute_seconds"] == pytest.approx(compute, rel=0.02)
    assert step["seconds"] > compute
    assert step["tokens_per_second"] == pytest.approx(16384 / step["seconds"])
    assert timed["activations"]["from"] == "--params and --layers"
    assert step["binding"] in {"nvme", "cpu_update"}
    assert timed["wear"]["days"] > 0
    # The planner here is the one for a machine with a GPU; rates of a processor are not its rates.
    (tmp_path / "host.toml").write_text(
        'version = 1\n[device]\nname = "host"\nhost_to_device = 1e9\n[memory]\nadamw_params = 1e9\n'
    )
    other = plan(*model, "--profile", str(tmp_path / "host.toml"), "--tokens", "1", "--flops", "1")
    assert other["step"] is None
    assert any("'host'" in note for note in other["notes"])


def test_a_thread_updates_what_one_was_measured_to(tmp_path: Path) -> None:
    """Memory is saturated by some threads: one of sixteen does more than a sixteenth."""
    model = ("--params", "7B", "--layers", "32", "--gpu", "24GB", "--ram", "200GB", "--cpus", "16", "--tokens", "16")
    model += ("--flops", "100e12", "--set", 'optimizer.where="cpu"', "--profile", str(tmp_path / "profile.toml"))

    def seconds(threads: int, one: float) -> float:
        (tmp_path / "profile.toml").write_text(
            'version = 1\n[device]\nname = "a GPU"\nhost_to_device = 50e9\ndevice_to_host = 50e9\n'
            f"[memory]\nadamw_params = 4e9\nadamw_params_one_thread = {one}\nthreads = 16\n"
        )
        return float(plan(*model, "--set", f"budget.threads={threads}")["step"]["seconds"])

    assert seconds(16, 1e9) == seconds(4, 1e9) == seconds(16, 0.0)
    assert seconds(1, 1e9) == pytest.approx(seconds(1, 0.25e9) / 4, rel=0.1)
    assert seconds(1, 0.0) == seconds(1, 0.25e9)


def test_states_stream_as_fast_as_updates_were_measured_to(tmp_path: Path) -> None:
    """Disks that serve an update better than reads and writes block by block are taken at that rate."""
    model = ("--params", "7B", "--layers", "32", "--gpu", "24GB", "--ram", "64GB", "--disk", "1TB", "--cpus", "16")
    model += ("--flops", "100e12", "--tokens", "16", "--profile", str(tmp_path / "profile.toml"))

    def seconds(both: float, params: float) -> float:
        (tmp_path / "profile.toml").write_text(
            'version = 1\n[device]\nname = "a GPU"\nhost_to_device = 50e9\ndevice_to_host = 50e9\n[memory]\nadamw_params = 4e9\n'
            f"[nvme]\nread = 2e9\nwrite = 2e9\nread_write = {both}\nadamw_params = {params}\n"
        )
        return float(plan(*model)["step"]["seconds"])

    assert seconds(2e9, 0.0) == seconds(2e9, 0.1e9) == seconds(1e9, 0.1e9)
    assert seconds(2e9, 0.2e9) < 0.7 * seconds(2e9, 0.0)


def _policies(folder: str) -> dict[str, dict[str, Any]]:
    disk = {"nvme": {"paths": [folder]}}
    host, nvme = {"tier": "host"}, {"tier": "nvme"}
    small = {"budget": {"hbm": "5MiB"}}
    return {
        "automatic": {},
        "fits in the compute tier": {"budget": {"hbm": "256MiB"}},
        "some resident": {"budget": {"hbm": "60MiB"}},
        "host": {**small, "params": host, "optimizer": host},
        "a roomy ring": {"budget": {"hbm": "12MiB"}, "params": host, "optimizer": host},
        "spare frames": {**small, "params": host, "optimizer": {"tier": "host", "spare": "64MiB"}},
        "states on NVMe": {**small, **disk, "params": host, "optimizer": nvme},
        "parameters on NVMe": {**small, **disk, "params": nvme, "optimizer": host},
        "all on NVMe": {**small, **disk, "params": nvme, "optimizer": nvme},
        "gradients on NVMe": {**small, **disk, "params": nvme, "optimizer": nvme, "gradients": nvme},
        "a tight host": {"budget": {"hbm": "5MiB", "host": "40MiB"}, **disk},
        "by name": {**small, **disk, "override": [{"match": "blocks.[0-2]", "params": "nvme", "optimizer": "nvme"}]},
        "without a bound": {**disk, "params": host, "optimizer": nvme},
        "demoted": {"budget": {"hbm": "5MiB", "host": "40MiB"}, **disk, "params": host, "optimizer": host,
                    "pressure": {"action": "demote"}},
    }  # fmt: skip


@pytest.mark.parametrize("name", list(_policies("")))
def test_the_plan_is_what_a_run_does(name: str, factory: Path, disk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks by tier: never below what the run used, within 2 % above; bytes per step over every link: exact."""
    monkeypatch.setenv("FUNICULAR_DEVICE", "host")
    policy = _policies(disk)[name]
    file = factory / "policy.json"
    file.write_text(json.dumps(policy))
    planned = plan("mine:build", "--policy", str(file), cwd=factory)
    space: dict[str, Any] = {}
    exec(_FACTORY, space)
    model: nn.Module = funicular.offload(space["build"](), policy)
    opt = funicular.AdamW(model.parameters(), lr=1e-3)
    x = torch.randint(0, 1000, (4, 8))

    def step() -> None:
        model(x).square().mean().backward()
        opt.step()
        opt.zero_grad()

    for _ in range(3):
        step()
    before = _settled(model)
    for _ in range(4):
        step()

    def moved(link: str, now: funicular.Stats) -> float:
        return (now.links[link].bytes - before.links[link].bytes) / 4

    # A disk that others keep busy may rest longer than _settled looks.
    with contextlib.suppress(AssertionError):
        facts.eventually(
            lambda: all(moved(link, funicular.stats(model)) >= expected * 0.99 for link, expected in planned["traffic"])
        )
    after = _settled(model)
    for tier in planned["tiers"]:
        used = after.budgets[tier["tier"]].peak
        most = max(tier[when] for when in ("steady", "init", "step"))
        assert used <= most <= used * 1.02 + 4096, (tier, used)
    for link, expected in planned["traffic"]:
        # A prefetch that a conflict undoes is moved again; nothing is moved less.
        most = 1.25 if link in {"host_to_device", "nvme_read"} else 1.01
        if link == "cpu_update" and name == "spare frames":
            most = (28 + 2 * 4) / 28 + 0.01  # after an update ahead of the step the parameters are copied home
        assert expected * 0.99 <= moved(link, after) <= expected * most, (link, moved(link, after), expected)


def test_ranks_take_what_the_plan_says(factory: Path) -> None:
    """Host memory once, frames and exchanged bytes of each, and what all move together."""
    policy = {"device": "host", "budget": {"host": "256MiB", "hbm": "6MiB", "threads": 1}}
    file = factory / "policy.json"
    file.write_text(json.dumps(policy))
    planned = plan("mine:build", "--policy", str(file), "--ranks", "2", cwd=factory)
    both = several.run(2, "planned_checks:trained", _FACTORY, policy)
    for _, after in both:
        for tier in planned["tiers"]:
            used, most = after.budgets[tier["tier"]].peak, max(tier[when] for when in ("steady", "init", "step"))
            assert used <= most <= used * 1.02 + 4096, (tier, used)
    assert planned["ranks"]["hbm"] == sum(after.budgets["hbm"].peak for _, after in both)
    params = sum(p.numel() for p in _built().parameters())
    assert planned["ranks"]["own_gradients"] == [4 * params, 4 * params]
    for link, expected in planned["traffic"]:
        moved = [(after.links[link].bytes - before.links[link].bytes) / 4 for before, after in both]
        if link == "exchange":
            assert moved == [expected, expected] == [4 * params, 4 * params]
        elif link == "host_to_device":
            assert all(expected * 0.99 <= one <= expected * 1.25 for one in moved), (moved, expected)
        else:
            # Each rank has its part, and none the very half.
            assert 2 * expected * 0.98 <= sum(moved) <= 2 * expected * 1.01, (link, moved, expected)
    through = sum(
        (after.links[link].bytes - before.links[link].bytes) / 4
        for before, after in both
        for link in ("host_to_device", "device_to_host", "cpu_update")
    )
    assert planned["ranks"]["through_host"] == pytest.approx(through, rel=0.1)


def _built() -> nn.Module:
    space: dict[str, Any] = {}
    exec(_FACTORY, space)
    model: nn.Module = space["build"]()
    return model


@pytest.mark.parametrize("name", ["automatic", "host", "all on NVMe", "a tight host"])
def test_a_save_takes_what_the_plan_says(name: str, factory: Path, disk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUNICULAR_DEVICE", "host")
    policy = _policies(disk)[name]
    policy = {**policy, "budget": {"host": "64MiB", **policy.get("budget", {})}}
    (factory / "policy.json").write_text(json.dumps(policy))
    planned = plan("mine:build", "--policy", str(factory / "policy.json"), cwd=factory)
    space: dict[str, Any] = {}
    exec(_FACTORY, space)
    model: nn.Module = funicular.offload(space["build"](), policy)
    opt = funicular.AdamW(model.parameters(), lr=1e-3)
    model(torch.randint(0, 1000, (4, 8))).square().mean().backward()
    opt.step()
    _settled(model)
    funicular.save(model, opt, Path(disk) / "saved")
    used = funicular.stats(model).budgets["host"].peak
    host = planned["tiers"][1]
    most = max(host[when] for when in ("steady", "init", "step", "checkpoint"))
    assert used <= most <= used * 1.02 + 4096, host
    assert most <= host["budget"]


def _settled(model: nn.Module) -> funicular.Stats:
    """Counters at a moment when nothing is under way: updates, then writes and prefetches that trail."""
    for p in model.parameters():
        p.sum().item()
    stats, quiet = funicular.stats(model), 0
    while quiet < 5:
        time.sleep(0.05)
        now = funicular.stats(model)
        quiet = quiet + 1 if now.links == stats.links else 0
        stats = now
    return stats
