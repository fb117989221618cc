"""
vLLM's view of a saved hybrid: the entry point of the plugin, what it serves and refuses, and where each tensor goes.

Nothing here needs vLLM but [`register`]. The model is in `vllm_model`, which vLLM imports when it is asked for one.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from hf_hybrid.modeling import HybridConfig, LinearAttentionOptions


MIXER = "gated_deltanet"
# vLLM's own model of each family that was tried, by the `model_type` of the teacher.
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Those of them whose layers may attend to a window, each layer as it is in the teacher.
WINDOWS = ("mistral",)
# vLLM's convolution kernels are written for this many tokens; a shorter kernel is one whose first taps are 0.
CONVOLUTION = 4
_NAMES = {"o_proj": "out_proj", "o_norm": "norm", "conv": "conv1d"}
_TENSOR = re.compile(r"(model\.layers\.(\d+)\.self_attn\.)(\w+)(.*)")


def register() -> None:
    """Tells vLLM of hybrids; called by vLLM when it starts. Their config is known from the import above."""
    from vllm import ModelRegistry

    # By name: vLLM calls this in every process, before it may import what sets up a device.
    ModelRegistry.register_model("HybridForCausalLM", "hf_hybrid.serving.vllm_model:HybridForCausalLM")


def check_served(config: HybridConfig) -> None:
    """Raises a `ValueError` that names what of a hybrid vLLM cannot serve."""
    found = obstacles(config)
    if found:
        raise ValueError(f"the vLLM plugin cannot serve this hybrid: {'; '.join(found)}. Serve it with transformers.")


def obstacles(config: HybridConfig) -> list[str]:
    """What of a hybrid vLLM cannot serve, in words; empty where it can."""
    text_config, found = config.text_config, []
    if text_config.model_type not in FAMILIES:
        found.append(
            f"its teacher is a {text_config.model_type!r} model, and the plugin has the families {sorted(FAMILIES)}"
        )
    kept = {text_config.layer_types[i] for i in config.full_attention_layers}
    known = {"full_attention", "sliding_attention"} if text_config.model_type in WINDOWS else {"full_attention"}
    if kept - known:
        found.append(f"its softmax layers are of types {sorted(kept)}, and the plugin has {sorted(known)} for them")
    mixers = {config.layer_mixers[i] for i in config.linear_attention_layers}
    if mixers - {MIXER}:
        found.append(f"its mixers are {sorted(map(str, mixers))}, and the plugin has {MIXER!r} alone")
    elif mixers:
        found += _option_obstacles(options_of(config))
    return found


def _option_obstacles(options: LinearAttentionOptions) -> list[str]:
    found = []
    if options.silu_qk != options.silu_v:
        found.append(
            f"mixer_options silu_qk={options.silu_qk} and silu_v={options.silu_v}, where vLLM applies SiLU to q, k "
            "and v or to none"
        )
    if not options.output_norm:
        found.append("mixer_options output_norm=False, where vLLM normalises the output")
    if options.output_gate is None:
        found.append("mixer_options output_gate=None, where vLLM gates the output")
    if options.short_convolution > CONVOLUTION:
        found.append(
            f"mixer_options short_convolution={options.short_convolution}, where vLLM convolves over at most "
            f"{CONVOLUTION} tokens"
        )
    return found


def options_of(config: HybridConfig) -> LinearAttentionOptions:
    """The options of the linear layers."""
    return LinearAttentionOptions.from_dict(config.options_of(MIXER), MIXER)


def heads_of(text_config: Any) -> tuple[int, int, int]:
    """Query heads H, key/value heads G and the width D of a head."""
    heads = text_config.num_attention_heads
    groups = getattr(text_config, "num_key_value_heads", None) or heads
    return heads, groups, getattr(text_config, "head_dim", None) or text_config.hidden_size // heads


def vllm_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]], config: HybridConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """
    The tensors of a checkpoint by the names that vLLM's layers have for them; those outside of linear layers stay as
    they are. A kernel of the convolution `[H D + 2 G D, 1, K]` becomes one for all heads, `[3 H D, 1, 4]`; where the
    hybrid has none it is the identity.
    """
    linear = config.linear_attention_layers
    heads, groups, width = heads_of(config.text_config)
    convolves = options_of(config).short_convolution > 0
    for name, tensor in tensors:
        match = _TENSOR.fullmatch(name)
        if match is None or int(match[2]) not in linear:
            yield name, tensor
            continue
        layer, _, part, rest = match.groups()
        if part == "conv":
            tensor = _for_all_heads(tensor, heads, groups, width)
        elif part == "o_norm" and not convolves:
            identity = tensor.new_zeros(3 * heads * width, 1, CONVOLUTION)
            identity[..., -1] = 1.0
            yield f"{layer}conv1d.weight", identity
        yield f"{layer}{_NAMES.get(part, part)}{rest}", tensor


def _for_all_heads(kernel: torch.Tensor, heads: int, groups: int, width: int) -> torch.Tensor:
    query, key, value = kernel.split([heads * width, groups * width, groups * width])
    # The convolution runs on k and v that are repeated already, each group for the heads that read it.
    key, value = (
        x.unflatten(0, (groups, width)).repeat_interleave(heads // groups, dim=0).flatten(0, 1) for x in (key, value)
    )
    return torch.nn.functional.pad(torch.cat([query, key, value]), (CONVOLUTION - kernel.shape[-1], 0))
