"""Log lines and traces of chosen steps, as ``[log]`` of the policy asks."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from funicular.errors import Error, StorageError
from funicular.report.step_time import step_time

if TYPE_CHECKING:
    from funicular._core import Engine

__all__ = ["StepLog"]

_log = logging.getLogger("funicular")


class StepLog:
    """Counts steps of one model."""

    def __init__(self, engine: Engine, policy: dict[str, Any]) -> None:
        log = policy["log"]
        self.engine = engine
        self.every = int(log["every"])
        self.wants_trace = bool(log["trace"])
        # Here and now: the program may go to another folder.
        self.trace = str(Path(str(log["trace"])).absolute())
        self.traced = frozenset(int(step) for step in log["trace_steps"])
        self.step = 1
        self._tracing = self._over = False
        self._last = (time.monotonic(), {name: moved for name, (moved, _) in engine.stats()["links"].items()})
        _log.setLevel(str(log["level"]).upper() if log["level"] != "off" else logging.CRITICAL + 1)
        self._trace_next()

    def stepped(self) -> None:
        """Note the end of an optimizer step. The step is taken: a trace that cannot be written any more is no error of it."""
        step, self.step = self.step, self.step + 1
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
            events = self.engine.write_trace(self.trace)
            _log.info("FN-I306 trace of step %d with %d events in %s", step, events, self.trace)
        except StorageError as error:
            _log.error("%s", error)

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
        _log.info(
            "FN-I307 step %d: %.3f s/step; %s; the last that is over: %s",
            step,
            seconds / self.every,
            rates,
            "none" if last is None else f"{last}; bound by {last.binding}",
        )
        self._last = (now, moved)


def _listed(steps: list[int]) -> str:
    """``3``, ``3, 4``, or ``3, 4, ... 900`` where there are many."""
    shown = [str(step) for step in steps]
    return ", ".join(shown if len(shown) <= 4 else [*shown[:2], f"... {shown[-1]}"])
