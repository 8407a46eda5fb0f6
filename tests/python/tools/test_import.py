"""Importing the package defines names; what else its use does to the process is one function, which does it once."""

from __future__ import annotations

import subprocess
import sys

COUNT = """
import atexit, os, sys, types
import torch, torch.optim, torch.utils._foreach_utils
from multiprocessing.reduction import ForkingPickler
forks = []
os.register_at_fork = lambda **hooks: forks.append(hooks)
def effects():
    supported = torch.utils._foreach_utils._foreach_supported_types
    named = [c for c in (*ForkingPickler._extra_reducers, *supported) if c.__module__.startswith("funicular")]
    ours = torch._C._autograd._push_saved_tensors_default_hooks
    return atexit._ncallbacks(), len(forks), len(named), getattr(ours, "__module__", None) == "funicular.torch_internals.saved_hooks"
before = effects()
"""


def said(body: str) -> str:
    return subprocess.run([sys.executable, "-c", COUNT + body], capture_output=True, text=True, check=True).stdout


def test_modules_have_no_effects():
    """With the function that has them replaced, nothing is left of an import."""
    body = """
sys.modules["funicular.install"] = types.SimpleNamespace(install=lambda: None)
import funicular
print(all(getattr(funicular, name) for name in funicular.__all__), effects() == before)
"""
    assert said(body) == "True True\n"


def test_an_import_alone_has_none():
    """They come with the first name that needs torch."""
    assert said("import funicular\nfunicular.Policy()\nprint(effects() == before)") == "True\n"
    assert said("import funicular\nfunicular.offload\nprint(effects() == before)") == "False\n"


def test_they_come_once():
    body = """
import funicular, importlib
funicular.offload
first = effects()
importlib.reload(funicular)
funicular.save
print(first[0] - before[0], first[1] - before[1], first[2] - before[2], effects() == first)
"""
    assert said(body) == "2 2 4 True\n"
