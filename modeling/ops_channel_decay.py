"""What the chunked recurrences share whose decay differs by key channel (gla.py, kda.py).

Inside a chunk a query q_i meets a key k_j through every channel d with its own decay::

    A[i, j] = sum_d q_i[d] k_j[d] exp(g_{j+1}[d] + ... + g_i[d])        for j <= i

With the cumulative sum G this is (q exp(G)) (k exp(-G))^T, whose second factor overflows. Here A is built by halves:
for the second half of a block against its first half, the decay splits at the middle into a part after it, which goes
to the query, and a part before it, which goes to the key. Both are sums of non-positive numbers, so no factor exceeds
1, nothing cancels, and a log decay of -inf is as good as any: that is how a packed row restarts.

Shapes: S chunks, N rows (a row being one head of one sequence), C tokens of a chunk, K and V widths of key and value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ops_common import no_autocast


# Bytes of one [S, N, C, K] intermediate of a segment, per thread on the CPU.
_CPU_SEGMENT_BYTES = 512 * 1024
_ACCELERATOR_SEGMENT_BYTES = 64 * 1024 * 1024
SegmentForm = Callable[..., tuple[Tensor, Tensor]]


def forget_at_restarts(g: Tensor, seq_idx: Tensor | None) -> Tensor:
    """`g` `[B, T, H, K]` with -inf at the first token of every document but the first: the state restarts there."""
    if seq_idx is None:
        return g
    restart = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    return g.masked_fill(restart[..., None, None], -math.inf)


def decayed_products(left: Tensor, right: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    Products of `left` with the `right` at or before it, decayed per channel; see the module's docstring.

    Args:
        left: `[..., C, K]`, C a power of two; it may have leading dimensions that the others lack.
        right: `[..., C, K]`.
        g: `[..., C, K]`, log2 of the decay at each token, at most 0.

    Returns:
        The products `[..., C, C]`, zero above the diagonal, and log2 of the decay from the start of the chunk up to
        and with each token, and from after each token to the end, `[..., C, K]`.
    """
    size = g.shape[-2]
    products = (left * right).sum(-1)[..., None, None]  # blocks of one token: [..., C, 1, 1]
    before, after = g.unsqueeze(-2), torch.zeros_like(g).unsqueeze(-2)
    width = 1
    while width < size:
        halves = (size // (2 * width), 2, width)
        (before_1, before_2), (after_1, after_2), (products_1, products_2) = (
            x.unflatten(-3, halves[:2]).unbind(-3) for x in (before, after, products)
        )
        query = left.unflatten(-2, halves).select(-3, 1) * before_2.exp2()
        key = right.unflatten(-2, halves).select(-3, 0) * after_1.exp2()
        corner = query @ key.mT
        products = torch.cat([F.pad(products_1, (0, width)), torch.cat([corner, products_2], dim=-1)], dim=-2)
        after = torch.cat([after_1 + before_2[..., -1:, :], after_2], dim=-2)
        before = torch.cat([before_1, before_2 + before_1[..., -1:, :]], dim=-2)
        width *= 2
    return products.squeeze(-3), before.squeeze(-3), after.squeeze(-3)


def run_chunks(
    form: SegmentForm, inputs: list[Tensor], state: Tensor, chunk_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """
    Runs a recurrence over `inputs`, a few chunks (a segment) at a time, with memory linear in T.

    Args:
        form: `(*inputs, state) -> (output, state)` for one segment, of inputs `[S, N, C, ...]` and state `[N, K, V]`.
            Plain torch operations; they are run again in the backward pass, and differentiated there.
        inputs: `[B, T, H, ...]` each; zeros must leave the state as it is.
        state: `[B, H, K, V]`.

    Returns:
        The output `[B, T, H, V]` and the final state `[B, H, K, V]`, both in `dtype`.
    """
    batch, tokens, heads = inputs[0].shape[:3]
    with no_autocast(state.device):
        chunked = [_to_chunks(x.to(dtype), chunk_size) for x in inputs]
        widest = max(chunk_size, *state.shape[-2:])
        cell = max(1, batch) * heads * chunk_size * widest * (torch.finfo(dtype).bits // 8)
        on_cpu = state.device.type == "cpu"
        budget = _CPU_SEGMENT_BYTES * torch.get_num_threads() if on_cpu else _ACCELERATOR_SEGMENT_BYTES
        # Two chunks at least: the saved states are then no larger than half the keys and values of square heads.
        o, state = _Segments.apply(form, max(2, budget // cell), state.to(dtype).flatten(0, 1), *chunked)
        o = o.unflatten(1, (batch, heads)).permute(1, 0, 3, 2, 4).flatten(1, 2)
        return o[:, :tokens], state.unflatten(0, (batch, heads))


def _to_chunks(x: Tensor, chunk_size: int) -> Tensor:
    """`[B, T, H, D]` as `[S, B H, C, D]`, the last chunk padded with zeros."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk_size))
    return x.unflatten(1, (-1, chunk_size)).permute(1, 0, 3, 2, 4).flatten(1, 2).contiguous()


class _Segments(torch.autograd.Function):
    """Keeps the inputs and the state that enters each segment; everything else is rebuilt in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, form: SegmentForm, chunks_per_segment: int, state: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        outputs, states = [], []
        for part in zip(*(x.split(chunks_per_segment) for x in inputs), strict=True):
            states.append(state)
            o, state = form(*part, state)
            outputs.append(o)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*inputs, *states)
        ctx.form, ctx.chunks_per_segment, ctx.num_inputs = form, chunks_per_segment, len(inputs)
        return torch.cat(outputs), state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # read once: gradient checkpointing refuses a second time
        inputs, states = tensors[: ctx.num_inputs], tensors[ctx.num_inputs :]
        gradients = [torch.empty_like(x) for x in inputs]
        n = ctx.chunks_per_segment
        with no_autocast(d_out.device):
            for i in reversed(range(len(states))):
                part = slice(i * n, (i + 1) * n)
                leaves = [x.detach().requires_grad_() for x in (states[i], *(x[part] for x in inputs))]
                with torch.enable_grad():
                    results = ctx.form(*leaves[1:], leaves[0])
                d_state, *found = torch.autograd.grad(results, leaves, (d_out[part], d_state))
                for gradient, x in zip(gradients, found, strict=True):
                    gradient[part] = x
        return None, None, d_state, *gradients
