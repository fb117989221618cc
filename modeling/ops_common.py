"""What all recurrences share: unit vectors, checks, chunk sizes, dtypes, first states, one token, and an inverse.

Shapes: B batch, T tokens, H heads, K key and V value width of a head, C tokens of a chunk.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor


_MINIMUM_CHUNK = 16
# Wider blocks are inverted by doubling; triangular substitution is exact but slow, products of blocks are fast.
_BASE_BLOCK = 16


def widen(x: Tensor) -> Tensor:
    """`x` in fp32 where it is half precision, and as it is otherwise."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def unit(x: Tensor) -> Tensor:
    """Unit vectors over the last axis, with the epsilon inside the root so that a zero row has a finite gradient."""
    wide = widen(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    *,
    decay_per_channel: bool = False,
) -> None:
    """Raise ValueError where the shapes do not fit together, saying what to do."""
    if q.dim() != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected [B, T, H, K]: split the heads into a dimension.")
    batch, tokens, heads, key_dim = q.shape
    if tokens == 0:
        raise ValueError(f"q has shape {tuple(q.shape)}, that is no tokens (T = 0): pass at least one token.")
    if v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"v has shape {tuple(v.shape)}, expected [B, T, H, V] = [{batch}, {tokens}, {heads}, V] as q has: "
            "expand q and k to all value heads (repeat_interleave over H) before the call."
        )
    state_shape = (batch, heads, key_dim, v.shape[-1])
    decay = (tuple(q.shape[:3]), "[B, T, H], one log decay per token and head")
    if decay_per_channel:
        decay = (tuple(q.shape), "[B, T, H, K], one log decay per token, head and key channel")
    expected: list[tuple[str, Tensor | None, tuple[int, ...], str]] = [
        ("k", k, tuple(q.shape), "[B, T, H, K] as q: expand k to all heads"),
        ("g", g, *decay),
        ("beta", beta, tuple(q.shape[:3]), "[B, T, H], one write strength per token and head"),
        (
            "initial_state",
            initial_state,
            state_shape,
            "[B, H, K, V]: transpose a state that is stored as [B, H, V, K]",
        ),
        ("seq_idx", seq_idx, (batch, tokens), "[B, T], one document index per token; expand it over the rows"),
    ]
    for name, x, shape, hint in expected:
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {shape}, that is {hint}.")
    if seq_idx is not None and (seq_idx.is_floating_point() or seq_idx.dtype == torch.bool):
        raise ValueError(f"seq_idx has dtype {seq_idx.dtype}, expected integers: pass seq_idx.to(torch.int32).")


def fit_chunk_size(chunk_size: int | None, q: Tensor) -> int:
    """`chunk_size` or the device's default, and less where `q` `[B, T, ...]` is short and need not be padded to it."""
    if chunk_size is None:
        chunk_size = 32 if q.device.type == "cpu" else 64
    if chunk_size < _MINIMUM_CHUNK or chunk_size & (chunk_size - 1):
        raise ValueError(
            f"chunk_size={chunk_size}, but chunks are inverted by halves: give a power of 2, {_MINIMUM_CHUNK} or more."
        )
    while chunk_size > _MINIMUM_CHUNK and chunk_size // 2 >= q.shape[1]:
        chunk_size //= 2
    return chunk_size


def running_documents(seq_idx: Tensor) -> Tensor:
    """The documents of `seq_idx` `[B, T]` counted from 0 in each row: a number that reappears is another document."""
    return F.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(1), (1, 0))


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """What a recurrence computes in: fp64 where an operand has it, fp32 otherwise."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def first_state(q: Tensor, v: Tensor, state: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`state`, or zeros `[B, H, K, V]`, in `dtype`."""
    if state is not None:
        return state.to(dtype)
    return q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[-1], dtype=dtype)


def one_token(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, beta: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """
    One token of a recurrence, for compiled decoding steps: sums, which a compiler fuses with what is around them, and
    the state is read once for both the key and the query. Run as it stands, products of matrices are quicker.

    With D = diag(decay), `S' = D S + k u^T` and `S'^T q = (D S)^T q + (k . q) u`, where what is written, u, is v, or
    for the delta rules `beta (v - (D S)^T k)`.

    Args:
        q: `[B, H, K]`, scaled.
        k: `[B, H, K]`.
        v: `[B, H, V]`.
        decay: `[B, H, K]`, or `[B, H, 1]` for one that all channels share; a factor.
        state: `[B, H, K, V]`, before the token; it is not modified.
        beta: `[B, H, 1]`, write strength of the delta rules; None for a sum.

    Returns:
        The output `[B, H, V]` and the state after the token.
    """
    write = v
    if beta is not None:
        write = (v - ((k * decay).unsqueeze(-1) * state).sum(-2)) * beta
    output = ((q * decay).unsqueeze(-1) * state).sum(-2) + (q * k).sum(-1, keepdim=True) * write
    return output, torch.addcmul(state * decay.unsqueeze(-1), k.unsqueeze(-1), write.unsqueeze(-2))


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Keep autocast from casting products to half precision; entered only where it is on, for the sake of decoding."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def invert_unit_lower(lower: Tensor) -> Tensor:
    """(I + strictly lower part of `lower`)^-1 for [n, C, C], by substitution in small blocks and block doubling.

    A Neumann product over the whole width would be fewer operations, but its intermediate powers overflow when keys
    are nearly identical and beta is near 2. Here every product is a block of the true inverse.
    """
    n, size, _ = lower.shape
    base = min(_BASE_BLOCK, size)
    count = size // base
    blocks = lower.view(n, count, base, count, base).diagonal(dim1=1, dim2=3).movedim(-1, 1).reshape(-1, base, base)
    identity = torch.eye(base, dtype=lower.dtype, device=lower.device).expand_as(blocks)
    blocks = torch.linalg.solve_triangular(blocks, identity, upper=False, unitriangular=True)
    inverse = torch.zeros_like(lower)
    diagonal = inverse.view(n, count, base, count, base).diagonal(dim1=1, dim2=3).movedim(-1, 1)
    diagonal.copy_(blocks.view(n, count, base, base))
    width = base
    while width < size:
        for start in range(0, size, 2 * width):
            first, second = slice(start, start + width), slice(start + width, start + 2 * width)
            corner = torch.bmm(
                torch.bmm(inverse[:, second, second], lower[:, second, first]), inverse[:, first, first]
            )
            torch.neg(corner, out=inverse[:, second, first])
        width *= 2
    return inverse
