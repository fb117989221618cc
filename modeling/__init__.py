"""The hybrid model: what travels with each checkpoint. Importing this registers it with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .configuration_hybrid import HybridConfig
from .gated_deltanet import GatedDeltaNet
from .gated_linear_attention import GatedLinearAttention
from .kimi_delta_attention import KimiDeltaAttention
from .linear_attention import LinearAttention, LinearAttentionOptions
from .mixer import Mixer
from .model_card import replace_library_card
from .modeling_hybrid import MIXERS, HybridForCausalLM, HybridModel
from .sliding_window_attention import SlidingWindowAttention


AutoConfig.register(HybridConfig.model_type, HybridConfig, exist_ok=True)
AutoModel.register(HybridConfig, HybridModel, exist_ok=True)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM, exist_ok=True)
# Trainer looks up by name for which classes it has to shift the labels before it smooths them.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[HybridConfig.model_type] = HybridForCausalLM.__name__
HybridConfig.register_for_auto_class()
HybridModel.register_for_auto_class("AutoModel")
HybridForCausalLM.register_for_auto_class("AutoModelForCausalLM")
HybridForCausalLM.write_card = replace_library_card

__all__ = [
    "MIXERS",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "HybridConfig",
    "HybridForCausalLM",
    "HybridModel",
    "KimiDeltaAttention",
    "LinearAttention",
    "LinearAttentionOptions",
    "Mixer",
    "SlidingWindowAttention",
]
