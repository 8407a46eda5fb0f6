"""What a program sees of a run that has set up no logging, and what it still decides itself when it has; and what an import costs."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

import funicular

CHILD = """
import importlib, logging, os, sys
from types import SimpleNamespace
log = importlib.import_module("funicular.report.log")
log.install()
def offload(**keys):
    raw = {"links": {}, "timed": (0, 0)}
    engine = SimpleNamespace(stats=lambda: raw, trace=lambda on: None)
    return log.StepLog(engine, {"log": {"level": "info", "every": 0, "trace": "", "trace_steps": [], **keys}})
def step(told):
    told.at("blocks.0")
    told.stepped()
logger = logging.getLogger("funicular")
"""


def said(body: str, columns: int = 0, **environment: str) -> list[str]:
    """Run a program that does not import torch; the lines of its standard error, a terminal so many columns wide if there are any."""
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "TERM")}
    env |= {"PYTHONPATH": str(Path(funicular.__file__).parents[1]), **environment}
    body += "\nassert 'torch' not in sys.modules\n"
    read, write = pty.openpty() if columns else os.pipe()
    if columns:
        fcntl.ioctl(write, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with subprocess.Popen([sys.executable, "-c", CHILD + body], stderr=write, env=env) as child:
        os.close(write)
        out = b""
        try:
            while more := os.read(read, 4096):
                out += more
        except OSError:  # a terminal whose other end is closed
            pass
    os.close(read)
    text = out.decode().replace("\r\n", "\n")
    assert child.returncode == 0, text
    return text.removesuffix("\n").split("\n") if text else []


def codes(lines: list[str]) -> list[str]:
    return re.findall(r"FN-[EWI]\d{3}", "\n".join(lines))


#: Runs a command; its arguments, and its exit code.
COMMAND = """
import runpy
sys.argv = ["funicular", *{!r}]
try:
    runpy.run_module("funicular", run_name="__main__")
except SystemExit as ended:
    assert ended.code == {}, ended.code
"""
#: A first step as long as is shown, and a load.
FIRST = "log._SOON = log._REDRAWN = 0.0\ntold = offload()\ntold.at('blocks.0')\ntold.at('the update')\n"
LOADING = """
log._REDRAWN = 0.0
if log._SOON < 1:
    log._SOON = 0.0
with log.Progress('FN-I406 loading %s', 'x') as loading:
    loading.at(3 * 10**9, 10**10)
"""
EVERY = "told = offload(every=1)\nstep(told)\nstep(told)\n"


def test_what_the_policy_asks_for_is_seen_without_logging():
    assert codes(said(EVERY)) == ["FN-I307", "FN-I307"]
    assert codes(said("step(offload(every=1, level='warning'))")) == []
    assert codes(said("log.progress('FN-I405 saved'); log.note('FN-W606 one'); log.note('FN-I605 two')")) == ["FN-W606"]
    assert codes(said("offload(level='error'); log.note('FN-W606 one')")) == []


def test_progress_is_seen_on_a_terminal():
    """The first step, and what else takes long: a bar, drawn over itself, of which a line leaves nothing."""
    assert codes(said(EVERY, 120)) == ["FN-I304", "FN-I307", "FN-I307"]
    lines = said(FIRST + "log.note('FN-W606 one')\ntold.at('blocks.1')\ntold.stepped()", 120, NO_COLOR="1")
    states = ["FN-I303 first step: blocks.0 after 0 s", "FN-I303 first step: the update after 0 s"]
    assert (
        lines[0] == "".join(["\r" + text.ljust(len(states[0])) for text in states]) + erased(states[1]) + "FN-W606 one"
    )
    assert lines[1].startswith("\rFN-I303 first step: blocks.1 after 0 s\r  ")
    assert lines[1].endswith("  \rFN-I304 the first step took 0.0 s; it learned the order of the units")
    bar = "FN-I406 loading x: [#######.................] 3.0 of 10.0 GB after 0 s"
    assert said(LOADING, 120) == [f"\r{bar}{erased(bar)}"]
    assert said(LOADING, 60)[0].startswith(f"\r{bar[:59]}\r")
    assert said("log._SOON = 100.0\n" + LOADING, 120) == []


def erased(text: str) -> str:
    return f"\r{' ' * len(text)}\r"


def test_progress_is_seen_in_a_file():
    """Of what takes long enough to be told of, a line every five seconds, and one at its end; on a terminal that cannot go back, too."""
    assert codes(said(FIRST + "told.stepped()")) == []
    slow = "log._EVERY = 0.0\n" + FIRST + "told.stepped()\n" + LOADING
    for terminal in ({}, {"columns": 120, "TERM": "dumb"}):
        lines = said(slow, **terminal)
        assert codes(lines) == ["FN-I303", "FN-I303", "FN-I304", "FN-I406"]
        assert lines[1] == "FN-I303 first step: the update after 0 s"
        assert lines[3] == "FN-I406 loading x: 3.0 of 10.0 GB after 0 s"


def test_progress_that_is_kept_back():
    for columns in (0, 120):
        for kept in (
            "logger.setLevel('ERROR')",
            "logging.disable(logging.INFO)",
            "logger.addHandler(logging.NullHandler())",
        ):
            assert said(f"log._EVERY = 0.0\n{kept}\n" + FIRST + LOADING, columns) == []
        assert said("log._EVERY = 0.0\noffload(level='warning')\n" + LOADING, columns) == []
    own = "logging.basicConfig(format='own %(message)s', level='INFO')\nlog._EVERY = 0.0\n" + LOADING
    assert said(own, 120) == ["own FN-I406 loading x: 3.0 of 10.0 GB after 0 s"]


def test_a_programs_own_logging_decides():
    """Handlers get each line once, whenever they were set up; no level and no handler of the program's is changed."""
    info = "logging.basicConfig(format='own %(message)s', level='INFO')\n"
    for body in (info + EVERY, "told = offload(every=1)\n" + info + "step(told)\nstep(told)\n"):
        lines = said(body, 120)
        assert [line[:11] for line in lines if "I307" in line] == ["own FN-I307"] * 2, lines
    # Asked for by the policy: the level of the root, a warning by default, does not keep it back.
    plain = "logging.basicConfig(format='own %(message)s')\n"
    assert codes(said(plain + EVERY, 120)) == ["FN-I307", "FN-I307"]
    for silent in (
        "logger.setLevel('ERROR')\n",
        "logging.disable(logging.INFO)\n",
        "logger.addHandler(logging.NullHandler())\n",
        "logger.addHandler(logging.StreamHandler()); logger.handlers[-1].setLevel('ERROR')\n",
    ):
        assert said(silent + EVERY, 120) == [], silent
    kept = "logger.setLevel('ERROR')\noffload(level='debug')\nassert logger.level == logging.ERROR\n"
    kept += "assert logging.getLogger().handlers == []\n"
    assert said(kept) == []


@pytest.mark.parametrize("columns", [80, 120])
def test_lines_fit_a_terminal(columns: int):
    body = "log.note('FN-W606 /mnt/a and ' + 30 * 'words ' + 'end.')"
    lines = said(body, columns)
    assert lines[0].startswith("\x1b[33mFN-W606\x1b[0m /mnt/a")
    bare = said(body, columns, NO_COLOR="1")
    assert [re.sub(r"\x1b\[\d+m", "", line) for line in lines] == bare
    assert len(bare) > 1
    assert all(len(line) <= columns for line in bare)
    assert all(line.startswith("  ") for line in bare[1:])


def test_colours_follow_one_rule():
    """Log lines and errors of the command line alike, on a terminal and in a pipe."""
    line = "log.note('FN-W606 one')"
    for columns, variables, coloured in (
        (80, {}, True),
        (80, {"NO_COLOR": "", "CLICOLOR": "1"}, True),
        (80, {"NO_COLOR": "1", "CLICOLOR_FORCE": "1"}, False),
        (80, {"CLICOLOR": "0"}, False),
        (80, {"TERM": "dumb"}, False),
        (0, {}, False),
        (0, {"CLICOLOR": "1"}, False),
        (0, {"CLICOLOR_FORCE": "1"}, True),
    ):
        text = "\n".join(said(COMMAND.format(["policy", "check", "nvme"], 1) + line, columns, **variables))
        found = ("\x1b[33mFN-W606" in text, "\x1b[31mFN-E503" in text)
        assert found == (coloured, coloured), (columns, variables, text)


@pytest.mark.parametrize("columns", [80, 120])
def test_help_fits_a_terminal(columns: int):
    for arguments in ("--help", "plan --help", "bench --help", "policy check --help"):
        lines = said("os.dup2(2, 1)\n" + COMMAND.format(arguments.split(), 0), columns)
        assert len(lines) > 5
        assert all(len(line) <= columns for line in lines), lines
    # What goes on stands under its own column.
    options = said("os.dup2(2, 1)\n" + COMMAND.format(["plan", "--help"], 0), 80)
    at = next(number for number, line in enumerate(options) if "--profile" in line)
    assert options[at + 1].startswith(" " * options[at].index("Rates of") + "writes them"), options


def test_the_doctor_fits_a_terminal():
    lines = said("os.dup2(2, 1)\n" + COMMAND.format(["doctor", "--device", "host", "--path", "/proc"], 3), 70)
    assert any("FN-E604 /proc" in line for line in lines)
    assert all(len(line) <= 70 for line in lines), lines


def test_a_standard_error_that_went_away_stops_nothing():
    assert said("sys.stderr.close()\n" + EVERY + "log.note('FN-W606 one')") == []
    assert said("sys.stderr = None\n" + EVERY) == []
    # As a write does that a signal handler makes within another one.
    body = "def write(text): raise RuntimeError\nsys.stderr = SimpleNamespace(write=write, isatty=lambda: False, flush=list)\n"
    assert said(body + EVERY) == []


# ------------------------------------------------------------------ imports


@pytest.mark.parametrize(
    "arguments",
    [
        "--version",
        "plan --params 1B --layers 4 --ram 64GiB",
        "policy schema",
        "errors FN-E202",
        "checkpoint ls /proc/self/attr",
    ],
)
def test_a_command_does_without_torch(arguments: str):
    said(COMMAND.format(arguments.split(), 2 if "ls" in arguments else 0))


def test_the_package_has_its_names_before_torch_is_there():
    said("import funicular\nassert set(funicular.__all__) <= set(dir(funicular))\nfunicular.Policy()")
    for name in funicular.__all__:
        value = getattr(funicular, name)
        assert isinstance(value, str) or value.__module__.startswith("funicular."), name
    assert callable(funicular.stats)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = funicular.nothing
