"""Variables of the environment that torch reads when a group of ranks is made."""

from __future__ import annotations

import ctypes
import os
import subprocess

import forks
from funicular.testing import environment

_getenv = ctypes.CDLL(None).getenv
_getenv.restype = ctypes.c_char_p
NAME = "FUNICULAR_OF_A_TEST"


def test_native_code_sees_it_for_as_long():
    for before in (None, "as before"):
        if before is not None:
            os.environ[NAME] = before
        try:
            home = _getenv(b"PATH")
            with environment(NAME, "within"):
                assert _getenv(NAME.encode()) == b"within"
                assert _getenv(b"PATH") == home
                assert os.environ.get(NAME) == before
            assert _getenv(NAME.encode()) == (None if before is None else before.encode())
        finally:
            os.environ.pop(NAME, None)


def test_what_is_set_meanwhile_stays():
    try:
        with environment(NAME, "within"):
            os.environ["FUNICULAR_OF_ANOTHER_THREAD"] = "stays"
        assert _getenv(NAME.encode()) is None
        assert _getenv(b"FUNICULAR_OF_ANOTHER_THREAD") == b"stays"
        assert _getenv(b"PATH") == os.environb[b"PATH"]
    finally:
        os.environ.pop("FUNICULAR_OF_ANOTHER_THREAD", None)


def test_what_is_changed_or_taken_away_meanwhile_stays_so():
    """The C library does so in the array that is shown, and moves nothing."""
    changed, gone = "FUNICULAR_CHANGED", "FUNICULAR_GONE"
    os.environ.update({changed: "before", gone: "before"})
    try:
        with environment(NAME, "within"):
            os.environ[changed] = "after"
            del os.environ[gone]
        assert _getenv(NAME.encode()) is None
        assert _getenv(changed.encode()) == b"after"
        assert _getenv(gone.encode()) is None
    finally:
        os.environ.pop(changed, None)
        os.environ.pop(gone, None)


def test_threads_read_it_meanwhile():
    """With ``os.environ[...] = ...`` in its place this process ends by signal 11: so many variables move their array."""
    code = """
import contextlib, ctypes, threading, time
from funicular.testing import environment
getenv = ctypes.CDLL(None).getenv
ends = time.monotonic() + 3
def read():
    while time.monotonic() < ends:
        for _ in range(100):
            getenv(b"FUNICULAR_OF_A_TEST")
readers = [threading.Thread(target=read) for _ in range(4)]
for reader in readers:
    reader.start()
rounds = 0
while time.monotonic() < ends:
    with contextlib.ExitStack() as stack:
        for number in range(100):
            stack.enter_context(environment(f"FUNICULAR_{number}", "1"))
    rounds += 1
for reader in readers:
    reader.join()
assert rounds > 0
"""
    process = forks.python(code, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
