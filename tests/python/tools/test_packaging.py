"""What ships: the Makefile's first words, the wheel, and the names that the documents of contributors mention."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/benchmarks.md",
    "docs/quickstart.md",
    "docs/releasing.md",
    ".github/workflows/ci.yml",
    ".github/workflows/wheels.yml",
    ".pre-commit-config.yaml",
]
RUST = re.search(r'^rust-version = "(.*)"$', (ROOT / "Cargo.toml").read_text(), re.MULTILINE)[1]


def make(*arguments: str) -> tuple[int, str]:
    """Status and standard error of make."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in {"MAKEFLAGS", "MAKELEVEL", "VENV", "PYTHON", "ARGS"}
    }
    done = subprocess.run(["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def fake_cargo(folder: Path, script: str) -> str:
    path = folder / "cargo"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return f"CARGO={path}"


@pytest.mark.parametrize("target", ["package", "demo", "lint", "wheel", "test"])
def test_make_asks_for_rust_before_anything_else(target: str, tmp_path: Path) -> None:
    environments = [
        f"VENV={tmp_path / 'venv'}",
        f"WHEEL_VENV={tmp_path / 'wheel-venv'}",
        f"STAMPS={tmp_path / 'stamps'}",
    ]
    status, err = make(target, "CARGO=/no/such/cargo", *environments)
    assert status == 2
    assert err.startswith(f"error: cargo is not installed, and funicular is built with Rust {RUST} or newer."), err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("version", ["0.99.0", "1.9.0", "1.94.1", "1.94.0-nightly"])
def test_make_refuses_an_old_rust(version: str, tmp_path: Path) -> None:
    status, err = make("need-rust", fake_cargo(tmp_path, f"echo 'cargo {version} (abcdef 2026-01-01)'"))
    assert status == 2
    assert err.startswith(f"error: cargo {version} is too old; funicular is built with Rust {RUST} or newer."), err
    assert "rustup update" in err


@pytest.mark.parametrize("version", [RUST, f"{RUST}.0", "1.100.0", "1.97.0-nightly", "2.0.0"])
def test_make_takes_a_new_rust(version: str, tmp_path: Path) -> None:
    assert make("need-rust", fake_cargo(tmp_path, f"echo 'cargo {version}'")) == (0, "")


def test_make_shows_what_a_broken_cargo_says(tmp_path: Path) -> None:
    status, err = make("need-rust", fake_cargo(tmp_path, "echo 'toolchain is not installed' >&2; exit 1"))
    assert status == 2
    assert err.startswith("toolchain is not installed\nerror: "), err


def test_the_documents_name_the_rust_that_is_needed() -> None:
    for name in "README.md", "CONTRIBUTING.md":
        assert f"Rust {RUST} or newer" in (ROOT / name).read_text(), name


def test_wheels_and_development_use_the_same_maturin() -> None:
    pins = [
        set(re.findall(r"^maturin==.*$", (ROOT / f"requirements-{kind}.lock").read_text(), re.MULTILINE))
        for kind in ("dev", "wheel")
    ]
    assert len(pins[0]) == 1
    assert pins[0] == pins[1]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_targets_of_make_in_documents_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    known = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = re.findall(r"(?:`|run: |entry: |^)(?:[A-Z_]+=\S+ )*make ([^`\n#]*)", text, re.MULTILINE)
    named = {word for command in commands for word in re.match(r"(?:[a-z-]+ ?)*", command)[0].split()}
    assert named
    assert named <= known, f"not in the Makefile: {', '.join(sorted(named - known))}"


def test_what_test_fast_leaves_out_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (names,) = re.search(r"^SLOW_FILES := \$\(foreach name,([^,]*),", makefile, re.MULTILINE).groups()
    files = {file.stem.removeprefix("test_") for file in (ROOT / "tests" / "python").rglob("test_*.py")}
    assert set(names.replace("\\", " ").split()) - files == set()
    (folders,) = re.search(r"^SLOW_FOLDERS := \$\(addprefix tests/python/,([^)]*)\)", makefile, re.MULTILINE).groups()
    assert [name for name in folders.split() if not (ROOT / "tests" / "python" / name).is_dir()] == []


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "docs/releasing.md"])
def test_files_that_documents_name_exist(document: str) -> None:
    named = re.findall(
        r"(?<![\w.])((?:\.github|benches|docs|examples|kernels|python|src|tests)/[\w./-]+)",
        (ROOT / document).read_text(),
    )
    assert len(named) > 2
    assert [name for name in named if not (ROOT / name.rstrip(".")).exists()] == []


def repository() -> object:
    """The program that writes addresses into what PyPI shows."""
    spec = importlib.util.spec_from_file_location("repository", ROOT / ".github" / "repository.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_on_pypi_have_addresses() -> None:
    links = r"\]\(([^)]*)\)"
    before = (ROOT / "README.md").read_text()
    after = repository().absolute(before, "https://host/owner/name", "v1")
    pairs = list(zip(re.findall(links, before), re.findall(links, after), strict=True))
    assert ("docs/limits.md", "https://host/owner/name/blob/v1/docs/limits.md") in pairs
    for old, new in pairs:
        assert new == (old if old.startswith(("#", "https:")) else f"https://host/owner/name/blob/v1/{old}")
        assert old.startswith(("#", "https:")) or (ROOT / old.split("#")[0]).exists(), f"README.md links to {old}"
    urls = repository().with_urls((ROOT / "pyproject.toml").read_text(), "https://host/owner/name", "v1")
    assert '[project.urls]\nRepository = "https://host/owner/name"\n' in urls


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_wheel_in_an_environment_without_rust(tmp_path: Path) -> None:
    """As `make wheel-test`, with what `make package` has built, and with this environment's torch."""
    maturin = Path(sys.executable).with_name("maturin")
    built = [name for name in ("dev", "release") if (ROOT / "target" / "make" / f"package-{name}").exists()]
    if not maturin.exists() or not built:
        pytest.skip("needs maturin beside this Python, and what make package builds")
    build = [maturin, "build", "--profile", built[0], "--locked", "--interpreter", sys.executable, "--out", tmp_path]
    # As make has it: cargo compiles pyo3 again for another PATH.
    folders = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "VIRTUAL_ENV": str(Path(sys.executable).parents[1]), "PATH": folders}
    subprocess.run([*build, "--compatibility", "linux"], cwd=ROOT, env=env, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    packages = Path(torch.__file__).parents[1]
    tried = [sys.executable, ROOT / "tests" / "wheel" / "try.py", "--torch-from", packages, wheel]
    done = subprocess.run(tried, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every weight equal to the last bit" in done.stdout
    assert "resumed from its checkpoint" in done.stdout
