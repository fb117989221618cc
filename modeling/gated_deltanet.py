"""Gated DeltaNet as a drop-in for a teacher's softmax attention."""

from typing import Any

import torch
from torch import nn

from .kernels import delta_rule_of_logits
from .linear_attention import GateProjection, LinearAttention, decay_parameter, init_decay


class GatedDeltaNet(LinearAttention):
    r"""
    Gated DeltaNet (arXiv 2412.06464, eq. 10) with the teacher's projections.

    Per head, with `q_t, k_t` of unit length and the state `S` of shape `[D, V]`:

        S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - (exp(g_t) S_{t-1})^T k_t))^T
        o_t = S_t^T q_t / sqrt(D)

    with the log decay `g_t = -exp(A_log) softplus(a_proj x_t + dt_bias)` and the write strength
    `beta_t = sigmoid(b_proj x_t)`; the layer returns `o_proj(norm(o_t) * silu(g_proj x_t))`.

    Keeps of the teacher: everything in its attention but the softmax, from the projections to q, k and v (biases,
    norms, rotary embedding, grouping of heads) to the output projection. Adds, per layer: `a_proj`, `b_proj` (hidden
    x H each), `A_log`, `dt_bias` (H each), `g_proj` (hidden x H V) unless the teacher has a gate, `o_norm` (V), and a
    convolution where asked for. State: `4 H D V` bytes per sequence.
    """

    decay_parameters = ("A_log", "dt_bias")

    def __init__(self, attention: nn.Module, config: Any, layer_idx: int) -> None:
        super().__init__(attention, config, layer_idx)
        self.a_proj = GateProjection(self.hidden_size, self.num_heads)
        self.b_proj = GateProjection(self.hidden_size, self.num_heads)
        self.A_log = decay_parameter(self.num_heads)
        self.dt_bias = decay_parameter(self.num_heads)

    def init_weights(self) -> None:
        """Decay rates and step sizes spread over heads as in the official implementation of Gated DeltaNet."""
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
            "gated_delta_rule",
            query,
            key,
            value,
            decay=self.a_proj(hidden_states),
            write=self.b_proj(hidden_states),
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            padding_mask=padding_mask,
            initial_state=state,
            seq_idx=seq_idx,
            kernel=self.kernel,
        )
