"""Softmax attention over the last tokens only: what a linear mixer has to beat.

Shapes: B batch, T tokens, H query heads, G key/value heads, D key and V value width of a head, W tokens of the window.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .adopted_attention import AttentionCall
from .mixer import Mixer, MixerOptions


@dataclass
class SlidingWindowOptions(MixerOptions):
    """
    Options of [`SlidingWindowAttention`].

    Args:
        window (`int`): tokens that a token attends to, itself included.
    """

    window: int = 512

    def __post_init__(self) -> None:
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"mixer_options['window']={self.window!r} is not a number of tokens; pass 1 or more.")


class SlidingWindowAttention(Mixer):
    r"""
    The teacher's softmax attention, cut to a window of W tokens (Longformer, arXiv 2004.05150, section 3.1; causal):

        o_t = sum_j softmax_j(q_t . k_j * scale) v_j        over t - W < j <= t

    with the teacher's scale; the layer returns `o_proj(o_t)`. With W no less than the context it is the teacher's
    layer. As in the library's sliding-window layers, W counts positions of the row, so padding between tokens counts;
    a window that the teacher's layer has itself does not narrow W, and attention dropout is not applied.

    Keeps of the teacher: everything. Adds no parameters. State: the rotated keys and the values of the last W tokens,
    in the model's dtype, `W (G (D + V) + 1)` numbers of 4 or 2 bytes per sequence, the last of which says what is
    padding.
    """

    options_class = SlidingWindowOptions
    options: SlidingWindowOptions

    def __init__(self, attention: nn.Module, config: Any, layer_idx: int) -> None:
        super().__init__(attention, config, layer_idx)
        cap = getattr(attention, "attn_logit_softcapping", None)
        own = [name for name, _ in attention.named_parameters(recurse=False)]
        if cap is not None or own:
            what = f"caps its logits at {cap}" if cap is not None else f"has parameters {own} of its own"
            raise ValueError(
                f"{type(attention).__name__} of layer {layer_idx} {what}, which mixer='sliding_window' cannot do; "
                "keep the layer in full_attention_layers or choose another mixer."
            )
        self.scale = float(getattr(attention, "scaling", None) or self.head_dim**-0.5)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        """See [`AdoptedAttention.attend`]; the cache holds the window `[B, G (D + V) + 1, W]`."""
        valid = torch.ones_like(call.hidden_states[..., :1])
        if call.padding_mask is not None:
            valid = call.padding_mask.to(valid.dtype)[..., None]
        slots = torch.cat([key.flatten(2), value.flatten(2), valid], dim=-1)
        if call.cache is not None:
            slots = self._remember(call.cache, slots)
        plain = call.padding_mask is None and slots.shape[1] == call.hidden_states.shape[1]
        seq_idx = call.seq_idx
        if seq_idx is not None:
            seq_idx = F.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).long().cumsum(1), (1, 0))
        return self._attend(query, slots, seq_idx, plain=plain)

    def _remember(self, cache: Cache, slots: Tensor) -> Tensor:
        """Puts `slots` into the cache; returns them behind the window before them, where there is one."""
        window = self.options.window
        layer: Any = cache.layers[self.layer_idx]
        self.count_tokens(cache, slots.shape[1])
        if layer.has_previous_state[0]:
            return cache.update_conv_state(slots.mT, self.layer_idx).mT
        # The library's layer sizes its buffer by what it is given first; zeros in front are not valid.
        cache.update_conv_state(F.pad(slots.mT, (window, 0))[..., -window:], self.layer_idx)
        return slots

    def _attend(self, query: Tensor, slots: Tensor, seq_idx: Tensor | None, *, plain: bool) -> Tensor:
        """
        Attention in blocks of W queries, each of which sees at most 2 W slots, so that the cost is linear in T.

        Args:
            query: `[B, T, H, D]`.
            slots: keys, values and validity `[B, P + T, G (D + V) + 1]`, P being 0 or W tokens of the past.
            seq_idx: running document index `[B, T]`; such rows have no past.
            plain: no padding and no past: only the order of tokens decides who sees what.

        Returns:
            `[B, T, H, V]`.
        """
        batch, tokens = query.shape[:2]
        window, past = self.options.window, slots.shape[1] - tokens
        if tokens > window and not past:
            slots, past = F.pad(slots, (0, 0, window, 0)), window
            plain = False
        block = min(tokens, window)
        missing = -tokens % block
        query = F.pad(query, (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, block)).flatten(0, 1).transpose(1, 2)
        seen = F.pad(slots, (0, 0, 0, missing)).unfold(1, past + block, block).flatten(0, 1)  # [B blocks, ..., P + b]
        key_width, value_width = self.num_kv_heads * self.head_dim, self.num_kv_heads * self.value_dim
        key, value, valid = seen.split([key_width, value_width, 1], dim=1)
        key = key.unflatten(1, (self.num_kv_heads, self.head_dim)).mT
        value = value.unflatten(1, (self.num_kv_heads, self.value_dim)).mT
        mask = None
        if not plain or seq_idx is not None:
            distance = past + torch.arange(block, device=query.device)[:, None]
            distance = distance - torch.arange(past + block, device=query.device)
            mask = (distance >= 0) & (distance < window) & (valid > 0)
            if seq_idx is not None:
                documents = F.pad(seq_idx, (past, missing), value=-1).unfold(1, past + block, block).flatten(0, 1)
                mask = mask & (documents[:, -block:, None] == documents[:, None, :])
            mask = (mask | (distance == 0))[:, None]  # whoever sees nothing, being padding, sees itself: no NaN
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
        )
        return output.transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2)[:, :tokens]
