"""The gated delta rule with one decay per key channel (Kimi Delta Attention, arXiv 2510.26692, eq. 1), in plain torch.

Per head, with the key k_t and the query q_t in R^K, the value v_t in R^V and a state S in R^{K x V}::

    S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T        o_t = scale * S_t^T q_t

Two forms share one contract: `recurrent_kda` goes token by token (the reference, and the one for decoding),
`chunk_kda` works on chunks with matrix products (training and prefill).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ops_channel_decay import decayed_products, forget_at_restarts, run_chunks
from .ops_common import (
    check_inputs,
    compute_dtype,
    first_state,
    fit_chunk_size,
    invert_unit_lower,
    no_autocast,
    one_token,
)


def recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """
    The delta rule with a decay per channel, token by token: exact, differentiable, and quick for one token.

    Args:
        q, k: `[B, T, H, K]`, expanded to all heads and of unit length over K (which the caller sees to).
        v: `[B, T, H, V]`.
        g: `[B, T, H, K]`, log decay of each key channel in nats per token, at most 0; -inf forgets.
        beta: `[B, T, H]`, write strength in (0, 2).
        scale: factor of the output; `K ** -0.5` if None.
        initial_state: `[B, H, K, V]`, the state before the first token; zeros if None. It is not modified.
        seq_idx: integers `[B, T]`, the document of each token of a packed row. The state restarts from zeros wherever
            the value changes; `initial_state` belongs to the first document, the returned state to the last.

    Returns:
        The output `[B, T, H, V]` in v's dtype, and the state after the last token `[B, H, K, V]` in float32. The
        computation is in float32 too; float64 inputs compute and return the state in float64.
    """
    check_inputs(q, k, v, g, beta, initial_state, seq_idx, decay_per_channel=True)
    dtype, out_dtype = compute_dtype(q, k, v), v.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with no_autocast(q.device):
        state = first_state(q, v, initial_state, dtype)
        decay = forget_at_restarts(g.to(dtype), seq_idx).exp()
        tokens = [x.to(dtype).unbind(1) for x in (q * scale, k, v, decay, beta.unsqueeze(-1))]
        if q.shape[1] == 1 and torch.compiler.is_compiling():
            query, key, value, kept, strength = (x[0] for x in tokens)
            o, state = one_token(query, key, value, kept, state, strength)
            return o.unsqueeze(1).to(out_dtype), state
        outputs = []
        for query, key, value, kept, strength in zip(*tokens, strict=True):
            state = state * kept.unsqueeze(-1)
            update = (value - (key.unsqueeze(-2) @ state).squeeze(-2)) * strength
            state = torch.addcmul(state, key.unsqueeze(-1), update.unsqueeze(-2))
            outputs.append((query.unsqueeze(-2) @ state).squeeze(-2))
        return torch.stack(outputs, dim=1).to(out_dtype), state


# Its backward runs autograd inside; tracing it would unroll it over the chunks.
@torch.compiler.disable
def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """
    The delta rule with a decay per channel, in chunks (arXiv 2510.26692, section 3.1), with memory linear in T.

    Takes and returns what `recurrent_kda` does, to rounding, for any decay. A second backward through it raises.

    Args:
        q, k, v, g, beta, scale, initial_state, seq_idx: see `recurrent_kda`.
        chunk_size: tokens per chunk, a power of two from 16 on; by default 32 on CPUs and 64 elsewhere.

    Returns:
        The output `[B, T, H, V]` in v's dtype, and the final state `[B, H, K, V]` in float32 (float64 for float64
        inputs).
    """
    check_inputs(q, k, v, g, beta, initial_state, seq_idx, decay_per_channel=True)
    dtype = compute_dtype(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    state = first_state(q, v, initial_state, dtype)
    log2_decay = forget_at_restarts(g.to(dtype) * math.log2(math.e), seq_idx)
    inputs = [q.to(dtype) * scale, k, v, log2_decay, beta.unsqueeze(-1)]
    o, state = run_chunks(_segment, inputs, state, fit_chunk_size(chunk_size, q), dtype)
    return o.to(v.dtype), state


def _segment(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """
    Some chunks: scaled q, k, log2 decay `[S, N, C, K]`, v `[S, N, C, V]`, beta `[S, N, C, 1]`, and the state
    `[N, K, V]` before them.

    What a chunk writes solves a triangular system, `(I + diag(beta) B) U = diag(beta) (V - (e K) S)`, with B the
    decayed products of keys, e the decay since the chunk's start, and S the state that enters.
    """
    (scores, key_products), before, after = decayed_products(torch.stack([q, k]), k, g)
    from_start = before.exp2()
    inverse = _UnitLowerInverse.apply(key_products * beta) * beta.mT
    writes, reads = inverse @ v, inverse @ (k * from_start)
    through, to_end = from_start[..., -1, :].unsqueeze(-1), (k * after.exp2()).mT
    states, updates = [], []
    for write, read, kept, key in zip(*(x.unbind() for x in (writes, reads, through, to_end)), strict=True):
        update = torch.baddbmm(write, read, state, alpha=-1.0)
        states.append(state)
        updates.append(update)
        state = torch.baddbmm(state * kept, key, update)
    return (q * from_start) @ torch.stack(states) + scores @ torch.stack(updates), state


class _UnitLowerInverse(torch.autograd.Function):
    """`(I + strictly lower part of x)^-1` of `[..., C, C]`."""

    @staticmethod
    def forward(ctx: Any, lower: Tensor) -> Tensor:
        inverse = invert_unit_lower(lower.flatten(0, -3)).view_as(lower)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_inverse: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return (inverse.mT @ d_inverse @ inverse.mT).neg_().tril_(-1)
