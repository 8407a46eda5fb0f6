"""What all trainers ask about: checks of settings that would move the model or train it in another way, and ranks that train it together."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NoReturn

from funicular.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from funicular.windows.session import Session

__all__ = ["MANIFEST", "check_accelerator", "check_ranks", "compare_ranks", "group_of", "keep_no_casts", "refuse"]

_log = logging.getLogger("funicular")
#: the file that a checkpoint of ``funicular.save`` has
MANIFEST = "funicular.json"


def refuse(what: str, do: str) -> NoReturn:
    """Refuse a setting.

    Raises
    ------
    UsageError
        ``FN-E141``.
    """
    raise UsageError("FN-E141", f"{what}, which does not go with an offloaded model. {do}")


def check_accelerator(accelerator: Any) -> None:
    """Refuse what would move the model or cut it in another way.

    Raises
    ------
    UsageError
        ``FN-E141``.
    """
    kind = str(accelerator.distributed_type).rpartition(".")[2]
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        refuse(
            f"this run is set up for {kind}",
            "Leave out deepspeed= and fsdp=, and start it with python, or with torchrun for several ranks.",
        )
    if getattr(accelerator, "parallelism_config", None) is not None:
        refuse("parallelism_config= is set", "Leave it out: each rank of an offloaded model has batches of its own.")
    if accelerator.num_processes > 1 and accelerator.scaler is not None:
        refuse(
            f"fp16 with a GradScaler on {accelerator.num_processes} ranks edits gradients that are the same memory for all",
            "Say bf16 in its place.",
        )


def group_of(accelerator: Any) -> str | None:
    """Return the ``group`` of ``funicular.offload`` that trains with all processes of an accelerator."""
    return None if accelerator.num_processes > 1 else "single"


def check_ranks(session: Session, processes: int, process: int) -> None:
    """Refuse a model that other ranks train than those that a trainer deals its batches to.

    Raises
    ------
    UsageError
        ``FN-E141``.
    """
    group = session.group
    rank, size = (0, 1) if group is None else (group.rank, group.size)
    if size != processes or (size > 1 and rank != process):
        refuse(
            f"the model was offloaded as rank {rank} of {size}, and this process is rank {process} of {processes} of the trainer",
            "Let the trainer offload it by policy=, or call funicular.offload in all processes once torch.distributed has begun.",
        )


def compare_ranks(folder: Path, saved: int, processes: int) -> None:
    """Say so where a checkpoint was saved by another number of ranks."""
    if saved != processes:
        _log.warning(
            "FN-W410 %s was saved by %d ranks, and this run has %d: weights and states are exact; random states, and where the data go on, "
            "are not those of the run that saved it.",
            folder,
            saved,
            processes,
        )


def keep_no_casts(accelerator: Any) -> None:
    """Have autocast cast a weight at each use: what it keeps until the end of the forward is in no budget."""
    if getattr(accelerator, "autocast_handler", None) is None:
        from accelerate.utils import AutocastKwargs

        accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
