"""Hugging Face's Trainer over an offloaded model: classes derived from the mixin, arguments that are saved in between, checkpoints under other names."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import funicular
from twin import World

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="the Trainer needs it")

from test_trainer import mixtral

import trainer_runs
from funicular.integrations.transformers import OffloadMixin
from trainer_runs import equal, llama, trainer

pytestmark = pytest.mark.filterwarnings("ignore")


class Looking:
    """A part of a trainer whose loss is not finite in some steps, and which looks at each."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(*args, **kwargs)  # type: ignore[misc]
        self.calls = getattr(self, "calls", 0) + 1
        return found + (math.nan if self.calls in (2, 5) else 0.0)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self.__dict__.setdefault("finite", []).append(bool(torch.isfinite(loss)))
        return loss * 2


class Mine(Looking, OffloadMixin, transformers.Trainer):
    """Derived from the mixin, as docs/trainer.md has it."""


class Plain(Looking, trainer_runs.plain(transformers.Trainer)):  # type: ignore[misc]
    """Without offload."""


def test_a_step_of_ones_own_sees_losses_as_they_are(host_world: World, tmp_path: Path):
    """What it makes of them is what is filtered and logged, as in the plain trainer."""
    runs = []
    for kind, more in ((Plain, {}), (Mine, {"policy": host_world.policy(llama())})):
        args = trainer_runs.arguments(tmp_path / kind.__name__, max_steps=4, eval_strategy="no", save_strategy="no")
        run = kind(args=args, model=llama(), train_dataset=trainer_runs.Tokens(), **more)
        run.train()
        runs.append(run)
    assert runs[0].finite == runs[1].finite
    assert runs[1].finite.count(False) == 2
    logged = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in runs]
    assert logged[0] == logged[1]
    assert "training_step" not in runs[1].__dict__


class Saves(transformers.TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Saves the model between two steps."""

    run: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.run.save_model(str(Path(args.output_dir) / "between"))


def test_arguments_saved_by_a_callback(host_world: World, tmp_path: Path):
    """`training_args.bin` has what was given, while this class filters losses itself."""
    saves = Saves()
    policy = host_world.policy(llama())
    saves.run = trainer(tmp_path, policy, call={"callbacks": [saves]}, max_steps=3, save_strategy="no")
    saves.run.train()
    assert torch.load(tmp_path / "between" / "training_args.bin", weights_only=False).logging_nan_inf_filter
    assert saves.run.args.logging_nan_inf_filter


@pytest.mark.parametrize("build", [llama, mixtral])
def test_plain_checkpoints_under_the_names_of_files(build: Any, nvme_world: World, tmp_path: Path):
    """transformers 5 writes some families under other names, which the plain trainer does not find again. Here their weights are taken over."""
    plain = trainer(tmp_path, None, model=build(), max_steps=6)
    plain.train()
    model = build()
    run = trainer(tmp_path, nvme_world.policy(model), model=model, max_steps=6, save_strategy="no")
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert equal(plain, run)


def test_plain_checkpoint_of_another_model(host_world: World, tmp_path: Path):
    """Names that are missing are refused; the plain trainer warns, and goes on with the weights that are there."""
    plain = trainer(tmp_path, None, model=llama(tie_word_embeddings=False), max_steps=3)
    plain.train()
    folder = tmp_path / "checkpoint-3"
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = llama(tie_word_embeddings=False)
    run = trainer(tmp_path, host_world.policy(model), model=model, max_steps=6)
    with pytest.raises(funicular.UsageError, match=r"FN-E407.*missing.*model\.norm\.weight"):
        run.train(resume_from_checkpoint=str(folder))


def test_configuration_of_a_model(host_world: World, tmp_path: Path):
    """`config.json` is what `save_pretrained` writes: the type of the weights under the name that this version reads, and no choice of attention."""
    model = llama().to(torch.bfloat16)
    run = trainer(tmp_path, host_world.policy(model), model=model)
    run.save_model(str(tmp_path / "paged"))
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    said = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "paged")]
    for one in said:
        one.pop("use_cache")  # some versions of the Trainer set it for good
    assert said[0] == said[1]
