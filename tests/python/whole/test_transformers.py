"""Models of ``transformers``, unchanged, with random weights: the bits of their own un-offloaded runs."""

from typing import Any

import pytest
import torch
from torch import nn

import funicular
from hf_models import CAUSAL, MODELS, VOCAB, gpt2, llama, t5
from twin import Run, World, compare

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

#: use_reentrant, or no checkpoints
CHECKPOINTS = {"no-ckpt": None, "reentrant": True, "saved_tensors": False}


def batch(run: Run) -> dict[str, Any]:
    tokens = 2 + run.tokens(2, 9, below=VOCAB - 2)
    return {"input_ids": tokens, "labels": tokens}


def train(run: Run, steps: int = 3) -> None:
    run.model.train()
    for _ in range(steps):
        run.step(run.model(**batch(run), use_cache=False).loss)


@pytest.mark.covering(2)
@pytest.mark.parametrize("ckpt", CHECKPOINTS)
@pytest.mark.parametrize("kind", MODELS)
def test_train(kind: str, ckpt: str, two_worlds: World):
    """Three steps; with the library's own checkpointing too."""

    def build() -> nn.Module:
        model = MODELS[kind]()
        if CHECKPOINTS[ckpt] is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": CHECKPOINTS[ckpt]})
        return model

    compare(two_worlds, build, train)


@pytest.mark.parametrize("kind", CAUSAL)
def test_train_then_generate(kind: str, two_worlds: World):
    """With the cache and without it, greedy and sampled, then further steps."""

    def script(run: Run) -> None:
        train(run, 2)
        run.model.eval()
        prompt = 2 + run.tokens(2, 4, below=VOCAB - 2)
        more = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
        for options in (
            {"do_sample": False},
            {"do_sample": False, "use_cache": False},
            {"do_sample": True, "top_k": 8},
        ):
            torch.manual_seed(7)
            run.record(str(options), run.model.generate(prompt, **options, **more))
        train(run, 1)

    compare(two_worlds, MODELS[kind], script)


def test_t5_generates(nvme_world: World):
    """The encoder runs once, the decoder blocks once a token."""

    def script(run: Run) -> None:
        train(run, 1)
        run.model.eval()
        run.record(
            "greedy", run.model.generate(2 + run.tokens(2, 5, below=VOCAB - 2), max_new_tokens=6, do_sample=False)
        )
        train(run, 1)

    compare(nvme_world, t5, script)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", CAUSAL)
def test_attention(kind: str, attention: str, host_world: World):
    compare(host_world, lambda: MODELS[kind](attn_implementation=attention), train)


@pytest.mark.parametrize("kind", MODELS)
def test_bf16_accumulated(kind: str, host_world: World):
    """Half precision, four micro-batches a step."""

    def script(run: Run) -> None:
        for _ in range(2):
            for _ in range(4):
                loss = run.model(**batch(run), use_cache=False).loss / 4
                run.record("loss", loss)
                loss.backward()
            run.record_grads()
            run.opt.step()
            run.opt.zero_grad()

    compare(host_world, lambda: MODELS[kind]().to(torch.bfloat16), script)


def test_untied(nvme_world: World):
    """Without ties the head is a unit of its own."""
    compare(nvme_world, lambda: llama(tie_word_embeddings=False), train)


def test_hidden_states_and_attentions(host_world: World):
    """Every block's output comes out of the model, and into the loss."""

    def script(run: Run) -> None:
        for _ in range(2):
            out = run.model(**batch(run), use_cache=False, output_hidden_states=True, output_attentions=True)
            run.record("attentions", out.attentions)
            run.step(out.loss + sum(h.square().mean() for h in out.hidden_states))

    compare(host_world, lambda: gpt2(attn_implementation="eager"), script)


@pytest.mark.parametrize("kind", MODELS)
def test_save_pretrained_right_after_a_step(kind: str, nvme_world: World, tmp_path):
    """What is saved is what a plain model would save; tied names stay tied."""

    def script(run: Run) -> None:
        train(run, 2)
        target = tmp_path / ("paged" if run.offloaded else "plain")
        run.model.save_pretrained(target, safe_serialization=True)
        again = type(run.model).from_pretrained(target)
        run.record("names", sorted(again.state_dict()))
        run.record_weights(again)
        train(run, 1)

    compare(nvme_world, MODELS[kind], script)


def test_resize_token_embeddings_is_refused(host_world: World):
    """The library puts new data under the old parameter: refused by name, and training goes on."""

    def script(run: Run) -> None:
        train(run, 1)
        if run.offloaded:
            with pytest.raises(funicular.UsageError, match=r"FN-E115 'transformer\.wte\.weight'.*unwrap"):
                run.model.resize_token_embeddings(VOCAB + 4, mean_resizing=False)
        torch.manual_seed(3)
        train(run, 2)

    compare(host_world, gpt2, script)
