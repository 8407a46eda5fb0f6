"""``funicular checkpoint ls``, ``verify`` and ``export``."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_checkpoint import assert_same_files, begin

import funicular
from models import WIDTH, Stack
from twin import World


@pytest.fixture
def saved(two_worlds: World, tmp_path: Path) -> Path:
    """A checkpoint after two steps, in several files."""
    run = begin(two_worlds)
    run.train(2, look=False)
    # Some twenty files at any width: tests damage each of them, and read all of them every time.
    funicular.save(run.model, run.opt, tmp_path / "c", shard_bytes=100_000 * (WIDTH // 32) ** 2)
    return tmp_path / "c"


def bad_bit(path: Path, at: int) -> None:
    """Flip a bit of a byte."""
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << (at % 8)
    path.write_bytes(data)


def truncate(path: Path) -> None:
    """Cut three bytes off."""
    os.truncate(path, path.stat().st_size - 3)


def cli(*words: Any) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "funicular", "checkpoint", *map(str, words)], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_ls_and_verify(saved: Path):
    status, text = cli("ls", saved.parent)
    assert status == 0
    head, row = text.splitlines()
    assert head.split()[:2] == ["name", "step"]
    assert row.split()[:2] == ["c", "2"]
    assert row.endswith("complete")
    assert cli("ls", saved)[1].splitlines()[1].startswith("c")
    status, text = cli("verify", saved)
    assert status == 0
    assert "all checksums agree" in text
    names = sorted(p for p in saved.iterdir() if p.suffix == ".safetensors")
    for name in names[:2]:
        bad_bit(name, name.stat().st_size - 1)
    status, text = cli("verify", saved)
    assert status == 1
    assert text.count("FN-E406") == 2
    assert "2 damaged" in text
    truncate(names[0])
    status, text = cli("ls", saved.parent)
    assert status == 1
    assert names[0].name in text
    assert cli("verify", saved.parent / "nowhere")[0] == 2
    assert "FN-E404" in cli("ls", saved.parent / "nowhere")[1]


@pytest.mark.covering(2)
@pytest.mark.parametrize("kept", ["param", "fp32"])
@pytest.mark.parametrize("wanted", ["param", "fp32"])
def test_export(kept: str, wanted: str, two_worlds: World, tmp_path: Path):
    """The weights alone, in either form from either form: the same files as a save of that form."""
    run = begin(two_worlds)
    run.train(3, look=False)
    for weights in ("param", "fp32"):
        funicular.save(run.model, run.opt, tmp_path / weights, weights=weights)
    options = ["--fp32"] if wanted == "fp32" else []
    status, text = cli("export", tmp_path / kept, tmp_path / "out", *options)
    assert status == 0, text
    assert "FN-E402" in cli("export", tmp_path / kept, tmp_path / "out")[1]
    for file in tmp_path.glob("*/optimizer*.safetensors"):
        file.unlink()
    assert_same_files(tmp_path / wanted, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "funicular.json").read_text())
    assert manifest["training"]["exported_from"].endswith(kept)


def test_left_behind(host_world: World, tmp_path: Path):
    """What killed saves left is removed by the next save beside it, and by no other command."""
    dead = tmp_path / ".funicular-save-vm-1-0123456789abcdef"
    dead.mkdir()
    (dead / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".other").mkdir()
    run = begin(host_world, Stack)
    assert "left behind" in cli("ls", tmp_path)[1]
    funicular.save(run.model, run.opt, tmp_path / "c")
    assert sorted(os.listdir(tmp_path)) == [".other", "c"]
