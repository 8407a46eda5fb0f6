"""`make wheel-test` tries a wheel as a user gets it: in an environment that pip made, without Rust on the PATH."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

#: A step of training on the processor, and the same without funicular.
TRAIN = """
import copy, sys, torch, funicular
torch.manual_seed(0)
model = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh()) for _ in range(4)])
plain = copy.deepcopy(model)
x = torch.randn(8, 64)
policy = {"device": "host", "budget": {"hbm": "64KiB", "host": "64MiB", "threads": 1}}
model = funicular.offload(model, policy)
opt = funicular.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
reference = funicular.reference.ReferenceAdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
for step in range(3):
    losses = []
    for m, o in (model, opt), (plain, reference):
        loss = m(x).square().mean()
        loss.backward()
        o.step()
        o.zero_grad()
        losses.append(loss.item())
    assert losses[0] == losses[1], losses
funicular.unwrap(model)
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters()))
print("trained three steps, every weight equal to the last bit")
"""


class Environment:
    """A virtual environment in which the wheel is installed, and nothing that it does not ask for."""

    def __init__(self, folder: Path, wheel: Path, pip_args: list[str], torch_from: Path | None) -> None:
        self.folder = folder
        self.bin = folder / "environment" / "bin"
        venv.create(self.bin.parent, with_pip=True)
        pip = ["-m", "pip", "install", "--disable-pip-version-check", "--quiet", *pip_args, str(wheel.resolve())]
        self.run("python", *pip, *["--no-deps"] * bool(torch_from), env=dict(os.environ))
        if torch_from is not None:
            (packages,) = self.bin.parent.glob("lib/python*/site-packages")
            # Searched after the environment's own, and only now: pip must not see what is installed there.
            (packages / "torch.pth").write_text(f"{torch_from}\n")

    def run(
        self, program: str, *arguments: str, env: dict[str, str] | None = None, status: tuple[int, ...] = (0,)
    ) -> str:
        """Run a program of the environment in an empty folder; return what it prints."""
        bare = {"PATH": str(self.bin), "HOME": str(self.folder), "LANG": "C.UTF-8"}
        command = [str(self.bin / program), *arguments]
        done = subprocess.run(command, cwd=self.folder, env=env or bare, capture_output=True, text=True, check=False)
        if done.returncode not in status:
            sys.exit(
                f"error: {program} {shlex.join(arguments)[:80]} ended with {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done.stdout.strip()


def main() -> None:
    """Install, import, ask the command, train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pip-args", default="", help="more options for pip")
    parser.add_argument("--torch-from", type=Path, help="take torch and its like from this site-packages: no download")
    parser.add_argument("wheel", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="funicular-wheel-") as folder:
        clean = Environment(Path(folder), options.wheel, shlex.split(options.pip_args), options.torch_from)
        version = options.wheel.name.split("-")[1]
        told = clean.run("python", "-c", "import funicular; print(funicular.__version__, funicular.__file__)")
        if not told.startswith(f"{version} {clean.bin.parent}"):
            sys.exit(f"error: import funicular found {told}, not {version} in {clean.bin.parent}")
        print(f"import funicular: {version}")
        print(f"funicular --version: {clean.run('funicular', '--version')}")
        # Status 1: something on this machine could be better, which is not the wheel's doing.
        print(clean.run("funicular", "doctor", status=(0, 1)))
        # NumPy is not installed with torch, which says so.
        strict = ["-W", "error", "-W", "ignore:Failed to initialize NumPy"]
        print(clean.run("python", *strict, "-c", TRAIN))


if __name__ == "__main__":
    main()
