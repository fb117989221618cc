"""Gated linear attention (arXiv 2312.06635, eq. 3) in plain torch operations.

Per head, with the key k_t and the query q_t in R^K, the value v_t in R^V and a state S in R^{K x V}::

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t

Two forms share one contract: `recurrent_gla` goes token by token (the reference, and the one for decoding),
`chunk_gla` works on chunks with matrix products (training and prefill).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .ops_channel_decay import decayed_products, forget_at_restarts, run_chunks
from .ops_common import check_inputs, compute_dtype, first_state, fit_chunk_size, no_autocast, one_token


def recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """
    Gated linear attention token by token: exact, differentiable, and quick for one token.

    Args:
        q, k: `[B, T, H, K]`, expanded to all heads.
        v: `[B, T, H, V]`.
        g: `[B, T, H, K]`, log decay of each key channel in nats per token, at most 0; -inf forgets.
        scale: factor of the output; `K ** -0.5` if None.
        initial_state: `[B, H, K, V]`, the state before the first token; zeros if None. It is not modified.
        seq_idx: integers `[B, T]`, the document of each token of a packed row. The state restarts from zeros wherever
            the value changes; `initial_state` belongs to the first document, the returned state to the last.

    Returns:
        The output `[B, T, H, V]` in v's dtype, and the state after the last token `[B, H, K, V]` in float32. The
        computation is in float32 too; float64 inputs compute and return the state in float64.
    """
    check_inputs(q, k, v, g, None, initial_state, seq_idx, decay_per_channel=True)
    dtype, out_dtype = compute_dtype(q, k, v), v.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with no_autocast(q.device):
        state = first_state(q, v, initial_state, dtype)
        decay = forget_at_restarts(g.to(dtype), seq_idx).exp()
        tokens = [x.to(dtype).unbind(1) for x in (q * scale, k, v, decay)]
        if q.shape[1] == 1 and torch.compiler.is_compiling():
            query, key, value, kept = (x[0] for x in tokens)
            o, state = one_token(query, key, value, kept, state)
            return o.unsqueeze(1).to(out_dtype), state
        outputs = []
        for query, key, value, kept in zip(*tokens, strict=True):
            state = torch.addcmul(state * kept.unsqueeze(-1), key.unsqueeze(-1), value.unsqueeze(-2))
            outputs.append((query.unsqueeze(-2) @ state).squeeze(-2))
        return torch.stack(outputs, dim=1).to(out_dtype), state


# Its backward runs autograd inside; tracing it would unroll it over the chunks.
@torch.compiler.disable
def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """
    Gated linear attention in chunks (arXiv 2312.06635, section 4), with memory linear in T.

    Takes and returns what `recurrent_gla` does, to rounding, for any decay. A second backward through it raises.

    Args:
        q, k, v, g, scale, initial_state, seq_idx: see `recurrent_gla`.
        chunk_size: tokens per chunk, a power of two from 16 on; by default 32 on CPUs and 64 elsewhere.

    Returns:
        The output `[B, T, H, V]` in v's dtype, and the final state `[B, H, K, V]` in float32 (float64 for float64
        inputs).
    """
    check_inputs(q, k, v, g, None, initial_state, seq_idx, decay_per_channel=True)
    dtype = compute_dtype(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    state = first_state(q, v, initial_state, dtype)
    log2_decay = forget_at_restarts(g.to(dtype) * math.log2(math.e), seq_idx)
    inputs = [q.to(dtype) * scale, k, v, log2_decay]
    o, state = run_chunks(_segment, inputs, state, fit_chunk_size(chunk_size, q), dtype)
    return o.to(v.dtype), state


def _segment(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Some chunks: scaled q, k, log2 decay `[S, N, C, K]`, v `[S, N, C, V]`, and the state `[N, K, V]` before them."""
    scores, before, after = decayed_products(q, k, g)
    writes = (k * after.exp2()).mT @ v
    through = before[..., -1, :].exp2().unsqueeze(-1)
    states = []
    for kept, write in zip(through.unbind(), writes.unbind(), strict=True):
        states.append(state)
        state = torch.addcmul(write, state, kept)
    return (q * before.exp2()) @ torch.stack(states) + scores @ v, state
