"""Hugging Face's Trainer, and every trainer that subclasses it, over an offloaded model."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback

from funicular.checkpoint.save_load import load, load_weights, save
from funicular.errors import UsageError
from funicular.integrations.figures import Figures
from funicular.integrations.policies import policy_of, refuse_twice
from funicular.integrations.pretrained import save_pretrained
from funicular.integrations.settings import (
    MANIFEST,
    check_accelerator,
    check_ranks,
    compare_ranks,
    group_of,
    keep_no_casts,
    refuse,
)
from funicular.offloading import offload
from funicular.optim.adamw import AdamW
from funicular.windows.lookup import session_for
from funicular.windows.ranked import together

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from funicular.windows.session import Session

__all__ = ["OffloadMixin", "StatsCallback", "offloaded"]

_log = logging.getLogger("funicular")

#: values of ``TrainingArguments.optim`` that compute AdamW with fp32 states
_ADAMW = frozenset({
    "adamw_hf", "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_apex_fused", "paged_adamw_32bit",
    "paged_adamw",
})  # fmt: skip
#: parts of names of those whose kernels or hooks take weights from where they are
_REFUSED = ("8bit", "4bit", "_bnb", "paged", "layerwise", "lomo", "anyprecision")
_STATE = "trainer_state.json"


class StatsCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Adds tokens per second, MFU, stalls and the use of tiers to what a trainer logs, for all of its reporters.

    :class:`OffloadMixin` has one. In other trainers it goes before the reporters: ``trainer.callback_handler.callbacks.insert(0, ...)``.

    Parameters
    ----------
    peak_flops : float or None
        Operations per second of the device at best, if it is none of those that are known.
    """

    def __init__(self, peak_flops: float | None = None) -> None:
        self._peak = peak_flops
        self._figures: Figures | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to count."""
        self._close()
        self._figures = Figures(kwargs["model"], self._peak)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add to a log line of training."""
        logs = kwargs.get("logs")
        if self._figures is not None and isinstance(logs, dict) and "loss" in logs:
            logs.update(self._figures.take())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count no more."""
        self._close()

    def _close(self) -> None:
        if self._figures is not None:
            self._figures.close()
            self._figures = None


class OffloadMixin:
    """The first base of a trainer's class: its model is offloaded where the trainer would move it to the GPU.

    ``class Mine(OffloadMixin, SFTTrainer): policy = "host"``, or ``policy=`` in the constructor, or :func:`offloaded` without a class.

    - ``TrainingArguments(optim=...)`` of AdamW becomes ``funicular.AdamW``. Others run over the weights' homes, with states in no
      budget (``FN-W130``), or are refused by name.
    - ``checkpoint-N`` is written by ``funicular.save``, and read by ``funicular.load``: no second copy of weights or states is made. It
      counts once ``trainer_state.json``, the last file, is whole. Checkpoints of the plain trainer can be resumed, too.
    - ``save_model`` writes the files of ``save_pretrained``, a tensor at a time.
    - Several processes of one host, started by ``torchrun`` or ``accelerate launch``, train the model together (docs/ranks.md).

    Attributes
    ----------
    policy : any
        All that ``funicular.offload`` takes, or the path of a DeepSpeed configuration.
    """

    policy: Any = None

    if TYPE_CHECKING:
        args: Any
        model: Any
        model_wrapped: Any
        accelerator: Any
        optimizer: Any
        optimizer_cls_and_kwargs: Any
        lr_scheduler: Any
        callback_handler: Any
        state: Any
        training_step: Any
        is_in_train: bool

    def __init__(self, *args: Any, policy: Any = None, **kwargs: Any) -> None:
        if policy is not None:
            self.policy = policy
        self._checkpointing = False
        #: `logging_nan_inf_filter` as it was given, while this class does what it says
        self._filter: bool | None = None
        #: reference models and the like, which are offloaded already
        self._others = [
            one for one in (*args, *kwargs.values()) if isinstance(one, nn.Module) and session_for(one) is not None
        ]
        above: Any = super()
        above.__init__(*args, **kwargs)
        self._offload(self.model)
        callbacks = self.callback_handler.callbacks
        if not any(isinstance(one, StatsCallback) for one in callbacks):
            callbacks.insert(0, StatsCallback())

    # Placing

    def create_accelerator_and_postprocess(self) -> None:
        """As in the trainer; an offloaded model is where it belongs, and nothing that exchanges gradients goes around it."""
        above: Any = super()
        above.create_accelerator_and_postprocess()
        prepare = self.accelerator.prepare_model

        def prepare_model(model: nn.Module, device_placement: Any = None, evaluation_mode: bool = False) -> Any:
            if session_for(model) is None:
                return prepare(model, device_placement, evaluation_mode)
            return prepare(model, device_placement=False, evaluation_mode=True)

        self.accelerator.prepare_model = prepare_model

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        self._offload(model)

    def _offload(self, model: nn.Module) -> None:
        _check_arguments(self.args, self.accelerator, model)
        # Without this, the Trainer replicates the model over all GPUs that it sees.
        self.args._n_gpu = 1
        session = session_for(model)
        if session is not None:
            check_ranks(session, self.args.world_size, self.args.process_index)
            return
        if self.__dict__.get("model_wrapped") not in (None, model):
            # `model_init` has made another one: the memory of the last goes first.
            self.model_wrapped = self.callback_handler.model = model
            self.optimizer = self.callback_handler.optimizer = None
            gc.collect()
        keep_no_casts(self.accelerator)
        policy = policy_of(self.policy, self.args.device)
        refuse_twice(policy, self._others)
        offload(model, policy, group=group_of(self.accelerator))

    def _session(self) -> Session | None:
        return session_for(self.model)

    # The optimizer

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """Return ``funicular.AdamW`` for every name of AdamW with fp32 states.

        Raises
        ------
        UsageError
            ``FN-E117`` for optimizers that cannot step offloaded weights.
        """
        name = str(getattr(args.optim, "value", args.optim))
        if name in _ADAMW:
            betas = (args.adam_beta1, args.adam_beta2)
            return AdamW, {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}
        if any(part in name for part in _REFUSED):
            raise UsageError(
                "FN-E117",
                f"TrainingArguments(optim='{name}') cannot step offloaded weights. Say optim='adamw_torch': its fp32 states live where "
                "optimizer.tier of the policy says.",
            )
        above: Any = super()
        found: tuple[Any, dict[str, Any]] = above.get_optimizer_cls_and_kwargs(args, model)
        return found

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As in the trainer; its wrapper leaves the states where they live."""
        self._offload(self.model)
        above: Any = super()
        above.create_optimizer(*args, **kwargs)
        if self.args.world_size > 1 and not isinstance(getattr(self.optimizer, "optimizer", self.optimizer), AdamW):
            refuse(
                f"{type(self.optimizer).__name__} on {self.args.world_size} ranks edits weights that are the same memory for all",
                "Say optim='adamw_torch', which becomes funicular.AdamW, or give one as optimizers=.",
            )
        if not getattr(self.optimizer, "_is_accelerate_prepared", False):
            self.optimizer = self.accelerator.prepare_optimizer(self.optimizer, device_placement=False)
            self.optimizer._is_accelerate_prepared = True
        return self.optimizer

    def _adamw(self) -> torch.optim.Optimizer | None:
        """Return the optimizer whose states are saved beside the weights; None if it is another kind."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        return inner if isinstance(inner, (AdamW, torch.optim.AdamW)) else None

    # Steps

    @contextlib.contextmanager
    def _filtered(self) -> Iterator[None]:
        """Have losses that are not finite replaced on the device, by what is called in the place of ``training_step``.

        The trainer's ``logging_nan_inf_filter`` looks at each loss, which waits for the end of backward: what Python does before the step would be
        no longer hidden. The same sums are logged, with the same bits. Older versions keep that sum where this class cannot see it, and filter
        themselves.

        A ``training_step`` of a subclass sees losses as they are: its result is what the trainer would look at.
        """
        step, own = self.training_step, "training_step" in self.__dict__

        @functools.wraps(step)
        def filtered(*args: Any, **kwargs: Any) -> torch.Tensor:
            return self._finite(step(*args, **kwargs))

        self.training_step = filtered
        try:
            yield
        finally:
            self._give_back_filter()
            if own:
                self.training_step = step
            else:
                del self.training_step

    def _finite(self, loss: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor | None = self.__dict__.get("_tr_loss")
        if total is None or total.device != loss.device:
            return loss
        if self._filter is None:
            self._filter, self.args.logging_nan_inf_filter = self.args.logging_nan_inf_filter, False
        if not self._filter:
            return loss
        since = 1 + self.state.global_step - self.__dict__["_globalstep_last_logged"]
        return torch.where(torch.isfinite(loss), loss, total / since)

    def _give_back_filter(self) -> None:
        if self._filter is not None:
            self._filter, self.args.logging_nan_inf_filter = None, self._filter

    # Saving

    def _whole(self) -> bool:
        """Whether checkpoints hold the whole model: those of PEFT hold adapters alone, a small part, as PEFT writes them."""
        return not hasattr(self.model, "peft_config")

    # Of several ranks the first writes all but random states, and writes what makes a checkpoint count when those of all are there. No rank
    # goes on before that: torch's collectives, in which the others would wait for it, give up after some minutes.

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        above: Any = super()
        self._checkpointing = True
        try:
            with together(self._session(), "saved a checkpoint"):
                above._save_checkpoint(*args, **kwargs)
        finally:
            self._checkpointing = False

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in the trainer: one rank writes, and alone may call."""
        above: Any = super()
        self._give_back_filter()  # the arguments are saved, too
        with together(self._session() if self._checkpointing else None, "saved the model"):
            above.save_model(output_dir, _internal_call=_internal_call)

    def _save_rng_state(self, output_dir: str) -> None:
        above: Any = super()
        with together(self._session(), "saved random states"):
            above._save_rng_state(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if state_dict is not None or not self._whole():
            above: Any = super()
            above._save(output_dir, state_dict=state_dict)
            return
        target = Path(self.args.output_dir if output_dir is None else output_dir)
        if self._checkpointing:
            # A whole one that is written over does not count until it is whole again.
            for old in (target / _STATE, *target.glob("rng_state*.pth")):
                old.unlink(missing_ok=True)
            save(self.model, None if self.args.save_only_model else self._adamw(), target, overwrite=True)
        else:
            save_pretrained(self.model, target)
        collator = getattr(self, "data_collator", None)
        processing = getattr(self, "processing_class", None) or getattr(collator, "tokenizer", None)
        if processing is not None:
            processing.save_pretrained(target)
        torch.save(self.args, target / "training_args.bin")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        above: Any = super()
        with together(self._session(), "saved the optimizer"):
            if not self._whole() or self._adamw() is None:
                above._save_optimizer_and_scheduler(output_dir)
            elif self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    # Resuming

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in the trainer. ``True`` takes the last checkpoint that is whole.

        Raises
        ------
        UsageError
            ``FN-E404`` if the checkpoint was not written to its end.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_whole(self.args.output_dir))
        elif isinstance(resume_from_checkpoint, str) and not _is_whole(Path(resume_from_checkpoint)):
            raise UsageError(
                "FN-E404",
                f"{resume_from_checkpoint} has no whole {_STATE}: it is no checkpoint of a trainer, or its save was killed. Resume from an "
                "earlier one; resume_from_checkpoint=True finds the last that is whole.",
            )
        above: Any = super()
        with self._filtered():
            return above.train(resume_from_checkpoint, *args, **kwargs)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        above: Any = super()
        above._load_rng_state(checkpoint)
        if checkpoint is not None and self.args.process_index == 0:
            saved = len(list(Path(checkpoint).glob("rng_state*.pth")))  # one of each rank; none with save_only_model
            compare_ranks(Path(checkpoint), saved or self.args.world_size, self.args.world_size)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._whole() or not (Path(resume_from_checkpoint) / MANIFEST).exists():
            if self.args.world_size > 1:
                holds, made = "was saved without funicular", "from_pretrained(checkpoint)"
                if not self._whole():
                    holds = "holds adapters alone"
                    made = "PeftModel.from_pretrained(base, checkpoint, is_trainable=True)"
                refuse(
                    f"{resume_from_checkpoint} {holds}, and this run has {self.args.world_size} ranks: each would write the weights that all share",
                    f"Go on from it in one process, with python; or begin with its weights and new states: model = {made}.",
                )
            if self._whole() and any(Path(resume_from_checkpoint).glob("*.safetensors")):
                # The plain trainer leaves out weights that the file has under another name, as transformers 5 writes some.
                load_weights(resume_from_checkpoint, self.model if model is None else model)
                return
            above: Any = super()
            above._load_from_checkpoint(resume_from_checkpoint, model)
        elif not self.is_in_train:
            load(resume_from_checkpoint, self.model if model is None else model, random=False)
        # In training the weights come with the states, when there is an optimizer.

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        above: Any = super()
        if checkpoint is None or not self._whole() or not (Path(checkpoint) / MANIFEST).exists():
            above._load_optimizer_and_scheduler(checkpoint)
            return
        # The manifest says whether there are states: with save_only_model there are none.
        states = any(Path(checkpoint).glob("optimizer*.safetensors"))
        load(checkpoint, self.model, self._adamw() if states else None, random=False)
        if self._adamw() is None:
            above._load_optimizer_and_scheduler(checkpoint)
        elif states:
            schedule = torch.load(Path(checkpoint) / "scheduler.pt", map_location="cpu", weights_only=True)
            self.lr_scheduler.load_state_dict(schedule)

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        if self._whole() and (best / MANIFEST).exists():
            load(best, self.model, random=False)
            return
        if self._whole() and self.args.world_size == 1 and any(best.glob("*.safetensors")):
            load_weights(best, self.model)
            return
        above: Any = super()
        above._load_best_model()


def _check_arguments(args: Any, accelerator: Any, model: nn.Module) -> None:
    """Refuse what would move the model, cut it, or convert it, and what ranks would each do in another way."""
    check_accelerator(accelerator)
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name, False):
            refuse(
                f"{name}=True converts the whole model",
                "Leave it out; set params.dtype in the policy, or load the model in that type.",
            )
    if args.world_size == 1:
        return
    ranks = f"on {args.world_size} ranks"
    if args.auto_find_batch_size:
        refuse(
            f"auto_find_batch_size=True {ranks} lets each find another batch size", "Say per_device_train_batch_size."
        )
    if not accelerator.even_batches and not args.dataloader_drop_last:
        refuse(
            f"even_batches=False {ranks} gives some of them more batches than others",
            "Leave it out of accelerator_config, or say dataloader_drop_last=True.",
        )
    if args.load_best_model_at_end and hasattr(model, "peft_config"):
        refuse(
            f"load_best_model_at_end=True with adapters {ranks} has each write the weights that all share",
            "Leave it out, and load the best checkpoint afterwards in one process.",
        )


def _is_whole(checkpoint: Path) -> bool:
    try:
        return isinstance(json.loads((checkpoint / _STATE).read_text()), dict)
    except (OSError, ValueError):
        return False


def last_whole(output_dir: str | os.PathLike[str]) -> Path:
    """Return the last checkpoint of a trainer that was written to its end.

    Raises
    ------
    UsageError
        ``FN-E404`` if there is none.
    """
    numbered = {
        path: path.name.partition("checkpoint-")[2] for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()
    }
    for path in sorted((p for p, n in numbered.items() if n.isdecimal()), key=lambda p: -int(numbered[p])):
        if _is_whole(path):
            return path
        _log.warning("FN-W409 %s is left out: it has no whole %s, so its save did not end.", path, _STATE)
    raise UsageError(
        "FN-E404", f"{output_dir} has no whole checkpoint-N. Leave resume_from_checkpoint out to begin anew."
    )


@functools.cache
def offloaded(trainer: type) -> type:
    """Return a trainer's class whose constructor takes ``policy=``, and whose model is offloaded.

    ``offloaded(SFTTrainer)(model, args=args, train_dataset=data, policy="policy.toml")``
    """
    return type(f"Offloaded{trainer.__name__}", (OffloadMixin, trainer), {"__module__": trainer.__module__})
