"""accelerate's loops over an offloaded model: the bits of the same loop without, its saves and loads, what is refused."""

from __future__ import annotations

import gc
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import funicular
import several
from conftest import CUDA
from twin import World

accelerate = pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from accelerate_loops import ROWS, Loop

from funicular.integrations.accelerate import prepare
from funicular.reference import ReferenceAdamW
from trainer_ranks import READY, SIZE
from trainer_runs import Tokens, llama, weights

pytestmark = pytest.mark.filterwarnings("ignore")


def equal(a: Loop, b: Loop) -> bool:
    one, other = weights(a.accelerator.unwrap_model(a.model)), weights(b.accelerator.unwrap_model(b.model))
    return a.losses == b.losses and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.covering(1)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_like_the_plain_loop(precision: str, two_worlds: World):
    plain = Loop(None, mixed_precision=precision).run(12)
    paged = Loop(two_worlds.policy(llama()), mixed_precision=precision).run(12)
    assert len(paged.losses) == 36
    assert equal(plain, paged)
    state = paged.accelerator.get_state_dict(paged.model)
    assert all(torch.equal(state[k].cpu(), v) for k, v in weights(plain.accelerator.unwrap_model(plain.model)).items())
    assert funicular.stats(paged.accelerator.unwrap_model(paged.model)).steps == 12


def test_saved_and_loaded(two_worlds: World, tmp_path: Path):
    """As another process would: a new accelerator, model and optimizer go on with the same bits."""
    # A loader draws a seed whenever it begins.
    plain = Loop(None).run(7).run(5, first=7)
    first = Loop(two_worlds.policy(llama())).run(7)
    for _ in range(2):
        first.accelerator.save_state(str(tmp_path / "state"))
    assert (tmp_path / "state" / "funicular" / "optimizer.safetensors").exists()
    # accelerate's own files hold no weights and no states.
    assert not (tmp_path / "state" / "model.safetensors").exists()
    assert (tmp_path / "state" / "optimizer.bin").stat().st_size < 5000
    again = Loop(two_worlds.policy(llama()))
    again.accelerator.load_state(str(tmp_path / "state"))
    again.losses += first.losses
    again.run(5, first=7)
    assert equal(plain, again)
    # Outside of the two calls the optimizer answers as ever.
    assert len(again.opt.state_dict()["state"]) == len(list(again.model.parameters()))


@pytest.mark.skipif(CUDA, reason="their random numbers are those of processors")
def test_on_ranks(host_world: World, tmp_path: Path):
    """Two ranks save at step 7, and others go on: the bits of one process that runs their batches in turn."""
    plain = Loop(None, ranks=SIZE, rows=12 * 2 * ROWS * SIZE).run(7).run(5, first=7)
    policy, folder = host_world.policy(llama()), tmp_path / "state"
    ranks = {"ready": READY}
    first = several.run(SIZE, "accelerate_loops:on_rank", policy, str(folder), 7, 0, **ranks)
    names = {path.name for path in folder.iterdir()}
    assert names >= {"funicular", "funicular.saved.json", "random_states_0.pkl", "random_states_1.pkl", "scheduler.bin"}
    assert "model.safetensors" not in names
    again = several.run(SIZE, "accelerate_loops:on_rank", policy, str(folder), 5, 7, **ranks)
    for rank in range(SIZE):
        expected = [said[rank] if isinstance(said, list) else said for said in plain.losses]
        assert expected == first[rank]["losses"] + again[rank]["losses"]
        one = weights(plain.module())
        for found in (again[rank]["weights"], again[rank]["states"]):
            assert all(torch.equal(one[name], found[name]) for name in one)
        assert again[rank]["rate"] == plain.schedule.get_last_lr()
        assert again[rank]["size"] == SIZE
        assert again[rank]["kind"] == "LlamaForCausalLM"
    assert first[0]["losses"] != first[1]["losses"]


def test_folders_of_other_runs(host_world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """One that more processes saved is loaded with a warning; one whose save did not end is refused."""
    loop = Loop(host_world.policy(llama())).run(1)
    loop.accelerator.save_state(str(tmp_path / "state"))
    mark = tmp_path / "state" / "funicular.saved.json"
    mark.write_text('{"processes": 2}')
    with caplog.at_level(logging.WARNING, "funicular"):
        loop.accelerator.load_state(str(tmp_path / "state"))
    assert "FN-W410" in caplog.text
    assert "saved by 2 ranks, and this run has 1" in caplog.text
    mark.unlink()
    before = weights(loop.run(1, first=1).module())
    with pytest.raises(funicular.UsageError, match="FN-E404.*did not end"):
        loop.accelerator.load_state(str(tmp_path / "state"))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights(loop.module()).values()))


def test_compiled(host_world: World, tmp_path: Path):
    """What the accelerator compiles is saved and loaded too; a model that it has forgotten is refused by name."""
    first = Loop(host_world.policy(llama()), dynamo_backend="eager").run(2)
    first.accelerator.save_state(str(tmp_path / "state"))
    assert (tmp_path / "state" / "funicular" / "optimizer.safetensors").exists()
    kept = weights(first.accelerator.unwrap_model(first.model))
    first.run(1, first=2)
    first.accelerator.load_state(str(tmp_path / "state"))
    now = weights(first.accelerator.unwrap_model(first.model))
    assert all(torch.equal(a, b) for a, b in zip(kept.values(), now.values()))
    first.accelerator.free_memory()
    with pytest.raises(funicular.UsageError, match="FN-E408.*free_memory"):
        first.accelerator.save_state(str(tmp_path / "other"))


def test_beside_another_model(host_world: World, tmp_path: Path):
    """A second, ordinary model and its optimizer are saved by accelerate as ever."""
    loop = Loop(host_world.policy(llama())).run(1)
    small = torch.nn.Linear(3, 3)
    small, opt = loop.accelerator.prepare(small, torch.optim.SGD(small.parameters(), lr=0.1, momentum=0.9))
    small(torch.ones(1, 3, device=small.weight.device)).sum().backward()
    opt.step()
    before = small.weight.detach().clone()
    loop.accelerator.save_state(str(tmp_path / "state"))
    with torch.no_grad():
        small.weight.zero_()
    kept = weights(loop.model)
    loop.run(1, first=1)
    loop.accelerator.load_state(str(tmp_path / "state"))
    assert torch.equal(small.weight, before)
    assert all(torch.equal(a, b) for a, b in zip(kept.values(), weights(loop.model).values()))


def test_refusals(host_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    accelerator = accelerate.Accelerator(cpu=not CUDA)
    model = llama()
    with pytest.raises(funicular.UsageError, match=r"FN-E141 SGD.*funicular\.AdamW"):
        prepare(accelerator, model, torch.optim.SGD(model.parameters(), lr=0.1), "host")
    with monkeypatch.context() as patch:
        patch.setattr(accelerate.Accelerator, "distributed_type", "DistributedType.FSDP")
        with pytest.raises(funicular.UsageError, match="FN-E141.*FSDP.*torchrun"):
            prepare(accelerator, model, funicular.AdamW(model.parameters()), "host")
    with monkeypatch.context() as patch:
        patch.setattr(accelerate.Accelerator, "num_processes", property(lambda self: 4))
        patch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu"))
        with pytest.raises(funicular.UsageError, match="FN-E141 fp16.*4 ranks.*bf16"):
            prepare(accelerator, model, funicular.AdamW(model.parameters()), "host")
        patch.setattr(accelerator, "scaler", None)
        other = funicular.offload(llama(), host_world.policy(llama()))
        with pytest.raises(funicular.UsageError, match="FN-E141.*rank 0 of 1.*rank 0 of 4"):
            prepare(accelerator, other, funicular.AdamW(other.parameters()))
    Loop(None).accelerator.save_state(str(tmp_path / "plain"))
    loop = Loop(host_world.policy(llama()))
    with pytest.raises(funicular.UsageError, match="FN-E404.*without funicular.*checkpoint="):
        loop.accelerator.load_state(str(tmp_path / "plain"))


class Pair(Loop):
    """Two models with an optimizer each, and an ordinary one after them, of one accelerator."""

    def __init__(self, policies: Any) -> None:
        super().__init__(None if policies is None else policies[0])
        torch.manual_seed(7)
        second = llama(tie_word_embeddings=False)
        kind = ReferenceAdamW if policies is None else funicular.AdamW
        opt = kind(second.parameters(), lr=1e-2)
        if policies is None:
            self.second, self.second_opt = self.accelerator.prepare(second, opt)
        else:
            self.second, self.second_opt = prepare(self.accelerator, second, opt, policies[1])
        torch.manual_seed(8)
        self.third = self.accelerator.prepare(torch.nn.Linear(3, 3))

    def both(self, steps: int) -> None:
        """Train the two by turns, and change the third."""
        for number in range(steps):
            self.run(1, first=number)
            batch = {name: value.to(self.second.device) for name, value in Tokens()[number].items()}
            loss = self.second(**{name: value[None] for name, value in batch.items()}, use_cache=False).loss
            self.losses.append(loss.item())
            self.accelerator.backward(loss)
            self.second_opt.step()
            self.second_opt.zero_grad()
            with torch.no_grad():
                self.third.weight.mul_(1.5)

    def all_weights(self) -> dict[str, torch.Tensor]:
        models = {"a": self.module(), "b": self.accelerator.unwrap_model(self.second), "c": self.third}
        return {f"{one}.{name}": value for one, model in models.items() for name, value in weights(model).items()}


def test_several_offloaded_models(host_world: World, tmp_path: Path):
    """Each has a folder of its own; an ordinary one beside them is in accelerate's file."""
    out = []
    for name in ("plain", "paged"):
        policies = (host_world.policy(llama()), host_world.policy(llama(tie_word_embeddings=False)))
        first = Pair(None if name == "plain" else policies)
        first.both(2)
        first.accelerator.save_state(str(tmp_path / name))
        again = Pair(None if name == "plain" else policies)
        again.accelerator.load_state(str(tmp_path / name))
        again.both(2)
        out.append((first.losses + again.losses, again.all_weights()))
    assert out[0][0] == out[1][0]
    assert [name for name, value in out[0][1].items() if not torch.equal(value, out[1][1][name])] == []
    assert {p.name for p in (tmp_path / "paged").iterdir()} >= {"funicular", "funicular_1", "model.safetensors"}
    one = Loop(host_world.policy(llama()))
    one.accelerator.save_state(str(tmp_path / "one"))
    with pytest.raises(funicular.UsageError, match="FN-E404.*funicular_1"):
        again.accelerator.load_state(str(tmp_path / "one"))


def test_another_model_after_free_memory(host_world: World, tmp_path: Path):
    """The accelerator that has freed a model lets go of it, and saves the next one."""
    loop = Loop(host_world.policy(llama()))
    gone = weakref.ref(loop.module())
    loop.model = loop.opt = loop.schedule = loop.data = None
    loop.accelerator.free_memory()
    gc.collect()
    assert gone() is None
    loop.accelerator.save_state(str(tmp_path / "none"))
    model = llama()
    loop.model, opt = prepare(loop.accelerator, model, funicular.AdamW(model.parameters()), host_world.policy(llama()))
    loop.accelerator.save_state(str(tmp_path / "state"))
    saved = {name: value.clone() for name, value in weights(loop.module()).items()}
    with torch.no_grad():
        model.lm_head.weight.zero_()
    loop.accelerator.load_state(str(tmp_path / "state"))
    assert all(torch.equal(value, saved[name]) for name, value in weights(loop.module()).items())
    assert opt.optimizer.param_groups
