"""
Softmax attention of packed rows, each document by itself.

The library masks documents out of the whole square of a row: on a GPU that is another, slower kernel, and all of the
square is computed. Flash attention takes the documents' offsets in the place of a mask. The library has that for a
package of its own, flash-attn; here torch's own kernel does it, on CUDA in 16 bits, and a call for each document
elsewhere.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from hf_hybrid.modeling.kernels import documents_of


NAME = "hf_hybrid_documents"
_HALF = (torch.float16, torch.bfloat16)


def document_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    What the library's attention modules call: q `[1, H, T, D]` and k, v `[1, G, T, D]` of one row to `[1, T, H, D]`.
    `cu_seq_lens_q` `[N + 1]` says where its documents begin and end, of which none is longer than `max_length_q`.
    """
    window = kwargs.get("sliding_window")
    left_out = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    left_out += ["sliding_window"] if window is not None and (max_length_q is None or window < max_length_q) else []
    if cu_seq_lens_q is None or max_length_q is None or attention_mask is not None or dropout or left_out:
        what = ", ".join(left_out) or "a mask, or no offsets of documents"
        raise ValueError(
            f"{type(module).__name__} attends with {what}, which attention by documents does not know; switch "
            "document_attention off."
        )
    groups = query.shape[1] // key.shape[1]
    # Under autocast rotary embeddings give q and k in fp32.
    query, key, value = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.is_cuda and value.dtype in _HALF:
        # torch.nn.attention.varlen's arguments differ from release to release, those of what it calls do not.
        lengths = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        output = torch.ops.aten._flash_attention_forward(query, key, value, *lengths, 0.0, True, False, scale=scale)[0]
        return output[None], None
    parts = []
    for first, last in cu_seq_lens_q.unfold(0, 2, 1).tolist():
        q, k, v = (x[first:last].transpose(0, 1)[None] for x in (query, key, value))
        parts.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale))
    return torch.cat(parts, dim=2).transpose(1, 2), None


AttentionInterface.register(NAME, document_attention)
AttentionMaskInterface.register(NAME, flash_attention_mask)  # none, where nothing is padding


@contextlib.contextmanager
def by_documents(*models: Any) -> Iterator[None]:
    """Inside, the softmax layers of `models` attend by documents, in calls with the arguments of [`as_one_row`]."""
    before = [model.config._attn_implementation for model in models]
    for model in models:
        model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        for model, implementation in zip(models, before, strict=True):
            model.set_attn_implementation(implementation)


def attends_by_documents(model: Any) -> bool:
    return bool(model.config._attn_implementation == NAME)


def as_one_row(inputs: dict[str, Any]) -> dict[str, Any]:
    """
    The rows of a batch one after the other, with the offsets of their documents; a row without `position_ids` is one
    document.

    Args:
        inputs: `input_ids` `[B, T]`, and `position_ids` of that shape or none; no `attention_mask`.
    """
    ids, positions = inputs["input_ids"], inputs.get("position_ids")
    if inputs.get("attention_mask") is not None:
        raise ValueError(
            "attention by documents takes rows without padding, and attention_mask has some; switch "
            "document_attention off."
        )
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    positions = positions.expand_as(ids)
    begins = torch.nn.functional.pad(positions.diff(dim=-1) != 1, (1, 0), value=True)
    row = {"input_ids": ids.reshape(1, -1), "position_ids": positions.reshape(1, -1)}
    offsets = documents_of(begins.flatten().cumsum(0)[None]).offsets
    longest = int(offsets.diff().max())
    offsets = offsets.to(torch.int32)
    return row | {
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": longest,
        "max_length_k": longest,
    }
