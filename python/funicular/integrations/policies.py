"""The ``policy`` argument of trainers: all that ``funicular.offload`` takes, and configurations of DeepSpeed; and budgets of several models."""

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

from funicular import _core
from funicular.errors import UsageError
from funicular.policy import Policy
from funicular.units.dtypes import state_bytes
from funicular.windows.beside import counted_twice
from funicular.windows.lookup import session_for

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import nn

__all__ = ["divided", "policy_of", "refuse_twice"]

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


def divided(source: Any, *models: nn.Module) -> list[Policy]:
    """Divide the budgets of a policy between models that one process offloads; each is offloaded with its part.

    Memory of the device is divided by the bytes of weights; host memory and NVMe by what weights, gradients and AdamW's states take, of
    which frozen weights have the first alone. What is ``"auto"`` stays so: it is what the machine has left when a model is offloaded.

    Parameters
    ----------
    source : any
        All that ``policy=`` of a trainer takes.
    *models : nn.Module
        Not offloaded yet, with ``requires_grad`` as they are to be trained.

    Returns
    -------
    list of Policy
        One for each model. Their budgets add up to no more than those of the policy.
    """
    policy = policy_of(source)
    weights = [sum(p.nbytes for p in model.parameters()) for model in models]
    needs = [sum(_need(p) for p in model.parameters()) for model in models]
    shares = {"hbm": weights, "host": needs, "nvme": needs}
    given = {tier: str(getattr(policy.budget, tier)) for tier in shares}
    sizes = {tier: _core.size_in_bytes(size) for tier, size in given.items() if size != "auto"}
    parts: list[dict[str, int]] = []
    for index in range(len(models)):
        parts.append({tier: size * shares[tier][index] // max(sum(shares[tier]), 1) for tier, size in sizes.items()})
    # Parts of equal models differ by a byte: equal ones would look like one policy that two models were given.
    repeats = [parts[:index].count(part) for index, part in enumerate(parts)]
    keys = [
        {f"budget__{tier}": f"{max(size - less, 0)}B" for tier, size in part.items()}
        for part, less in zip(parts, repeats, strict=True)
    ]
    return [policy.replace(**said) for said in keys]


def _need(p: torch.Tensor) -> int:
    return p.nbytes + (p.nbytes + p.numel() * state_bytes(p.dtype) if p.requires_grad else 0)


def refuse_twice(policy: Policy, models: Iterable[nn.Module]) -> None:
    """Refuse a policy whose sizes another model of the same trainer has: both would take them in full.

    Raises
    ------
    UsageError
        ``FN-E141``.
    """
    for model in models:
        session = session_for(model)
        sizes = "" if session is None else counted_twice(policy, None, session)
        if sizes:
            raise UsageError(
                "FN-E141",
                f"policy= has the budgets with which the trainer's other model ({type(model).__name__}) was offloaded, and both would take "
                f"them in full: {sizes} twice. Divide them: mine, its = "
                "funicular.integrations.policies.divided(policy, model, ref_model), offload the other one with its, and say policy=mine.",
            )


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
