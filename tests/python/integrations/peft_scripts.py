"""Adapters of PEFT over a model that several ranks train: scripts of comparisons, and what is refused."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

import funicular
from several import Ranked
from trainer_ranks import told_by
from trainer_runs import VOCAB, llama


def lora(**more: Any) -> Any:
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1} | more
    return peft.LoraConfig(**options, task_type="CAUSAL_LM")


def adapted(dtype: torch.dtype = torch.float32, attention_dropout: float = 0.0, **more: Any) -> Any:
    """A Llama with adapters that do something from the beginning."""
    base = llama(attention_dropout=attention_dropout).to(dtype)
    torch.manual_seed(2)
    model = peft.get_peft_model(base, lora(**more))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    return model


def loss(run: Ranked, rank: int) -> torch.Tensor:
    """A rank's loss; ranks have different numbers of rows."""
    tokens = 2 + run.tokens(rank, 2 + rank, 9, below=VOCAB - 2)
    found: torch.Tensor = run.model(input_ids=tokens, labels=tokens, use_cache=False).loss
    return found


def trained(run: Ranked) -> list[nn.Parameter]:
    return [p for p in run.model.parameters() if p.requires_grad]


def train(run: Ranked, steps: int = 3) -> None:
    """Two backwards a step, clipped."""
    run.model.train()
    for step in range(steps):
        for _ in range(2):
            run.backward(lambda rank: loss(run, rank))
        run.record("norm", nn.utils.clip_grad_norm_(trained(run), 0.05))
        if step % 2:
            run.record_grads()
        run.step()


def wrapped(run: Ranked, checkpointed: bool = False, **more: Any) -> None:
    """Adapters over a base that is frozen when it is offloaded."""
    model = adapted(lora_dropout=0.0, **more)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    run.model = run.wrap(model)
    run.opt = run.adamw(trained(run))
    train(run)


def switched(run: Ranked) -> None:
    """Rank 0 alone answers without adapters and with them, and saves them; the others go on."""
    wrapped(run, True)
    tokens = torch.arange(2, 11)[None]
    for without in (True, False):
        found = None
        if run.rank in (None, 0):
            run.model.eval()
            with torch.no_grad(), run.model.disable_adapter() if without else contextlib.nullcontext():
                found = run.model(input_ids=tokens, use_cache=False).logits
        run.alone(f"without adapters: {without}", found)
    if run.rank in (None, 0):
        with tempfile.TemporaryDirectory() as folder:
            run.model.save_pretrained(folder)
            for name, tensor in load_file(Path(folder) / "adapter_model.safetensors").items():
                run.alone(name, tensor)
    else:
        for name in peft.get_peft_model_state_dict(run.model):
            run.alone(name, None)
    train(run, 1)


def resumed(run: Ranked, folder: str) -> None:
    """Ranks that have made their adapters before `offload` take those of a checkpoint, with the states, and go on."""
    wrapped(run)
    if not run.offloaded:
        train(run)
        return
    funicular.save(run.model, run.opt, folder)
    model = adapted(lora_dropout=0.0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    run.model = run.wrap(model)
    run.opt = run.adamw(trained(run))
    funicular.load(folder, run.model, run.opt)
    train(run)


def checked(policy: Any) -> list[str]:
    """What each of these is told on this rank; then all train on."""
    torch.set_num_threads(1)
    rank = dist.get_rank()

    def losses(model: Any) -> torch.Tensor:
        tokens = torch.arange(2, 11)[None] + rank
        found: torch.Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        return found

    def step(model: Any, opt: Any) -> None:
        losses(model).backward()
        opt.step()
        opt.zero_grad()

    late = funicular.offload(llama(), policy)
    late = peft.get_peft_model(late, lora())

    def made_after() -> None:
        step(late, funicular.AdamW([p for p in late.parameters() if p.requires_grad]))

    model = funicular.offload(adapted(), policy)
    opt = funicular.AdamW([p for p in model.parameters() if p.requires_grad])

    def merged() -> None:
        model.merge_adapter()
        step(model, opt)

    return [told_by(made_after), told_by(merged)]
