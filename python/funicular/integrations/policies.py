"""The ``policy`` argument of trainers: all that ``funicular.offload`` takes, and configurations of DeepSpeed."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from funicular.errors import UsageError
from funicular.policy import Policy

if TYPE_CHECKING:
    import torch

__all__ = ["policy_of"]

_log = logging.getLogger("funicular")
#: sections that every configuration of DeepSpeed has that offloads, and no policy has
_DEEPSPEED = "zero_optimization"


def policy_of(source: Any, device: torch.device | None = None) -> Policy:
    """Make a policy of a path, a preset's name, a mapping, a policy, a DeepSpeed configuration (file or mapping), or None.

    Parameters
    ----------
    device : torch.device or None
        Where the trainer computes: a policy that leaves the device open computes there.

    Raises
    ------
    UsageError
        ``FN-E501`` to ``FN-E507``.
    """
    policy = _imported(source) or Policy.load(source)
    if device is not None and policy.device == "auto":
        policy = policy.replace(device="host" if device.type == "cpu" else f"cuda:{device.index or 0}")
    return policy


def _imported(source: Any) -> Policy | None:
    if isinstance(source, Mapping):
        if _DEEPSPEED not in source:
            return None
        with tempfile.TemporaryDirectory(prefix="funicular-") as folder:
            path = Path(folder) / "deepspeed.json"
            path.write_text(json.dumps(source, default=os.fspath))
            return _import(path)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.suffix in (".yaml", ".yml") or (path.suffix == ".json" and _is_deepspeed(path)):
            return _import(path)
    return None


def _is_deepspeed(path: Path) -> bool:
    try:
        said = json.loads(path.read_text())
    except (OSError, ValueError):
        return False  # the policy's own reader says what is wrong
    return isinstance(said, dict) and _DEEPSPEED in said


def _import(path: Path) -> Policy:
    """Read a configuration as ``funicular policy import`` does, and say what it leaves open."""
    command = [sys.executable, "-m", "funicular", "policy", "import", os.fspath(path)]
    # In a process of its own: the command writes to the process's standard output.
    places = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": places}
    )
    if done.returncode:
        code, _, message = done.stderr.strip().removeprefix("error: ").partition(" ")
        known = code.rstrip(":") if code.startswith("FN-E") else "FN-E507"
        raise UsageError(known, message if code.startswith("FN-E") else done.stderr.strip())
    open_ = _undecided(done.stdout)
    if open_:
        _log.warning(
            "FN-W507 %s leaves %d keys to you: %s. `funicular policy import %s` lists them with all others.",
            path,
            len(open_),
            "; ".join(open_),
            path,
        )
    with tempfile.TemporaryDirectory(prefix="funicular-") as folder:
        policy = Path(folder) / "policy.toml"
        policy.write_text(done.stdout)
        return Policy.from_file(policy)


def _undecided(text: str) -> list[str]:
    """Return the lines of the third list of an imported policy."""
    _, _, rest = text.partition("# needs a decision")
    lines = rest.splitlines()[1:]
    found = []
    for line in lines:
        if not line.startswith("#   "):
            break
        found.append(line.removeprefix("#   "))
    return found
