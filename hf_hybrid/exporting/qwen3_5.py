"""
The layout of transformers' own `Qwen3_5ForCausalLM`, text only: what fits it, and each tensor from and to a hybrid.

Shapes: H heads, G key/value heads of the teacher, D their width, K taps of the convolution.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig, Qwen3Config

from hf_hybrid.modeling import HybridConfig, HybridForCausalLM
from hf_hybrid.modeling.linear_attention import LinearAttentionOptions
from hf_hybrid.modeling.modeling_hybrid import decoder_layers

from .native import NATIVE_MIXER, NATIVE_OPTIONS, NEEDED_OPTIONS


# What vLLM's and others' kernels for the convolution are made for; a shorter one of ours is filled up with zeros.
_TAPS = 4
# Settings of a Qwen3, or of a Llama, that models of other layouts have under the same name.
SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
# Where the layout keeps what our linear layers have under another name, as it is.
_LINEAR = {
    "in_proj_z.weight": "g_proj.weight",
    "in_proj_a.weight": "a_proj.weight",
    "in_proj_b.weight": "b_proj.weight",
    "A_log": "A_log",
    "dt_bias": "dt_bias",
    "norm.weight": "o_norm.weight",
    "out_proj.weight": "o_proj.weight",
}
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_HEAD_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
_WIDE = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
# Our own entry in the config of an exported model, which nothing but the import reads.
ORIGIN = "hf_hybrid"


def family_obstacles(text_config: Any) -> list[str]:
    """What of a teacher with this config stands in the way of its kept layers, in words."""
    if text_config.model_type != "qwen3":
        return [
            f"its softmax layers are those of {text_config.model_type}: the layout norms q and k of every head by a "
            "learned weight and gates the output, and of the families that convert only Qwen3 can be written so"
        ]
    found = []
    if text_config.attention_bias:
        found.append("its attention has biases (attention_bias), which engines do not read in this layout")
    if text_config.hidden_act != "silu":
        found.append(
            f"hidden_act is {text_config.hidden_act!r}; the layout's convolution takes it too, and ours is SiLU"
        )
    windowed = sorted({kind for kind in text_config.layer_types or () if kind.startswith("sliding")})
    if windowed:
        found.append(f"it has layers of type {windowed[0]}; the layout has no windows")
    return found


def mixer_obstacles(mixers: Sequence[str], options_of: Any) -> list[str]:
    """
    What of the linear layers stands in the way, in words.

    Args:
        mixers (`list[str]`): the names of the mixers in use.
        options_of (`Callable`): from a name to that mixer's options, see [`HybridConfig.options_of`].
    """
    found = []
    for name in mixers:
        if name != NATIVE_MIXER:
            found.append(f"mixer {name!r} is in no layout; only {NATIVE_MIXER!r} is")
            continue
        options = LinearAttentionOptions.from_dict(options_of(name), name)
        for option, wanted in NEEDED_OPTIONS.items():
            given = getattr(options, option)
            # A Qwen3 without biases has none to keep.
            if given != wanted and option != "projection_bias":
                found.append(f"mixer_options[{option!r}] is {given!r}, and a native layer has {wanted!r}")
    return found


def obstacles(config: HybridConfig) -> list[str]:
    """What stands in the way of this layout for a hybrid with this config, in words; empty where it fits."""
    kept = config.full_attention_layers
    linear = [name for i, name in enumerate(config.layer_mixers) if i not in kept]
    found = family_obstacles(config.text_config) + mixer_obstacles(
        sorted({str(name) for name in linear}), config.options_of
    )
    if not kept:
        found.append("no layer keeps softmax, and transformers' own caches then do not count their tokens; keep one")
    return found


def origin_of(config: HybridConfig) -> dict[str, Any]:
    """Our own entry in the config of an exported model: where the hybrid came from."""
    origin = {"teacher": config.to_dict()["teacher_name_or_path"], "teacher_revision": config.teacher_revision}
    return {name: value for name, value in origin.items() if value is not None}


def interval(layer_types: Sequence[str]) -> int | None:
    """The n for which exactly every n-th layer keeps softmax, counted from 1; None where there is no such n."""
    kept = [i for i, kind in enumerate(layer_types) if kind == "full_attention"]
    if not kept:
        return None
    every = kept[0] + 1
    return every if kept == list(range(every - 1, len(layer_types), every)) else None


def native_config(config: HybridConfig) -> Qwen3_5TextConfig:
    """The config of the exported model."""
    text, layer_types = config.text_config, list(config.text_config.layer_types)
    heads, taps = text.num_attention_heads, config.options_of(NATIVE_MIXER).get("short_convolution", 0)
    periodic = interval(layer_types)
    settings: dict[str, Any] = {name: getattr(text, name) for name in SHARED}
    if periodic is not None:
        settings["full_attention_interval"] = periodic  # which SGLang and MLX read in the place of layer_types
    settings["mamba_ssm_dtype"] = "float32"  # which vLLM reads for the state
    settings[ORIGIN] = origin_of(config)
    return Qwen3_5TextConfig(
        **settings,
        layer_types=layer_types,
        rope_parameters={**text.rope_parameters, "partial_rotary_factor": 1.0},
        attention_bias=False,
        linear_num_key_heads=heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=text.head_dim,
        linear_value_head_dim=text.head_dim,
        linear_conv_kernel_dim=max(taps, _TAPS),
    )


@torch.no_grad()
def native_tensors(model: HybridForCausalLM) -> dict[str, torch.Tensor]:
    """The tensors of the exported model, by their names in it, in the dtype of the hybrid's; norms are in fp32."""
    state, layers = model.state_dict(), decoder_layers(model)
    tensors = {"model.embed_tokens.weight": state["model.embed_tokens.weight"]}
    if not model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = state["lm_head.weight"]
    tensors["model.norm.weight"] = _offset(state["model.norm.weight"])
    for i, layer in enumerate(layers):
        prefix = f"model.layers.{i}."
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        mixed = _linear(own, layer.self_attn) if i in model.linear_attention_layers else _softmax(own, layer.self_attn)
        mixed |= {name: _offset(own[name]) for name in _NORMS} | {name: own[name] for name in _WIDE}
        tensors |= {prefix + name: tensor for name, tensor in mixed.items()}
    return tensors


def _softmax(own: dict[str, torch.Tensor], attention: Any) -> dict[str, torch.Tensor]:
    """A kept layer: a gate of zeros is 1/2 everywhere, and the output projection makes up for it, exactly."""
    query = own["self_attn.q_proj.weight"].unflatten(0, (-1, attention.head_dim))
    return {
        # [H, D queries and D gates, hidden]
        "self_attn.q_proj.weight": torch.cat([query, torch.zeros_like(query)], 1).flatten(0, 1),
        "self_attn.k_proj.weight": own["self_attn.k_proj.weight"],
        "self_attn.v_proj.weight": own["self_attn.v_proj.weight"],
        "self_attn.o_proj.weight": 2 * own["self_attn.o_proj.weight"],
        **{name: _offset(own[name]) for name in _HEAD_NORMS},
    }


def _linear(own: dict[str, torch.Tensor], mixer: Any) -> dict[str, torch.Tensor]:
    """A linear layer: k and v for all H heads, for the layout's heads share keys in another order than softmax's."""

    def for_all_heads(rows: torch.Tensor) -> torch.Tensor:
        return _repeated(rows, mixer.num_heads, mixer.num_kv_heads)

    query, key, value = (own[f"self_attn.{name}_proj.weight"] for name in "qkv")
    rows = [len(query), len(key), len(value)]
    if mixer.conv is None:
        taps = query.new_zeros(sum(rows), 1, _TAPS)
        taps[..., -1] = 1.0
    else:
        taps = torch.nn.functional.pad(own["self_attn.conv.weight"], (max(0, _TAPS - mixer.conv.kernel_size), 0))
    of_query, of_key, of_value = taps.split(rows)
    return {
        "linear_attn.in_proj_qkv.weight": torch.cat([query, for_all_heads(key), for_all_heads(value)]),
        "linear_attn.conv1d.weight": torch.cat([of_query, for_all_heads(of_key), for_all_heads(of_value)]),
        **{f"linear_attn.{name}": own[f"self_attn.{source}"] for name, source in _LINEAR.items()},
    }


def _repeated(rows: torch.Tensor, heads: int, groups: int) -> torch.Tensor:
    """Rows `[G D, ...]` of grouped heads, each group's for all of its heads, `[H D, ...]`."""
    return rows.unflatten(0, (groups, -1)).repeat_interleave(heads // groups, 0).flatten(0, 1)


def _offset(weight: torch.Tensor) -> torch.Tensor:
    """A norm's weight as the layout has it, less 1, in fp32: in bf16 that difference is not exact below 1/2."""
    return weight.float() - 1


def native_model(config: Qwen3_5TextConfig, tensors: dict[str, torch.Tensor]) -> Qwen3_5ForCausalLM:
    """The exported model in memory, around `tensors`."""
    return model_around(Qwen3_5ForCausalLM, config, tensors)


def model_around(model_class: Any, config: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A model of transformers, whose decoder is called `model`, around `tensors`, which are all of it."""
    with torch.device("meta"):
        model = model_class(config)
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    # In no checkpoint, so it is still without numbers.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(tensors["model.norm.weight"].device)
    left = [name for name in missing if not (name == "lm_head.weight" and config.tie_word_embeddings)]
    if left or unexpected:
        raise ValueError(
            f"transformers' {model_class.__name__} is another here: {[*left, *unexpected][:3]} do not fit it."
        )
    return model


@torch.no_grad()
def hybrid_of(model: Qwen3_5ForCausalLM) -> HybridForCausalLM:
    """
    Returns the hybrid that a model of this layout is, or raises a `ValueError` that says why it is none: one that was
    trained in the layout may have learned what no Qwen3 with our linear layers has.
    """
    config: Any = model.config
    state = model.state_dict()
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    sizes = (config.linear_num_key_heads, config.linear_num_value_heads)
    widths = (config.linear_key_head_dim, config.linear_value_head_dim)
    rotary = {key: value for key, value in config.rope_parameters.items() if key != "partial_rotary_factor"}
    if sizes != (heads, heads) or widths != (width, width):
        raise _no_hybrid(f"its linear layers have {sizes} heads of width {widths}, its softmax {heads} of {width}")
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise _no_hybrid("it rotates only a part of each head (partial_rotary_factor)")
    if config.attention_bias:
        raise _no_hybrid("its attention has biases")
    text = Qwen3Config(**{name: getattr(config, name) for name in SHARED}, rope_parameters=rotary)
    kept = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
    own = {"model.norm.weight": state["model.norm.weight"].float() + 1}
    own |= {name: state[name] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        layer = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
        back = _softmax_back(layer, i, width) if i in kept else _linear_back(layer, i, heads, groups, width)
        back |= {name: layer[name].float() + 1 for name in _NORMS} | {name: layer[name] for name in _WIDE}
        own |= {prefix + name: tensor for name, tensor in back.items()}
    options = NATIVE_OPTIONS | {"short_convolution": config.linear_conv_kernel_dim}
    return hybrid_around(model, text, kept, own, mixer_options=options)


def hybrid_around(
    model: Any, text_config: Any, kept: list[int], tensors: dict[str, torch.Tensor], **mixers: Any
) -> HybridForCausalLM:
    """The hybrid that the exported `model` is, around `tensors`, which are all of it; `mixers` go into its config."""
    origin = getattr(model.config, ORIGIN, None) or {}
    config = HybridConfig.from_teacher(
        text_config,
        kept,
        teacher_name_or_path=origin.get("teacher"),
        teacher_revision=origin.get("teacher_revision"),
        **mixers,
    )
    with torch.device(model.device):
        hybrid: HybridForCausalLM = HybridForCausalLM._from_config(config, dtype=model.dtype)
    hybrid.load_state_dict(tensors)  # each in the dtype that the hybrid has it in
    if model.generation_config is not None:
        hybrid.generation_config = model.generation_config
    return hybrid.eval()


def _softmax_back(layer: dict[str, torch.Tensor], i: int, width: int) -> dict[str, torch.Tensor]:
    query, gate = layer["self_attn.q_proj.weight"].unflatten(0, (-1, 2 * width)).split(width, 1)
    if gate.any():
        raise _no_hybrid(f"softmax layer {i} has learned to gate its output")
    return {
        "self_attn.q_proj.weight": query.flatten(0, 1),
        "self_attn.k_proj.weight": layer["self_attn.k_proj.weight"],
        "self_attn.v_proj.weight": layer["self_attn.v_proj.weight"],
        "self_attn.o_proj.weight": layer["self_attn.o_proj.weight"] / 2,
        **{name: layer[name].float() + 1 for name in _HEAD_NORMS},
    }


def _linear_back(
    layer: dict[str, torch.Tensor], i: int, heads: int, groups: int, width: int
) -> dict[str, torch.Tensor]:
    def of_groups(rows: torch.Tensor) -> torch.Tensor:
        shared = rows.unflatten(0, (groups, heads // groups, width))
        if not (shared == shared[:, :1]).all():
            raise _no_hybrid(f"the heads of linear layer {i} that shared keys and values have learned their own")
        return shared[:, 0].flatten(0, 1)

    query, key, value = layer["linear_attn.in_proj_qkv.weight"].chunk(3)
    of_query, of_key, of_value = layer["linear_attn.conv1d.weight"].chunk(3)
    return {
        "self_attn.q_proj.weight": query,
        "self_attn.k_proj.weight": of_groups(key),
        "self_attn.v_proj.weight": of_groups(value),
        "self_attn.conv.weight": torch.cat([of_query, of_groups(of_key), of_groups(of_value)]),
        **{f"self_attn.{source}": layer[f"linear_attn.{name}"] for name, source in _LINEAR.items()},
    }


def _no_hybrid(reason: str) -> ValueError:
    return ValueError(
        f"this is no hybrid of ours in the layout of Qwen3.5: {reason}. It runs in transformers as it is."
    )
