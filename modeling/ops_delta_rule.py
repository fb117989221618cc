"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464, eq. 10) in plain torch operations.

Per head, with the key k_t and the query q_t in R^K, the value v_t in R^V and a state S in R^{K x V}::

    S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - exp(g_t) S_{t-1}^T k_t))^T        o_t = scale * S_t^T q_t

Two forms share one contract: `recurrent_gated_delta_rule` goes token by token (the reference, and the one for
decoding), `chunk_gated_delta_rule` works on chunks with matrix products (training and prefill).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops_common import (
    check_inputs,
    compute_dtype,
    first_state,
    fit_chunk_size,
    no_autocast,
    one_token,
    running_documents,
)
from .ops_delta_rule_chunk import ChunkGatedDeltaRule


def recurrent_gated_delta_rule(
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
    The gated delta rule token by token: exact, differentiable, and quick for one token.

    Args:
        q, k: `[B, T, H, K]`, expanded to all heads and of unit length over K (which the caller sees to).
        v: `[B, T, H, V]`.
        g: `[B, T, H]`, log decay in nats per token, at most 0; -inf forgets.
        beta: `[B, T, H]`, write strength in (0, 2).
        scale: factor of the output; `K ** -0.5` if None.
        initial_state: `[B, H, K, V]`, the state before the first token; zeros if None. It is not modified.
        seq_idx: integers `[B, T]`, the document of each token of a packed row. The state restarts from zeros wherever
            the value changes; `initial_state` belongs to the first document, the returned state to the last.

    Returns:
        The output `[B, T, H, V]` in v's dtype, and the state after the last token `[B, H, K, V]` in float32. The
        computation is in float32 too; float64 inputs compute and return the state in float64.
    """
    check_inputs(q, k, v, g, beta, initial_state, seq_idx)
    dtype, out_dtype, tokens = compute_dtype(q, k, v), v.dtype, q.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with no_autocast(q.device):
        q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
        decay, q = g.exp()[..., None, None], q * scale
        state = first_state(q, v, initial_state, dtype)
        if tokens == 1:
            token = q[:, 0], k[:, 0], v[:, 0]
            if torch.compiler.is_compiling():
                o, state = one_token(*token, decay[:, 0, ..., 0], state, beta[:, 0, :, None])
            else:
                o, state = _step(*token, decay[:, 0], beta[:, 0], state)
            return o.unsqueeze(1).to(out_dtype), state
        restart = None
        if seq_idx is not None:
            restart = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))[..., None, None, None]
        outputs = []
        for t in range(tokens):
            if restart is not None and t > 0:
                state = state.masked_fill(restart[:, t], 0.0)
            o, state = _step(q[:, t], k[:, t], v[:, t], decay[:, t], beta[:, t], state)
            outputs.append(o)
        return torch.stack(outputs, dim=1).to(out_dtype), state


# The hand-written backward is already as fused as plain torch gets here; tracing it would unroll it over the chunks.
@torch.compiler.disable
def chunk_gated_delta_rule(
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
    The gated delta rule in chunks (arXiv 2412.06464, section 3.3), with memory linear in T.

    Takes and returns what `recurrent_gated_delta_rule` does, to rounding. Gradients reach q, k, v, g, beta and
    initial_state; a second backward through them raises.

    Args:
        q, k, v, g, beta, scale, initial_state, seq_idx: see `recurrent_gated_delta_rule`.
        chunk_size: tokens per chunk, a power of two from 16 on. By default 32 on CPUs, the fastest there at
            K = V = 64, and 64 elsewhere, where the number of launches counts.

    Returns:
        The output `[B, T, H, V]` in v's dtype, and the final state `[B, H, K, V]` in float32 (float64 for float64
        inputs).
    """
    check_inputs(q, k, v, g, beta, initial_state, seq_idx)
    chunk_size = fit_chunk_size(chunk_size, q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.shape[0] == 0:  # no rows: nothing to cut into blocks
        return recurrent_gated_delta_rule(
            q, k, v, g=g, beta=beta, scale=scale, initial_state=initial_state, seq_idx=seq_idx
        )
    state = first_state(q, v, initial_state, compute_dtype(q, k, v))
    documents = None if seq_idx is None else _documents(seq_idx, chunk_size)
    with no_autocast(q.device):
        return ChunkGatedDeltaRule.apply(q, k, v, g, beta, state, documents, float(scale), chunk_size)


def _step(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token: q (scaled), k `[B, H, K]`, v `[B, H, V]`, decay `[B, H, 1, 1]`, beta `[B, H]`."""
    state = state * decay
    read = (k.unsqueeze(-2) @ state).squeeze(-2)
    update = (v - read) * beta.unsqueeze(-1)
    state = torch.addcmul(state, k.unsqueeze(-1), update.unsqueeze(-2))
    return (q.unsqueeze(-2) @ state).squeeze(-2), state


def _documents(seq_idx: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """The running document index of each token as [chunks, B, C], and of the state entering each chunk [chunks, B].

    Counting the changes makes an index that reappears later in the row another document, as the contract says.
    """
    running = running_documents(seq_idx)
    missing = -running.shape[1] % chunk_size
    # Padding belongs to the last document, whose state is the one returned.
    running = torch.cat([running, running[:, -1:].expand(-1, missing)], dim=1)
    running = running.unflatten(1, (-1, chunk_size)).transpose(0, 1)
    return running, torch.cat([torch.zeros_like(running[:1, :, 0]), running[:-1, :, -1]])
