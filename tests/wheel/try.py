"""`make wheel-test` tries a wheel as a user gets it: in an environment that pip made, without Rust on the PATH."""

from __future__ import annotations

import argparse
import os
import re
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


#: what the toy model of the quick start is given in place of a large model's budgets
TOY = {"FUNICULAR_DEVICE": "host", "FUNICULAR_BUDGET__HBM": "4MiB", "FUNICULAR_BUDGET__HOST": "1GiB"}


class Environment:
    """A virtual environment in which the wheel is installed, and nothing that it does not ask for."""

    def __init__(self, folder: Path, wheel: Path, pip_args: list[str], torch_from: Path | None) -> None:
        self.folder = folder
        self.bin = folder / "environment" / "bin"
        venv.create(self.bin.parent, with_pip=True)
        self.bare = {"PATH": str(self.bin), "HOME": str(folder), "LANG": "C.UTF-8"}
        self.pip = ["-m", "pip", "install", "--disable-pip-version-check", "--quiet", *pip_args]
        no_deps = ["--no-deps"] * bool(torch_from)
        self.run("python", *self.pip, *no_deps, str(wheel.resolve()), env=dict(os.environ))
        if torch_from is not None:
            (packages,) = self.bin.parent.glob("lib/python*/site-packages")
            # Searched after the environment's own, and only now: pip must not see what is installed there.
            (packages / "torch.pth").write_text(f"{torch_from}\n")

    def run(
        self, program: str, *arguments: str, env: dict[str, str] | None = None, status: tuple[int, ...] = (0,)
    ) -> str:
        """Run a program of the environment in an empty folder; return what it prints."""
        command = [str(self.bin / program), *arguments]
        done = subprocess.run(
            command, cwd=self.folder, env=env or self.bare, capture_output=True, text=True, check=False
        )
        if done.returncode not in status:
            sys.exit(
                f"error: {program} {shlex.join(arguments)[:80]} ended with {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done.stdout.strip()


def quick_start(clean: Environment, disk: str) -> str:
    """Run the script of docs/quickstart.md as it is printed there, and again to resume; return what it says of its steps."""
    toy = Path(__file__).parents[1] / "python" / "toy_model.py"
    sizes = ["--rows", "2", "--passes", "2", "--length", "32", "--save-every", "2"]
    env = {**clean.bare, **TOY, "FUNICULAR_NVME__PATHS": disk}
    clean.run("python", str(toy))
    told = [clean.run("python", "finetune.py", *sizes, "--steps", steps, env=env) for steps in ("2", "4")]
    steps = [re.findall(r"^step \d+", text, re.MULTILINE) for text in told]
    if steps != [["step 1", "step 2"], ["step 3", "step 4"]]:
        sys.exit(f"error: the quick start's script did other steps than these: {told}")
    return "the quick start's script trained, and resumed from its checkpoint"


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
        with tempfile.TemporaryDirectory(prefix="funicular-wheel-", dir="/var/tmp") as disk:
            if options.torch_from is None:
                clean.run("python", *clean.pip, f"{options.wheel.resolve()}[hf]", env=dict(os.environ))
            print(quick_start(clean, disk))


if __name__ == "__main__":
    main()
