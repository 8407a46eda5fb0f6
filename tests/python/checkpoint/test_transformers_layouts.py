"""Files that transformers writes under other names, or with experts one by one, stream into models on the meta device."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import funicular
from twin import World

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.conversion_mapping", reason="transformers 4 keeps the names")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = {**SMALL, "vocab_size": 64, "num_key_value_heads": 2, "head_dim": 16}
VISION = {**SMALL, "image_size": 8, "patch_size": 4}
EXPERTS = {**TEXT, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
MROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}

T = transformers
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "gpt_neox": lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**SMALL, vocab_size=64)),
    "vit": lambda: T.ViTForImageClassification(T.ViTConfig(**VISION)),
    "qwen3_moe": lambda: T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**EXPERTS, num_experts=4)),
    "mixtral": lambda: T.MixtralForCausalLM(T.MixtralConfig(**TEXT, num_local_experts=4)),
    "deepseek_v3": lambda: T.DeepseekV3ForCausalLM(
        T.DeepseekV3Config(**{**EXPERTS, **LATENT, "head_dim": 4}, n_routed_experts=4, n_group=2, topk_group=1)
    ),
    "llava": lambda: T.LlavaForConditionalGeneration(
        T.LlavaConfig(text_config=T.LlamaConfig(**TEXT), vision_config=T.CLIPVisionConfig(**VISION))
    ),
    "qwen2_vl": lambda: T.Qwen2VLForConditionalGeneration(
        T.Qwen2VLConfig(
            text_config={**TEXT, **MROPE},
            vision_config={
                "embed_dim": 32,
                "depth": 2,
                "num_heads": 2,
                "hidden_size": 32,
                "mlp_ratio": 2,
                "patch_size": 4,
            },
        )
    ),
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**TEXT, tie_word_embeddings=True)),
}


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def files(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        found |= load_file(file)
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t.cpu(), b[n].cpu()) for n, t in a.items())


@pytest.mark.covering(1)
@pytest.mark.parametrize("family", FAMILIES)
def test_its_own_files(family: str, two_worlds: World, tmp_path: Path):
    """What ``from_pretrained`` makes of them, and ``save_pretrained`` writes them again as they were."""
    torch.manual_seed(0)
    first: Any = FAMILIES[family]()
    first.save_pretrained(tmp_path / "a", max_shard_size="40KB")
    expected = type(first).from_pretrained(tmp_path / "a").state_dict()
    model: Any = on_meta(FAMILIES[family])
    funicular.offload(model, two_worlds.policy(first), checkpoint=tmp_path / "a")
    assert same(model.state_dict(), expected)
    model.save_pretrained(tmp_path / "b")
    assert same(files(tmp_path / "b"), files(tmp_path / "a"))
    # Our own checkpoint has the model's names, and everybody reads it.
    funicular.save(model, None, tmp_path / "c")
    assert same(type(first).from_pretrained(tmp_path / "c").state_dict(), expected)
    again = on_meta(FAMILIES[family])
    funicular.offload(again, two_worlds.policy(first), checkpoint=tmp_path / "c")
    assert same(again.state_dict(), expected)


def test_an_expert_that_is_missing(host_world: World, tmp_path: Path):
    """Nothing is loaded where merging them gives another shape; the model stays on the meta device."""
    from safetensors.torch import save_file

    first: Any = FAMILIES["qwen3_moe"]()
    first.save_pretrained(tmp_path / "a")
    left = {n: t for n, t in files(tmp_path / "a").items() if "layers.1.mlp.experts.3." not in n}
    shutil.rmtree(tmp_path / "a")
    save_file(left, tmp_path / "some.safetensors")
    model = on_meta(FAMILIES["qwen3_moe"])
    with pytest.raises(funicular.UsageError, match=r"FN-E407.*model\.layers\.1\.mlp\.experts\.\w+ \[3,"):
        funicular.offload(model, host_world.policy(first), checkpoint=tmp_path / "some.safetensors")
    assert all(p.is_meta for p in model.parameters())
    assert getattr(model, "_weight_conversions", None) is None


def test_a_tie_that_is_lost_says_what_to_call(host_world: World, tmp_path: Path):
    first: Any = FAMILIES["llama"]()
    first.save_pretrained(tmp_path / "a")
    model: Any = on_meta(FAMILIES["llama"])
    model.lm_head.weight = nn.Parameter(torch.empty(64, 32, device="meta"))
    with pytest.raises(funicular.UsageError, match=r"FN-E407.*lm_head\.weight.*call model\.tie_weights\(\)"):
        funicular.offload(model, host_world.policy(first), checkpoint=tmp_path / "a")
    model.tie_weights()
    funicular.offload(model, host_world.policy(first), checkpoint=tmp_path / "a")
    assert same(model.state_dict(), first.state_dict())


@pytest.mark.parametrize("name", ["meta-llama/Llama-2-7b", "gpt2"])
def test_a_name_on_a_hub(name: str, host_world: World):
    with pytest.raises(funicular.UsageError, match=f"FN-E404.*snapshot_download.'{name}'"):
        funicular.offload(on_meta(FAMILIES["llama"]), host_world.policy(FAMILIES["llama"]()), checkpoint=name)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.gguf"])
def test_files_that_are_no_safetensors(name: str, host_world: World, tmp_path: Path):
    torch.save({}, tmp_path / name)
    with pytest.raises(funicular.UsageError, match=r"FN-E404.*save_pretrained"):
        funicular.offload(
            on_meta(FAMILIES["llama"]), host_world.policy(FAMILIES["llama"]()), checkpoint=tmp_path / name
        )
