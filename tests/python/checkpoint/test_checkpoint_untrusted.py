"""Checkpoints are untrusted input: names lead nowhere, nothing hangs, nothing is changed by what is not whole."""

import json
import os
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import funicular
from funicular import _core


class Config:
    """As much of a configuration of transformers as a save asks for."""

    def __init__(self, **said: Any) -> None:
        self.said = said

    def to_dict(self) -> dict[str, Any]:
        return self.said

    @classmethod
    def from_dict(cls, said: dict[str, Any]) -> "Config":
        return cls(**said)

    def to_json_string(self) -> str:
        return json.dumps(self.said)


def model_of(width: int = 8) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
    model.config = Config(width=width)
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint in several files, of a model that was stepped."""
    model = model_of()
    opt = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 8)).sum().backward()
    opt.step()
    funicular.save(model, opt, tmp_path / "c", shard_bytes=200)
    assert len(os.listdir(tmp_path / "c")) > 10
    return tmp_path / "c"


def forge(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a manifest, and give it the checksum that it needs."""
    file = path / "funicular.json"
    said = json.loads(file.read_text())
    change(said)
    said["checksum"] = "0" * 16
    file.write_text(json.dumps(said))
    with pytest.raises(funicular.StorageError) as info:
        _core.Checkpoint(str(path), True)
    found = re.search("its checksum is ([0-9a-f]{16}), it says 0", str(info.value))
    assert found is not None, info.value
    said["checksum"] = found[1]
    file.write_text(json.dumps(said))


Cli = Callable[..., tuple[int, str]]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    """Run `funicular checkpoint` in this process: its status, and all that it wrote."""

    def run(*words: Any) -> tuple[int, str]:
        capfd.readouterr()
        status = _core.cli(["funicular", "checkpoint", *map(str, words)])
        return status, "".join(capfd.readouterr())

    return run


def state_of(model: nn.Module, opt: torch.optim.Optimizer) -> Any:
    tensors = [p.detach().clone() for p in model.parameters()]
    states = [{k: v.clone() for k, v in opt.state[p].items()} for p in model.parameters()]
    return tensors, states, [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]


def refused(path: Path) -> str:
    """A load fails in less than ten seconds and changes nothing; what it says."""
    model = model_of()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.25)
    opt = torch.optim.AdamW(model.parameters())
    before, seed, began = repr(state_of(model, opt)), torch.get_rng_state(), time.monotonic()
    with pytest.raises(funicular.Error, match=r"FN-E40[4567]") as info:
        funicular.load(path, model, opt)
    assert time.monotonic() - began < 10
    assert repr(state_of(model, opt)) == before
    assert torch.equal(torch.get_rng_state(), seed)
    return str(info.value)


NAMES = ["../x", "/etc/hostname", "/dev/zero", "a/b", "..", "", "nul\0byte", "x" * 300]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["shards", "files"])
def test_names_in_a_manifest(where: str, name: str, saved: Path, cli: Cli):
    def change(said: Any) -> None:
        said[where][0]["name"] = name

    forge(saved, change)
    assert "not the name of a file in its directory" in refused(saved)
    assert cli("ls", saved)[0] == 1
    assert cli("verify", saved)[0] == 1


@pytest.mark.parametrize("name", NAMES)
def test_names_in_an_index(name: str, tmp_path: Path, cli: Cli):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"0.weight": name}}))
    status, said = cli("verify", tmp_path)
    assert status == 1
    assert "not the name of a file in its directory" in said
    with torch.device("meta"):
        model = model_of()
    with pytest.raises(funicular.StorageError, match="FN-E406"):
        funicular.offload(model, {"device": "host"}, checkpoint=tmp_path)


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def replace_by_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_hole(path: Path) -> None:
    os.truncate(path, 1 << 40)


KINDS = [replace_by_pipe, replace_by_link, replace_by_device, replace_by_directory, replace_by_hole]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stem", ["funicular", "model-00001", "optimizer-00002", "config", "model.safetensors.index"])
def test_files_that_are_none(stem: str, kind: Callable[[Path], None], saved: Path, cli: Cli):
    kind(next(p for p in saved.iterdir() if p.name.startswith(stem)))
    refused(saved)
    began = time.monotonic()
    assert cli("ls", saved.parent)[0] == 1
    # Without its manifest there is nothing to verify.
    assert cli("verify", saved)[0] == (2 if stem == "funicular" else 1)
    assert cli("export", saved, saved.parent / "out")[0] == 2
    assert time.monotonic() - began < 30
    assert not (saved.parent / "out").exists()


def test_the_cache_of_hugging_face(saved: Path, tmp_path: Path, cli: Cli):
    """Its snapshots consist of links to `../../blobs`: a checkpoint downloaded with it loads."""
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "1", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(saved.iterdir())):
        file.rename(blobs / f"b{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/b{number}")
    model = model_of()
    funicular.load(snapshot, model, torch.optim.AdamW(model.parameters()))
    assert cli("verify", snapshot)[0] == 0


def test_what_is_not_the_checkpoints_is_not_exported(saved: Path, tmp_path: Path, cli: Cli):
    (tmp_path / "secret").write_text('{"password": "x"}')
    (saved / "generation_config.json").symlink_to(tmp_path / "secret")
    status, said = cli("export", saved, tmp_path / "out")
    assert status == 2
    assert "generation_config.json" in said
    assert not (tmp_path / "out").exists()


def test_a_shard_that_is_left_out(saved: Path, tmp_path: Path, cli: Cli):
    """By the manifest, by the index, or by both."""

    def drop(said: Any) -> None:
        said["shards"] = [s for s in said["shards"] if not s["name"].startswith("model-00002")]

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    for file in saved.glob("model-*"):
        (foreign / file.name).write_bytes(file.read_bytes())
    assert cli("verify", foreign)[0] == 0
    kept = {name: file for name, file in index["weight_map"].items() if not file.startswith("model-00002")}
    (foreign / "model.safetensors.index.json").write_text(json.dumps({"weight_map": kept}))
    status, said = cli("verify", foreign)
    assert status == 1
    assert "number 2 is not named" in said
    moved = dict(
        zip(index["weight_map"], [*list(index["weight_map"].values())[1:], next(iter(kept.values()))], strict=True)
    )
    (foreign / "model.safetensors.index.json").write_text(json.dumps({"weight_map": moved}))
    assert cli("verify", foreign)[0] == 1
    forge(saved, drop)
    assert "number 2 is not named" in refused(saved)


def put(*keys: Any) -> Callable[[Any], Any]:
    """Set a value in the part about the training; without a value, remove it."""
    *path, last, value = keys

    def change(said: Any) -> None:
        inner = said["training"]
        for key in path:
            inner = inner[key]
        if value is ...:
            del inner[last]
        else:
            inner[last] = value

    return change


TRAINING: dict[str, Callable[[Any], Any]] = {
    "no steps": put("steps", ...),
    "steps of another kind": put("steps", [1]),
    "a step that is text": put("steps", "0.weight", "x"),
    "a step below zero": put("steps", "0.weight", -1),
    "a step beyond all numbers": put("steps", "0.weight", 2**70),
    "a step that is true": put("steps", "0.weight", True),
    "the step is no number": put("step", "many"),
    "no step": put("step", ...),
    "no extra": put("extra", ...),
    "an extra with a tag that is none": put("extra", {"__import__": "os"}),
    "an extra whose number is none": put("extra", {"__int__": "x"}),
    "an extra whose tuple is none": put("extra", {"__tuple__": 3}),
    "no random states": put("random", ...),
    "a random state that is none": put("random", "torch", "AAAA"),
    "a random state that is no text": put("random", "torch", 3),
    "a random state of Python that is none": put("random", "python", [1]),
    "no edited": put("edited", ...),
    "groups of another kind": put("groups", 0, "params", 3),
    "a group without options": put("groups", 0, "options", ...),
    "parameters as an option": put("groups", 0, "options", "params", []),
    "a rate that is text": put("groups", 0, "options", "lr", "fast"),
    "betas that are one": put("groups", 0, "options", "betas", 0.5),
    "a beta of one": put("groups", 0, "options", "betas", [1.0, 0.9]),
    "a beta beyond all floats": put("groups", 0, "options", "betas", [0.9, 10**400]),
    "a rate beyond all floats": put("groups", 0, "options", "lr", {"__int__": "0x" + "f" * 400}),
    "betas of thousands of digits": put("groups", 0, "options", "betas", {"__int__": "0x" + "f" * 5000}),
    "types that are none": put("dtypes", {"0.weight": "int4"}),
    "types of another kind": put("dtypes", 7),
    "the training is a list": lambda said: said.update(training=[]),
    "the training is deep": lambda said: said.update(training=json.loads("[" * 500 + "]" * 500)),
}


@pytest.mark.parametrize("what", TRAINING)
def test_forged_parts_about_the_training(what: str, saved: Path):
    forge(saved, TRAINING[what])
    refused(saved)


def test_forged_options_that_are_not_supported(saved: Path):
    """Found before a weight is changed."""
    forge(saved, put("groups", 0, "options", "amsgrad", True))
    model = model_of()
    with torch.no_grad():
        model[0].weight.zero_()
    with pytest.raises(funicular.UsageError, match="FN-E117"):
        funicular.load(saved, model, funicular.AdamW(model.parameters()))
    assert not model[0].weight.any()


def test_states_that_are_missing(saved: Path):
    """Parameters that were stepped, and an optimizer's file without their moments."""

    def rename(said: Any) -> None:
        for name in ("0.weight", "1.weight"):
            said["training"]["steps"][name] = 1

    model = model_of()
    funicular.save(model, torch.optim.AdamW(model.parameters()), saved.parent / "fresh")
    forge(saved.parent / "fresh", rename)
    assert "exp_avg' is missing" in refused(saved.parent / "fresh")


def test_large_inputs_cost_little(saved: Path, tmp_path: Path, cli: Cli):
    """A mebibyte of names, of levels, and of one file a hundred thousand times."""
    many = [{"name": f"f{i}", "bytes": 1, "checksum": "0" * 16} for i in range(20_000)]
    same = [{"name": "model-00001-of-00004.safetensors", "bytes": 1, "checksum": "0" * 16}] * 20_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    whole = (saved / "funicular.json").read_bytes()
    for files in (many, same):
        forge(saved, lambda said, files=files: said.update(files=files))
        refused(saved)
        (saved / "funicular.json").write_bytes(whole)
    for text in (
        "[" * (1 << 20),
        '{"a":' * (1 << 18),
        '{"format": "funicular-checkpoint", "version": 1, "x": ' + "[" * (1 << 20),
    ):
        (saved / "funicular.json").write_text(text)
        refused(saved)
    (saved / "funicular.json").write_bytes(whole)
    wide = {f"k{i}": "model-00001-of-00001.safetensors" for i in range(95_000)}
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": wide}))
    began = time.monotonic()
    assert cli("verify", tmp_path / "wide")[0] == 1
    assert time.monotonic() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10


def test_many_tensors_that_the_model_does_not_have(tmp_path: Path):
    """The list of what differs is made in one pass."""
    from safetensors.torch import save_file

    save_file({f"t{i}": torch.zeros(1) for i in range(60_000)}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(500)])
    began = time.monotonic()
    with pytest.raises(funicular.UsageError, match="FN-E407.*and 59995 more"):
        funicular.offload(model, {"device": "host"}, checkpoint=tmp_path)
    assert time.monotonic() - began < 30


def test_escapes_do_not_reach_the_terminal(saved: Path, tmp_path: Path, cli: Cli):
    """Names and texts in files, on every way to the terminal: a table, a report, an error."""
    evil = "\x1b[2J\x9b31m\x07\u202e\rx\nfake: all checksums agree"

    def change(said: Any) -> None:
        said["files"][0]["name"] = evil

    forge(saved, change)
    says = [cli("ls", tmp_path)[1], cli("verify", saved)[1], refused(saved)]
    (tmp_path / evil.replace("/", "")).mkdir()
    (tmp_path / evil.replace("/", "") / "funicular.json").write_text("{}")
    says.append(cli("ls", tmp_path)[1])
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../" + evil}}))
    says.append(cli("verify", tmp_path / "w")[1])
    for text in says:
        assert not set(text) & set("\x1b\x9b\x07\u202e\r"), repr(text)
        assert "\\u001b" in text or "\\x1b" in text
    assert "\nfake" not in says[0] + says[3]
