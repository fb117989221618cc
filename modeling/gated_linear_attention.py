"""Gated linear attention as a drop-in for a teacher's softmax attention."""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .kernels import gated_linear_attention
from .linear_attention import GateProjection, LinearAttention, decay_parameter, widen


# Rank of the decay's projection and what its log is divided by: arXiv 2312.06635, section 4.4.
_LOW_RANK = 16
TEMPERATURE = 16.0


class GatedLinearAttention(LinearAttention):
    r"""
    Gated linear attention, GLA (arXiv 2312.06635, eq. 3), with the teacher's projections.

    Per head, with the state `S` of shape `[D, V]` and a decay of its own for each of the D key channels:

        S_t = diag(alpha_t) S_{t-1} + k_t v_t^T
        o_t = S_t^T q_t / sqrt(D)

    with the log decay `log alpha_t = logsigmoid(gk_proj x_t + gk_bias) / 16` (section 4.4), where `gk_proj` has rank
    16; the layer returns `o_proj(norm(o_t) * silu(g_proj x_t))`. There is no feature map, and q and k are not brought
    to unit length: the sum only adds, so it needs no bound on the keys, and their length is what the teacher's softmax
    weighs tokens by.

    Keeps of the teacher: everything in its attention but the softmax, from the projections to q, k and v (biases,
    norms, rotary embedding, grouping of heads) to the output projection. Adds, per layer: `gk_proj` (16 hidden +
    16 H D), `gk_bias` (H D), `g_proj` (hidden x H V) unless the teacher has a gate, `o_norm` (V), and a convolution
    where asked for. State: `4 H D V` bytes per sequence.
    """

    decay_parameters = ("gk_bias",)

    def __init__(self, attention: nn.Module, config: Any, layer_idx: int) -> None:
        super().__init__(attention, config, layer_idx)
        channels = self.num_heads * self.head_dim
        self.gk_proj = nn.Sequential(GateProjection(self.hidden_size, _LOW_RANK), GateProjection(_LOW_RANK, channels))
        self.gk_bias = decay_parameter(channels)

    def init_weights(self) -> None:
        """A bias of zero, as in the official implementation: a decay of 0.958 per token to begin with."""
        super().init_weights()
        init.zeros_(self.gk_bias)

    def mix(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        hidden_states: torch.Tensor,
        padding_mask: torch.Tensor | None,
        state: torch.Tensor | None,
        seq_idx: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = widen(self.gk_proj(hidden_states)) + widen(self.gk_bias)
        log_decay = nn.functional.logsigmoid(logits) / TEMPERATURE
        if padding_mask is not None:  # no decay and no write: the state passes over padding unchanged
            log_decay = log_decay * padding_mask[..., None]
            key = key * padding_mask[..., None, None]
        if value.dtype == torch.float16:
            value = value.float()  # the sum is bounded by nothing: it is wide until the norm has brought it back
        return gated_linear_attention(
            query,
            key,
            value,
            g=log_decay.unflatten(-1, (self.num_heads, self.head_dim)),
            initial_state=state,
            seq_idx=seq_idx,
            kernel=self.kernel,
        )
