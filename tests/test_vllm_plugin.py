"""What the vLLM plugin serves and refuses, and where it puts each tensor. vLLM itself runs in tests_vllm/."""

import re

import pytest
import torch
from teachers import CONFIGS, tiny_teacher
from torch import nn

import hf_hybrid as hh
from hf_hybrid.modeling import HybridConfig
from hf_hybrid.serving.vllm_plugin import FAMILIES, check_served, heads_of, vllm_tensors


def config_of(family="llama", keep=(1,), **settings) -> HybridConfig:
    return HybridConfig.from_teacher(CONFIGS[family](), list(keep), **settings)


@pytest.mark.parametrize(
    "options", [{}, {"rope": False}, {"output_gate": "sigmoid"}, {"silu_qk": True, "silu_v": True}]
)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_serves(family, options):
    check_served(config_of(family, mixer_options=options | {"short_convolution": 3}))


REFUSED = {
    "mixer": ({"mixer": "kimi_delta_attention"}, "its mixers are ['kimi_delta_attention']"),
    "one of the mixers": (
        {"mixer": ["gated_deltanet", None, "sliding_window", "gated_deltanet"]},
        "its mixers are ['gated_deltanet', 'sliding_window']",
    ),
    "silu": ({"mixer_options": {"silu_qk": True}}, "silu_qk=True and silu_v=False"),
    "norm": ({"mixer_options": {"output_norm": False}}, "output_norm=False"),
    "gate": ({"mixer_options": {"output_gate": None}}, "output_gate=None"),
    "convolution": ({"mixer_options": {"gated_deltanet": {"short_convolution": 5}}}, "short_convolution=5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_by_name_what_it_cannot_serve(case):
    settings, named = REFUSED[case]
    with pytest.raises(ValueError, match=re.escape(named)):
        check_served(config_of(**settings))
    check_served(config_of(keep=range(4), **settings))  # there it says nothing of any layer


def test_refuses_other_families_and_windows():
    settings = config_of().text_config.to_dict() | {"model_type": "olmo2"}
    with pytest.raises(ValueError, match="its teacher is a 'olmo2' model"):
        check_served(HybridConfig(text_config=settings))
    qwen3 = CONFIGS["qwen3"](use_sliding_window=True, sliding_window=8, max_window_layers=2)
    check_served(HybridConfig.from_teacher(qwen3, [0, 1]))
    with pytest.raises(ValueError, match="its softmax layers are of types"):
        check_served(HybridConfig.from_teacher(qwen3, [0, 3]))
    assert sorted(FAMILIES) == ["llama", "mistral", "qwen2", "qwen3"]


@pytest.mark.parametrize("kernel", [0, 2, 4])
def test_each_tensor_has_its_place(kernel):
    student = hh.convert(tiny_teacher("qwen2"), [1], mixer_options={"short_convolution": kernel})
    student.config.tie_word_embeddings = False
    tensors = student.state_dict()
    found = dict(vllm_tensors(tensors.items(), student.config))
    kept = {name for name in tensors if ".layers.1." in name or ".self_attn." not in name}
    assert all(found[name] is tensors[name] for name in kept)
    theirs = {name.split("self_attn.")[1] for name in found if ".layers.2.self_attn." in name}
    projections = {f"{part}_proj.{kind}" for part in "qkv" for kind in ("weight", "bias")}
    own = {"A_log", "dt_bias", "a_proj.weight", "b_proj.weight", "g_proj.weight", "norm.weight", "conv1d.weight"}
    assert theirs == projections | own | {"out_proj.weight"}
    assert found["model.layers.2.self_attn.out_proj.weight"] is tensors["model.layers.2.self_attn.o_proj.weight"]
    assert found["model.layers.2.self_attn.norm.weight"] is tensors["model.layers.2.self_attn.o_norm.weight"]
    assert len(found) == len(tensors) + (3 if kernel == 0 else 0)


def convolved(x, kernel):
    """`x` [T, C] under a causal kernel [C, 1, K]."""
    padded = nn.functional.pad(x.T, (kernel.shape[-1] - 1, 0))
    return nn.functional.conv1d(padded, kernel, groups=x.shape[1]).T


@pytest.mark.parametrize("kernel", [0, 1, 3, 4])
@pytest.mark.parametrize("family", ["llama", "llama_mqa", "llama_mha"])
def test_convolution_for_all_heads_is_that_of_the_groups(family, kernel):
    """Ours runs before k and v are repeated for the heads that read them, vLLM's after."""
    config = config_of(family, mixer_options={"short_convolution": kernel})
    heads, groups, width = heads_of(config.text_config)
    sizes = [heads * width, groups * width, groups * width]
    torch.manual_seed(0)
    weight = torch.randn(sum(sizes), 1, kernel, dtype=torch.float64)
    x = torch.randn(9, sum(sizes), dtype=torch.float64)

    def repeated(x):
        query, key, value = x.split(sizes, dim=-1)
        key, value = (
            y.unflatten(-1, (groups, width)).repeat_interleave(heads // groups, dim=-2).flatten(-2)
            for y in (key, value)
        )
        return torch.cat([query, key, value], dim=-1)

    layer = "model.layers.0.self_attn"
    tensors = {f"{layer}.conv.weight": weight} if kernel else {}
    tensors[f"{layer}.o_norm.weight"] = torch.ones(width, dtype=torch.float64)
    theirs = dict(vllm_tensors(tensors.items(), config))[f"{layer}.conv1d.weight"]
    assert theirs.shape == (3 * heads * width, 1, 4)
    ours = convolved(x, weight) if kernel else x
    torch.testing.assert_close(convolved(repeated(x), theirs), repeated(ours), rtol=0, atol=1e-14)
