"""Policies: what may be used, and what lives where. docs/policy.md explains every key."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from funicular import _core
from funicular.errors import UsageError

__all__ = [
    "Activations",
    "Budget",
    "Debug",
    "Log",
    "Nvme",
    "Optimizer",
    "Override",
    "Params",
    "Policy",
    "Prefetch",
    "Pressure",
    "Units",
]

Auto = Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much may be used: sizes such as ``"12GiB"``, or ``"auto"``."""

    hbm: str = "auto"
    host: str = "auto"
    nvme: str = "auto"
    threads: int | Auto = "auto"
    reserve: str = "auto"


@dataclass(frozen=True, kw_only=True)
class Nvme:
    """The NVMe tier."""

    paths: tuple[str, ...] = ()
    engine: Literal["auto", "io_uring", "threads"] = "auto"
    block: str = "1MiB"
    queue_depth: int | Auto = "auto"
    direct: Literal["auto", "required", "off"] = "auto"
    checksums: bool = True


@dataclass(frozen=True, kw_only=True)
class Params:
    """Home of the parameters, and their number format."""

    tier: Literal["auto", "host", "nvme"] = "auto"
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Home of the optimizer's states, and where the update runs."""

    tier: Literal["auto", "hbm", "host", "nvme"] = "auto"
    spare: str = "auto"
    where: Literal["auto", "cpu", "gpu"] = "auto"


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Home of the gradients of what is paged."""

    tier: Literal["auto", "host", "nvme"] = "auto"


@dataclass(frozen=True, kw_only=True)
class Units:
    """What is paged as a whole: patterns of names of modules."""

    match: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Override:
    """Homes for the units or parameters that a pattern matches; the first one that matches wins."""

    match: str
    params: Literal["auto", "host", "nvme"] | None = None
    optimizer: Literal["auto", "hbm", "host", "nvme"] | None = None


@dataclass(frozen=True, kw_only=True)
class Prefetch:
    """Looking ahead."""

    window: str = "auto"


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Micro-batches of blocks, and where their inputs wait."""

    micro_batch: int | Literal["off"] = "off"
    tier: Literal["hbm", "host"] = "hbm"


@dataclass(frozen=True, kw_only=True)
class Debug:
    """Aids for finding faults."""

    poison: bool = False
    sync: bool = False
    faults: str = ""


@dataclass(frozen=True, kw_only=True)
class Log:
    """Log lines and traces."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    every: int = 0
    trace: str = ""
    trace_steps: tuple[int, ...] = ()
    nvtx: bool = False


@dataclass(frozen=True, kw_only=True)
class Pressure:
    """What to do when a budget does not hold what the tiers ask for."""

    action: Literal["demote", "refuse"] = "refuse"


_SECTIONS: dict[str, Any] = {
    "budget": Budget,
    "nvme": Nvme,
    "params": Params,
    "optimizer": Optimizer,
    "gradients": Gradients,
    "units": Units,
    "prefetch": Prefetch,
    "activations": Activations,
    "debug": Debug,
    "log": Log,
    "pressure": Pressure,
}


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A policy: typed, frozen, and checked as a file is. Two that say the same are equal.

    ``Policy(budget=Budget(hbm="12GiB"), optimizer=Optimizer(tier="nvme"))`` says only what it says;
    :meth:`load`, :meth:`from_file`, :meth:`from_mapping` and :meth:`preset` apply ``FUNICULAR_*`` environment variables as well.

    Raises
    ------
    UsageError
        ``FN-E501`` to ``FN-E504``, naming the key and what would be right.
    """

    version: int = 1
    device: str = "auto"
    budget: Budget = field(default_factory=Budget)
    nvme: Nvme = field(default_factory=Nvme)
    params: Params = field(default_factory=Params)
    optimizer: Optimizer = field(default_factory=Optimizer)
    gradients: Gradients = field(default_factory=Gradients)
    units: Units = field(default_factory=Units)
    override: tuple[Override, ...] = ()
    prefetch: Prefetch = field(default_factory=Prefetch)
    activations: Activations = field(default_factory=Activations)
    debug: Debug = field(default_factory=Debug)
    log: Log = field(default_factory=Log)
    pressure: Pressure = field(default_factory=Pressure)

    def __post_init__(self) -> None:
        """Have the core check it, and take the core's spelling of every value."""
        resolved = json.loads(_core.resolve_policy(self.to_json(), "json", [], []))
        for name, value in _typed(resolved).items():
            object.__setattr__(self, name, value)

    @classmethod
    def load(cls, source: str | os.PathLike[str] | Policy | Mapping[str, Any] | None) -> Policy:
        """Make a policy of what ``funicular.offload`` takes: a path, a preset's name, a mapping of the file's shape, a policy or nothing.

        ``"host"`` is the preset; a file of that name is ``"./host"``.

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
        if isinstance(source, str):
            return cls._resolve(source, "name", {})
        if not isinstance(source, os.PathLike):
            raise UsageError(
                "FN-E503",
                f"a policy cannot be made of {type(source).__name__}. Give the path of a file, a preset's name, a mapping, "
                "a funicular.Policy, or None.",
            )
        return cls.from_file(source)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], **overrides: str) -> Policy:
        """Read a TOML or JSON file. ``overrides`` are keys with ``__`` for the dot: ``budget__hbm="12GiB"``."""
        return cls._resolve(os.fspath(path), "file", overrides)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], **overrides: str) -> Policy:
        """Take a mapping of the same shape as the file."""
        return cls._resolve(_as_json(mapping), "json", overrides)

    @classmethod
    def preset(cls, name: str, **overrides: str) -> Policy:
        """Take a preset: ``fits``, ``host``, ``nvme`` or ``laptop``; the latter two need ``nvme__paths="/mnt/..."``."""
        return cls._resolve(name, "preset", overrides)

    @classmethod
    def _resolve(cls, source: str, form: str, overrides: Mapping[str, str]) -> Policy:
        # Bytes that are not UTF-8 become U+FFFD, which the core refuses with the variable's name.
        environment = [(_readable(k), _readable(v)) for k, v in os.environ.items() if k.startswith("FUNICULAR_")]
        given = [(key.replace("__", "."), str(value)) for key, value in overrides.items()]
        return cls(**_typed(json.loads(_core.resolve_policy(source, form, environment, given))))

    def replace(self, **overrides: str) -> Policy:
        """Return a policy with some keys set to other values: ``policy.replace(budget__hbm="12GiB")``."""
        given = [(key.replace("__", "."), str(value)) for key, value in overrides.items()]
        return Policy(**_typed(json.loads(_core.resolve_policy(self.to_json(), "json", [], given))))

    def on_current_gpu(self) -> Policy:
        """Return the policy with the GPU that it means where it leaves the number open: torch's current one."""
        import torch  # not above: policies are read where it is not needed

        if self.device not in ("auto", "cuda") or not torch.cuda.is_available():
            return self
        number = torch.cuda.current_device()
        return self.replace(device=f"cuda:{number}") if number else self

    def to_json(self) -> str:
        """Return the policy as JSON, every key written out; a file with it reads back as the same policy."""
        return _as_json(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return the policy as a mapping of the file's shape."""
        whole = dataclasses.asdict(self)
        whole["override"] = [{k: v for k, v in one.items() if v is not None} for one in whole["override"]]
        return whole

    def unit_patterns(self) -> list[str]:
        """Return the patterns of ``units.match``."""
        return list(self.units.match)


def _readable(text: str) -> str:
    return os.fsencode(text).decode(errors="replace")


def _as_json(mapping: Mapping[str, Any]) -> str:
    try:
        return json.dumps(mapping, default=_path)
    except (TypeError, ValueError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise UsageError(
            "FN-E503",
            f"a policy cannot be made of this mapping: {why}. Give text, numbers, booleans, paths, and lists and dicts of them.",
        ) from None


def _path(value: Any) -> str:
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str):
        raise TypeError(f"{value!r:.100} is of type {type(value).__name__}")
    return path


def _typed(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a resolved mapping into sections."""

    def frozen(section: Mapping[str, Any]) -> dict[str, Any]:
        return {key: tuple(value) if isinstance(value, list) else value for key, value in section.items()}

    typed = {key: _SECTIONS[key](**frozen(value)) if key in _SECTIONS else value for key, value in mapping.items()}
    typed["override"] = tuple(Override(**one) for one in mapping.get("override", []))
    return typed
