"""What a row says of its tokens: which are padding, and which document each belongs to.

Shapes: B batch, T tokens of this call, N documents packed into one row.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import create_recurrent_attention_mask, find_packed_sequence_indices
from transformers.utils import is_tracing


def padding_mask_of(config: Any, inputs: torch.Tensor, mask: Any, cache: Cache | None) -> torch.Tensor | None:
    """
    Returns the padding mask `[B, T]` of this call's tokens, None where nothing is padding.

    Args:
        config: the nested config.
        inputs: ids `[B, T]` or embeddings `[B, T, hidden]`.
        mask: `attention_mask` as it came: `[B, past + T]`, None, or what linear attention has no use for.
        cache: as it came.
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        found = f"a tensor of shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask is {found}, but linear attention can leave out padding and nothing else; pass a mask "
            "[batch, tokens] of ones and zeros, or none."
        )
    if inputs.shape[1] == 1:
        # The library takes a single token for a generated one; here it may be the last chunk of a padded prompt.
        return mask[:, -1:]
    return create_recurrent_attention_mask(config, inputs, mask, cache)


def packed_documents(
    position_ids: torch.Tensor | None, padding_mask: torch.Tensor | None = None, *, cached: bool = False
) -> torch.Tensor | None:
    """
    Returns the document index `[B, T]` of each token where `position_ids` restart inside a row, else None. Padding is
    of the document before it.

    Args:
        position_ids: `[B, T]` or `[1, T]`; positions of another shape say nothing about documents. Those of padding
            are arbitrary.
        padding_mask: `[B, T]` or None.
        cached: whether the row is put into a cache, which has no place for the states of several documents.
    """
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] <= 1:
        return None
    if padding_mask is None and not cached:
        return find_packed_sequence_indices(position_ids)
    if is_tracing(position_ids) and not torch.compiler.is_dynamo_compiling():
        return None
    if padding_mask is None:
        padding_mask = torch.ones_like(position_ids)
    follows, _, gap, step = _from_token_to_token(position_ids, padding_mask)
    # Over padding inside a document positions go on either by one or by the slots.
    restarts = follows & (step < 0 if cached else (step != 1) & (step != gap))
    if not restarts.any():
        return None
    if cached:
        raise ValueError(
            "position_ids restart inside a row (packed documents) that is put into a cache, which holds one state for "
            "each row. Pass no cache with packed rows."
        )
    if (follows & ~restarts & (gap > 1)).any():
        raise ValueError(
            "position_ids restart inside a row (packed documents), and attention_mask has padding between the tokens "
            "of one document, which the teacher's softmax layers cannot pass over in a packed row. Put the padding "
            "before or after each document."
        )
    return restarts.cumsum(-1)


def positions_that_part(position_ids: torch.Tensor, padding_mask: torch.Tensor) -> torch.Tensor:
    """
    Returns `position_ids` `[B, T]` of packed rows by which softmax layers keep padding out with no mask at all: each
    token that is padding becomes a document of its own.

    Softmax layers know documents by their positions alone, and only where there is no mask.
    """
    position_ids, is_token = torch.broadcast_tensors(position_ids, padding_mask.bool())
    tokens = position_ids.shape[1]
    slots = torch.arange(tokens, device=position_ids.device)
    following = torch.where(is_token, slots, tokens).flip(-1).cummin(dim=-1).values.flip(-1)
    # Equal positions are of different documents; before the document that follows there is none to attach to.
    start = position_ids.gather(1, following.clamp(max=tokens - 1)).masked_fill(following == tokens, 0)
    return torch.where(is_token, position_ids, start)


def without_mask(inputs: dict[str, Any]) -> dict[str, Any]:
    """
    Returns a batch by which any causal model of the library keeps packed documents apart: without `attention_mask`
    where rows are packed or nothing is padding, and as it came otherwise.

    Args:
        inputs: `input_ids` `[B, T]`, and `attention_mask` and `position_ids` of that shape or none.
    """
    mask, position_ids = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is None or bool(mask.all()):
        return {**inputs, "attention_mask": None}
    if position_ids is None or packed_documents(position_ids, mask) is None:
        return inputs
    return {**inputs, "attention_mask": None, "position_ids": positions_that_part(position_ids, mask)}


def document_positions(
    inputs: torch.Tensor,
    position_ids: torch.Tensor | None,
    cu_seq_lens: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    padding_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Returns `position_ids` that restart with every document that `cu_seq_lens` or `seq_idx` names: those that were
    given, or new ones. Softmax layers know documents by their positions alone, unless they run flash attention.

    Args:
        inputs: ids `[B, T]` or embeddings `[B, T, hidden]`.
        position_ids: as they came.
        cu_seq_lens: `cu_seq_lens_q` `[N + 1]`, where documents begin and end in the only row.
        seq_idx: `[B, T]`, the document of each token.
        padding_mask: `[B, T]` or None; padding takes up no position.
    """
    batch, tokens = inputs.shape[:2]
    slots = torch.arange(tokens, device=inputs.device)
    if seq_idx is None:
        if batch != 1:
            raise ValueError(
                f"cu_seq_lens_q came with a batch of {batch} rows; documents that it separates are in one row."
            )
        ends = torch.as_tensor(cu_seq_lens, device=inputs.device)[1:]
        seq_idx = torch.searchsorted(ends, slots, right=True)[None]
    begins = torch.nn.functional.pad(seq_idx.diff(dim=-1) != 0, (1, 0), value=True)
    if position_ids is None:
        if padding_mask is None:
            return slots - torch.where(begins, slots, 0).cummax(dim=-1).values
        begins, is_token = torch.broadcast_tensors(begins, padding_mask.bool())
        earlier = is_token.cumsum(-1) - is_token.long()
        return earlier - torch.where(begins, earlier, 0).cummax(dim=-1).values
    if not is_tracing(position_ids):
        mask = torch.ones_like(position_ids) if padding_mask is None else padding_mask
        follows, before, gap, step = _from_token_to_token(position_ids, mask)
        documents = begins.cumsum(-1).expand_as(before)
        crosses = follows & (documents != documents.gather(1, before.clamp(min=0)))
        if (crosses & ((step == 1) | (step == gap))).any():
            raise ValueError(
                "position_ids go on across documents that cu_seq_lens_q or seq_idx separate; let them restart with "
                "every document, or pass none."
            )
    return position_ids


def _from_token_to_token(
    position_ids: torch.Tensor, padding_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    For each slot of a row, all `[B, T]`: whether it is a token that follows another, that one's slot (-1 if none),
    and the steps in slots and in positions from it to here. Padding in between is passed over.
    """
    position_ids, is_token = torch.broadcast_tensors(position_ids, padding_mask.bool())
    slots = torch.arange(position_ids.shape[1], device=position_ids.device)
    last = torch.where(is_token, slots, -1).cummax(dim=-1).values
    before = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)
    step = position_ids - position_ids.gather(1, before.clamp(min=0))
    return is_token & (before >= 0), before, slots - before, step
