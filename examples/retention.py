"""A mixer of one's own, as `custom_mixer.py` uses it: retention (arXiv 2307.08621), a decay that no token changes."""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from hf_hybrid.modeling.kernels import gated_linear_attention
from hf_hybrid.modeling.linear_attention import LinearAttention, decay_parameter
from hf_hybrid.modeling.modeling_hybrid import MIXERS, HybridForCausalLM


class Retention(LinearAttention):
    r"""
    Retention (eq. 5) with the teacher's projections. Per head, with the state `S` of shape `[D, V]`:

        S_t = sigmoid(decay) S_{t-1} + k_t v_t^T,    o_t = S_t^T q_t / sqrt(D)

    What comes before and after is the base class's and the teacher's: rotary embedding, cache, output norm and gate.
    """

    decay_parameters = ("decay",)

    def __init__(self, attention: nn.Module, config: Any, layer_idx: int) -> None:
        super().__init__(attention, config, layer_idx)
        self.decay = decay_parameter(self.num_heads)

    def init_weights(self) -> None:
        """Decays of 1 - 2^-5, 1 - 2^-6, ..., one a head (eq. 8)."""
        super().init_weights()
        exponents = 5.0 + torch.arange(self.num_heads, device=self.decay.device)
        init.copy_(self.decay, torch.log(2.0**exponents - 1.0))

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
        log_decay = nn.functional.logsigmoid(self.decay)[:, None].expand(query.shape)
        if padding_mask is not None:  # no decay and no write: the state passes over padding unchanged
            log_decay = log_decay * padding_mask[..., None, None]
            key = key * padding_mask[..., None, None]
        return gated_linear_attention(
            query, key, value, g=log_decay, initial_state=state, seq_idx=seq_idx, kernel=self.kernel
        )


class RetentionHybrid(HybridForCausalLM):
    """A hybrid that knows retention beside the mixers of hf_hybrid."""

    mixers = MIXERS | {"retention": Retention}
