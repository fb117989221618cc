"""Tiny random models of every causal language model type of the installed transformers."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_hybrid.modeling import HybridConfig


VOCABULARY = 99
LAYERS = 4
WINDOW = 16
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "d_model": 64,
    "word_embed_proj_dim": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "num_hidden_layers": LAYERS,
    "num_layers": LAYERS,
    "num_attention_heads": 4,
    "attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "sliding_window": WINDOW,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "num_expert_group": 1,
    "moe_k": 2,
    "moe_topk": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    # no noise, so that two passes can be compared
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "dropout": 0.0,
    "activation_dropout": 0.0,
    "layerdrop": 0.0,
    "router_jitter_noise": 0.0,
    "input_jitter_noise": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
}
# Latent projections: q and k of 16 + 8, v of 12. Their head_dim is what the rotary embedding turns.
_LATENT: dict[str, Any] = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "v_head_dim": 12,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
# What the sizes above cannot know. Layer types that are linear in the original are made softmax.
_SOFTMAX: dict[str, Any] = {"layer_types": ["full_attention"] * LAYERS}
_DECODER: dict[str, Any] = {
    "decoder_layers": LAYERS,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "is_decoder": True,
}
_PER_LAYER: dict[str, Any] = {
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bart": _DECODER,
    "bigbird_pegasus": _DECODER,
    "blenderbot": _DECODER,
    "blenderbot-small": _DECODER,
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dots3_note_text": {"per_layer_config": {}, "layer_types": ["indexed_attention", "sliding_attention"] * 2},
    "gemma3n_text": _PER_LAYER | {"activation_sparsity_pattern": [0.0] * LAYERS},
    "gemma4_text": _PER_LAYER | {"global_head_dim": 16, "num_global_key_value_heads": 2},
    "gemma4_unified_text": {"num_kv_shared_layers": 0, "global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "kimi_linear": _SOFTMAX,
    "lfm2": _SOFTMAX,
    "lfm2_moe": _SOFTMAX,
    "lfm3": _SOFTMAX,
    "marian": _DECODER,
    "mbart": _DECODER,
    "mvp": _DECODER,
    "pegasus": _DECODER,
    "plbart": _DECODER,
    "qwen3_5_moe_text": _SOFTMAX,
    "qwen3_5_text": _SOFTMAX,
    "qwen3_next": _SOFTMAX,
    "trocr": _DECODER,
    "whisper": _DECODER,
}
# What a passing type does not cover.
_OTHER_LAYERS = "with softmax in every layer; a checkpoint with layers of another kind is refused"
_SHARED = "layers that read or keep other layers' keys and values are refused"
NOTES = {name: _OTHER_LAYERS for name, changes in OVERRIDES.items() if changes is _SOFTMAX}
NOTES |= {name: _SHARED for name, changes in OVERRIDES.items() if "num_kv_shared_layers" in changes}


def causal_types() -> list[str]:
    """Every model type that transformers has a causal language model for."""
    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name != HybridConfig.model_type]


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A config of a model of four layers; sizes are set where the type has a setting of that name."""
    known = CONFIG_MAPPING[model_type]().to_dict()
    sizes = _SIZES | (_LATENT if "kv_lora_rank" in known else {})
    settings = {name: value for name, value in sizes.items() if name in known}
    settings |= OVERRIDES.get(model_type, {})
    return AutoConfig.for_model(model_type, **settings)


def skeleton(model_type: str) -> PreTrainedModel:
    """The model without memory for its weights, to see what it is made of."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(model_type))


def tiny_model(model_type: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of the type, the same one each time, with norms and biases away from 1 and 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.1)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.tie_weights()
    return model.eval()


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids `[batch, length]` that are no special tokens."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
