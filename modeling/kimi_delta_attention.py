"""Kimi Delta Attention as a drop-in for a teacher's softmax attention."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .kernels import delta_rule_of_logits
from .linear_attention import (
    GateProjection,
    LinearAttention,
    LinearAttentionOptions,
    decay_parameter,
    init_decay,
)


@dataclass
class KimiDeltaAttentionOptions(LinearAttentionOptions):
    """Options of [`KimiDeltaAttention`]: its output gate is a sigmoid (arXiv 2510.26692, section 4) unless told."""

    output_gate: str | None = "sigmoid"


class KimiDeltaAttention(LinearAttention):
    r"""
    Kimi Delta Attention, KDA (arXiv 2510.26692, eq. 1), with the teacher's projections.

    Gated DeltaNet with a decay of its own for each key channel. Per head, with `q_t, k_t` of unit length and the state
    `S` of shape `[D, V]`:

        S_t = (I - beta_t k_t k_t^T) diag(alpha_t) S_{t-1} + beta_t k_t v_t^T
        o_t = S_t^T q_t / sqrt(D)

    with the log decay `log alpha_t = -exp(A_log) softplus(f_proj x_t + dt_bias)`, where `f_proj` has rank V, and the
    write strength `beta_t = sigmoid(b_proj x_t)`; the layer returns `o_proj(norm(o_t) * sigmoid(g_proj x_t))`. Unlike
    in the official layer, `g_proj` has full rank (all mixers share it), and there is no convolution by default.

    Keeps of the teacher: everything in its attention but the softmax, from the projections to q, k and v (biases,
    norms, rotary embedding, grouping of heads) to the output projection. Adds, per layer: `f_proj` (hidden V + V H
    D), `dt_bias` (H D), `A_log` (H), `b_proj` (hidden x H), `g_proj` (hidden x H V) unless the teacher has a gate,
    `o_norm` (V), and a convolution where asked for. State: `4 H D V` bytes per sequence.
    """

    options_class = KimiDeltaAttentionOptions
    decay_parameters = ("A_log", "dt_bias")

    def __init__(self, attention: nn.Module, config: Any, layer_idx: int) -> None:
        super().__init__(attention, config, layer_idx)
        hidden_size, channels = self.hidden_size, self.num_heads * self.head_dim
        self.f_proj = nn.Sequential(
            GateProjection(hidden_size, self.value_dim), GateProjection(self.value_dim, channels)
        )
        self.b_proj = GateProjection(hidden_size, self.num_heads)
        self.A_log = decay_parameter(self.num_heads)
        self.dt_bias = decay_parameter(channels)

    def init_weights(self) -> None:
        """Decay rates spread over heads and step sizes over channels, as in the official implementation."""
        super().init_weights()
        init_decay(self.A_log, self.dt_bias)

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
        return delta_rule_of_logits(
            "kda",
            query,
            key,
            value,
            decay=self.f_proj(hidden_states).unflatten(-1, (self.num_heads, self.head_dim)),
            write=self.b_proj(hidden_states),
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            padding_mask=padding_mask,
            initial_state=state,
            seq_idx=seq_idx,
            kernel=self.kernel,
        )
