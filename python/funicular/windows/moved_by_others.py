"""Other libraries that move a model's weights or replicate them, and weights that were frozen too late."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn

from funicular.errors import UsageError
from funicular.torch_internals.sharding import watch_sharding
from funicular.units.classes import is_dtensor, pageable
from funicular.units.dtypes import TRAINED, state_bytes
from funicular.units.param import ref_of
from funicular.windows.lookup import session_of
from funicular.windows.residents import resident_session

if TYPE_CHECKING:
    from funicular.windows.session import Session

__all__ = [
    "refuse_added",
    "refuse_for_ranks",
    "refuse_movers",
    "refuse_sharding",
    "warn_of_frozen",
    "watch_replication",
]

_log = logging.getLogger("funicular")
#: modules that exchange gradients, or hold parts of weights: named, since an import of them takes seconds
_FSDP = frozenset(["FullyShardedDataParallel", "FSDPModule"])
_SHARDING = _FSDP | {"DistributedDataParallel", "DataParallel"}


def refuse_movers(model: nn.Module) -> None:
    """Refuse a model whose weights another library moves.

    Raises
    ------
    UsageError
        ``FN-E140``, before anything is touched.
    """
    for name, module in model.named_modules():
        where = f"'{name}'" if name else f"this {type(module).__name__}"
        if hasattr(module, "_hf_hook"):
            raise UsageError(
                "FN-E140",
                f"{where} has a hook of accelerate (device_map, dispatch_model, cpu_offload), which moves weights itself. Load the model "
                "without device_map, or call accelerate.hooks.remove_hook_from_module(model, recurse=True) before funicular.offload.",
            )
        if isinstance(module, nn.DataParallel):
            raise UsageError(
                "FN-E140", f"{where} is nn.DataParallel, which replicates weights over GPUs. Offload the module in it."
            )


def refuse_for_ranks(model: nn.Module) -> None:
    """Refuse what several ranks cannot train yet.

    Raises
    ------
    UsageError
        ``FN-E704``, before anything is touched.
    """
    for name, module in model.named_modules():
        kinds = {c.__name__ for c in type(module).__mro__} & _SHARDING
        if kinds:
            where, kind = f"'{name}'" if name else "this model", kinds.pop()
            if kind in _FSDP:
                text = (
                    f"{where} is {kind}, whose weights FSDP has cut into parts. Build the model without it: several ranks of a host hold the "
                    "weights of an offloaded model once, and exchange gradients, without it."
                )
            else:
                text = (
                    f"{where} is {kind}, which exchanges gradients itself. Offload the model in it: several ranks exchange their gradients "
                    'without it; or give group="single" for a model of this process alone.'
                )
            raise UsageError("FN-E704", text)
    for name, p in model.named_parameters():
        if is_dtensor(p):
            continue  # refused with and without ranks (FN-E112)
        if p.requires_grad and (not pageable(p) or p.dtype not in TRAINED):
            raise UsageError(
                "FN-E704",
                f"'{name}' is a {type(p).__name__} of {p.dtype}, which is not paged, and so not exchanged between ranks. Freeze it.",
            )
        if p.grad is not None:
            raise UsageError(
                "FN-E704",
                f"'{name}' has a gradient already, which is this rank's alone. Call model.zero_grad() before funicular.offload.",
            )


def refuse_added(session: Session) -> None:
    """Refuse to train, on several ranks, parameters that came into the model after ``offload``: nothing exchanges their gradients.

    Raises
    ------
    UsageError
        ``FN-E704``.
    """
    model = None if session.group is None or session.held is None else session.held.model()
    for name, p in () if model is None else model.named_parameters():
        if p.requires_grad and isinstance(p, nn.Parameter) and ref_of(p) is None and resident_session(p) is None:
            raise UsageError(
                "FN-E704",
                f"'{name}' is trained and came into the model after funicular.offload: no rank exchanges its gradient, and each would train "
                "one of its own. Add it before funicular.offload (get_peft_model, add_adapter), or freeze it.",
            )


def watch_replication() -> None:
    """Have ``nn.DataParallel`` and FSDP refuse to take an offloaded model, and DDP to exchange what ranks have exchanged."""
    watch_sharding(refuse_sharding)
    replicate = nn.DataParallel.replicate

    def refusing(self: Any, module: Any, device_ids: Any) -> Any:
        if any(session_of(part) is not None for part in module.modules()):
            raise UsageError(
                "FN-E140",
                "nn.DataParallel would copy all weights of an offloaded model to each GPU. Call the model itself; with the Hugging Face "
                "Trainer use funicular.integrations.transformers, or show the process one GPU (CUDA_VISIBLE_DEVICES=0).",
            )
        return replicate(self, module, device_ids)

    nn.DataParallel.replicate = refusing  # type: ignore[method-assign]
    begin = nn.parallel.DistributedDataParallel.__init__

    def refusing_ranks(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        sessions = [session for part in module.modules() if (session := session_of(part)) is not None]
        if any(session.group is not None for session in sessions):
            raise UsageError(
                "FN-E704",
                "DistributedDataParallel would exchange gradients that the ranks of an offloaded model exchange themselves. Leave it out, or "
                'give funicular.offload group="single": then each rank has a copy of everything.',
            )
        begin(self, module, *args, **kwargs)
        if sessions and dist.get_world_size(self.process_group) > 1 and dist.get_rank(self.process_group) == 0:
            _log.warning(
                "FN-W723 DistributedDataParallel around an offloaded model: each rank has a copy of its weights, gradients and optimizer states, "
                'in host memory and on NVMe too. Without it, and without group="single", the ranks of a host share one (docs/ranks.md).'
            )

    functools.update_wrapper(refusing_ranks, begin)
    nn.parallel.DistributedDataParallel.__init__ = refusing_ranks  # type: ignore[method-assign]


def refuse_sharding(by: str, modules: Any) -> None:
    """Refuse that FSDP takes an offloaded model, a part of one, or one with an offloaded part.

    Raises
    ------
    UsageError
        ``FN-E140``, before anything is touched.
    """
    every = [modules] if isinstance(modules, nn.Module) else [m for m in modules if isinstance(m, nn.Module)]
    offloaded = any(session_of(part) is not None for module in every for part in module.modules())
    if offloaded or any(ref_of(p) is not None for module in every for p in module.parameters()):
        raise UsageError(
            "FN-E140",
            f"{by} (FSDP) would cut the weights of an offloaded model into parts and hold them itself. Leave it out: several ranks of a host "
            "train an offloaded model without it, and hold its weights once (torch.distributed.init_process_group() before "
            "funicular.offload). To use FSDP in its place, call funicular.unwrap(model) first.",
        )


def warn_of_frozen(session: Session) -> None:
    """Say how much was set aside for weights that are frozen now: PEFT freezes those of the model that it is given."""
    frozen = [ref for unit in session.units for ref in unit.params if ref.trainable and not ref.param.requires_grad]
    wasted = sum(ref.numel * (state_bytes(ref.home.dtype) + ref.home.element_size()) for ref in frozen)
    whole = sum(ref.numel * ref.home.element_size() for unit in session.units for ref in unit.params)
    if frozen and wasted > whole:
        _log.warning(
            "FN-W140 %d weights ('%s', ...) are frozen, and were not when the model was offloaded: %.2f GB for their gradients and states "
            "stay reserved and unused. Freeze weights, and call get_peft_model, before funicular.offload.",
            len(frozen),
            frozen[0].name,
            wasted / 1e9,
        )
