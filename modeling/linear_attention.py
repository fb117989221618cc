"""What mixers with a recurrence share: options, convolution, padding, the state in the cache, gate and norm.

Shapes: B batch, T tokens, H query heads, G key/value heads of the teacher, D key and V value width of a head.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from .adopted_attention import AttentionCall, expand_groups
from .kernels import fused_gated_norm, fuses
from .mixer import Mixer, MixerOptions
from .ops_common import unit as unit  # for mixers of others, which look for it here
from .ops_common import widen
from .short_convolution import ShortConvolution


# What a channel starts with before SiLU: with the identity the embedded teacher's hybrid ends 0.48 nats behind.
_STRAIGHT = 0.1
_GATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": nn.functional.silu,
    "sigmoid": torch.sigmoid,
}


@dataclass
class LinearAttentionOptions(MixerOptions):
    """
    Options of a mixer with a recurrence, `config.mixer_options`.

    Args:
        rope (`bool`): rotate q and k with the teacher's rotary embedding, where the teacher has one.
        output_norm (`bool`): RMS-normalise each head's output, as Gated DeltaNet does (arXiv 2412.06464, figure 1).
        output_gate (`str`, *optional*): `"silu"`, `"sigmoid"` or `None`; the gate multiplies the normalised output.
            A teacher that gates its attention keeps its own gate and gets no second one.
        short_convolution (`int`): kernel size of a causal depthwise convolution on q, k and v as the teacher's softmax
            would get them (normed and rotated); 0 for none. It starts as the identity, or before SiLU as a tenth of
            it, which costs far less (docs/native.md). A kernel of size K adds
            `K (H D + G (D + V))` parameters, and as many numbers of the model's dtype to the state of a sequence.
        silu_qk (`bool`): apply SiLU to q and k, which the paper's released student does and which costs quality here.
        silu_v (`bool`): apply SiLU to v, as the Gated DeltaNet layers of transformers' own models do.
        qk_norm (`bool`): keep the teacher's norms of q and k; without them they are not carried over.
        projection_bias (`bool`): keep the biases of the teacher's projections; without them they are not carried over.
    """

    rope: bool = True
    output_norm: bool = True
    output_gate: str | None = "silu"
    short_convolution: int = 0
    silu_qk: bool = False
    silu_v: bool = False
    qk_norm: bool = True
    projection_bias: bool = True

    def __post_init__(self) -> None:
        if self.output_gate is not None and self.output_gate not in _GATES:
            raise ValueError(
                f"mixer_options['output_gate']={self.output_gate!r} is unknown; choose {sorted(_GATES)} or None."
            )
        if self.short_convolution < 0:
            raise ValueError(
                f"mixer_options['short_convolution']={self.short_convolution} is negative; pass 0 or a kernel size."
            )


def decay_parameter(width: int) -> nn.Parameter:
    """A parameter of the decay: fp32 in a model of half precision, for a rounding of it compounds over every token."""
    return nn.Parameter(torch.zeros(width, dtype=torch.promote_types(torch.get_default_dtype(), torch.float32)))


class GateProjection(nn.Linear):
    """
    The projection of a decay or a write strength, a few outputs wide, which bitsandbytes leaves as it is: it quantizes
    what is an `nn.Linear` and no subclass. There is nothing to save here, and its kernels refuse such widths.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)


def init_decay(rates: torch.Tensor, steps: torch.Tensor) -> None:
    """Initialises `A_log` and `dt_bias`, spread out as in the official implementations of the gated delta rules."""
    rate = torch.empty_like(rates, dtype=torch.float32).uniform_(1.0, 16.0)
    init.copy_(rates, rate.log())
    step = torch.empty_like(steps, dtype=torch.float32).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    init.copy_(steps, step + torch.log(-torch.expm1(-step)))  # softplus(dt_bias) == step


class HeadRMSNorm(nn.Module):
    """RMS norm over each head's V values, in fp32, and the gate that multiplies what it gives."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(
        self, x: torch.Tensor, gate: torch.Tensor | None = None, activation: str = "silu", kernel: str = "auto"
    ) -> torch.Tensor:
        """
        Args:
            x: `[B, T, H, V]`.
            gate: of that shape, before its `activation`, `"silu"` or `"sigmoid"`; None for none.
            kernel: as in `config.kernel`; with fla's kernels norm and gate are one launch.
        """
        if gate is not None and fuses(x, kernel):
            return fused_gated_norm(x, gate, self.weight, self.eps, activation)
        wide = widen(x)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        normed = (wide * self.weight.to(wide.dtype)).to(x.dtype)
        return normed if gate is None else normed * _GATES[activation](gate)


class LinearAttention(Mixer):
    """
    Base of the mixers with a recurrence in the place of the teacher's softmax. A subclass adds its decay and write
    gates and the recurrence, in [`mix`]. Arguments as of [`Mixer`].
    """

    options_class: ClassVar[type[MixerOptions]] = LinearAttentionOptions

    def __init__(self, attention: nn.Module, config: Any, layer_idx: int) -> None:
        super().__init__(attention, config, layer_idx)
        self.leave_out(qk_norm=not self.options.qk_norm, bias=not self.options.projection_bias)
        eps = getattr(config.text_config, "rms_norm_eps", None) or 1e-6
        self.o_norm = HeadRMSNorm(self.value_dim, eps) if self.options.output_norm else None
        self.output_gate = None if self.has_output_gate else self.options.output_gate
        if self.output_gate is not None:
            self.g_proj = nn.Linear(self.hidden_size, self.num_heads * self.value_dim, bias=False)
        self.conv = None
        if self.options.short_convolution:
            channels = self.num_heads * self.head_dim + self.num_kv_heads * (self.head_dim + self.value_dim)
            self.conv = ShortConvolution(channels, self.options.short_convolution)

    def init_weights(self) -> None:
        """Initialises what the teacher does not have; called after the library's own initialisation."""
        if self.o_norm is not None:
            init.ones_(self.o_norm.weight)
        if self.conv is not None:
            self.conv.init_weights(self._first_taps(self.conv))

    def _first_taps(self, conv: ShortConvolution) -> torch.Tensor:
        """
        What each channel of the convolution starts with: 1, or where SiLU follows a tenth, around which SiLU is nearly
        a straight line. The norm of the output, and unit length of q and k where they have it, forget the factor.
        """
        scale = torch.ones(len(conv.weight), dtype=conv.weight.dtype, device=conv.weight.device)
        of_values = len(scale) - self.num_kv_heads * self.value_dim
        if self.o_norm is not None:
            scale[:of_values] = _STRAIGHT if self.options.silu_qk else 1.0
            scale[of_values:] = _STRAIGHT if self.options.silu_v else 1.0
        return scale

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
        """
        The recurrence, from q, k `[B, T, H, D]` and v `[B, T, H, V]` to the output `[B, T, H, V]` and the state
        after the last token `[B, H, D, V]`. Padding must leave the state as it was.
        """
        raise NotImplementedError

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """See [`AdoptedAttention.forward`]; the cache holds the state `[B, H, D, V]` in fp32."""
        if not self.options.rope and kwargs.get("position_embeddings") is not None:
            kwargs["position_embeddings"] = no_rotation(kwargs["position_embeddings"])
        return super().forward(hidden_states, *args, **kwargs)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        if self.conv is not None:
            query, key, value = self._convolve(query, key, value, call)
        key, value = expand_groups(key, value, self.num_heads)
        if self.options.silu_qk:
            query, key = nn.functional.silu(query), nn.functional.silu(key)
        if self.options.silu_v:
            value = nn.functional.silu(value)
        state = None
        if call.cache is not None:
            cached: Any = call.cache.layers[self.layer_idx]
            state = cached.recurrent_states[0] if cached.has_previous_state[0] else None
            if state is not None and torch.is_grad_enabled():
                state = state.clone()  # the cache writes the next state over this one, which the backward pass needs
        output, state = self.mix(query, key, value, call.hidden_states, call.padding_mask, state, call.seq_idx)
        if call.cache is not None:
            self._store(call.cache, state, query)
        return self.finish(output, call.hidden_states).to(value.dtype)

    def finish(self, output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """What follows on the recurrence, `[B, T, H, V]` to the same: norm and gate, where the mixer has them."""
        gate = None if self.output_gate is None else self.g_proj(hidden_states).view_as(output)
        if self.o_norm is not None:
            return self.o_norm(output, gate, self.output_gate or "silu", self.kernel)
        return output if gate is None else output * _GATES[str(self.output_gate)](gate)

    def _convolve(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        parts = (query, key, value)
        mixed = torch.cat([x.flatten(2) for x in parts], dim=-1)
        if call.padding_mask is not None:  # with a bias, padding does not project to zero
            mixed = mixed * call.padding_mask[..., None]
        mixed = self.conv(mixed, call.cache, self.layer_idx, call.seq_idx, self.kernel)  # type: ignore[misc]
        pieces = mixed.split([x.shape[2] * x.shape[3] for x in parts], dim=-1)
        query, key, value = (piece.view(x.shape) for piece, x in zip(pieces, parts, strict=True))
        return query, key, value

    def _store(self, cache: Cache, state: torch.Tensor, tokens: torch.Tensor) -> None:
        cache.update_recurrent_state(state, self.layer_idx)
        layer: Any = cache.layers[self.layer_idx]
        # Only a convolution's update marks the library's layer as filled; without one we must.
        if not layer.has_previous_state[0]:
            layer.has_previous_state[0] = True
        self.count_tokens(cache, tokens)


def no_rotation(position_embeddings: Any) -> Any:
    """The rotary embeddings of an angle of 0, in the teacher's form: `(cos, sin)`, or complex numbers."""
    if isinstance(position_embeddings, torch.Tensor):
        return torch.ones_like(position_embeddings)
    cos, sin = position_embeddings
    return torch.ones_like(cos), torch.zeros_like(sin)
