"""Policies: what may be used, and what lives where. docs/policy.md explains every key."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from funicular import _core

__all__ = ["Policy"]


@dataclass(frozen=True)
class Policy:
    """A resolved policy: read strictly, environment variables applied.

    Make one with :meth:`load`, :meth:`from_file`, :meth:`from_mapping` or :meth:`preset`.
    """

    _resolved: str

    @classmethod
    def load(cls, source: str | os.PathLike[str] | Policy | Mapping[str, Any] | None) -> Policy:
        """Make a policy of whatever ``funicular.offload`` takes.

        Raises
        ------
        UsageError
            ``FN-E501`` to ``FN-E504``, naming file, line, key and what would be right.
        """
        if source is None:
            return cls.from_mapping({})
        if isinstance(source, Policy):
            return source
        if isinstance(source, Mapping):
            return cls.from_mapping(source)
        return cls.from_file(source)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], **overrides: str) -> Policy:
        """Read a TOML or JSON file. ``overrides`` are keys with ``__`` for the dot: ``budget__hbm="12GiB"``."""
        return cls(_core.resolve_policy(os.fspath(path), "file", _environment(), _overrides(overrides)))

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], **overrides: str) -> Policy:
        """Take a mapping of the same shape as the file."""
        text = json.dumps(mapping, default=os.fspath)
        return cls(_core.resolve_policy(text, "json", _environment(), _overrides(overrides)))

    @classmethod
    def preset(cls, name: str, **overrides: str) -> Policy:
        """Take a preset: ``fits``, ``host``, ``nvme`` or ``laptop``."""
        return cls(_core.resolve_policy(name, "preset", _environment(), _overrides(overrides)))

    def to_json(self) -> str:
        """Return the resolved policy as JSON."""
        return self._resolved

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved policy as a mapping of the file's shape."""
        return dict(json.loads(self._resolved))

    def unit_patterns(self) -> list[str]:
        """Return the glob patterns of ``units.match``."""
        return [str(pattern) for pattern in self.to_dict()["units"]["match"]]


def _environment() -> list[tuple[str, str]]:
    return [(k, v) for k, v in os.environ.items() if k.startswith("FUNICULAR_")]


def _overrides(given: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(key.replace("__", "."), str(value)) for key, value in given.items()]
