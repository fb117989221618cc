"""
A hybrid in vLLM: vLLM's own model of the teacher, with vLLM's own Gated DeltaNet in its linear layers.

Shapes: T tokens of all sequences in a row, H query heads, G key/value heads, D width of a head.
"""

import copy
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import QwenGatedDeltaNetAttention
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFuncCalculator,
    MambaStateDtypeCalculator,
    MambaStateShapeCalculator,
)
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, init_vllm_registered_model
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors
from vllm.utils.torch_utils import _encode_layer_name

from hf_hybrid.modeling import LinearAttentionOptions

from .vllm_plugin import CONVOLUTION, FAMILIES, check_served, heads_of, options_of, vllm_tensors


class HybridGatedDeltaNet(QwenGatedDeltaNetAttention):
    """
    vLLM's Gated DeltaNet (convolution, recurrence, gated norm and their states) over the q, k and v of the teacher.

    vLLM's layer projects to q, k and v itself, without biases, norms or positions. Here that is the teacher's part.

    Args:
        attention (`nn.Module`): vLLM's attention of the teacher in this layer, whose projections are taken over.
        options (`LinearAttentionOptions`): the mixer's.
        text_config (`PreTrainedConfig`): the teacher's config.
    """

    def __init__(
        self, attention: Any, options: LinearAttentionOptions, text_config: Any, vllm_config: VllmConfig, prefix: str
    ) -> None:
        heads, _, width = heads_of(text_config)
        settings = SimpleNamespace(
            hidden_size=text_config.hidden_size,
            # What follows the convolution; vLLM has no other use for it.
            hidden_act="silu" if options.silu_v else None,
            rms_norm_eps=text_config.rms_norm_eps,
            output_gate_type=options.output_gate,
            linear_num_key_heads=heads,
            linear_num_value_heads=heads,
            linear_key_head_dim=width,
            linear_value_head_dim=width,
            linear_conv_kernel_dim=CONVOLUTION,
        )
        super().__init__(settings, vllm_config, prefix)
        self.g_proj = ColumnParallelLinear(
            self.hidden_size, self.value_dim, bias=False, quant_config=None, prefix=f"{prefix}.g_proj"
        )
        self.qkv_proj, self.out_proj = attention.qkv_proj, attention.o_proj
        if not options.projection_bias:
            self.qkv_proj.bias = self.out_proj.bias = None
        self.q_norm = getattr(attention, "q_norm", None) if options.qk_norm else None
        self.k_norm = getattr(attention, "k_norm", None) if options.qk_norm else None
        self.rotary_emb = attention.rotary_emb if options.rope else None
        self.widths = [attention.q_size, attention.kv_size, attention.kv_size]
        self.groups = attention.num_heads // attention.num_kv_heads
        self.state_dtypes = state_dtypes(vllm_config)

    def create_qkvz_proj(self, *args: Any, **kwargs: Any) -> None:
        """None: the teacher's projections are there."""

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return self.state_dtypes

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """From `[T, hidden]` to the layer's output `[T, hidden]`."""
        query, key, value = self.qkv_proj(hidden_states)[0].split(self.widths, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            query = self.q_norm(query.unflatten(-1, (-1, self.head_k_dim))).flatten(-2)
            key = self.k_norm(key.unflatten(-1, (-1, self.head_k_dim))).flatten(-2)
        if self.rotary_emb is not None:
            query, key = self.rotary_emb(positions, query, key)
        if self.groups > 1:
            key, value = (
                x.unflatten(-1, (-1, self.head_k_dim)).repeat_interleave(self.groups, dim=-2).flatten(-2)
                for x in (key, value)
            )
        mixed = torch.cat([query, key, value], dim=-1)
        write, decay = self.split_ba(self.in_proj_ba(hidden_states)[0])
        gate = self.g_proj(hidden_states)[0].unflatten(-1, (-1, self.head_v_dim))
        output = torch.zeros_like(gate)  # vLLM writes only those of its rows that are tokens
        if current_platform.is_cpu():
            core = torch.ops.vllm.cpu_gdn_attention_core
        else:
            core = torch.ops.vllm.qwen_gdn_attention_core
        core(mixed, write.contiguous(), decay.contiguous(), output, _encode_layer_name(self.prefix))
        return self._output_projection(output, gate)


class HybridForCausalLM(nn.Module, HasInnerState, IsHybrid):
    """The hybrid that `hf_hybrid` saved, read as it is."""

    # vLLM has the two in one.
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".self_attn.b_proj.": (".self_attn.in_proj_ba.", 0),
            ".self_attn.a_proj.": (".self_attn.in_proj_ba.", 1),
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        check_served(self.config)
        check_settings(vllm_config)
        text_config = copy.deepcopy(self.config.text_config)
        text_config.layer_types = list(self.config.softmax_layer_types)
        teacher: Any = init_vllm_registered_model(
            vllm_config, prefix=prefix, hf_config=text_config, architectures=[FAMILIES[text_config.model_type]]
        )
        self.model, self.lm_head = teacher.model, teacher.lm_head
        self.logits_processor = teacher.logits_processor
        for i in self.config.linear_attention_layers:
            attention = self.model.layers[i].self_attn
            # vLLM reserves keys and values for each attention that it finds there.
            name = attention.attn.layer_name
            del vllm_config.compilation_config.static_forward_context[name]
            self.model.layers[i].self_attn = HybridGatedDeltaNet(
                attention, options_of(self.config), text_config, vllm_config, name.removesuffix(".attn")
            )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """From ids and positions `[T]` to the last hidden states `[T, hidden]`."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        tensors = vllm_tensors(weights, self.config)
        return AutoWeightsLoader(self).load_weights(tensors, mapper=self.hf_to_vllm_mapper)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return state_dtypes(vllm_config)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        heads, _, width = heads_of(vllm_config.model_config.hf_text_config)
        processes = vllm_config.parallel_config.tensor_parallel_size
        return MambaStateShapeCalculator.gated_delta_net_state_shape(
            processes, heads, heads, width, width, CONVOLUTION, 0
        )

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        return MambaStateCopyFuncCalculator.gated_delta_net_state_copy_func()


def state_dtypes(vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
    """Dtypes of the convolution's last tokens and of the recurrent state, which is fp32 unless vLLM is told."""
    cache = vllm_config.cache_config
    state = "float32" if cache.mamba_ssm_cache_dtype == "auto" else cache.mamba_ssm_cache_dtype
    return MambaStateDtypeCalculator.gated_delta_net_state_dtype(
        vllm_config.model_config.dtype, cache.mamba_cache_dtype, state
    )


def check_settings(vllm_config: VllmConfig) -> None:
    """Raises a `ValueError` for what vLLM is asked to do with a hybrid and this plugin cannot."""
    if vllm_config.quant_config is not None:
        raise ValueError("quantization is not served by the vLLM plugin for hybrids; leave it out.")
    if vllm_config.speculative_config is not None:
        raise ValueError(
            "speculative decoding takes tokens back, with which the vLLM plugin for hybrids was not tried; leave it "
            "out."
        )
    if not vllm_config.model_config.hf_config.linear_attention_layers:
        return
    _, _, width = heads_of(vllm_config.model_config.hf_text_config)
    dtype = vllm_config.model_config.dtype
    if current_platform.is_cpu() and dtype != torch.bfloat16:
        raise ValueError(f"dtype is {dtype}, and vLLM's linear layers on a CPU run in bf16; pass --dtype bfloat16.")
    if dtype == torch.float32:
        raise ValueError(f"dtype is {dtype}, and vLLM's linear layers run in half precision; pass --dtype bfloat16.")
    if current_platform.is_cpu() and width not in (64, 128):
        raise ValueError(f"heads are {width} wide, and vLLM's linear layers on a CPU take heads of 64 or 128.")
    if current_platform.is_xpu():
        raise ValueError("the vLLM plugin for hybrids runs on CUDA, ROCm and CPUs, not on XPU.")
