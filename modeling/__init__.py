"""The hybrid model: what travels with each checkpoint. Importing this registers it with the Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import is_peft_available

from .configuration_hybrid import HybridConfig
from .gated_deltanet import GatedDeltaNet
from .gated_linear_attention import GatedLinearAttention
from .kimi_delta_attention import KimiDeltaAttention
from .linear_attention import LinearAttention, LinearAttentionOptions
from .modeling_hybrid import MIXERS, HybridForCausalLM
from .sliding_window_attention import SlidingWindowAttention


AutoConfig.register(HybridConfig.model_type, HybridConfig, exist_ok=True)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM, exist_ok=True)
# Trainer looks up by name for which classes it has to shift the labels before it smooths them.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[HybridConfig.model_type] = HybridForCausalLM.__name__
if is_peft_available():
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    # Where a LoraConfig has no targets PEFT takes them from here, by model type: a pattern, whoever the teacher was.
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[HybridConfig.model_type] = (
        r".*\.self_attn\.(q_proj|k_proj|v_proj|qkv_proj|query_key_value|q_gate_proj|q_a_proj|q_b_proj"
        r"|kv_a_proj_with_mqa|kv_b_proj|o_proj|out_proj|dense)"
    )
HybridConfig.register_for_auto_class()
HybridForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "MIXERS",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "HybridConfig",
    "HybridForCausalLM",
    "KimiDeltaAttention",
    "LinearAttention",
    "LinearAttentionOptions",
    "SlidingWindowAttention",
]
