"""Hugging Face's Trainer over an offloaded model: the bits of the plain Trainer, its checkpoints, what it refuses."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import funicular
from conftest import CUDA
from twin import World

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="the Trainer needs it")

import trainer_runs
from funicular.integrations.transformers import OffloadMixin, StatsCallback, offloaded
from trainer_runs import equal, llama, seen, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore")


def policy(world: World, **sections: Any) -> dict[str, Any]:
    return world.policy(llama(), **sections)


def both(world: World, tmp_path: Path, **more: Any) -> tuple[Any, Any]:
    """A plain run and an offloaded one. A trainer sets the seed when it is made, so each is made and run in turn."""
    return trained(tmp_path / "plain", None, **more), trained(tmp_path / "paged", policy(world), **more)


def trained(*args: Any, **more: Any) -> Any:
    run = trainer(*args, **more)
    run.train()
    return run


def test_like_the_plain_trainer(two_worlds: World, tmp_path: Path):
    """Twelve steps, two batches each, clipped, with a schedule and evaluation: the same losses, norms, rates and weights."""
    plain, paged = both(two_worlds, tmp_path)
    assert len(seen(paged)) == 15
    assert equal(plain, paged)
    assert isinstance(paged._adamw(), funicular.AdamW)
    assert funicular.stats(paged.model).steps == 12


def test_killed_and_resumed(nvme_world: World, tmp_path: Path):
    """Killed at step 7, resumed from step 6 by another process: the same bits as without an end."""
    plain = trained(tmp_path / "plain", None)
    out = tmp_path / "paged"
    killed = [sys.executable, trainer_runs.__file__, str(out), json.dumps(policy(nvme_world)), "7"]
    assert subprocess.run(killed, check=False, capture_output=True).returncode == 9
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-3", "checkpoint-6"]
    resumed = trainer(out, policy(nvme_world))
    resumed.train(resume_from_checkpoint=True)
    assert equal(plain, resumed)
    assert funicular.stats(resumed.model).steps == 6


def test_checkpoints_that_were_not_written_to_their_end(host_world: World, tmp_path: Path, caplog: Any):
    """They are left out with a warning, refused by name where one is named, and written over."""
    first = trainer(tmp_path, policy(host_world), max_steps=6)
    first.train()
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text('{"epoch"')
    funicular.unwrap(first.model)
    again = trainer(tmp_path, policy(host_world), max_steps=6)
    with pytest.raises(funicular.UsageError, match="FN-E404.*checkpoint-6.*trainer_state"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    with caplog.at_level(logging.WARNING, "funicular"):
        again.train(resume_from_checkpoint=True)
    assert any("FN-W409" in r.getMessage() and "checkpoint-6" in r.getMessage() for r in caplog.records)
    assert equal(first, again) or weights(first.model).keys() == weights(again.model).keys()
    assert all(torch.equal(a, b) for a, b in zip(weights(first.model).values(), weights(again.model).values()))
    assert json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["global_step"] == 6
    with pytest.raises(funicular.UsageError, match="FN-E404"):
        trainer(tmp_path / "none", policy(host_world)).train(resume_from_checkpoint=True)


def test_checkpoints_are_counted_and_the_best_is_loaded(host_world: World, tmp_path: Path):
    best = {"eval_steps": 3, "save_total_limit": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    plain, paged = both(host_world, tmp_path, **best)
    assert equal(plain, paged)
    assert plain.state.best_metric == paged.state.best_metric
    names = [sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("plain", "paged")]
    assert names[0] == names[1]
    assert len(names[1]) == 2


def test_checkpoints_of_the_model_alone(host_world: World, tmp_path: Path):
    """As in the plain trainer: a resumed run begins with new states."""
    out = []
    for name, p in (("plain", None), ("paged", policy(host_world))):
        trainer(tmp_path / name, p, max_steps=6, save_only_model=True).train()
        again = trainer(tmp_path / name, p, max_steps=9)
        again.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-6"))
        out.append(again)
    assert not list((tmp_path / "paged" / "checkpoint-6").glob("optimizer*"))
    assert equal(*out)


def test_from_a_checkpoint_of_the_plain_trainer(host_world: World, tmp_path: Path):
    """Its weights and the states of torch's AdamW are taken over."""
    plain = transformers.Trainer(
        llama(), trainer_runs.arguments(tmp_path, max_steps=6), train_dataset=trainer_runs.Tokens(),
        eval_dataset=trainer_runs.Tokens(8),
    )  # fmt: skip
    plain.train()
    whole = transformers.Trainer(
        llama(), trainer_runs.arguments(tmp_path / "whole", max_steps=9), train_dataset=trainer_runs.Tokens(),
        eval_dataset=trainer_runs.Tokens(8),
    )  # fmt: skip
    for run in (whole, trainer(tmp_path, policy(host_world), max_steps=9)):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    one, other = weights(whole.model), weights(run.model)
    # torch's own kernel rounds elsewhere.
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)
    assert {float(s["step"]) for s in run._adamw().state.values()} == {9.0}
    assert len(weights(plain.model)) == len(one)


def on_disk(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def mixtral() -> torch.nn.Module:
    """Its experts are one tensor in transformers 5, and one each in files."""
    torch.manual_seed(1)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, max_position_embeddings=32, bos_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


@pytest.mark.parametrize("build", [llama, mixtral])
def test_save_model(build: Any, nvme_world: World, tmp_path: Path):
    """The files of `save_pretrained`: the same names, types and bits, in shards if they are large; files of others stay."""
    model = build()
    model.save_pretrained(tmp_path / "plain")
    run = trainer(tmp_path / "paged", nvme_world.policy(model), model=model)
    (tmp_path / "paged").mkdir(exist_ok=True)
    (tmp_path / "paged" / "notes.txt").write_text("mine")
    for _ in range(2):
        run.save_model()
    there = sorted(path.name for path in (tmp_path / "paged").iterdir())
    assert there == ["config.json", "generation_config.json", "model.safetensors", "notes.txt", "training_args.bin"]
    plain, paged = on_disk(tmp_path / "plain"), on_disk(tmp_path / "paged")
    assert plain.keys() == paged.keys()
    assert all(torch.equal(plain[name], paged[name]) and plain[name].dtype == paged[name].dtype for name in plain)
    from funicular.integrations.pretrained import save_pretrained

    save_pretrained(model, tmp_path / "paged", shard_bytes=20_000)
    assert not (tmp_path / "paged" / "model.safetensors").exists()
    sharded = on_disk(tmp_path / "paged")
    assert all(torch.equal(plain[name], sharded[name]) for name in plain)
    again = type(model).from_pretrained(tmp_path / "paged")
    assert all(torch.equal(a, b) for a, b in zip(weights(again).values(), weights(model).values()))


@pytest.mark.parametrize(
    "more",
    [
        {"bf16": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"max_grad_norm": 0.0, "label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"auto_find_batch_size": True},
    ],
    ids=["autocast", "checkpoints", "reentrant", "unclipped", "compiled", "batch_size"],
)
def test_options(more: dict[str, Any], host_world: World, tmp_path: Path):
    plain, paged = both(host_world, tmp_path, max_steps=4, save_strategy="no", **more)
    assert equal(plain, paged)


class Scaled(transformers.Trainer):
    """Trains in fp16 with a GradScaler, as accelerate sets it up on GPUs alone; the first scales are too large."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.state._mixed_precision, self.accelerator.native_amp = "fp16", True
        self.accelerator.scaler = torch.amp.GradScaler("cuda" if CUDA else "cpu", init_scale=2.0**20, growth_interval=3)


class Spiky(transformers.Trainer):
    """Its loss is not finite in some steps."""

    calls = 0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.calls += 1
        return {5: loss * math.nan, 6: loss * math.inf, 14: -loss * math.inf}.get(self.calls, loss)


@pytest.mark.parametrize("given", [True, False])
def test_losses_that_are_not_finite(given: bool, host_world: World, tmp_path: Path):
    """They are left out of what is logged or not, as the plain trainer does it; the arguments stay what they were."""
    runs = both(host_world, tmp_path, base=Spiky, logging_nan_inf_filter=given, logging_steps=4)
    logged = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in runs]
    assert str(logged[0]) == str(logged[1])  # NaN is not equal to itself
    assert any(not math.isfinite(loss) for loss in logged[0]) is not given
    for run in runs:
        saved = torch.load(Path(run.args.output_dir) / "checkpoint-3" / "training_args.bin", weights_only=False)
        assert saved.logging_nan_inf_filter == run.args.logging_nan_inf_filter == given


def test_no_loss_is_looked_at_between_logs(host_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A look would wait for the end of backward, before Python has prepared the step."""
    run = trainer(tmp_path, policy(host_world), logging_steps=100, eval_strategy="no")
    looked: list[str] = []

    def noting(name: str) -> Any:
        found = getattr(torch, name)
        return lambda given: (looked.append(name), found(given))[1]

    for name in ("isnan", "isinf"):
        monkeypatch.setattr(torch, name, noting(name))
    run.train()
    if hasattr(run, "_tr_loss"):
        assert not looked


def test_fp16_with_a_scaler(two_worlds: World, tmp_path: Path):
    """Steps that are left out, clipping after unscaling, a scale that grows; and a checkpoint that has it, from which another run goes on."""
    plain, paged = both(two_worlds, tmp_path, base=Scaled, fp16=CUDA)
    again = trainer(tmp_path / "paged", policy(two_worlds), base=Scaled, fp16=CUDA)
    again.train(resume_from_checkpoint=str(tmp_path / "paged" / "checkpoint-6"))
    norms = [line["grad_norm"] for line in seen(plain) if "grad_norm" in line]
    left_out = [norm for norm in norms if not math.isfinite(norm)]
    assert 0 < len(left_out) < 8
    assert funicular.stats(paged.model).steps == 12 - len(left_out)
    for run in (paged, again):
        assert str(seen(plain)) == str(seen(run))  # a norm that is no number equals itself
        assert plain.accelerator.scaler.state_dict() == run.accelerator.scaler.state_dict()
        one, other = weights(plain.model), weights(run.model)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_bf16_weights(nvme_world: World, tmp_path: Path):
    """Masters are part of checkpoints."""
    found = []
    for name, p in (("plain", None), ("paged", policy(nvme_world))):
        run = trainer(tmp_path / name, p, model=llama().to(torch.bfloat16), bf16=True, max_steps=6)
        run.train()
        found.append(run)
    assert equal(*found)
    again = trainer(tmp_path / "paged", policy(nvme_world), model=llama().to(torch.bfloat16), bf16=True, max_steps=6)
    again.train(resume_from_checkpoint=str(tmp_path / "paged" / "checkpoint-3"))
    assert equal(found[0], again)


def test_generate_in_evaluation(two_worlds: World, tmp_path: Path):
    found = []
    for name, given in (("plain", None), ("paged", policy(two_worlds))):
        options = {"predict_with_generate": True, "generation_max_length": 14, "max_steps": 4, "save_strategy": "no"}
        kinds = {"base": transformers.Seq2SeqTrainer, "arguments": transformers.Seq2SeqTrainingArguments}
        run = trained(tmp_path / name, given, **kinds, **options)
        found.append((run, run.predict(trainer_runs.Tokens(4)).predictions))
    assert equal(found[0][0], found[1][0])
    assert found[1][1].shape[0] == 4
    assert found[0][1].shape == found[1][1].shape
    assert (found[0][1] == found[1][1]).all()


def test_a_new_model_for_each_run(host_world: World, tmp_path: Path):
    """`model_init`: each call of train begins with another one, and the memory of the last is given back."""
    call = {"model_init": lambda: llama()}
    plain, paged = both(host_world, tmp_path, max_steps=3, save_strategy="no", call=call)
    assert equal(plain, paged)
    for run in (plain, paged):
        run.train()
    assert equal(plain, paged)


# Policies


def test_policies(host_world: World, tmp_path: Path):
    """A preset's name, a path, a mapping, a Policy, and the class's own."""
    said = policy(host_world)
    (tmp_path / "policy.json").write_text(json.dumps(said))

    class Mine(OffloadMixin, transformers.Trainer):
        policy = said

    for given in (
        "host",
        tmp_path / "policy.json",
        str(tmp_path / "policy.json"),
        said,
        funicular.Policy.from_mapping(said),
    ):
        run = trainer(tmp_path, given)
        assert funicular.stats(run.model).steps == 0
        funicular.unwrap(run.model)
    run = Mine(llama(), trainer_runs.arguments(tmp_path, eval_strategy="no"), train_dataset=trainer_runs.Tokens())
    assert funicular.stats(run.model).budgets["host"].limit is not None
    funicular.unwrap(run.model)
    assert offloaded(transformers.Trainer) is offloaded(transformers.Trainer)


ZERO3 = {
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "offload_param": {"device": "cpu"},
        "overlap_comm": True, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto", "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "train_micro_batch_size_per_gpu": "auto",
}  # fmt: skip
ZERO2 = {"fp16": {"enabled": False}, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


def infinity(path: str) -> dict[str, Any]:
    """ZeRO-Infinity: states on a disk."""
    return {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": path}}}


@pytest.mark.parametrize("kind", ["zero3", "zero2", "infinity"])
def test_deepspeed_configurations(kind: str, disk: str, tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch):
    """Three of the public style, in place of `TrainingArguments(deepspeed=...)`: the same bits as the plain trainer."""
    monkeypatch.setenv("FUNICULAR_BUDGET__HOST", "256MiB")
    config = {"zero3": ZERO3, "zero2": ZERO2, "infinity": infinity(disk)}[kind]
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    plain = trained(tmp_path / "plain", None, max_steps=3, save_strategy="no")
    with caplog.at_level(logging.WARNING, "funicular"):
        paged = trainer(tmp_path / "paged", str(path), max_steps=3, save_strategy="no")
    paged.train()
    assert equal(plain, paged)
    told = [r.getMessage() for r in caplog.records if "FN-W507" in r.getMessage()]
    said = {"zero3": "bf16.enabled", "zero2": "zero_optimization.stage", "infinity": None}[kind]
    assert [said in line for line in told] == ([] if said is None else [True])
    tier = "nvme" if kind == "infinity" else "host"
    assert funicular.stats(paged.model).budgets[tier].used > 0
    funicular.unwrap(paged.model)


def test_configurations_that_cannot_be_read(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("x: [")
    for given, code in ((tmp_path / "a.yaml", "FN-E50"), (tmp_path / "none.json", "FN-E504"), ("no-preset", "FN-E50")):
        with pytest.raises(funicular.UsageError, match=code):
            trainer(tmp_path, given)


# Optimizers


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "paged_adamw_32bit"])
def test_names_of_adamw(name: str, host_world: World, tmp_path: Path):
    plain = trained(tmp_path, None, max_steps=2, save_strategy="no")
    paged = trained(tmp_path, policy(host_world), max_steps=2, save_strategy="no", optim=name)
    assert equal(plain, paged)
    assert isinstance(paged._adamw(), funicular.AdamW)


@pytest.mark.parametrize("name", ["sgd", "adafactor"])
def test_other_optimizers(name: str, host_world: World, tmp_path: Path, caplog: Any):
    """They step the homes, and are told of once; their states are saved as the plain trainer saves them."""
    runs = []
    for base, given in ((transformers.Trainer, {}), (offloaded(transformers.Trainer), {"policy": policy(host_world)})):
        args = trainer_runs.arguments(
            tmp_path / base.__name__, optim=name, max_steps=4, eval_strategy="no", learning_rate=1e-3
        )
        run = base(llama(), args, train_dataset=trainer_runs.Tokens(), **given)
        with caplog.at_level(logging.WARNING, "funicular"):
            run.train()
        again = base(llama(), args, train_dataset=trainer_runs.Tokens(), **given)
        again.train(resume_from_checkpoint=str(tmp_path / base.__name__ / "checkpoint-3"))
        assert equal(run, again)
        runs.append(run)
    assert equal(*runs)
    assert sum("FN-W130" in r.getMessage() for r in caplog.records) == 2


@pytest.mark.parametrize(
    "name", ["adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch_4bit", "galore_adamw_layerwise", "lomo"]
)
def test_refused_optimizers(name: str, host_world: World, tmp_path: Path):
    more = {"optim_target_modules": "all-linear"} if "galore" in name else {}
    run = trainer(tmp_path, policy(host_world), optim=name, **more)
    with pytest.raises(funicular.UsageError, match=f"FN-E117.*{name}.*adamw_torch"):
        run.train()
    funicular.unwrap(run.model)


# Refusals


@pytest.mark.parametrize("name", ["bf16_full_eval", "fp16_full_eval"])
def test_full_evaluation_is_refused(name: str, host_world: World, tmp_path: Path):
    with pytest.raises(funicular.UsageError, match=f"FN-E141 {name}"):
        trainer(tmp_path, policy(host_world), **{name: True})


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True on 2 ranks.*per_device_train_batch_size"),
        ({"accelerator_config": {"even_batches": False}}, "even_batches=False on 2 ranks.*dataloader_drop_last"),
    ],
    ids=["batch_size", "even_batches"],
)
def test_settings_are_refused_on_ranks(
    more: dict[str, Any], said: str, host_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", property(lambda self: 2))
    with pytest.raises(funicular.UsageError, match=f"FN-E141 {said}"):
        trainer(tmp_path, policy(host_world), **more)


def test_adapters_on_ranks(host_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Which is best is loaded by every rank."""
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", property(lambda self: 2))
    model = llama()
    model.peft_config = {}
    best = {"eval_steps": 3, "load_best_model_at_end": True}
    with pytest.raises(funicular.UsageError, match="FN-E141 load_best_model_at_end=True with adapters on 2 ranks"):
        trainer(tmp_path, policy(host_world), model=model, **best)


# What is logged


class Reporter(transformers.TrainerCallback):
    """Stands for TensorBoard and the others: it comes after the figures."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.lines.append(dict(logs))


def test_figures(host_world: World, tmp_path: Path):
    reporter = Reporter()
    call = {"callbacks": [reporter, StatsCallback(peak_flops=1e12)]}
    # The user's own callback counts, and no second one.
    run = trainer(tmp_path, policy(host_world), max_steps=3, save_strategy="no", call=call)
    assert sum(isinstance(c, StatsCallback) for c in run.callback_handler.callbacks) == 1
    run.train()
    assert not any("funicular/mfu" in line for line in reporter.lines)  # it came before the figures
    funicular.unwrap(run.model)
    reporter = Reporter()
    run = trainer(tmp_path, policy(host_world), max_steps=3, save_strategy="no", call={"callbacks": [reporter]})
    run.train()
    lines = [line for line in reporter.lines if "loss" in line]
    assert len(lines) == 3
    for line in lines:
        assert line["funicular/tokens_per_second"] > 0
        assert line["funicular/host_gib"] > 0
        assert line["funicular/stalled"] >= 0
    assert ("funicular/mfu" in lines[0]) == CUDA
