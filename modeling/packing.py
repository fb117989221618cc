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
    Returns the document index `[B, T]` of each token where `position_ids` restart inside a row, else None.

    Args:
        position_ids: `[B, T]`; positions of another shape say nothing about documents.
        padding_mask: `[B, T]` or None.
        cached: whether the row is put into a cache, which has no place for the states of several documents.
    """
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] == 1:
        return None
    if padding_mask is None and not cached:
        return find_packed_sequence_indices(position_ids)
    if is_tracing(position_ids):
        return None
    steps = position_ids.diff(dim=-1)
    restarts = steps < 0 if cached else steps != 1
    if padding_mask is not None:  # positions of padding are arbitrary
        tokens = padding_mask.bool()
        restarts = restarts & tokens[:, 1:] & tokens[:, :-1]
    if not restarts.any():
        return None
    if cached:
        raise ValueError(
            "position_ids restart inside a row (packed documents) that is put into a cache, which holds one state for "
            "each row. Pass no cache with packed rows."
        )
    raise ValueError(
        "position_ids restart inside a row (packed documents) while attention_mask has padding, which the teacher's "
        "softmax layers cannot keep apart. Pack without padding and pass no attention_mask."
    )


def document_positions(
    inputs: torch.Tensor,
    position_ids: torch.Tensor | None,
    cu_seq_lens: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
) -> torch.Tensor:
    """
    Returns `position_ids` that restart with every document that `cu_seq_lens` or `seq_idx` names: those that were
    given, or new ones. Softmax layers know documents by their positions alone, unless they run flash attention.

    Args:
        inputs: ids `[B, T]` or embeddings `[B, T, hidden]`.
        position_ids: as they came.
        cu_seq_lens: `cu_seq_lens_q` `[N + 1]`, where documents begin and end in the only row.
        seq_idx: `[B, T]`, the document of each token.
    """
    batch, tokens = inputs.shape[:2]
    places = torch.arange(tokens, device=inputs.device)
    if seq_idx is None:
        if batch != 1:
            raise ValueError(
                f"cu_seq_lens_q came with a batch of {batch} rows; documents that it separates are in one row."
            )
        ends = torch.as_tensor(cu_seq_lens, device=inputs.device)[1:]
        seq_idx = torch.searchsorted(ends, places, right=True)[None]
    begins = torch.nn.functional.pad(seq_idx.diff(dim=-1) != 0, (1, 0), value=True)
    if position_ids is None:
        return places - torch.where(begins, places, 0).cummax(dim=-1).values
    if not is_tracing(position_ids) and ((position_ids.diff(dim=-1) == 1) & begins[:, 1:]).any():
        raise ValueError(
            "position_ids go on across documents that cu_seq_lens_q or seq_idx separate; let them restart with every "
            "document, or pass none."
        )
    return position_ids
