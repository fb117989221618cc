"""Softmax attention over the last tokens only: what a linear mixer has to beat.

Shapes: B batch, T tokens, H query heads, G key/value heads, D key and V value width of a head, W tokens of the window,
S sinks.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .adopted_attention import AttentionCall
from .kernels import documents_of
from .linear_attention import widen
from .mixer import Mixer, MixerOptions
from .ops_common import running_documents


@dataclass
class SlidingWindowOptions(MixerOptions):
    """
    Options of [`SlidingWindowAttention`].

    Args:
        window (`int`): tokens that a token attends to, itself included.
        sinks (`int`): how many of the first tokens of its document a token attends to beside these, with the positions
            that they have in the row (StreamingLLM, arXiv 2309.17453, keeps four).
    """

    window: int = 512
    sinks: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"mixer_options['window']={self.window!r} is not a number of tokens; pass 1 or more.")
        if isinstance(self.sinks, bool) or not isinstance(self.sinks, int) or self.sinks < 0:
            raise ValueError(f"mixer_options['sinks']={self.sinks!r} is not a number of tokens; pass 0 or more.")


class SlidingWindowAttention(Mixer):
    r"""
    The teacher's softmax attention, cut to a window of W tokens (Longformer, arXiv 2004.05150, section 3.1; causal):

        o_t = sum_j softmax_j(q_t . k_j * scale) v_j        over t - W < j <= t, and the first S tokens j <= t

    with the teacher's scale; the layer returns `o_proj(o_t)`. With W no less than the context it is the teacher's
    layer. As in the library's sliding-window layers, W counts positions of the row, so padding between tokens counts;
    a window that the teacher's layer has itself does not narrow W, and attention dropout is not applied.

    Keeps of the teacher: everything. Adds no parameters. State: the rotated keys and the values of the last W tokens,
    in the model's dtype, `W (G (D + V) + 1)` numbers of 4 or 2 bytes per sequence, the last of which says what is
    padding; and `S (G (D + V) + 2)` in fp32 for the sinks, the last two of which say what is there, and where.
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
        seq_idx = call.seq_idx
        if seq_idx is not None:
            seq_idx = running_documents(seq_idx)
        sinks = None
        if self.options.sinks:
            documents = 1 if call.seq_idx is None else documents_of(call.seq_idx).most
            sinks = self._sinks(slots, seq_idx, call.cache, documents)
        if call.cache is not None:
            slots = self._remember(call.cache, slots)
        plain = call.padding_mask is None and slots.shape[1] == call.hidden_states.shape[1]
        return self._attend(query, slots, seq_idx, sinks, plain=plain)

    def _sinks(self, slots: Tensor, seq_idx: Tensor | None, cache: Cache | None, documents: int) -> Tensor:
        """
        The first S tokens of every document, `[B, M, G (D + V) + 3]`: slots, their place in the row, counted from the
        first token of this call, and the running index of their document. M is S for each of the `documents` that a
        row has at most.
        """
        batch, tokens = slots.shape[:2]
        place = torch.arange(tokens, device=slots.device).expand(batch, -1)
        valid = slots[..., -1] > 0
        rank = valid.long().cumsum(1)
        if seq_idx is not None:
            begins = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0), value=True)
            rank = rank - torch.where(begins, rank - valid.long(), 0).cummax(1).values
        first = valid & (rank <= self.options.sinks)
        document = torch.zeros_like(place) if seq_idx is None else seq_idx
        found = torch.cat([widen(slots), place[..., None], document[..., None]], dim=-1)
        count = self.options.sinks if seq_idx is None else min(self.options.sinks * documents, tokens)
        layer: Any = None if cache is None else cache.layers[self.layer_idx]
        if layer is not None and layer.has_previous_state[0]:
            before = F.pad(layer.recurrent_states[0].mT.clone(), (0, 1))
            found, first = torch.cat([before, found], dim=1), torch.cat([before[..., -3] > 0, valid], dim=1)
        # Those that are first, in their order, and behind them others that are made invalid.
        order = torch.sort((~first).to(torch.int8), dim=1, stable=True).indices[:, :count]
        found, first = (x.gather(1, order[..., None].expand(-1, -1, x.shape[2])) for x in (found, first[..., None]))
        if found.shape[1] < count:  # a row that is shorter than this
            missing = (0, 0, 0, count - found.shape[1])
            found, first = F.pad(found, missing), F.pad(first, missing)
        found = torch.cat([found[..., :-3], first.to(found.dtype), found[..., -2:]], dim=-1)
        if cache is not None:
            kept = torch.cat([found[..., :-2], found[..., -2:-1] - tokens], dim=-1)
            cache.update_recurrent_state(kept.mT, self.layer_idx)
        return found

    def _remember(self, cache: Cache, slots: Tensor) -> Tensor:
        """Puts `slots` into the cache; returns them behind the window before them, where there is one."""
        window = self.options.window
        layer: Any = cache.layers[self.layer_idx]
        self.count_tokens(cache, slots)
        if layer.has_previous_state[0]:
            return cache.update_conv_state(slots.mT, self.layer_idx).mT
        # The library's layer sizes its buffer by what it is given first; zeros in front are not valid.
        cache.update_conv_state(F.pad(slots.mT, (window, 0))[..., -window:], self.layer_idx)
        return slots

    def _attend(
        self, query: Tensor, slots: Tensor, seq_idx: Tensor | None, sinks: Tensor | None, *, plain: bool
    ) -> Tensor:
        """
        Attention in blocks of W queries, each of which sees at most 2 W slots and the sinks: the cost is linear in T.

        Args:
            query: `[B, T, H, D]`.
            slots: keys, values and validity `[B, P + T, G (D + V) + 1]`, P being 0 or W tokens of the past.
            seq_idx: running document index `[B, T]`; such rows have no past.
            sinks: what [`_sinks`] gives; None without any.
            plain: no padding and no past: only the order of tokens decides who sees what.

        Returns:
            `[B, T, H, V]`.
        """
        batch, tokens = query.shape[:2]
        window, past = self.options.window, slots.shape[1] - tokens
        if tokens <= window and not past:
            sinks = None  # all of them are in the window
        if tokens > window and not past:
            slots, past = F.pad(slots, (0, 0, window, 0)), window
            plain = False
        block = min(tokens, window)
        missing = -tokens % block
        query = F.pad(query, (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, block)).flatten(0, 1).transpose(1, 2)
        seen = F.pad(slots, (0, 0, 0, missing)).unfold(1, past + block, block)  # [B, blocks, ..., P + b]
        if sinks is not None:
            far = sinks[..., :-2].to(slots.dtype).mT[:, None].expand(-1, seen.shape[1], -1, -1)
            seen, plain = torch.cat([seen, far], dim=-1), False
        seen = seen.flatten(0, 1)
        key_width, value_width = self.num_kv_heads * self.head_dim, self.num_kv_heads * self.value_dim
        key, value, valid = seen.split([key_width, value_width, 1], dim=1)
        key = key.unflatten(1, (self.num_kv_heads, self.head_dim)).mT
        value = value.unflatten(1, (self.num_kv_heads, self.value_dim)).mT
        mask = None
        if not plain or seq_idx is not None:
            distance = past + torch.arange(block, device=query.device)[:, None]
            distance = distance - torch.arange(past + block, device=query.device)
            near = (distance >= 0) & (distance < window)
            own = distance == 0
            if seq_idx is not None:
                documents = F.pad(seq_idx, (past, missing), value=-1).unfold(1, past + block, block).flatten(0, 1)
                near = near & (documents[:, -block:, None] == documents[:, None, :])
            if sinks is not None:  # those of its document that have left its window
                places = torch.arange(tokens + missing, device=query.device).view(-1, block, 1)
                left = sinks[:, None, None, :, -2] <= places - window
                if seq_idx is not None:
                    documents = F.pad(seq_idx, (0, missing), value=-1).unflatten(1, (-1, block))
                    left = left & (documents[..., None] == sinks[:, None, None, :, -1])
                near = torch.cat([near.expand(key.shape[0], -1, -1), left.flatten(0, 1)], dim=-1)
                own = F.pad(own, (0, left.shape[-1]))
            mask = ((near & (valid > 0)) | own)[:, None]  # whoever sees nothing, being padding, sees itself: no NaN
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
        )
        return output.transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2)[:, :tokens]
