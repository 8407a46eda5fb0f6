"""Models of ``transformers`` in micro-batches: the bits of the same slices in plain PyTorch."""

import pytest
import torch

import funicular
from hf_models import MODELS, VOCAB, gpt2, llama, t5
from sliced import compare
from twin import Run, play, same

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

BLOCKS = {"gpt2": lambda m: list(m.transformer.h), "llama": lambda m: list(m.model.layers)}


def padded(run: Run, rows: int = 5):
    tokens = 2 + run.tokens(rows, 9, below=VOCAB - 2)
    mask = torch.ones_like(tokens)
    mask[1, 6:] = mask[3, 4:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def train(run: Run, steps: int = 2, **more) -> None:
    run.model.train()
    for _ in range(steps):
        run.step(run.model(**padded(run), use_cache=False, **more).loss)


@pytest.mark.covering(2)
@pytest.mark.parametrize("tier", ["hbm", "host"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_train(kind, tier, two_worlds):
    """Masks, rotary tables, dropout, a loss that is a mean over the batch."""
    compare(two_worlds, MODELS[kind], train, blocks=BLOCKS[kind], tier=tier)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_bf16(kind, attention, host_world):
    compare(
        host_world, lambda: MODELS[kind](attn_implementation=attention).to(torch.bfloat16), train, blocks=BLOCKS[kind]
    )


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", BLOCKS)
def test_with_the_checkpoints_of_the_library(kind, reentrant, host_world):
    """The same bits. Without reentrancy they run nothing again: ours does."""
    runs = []

    def count(block):
        forward = block.mlp.forward
        block.mlp.forward = lambda *a: runs.append(1) or forward(*a)

    def build():
        model = MODELS[kind]()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        for block in BLOCKS[kind](model):
            count(block)
        return model

    plain = compare(host_world, MODELS[kind], train, blocks=BLOCKS[kind])
    paged = play(host_world, build, train, True, 3, {"activations": {"micro_batch": 2}})
    assert len(plain.notes) == len(paged.notes)
    assert all(same(a[1], b[1]) for a, b in zip(plain.notes, paged.notes))
    # Two steps, five blocks, three slices; once, and once again in backward.
    assert len(runs) == 2 * 5 * 3 * (3 if reentrant else 2)


@pytest.mark.parametrize("kind", BLOCKS)
def test_hidden_states_come_out_whole(kind, host_world):
    def script(run: Run) -> None:
        out = run.model(**padded(run), use_cache=False, output_hidden_states=True)
        run.record("shapes", [tuple(h.shape) for h in out.hidden_states])
        run.step(out.loss + sum(h.square().mean() for h in out.hidden_states))

    compare(host_world, MODELS[kind], script, blocks=BLOCKS[kind])


@pytest.mark.parametrize("build", [gpt2, llama], ids=lambda b: b.__name__)
def test_caches_are_refused(build, host_world):
    """The library makes one unless it is told not to."""
    run = Run(host_world, True)
    run.model = run.wrap(build(), activations={"micro_batch": 2})
    with pytest.raises(funicular.UsageError, match=r"FN-E120 .*'past_key_values' is a DynamicCache.*use_cache=False"):
        run.model(**padded(run))
    run.model.config.use_cache = False
    run.model(**padded(run)).loss.backward()
    run.model.eval()
    run.model.config.use_cache = True
    with torch.no_grad():
        assert run.model.generate(2 + run.tokens(3, 4), max_new_tokens=4, pad_token_id=0, do_sample=False).shape == (
            3,
            8,
        )


def test_attentions_are_refused(host_world):
    """They are taken out of the blocks past their outputs."""
    run = Run(host_world, True)
    run.model = run.wrap(gpt2(attn_implementation="eager"), activations={"micro_batch": 2})
    with pytest.raises(funicular.UsageError, match=r"FN-E121 .*kept by an attribute"):
        run.model(**padded(run), use_cache=False, output_attentions=True)
    run.model(**padded(run), use_cache=False).loss.backward()


def test_t5(host_world):
    """Its position bias is one for all rows: refused by name in slices of more than one row."""
    run = Run(host_world, True)
    run.model = run.wrap(t5(), activations={"micro_batch": 2}, units={"match": ["encoder.block.*", "decoder.block.*"]})
    batch = padded(run)
    try:
        run.model(**batch, use_cache=False).loss.backward()
    except funicular.UsageError as error:
        assert error.code == "FN-E120"
        assert "its output 1 has shape (1, 4, 9, 9)" in str(error)
