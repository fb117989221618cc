"""Chunked gated delta rule with a hand-written backward pass, in plain torch operations.

A chunk of C tokens is processed with matrix products (the WY form of arXiv 2412.06464, section 3.3). With G the
cumulative log decay inside the chunk, D[i, j] = exp(G_i - G_j) for j <= i, e_i = exp(G_i), d_j = D[last, j] and S the
state that enters the chunk::

    B = (K K^T) * D, strictly lower       P = scale * (Q K^T) * D, lower
    R = V - (e K) S                       U = (I + diag(beta) B)^-1 diag(beta) R
    O = scale * (e Q) S + P U             S' = exp(G_last) S + (d K)^T U

Several chunks form a segment, whose intermediate tensors are small enough to stay in the processor's cache. Only the
state that enters each segment is kept for the backward pass, which rebuilds everything else. Inside a segment the
layout is [chunks, rows, C, ...], a row being one head of one sequence, so that one chunk of all rows is contiguous.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ops_common import invert_unit_lower, no_autocast


# exp of it is 0 in every dtype, and sums over a chunk keep their digits; -inf would be NaN in differences.
_FORGETS_ALL = -1e3
# Bytes of one [chunks, rows, C, D] intermediate per thread: about fifteen of them are alive at a time.
_CPU_SEGMENT_BYTES = 512 * 1024
_ACCELERATOR_SEGMENT_BYTES = 64 * 1024 * 1024
_MINIMUM_CPU_ROWS = 8


@dataclass(frozen=True)
class _Block:
    """Where a segment lies in the caller's tensors: sequences, heads, tokens, and chunks."""

    batch: slice
    heads: slice
    tokens: slice
    chunks: slice
    index: int  # of the segment along the sequence


@dataclass
class _Segment:
    """Tensors of one segment that both passes need; S is the number of chunks, N the number of rows."""

    q: Tensor  # scale * q, [S, N, C, K]
    k: Tensor  # [S, N, C, K]
    v: Tensor  # [S, N, C, V]; the scan turns it into R = V - (e K) S in place
    beta: Tensor  # [S, N, C, 1]
    visible: Tensor  # the tokens before and at each one, of its document, bool [S or 1, b or 1, C, C]
    decay: Tensor  # D, [S, N, C, C]
    from_start: Tensor  # e, [S, N, C, 1]
    to_end: Tensor  # d, [S, N, C, 1]
    key_products: Tensor  # B with an arbitrary diagonal, [S, N, C, C]
    scores: Tensor  # P, [S, N, C, C]
    inverse: Tensor  # (I + diag(beta) B)^-1, [S, N, C, C]
    k_from_start: Tensor  # e K
    k_to_end: Tensor  # d K


def _blocks(q: Tensor, v: Tensor, chunk_size: int, dtype: torch.dtype) -> list[list[_Block]]:
    """Split the work: one list of consecutive segments per group of rows."""
    batch, tokens, heads, _ = q.shape
    chunks = math.ceil(tokens / chunk_size)
    cell = chunk_size * max(chunk_size, q.shape[-1], v.shape[-1]) * (torch.finfo(dtype).bits // 8)
    if q.device.type == "cpu":
        threads = torch.get_num_threads()
        rows = min(batch * heads, max(_MINIMUM_CPU_ROWS, threads))
        per_segment = _CPU_SEGMENT_BYTES * threads // (cell * rows)
    else:
        rows = batch * heads
        per_segment = _ACCELERATOR_SEGMENT_BYTES // (cell * rows)
    # Two chunks at least: the saved states are then no larger than half the keys and values of square heads.
    per_segment = min(chunks, max(2, per_segment))
    head_step = min(heads, rows)
    batch_step = max(1, rows // heads)
    return [
        [
            _Block(
                slice(b, b + batch_step),
                slice(h, h + head_step),
                slice(c * chunk_size, min(tokens, (c + per_segment) * chunk_size)),
                slice(c, min(chunks, c + per_segment)),
                c // per_segment,
            )
            for c in range(0, chunks, per_segment)
        ]
        for b in range(0, batch, batch_step)
        for h in range(0, heads, head_step)
    ]


def _load(x: Tensor, block: _Block, chunk_size: int, dtype: torch.dtype, scale: float | None = None) -> Tensor:
    """Copy a segment of [B, T, H, ...] to [S, N, C, ...], padding the last chunk with zeros."""
    x = x[block.batch, block.tokens, block.heads]
    missing = -x.shape[1] % chunk_size
    if missing:
        # Zero keys, zero beta, and no decay leave the state as it is.
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    x = x.unflatten(1, (-1, chunk_size)).movedim(0, 1).transpose(2, 3)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if scale is None:
        out.copy_(x)
    else:
        torch.mul(x, scale, out=out)
    return out.flatten(1, 2)


def _store(x: Tensor, block: _Block, target: Tensor, scale: float | None = None) -> None:
    """Write a segment [S, N, C, ...] to its place in [B, T, H, ...]; padding is dropped."""
    target = target[block.batch, block.tokens, block.heads]
    chunk_size, tokens = x.shape[2], target.shape[1]
    x = x.unflatten(1, (target.shape[0], target.shape[2])).transpose(2, 3).movedim(1, 0)
    if tokens % chunk_size:
        x = x.flatten(1, 2)[:, :tokens]
    else:
        target = target.unflatten(1, (-1, chunk_size))
    if scale is None:
        target.copy_(x)
    else:
        torch.mul(x, scale, out=target)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product over all chunks and rows of a segment."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


def _add_product(total: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """total += alpha * a @ b, in place, over all chunks and rows of a segment."""
    total.view(-1, *total.shape[2:]).baddbmm_(a.flatten(0, 1), b.flatten(0, 1), alpha=alpha)
    return total


def _masks(
    documents: tuple[Tensor, ...], block: _Block, chunk_size: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """What each token sees of its chunk [S, b, C, C], and whether it sees the state that enters [S, b, C].

    Without documents every chunk is alike: [1, 1, C, C] and None.
    """
    causal = torch.ones(1, 1, chunk_size, chunk_size, dtype=torch.bool, device=device).tril_()
    if not documents:
        return causal, None
    current, entering = (x[block.chunks, block.batch] for x in documents)
    same = current.unsqueeze(-1) == current.unsqueeze(-2)
    return same.logical_and_(causal), current == entering.unsqueeze(-1)


def _decays(g: Tensor, visible: Tensor, carried: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """D [S, N, C, C] and e [S, N, C, 1], from log decays [S, N, C]; see the module's docstring.

    The cumulative sums are in float64: their differences would otherwise lose digits in proportion to their size.
    They start anew with each document, so that not even rounding depends on another one.
    """
    # exp2 rather than exp: torch's exp is up to ten times slower on the CPU for very negative numbers.
    g = (g * math.log2(math.e)).unflatten(1, (visible.shape[1], -1))
    exponent = torch.matmul(g, visible.to(g.dtype).mT)
    decay = torch.empty(*g.shape, g.shape[-1], dtype=dtype, device=g.device)
    torch.sub(exponent.unsqueeze(-1), exponent.unsqueeze(-2), out=decay)
    # Hidden entries could overflow: they are clamped before and masked after the exponential.
    decay.clamp_(max=0.0).exp2_().mul_(visible.to(dtype).unsqueeze(2))
    from_start = exponent.exp2_().to(dtype)
    if carried is not None:
        from_start.mul_(carried.unsqueeze(2))
    return decay.flatten(1, 2), from_start.flatten(1, 2).unsqueeze(-1)


def _segment(
    inputs: tuple[Tensor, ...],
    documents: tuple[Tensor, ...],
    block: _Block,
    scale: float,
    chunk_size: int,
    dtype: torch.dtype,
) -> _Segment:
    """Load one segment and compute everything that does not depend on the state."""
    q, k, v, g, beta = inputs
    q = _load(q, block, chunk_size, dtype, scale)
    k, v, beta = (_load(x, block, chunk_size, dtype) for x in (k, v, beta))
    beta = beta.unsqueeze(-1)
    wide = dtype if g.device.type == "mps" else torch.float64  # MPS has no float64
    visible, carried = _masks(documents, block, chunk_size, g.device)
    decay, from_start = _decays(_load(g, block, chunk_size, wide).clamp_(min=_FORGETS_ALL), visible, carried, dtype)
    to_end = decay[..., -1, :].unsqueeze(-1).contiguous()
    key_products = _product(k, k.mT).mul_(decay)
    scores = _product(q, k.mT).mul_(decay)
    inverse = invert_unit_lower((key_products * beta).flatten(0, 1)).view_as(key_products)
    k_from_start, k_to_end = k * from_start, k * to_end
    return _Segment(
        q, k, v, beta, visible, decay, from_start, to_end, key_products, scores, inverse, k_from_start, k_to_end
    )


def _scan(seg: _Segment, state: Tensor) -> tuple[Tensor, Tensor]:
    """Run the state [N, K, V] through a segment: states before each chunk and after the last, and U."""
    chunks, rows = seg.v.shape[:2]
    states = state.new_empty(chunks + 1, rows, *state.shape[-2:])
    states[0] = state
    updates = torch.empty_like(seg.v)
    scaled_inverse = seg.inverse * seg.beta.mT
    through = seg.from_start[:, :, -1:]
    for c in range(chunks):
        seg.v[c].baddbmm_(seg.k_from_start[c], states[c], alpha=-1.0)
        torch.bmm(scaled_inverse[c], seg.v[c], out=updates[c])
        torch.mul(states[c], through[c], out=states[c + 1])
        states[c + 1].baddbmm_(seg.k_to_end[c].mT, updates[c])
    return states, updates


def _scan_backward(seg: _Segment, d_out: Tensor, d_updates: Tensor, d_state: Tensor) -> tuple[Tensor, Tensor]:
    """Run the gradient of the state back through a segment.

    Returns its gradients before each chunk and after the last, and the gradient of diag(beta) R. `d_updates` holds
    the part of U's gradient that comes from the outputs and receives the rest.
    """
    chunks, rows = d_out.shape[:2]
    d_states = d_state.new_empty(chunks + 1, rows, *d_state.shape[-2:])
    d_states[chunks] = d_state
    d_states[:chunks] = _product((seg.q * seg.from_start).mT, d_out)
    d_residual = torch.empty_like(d_updates)
    weighted = seg.k_from_start * seg.beta
    through = seg.from_start[:, :, -1:]
    for c in reversed(range(chunks)):
        d_updates[c].baddbmm_(seg.k_to_end[c], d_states[c + 1])
        torch.bmm(seg.inverse[c].mT, d_updates[c], out=d_residual[c])
        d_states[c].addcmul_(d_states[c + 1], through[c])
        d_states[c].baddbmm_(weighted[c].mT, d_residual[c], alpha=-1.0)
    return d_states, d_residual


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _segment_backward(seg: _Segment, state: Tensor, d_out: Tensor, d_state: Tensor) -> tuple[Tensor, ...]:
    """Gradients of one segment: scaled q, k, v, g, beta, and the state that entered."""
    states, updates = _scan(seg, state)
    d_scores = _product(d_out, updates.mT)
    d_states, d_residual = _scan_backward(seg, d_out, _product(seg.scores.mT, d_out), d_state)
    d_v = d_residual * seg.beta

    # Row sums minus column sums of (gradient of log D) give the gradient of G.
    d_products = _product(d_residual, updates.mT)  # minus the gradient of diag(beta) B
    d_log_decay = d_products * seg.key_products
    d_log_decay.diagonal(dim1=-2, dim2=-1).zero_()  # the diagonal of B does not exist
    d_beta = _row_dot(d_residual, seg.v).sub_(d_log_decay.sum(-1))
    torch.addcmul(d_scores * seg.scores, d_log_decay, seg.beta, value=-1.0, out=d_log_decay)
    d_log_decay.diagonal(dim1=-2, dim2=-1).zero_()  # D is 1 there, whatever g is
    d_cumulative = d_log_decay.sum(-1).sub_(d_log_decay.sum(-2))

    # Within the chunk. B is symmetric in K before masking, so its two products with K are one.
    d_scores.mul_(seg.decay)
    d_products.mul_(seg.decay).mul_(seg.beta).diagonal(dim1=-2, dim2=-1).zero_()
    # Through the state that entered the chunk.
    d_q = _product(d_out, states[:-1].mT).mul_(seg.from_start)
    d_cumulative += _row_dot(d_q, seg.q)
    _add_product(d_q, d_scores, seg.k)
    d_k = _product(d_v, states[:-1].mT).mul_(seg.from_start).neg_()
    d_cumulative += _row_dot(d_k, seg.k)
    # Through the state that leaves it. The last token's own contribution does not decay.
    d_k_end = _product(updates, d_states[1:].mT).mul_(seg.to_end)
    d_end = _row_dot(d_k_end, seg.k)
    d_end[..., -1] = 0.0
    d_cumulative -= d_end
    d_through = (d_states[1:] * states[:-1]).sum((-2, -1)).mul_(seg.from_start[..., -1, 0])
    d_cumulative[..., -1] += d_end.sum(-1) + d_through

    d_k += d_k_end
    _add_product(d_k, d_scores.mT, seg.q)
    _add_product(d_k, d_products + d_products.mT, seg.k, alpha=-1.0)
    d_cumulative = d_cumulative.unflatten(1, (seg.visible.shape[1], -1))
    d_g = torch.matmul(d_cumulative, seg.visible.to(d_cumulative.dtype)).flatten(1, 2)
    return d_q, d_k, d_v, d_g, d_beta, d_states[0]


def _backward(
    inputs: tuple[Tensor, ...],
    saved: Tensor,
    documents: tuple[Tensor, ...],
    scale: float,
    chunk_size: int,
    d_out: Tensor | None,
    d_final_state: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, g, beta, and the initial state, segment by segment from the last to the first."""
    dtype = saved.dtype
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
    d_initial = torch.empty_like(saved[0])
    for group in _blocks(inputs[0], inputs[2], chunk_size, dtype):
        rows = group[0].batch, group[0].heads
        shape = d_initial[rows].shape
        d_state = d_initial.new_zeros(shape) if d_final_state is None else d_final_state[rows]
        d_state = d_state.flatten(0, 1)
        for block in reversed(group):
            seg = _segment(inputs, documents, block, scale, chunk_size, dtype)
            d_o = torch.zeros_like(seg.v) if d_out is None else _load(d_out, block, chunk_size, dtype)
            *found, d_state = _segment_backward(seg, saved[block.index][rows].flatten(0, 1), d_o, d_state)
            for i, x in enumerate(found):
                _store(x, block, gradients[i], None if i else scale)  # the segment's q is scaled
        d_initial[rows] = d_state.view(shape)
    return *gradients, d_initial


class ChunkGatedDeltaRule(torch.autograd.Function):
    """o, final_state = apply(q, k, v, g, beta, initial_state, documents, scale, chunk_size); see delta_rule.py.

    `documents` is None or a pair: the running index of each token's document as [chunks, B, C], not decreasing along
    a row, and the index of the document that the state entering each chunk belongs to as [chunks, B].
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor,
        documents: tuple[Tensor, Tensor] | None,
        scale: float,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        inputs, dtype = (q, k, v, g, beta), initial_state.dtype
        groups = _blocks(q, v, chunk_size, dtype)
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        final_state = torch.empty_like(initial_state, memory_format=torch.contiguous_format)
        keep = any(ctx.needs_input_grad)
        saved = initial_state.new_empty(len(groups[0]) if keep else 0, *initial_state.shape)
        for group in groups:
            rows = group[0].batch, group[0].heads
            state = initial_state[rows].flatten(0, 1)
            for block in group:
                if keep:
                    saved[block.index][rows].copy_(state.view_as(saved[block.index][rows]))
                seg = _segment(inputs, documents or (), block, scale, chunk_size, dtype)
                states, updates = _scan(seg, state)
                o = _product(seg.q.mul_(seg.from_start), states[:-1])
                _store(_add_product(o, seg.scores, updates), block, out)
                state = states[-1]
            final_state[rows] = state.view_as(final_state[rows])
        ctx.save_for_backward(*inputs, saved, *(documents or ()))
        ctx.scale, ctx.chunk_size = scale, chunk_size
        ctx.set_materialize_grads(False)
        return out, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_final_state: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # read once: gradient checkpointing refuses a second time
        with no_autocast(tensors[0].device):
            gradients = _backward(
                tensors[:5], tensors[5], tensors[6:], ctx.scale, ctx.chunk_size, d_out, d_final_state
            )
        return *gradients, None, None, None
