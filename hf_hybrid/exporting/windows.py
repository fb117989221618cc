"""
The layout of transformers' own models that have a window in some layers: what fits it, and each tensor from and to a
hybrid with `mixer="sliding_window"`.

Such a layer is the teacher's own with another mask, so every tensor stays as it is, under its name. Qwen2 and Qwen3
name the layers with a window in their config (`layer_types`); Llama does not, and Cwm is Llama that does.
"""

from typing import Any

import torch
from transformers import CwmConfig, CwmForCausalLM, LlamaConfig, Qwen2ForCausalLM, Qwen3ForCausalLM

from hf_hybrid.modeling import HybridConfig, HybridForCausalLM
from hf_hybrid.modeling.sliding_window_attention import SlidingWindowOptions

from .native import EXPORTED_MIXERS, NEEDED_WINDOW_OPTIONS
from .qwen3_5 import ORIGIN, SHARED, hybrid_around, model_around, origin_of


MIXER = EXPORTED_MIXERS["windows"]
# From the teacher's family to the class of the exported model.
_CLASSES: dict[str, Any] = {
    "llama": CwmForCausalLM,
    "mistral": CwmForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
}
MODEL_TYPES = tuple(sorted({model.config_class.model_type for model in _CLASSES.values()}))
# In Cwm's config, where a Llama has no such token.
_UNSET: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": []}


def family_obstacles(text_config: Any) -> list[str]:
    """What of a teacher with this config stands in the way of its kept layers, in words."""
    family = text_config.model_type
    if family not in _CLASSES:
        return [f"there is no model with windows for {family}, only for {', '.join(_CLASSES)}"]
    found = []
    if getattr(text_config, "attention_bias", False) and family != "qwen3":
        found.append("its attention has biases (attention_bias), and Cwm, its like with windows, has none")
    own = text_config.sliding_window if family == "mistral" else None
    if own is not None or any(kind.startswith("sliding") for kind in getattr(text_config, "layer_types", None) or ()):
        size = own or text_config.sliding_window
        found.append(f"its softmax layers have a window of {size} tokens themselves; a layout has windows of one size")
    return found


def obstacles(config: HybridConfig) -> list[str]:
    """What stands in the way of this layout for a hybrid with this config, in words; empty where it fits."""
    kept = config.full_attention_layers
    replaced = {str(name) for i, name in enumerate(config.layer_mixers) if i not in kept}
    found = family_obstacles(config.text_config)
    found += [f"mixer {name!r} has no place; only {MIXER!r} does" for name in sorted(replaced - {MIXER})]
    for option, wanted in NEEDED_WINDOW_OPTIONS.items() if MIXER in replaced else ():
        if (given := getattr(_options(config), option)) != wanted:
            found.append(f"mixer_options[{option!r}] is {given}, and layers of transformers see only their window")
    return found


def engines(text_config: Any) -> list[str]:
    """What serves the exported model, in words."""
    lines = ["transformers: any list of layers, with its own cache of the window"]
    if _CLASSES[text_config.model_type] is CwmForCausalLM:
        lines.append("vLLM: any list of layers")
    else:
        lines.append("vLLM: with --model-impl transformers; its own classes refuse windows in some layers")
    lines.append("SGLang, MLX: not tried; see that they read layer_types and do not give each layer full attention")
    return lines


def _options(config: HybridConfig) -> SlidingWindowOptions:
    return SlidingWindowOptions.from_dict(config.options_of(MIXER), MIXER)


def native_config(config: HybridConfig) -> Any:
    """The config of the exported model."""
    text, window, kept = config.text_config, _options(config).window, config.full_attention_layers
    settings: dict[str, Any] = {
        "sliding_window": window,
        "layer_types": ["full_attention" if i in kept else "sliding_attention" for i in range(text.num_hidden_layers)],
        ORIGIN: origin_of(config),
    }
    if _CLASSES[text.model_type] is CwmForCausalLM:
        # Without these Cwm has tokens of its own. Whoever generates asks the generation config, which is the hybrid's.
        unset = {name: value for name, value in _UNSET.items() if getattr(text, name) is None}
        settings[ORIGIN]["unset"] = list(unset)
        return CwmConfig(**_shared(text) | unset, **settings)
    # transformers goes by `layer_types`. vLLM's own Qwen2 and Qwen3 read none: with any other number of these they say
    # so, with as many as there are layers they would give each of them full attention.
    settings[ORIGIN]["max_window_layers"] = text.max_window_layers
    settings |= {"use_sliding_window": True, "max_window_layers": 0}
    return type(text).from_dict({**text.to_dict(), **settings})


def _shared(config: Any) -> dict[str, Any]:
    """What a Llama or Mistral and Cwm have in common; Mistral knows no biases of its MLP."""
    names = (*SHARED, "rope_parameters")
    return {name: getattr(config, name) for name in names} | {"mlp_bias": getattr(config, "mlp_bias", False)}


@torch.no_grad()
def native_model(model: HybridForCausalLM) -> Any:
    """The exported model in memory, around the tensors of the hybrid."""
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return model_around(_CLASSES[model.config.text_config.model_type], native_config(model.config), tensors)


def hybrid_of(model: Any) -> HybridForCausalLM:
    """Returns the hybrid that a model of this layout is."""
    config = model.config
    origin = getattr(config, ORIGIN, None) or {}
    kept = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
    if config.model_type == CwmConfig.model_type:
        text: Any = LlamaConfig(**_shared(config) | dict.fromkeys(origin.get("unset", ())))
    else:
        plain = {"use_sliding_window": False, "sliding_window": None, "layer_types": None}
        plain["max_window_layers"] = origin.get("max_window_layers", config.max_window_layers)
        own = {name: value for name, value in config.to_dict().items() if name != ORIGIN}
        text = type(config).from_dict({**own, **plain})
    return hybrid_around(
        model, text, kept, model.state_dict(), mixer=MIXER, mixer_options={"window": config.sliding_window}
    )
