"""Log lines, progress on a terminal, and traces of chosen steps, as ``[log]`` of the policy asks.

Everything is logged by the logger ``funicular``, whose level and handlers are the user's. A program that has set up no logging
still sees warnings, what its policy asks for, and progress: they go to standard error then, and only then. Progress is a bar on a
terminal, and elsewhere a line every five seconds of what takes as long.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from funicular._core import coloured, merge_traces, trace_of_rank, wrapped
from funicular.errors import Error, StorageError
from funicular.report.step_time import step_time

if TYPE_CHECKING:
    from funicular._core import Engine

__all__ = ["Progress", "StepLog", "install", "note", "progress", "tell"]

_log = logging.getLogger("funicular")
#: seconds between two lines of progress
_EVERY = 5.0
#: seconds after which a bar is shown, and between two of its states
_SOON, _REDRAWN = 0.5, 0.1
#: signs of a bar
_SIGNS = 24
_COLOURS = {logging.WARNING: "33", logging.ERROR: "31"}


class _StandardError(logging.Handler):
    """Prints lines for programs that have set up no logging; silent as soon as another handler gets them."""

    def emit(self, record: logging.LogRecord) -> None:
        if self.alone():
            _bar.clear()
            # A terminal that went away stops no training.
            with contextlib.suppress(Exception):
                sys.stderr.write(_shown(record))
                sys.stderr.flush()

    def alone(self) -> bool:
        """Whether lines of the logger come to no other handler."""
        logger: logging.Logger | None = _log
        while logger is not None:
            if any(handler is not self for handler in logger.handlers):
                return False
            logger = logger.parent if logger.propagate else None
        return True


class _Bar:
    """The last line of a terminal, which shows how far something has come until another line takes its place."""

    def __init__(self) -> None:
        self._signs = 0

    def draw(self, text: str) -> None:
        """Show a state in place of the one before, cut to one line."""
        with contextlib.suppress(Exception):
            text = text[: max(40, os.get_terminal_size(sys.stderr.fileno()).columns) - 1]
            self._write(f"\r{text.ljust(self._signs)}")
            self._signs = len(text)

    def clear(self) -> None:
        """Leave nothing of it."""
        signs, self._signs = self._signs, 0
        if signs:
            with contextlib.suppress(Exception):
                self._write(f"\r{' ' * signs}\r")

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


_standard_error = _StandardError(logging.INFO)
_bar = _Bar()


def install() -> None:
    """Have lines printed for programs that set up no logging."""
    _log.addHandler(_standard_error)


def _terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # none, or closed
        return False


def _shown(record: logging.LogRecord) -> str:
    """Cut a line for the terminal that it goes to, and colour its code, as the command line does."""
    text, terminal = record.getMessage(), _terminal()
    if terminal:
        text = wrapped(text, max(40, os.get_terminal_size(sys.stderr.fileno()).columns))
    if text.startswith("FN-") and coloured(terminal):
        code, _, rest = text.partition(" ")
        text = f"\x1b[{_COLOURS.get(record.levelno, '36')}m{code}\x1b[0m {rest}"
    return f"{text}\n"


def tell(message: str, *args: object) -> None:
    """Log what the policy asks for: only a level of the logger ``funicular`` itself, or a handler's, keeps it back."""
    _handle(message, args, wanted=True)


def progress(message: str, *args: object) -> None:
    """Log progress: where no logging is set up, it is seen on a terminal."""
    _handle(message, args, wanted=_standard_error.alone() and _terminal())


def note(text: str) -> None:
    """Log what the core has noted: a warning (``FN-W``), or a fact (``FN-I``)."""
    if text.startswith("FN-W"):
        _log.warning("%s", text)
    else:
        progress("%s", text)


def _silenced() -> bool:
    """Whether the program keeps lines of this logger back."""
    return _log.level != logging.NOTSET or _log.manager.disable >= logging.INFO


def _draws() -> bool:
    """Whether progress is a bar: on a terminal that can go back in a line, where no logging is set up, and no level keeps it back."""
    shown = _standard_error.alone() and not _silenced() and _standard_error.level <= logging.INFO
    return shown and _terminal() and os.environ.get("TERM") != "dumb"


def _handle(message: str, args: tuple[object, ...], *, wanted: bool) -> None:
    if _log.isEnabledFor(logging.INFO):
        _log.info(message, *args, stacklevel=3)
    elif wanted and not _silenced():
        _log.handle(_log.makeRecord(_log.name, logging.INFO, "funicular", 0, message, args, None))


class Progress:
    """How far something has come that may take long, as a context: on a terminal a bar, elsewhere a line every five seconds."""

    def __init__(self, what: str, *args: object) -> None:
        self._what, self._args = what, args
        self._began = self._last = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        _bar.clear()

    @property
    def seconds(self) -> float:
        """Time since it began."""
        return time.monotonic() - self._began

    @property
    def pause(self) -> float:
        """Seconds after which to tell again."""
        return _REDRAWN if _draws() else _EVERY

    def at(self, done: int, total: int | None = None) -> None:
        """Tell how many bytes are done, of how many, if that is due."""
        of = "" if total is None else f" of {total / 1e9:.1f}"
        signs = 0 if not total else min(_SIGNS, _SIGNS * done // total)
        self.now(f"{done / 1e9:.1f}{of} GB", f"[{'#' * signs}{'.' * (_SIGNS - signs)}] " if total else "")

    def now(self, where: str, bar: str = "") -> None:
        """Tell where it is, if that is due."""
        now = time.monotonic()
        if now - self._began < _SOON or now - self._last < _REDRAWN:
            return
        if _draws():
            self._last = now
            _bar.draw(f"{self._what % self._args}: {bar}{where} after {self.seconds:.0f} s")
        elif now - self._last >= _EVERY:
            self._last = now
            _handle(
                f"{self._what}: %s after %.0f s", (*self._args, where, self.seconds), wanted=_standard_error.alone()
            )

    def end(self, message: str, *args: object) -> None:
        """Tell that it has ended: on a terminal, and elsewhere if it took as long as to be told of before."""
        _bar.clear()
        wanted = _standard_error.alone() and (_terminal() or self.seconds >= _EVERY)
        _handle(message, args, wanted=wanted)


class StepLog:
    """Counts steps of one model; of one of several ranks, by its number and how many there are."""

    def __init__(self, engine: Engine, policy: dict[str, Any], ranks: tuple[int, int] | None = None) -> None:
        log = policy["log"]
        self.engine = engine
        self.every = int(log["every"])
        self.wants_trace = bool(log["trace"])
        # Here and now: the program may go to another folder.
        self.trace = str(Path(str(log["trace"])).absolute())
        self._ranks = ranks
        #: where this process writes
        self._own = self.trace if ranks is None else trace_of_rank(self.trace, ranks[0])
        #: the traces of all ranks are to be merged, by this one
        self._unmerged = False
        self.traced = frozenset(int(step) for step in log["trace_steps"])
        self.step = 1
        self._tracing = self._over = False
        self._last = (time.monotonic(), {name: moved for name, (moved, _) in engine.stats()["links"].items()})
        _standard_error.setLevel(str(log["level"]).upper())
        self._first: Progress | None = None
        self._trace_next()

    def at(self, where: str) -> None:
        """Note where a step is: of the first one, which learns the order and may read everything from disk, it is told."""
        if self.step == 1:
            if self._first is None:
                self._first = Progress("FN-I303 first step")
            self._first.now(where)

    def stepped(self) -> None:
        """Note the end of an optimizer step. The step is taken: a trace that cannot be written any more is no error of it."""
        step, self.step = self.step, self.step + 1
        self._merge()  # all have written theirs: they have taken the step before this one
        if self._first is not None:
            self._first.end(
                "FN-I304 the first step took %.1f s; it learned the order of the units", self._first.seconds
            )
            self._first = None
        if self._tracing and self.step not in self.traced:
            self._write_trace(step)
        if self.every and step % self.every == 0:
            self._facts(step)
        self._trace_next()

    def ended(self) -> None:
        """Note the end of the run: write what was traced so far, and warn of steps that did not come."""
        if self._over:
            return
        self._over = True
        if self._tracing and self.step - 1 in self.traced and not self.engine.failed():
            try:
                self._write_trace(self.step - 1)
            except Error as error:
                _log.error("%s", error)
        self._tracing = False
        self._merge()
        missing = sorted(step for step in self.traced if step >= self.step)
        if self.wants_trace and (missing or not self.traced):
            _log.warning(
                "FN-W308 log.trace = '%s': %s; %s. Name steps that come in log.trace_steps.",
                self.trace,
                f"step {_listed(missing)} did not come" if missing else "log.trace_steps names no step",
                f"the run ended after step {self.step - 1}" if self.step > 1 else "the run took no step",
            )

    def _write_trace(self, step: int) -> None:
        try:
            events = self.engine.write_trace(self._own)
            tell("FN-I306 trace of step %d with %d events in %s", step, events, self._own)
            self._unmerged = self._ranks is not None and self._ranks[0] == 0
        except StorageError as error:
            _log.error("%s", error)

    def _merge(self) -> None:
        """Have the traces of all ranks in one file, if they are to be. Nothing is waited for: one that is not there yet is told."""
        if not self._unmerged or self._ranks is None:
            return
        self._unmerged = False
        size = self._ranks[1]
        try:
            events = merge_traces(self.trace, size)
            tell("FN-I310 traces of %d ranks with %d events in %s", size, events, self.trace)
        except Error as error:
            files = " ".join(shlex.quote(trace_of_rank(self.trace, rank)) for rank in range(size))
            _log.warning(
                "FN-W309 the traces of the ranks were not merged: %s When all ranks have ended: funicular trace merge %s -o %s",
                error,
                files,
                shlex.quote(self.trace),
            )

    def _trace_next(self) -> None:
        wanted = self.step in self.traced
        if wanted != self._tracing:
            self.engine.trace(wanted)
            self._tracing = wanted

    def _facts(self, step: int) -> None:
        raw = self.engine.stats()
        now = time.monotonic()
        then, moved_then = self._last
        seconds = max(now - then, 1e-9)
        moved = {name: total for name, (total, _) in raw["links"].items()}
        rates = ", ".join(
            f"{name} {(moved[name] - moved_then[name]) / seconds / 1e9:.2f} GB/s"
            for name in moved
            if moved[name] > moved_then[name]
        )
        # Not this one, on a GPU: the program runs ahead of it.
        last = step_time(raw, "last", min(raw["timed"][0], 1))
        tell(
            "FN-I307 step %d: %.3f s/step; %s; the last that is over: %s",
            step,
            seconds / self.every,
            rates,
            "none" if last is None else f"{last}; bound by {last.bound}",
        )
        self._last = (now, moved)


def _listed(steps: list[int]) -> str:
    """``3``, ``3, 4``, or ``3, 4, ... 900`` where there are many."""
    shown = [str(step) for step in steps]
    return ", ".join(shown if len(shown) <= 4 else [*shown[:2], f"... {shown[-1]}"])
