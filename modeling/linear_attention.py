"""What every linear-attention mixer shares: projections, heads, positions, padding, cache, gate and norm.

Shapes: B batch, T tokens, H query heads, G key/value heads of the teacher, D key and V value width of a head.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from .short_convolution import ShortConvolution


_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")
ADOPTED = _PROJECTIONS + _NORMS
_GATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": nn.functional.silu,
    "sigmoid": torch.sigmoid,
}


@dataclass
class LinearAttentionOptions:
    """
    Options of a mixer, `config.mixer_options`.

    Args:
        rope (`bool`): rotate q and k with the teacher's rotary embedding, where the teacher has one.
        output_norm (`bool`): RMS-normalise each head's output, as Gated DeltaNet does (arXiv 2412.06464, figure 1).
        output_gate (`str`, *optional*): `"silu"`, `"sigmoid"` or `None`; the gate multiplies the normalised output.
        short_convolution (`int`): kernel size of a causal depthwise convolution on q, k and v; 0 for none. It starts
            as the identity.
        silu_qk (`bool`): apply SiLU to q and k, which the paper's released student does and which costs quality here.
    """

    rope: bool = True
    output_norm: bool = True
    output_gate: str | None = "silu"
    short_convolution: int = 0
    silu_qk: bool = False

    @classmethod
    def from_dict(cls, options: dict[str, Any] | None, mixer: str | None = None) -> Self:
        """The options in a dict; `mixer` is only named in the error about those that it does not have."""
        known = [field.name for field in fields(cls) if field.init]
        unknown = sorted(set(options or {}) - set(known))
        if unknown:
            raise ValueError(f"mixer_options {unknown} are unknown to {mixer or cls.__name__}; choose from {known}.")
        parsed = cls(**(options or {}))
        if parsed.output_gate is not None and parsed.output_gate not in _GATES:
            raise ValueError(
                f"mixer_options['output_gate']={parsed.output_gate!r} is unknown; choose {sorted(_GATES)} or None."
            )
        if parsed.short_convolution < 0:
            raise ValueError(
                f"mixer_options['short_convolution']={parsed.short_convolution} is negative; pass 0 or a kernel size."
            )
        return parsed


def widen(x: torch.Tensor) -> torch.Tensor:
    """`x` in fp32 where it is half precision, and as it is otherwise."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def unit(x: torch.Tensor) -> torch.Tensor:
    """Unit vectors over the last axis, with the epsilon inside the root so that a zero row has a finite gradient."""
    wide = widen(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


class TokenCountingLinearAttentionLayer(LinearAttentionLayer, CacheLayerMixin):  # type: ignore[misc, override]
    """Cache layer for a model without any softmax layer: a recurrent state has no length, so someone has to count."""

    is_sliding = False

    def __init__(self, **kwargs: Any) -> None:
        LinearAttentionLayer.__init__(self, **kwargs)
        self.is_initialized = False
        self.tokens_seen = 0

    def count(self, num_tokens: int) -> None:
        self.tokens_seen += num_tokens

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("a linear-attention layer caches no keys and values; call update_recurrent_state.")

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        self.tokens_seen = 0

    def get_seq_length(self) -> int:
        return self.tokens_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens_seen + query_length, 0


def count_tokens_in(cache: Cache) -> Cache:
    """Makes `cache` know its length: puts a counting layer first where no layer keeps keys. Returns `cache`."""
    if cache.layers and not any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        first: Any = cache.layers[0]
        cache.layers[0] = TokenCountingLinearAttentionLayer(number_of_states=first.number_of_states)
    return cache


class HeadRMSNorm(nn.Module):
    """RMS norm over each head's V values, in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = widen(x)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.to(wide.dtype)).to(x.dtype)


class LinearAttention(nn.Module):
    """
    Base of the mixers. It takes over the teacher's projection modules, so their parameters keep the teacher's names,
    shapes and values; a subclass adds its decay and write gates and the recurrence, in [`mix`].

    Args:
        attention (`nn.Module`): the teacher's `self_attn` of this layer.
        config (`HybridConfig`): the hybrid's config; `text_config`, `mixer`, `mixer_options` and `kernel` are read.
        layer_idx (`int`): the layer's index, which is also its index in the cache.
    """

    options_class: ClassVar[type[LinearAttentionOptions]] = LinearAttentionOptions

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    q_norm: Any
    k_norm: Any
    head_dim: int
    num_heads: int
    num_kv_heads: int
    value_dim: int

    def __init__(self, attention: nn.Module, config: Any, layer_idx: int) -> None:
        super().__init__()
        mixer = config.layer_mixers[layer_idx]
        self.options = self.options_class.from_dict(config.options_of(mixer), mixer)
        self.kernel = config.kernel
        self.layer_idx = layer_idx
        self._adopt(attention)
        hidden_size = self.q_proj.in_features
        eps = getattr(config.text_config, "rms_norm_eps", None) or 1e-6
        self.o_norm = HeadRMSNorm(self.value_dim, eps) if self.options.output_norm else None
        self.g_proj = (
            nn.Linear(hidden_size, self.num_heads * self.value_dim, bias=False) if self.options.output_gate else None
        )
        self.conv = None
        if self.options.short_convolution:
            channels = self.q_proj.out_features + self.k_proj.out_features + self.v_proj.out_features
            self.conv = ShortConvolution(channels, self.options.short_convolution)

    def _adopt(self, attention: Any) -> None:
        """Takes the teacher's modules over by name and reads the heads' layout off their shapes."""
        children = dict(attention.named_children())
        kind = type(attention).__name__
        missing = [name for name in _PROJECTIONS if name not in children]
        unknown = [
            name
            for name, child in children.items()
            if name not in ADOPTED and next(child.parameters(), None) is not None
        ]
        if missing or unknown:
            raise ValueError(
                f"{kind} of layer {self.layer_idx} cannot become linear attention: it has children {list(children)}, "
                f"the mixers know {list(ADOPTED)}. Keep its layers in full_attention_layers."
            )
        for name in ADOPTED:
            if name in children:
                setattr(self, name, children[name])
        if not hasattr(self, "q_norm"):
            self.q_norm = self.k_norm = None
        self.head_dim = int(attention.head_dim)
        self.num_heads = self.q_proj.out_features // self.head_dim
        self.num_kv_heads = self.k_proj.out_features // self.head_dim
        self.value_dim = self.v_proj.out_features // self.num_kv_heads
        if self.num_heads * self.value_dim != self.o_proj.in_features or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{kind} of layer {self.layer_idx} has head_dim={self.head_dim}, q_proj {self.q_proj.out_features}, "
                f"k_proj {self.k_proj.out_features}, v_proj {self.v_proj.out_features} outputs and o_proj "
                f"{self.o_proj.in_features} inputs, which is no grouping of heads. Keep it in full_attention_layers."
            )
        # Families rotate differently (halves, interleaved, partial), each with its own function beside its attention.
        self.rotate: Any = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)

    def init_weights(self) -> None:
        """Initialises what the teacher does not have; called after the library's own initialisation."""
        if self.o_norm is not None:
            init.ones_(self.o_norm.weight)
        if self.conv is not None:
            self.conv.init_weights()

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

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        padding_mask: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """
        Args:
            hidden_states: `[B, T, hidden]`.
            position_embeddings: the backbone's `(cos, sin)`.
            past_key_values: the library's cache; holds the state `[B, H, D, V]` in fp32.
            padding_mask: `[B, T]`, 1 for tokens and 0 for padding; None when nothing is padding.
            seq_idx: `[B, T]`, the document each token of a packed row belongs to; None when rows are not packed.

        Returns:
            The layer's attention output `[B, T, hidden]`, and None in the place of attention weights.
        """
        batch, length = hidden_states.shape[:2]
        if padding_mask is not None:
            padding_mask = padding_mask.to(hidden_states.dtype)
        query, key, value = self.project(hidden_states, position_embeddings, past_key_values, padding_mask, seq_idx)
        if self.options.silu_qk:
            query, key = nn.functional.silu(query), nn.functional.silu(key)
        state = None
        if past_key_values is not None:
            cached: Any = past_key_values.layers[self.layer_idx]
            state = cached.recurrent_states[0] if cached.has_previous_state[0] else None
        output, state = self.mix(query, key, value, hidden_states, padding_mask, state, seq_idx)
        if past_key_values is not None:
            self._store(past_key_values, state, length)
        if self.o_norm is not None:
            output = self.o_norm(output)
        output = output.reshape(batch, length, -1)
        if self.g_proj is not None and self.options.output_gate is not None:
            output = output * _GATES[self.options.output_gate](self.g_proj(hidden_states))
        return self.o_proj(output), None

    def project(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        padding_mask: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        The teacher's q, k `[B, T, H, D]` and v `[B, T, H, V]`: projected, normed, rotated, expanded to all heads.
        Softmax attention over them, followed by `o_proj`, is the teacher's attention.
        """
        projected = [self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)]
        if self.conv is not None:
            widths = [x.shape[-1] for x in projected]
            mixed = torch.cat(projected, dim=-1)
            if padding_mask is not None:  # after the projection: with a bias, padding projects to the bias, not to 0
                mixed = mixed * padding_mask[..., None]
            mixed = self.conv(mixed, past_key_values, self.layer_idx, seq_idx)
            projected = list(mixed.split(widths, dim=-1))
        query, key, value = projected
        shape = hidden_states.shape[:2]
        query = self._heads(query, self.q_norm, (*shape, self.num_heads, self.head_dim))
        key = self._heads(key, self.k_norm, (*shape, self.num_kv_heads, self.head_dim))
        value = value.view(*shape, self.num_kv_heads, self.value_dim)
        if self.options.rope and position_embeddings is not None and self.rotate is not None:
            query, key = self._rotate(query, key, position_embeddings)
        groups = self.num_heads // self.num_kv_heads
        if groups > 1:  # by head, as activations: repeating the projection's rows would scramble the heads
            key, value = key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2)
        return query, key, value

    @staticmethod
    def _heads(x: torch.Tensor, norm: Any, shape: tuple[int, ...]) -> torch.Tensor:
        """Splits heads, with the teacher's q/k norm over one head (Qwen3) or over all heads at once (OLMo 2)."""
        if norm is None:
            return x.view(shape)
        return norm(x.view(shape)) if norm.weight.shape[-1] == shape[-1] else norm(x).view(shape)

    def _rotate(
        self, query: torch.Tensor, key: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = position_embeddings
        width = cos.shape[-1]  # narrower than the head where the teacher rotates only part of it
        rotated = self.rotate(query[..., :width].transpose(1, 2), key[..., :width].transpose(1, 2), cos, sin)
        query_rotated, key_rotated = (x.transpose(1, 2) for x in rotated)
        if width == self.head_dim:
            return query_rotated, key_rotated
        return (
            torch.cat([query_rotated, query[..., width:]], dim=-1),
            torch.cat([key_rotated, key[..., width:]], dim=-1),
        )

    def _store(self, cache: Cache, state: torch.Tensor, num_tokens: int) -> None:
        cache.update_recurrent_state(state, self.layer_idx)
        layer: Any = cache.layers[self.layer_idx]
        # Only a convolution's update marks the library's layer as filled; without one we must.
        layer.has_previous_state[0] = True
        self._count_tokens(cache, num_tokens)

    def _count_tokens(self, cache: Cache, num_tokens: int) -> None:
        layer = cache.layers[self.layer_idx]
        if isinstance(layer, TokenCountingLinearAttentionLayer):
            layer.count(num_tokens)


def check_cache(cache: Cache, linear_layers: list[int]) -> None:
    """Raises a `ValueError` where `cache` has no place for a recurrent state in one of `linear_layers`."""
    for i in linear_layers:
        if i >= len(cache.layers) or not isinstance(cache.layers[i], LinearAttentionCacheLayerMixin):
            found = type(cache.layers[i]).__name__ if i < len(cache.layers) else "nothing"
            raise ValueError(
                f"past_key_values has {found} for layer {i}, which is a linear-attention layer; make the cache from "
                "the model's config: DynamicCache(config=model.config)."
            )
